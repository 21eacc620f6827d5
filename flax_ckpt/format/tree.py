"""The files that describe a PyTree directory: `_METADATA`, `_sharding`, `array_metadatas`, strings.

A leaf's place is its key path, a tuple of `(key, kind)`. Its name on disk is the keys joined with
dots, unescaped: that is the format, so two leaves can collide, and `unique_names` refuses it.
Containers come back as dicts and lists: the format knows no other kinds.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from types import NoneType
from typing import Any, Final, Literal, NamedTuple

import msgspec

from flax_ckpt.errors import DuplicateNameError, FormatError
from flax_ckpt.format import jsons, names

SEQUENCE: Final = 1  # lists, tuples, nodes whose children have no names
DICT: Final = 2  # dicts, named tuples, dataclasses
MAX_DEPTH: Final = 256  # no tree of a model is as deep; a hostile one would exhaust the stack

ARRAY: Final = "jax.Array"
NUMPY: Final = "np.ndarray"
SCALAR: Final = "scalar"
STRING: Final = "string"
EMPTY: Any = {"Dict": dict, "List": list, "Tuple": tuple, "None": NoneType, "NamedTuple": NoneType}


# What there is once for each leaf is a Struct with `gc=False`: there may be 200,000, and each
# object that the collector has to visit makes every full collection of the process slower.
class Key(msgspec.Struct, frozen=True, gc=False):
    """One step on the way to a leaf.

    Attributes:
        key: dict key or attribute, or the index as text.
        kind: `SEQUENCE` or `DICT`.
    """

    key: str
    kind: Literal[1, 2] = msgspec.field(name="key_type")


KeyPath = tuple[Key, ...]
Shape = tuple[int, ...]


class ValueMetadata(msgspec.Struct, frozen=True, gc=False):
    """What `_METADATA` says of one value.

    Attributes:
        value_type: `jax.Array`, `np.ndarray`, `scalar`, `string`, or the kind of an empty node.
        skip_deserialize: whether it is an empty node.
    """

    value_type: str
    skip_deserialize: bool = False


class _ArrayValue(ValueMetadata, frozen=True, gc=False):
    """With the shape of what one process wrote at a time, which no reader needs."""

    write_shape: Shape = ()


class Entry(msgspec.Struct, frozen=True, gc=False):
    """One leaf or empty node of a saved tree.

    Attributes:
        path: its key path.
        value: what is there.
    """

    path: KeyPath = msgspec.field(name="key_metadata")
    value: ValueMetadata = msgspec.field(name="value_metadata")

    @classmethod
    def of(cls, path: KeyPath, kind: str, write_shape: Shape | None = None) -> Entry:
        """The entry of a leaf or an empty node of this `value_type`.

        An array's `write_shape` is the shape of what one process writes at a time.
        """
        if write_shape is None:
            return cls(path, ValueMetadata(kind, kind in EMPTY))
        return cls(path, _ArrayValue(kind, False, write_shape))

    @property
    def kind(self) -> str:
        """The `value_type`."""
        return self.value.value_type


class _Document(msgspec.Struct):
    tree_metadata: dict[str, Entry]
    # Of any kind, and not looked into: `custom_metadata` may be anything.
    use_ocdbt: msgspec.Raw = msgspec.Raw(b"null")
    use_zarr3: msgspec.Raw = msgspec.Raw(b"null")
    store_array_data_equal_to_fill_value: msgspec.Raw = msgspec.Raw(b"true")
    custom_metadata: msgspec.Raw = msgspec.Raw(b"null")


class TreeMetadata(NamedTuple):
    """`_METADATA`.

    Attributes:
        entries: all leaves and empty nodes.
        use_ocdbt: whether arrays are in one OCDBT database; None: the file does not say.
        use_zarr3: whether arrays are zarr version 3, else 2.
    """

    entries: Sequence[Entry]
    use_ocdbt: bool | None = True
    use_zarr3: bool = True

    def to_bytes(self) -> bytes:
        """The file."""
        tree = {str(tuple([key.key for key in e.path])): e for e in self.entries}
        if len(tree) != len(self.entries):  # {1: {}, "1": []}: same keys, told apart by nothing
            paths = [e.path for e in self.entries]
            unique_names(paths, [tuple([key.key for key in path]) for path in paths])
        flags = [msgspec.Raw(jsons.dump(flag)) for flag in (self.use_ocdbt, self.use_zarr3)]
        return msgspec.json.encode(_Document(tree, *flags))

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> TreeMetadata:
        """Parses the file.

        Raises:
            FormatError: it does not describe a tree.
        """
        document = jsons.decode(data, _Document, what)
        entries = list(document.tree_metadata.values())
        if not entries:
            raise FormatError(f"{what}: `tree_metadata` is empty")
        paths = [e.path for e in entries]
        if (depth := max(map(len, paths))) > MAX_DEPTH:
            raise FormatError(f"{what}: a key path of {depth} keys, expected at most {MAX_DEPTH}")
        if len(set(paths)) < len(paths):
            [(twice, _)] = Counter(paths).most_common(1)
            raise FormatError(f"{what}: the leaf {show(twice)} is there twice")
        ocdbt = {b"true": True, b"false": False}.get(bytes(document.use_ocdbt))
        return cls(_without_leftovers(entries), ocdbt, bytes(document.use_zarr3) == b"true")


def _without_leftovers(entries: list[Entry]) -> list[Entry]:
    """Drops empty nodes in which there is something: partial saves leave such."""
    if all(e.kind not in EMPTY for e in entries):
        return entries
    nodes: dict[tuple[int, Key], int] = {}  # each by its number, under that of its parent
    parents, places = set[int](), [0] * len(entries)
    for i, entry in enumerate(entries):
        for key in entry.path:
            parents.add(places[i])
            places[i] = nodes.setdefault((places[i], key), len(nodes) + 1)
    found = zip(entries, places, strict=True)
    return [e for e, place in found if e.kind not in EMPTY or place not in parents]


def name_of(path: KeyPath) -> str:
    """The name of a leaf's data on disk: `params.dense.kernel`."""
    return ".".join([key.key for key in path])


