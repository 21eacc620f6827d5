"""One tree from several that were saved apart: the files that describe it, from theirs.

    unite([files of {"a": {"x": 1}}, files of {"a": {"y": 2}}])   # those of {"a": {"x": 1, "y": 2}}

Nested dicts merge, an empty dict into any dict; a leaf that two of them have is an error.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from flax_ckpt.errors import DuplicateNameError, FormatError
from flax_ckpt.format import arrays, jsons, names, tree

_EMPTY_DICT: Final = "Dict"

Files = Mapping[str, bytes]  # contents by name: `_METADATA`, `array_metadatas/process_0`, ...


def unite(parts: Sequence[Files], what: str) -> dict[str, bytes]:
    """The files that describe the union of several trees.

    Args:
        parts: the describing files of each, at least one.
        what: the union, for error messages.

    Raises:
        DuplicateNameError: lists the leaves that two of them have, or that exclude each other.
        FormatError: the trees are stored in different ways.
    """
    metadatas = [tree.TreeMetadata.from_bytes(part[names.TREE_METADATA], what) for part in parts]
    entries = _unite_entries([metadata.entries for metadata in metadatas], what)
    stored = {(metadata.use_ocdbt, metadata.use_zarr3) for metadata in metadatas}
    if len(stored) > 1 or not all(use_ocdbt for use_ocdbt, _ in stored):
        raise FormatError(
            f"{what}: parts with (use_ocdbt, use_zarr3) = {sorted(map(str, stored))}; all parts"
            " of one tree must be saved with the same options, and with use_ocdbt"
        )
    found = {names.TREE_METADATA: tree.TreeMetadata(entries, *stored.pop()).to_bytes()}
    shardings: dict[str, str] = {}
    strings: dict[str, str] = {}
    arrays_of: dict[str, list[tree.ArrayMetadata]] = {}
    for part, metadata in zip(parts, metadatas, strict=True):
        for name, data in part.items():
            if name == names.SHARDING:
                shardings |= tree.decode_shardings(data, what)
            elif name == names.STRINGS:
                wanted = [tree.name_of(e.path) for e in metadata.entries if e.kind == tree.STRING]
                strings |= tree.decode_strings(data, wanted, what)
            elif name.startswith(names.ARRAY_METADATAS):
                arrays_of.setdefault(name, []).extend(tree.decode_array_metadatas(data, what))
    if shardings:
        found[names.SHARDING] = tree.encode_shardings(shardings)
    if strings:
        found[names.STRINGS] = tree.encode_strings(strings)
    return found | {name: tree.encode_array_metadatas(m) for name, m in arrays_of.items()}


def _unite_entries(parts: Sequence[Sequence[tree.Entry]], what: str) -> list[tree.Entry]:
    found: dict[tree.KeyPath, tree.Entry] = {}
    clashes: list[str] = []
    for entry in (entry for part in parts for entry in part):
        other = found.setdefault(entry.path, entry)
        if other is not entry and {entry.kind, other.kind} != {_EMPTY_DICT}:
            clashes.append(f"  {tree.show(entry.path)} is saved already")
    inner: dict[tree.KeyPath, set[int]] = {}
    for path in found:
        for n, key in enumerate(path):
            inner.setdefault(path[:n], set()).add(key.kind)
    for path, kinds in inner.items():
        if len(kinds) > 1:
            clashes.append(f"  {tree.show(path)} is a dict in one part and a list in another")
        entry = found.get(path)
        if entry and entry.kind == _EMPTY_DICT and kinds == {tree.DICT}:
            del found[path]
        elif entry:
            clashes.append(f"  {tree.show(path)} is one leaf in one part, and has some in another")
    if clashes:
        raise DuplicateNameError(
            f"{what}: what was saved stays as it is, nothing was added to it:\n"
            + "\n".join(clashes)
            + "\nParts of one tree must be disjoint; a leaf cannot be replaced: leave it out"
        )
    leaves = [path for path, entry in found.items() if entry.kind not in tree.EMPTY]
    tree.unique_names(leaves, [arrays.prefix(tree.name_of(path)) for path in leaves])
    return [found[path] for path in sorted(found, key=_order)]


def _order(path: tree.KeyPath) -> list[tuple[int, str]]:
    """Sorts elements of lists by their number."""
    return [(int(key.key) if key.kind == tree.SEQUENCE else 0, key.key) for key in path]


def merge_custom(first: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dicts merged; where both have a value, that of `then`."""
    merged = dict(first)
    for key, value in then.items():
        before: Any = merged.get(key)
        both = jsons.is_object(before) and jsons.is_object(value)
        merged[key] = merge_custom(before, value) if both else value
    return merged
