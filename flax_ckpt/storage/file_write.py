"""Writes arrays as plain files, a directory for each array and a file for each chunk.

    write_arrays(directory, arrays, hosts, ArrayLayout(ocdbt=False))  # w/zarr.json, w/c/0/0, …

Each process writes the chunks that it has. `flax_ckpt.json` has the checksums of these files, as of
all that no table vouches for.
"""

import os
from collections.abc import Sequence
from typing import Final

import crc32c

from flax_ckpt.errors import UnsupportedLeafError
from flax_ckpt.format import arrays as zarr
from flax_ckpt.format import names
from flax_ckpt.storage.hosts import Hosts
from flax_ckpt.storage.native_write import encoded
from flax_ckpt.storage.store import ArrayLayout, ArrayWrite

# What else may lie in the directory of a tree; `checkpoint` is a file of Orbax's first format.
_TAKEN: Final = frozenset(
    {
        *(names.TREE_METADATA, names.SHARDING, names.STRINGS, names.ARRAY_METADATAS),
        *(names.MANIFEST, names.CHUNK_TABLE, "checkpoint"),
    }
)


def write_arrays(
    directory: str, arrays: Sequence[ArrayWrite], hosts: Hosts, layout: ArrayLayout
) -> None:
    """Writes arrays as files; nothing is synced, the commit does that.

    Args:
        directory: of the PyTree; exists.
        arrays: all arrays of the tree, in every process the same, with this process's shards.
        hosts: the processes that write together.
        layout: how the arrays are encoded.
    """
    trailer = layout.encoding.trailer
    for key, data, padding in encoded(arrays, layout.encoding, primary=hosts.is_primary):
        path = os.path.join(directory, key.decode())
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "xb") as file:
            if isinstance(data, bytes):
                file.write(data)
            else:
                zeros = bytes(padding)
                crc = crc32c.crc32c(zeros, crc32c.crc32c(data.data))
                file.writelines((data.data, zeros, crc.to_bytes(4, "little")[:trailer]))


def check_names(wanted: Sequence[str]) -> None:
    """Checks that each array can have a directory of its own, named as it.

    Raises:
        UnsupportedLeafError: lists the names that cannot be directories, or lie in another's.
    """
    found = set(wanted)
    refused = [f"  {name!r}: {why}" for name in wanted if (why := _refusal(name, found))]
    if refused:
        raise UnsupportedLeafError(
            "these arrays cannot be stored as files named after their keys:\n"
            + "\n".join(refused)
            + "\nRename the keys, or leave array.saving.use_ocdbt as it is"
        )


def _refusal(name: str, others: set[str]) -> str:
    parts = name.split("/")
    if not zarr.prefix(name):
        return "" if len(others) == 1 else "without a name only a tree of one array can be stored"
    if parts[0] in _TAKEN:
        return f"{parts[0]} is a file of the format"
    if "\0" in name or {"", ".", ".."} & set(parts):
        return "is no path of a directory below the tree's"
    above = next((o for i in range(1, len(parts)) if (o := "/".join(parts[:i])) in others), None)
    return f"lies in the directory of the array {above!r}" if above else ""
