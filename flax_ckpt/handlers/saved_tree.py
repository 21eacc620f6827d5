"""A saved PyTree, opened: its leaves by key path, compared with a wish, and read.

with SavedTree(directory) as saved:
    read = saved.prepare(abstract, LoadRules())  # compares everything
    tree = read()                                # reads it
"""

import contextlib
import os
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

from numpy.typing import NDArray

from flax_ckpt.errors import Difference, FormatError, TreeMismatchError
from flax_ckpt.format import names, tree
from flax_ckpt.handlers import keypaths
from flax_ckpt.leaves.base import LeafHandler, LoadRules, SavedLeaf, Target, show_array
from flax_ckpt.leaves.registry import LeafRegistry
from flax_ckpt.storage.open_store import open_store
from flax_ckpt.storage.record import Record
from flax_ckpt.storage.store import ArrayRead, ArrayStore

_SHOWN = 40  # differences in a message; all of them are in the exception


# What becomes of one wanted leaf: a target and the handler that builds it, or a value as it is.
Match = tuple[LeafHandler, Target] | tuple[None, Any]


class SavedTree(contextlib.ExitStack):
    """One PyTree directory; use it in a `with` block.

    Args:
        directory: absolute path of the PyTree directory.
        registry: handlers of its leaves.

    Attributes:
        leaves: what is saved, empty nodes included, by key path.
        array_metadatas: what each process wrote about the arrays, by its index.

    Raises:
        DamagedCheckpointError: a file that describes the tree is missing or changed.
        FormatError: one makes no sense.
    """

    def __init__(self, directory: str, registry: LeafRegistry | None = None) -> None:
        super().__init__()
        self.directory = directory
        self._registry = registry or LeafRegistry()
        self._store: ArrayStore | None = None
        self._record = Record(directory)
        path = os.path.join(directory, names.TREE_METADATA)
        self._metadata = tree.TreeMetadata.from_bytes(self._record.read(names.TREE_METADATA), path)
        self._arrays = [
            entry.name
            for entry in self._metadata.entries
            if entry.value_type not in tree.EMPTY and entry.value_type != tree.STRING
        ]
        try:
            if self._arrays:  # without any, Orbax writes no database
                meta = self._metadata
                store = open_store(self._record, ocdbt=meta.use_ocdbt, zarr3=meta.use_zarr3)
                self._store = self.enter_context(store)
            self.array_metadatas = read_array_metadatas(self._record)
            self.leaves = {leaf.path: leaf for leaf in self._describe()}
        except BaseException:
            self.close()
            raise

    def _describe(self) -> Iterator[SavedLeaf]:
        shardings: dict[str, str] = {}
        if self._record.lists(names.SHARDING):
            path = os.path.join(self.directory, names.SHARDING)
            shardings = tree.decode_shardings(self._record.read(names.SHARDING), path)
        recorded = list(self.array_metadatas.values())
        impls = {array.name: array.key_impl for array in recorded[0]} if recorded else {}
        texts = [e.name for e in self._metadata.entries if e.value_type == tree.STRING]
        strings: dict[str, str] = {}
        if texts:
            path = os.path.join(self.directory, names.STRINGS)
            strings = tree.decode_strings(self._record.read(names.STRINGS), texts, path)
        stored = self._store.describe(self._arrays) if self._store else {}
        for entry in self._metadata.entries:
            path, name, kind = entry.path, entry.name, entry.value_type
            if kind in tree.EMPTY:
                yield SavedLeaf(path, name, kind)
            elif kind == tree.STRING:
                yield SavedLeaf(path, name, kind, string=strings[name])
            else:
                array, placed = stored[name], shardings.get(name)
                impl = impls.get(name) if kind == tree.ARRAY else None
                yield SavedLeaf(path, name, kind, array.shape, array.dtype, placed, impl)

    def abstract(self) -> Any:
        """The tree in dicts and lists, each leaf in the abstract form that loads it as saved."""
        described: list[Any] = []
        for leaf in self.leaves.values():
            handler = None if leaf.is_empty else self._handler(leaf, None)
            described.append(handler.describe(leaf) if handler else tree.EMPTY[leaf.value_type]())
        return self._build(described)

    def narrow(self, keys: Container[str]) -> None:
        """Leaves alone from now on what is not under one of these keys of the outermost node."""
        self.leaves = {p: leaf for p, leaf in self.leaves.items() if tree.name_of(p[:1]) in keys}

    def prepare(
        self, abstract: Any, rules: LoadRules, *, partial: bool = False
    ) -> Callable[[], Any]:
        """Compares the whole tree with a wish; what is returned then reads and builds it.

        Args:
            abstract: the tree wanted; None: as it was saved, in dicts and lists.
            rules: how far the leaves may differ.
            partial: whether saved leaves that are not wanted are left alone.

        Raises:
            TreeMismatchError: with every difference; nothing was read.
        """
        if abstract is None:
            matches = self._match([(path, None) for path in self.leaves], rules, partial)
            return lambda: self._build(self._read(matches))
        wanted, treedef = keypaths.flatten(abstract)
        matches = self._match(wanted, rules, partial)
        return lambda: treedef.unflatten(self._read(matches))

    def _build(self, values: Sequence[Any]) -> Any:
        return tree.build(zip(self.leaves, values, strict=True), self.directory)

    def _match(
        self, wanted: Sequence[tuple[tree.KeyPath, Any]], rules: LoadRules, partial: bool
    ) -> list[Match]:
        matches: list[Match] = []
        differences: list[Difference] = []
        for path, abstract in wanted:
            match = self._match_one(path, abstract, rules)
            if isinstance(match, Difference):
                differences.append(match)
            else:
                matches.append(match)
        if not partial:
            paths = {path for path, _ in wanted}
            differences += [
                Difference(tree.show(path), _place(str(leaf), path, paths), "nothing")
                for path, leaf in self.leaves.items()
                if path not in paths and not leaf.is_empty
            ]
        if differences:
            raise mismatch(self.directory, differences)
        return matches

    def _match_one(self, path: tree.KeyPath, abstract: Any, rules: LoadRules) -> Match | Difference:
        saved = self.leaves.get(path)
        empty = keypaths.is_empty(abstract)
        if empty and (saved is None or saved.is_empty):
            return None, tree.EMPTY[saved.value_type]() if saved and abstract is None else abstract
        if saved is None:
            wish = _place(_show(abstract), path, self.leaves)
            return Difference(tree.show(path), "nothing", wish)
        fits = not saved.is_empty and (not empty or (abstract is None and not rules.strict))
        handler = self._handler(saved, abstract) if fits else None
        if handler is None:
            return Difference(tree.show(path), str(saved), _show(abstract))
        target = handler.target(saved, abstract, rules)
        if isinstance(target, str):
            return Difference(tree.show(path), str(saved), target)
        return handler, target

    def _handler(self, leaf: SavedLeaf, abstract: Any) -> LeafHandler | None:
        handler = self._registry.for_saved(leaf, abstract)
        if handler is None and abstract is None:
            raise FormatError(
                f"{self.directory}: the leaf {tree.show(leaf.path)} is of the unknown kind"
                f" {leaf.value_type!r}"
            )
        return handler

    def _read(self, matches: Sequence[Match]) -> list[Any]:
        """The value of each match, in order; the data of all is read in one batch."""
        found = [(i, h, target) for i, (h, target) in enumerate(matches) if h is not None]
        reads = [
            ArrayRead(target.saved.name, target.regions, tree.show(target.saved.path))
            for _, _, target in found
            if target.regions
        ]
        data = iter(self._store.read_arrays(reads) if self._store else [])
        groups: dict[LeafHandler, list[tuple[int, Target, Sequence[NDArray[Any]]]]] = {}
        for i, handler, target in found:
            parts = next(data) if target.regions else ()
            groups.setdefault(handler, []).append((i, target, parts))
        values = [value for _, value in matches]
        for handler, group in groups.items():
            built = handler.build([target for _, target, _ in group], [part for *_, part in group])
            for (i, _, _), value in zip(group, built, strict=True):
                values[i] = value
        return values


