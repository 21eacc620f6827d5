"""A saved PyTree, opened: its leaves by key path, compared with a wish, and read.

with SavedTree(directory) as saved:
    read = saved.prepare(abstract, LoadRules())  # compares everything
    tree = read()                                # reads it
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from flax_ckpt.errors import Difference, FormatError, TreeMismatchError
from flax_ckpt.format import names, tree
from flax_ckpt.handlers import keypaths
from flax_ckpt.leaves.base import LeafHandler, LoadRules, SavedLeaf, Target
from flax_ckpt.leaves.registry import LeafRegistry
from flax_ckpt.storage.open_store import open_store
from flax_ckpt.storage.record import Record
from flax_ckpt.storage.store import ArrayRead, ArrayStore

_SHOWN = 40  # differences in a message; all of them are in the exception


@dataclasses.dataclass(frozen=True)
class Match:
    """What becomes of one wanted leaf: read into a target, or a value that needs no reading."""

    handler: LeafHandler | None
    target: Target | None
    value: Any = None


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
            if entry.value_type in tree.EMPTY:
                yield SavedLeaf(entry.path, entry.name, entry.value_type)
            elif entry.value_type == tree.STRING:
                text = strings[entry.name]
                yield SavedLeaf(entry.path, entry.name, entry.value_type, string=text)
            else:
                array = stored[entry.name]
                impl = impls.get(entry.name) if entry.value_type == tree.ARRAY else None
                yield SavedLeaf(
                    entry.path,
                    entry.name,
                    entry.value_type,
                    array.shape,
                    array.dtype,
                    shardings.get(entry.name),
                    impl,
                )

    def abstract(self) -> Any:
        """The tree in dicts and lists, each leaf in the abstract form that loads it as saved."""
        described: list[Any] = []
        for leaf in self.leaves.values():
            handler = None if leaf.is_empty else self._handler(leaf, None)
            described.append(handler.describe(leaf) if handler else tree.EMPTY[leaf.value_type]())
        return self._build(list(self.leaves), described)

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
            paths = list(self.leaves)
            matches = self.match([(path, None) for path in paths], rules)
            return lambda: self._build(paths, self.read(matches))
        wanted, treedef = keypaths.flatten(abstract)
        matches = self.match(wanted, rules, partial=partial)
        return lambda: treedef.unflatten(self.read(matches))

    def _build(self, paths: Sequence[tree.KeyPath], values: Sequence[Any]) -> Any:
        return tree.build(zip(paths, values, strict=True), self.directory)

    def match(
        self,
        wanted: Sequence[tuple[tree.KeyPath, Any]],
        rules: LoadRules,
        *,
        partial: bool = False,
    ) -> list[Match]:
        """Compares the saved leaves with wanted ones.

        Args:
            wanted: key path and abstract leaf; None stands for the leaf as it was saved.
            rules: how far they may differ.
            partial: whether saved leaves that are not wanted are left alone.

        Raises:
            TreeMismatchError: with every difference.
        """
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
                Difference(tree.show(path), self._place(str(leaf), path, paths), "nothing")
                for path, leaf in self.leaves.items()
                if path not in paths and not leaf.is_empty
            ]
        if differences:
            raise mismatch(self.directory, differences)
        return matches

    def _match_one(self, path: tree.KeyPath, abstract: Any, rules: LoadRules) -> Match | Difference:
        saved = self.leaves.get(path)
        empty = keypaths.is_empty(abstract)
        if saved is None:
            if empty:
                return Match(None, None, abstract)
            wish = self._place(show_abstract(abstract), path, set(self.leaves))
            return Difference(tree.show(path), "nothing", wish)
        if saved.is_empty:
            if empty:
                value = tree.EMPTY[saved.value_type]() if abstract is None else abstract
                return Match(None, None, value)
            return Difference(tree.show(path), saved.value_type, show_abstract(abstract))
        if empty and (abstract is not None or rules.strict):
            return Difference(tree.show(path), str(saved), show_abstract(abstract))
        handler = self._handler(saved, abstract)
        if handler is None:
            return Difference(tree.show(path), str(saved), show_abstract(abstract))
        target = handler.target(saved, abstract, rules)
        if isinstance(target, str):
            return Difference(tree.show(path), str(saved), target)
        return Match(handler, target)

    def _place(self, text: str, path: tree.KeyPath, others: set[tree.KeyPath]) -> str:
        """Says in which kind of node a leaf is, if only that sets two paths apart."""
        if not path:
            return text
        flipped = (*path[:-1], (path[-1][0], 3 - path[-1][1]))
        if flipped not in others:
            return text
        return f"{text} in a {'list' if path[-1][1] == tree.SEQUENCE else 'dict'}"

    def _handler(self, leaf: SavedLeaf, abstract: Any) -> LeafHandler | None:
        handler = self._registry.for_saved(leaf, abstract)
        if handler is None and abstract is None:
            raise FormatError(
                f"{self.directory}: the leaf {tree.show(leaf.path)} is of the unknown kind"
                f" {leaf.value_type!r}"
            )
        return handler

    def read(self, matches: Sequence[Match]) -> list[Any]:
        """The value of each match, in order; the data of all is read in one batch.

        Raises:
            DamagedCheckpointError: names the first leaf whose bytes are not those saved.
        """
        found = [(i, m.handler, m.target) for i, m in enumerate(matches) if m.target is not None]
        reads = [
            ArrayRead(target.saved.name, target.regions, tree.show(target.saved.path))
            for _, _, target in found
            if target.regions
        ]
        data = iter(self._store.read_arrays(reads) if self._store else [])
        parts = [next(data) if target.regions else [] for _, _, target in found]
        values: list[Any] = [match.value for match in matches]
        for handler in dict.fromkeys(handler for _, handler, _ in found if handler is not None):
            mine = [k for k, (_, other, _) in enumerate(found) if other is handler]
            built = handler.build([found[k][2] for k in mine], [parts[k] for k in mine])
            for k, value in zip(mine, built, strict=True):
                values[found[k][0]] = value
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


def show_abstract(abstract: Any) -> str:
    """A wanted leaf as error messages print it."""
    if keypaths.is_empty(abstract):
        return "None" if abstract is None else f"an empty {type(abstract).__name__}"
    if hasattr(abstract, "shape") and hasattr(abstract, "dtype"):
        shape = ",".join(map(str, abstract.shape))
        return f"{getattr(abstract.dtype, 'name', abstract.dtype)}[{shape}]"
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