def show(path: KeyPath) -> str:
    """A key path as error messages print it: `params/dense/kernel`."""
    return "/".join([key.key for key in path]) or "(the whole tree)"


def unique_names(paths: Sequence[KeyPath], names: Sequence[Hashable]) -> None:
    """Checks that no two leaves share a name.

    Args:
        paths: key path of each leaf.
        names: what each is told apart by on disk.

    Raises:
        DuplicateNameError: names every pair that collides.
    """
    if len(set(names)) == len(names):
        return
    first = dict(zip(reversed(names), reversed(paths), strict=True))
    pairs = [(first[n], path) for path, n in zip(paths, names, strict=True) if first[n] is not path]
    clashes = [f"  {_quoted(one)} and {_quoted(other)}" for one, other in pairs]
    what = "these leaves would be stored under one name, and one of each pair would be lost:"
    how = "Keys are joined with dots on disk: rename one of the keys"
    raise DuplicateNameError("\n".join([what, *clashes, how]))


def _quoted(path: KeyPath) -> str:
    return "".join(f"[{key.key!r}]" for key in path)


def build(leaves: Iterable[tuple[KeyPath, Any]], what: str, *, gaps: bool = False) -> Any:
    """Nested dicts and lists from leaves by key path.

    Args:
        leaves: key path and value of each leaf.
        what: the tree, for error messages.
        gaps: whether a list may lack elements; it is a dict by index then.

    Raises:
        FormatError: the paths make no tree: a gap in a list, two kinds of node in one place.
    """
    root: dict[str, Any] = {}
    kinds: dict[int, int] = {}  # of the nodes by their `id`: a leaf may be a dict, too
    lists: list[tuple[dict[str, Any], str]] = []  # where they are, the outer ones first
    for path, value in leaves:
        node, place = root, ""
        for key in path:
            if place not in node:
                child = node[place] = dict[str, Any]()
                kinds[id(child)] = key.kind
                if key.kind == SEQUENCE:
                    lists.append((node, place))
            elif kinds.get(id(child := node[place])) != key.kind:
                raise FormatError(f"{what}: {show(path)} lies in a node of another kind")
            node, place = child, key.key
        if place in node:
            raise FormatError(f"{what}: {show(path)} is there twice")
        node[place] = value
    for node, place in reversed(lists):
        items = node[place]
        if gaps and items.keys() != set(map(str, range(len(items)))):
            continue
        try:
            node[place] = [items[str(i)] for i in range(len(items))]
        except KeyError as error:
            raise FormatError(f"{what}: a list of {len(items)} has no element {error}") from error
    return root[""] if root else {}


_URL_SAFE: Final = str.maketrans("-_", "+/")


def encode_shardings(shardings: Mapping[str, str]) -> bytes:
    """`_sharding`: the JSON text of each array's sharding, by the array's name."""
    keys = [base64.urlsafe_b64encode(name.encode()).decode() for name in shardings]
    return jsons.dump(dict(zip(keys, shardings.values(), strict=True)))


