"""The files that describe a PyTree directory: `_METADATA`, `_sharding`, `array_metadatas`, strings.

A leaf's place is its key path, a tuple of `(key, kind)`. Its name on disk is the keys joined with
dots, unescaped: that is the format, so two leaves can collide, and `unique_names` refuses it.
Containers come back as dicts and lists: the format knows no other kinds.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from flax_ckpt.errors import DuplicateNameError, FormatError
from flax_ckpt.format import jsons, names

SEQUENCE: Final = 1  # lists, tuples, nodes whose children have no names
DICT: Final = 2  # dicts, named tuples, dataclasses
KeyPath = tuple[tuple[str, int], ...]
MAX_DEPTH: Final = 256  # no tree of a model is as deep; a hostile one would exhaust the stack

ARRAY: Final = "jax.Array"
NUMPY: Final = "np.ndarray"
SCALAR: Final = "scalar"
STRING: Final = "string"
EMPTY: Final[Mapping[str, Callable[[], Any]]] = {
    "None": lambda: None,
    "Dict": dict,
    "List": list,
    "Tuple": tuple,
    "NamedTuple": lambda: None,
}


class Entry(NamedTuple):
    """One leaf or empty node of a saved tree.

    Attributes:
        path: its key path.
        name: of its data on disk, from :func:`name_of`.
        value_type: `jax.Array`, `np.ndarray`, `scalar`, `string`, or the kind of an empty node.
        write_shape: shape of what one process wrote at a time; only for `jax.Array`.
    """

    path: KeyPath
    name: str
    value_type: str
    write_shape: tuple[int, ...] | None = None


class TreeMetadata(NamedTuple):
    """`_METADATA`.

    Attributes:
        entries: all leaves and empty nodes.
        use_ocdbt: whether arrays are in one OCDBT database; None: the file does not say.
        use_zarr3: whether arrays are zarr version 3, else 2.
    """

    entries: tuple[Entry, ...]
    use_ocdbt: bool | None = True
    use_zarr3: bool = True

    def to_bytes(self) -> bytes:
        """The file."""
        tree = {str(tuple([key for key, _ in e.path])): _entry_to_json(e) for e in self.entries}
        if len(tree) != len(self.entries):  # {1: {}, "1": []}: same keys, told apart by nothing
            unique_names([(e.path, e.path) for e in self.entries])
        return jsons.dump(
            {
                "tree_metadata": tree,
                "use_ocdbt": self.use_ocdbt,
                "use_zarr3": self.use_zarr3,
                "store_array_data_equal_to_fill_value": True,
                "custom_metadata": None,
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> TreeMetadata:
        """Parses the file.

        Raises:
            FormatError: it does not describe a tree.
        """
        raw = jsons.parse_object(data, what)
        tree = raw.get("tree_metadata")
        if not jsons.is_object(tree) or not tree:
            raise FormatError(f"{what}: `tree_metadata` is missing or empty")
        try:
            entries = [_entry_from_json(value) for value in tree.values()]
        except (KeyError, TypeError, ValueError) as error:
            raise FormatError(
                f"{what}: an entry of `tree_metadata` is malformed: {error}"
            ) from error
        [(path, count)] = Counter(entry.path for entry in entries).most_common(1)
        if count > 1:
            raise FormatError(f"{what}: the leaf {show(path)} is there twice")
        ocdbt = raw.get("use_ocdbt")
        return cls(
            tuple(_without_leftovers(entries)),
            ocdbt if isinstance(ocdbt, bool) else None,
            raw.get("use_zarr3") is True,
        )


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    value: dict[str, Any] = {
        "value_type": entry.value_type,
        "skip_deserialize": entry.value_type in EMPTY,
    }
    if entry.write_shape is not None:
        value["write_shape"] = entry.write_shape
    keys = [{"key": key, "key_type": kind} for key, kind in entry.path]
    return {"key_metadata": keys, "value_metadata": value}


def _entry_from_json(raw: dict[str, Any]) -> Entry:
    path = tuple([(key["key"], key["key_type"]) for key in raw["key_metadata"]])
    for name, kind in path:
        if not isinstance(name, str) or kind not in (SEQUENCE, DICT):
            raise ValueError(f"key {name!r} of type {kind!r}")
    if len(path) > MAX_DEPTH:
        raise ValueError(f"a key path of {len(path)} keys")
    value = raw["value_metadata"]
    value_type, shape = value["value_type"], value.get("write_shape")
    if not isinstance(value_type, str):
        raise TypeError(f"value_type {value_type!r}")
    return Entry(path, name_of(path), value_type, None if shape is None else tuple(shape))


def _without_leftovers(entries: list[Entry]) -> list[Entry]:
    """Drops entries whose path is the beginning of another's: partial saves leave such."""
    inner = {e.path[:n] for e in entries for n in range(len(e.path))}
    return [e for e in entries if e.path not in inner]


def name_of(path: KeyPath) -> str:
    """The name of a leaf's data on disk: `params.dense.kernel`."""
    return ".".join([key for key, _ in path])


def show(path: KeyPath) -> str:
    """A key path as error messages print it: `params/dense/kernel`."""
    return "/".join([key for key, _ in path]) or "(the whole tree)"


