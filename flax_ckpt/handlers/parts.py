"""PyTrees that were saved in parts, each in a directory of its own: checked, and put together."""

import os
from collections.abc import Sequence

from flax_ckpt.format import names, tree, union
from flax_ckpt.storage import files, native_write
from flax_ckpt.storage.record import Record
from flax_ckpt.storage.session import Session


def check_disjoint(directory: str, described: union.Files) -> None:
    """Checks that a part has no leaf that an earlier one of its session has.

    Args:
        directory: of the part that is about to be written.
        described: the files that will describe it.

    Raises:
        DuplicateNameError: lists the leaves; nothing was written.
    """
    session, name = os.path.dirname(os.path.dirname(directory)), os.path.basename(directory)
    target = session.removesuffix(names.SESSION_SUFFIX)
    if target == session:
        return
    earlier = [_read(os.path.join(part, name)) for part in Session(target).parts()]
    union.unite([*earlier, described], f"the partial save of {target}")


def merge(directory: str, parts: Sequence[str], target: str) -> None:
    """Puts a PyTree directory together from those of its parts, without copying array data.

    Args:
        directory: the new one; exists.
        parts: directories of the parts; they stay as they are.
        target: the checkpoint, for error messages.

    Raises:
        DuplicateNameError: two parts have the same leaf.
        FormatError: together they are no tree: an element of a list is missing.
    """
    what = f"the partial save of {target}"
    described = union.unite([_read(part) for part in parts], what)
    metadata = tree.TreeMetadata.from_bytes(described[names.TREE_METADATA], what)
    tree.build([(entry.path, None) for entry in metadata.entries], what)
    for name, data in described.items():
        path = os.path.join(directory, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        files.write(path, data)
    native_write.unite(directory, parts)


def _read(directory: str) -> dict[str, bytes]:
    """The files that describe a PyTree directory, checked."""
    record = Record(directory)
    inside = [name for name in files.walk(directory) if name.startswith(names.ARRAY_METADATAS)]
    wanted = (names.TREE_METADATA, names.SHARDING, names.STRINGS, *inside)
    return {name: record.read(name) for name in wanted if record.lists(name)}
