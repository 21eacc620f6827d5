"""Names that are part of the on-disk format: files, type strings, suffixes.

They are constants, never derived from a class, so that renaming a class cannot change a file.
Source: the format as Orbax 0.12.8 writes and reads it.
"""

from __future__ import annotations

from typing import Final

# Checkpoint root.
INDICATOR: Final = "orbax.checkpoint"
CHECKPOINT_METADATA: Final = "_CHECKPOINT_METADATA"
COMMIT_SUCCESS: Final = "commit_success.txt"
INTEGRITY: Final = "flax_ckpt.json"
DELETION_RECORD: Final = "_CHECKPOINT_DELETION"
TMP_SUFFIX: Final = ".orbax-checkpoint-tmp"

# Each of them marks a directory as a checkpoint.
MARKS: Final = frozenset({INDICATOR, CHECKPOINT_METADATA, INTEGRITY, "_METADATA"})

# Checkpointables.
STATE: Final = "state"
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

PYTREE_TYPES: Final = frozenset(
    {
        TYPE_PYTREE,
        _V1 + "pytree_handler.PyTreeHandler",
        _V0_MOVED + "pytree_checkpoint_handler.PyTreeCheckpointHandler",
        _V0 + "standard_checkpoint_handler.StandardCheckpointHandler",
        _V0_MOVED + "standard_checkpoint_handler.StandardCheckpointHandler",
    }
)
PROTO_TYPES: Final = frozenset(
    {
        TYPE_PROTO,
        _V0 + "proto_checkpoint_handler.ProtoCheckpointHandler",
        _V0_MOVED + "proto_checkpoint_handler.ProtoCheckpointHandler",
    }
)
JSON_TYPES: Final = frozenset(
    {
        TYPE_JSON,
        _V1 + "json_handler.JsonHandler",
        _V0_MOVED + "json_checkpoint_handler.JsonCheckpointHandler",
    }
)