def unique_names(leaves: Iterable[tuple[KeyPath, Hashable]]) -> None:
    """Checks that no two leaves share a name.

    Args:
        leaves: key path of each leaf, and the name on disk that it gets (any hashable).

    Raises:
        DuplicateNameError: names every pair that collides.
    """
    seen: dict[Hashable, KeyPath] = {}
    clashes: list[str] = []
    for path, name in leaves:
        other = seen.setdefault(name, path)
        if other is not path:
            clashes.append(f"  {_quoted(other)} and {_quoted(path)}")
    if clashes:
        raise DuplicateNameError(
            "these leaves would be stored under one name, and one of each pair would be lost:\n"
            + "\n".join(clashes)
            + "\nKeys are joined with dots on disk: rename one of the keys"
        )


def _quoted(path: KeyPath) -> str:
    return "".join(f"[{key!r}]" for key, _ in path)


def build(leaves: Iterable[tuple[KeyPath, Any]], what: str) -> Any:
    """Nested dicts and lists from leaves by key path.

    Args:
        leaves: key path and value of each leaf.
        what: the tree, for error messages.

    Raises:
        FormatError: the paths make no tree: a gap in a list, two kinds of node in one place.
    """
    root: dict[str, Any] = {}
    for path, value in leaves:
        node, place = root, ""
        for key, kind in path:
            child = node.setdefault(place, _Node(kind))
            if not isinstance(child, _Node) or child.kind != kind:
                raise FormatError(f"{what}: {show(path)} lies in a node of another kind")
            node, place = child, key
        if place in node:
            raise FormatError(f"{what}: {show(path)} is there twice")
        node[place] = value
    return _plain(root[""], what) if root else {}


class _Node(dict[str, Any]):
    """A container being built; a class of its own, as a leaf may be a dict."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.kind = kind


def _plain(node: Any, what: str) -> Any:
    if not isinstance(node, _Node):
        return node
    if node.kind == DICT:
        return {key: _plain(value, what) for key, value in node.items()}
    try:
        return [_plain(node[str(i)], what) for i in range(len(node))]
    except KeyError as error:
        raise FormatError(f"{what}: a list of {len(node)} has no element {error}") from error


def encode_shardings(shardings: Mapping[str, str]) -> bytes:
    """`_sharding`: the JSON text of each array's sharding, by the array's name."""
    return jsons.dump(
        {base64.urlsafe_b64encode(name.encode()).decode(): s for name, s in shardings.items()}
    )


def decode_shardings(data: bytes, what: str) -> dict[str, str]:
    """The opposite of :func:`encode_shardings`."""
    raw = jsons.parse_object(data, what)
    try:
        return {base64.urlsafe_b64decode(key).decode(): str(value) for key, value in raw.items()}
    except ValueError as error:
        raise FormatError(f"{what}: a key is not base64 of UTF-8: {error}") from error


class ArrayMetadata(NamedTuple):
    """What `array_metadatas/process_N` says of one array, the same in every process.

    Attributes:
        name: the array's name on disk.
        write_shape: shape of one shard.
        chunk_shape: shape of one stored chunk.
        key_impl: implementation of a typed PRNG key, e.g. `threefry2x32`; else None.
    """

    name: str
    write_shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    key_impl: str | None = None


def encode_array_metadatas(arrays: Sequence[ArrayMetadata]) -> bytes:
    """`array_metadatas/process_N`."""
    entries = [
        {
            "param_name": a.name,
            "write_shape": a.write_shape,
            "chunk_shape": a.chunk_shape,
            "ext_metadata": {"random_key_impl": a.key_impl} if a.key_impl else None,
        }
        for a in arrays
    ]
    return jsons.dump({"array_metadatas": [{"array_metadata": entry} for entry in entries]})


def decode_array_metadatas(data: bytes, what: str) -> list[ArrayMetadata]:
    """The opposite of :func:`encode_array_metadatas`."""
    raw = jsons.parse_object(data, what)
    found: list[ArrayMetadata] = []
    try:
        for item in raw["array_metadatas"]:
            array = item["array_metadata"]
            extra: dict[str, Any] = array.get("ext_metadata") or {}
            shapes = tuple(array["write_shape"]), tuple(array["chunk_shape"])
            impl = extra.get("random_key_impl")
            found.append(ArrayMetadata(str(array["param_name"]), *shapes, impl))
    except (KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{what}: malformed entry: {error!r}") from error
    return found


def encode_strings(strings: Mapping[str, str]) -> bytes:
    """`_strings.json`: each string at the JSON pointer `/<name>`.

    Raises:
        DuplicateNameError: one name is the beginning of another, up to a `/`.
        FormatError: a name is no JSON pointer: a `~` not followed by 0 or 1.
    """
    root: dict[str, Any] = {}
    for name, value in strings.items():
        *parents, last = _pointer(name)
        node = root
        for parent in parents:
            node = node.setdefault(parent, {})
            if not jsons.is_object(node):
                break
        if not jsons.is_object(node) or last in node:
            raise DuplicateNameError(
                f"the string leaf {name!r} and another one share a name up to a '/'; rename a key"
            )
        node[last] = value
    return json.dumps(root, ensure_ascii=True).encode()


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
            raise FormatError(
                f"the string leaf {name!r} has a '~' in its key, which {names.STRINGS} cannot"
                " store; rename the key"
            )
    return [part.replace("~1", "/").replace("~0", "~") for part in parts]
