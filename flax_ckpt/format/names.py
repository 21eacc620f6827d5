"""Names that are part of the on-disk format: files, type strings, suffixes.

They are constants, never derived from a class, so that renaming a class cannot change a file.
Source: the format as Orbax 0.12.8 writes and reads it.
"""

import re
from typing import Final

# Checkpoint root.
INDICATOR: Final = "orbax.checkpoint"
CHECKPOINT_METADATA: Final = "_CHECKPOINT_METADATA"
COMMIT_SUCCESS: Final = "commit_success.txt"
INTEGRITY: Final = "flax_ckpt.json"
DELETION_RECORD: Final = "_CHECKPOINT_DELETION"
TMP_SUFFIX: Final = ".orbax-checkpoint-tmp"
PARTIAL_SUFFIX: Final = ".partial_save"
OWNER: Final = ".owner"
LOCK: Final = ".flax_ckpt.lock"  # in a root: which process saves there

# Unfinished partial saves: a directory of this package.
SESSION_SUFFIX: Final = ".flax_ckpt.partial_save"

# Of a whole run, under its root.
ROOT_METADATA: Final = ("metadata", "_ROOT_METADATA")
ROOT_METADATA_LEGACY: Final = ("metadata", "metadata")

# Each of them marks a directory as a checkpoint.
MARKS: Final = frozenset({INDICATOR, CHECKPOINT_METADATA, INTEGRITY, "_METADATA"})

# Checkpointables.
STATE: Final = "state"
DATA: Final = "data"  # the iterator of a run
LEGACY_STATES: Final = ("state", "pytree", "default")
METRICS: Final = "metrics"
AUTO: Final = "AUTO"
RESERVED: Final = frozenset({METRICS, AUTO, DELETION_RECORD, ""})
IGNORED_ITEMS: Final = frozenset({"descriptor"})

# PyTree directory.
TREE_METADATA: Final = "_METADATA"
SHARDING: Final = "_sharding"
STRINGS: Final = "_strings.json"
ARRAY_METADATAS: Final = "array_metadatas"
MANIFEST: Final = "manifest.ocdbt"
DATA_DIR: Final = "d"
CHUNK_TABLE: Final = "flax_ckpt.crc32c"

# Other checkpointables.
PROTO_FILE: Final = "proto.pbtxt"
PROTO_HEADER: Final = "# proto-message: "
JSON_FILE: Final = "data.json"
JSON_LEGACY_FILE: Final = "metadata"
METRICS_FILE: Final = "metrics"

# Handler type strings, as Orbax records them. The v0 PyTree string is the one that every
# Orbax reader accepts, the argument-less v0 `CheckpointManager.restore` included.
_V0: Final = "orbax.checkpoint._src.handlers."
_V0_MOVED: Final = "orbax.checkpoint.v0._src.handlers."
_V1: Final = "orbax.checkpoint.experimental.v1._src.handlers."
TYPE_PYTREE: Final = _V0 + "pytree_checkpoint_handler.PyTreeCheckpointHandler"
TYPE_PROTO: Final = _V1 + "proto_handler.ProtoHandler"
TYPE_JSON: Final = _V0 + "json_checkpoint_handler.JsonCheckpointHandler"
TYPE_METRICS: Final = _V1 + "json_handler.MetricsHandler"
TYPE_STATEFUL: Final = _V1 + "stateful_checkpointable_handler.StatefulCheckpointableHandler"


def _types(v1: str, *v0: str) -> frozenset[str]:
    """The handlers of one kind of file: their v1 name, and the v0 names where each has been."""
    return frozenset({_V1 + v1, *(room + name for room in (_V0, _V0_MOVED) for name in v0)})


PYTREE_TYPES: Final = _types(
    "pytree_handler.PyTreeHandler",
    "pytree_checkpoint_handler.PyTreeCheckpointHandler",
    "standard_checkpoint_handler.StandardCheckpointHandler",
)
PROTO_TYPES: Final = _types(
    "proto_handler.ProtoHandler", "proto_checkpoint_handler.ProtoCheckpointHandler"
)
JSON_TYPES: Final = _types(
    "json_handler.JsonHandler", "json_checkpoint_handler.JsonCheckpointHandler"
)


def is_unfinished(name: str) -> bool:
    """Whether a directory of that name is a save that has not come to its end."""
    return TMP_SUFFIX in name or PARTIAL_SUFFIX in name


def position_file(index: int, count: int) -> str:
    """The file in which a process keeps the position of its data iterator, as Grain calls it."""
    return f"process_{index}-of-{count}.json"


def process_count_of(name: str) -> int | None:
    """How many processes saved positions of data iterators, as the name of such a file says.

    >>> process_count_of("process_0-of-2.json"), process_count_of("row.json")
    (2, None)
    """
    match = re.fullmatch(r"process_[0-9]+-of-([0-9]+)\.json", name)
    return None if match is None else int(match[1])


def step_of(name: str) -> tuple[str, int, int] | None:
    """What a directory's name says of a step: its prefix, number, and count of digits.

    >>> step_of("1500"), step_of("ckpt_000020"), step_of("20.orbax-checkpoint-tmp")
    (('', 1500, 4), ('ckpt', 20, 6), None)
    """
    match = re.fullmatch(r"(?:(.+)_)?([0-9]+)", name)
    if match is None or is_unfinished(name):
        return None
    return match[1] or "", int(match[2]), len(match[2])
