"""The trees of a checkpoint that a restore looks into, and how a state is laid out in them.

with Source(Layout.of("/run/1500"), context, Selection(only="params")) as source:
    view = source.form(like).view(like)
    source.open_parts({"params"})
    source.trees["params"].leaves  # by their whole paths: params/dense/kernel
"""

import contextlib
import itertools
from collections.abc import Mapping, Sequence, Set
from typing import Any, Literal, TypeAlias

from flax_ckpt import errors
from flax_ckpt._load import Layout
from flax_ckpt.adapters import state as states
from flax_ckpt.context import Context
from flax_ckpt.format import names, tree
from flax_ckpt.handlers import registry as handler_registry
from flax_ckpt.handlers.pytree import PyTreeHandler
from flax_ckpt.handlers.saved_tree import SavedTree, mismatch
from flax_ckpt.leaves.base import SavedLeaf
from flax_ckpt.storage.record import notes
from flax_ckpt.training.selection import Selection

_BY_NAME = "Load them by name with flax_ckpt.load_checkpointables, and put the state together"
TRAINED = (states.PARAMS, states.OPT_STATE)


Form: TypeAlias = Literal["parts", "fields", "tree"]


def view(state: Any, form: Form) -> Any:
    """A state as a checkpoint has it.

    Args:
        state: of any type.
        form: "parts": in a tree for each, "fields": with what is in `train_state` beside the other
            parts, in one tree, as Orbax's users have it; "tree": as it is.

    Returns:
        Its parts or fields that are there; of a tree that is no state, itself as the params.
    """
    if form == "tree":
        return states.whole(state)
    parts = states.split(state)
    if states.WHOLE in parts:
        return {states.PARAMS: states.whole(state)}
    if form == "fields":
        parts |= parts.pop(states.TRAIN_STATE, {})
    empty = isinstance(params := parts.get(states.PARAMS), dict) and not params
    if empty and len(parts) > 1 and states.is_nnx(state):
        del parts[states.PARAMS]  # of a filtered state
    return {name: part for name, part in parts.items() if part is not None}


def back(like: Any, found: Any, form: Form) -> Any:
    """A state of the type of `like` from what :func:`view` makes of it."""
    if form == "tree":
        return states.merge(like, {states.WHOLE: found})
    if states.WHOLE in states.split(like):
        return states.merge(like, {states.WHOLE: found[states.PARAMS]})
    parts = {name: found[name] for name in found if form == "parts" or name in TRAINED}
    rest = {name: found[name] for name in found if name not in parts}
    return states.merge(like, parts | ({states.TRAIN_STATE: rest} if rest else {}))


Moved: TypeAlias = tuple[tree.KeyPath, tree.KeyPath, SavedLeaf]


def areas(like: Any, wanted: Any, form: Form) -> Set[str] | None:
    """First keys of what is judged in a checkpoint; None: all.

    Of NNX's variables, kinds that are not wanted are left alone: `train_state.rngs`, for example.
    """
    if form == "tree":
        return None
    rest: dict[str, Any] = wanted.get(states.TRAIN_STATE, {}) if states.is_nnx(like) else {}
    kinds = {f"{states.TRAIN_STATE}.{name}" for name in rest}
    return wanted.keys() - ({states.TRAIN_STATE} if kinds else set()) | kinds


