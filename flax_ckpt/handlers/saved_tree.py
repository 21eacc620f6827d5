"""A saved PyTree, opened: its leaves by key path, compared with a wish, and read.

with SavedTree(directory) as saved:
    read = saved.prepare(abstract, LoadRules())  # compares everything
    tree = read()                                # reads it
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

from flax_ckpt.errors import Difference, FormatError, TreeMismatchError
from flax_ckpt.format import names, tree
from flax_ckpt.handlers import keypaths
from flax_ckpt.leaves.base import PLACEHOLDER, LeafHandler, LoadRules, SavedLeaf, show
from flax_ckpt.leaves.registry import LeafRegistry
from flax_ckpt.storage import files
from flax_ckpt.storage.native_read import open_store
from flax_ckpt.storage.record import Damage, Record, noting
from flax_ckpt.storage.store import ArrayRead, Arrays, ArrayStore, read_resized, whole

_NO_ARRAYS = {tree.STRING, *tree.EMPTY}
_SHOWN = 40  # differences in a message; all of them are in the exception


class SavedTree(contextlib.ExitStack):
    """One PyTree directory; use it in a `with` block.

    Args:
        directory: absolute path of the PyTree directory.
        registry: handlers of its leaves.
        fill_missing: chunks that are missing from another writer's checkpoint are zeros.
        damage: takes note of what is damaged of single leaves, and these are not read; None: it
            raises.

    Attributes:
        record: reads its files.
        leaves: what is saved, empty nodes included, by key path.
        stored: how each array is stored, by its name.
        processes: how many wrote it, as far as is recorded.
        damage: as given.

    Raises:
        DamagedCheckpointError: a file that describes the tree is missing or changed.
        FormatError: one makes no sense.
    """

    def __init__(
        self,
        directory: str,
        registry: LeafRegistry | None = None,
        *,
        fill_missing: bool = False,
        damage: Damage | None = None,
    ) -> None:
        super().__init__()
        self.directory = directory
        self.damage = damage
        self._registry = registry or LeafRegistry()
        self._store: ArrayStore | None = None
        self.record = Record(directory)
        meta = tree.TreeMetadata.from_bytes(*self._file(names.TREE_METADATA))
        found = [(e.path, tree.name_of(e.path), e.value.value_type) for e in meta.entries]
        arrays = [name for _, name, kind in found if kind not in _NO_ARRAYS]
        ocdbt, zarr3 = meta.use_ocdbt, meta.use_zarr3
        try:
            if arrays:  # without any, Orbax writes no database
                store = open_store(self.record, ocdbt=ocdbt, zarr3=zarr3, fill_missing=fill_missing)
                self._store = self.enter_context(store)
            self.stored = self._store.describe(arrays) if self._store else {}
            self.leaves = {leaf.path: leaf for leaf in self._describe(found)}
        except BaseException:
            self.close()
            raise

    def _describe(self, found: Sequence[tuple[tree.KeyPath, str, str]]) -> Iterator[SavedLeaf]:
        shardings: dict[str, str] = {}
        if self.record.lists(names.SHARDING):
            with noting(self.damage, os.path.join(self.directory, names.SHARDING)):
                shardings = tree.decode_shardings(*self._file(names.SHARDING))
        recorded = list(_process_files(self.record).values())
        self.processes = len(recorded)
        impls = tree.decode_key_impls(*recorded[0]) if recorded else {}
        strings: dict[str, str] = {}
        if texts := {name: tree.show(path) for path, name, kind in found if kind == tree.STRING}:
            with noting(self.damage, *texts.values()):
                data, where = self._file(names.STRINGS)
                strings = tree.decode_strings(data, texts, where)
        for path, name, kind in found:
            if kind in _NO_ARRAYS:
                yield SavedLeaf(path, name, kind, string=strings.get(name))
                continue
            array, impl = self.stored[name], impls.get(name) if kind == tree.ARRAY else None
            yield SavedLeaf(path, name, kind, array.shape, array.dtype, shardings.get(name), impl)

    def _file(self, name: str) -> tuple[bytes, str]:
        return self.record.read(name, files.MAX_TREE_BYTES), os.path.join(self.directory, name)

    def check(self, limit: int) -> int:
        """Reads every array and says how many bytes that were; damage is raised, or noted.

        Args:
            limit: how many bytes are in memory at a time, if no chunk is larger.
        """
        batch: list[ArrayRead] = []
        held = total = 0
        for size, read in self._boxes(limit):
            if held + size > limit:
                self._arrays(batch)
                batch, held = [], 0
            batch.append(read)
            held, total = held + size, total + size
        self._arrays(batch)
        return total

    def _boxes(self, limit: int) -> Iterator[tuple[int, ArrayRead]]:
        """Every array, with its size; a large one in slices that are whole chunks."""
        for leaf in self.leaves.values():
            if (array := self.stored.get(leaf.name)) is None:
                continue
            shape, chunk, box = array.shape, array.chunk_shape, whole(array.shape)
            size = math.prod(shape) * array.dtype.itemsize
            boxes = [box]
            if size > limit and chunk:
                axis = max(range(len(shape)), key=lambda i: shape[i] // chunk[i])
                extent, step = shape[axis], chunk[axis]
                step *= max(1, limit * extent // (size * step))
                spans = [(low, min(low + step, extent)) for low in range(0, extent, step)]
                boxes = [(*box[:axis], span, *box[axis + 1 :]) for span in spans]
            for part in boxes:
                yield size // len(boxes), ArrayRead(leaf.name, (part,), tree.show(leaf.path))

    def abstract(self) -> Any:
        """The tree in dicts and lists, each leaf in the abstract form that loads it as saved."""

        def describe(leaf: SavedLeaf) -> Any:
            empty = tree.EMPTY.get(leaf.value_type)
            return empty() if empty else self._handler(leaf, None).describe(leaf)

        return self._build([describe(leaf) for leaf in self.leaves.values()])

    def prepare(self, abstract: Any, rules: LoadRules, partial: bool = False) -> Callable[[], Any]:
        """Compares the whole tree with a wish; what is returned then reads and builds it.

        Args:
            abstract: the tree wanted; None: as it was saved, in dicts and lists.
            rules: how far the leaves may differ.
            partial: whether saved leaves that are not wanted are left alone.

        Raises:
            TreeMismatchError: with every difference; nothing was read.
        """
        if abstract is None:
            paths, wanted, build = list(self.leaves), [None] * len(self.leaves), self._build
        else:
            paths, wanted = keypaths.flatten(abstract)
            build = keypaths.structure(abstract).unflatten
        differences, read = self.compare(paths, wanted, rules, partial=partial)
        if differences:
            raise mismatch(self.directory, differences)
        return lambda: build(read())

    def compare(
        self,
        paths: Sequence[tree.KeyPath],
        wanted: Sequence[Any],
        rules: LoadRules,
        *,
        partial: bool = False,
    ) -> tuple[list[Difference], Callable[[], list[Any]]]:
        """As :meth:`prepare`, of leaves by key path; `leaves` may have got other keys.

        Returns:
            The differences, and what reads the leaves if there are none.
        """
        values: list[Any] = []
        groups: dict[LeafHandler, list[int]] = {}
        differences: list[Difference] = []
        for path, wish in zip(paths, wanted, strict=True):
            handler, value = self._match(path, wish, rules)
            if handler is not None:
                groups.setdefault(handler, []).append(len(values))
            elif isinstance(value, Difference):
                differences.append(value)
            values.append(value)
        if not partial:
            asked = set(paths)
            differences += [
                Difference(tree.show(path), _place(str(leaf), path, asked), "nothing")
                for path, leaf in self.leaves.items()
                if path not in asked and not leaf.is_empty
            ]
        return differences, lambda: self._read(groups, values, rules)

    def _build(self, values: Sequence[Any]) -> Any:
        return tree.build(zip(self.leaves, values, strict=True), self.directory)

    def _match(
        self, path: tree.KeyPath, abstract: Any, rules: LoadRules
    ) -> tuple[LeafHandler | None, Any]:
        """The handler and its target; or None and the value as it is, or a difference."""
        if abstract is PLACEHOLDER:
            return None, abstract
        saved = self.leaves.get(path)
        empty = keypaths.is_empty(abstract)
        if empty and (saved is None or saved.is_empty):
            if saved is None or abstract is not None or rules.strict:
                return None, abstract
            return None, tree.EMPTY[saved.value_type]()
        if saved is None:
            wish = _place(_show(abstract), path, self.leaves)
            return None, Difference(tree.show(path), "nothing", wish)
        fits = not saved.is_empty and (not empty or (abstract is None and not rules.strict))
        handler = self._handler(saved, abstract) if fits else None
        target = handler.target(saved, abstract, rules) if handler else _show(abstract)
        if isinstance(target, str):
            return None, Difference(tree.show(path), str(saved), target)
        return handler, target

    def _handler(self, leaf: SavedLeaf, abstract: Any) -> Any:
        """Its leaf handler, or None if there is none for this wish."""
        handler = self._registry.for_saved(leaf, abstract)
        if handler is None and abstract is None:
            raise self._registry.missing(self.directory, self.leaves.values())
        return handler

    def _read(
        self, groups: Mapping[LeafHandler, list[int]], values: Sequence[Any], rules: LoadRules
    ) -> list[Any]:
        """The values, with those built that a handler has a target for; read in one batch."""
        stored = sorted(i for group in groups.values() for i in group if values[i].regions)
        targets = [values[i] for i in stored]
        reads = [ArrayRead(t.saved.name, t.regions, tree.show(t.saved.path)) for t in targets]
        data = dict(zip(stored, self._arrays(reads, resize=rules.resize), strict=True))
        result = list(values)
        for handler, group in groups.items():
            if self.damage:
                for i in group:
                    result[i] = PLACEHOLDER
                group = [i for i in group if tree.show(values[i].saved.path) not in self.damage]
            built = handler.build([values[i] for i in group], [data.get(i, ()) for i in group])
            for i, value in zip(group, built, strict=True):
                result[i] = value
        return result

    def _arrays(self, reads: Sequence[ArrayRead], *, resize: bool = False) -> Arrays:
        """What is read; nothing of a damaged array, if it is to be skipped.

        A batch in which there is one is halved, until it is alone.
        """
        if not (self._store and reads):
            return []
        store = self._store
        read = functools.partial(read_resized, store) if resize else store.read_arrays
        if self.damage is None:
            return read(reads)
        if len(reads) == 1:
            with noting(self.damage, reads[0].leaf):
                return read(reads)
            return [[]]
        with contextlib.suppress(FormatError, OSError):
            return read(reads)
        parts = reads[: len(reads) // 2], reads[len(reads) // 2 :]
        return [array for part in parts for array in self._arrays(part, resize=resize)]


def read_array_metadatas(record: Record) -> dict[int, list[tree.ArrayMetadata]]:
    """What each process wrote about the arrays of a PyTree directory, by its index."""
    return {i: tree.decode_array_metadatas(*file) for i, file in _process_files(record).items()}


def _process_files(record: Record) -> dict[int, tuple[bytes, str]]:
    """The files of `array_metadatas`, with their paths, by the index of the process."""
    folder = os.path.join(record.directory, names.ARRAY_METADATAS)
    files.refuse_link(folder)
    present = os.listdir(folder) if os.path.isdir(folder) else []
    found: dict[int, tuple[bytes, str]] = {}
    for name in sorted({*present, *record.listed(f"{names.ARRAY_METADATAS}/")}):
        index = name.removeprefix("process_")
        if index != name and index.isdecimal():
            data = record.read(f"{names.ARRAY_METADATAS}/{name}", files.MAX_TREE_BYTES)
            found[int(index)] = data, os.path.join(folder, name)
    return found


def _place(text: str, path: tree.KeyPath, others: Container[tree.KeyPath]) -> str:
    """Says in which kind of node a leaf is, if only that sets two paths apart."""
    in_list = bool(path) and path[-1].kind == tree.SEQUENCE
    other = tree.DICT if in_list else tree.SEQUENCE
    if not path or (*path[:-1], tree.Key(path[-1].key, other)) not in others:
        return text
    return f"{text} in a {'list' if in_list else 'dict'}"


def _show(abstract: Any) -> str:
    if abstract is None:
        return "None"
    return f"an empty {type(abstract).__name__}" if keypaths.is_empty(abstract) else show(abstract)


def mismatch(where: str, differences: Sequence[Difference]) -> TreeMismatchError:
    """The error that lists differences between a saved tree and a wanted one."""
    lines = [f"  {difference}" for difference in differences[:_SHOWN]]
    if len(differences) > _SHOWN:
        lines.append(f"  … and {len(differences) - _SHOWN} more, in `.differences`")
    count = f"{len(differences)} difference" + ("s" if len(differences) > 1 else "")
    text = "\n".join([f"{where} does not fit the wanted tree, {count}:", *lines])
    return TreeMismatchError(text, differences)
