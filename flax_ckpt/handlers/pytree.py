"""The handler of PyTrees: the heart of a checkpoint.

A save flattens the tree and takes a snapshot of each leaf, which is all that blocks the caller;
files are written in the background. A load compares everything, then reads.
"""

import os
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, ClassVar

import jax
from etils import epath

from flax_ckpt._async import logger
from flax_ckpt.context import Context, resolve
from flax_ckpt.errors import TreeMismatchError
from flax_ckpt.format import names, tree
from flax_ckpt.handlers import parts
from flax_ckpt.handlers.base import PathAwaitingCreation
from flax_ckpt.handlers.saved_tree import SavedTree, read_array_metadatas
from flax_ckpt.handlers.snapshot import Snapshot
from flax_ckpt.leaves.base import PLACEHOLDER, LoadRules
from flax_ckpt.leaves.registry import LeafRegistry
from flax_ckpt.storage import files, hosts, native_write
from flax_ckpt.storage.record import Damage, Record


class ArrayMetadataValidator:
    """Checks that all processes mean the same arrays, when saving and when loading."""

    def validate_all_array_metadatas(
        self, array_metadatas: Mapping[int, Sequence[tree.ArrayMetadata]]
    ) -> None:
        """Compares the array metadata of each process, by its index, with the first one's.

        Raises:
            TreeMismatchError: names the arrays that differ.
        """
        first, *others = sorted(array_metadatas) or [0]
        expected = {array.name: array for array in array_metadatas.get(first, ())}
        for process in others:
            found = {array.name: array for array in array_metadatas[process]}
            wrong = [n for n in sorted(expected | found) if expected.get(n) != found.get(n)]
            if wrong:
                what = f"processes {first} and {process} disagree about the arrays"
                what += f" {', '.join(wrong)}: {expected.get(wrong[0])} and {found.get(wrong[0])}"
                raise TreeMismatchError(f"{what}. All processes must save the same tree")