def decode_shardings(data: bytes, what: str) -> dict[str, str]:
    """The opposite of :func:`encode_shardings`."""
    raw = jsons.decode(data, dict[str, str], what)
    keys = "\n".join(raw).translate(_URL_SAFE).split("\n") if raw else []  # all at once
    try:
        found = map(bytes.decode, map(binascii.a2b_base64, keys))
        return dict(zip(found, raw.values(), strict=True))
    except ValueError as error:
        raise FormatError(f"{what}: a key is not base64 of UTF-8: {error}") from error


class ExtMetadata(msgspec.Struct, frozen=True, gc=False):
    """What only arrays of typed PRNG keys have."""

    random_key_impl: str | None = None


class ArrayMetadata(msgspec.Struct, frozen=True, gc=False):
    """What `array_metadatas/process_N` says of one array, the same in every process.

    Attributes:
        name: the array's name on disk.
        write_shape: shape of one shard.
        chunk_shape: shape of one stored chunk.
        ext_metadata: holds the implementation of a typed PRNG key.
    """

    name: str = msgspec.field(name="param_name")
    write_shape: Shape
    chunk_shape: Shape
    ext_metadata: ExtMetadata | None = None

    @property
    def key_impl(self) -> str | None:
        """Implementation of a typed PRNG key, e.g. `threefry2x32`; else None."""
        return self.ext_metadata and self.ext_metadata.random_key_impl


class _ArrayItem(msgspec.Struct, frozen=True, gc=False):
    array_metadata: ArrayMetadata


class _ArrayDocument(msgspec.Struct):
    array_metadatas: list[_ArrayItem]


class _Outline(msgspec.Struct):
    """The same of a file without typed keys, of which a reader needs nothing."""

    array_metadatas: msgspec.Raw


def encode_array_metadatas(arrays: Sequence[ArrayMetadata]) -> bytes:
    """`array_metadatas/process_N`."""
    return msgspec.json.encode(_ArrayDocument([_ArrayItem(array) for array in arrays]))


def decode_array_metadatas(data: bytes, what: str) -> list[ArrayMetadata]:
    """The opposite of :func:`encode_array_metadatas`."""
    document = jsons.decode(data, _ArrayDocument, what)
    return [item.array_metadata for item in document.array_metadatas]


def decode_key_impls(data: bytes, what: str) -> dict[str, str]:
    """Implementation of each typed PRNG key by its name: what a reader needs of the file."""
    if b'"random_key_impl"' in data:
        return {a.name: a.key_impl for a in decode_array_metadatas(data, what) if a.key_impl}
    jsons.decode(data, _Outline, what)
    return {}


def encode_strings(strings: Mapping[str, str]) -> bytes:
    """`_strings.json`: each string at the JSON pointer `/<name>`.

    Raises:
        DuplicateNameError: one name is the beginning of another, up to a `/`.
        FormatError: a name is no JSON pointer: a `~` not followed by 0 or 1.
    """
    root: dict[str, Any] = {}
    for name, value in strings.items():
        *parents, last = _pointer(name)
        node: Any = root
        for parent in parents:
            node = node.setdefault(parent, {}) if jsons.is_object(node) else None
        if not jsons.is_object(node) or last in node:
            why = "share a name up to a '/'; rename a key"
            raise DuplicateNameError(f"the string leaf {name!r} and another one {why}")
        node[last] = value
    return jsons.limited(json.dumps(root, ensure_ascii=True).encode(), names.STRINGS)


def decode_strings(data: bytes, wanted: Iterable[str], what: str) -> dict[str, str]:
    """Strings by name, for the names that are wanted.

    Raises:
        FormatError: one is not there.
    """
    root = jsons.parse_object(data, what)
    found: dict[str, str] = {}
    for name in wanted:
        node: Any = root
        for key in _pointer(name):
            node = node.get(key) if jsons.is_object(node) else None
        if not isinstance(node, str):
            raise FormatError(f"{what}: no string for the leaf {name!r}")
        found[name] = node
    return found


def _pointer(name: str) -> list[str]:
    parts = name.split("/")
    for part in parts:
        if "~" in part.replace("~0", "").replace("~1", ""):
            why = f"which {names.STRINGS} cannot store; rename the key"
            raise FormatError(f"the string leaf {name!r} has a '~' in its key, {why}")
    return [part.replace("~1", "/").replace("~0", "~") for part in parts]
