"""A saved PyTree, opened: its leaves by key path, compared with a wish, and read.

with SavedTree(directory) as saved:
    read = saved.prepare(abstract, LoadRules())  # compares everything
    tree = read()                                # reads it
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

from flax_ckpt.errors import DamagedCheckpointError, Difference, FormatError, TreeMismatchError
from flax_ckpt.format import names, tree
from flax_ckpt.handlers import keypaths
from flax_ckpt.leaves.base import LeafHandler, LoadRules, SavedLeaf, Target
from flax_ckpt.leaves.registry import LeafRegistry
from flax_ckpt.storage.open_store import open_store
from flax_ckpt.storage.record import Record
from flax_ckpt.storage.store import ArrayRead

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
        array_metadatas: what each process wrote about its arrays, by process.

    Raises:
        DamagedCheckpointError: a file that describes the tree is missing or changed.
        FormatError: one makes no sense.
    """

    def __init__(self, directory: str, registry: LeafRegistry | None = None) -> None:
        super().__init__()
        self.directory = directory
        self._registry = registry or LeafRegistry()
        self._record = Record(directory)
        path = os.path.join(directory, names.TREE_METADATA)
        self._metadata = tree.TreeMetadata.from_bytes(self._record.read(names.TREE_METADATA), path)
        self._store = self.enter_context(
            open_store(self._record, ocdbt=self._metadata.use_ocdbt, zarr3=self._metadata.use_zarr3)
        )
        try:
            self.array_metadatas = self._read_array_metadatas()
            self.leaves = {leaf.path: leaf for leaf in self._describe()}
        except BaseException:
            self.close()
            raise

    def _read_array_metadatas(self) -> dict[int, dict[str, tree.ArrayMetadata]]:
        folder = os.path.join(self.directory, names.ARRAY_METADATAS)
        found: dict[int, dict[str, tree.ArrayMetadata]] = {}
        for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
            index = name.removeprefix("process_")
            if name.startswith("process_") and index.isdigit():
                data = self._record.read(f"{names.ARRAY_METADATAS}/{name}")
                path = os.path.join(folder, name)
                found[int(index)] = tree.decode_array_metadatas(data, path)
        if not found and self._record.lists(f"{names.ARRAY_METADATAS}/process_0"):
            self._record.read(f"{names.ARRAY_METADATAS}/process_0")  # names the missing file
        return found

    def _describe(self) -> list[SavedLeaf]:
        shardings: dict[str, str] = {}
        if self._record.lists(names.SHARDING):
            path = os.path.join(self.directory, names.SHARDING)
            shardings = tree.decode_shardings(self._record.read(names.SHARDING), path)
        impls = next(iter(self.array_metadatas.values()), {})
        entries = self._metadata.entries
        arrays = [e.name for e in entries if e.value_type not in (*tree.EMPTY, tree.STRING)]
        stored = self._store.describe(arrays)
        leaves: list[SavedLeaf] = []
        for entry in entries:
            array = stored.get(entry.name) if entry.value_type not in tree.EMPTY else None
            if entry.value_type in tree.EMPTY or entry.value_type == tree.STRING or array is None:
                leaves.append(SavedLeaf(entry.path, entry.value_type))
                continue
            impl = impls[entry.name].key_impl if entry.name in impls else None
            leaves.append(
                SavedLeaf(
                    entry.path,
                    entry.value_type,
                    array.shape,
                    array.dtype,
                    shardings.get(entry.name),
                    impl if entry.value_type == tree.ARRAY else None,
                )
            )
        return leaves

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
        targets = [m.target for m in matches if m.target is not None and m.target.regions]
        reads = [ArrayRead(t.saved.name, t.regions, tree.show(t.saved.path)) for t in targets]
        data = dict(zip(map(id, targets), self._store.read_arrays(reads), strict=True))
        strings = self._read_strings(matches)
        values: list[Any] = [match.value for match in matches]
        for handler in dict.fromkeys(m.handler for m in matches if m.handler is not None):
            mine = [(i, m.target) for i, m in enumerate(matches) if m.handler is handler]
            chosen = [target for _, target in mine if target is not None]
            built = handler.build(chosen, [data.get(id(target), []) for target in chosen])
            for (i, target), value in zip(mine, built, strict=True):
                is_string = target is not None and target.saved.value_type == tree.STRING
                values[i] = strings[target.saved.name] if is_string else value
        return values

    def _read_strings(self, matches: Sequence[Match]) -> dict[str, str]:
        wanted = [
            m.target.saved.name
            for m in matches
            if m.target is not None and m.target.saved.value_type == tree.STRING
        ]
        if not wanted:
            return {}
        path = os.path.join(self.directory, names.STRINGS)
        try:
            return tree.decode_strings(self._record.read(names.STRINGS), wanted, path)
        except FormatError as error:
            raise DamagedCheckpointError(str(error)) from error


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