class PyTreeHandler:
    """Saves and loads any JAX PyTree of arrays, numbers and strings.

    Bind it to a name through a registry; without one it takes every tree whose leaves it knows.
    A registry builds handlers without arguments: to give it some, register a subclass whose
    `__init__` calls this one with them.

    Args:
        context: options; None: those of the context around the constructor's call.
        array_metadata_validator: gets every process's array metadata at save and load.
        leaf_handler_registry: handlers of leaves; None: those of this package.
        partial_save_mode: whether what is saved is a part of a tree, for `partial.save`: it is
            refused if an earlier part of the same session has one of its leaves.

    Attributes:
        leaf_handler_registry: handlers of leaves.
        damage: None; or a dict, in which `load` takes note of damaged leaves, each with the reason,
            and makes them `PLACEHOLDER`.

    >>> import tempfile, flax_ckpt as fc
    >>> state_pytree = {"weights": [1.0, 2.0], "bias": 0.0}
    >>> registry = fc.handlers.local_registry()
    >>> _ = registry.add(fc.handlers.PyTreeHandler, checkpointable_name="model_state")
    >>> ctx = fc.Context()
    >>> ctx.checkpointables.registry = registry
    >>> path = tempfile.mkdtemp() + "/ckpt"
    >>> with ctx:
    ...     fc.save_checkpointables(path, dict(model_state=state_pytree))
    ...     fc.load_checkpointables(path)
    {'model_state': {'bias': 0.0, 'weights': [1.0, 2.0]}}
    """

    TYPESTR: ClassVar = names.TYPE_PYTREE
    ALIASES: ClassVar = names.PYTREE_TYPES

    def __init__(
        self,
        *,
        context: Context | None = None,
        array_metadata_validator: ArrayMetadataValidator | None = None,
        leaf_handler_registry: LeafRegistry | None = None,
        partial_save_mode: bool = False,
    ) -> None:
        self._context = resolve(context)
        self._validator = array_metadata_validator
        self._leaves = self.leaf_handler_registry = leaf_handler_registry or LeafRegistry()
        self._is_part = partial_save_mode
        self.damage: Damage | None = None

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        """See :class:`CheckpointableHandler`.

        When it returns, the caller may donate or delete the JAX arrays and overwrite the NumPy
        arrays of the tree.

        Raises:
            UnsupportedLeafError: lists every leaf that cannot be saved.
            DuplicateNameError: lists the leaves that would share a name on disk.
        """
        snapshot = Snapshot(directory.name, checkpointable, self._leaves, self._context)
        context, where = self._context, os.fspath(directory.path)
        together = hosts.current(context.multiprocessing, context.asynchronous, where)
        return self._write(directory, snapshot, together)

    async def _write(
        self, directory: PathAwaitingCreation, snapshot: Snapshot, together: hosts.Hosts
    ) -> None:
        path = os.fspath(await directory.await_creation())
        if self._is_part:
            parts.check_disjoint(path, snapshot.files())
        folder = os.path.join(path, names.ARRAY_METADATAS)
        writes, metadatas = snapshot.stored
        if metadatas:
            files.mkdirs(folder)
            data = tree.encode_array_metadatas(metadatas)
            files.write(os.path.join(folder, f"process_{together.index}"), data)
        native_write.write_arrays(path, writes, together, snapshot.layout)
        if together.is_primary:
            for name, data in snapshot.files().items():
                files.write(os.path.join(path, name), data)
            if together.several or self._validator is not None:
                self._validate(read_array_metadatas(Record(path)))

    def _validate(self, found: Mapping[int, Sequence[tree.ArrayMetadata]]) -> None:
        (self._validator or ArrayMetadataValidator()).validate_all_array_metadatas(found)

    async def load(
        self, directory: epath.Path, abstract_checkpointable: Any = None
    ) -> Awaitable[Any]:
        """See :class:`CheckpointableHandler`.

        Args:
            directory: of the PyTree.
            abstract_checkpointable: tree of abstract leaves: `jax.ShapeDtypeStruct` or
                `jax.Array` (a JAX array, with that sharding or the saved one), NumPy values or
                types, `int`, `float`, `bool`, `str` or values of them, `PLACEHOLDER` to leave
                one alone; None: as saved.

        Raises:
            TreeMismatchError: lists every difference; nothing was read.
            DamagedCheckpointError: bytes are not those that were saved.
        """
        return self._load(directory, abstract_checkpointable)

    async def _load(self, directory: epath.Path, abstract: Any) -> Any:
        loading = self._context.array.loading
        rules = LoadRules(resize=loading.enable_padding_and_truncation)
        fill = not loading.raise_array_data_missing_error
        where, damage = os.fspath(directory), self.damage
        with SavedTree(where, self._leaves, fill_missing=fill, damage=damage) as saved:
            if saved.processes > 1 or self._validator is not None:
                self._validate(read_array_metadatas(saved.record))
            result = saved.prepare(abstract, rules, self._context.pytree.loading.partial_load)()
        log_fallbacks(directory, rules)
        return result

    async def metadata(self, directory: epath.Path) -> Any:
        """The tree in dicts and lists, each leaf in its abstract form; no data is read."""
        with SavedTree(os.fspath(directory), self._leaves) as saved:
            return saved.abstract()

    def is_handleable(self, checkpointable: Any) -> bool:
        """True if there is a leaf handler for one leaf of each type in the tree."""
        return all(map(self._leaves.for_value, _one_of_each_type(checkpointable).values()))

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """Likewise of the abstract leaves."""
        wanted = _one_of_each_type(abstract_checkpointable).values()
        return all(leaf is PLACEHOLDER or self._leaves.for_abstract(leaf) for leaf in wanted)


def _one_of_each_type(value: Any) -> dict[Any, Any]:
    return {type(leaf): leaf for leaf in jax.tree.leaves(value)}


def log_fallbacks(directory: epath.Path, rules: LoadRules) -> None:
    """Says once which arrays came to one device because the saved ones are not here."""
    if rules.fallbacks:
        text = "%s: the devices that %d arrays were saved on are not here; they were loaded to one"
        text += " device. Give shardings to place them"
        logger.info(text, directory, len(rules.fallbacks))