def read_array_metadatas(record: Record) -> dict[int, list[tree.ArrayMetadata]]:
    """What each process wrote about the arrays of a PyTree directory, by its index."""
    folder = os.path.join(record.directory, names.ARRAY_METADATAS)
    present = os.listdir(folder) if os.path.isdir(folder) else []
    found: dict[int, list[tree.ArrayMetadata]] = {}
    for name in sorted({*present, *record.listed(f"{names.ARRAY_METADATAS}/")}):
        index = name.removeprefix("process_")
        if index != name and index.isdigit():
            data = record.read(f"{names.ARRAY_METADATAS}/{name}")
            found[int(index)] = tree.decode_array_metadatas(data, os.path.join(folder, name))
    return found


def _place(text: str, path: tree.KeyPath, others: Container[tree.KeyPath]) -> str:
    """Says in which kind of node a leaf is, if only that sets two paths apart."""
    if not path or (*path[:-1], (path[-1][0], 3 - path[-1][1])) not in others:
        return text
    return f"{text} in a {'list' if path[-1][1] == tree.SEQUENCE else 'dict'}"


def _show(abstract: Any) -> str:
    """A wanted leaf as error messages print it."""
    if keypaths.is_empty(abstract):
        return "None" if abstract is None else f"an empty {type(abstract).__name__}"
    if hasattr(abstract, "shape") and hasattr(abstract, "dtype"):
        return show_array(abstract.shape, abstract.dtype)
    if isinstance(abstract, type):
        return abstract.__name__
    return f"a {type(abstract).__name__}"


def mismatch(where: str, differences: Sequence[Difference]) -> TreeMismatchError:
    """The error that lists differences between a saved tree and a wanted one."""
    lines = [f"  {difference}" for difference in differences[:_SHOWN]]
    if len(differences) > _SHOWN:
        lines.append(f"  … and {len(differences) - _SHOWN} more, in `.differences`")
    count = f"{len(differences)} difference" + ("s" if len(differences) > 1 else "")
    return TreeMismatchError(
        f"{where} does not fit the wanted tree, {count}:\n" + "\n".join(lines), differences
    )