class Source(contextlib.ExitStack):
    """The trees of a checkpoint; their leaves have the path from the checkpoint on.

    Attributes:
        where: the path of the checkpoint, or of its only tree.
        trees: those that are open.
    """

    def __init__(self, layout: Layout, context: Context, chosen: Selection) -> None:
        super().__init__()
        self.where = layout.path
        self.trees: dict[str, SavedTree] = {}
        self._layout, self._chosen = layout, chosen
        self._registry = context.checkpointables.registry or handler_registry.global_registry()

    def _open(self, name: str, *mount: tree.Key) -> SavedTree:
        last_first = reversed(self._registry.get_all_entries())
        entries = sorted(last_first, key=lambda entry: entry[1] is None)  # first those with a name
        fits = [h for h, bound in entries if bound in (name, None) and issubclass(h, PyTreeHandler)]
        leaves = fits[0]().leaf_handler_registry if fits else None
        damage = notes(self._chosen.on_damage)
        saved = self.enter_context(SavedTree(self._layout.items[name], leaves, damage=damage))
        saved.leaves = {(*mount, *path): leaf for path, leaf in saved.leaves.items()}
        self.trees[name] = saved
        return saved

    def form(self, like: Any) -> Form:
        """How the checkpoint has a state; opens the tree, if one has all of it.

        A wanted tree without a field `params` is itself the params, if there are such.
        """
        if not self._layout.items.keys().isdisjoint(TRAINED):
            return "parts"
        try:
            name = self._layout.tree_name(names.AUTO)
        except errors.InvalidLayoutError as error:
            what = f"{self.where} has neither a tree 'params' nor one that would hold a whole state"
            what += f"; it has: {', '.join(self._layout.items)}"
            raise errors.CheckpointNotFoundError(f"{what}. {_BY_NAME}") from error
        saved = self._open(name)
        self.where = saved.directory
        there = {tree.name_of(path[:1]) for path in saved.leaves}
        if states.PARAMS in there:
            return "fields"
        if states.WHOLE in states.split(like) or states.is_nnx(like):
            return "tree"
        if self._chosen.rename:
            return "fields"
        what = f"{self.where} has no field 'params', which the wanted state has; it has"
        how = "Say with rename= which leaves are the params, or load a tree of this form with"
        how += " flax_ckpt.load, and put the state together"
        raise errors.StateError(f"{what}: {', '.join(sorted(there))}. {how}")

    def open_parts(self, wanted: Mapping[str, bool]) -> None:
        """Opens the parts that are wanted; all that there are, if leaves may move.

        Args:
            wanted: their names, and whether there are leaves in them.

        Raises:
            CheckpointNotFoundError: one is not there, and nothing is said about missing leaves.
        """
        there, moving = self._layout.items, bool(self._chosen.rename)
        absent = sorted(name for name, needed in wanted.items() if needed and name not in there)
        if absent and not moving and self._chosen.missing == "error":
            what = f"{self.where} has no {absent[0]!r}, which the wanted state has; it has"
            raise errors.CheckpointNotFoundError(f"{what}: {', '.join(there)}. {_BY_NAME}")
        for name in self._layout.trees if moving else sorted(wanted.keys() & there.keys()):
            self._open(name, tree.Key(name, tree.DICT))

    def open_all(self) -> None:
        """Opens every tree that there is."""
        for name in self._layout.trees:
            self._open(name, *[tree.Key(name, tree.DICT)] * (name != ""))

    def move(self, wanted: Mapping[str, tree.KeyPath], areas: Set[str] | None) -> list[Moved]:
        """Gives the saved leaves the paths that are wanted, and drops what is not selected.

        Args:
            wanted: paths of the wanted leaves, by their text.
            areas: what is wanted at all: parts, or fields as `train_state.rngs`; None: any.

        Returns:
            Every leaf that there was: its path before and after, and what it is.
        """
        before = [path for saved in self.trees.values() for path in saved.leaves]
        after = _unboxed(self._chosen.destinations(before, wanted, self.where), wanted)
        places = [tree.show(path) for path in after]
        if self._chosen.is_partial:
            unopened = set(self._layout.trees) - self.trees.keys()
            self._chosen.check({*wanted, *places, *self._layout.trees}, unopened, self.where)
        leaves = [leaf for saved in self.trees.values() for leaf in saved.leaves.values()]
        moved = list(zip(before, after, leaves, strict=True))
        picked = zip(moved, self._chosen.picks(places), strict=True)
        for saved in self.trees.values():
            own = itertools.islice(picked, len(saved.leaves))
            saved.leaves = {p: leaf for (_, p, leaf), pick in own if pick and _is_in(p, areas)}
        return moved

    def mismatch(self, differences: Sequence[errors.Difference]) -> errors.TreeMismatchError:
        """The error for leaves that differ; says what to do about those that one side lacks."""
        how = "flax_ckpt.restore takes missing= and unexpected= for leaves that one side lacks,"
        how += " rename= for those that are called otherwise, only= and exclude= to leave"
        error = mismatch(self.where, differences)
        if any("nothing" in (found.saved, found.wanted) for found in differences):
            return errors.TreeMismatchError(f"{error}\n{how} some alone", differences)
        return error


def _is_in(path: tree.KeyPath, areas: Set[str] | None) -> bool:
    return areas is None or not areas.isdisjoint(map(tree.name_of, (path[:1], path[:2])))


def _unboxed(saved: list[tree.KeyPath], wanted: Mapping[str, tree.KeyPath]) -> list[tree.KeyPath]:
    """For each saved path the wanted one that it stands for, if that is not saved itself.

    Linen's `Partitioned` is saved as `kernel/value`, as variables of NNX were by Orbax; and NNX's
    states have dicts with the keys 0, 1, … where an optimizer has a tuple.
    """
    there, asked = set(saved), set(wanted.values())
    found: list[tree.KeyPath] = []
    for path in saved:
        if path not in asked:
            text = tree.show(path)
            boxed = text.removesuffix("/value") if text.endswith("/value") else f"{text}/value"
            other = wanted.get(text) or wanted.get(boxed) or path
            path = path if other in there else other
        found.append(path)
    return found
