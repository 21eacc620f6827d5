"""A wanted state, filled from one checkpoint: what becomes of each of its leaves, and a report.

chosen, rules = Selection(only="params"), LoadRules(strict=True)
state, report = fill(Layout.of("/run/1500"), like, chosen, rules, context)
"""

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flax_ckpt._load import Layout
from flax_ckpt.adapters import state as states
from flax_ckpt.context import Context
from flax_ckpt.errors import StateError
from flax_ckpt.format import tree
from flax_ckpt.handlers import keypaths
from flax_ckpt.handlers.saved_tree import SavedTree
from flax_ckpt.leaves import dtypes
from flax_ckpt.leaves.base import PLACEHOLDER, LoadRules, SavedLeaf, show_array
from flax_ckpt.storage.record import warn
from flax_ckpt.training import progress
from flax_ckpt.training.report import Report
from flax_ckpt.training.selection import Missing, Selection, shortened
from flax_ckpt.training.source import TRAINED, Form, Moved, Source, areas, back, view


class _Wish:
    """The wanted leaves and empty nodes, in order, and what becomes of each, by its place.

    Attributes:
        paths: key path of each in the checkpoint, after renaming.
        names: the same as text.
        values: what each is in the wanted state; then what it becomes.
        read: those that are read, by the tree that has them.
        kept: those that stay as they are.
        initialised: those that `init` makes.
    """

    def __init__(self, paths: Sequence[tree.KeyPath], values: list[Any]) -> None:
        self.paths, self.values = paths, values
        self.names = [tree.show(path) for path in paths]
        self.read: dict[str, list[int]] = {}
        self.kept: list[int] = []
        self.initialised: list[int] = []

    def share_out(self, picked: list[bool], trees: dict[str, SavedTree], missing: Missing) -> None:
        """Decides what becomes of each leaf; to compare one that is missing will be an error."""
        self.read = {name: [] for name in trees}
        owners = {path: name for name, saved in trees.items() for path in saved.leaves}
        for i, path in enumerate(self.paths):
            if not picked[i]:
                self.kept.append(i)
            elif path in owners:
                self.read[owners[path]].append(i)
            elif _is_nothing(self.values[i]):
                pass
            elif missing == "error":
                part = tree.name_of(path[:1])
                self.read[part if part in trees else next(iter(trees))].append(i)
            else:
                (self.kept if missing == "keep" else self.initialised).append(i)

    def initialise(self, init: Callable[[], Any] | None, form: Form) -> None:
        """Takes from `init` what is missing, and what would stay abstract; calls it only for these.

        Raises:
            StateError: there is no `init`, or what it makes does not fit.
        """
        abstract = {i for i in self.kept if _has_no_value(self.values[i])}
        if abstract and init is None:
            what = "these leaves are not read, and are abstract or deleted in the wanted state"
            named = shortened([self.names[i] for i in sorted(abstract)])
            how = "Give a concrete state, or init=, a function that makes one"
            raise StateError(f"{what}: {named}. {how}")
        self.kept = [i for i in self.kept if i not in abstract]
        self.initialised = sorted([*self.initialised, *abstract])
        if not self.initialised or init is None:
            return
        made = dict(zip(*keypaths.flatten(view(init(), form)), strict=True))
        wrong: list[str] = []
        for i in self.initialised:
            found, wish = made.get(self.paths[i]), self.values[i]
            if _is_nothing(found) or _has_no_value(found) or not _fits(found, wish):
                wrong.append(f"{self.names[i]}: {_show(found)}, wanted {_show(wish)}")
            placed = getattr(wish, "sharding", None) if _is_abstract(wish) else None
            self.values[i] = found if placed is None else jax.device_put(found, placed)
        if wrong:
            raise StateError(f"init() does not make the wanted leaves: {shortened(wrong)}")

    def take(self, group: list[int], values: Sequence[Any], saved: SavedTree) -> dict[str, str]:
        """Takes what was read of one tree; damaged leaves go from its group to those kept.

        Returns:
            Why, by the name of the leaf, or the path of a damaged file that is no leaf's.
        """
        noted = saved.damage or {}
        damage = {path: why for path, why in noted.items() if os.path.isabs(path)}
        whole: list[int] = []
        for i, value in zip(group, values, strict=True):
            leaf = saved.leaves.get(self.paths[i]) if noted else None
            if leaf is None or (why := noted.get(tree.show(leaf.path))) is None:
                whole.append(i)
                self.values[i] = value
            else:
                damage[self.names[i]] = why
                self.kept.append(i)
        group[:] = whole
        return damage

    def parts(self, picked: Sequence[bool]) -> dict[str, bool]:
        """First keys of those that are selected, and whether there are leaves beneath them."""
        found: dict[str, bool] = {}
        for path, value in itertools.compress(zip(self.paths, self.values, strict=True), picked):
            found[path[0].key] = found.get(path[0].key, False) or not _is_nothing(value)
        return found

    def leaves(self, which: Sequence[int]) -> tuple[list[tree.KeyPath], list[Any]]:
        """Paths and values of some of them."""
        return [self.paths[i] for i in which], [self.values[i] for i in which]

    def summary(self, which: Sequence[int]) -> tuple[tuple[str, ...], int]:
        """Names and size of some of them, empty nodes left out."""
        shown = [i for i in which if not _is_nothing(self.values[i])]
        size = progress.nbytes([self.values[i] for i in shown])
        return tuple([self.names[i] for i in shown]), size


def _is_nothing(value: Any) -> bool:
    return value is PLACEHOLDER or keypaths.is_empty(value)


def _is_abstract(value: Any) -> bool:
    if isinstance(value, type | np.dtype):
        return True
    is_array = hasattr(value, "shape") and hasattr(value, "dtype")
    return is_array and not isinstance(value, jax.Array) and not hasattr(value, "__array__")


def _has_no_value(value: Any) -> bool:
    return _is_abstract(value) or (isinstance(value, jax.Array) and value.is_deleted())


def _fits(value: Any, wish: Any) -> bool:
    """Whether a value can stand for a wanted leaf; numbers of rank 0 may be of another kind."""
    if np.shape(value) != np.shape(wish) or isinstance(value, str) != isinstance(wish, str):
        return False
    if isinstance(value, str):
        return True
    own, wanted = (x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype for x in (value, wish))
    if not (hasattr(own, "char") and hasattr(wanted, "char")):  # of a typed key
        return own == wanted
    return dtypes.matches(own, wanted, np.shape(value), strict=True)


def _show(value: Any) -> str:
    kind = getattr(value, "dtype", type(value).__name__)
    return "nothing" if value is None else show_array(np.shape(value), kind)


def fill(
    layout: Layout, like: Any, chosen: Selection, rules: LoadRules, context: Context
) -> tuple[Any, Report]:
    """A state of the type of `like`, and what was done for it, in an unknown time.

    Raises:
        CheckpointNotFoundError: a part that is wanted is not there.
        StateError: the selection fits nothing, or a leaf would stay abstract.
        TreeMismatchError: with every difference; nothing was read.
        DamagedCheckpointError: the data is not what was saved.
    """
    with Source(layout, context, chosen) as source:
        form = "tree" if like is None else source.form(like)
        wanted = view(like, form)
        if like is None:
            source.open_all()
            moved = source.move({}, None)
            paths = [path for saved in source.trees.values() for path in saved.leaves]
            wish, picked = _Wish(paths, [None] * len(paths)), [True] * len(paths)
        else:
            wish = _Wish(*keypaths.flatten(wanted))
            picked = chosen.picks(wish.names)
            if form == "parts":
                source.open_parts(wish.parts(picked))
            places = dict(zip(wish.names, wish.paths, strict=True))
            moved = source.move(places, areas(like, wanted, form))
        if chosen.is_partial and not any(picked):
            raise StateError(f"only= and exclude= select no leaf of {source.where}")
        ignore = chosen.unexpected == "ignore"
        wish.share_out(picked, source.trees, chosen.missing)
        read = [(source.trees[name], group) for name, group in wish.read.items()]
        compared = [one.compare(*wish.leaves(group), rules, partial=ignore) for one, group in read]
        if differences := [each for found, _ in compared for each in found]:
            raise source.mismatch(differences)
        if chosen.on_damage == "raise":  # else it has to be known what is damaged
            wish.initialise(chosen.init, form)
        damage: dict[str, str] = {}
        for (saved, group), (_, values) in zip(read, compared, strict=True):
            damage |= wish.take(group, values(), saved)
        warn(source.where, damage)
        if chosen.on_damage == "skip":
            wish.initialise(chosen.init, form)
    report = _report(wish, moved, damage)
    if like is None:
        for i in wish.kept:  # those that are damaged
            wish.values[i] = PLACEHOLDER
        leaves = zip(wish.paths, wish.values, strict=True)
        return tree.build(leaves, source.where, gaps=True), report
    if chosen.only is not None and form != "tree":
        _warn_of_unread(wish)
    return back(like, keypaths.structure(wanted).unflatten(wish.values), form), report


def _report(wish: _Wish, moved: Sequence[Moved], damage: Mapping[str, str]) -> Report:
    read = sorted(itertools.chain(*wish.read.values()))
    there = {wish.paths[i] for i in read}
    rest = [(old, new, leaf) for old, new, leaf in moved if new not in there and not leaf.is_empty]
    left = [(old, leaf) for old, new, leaf in rest if tree.show(new) not in damage]
    ignored = tuple([tree.show(path) for path, _ in left]), sum(_size(leaf) for _, leaf in left)
    taken = [(tree.show(old), tree.show(new)) for old, new, _ in moved if new in there]
    renamed = tuple([(old, new) for old, new in taken if old != new])
    loaded, kept, made = map(wish.summary, (read, wish.kept, wish.initialised))
    return Report(*loaded, 0.0, tuple(damage.items()), *kept, *made, *ignored, renamed)


def _size(leaf: SavedLeaf) -> int:
    return 8 if leaf.dtype is None else math.prod(leaf.shape or ()) * leaf.dtype.itemsize


def _warn_of_unread(wish: _Wish) -> None:
    """Warns of collections of arrays, such as `batch_stats`, of which nothing is selected."""
    read = {i for group in wish.read.values() for i in group}
    collections: dict[str, list[int]] = {}
    for i, (path, value) in enumerate(zip(wish.paths, wish.values, strict=True)):
        depth = 2 if path[0].key == states.TRAIN_STATE else 1
        is_float = hasattr(value, "dtype") and dtypes.kind(value.dtype) == "float"
        if path[0].key not in TRAINED and len(path) > depth and is_float:
            collections.setdefault(tree.show(path[:depth]), []).append(i)
    if unread := [name for name, inside in collections.items() if read.isdisjoint(inside)]:
        text = "only= selects nothing of %s: what was read may need what was saved with it there;"
        text += " if so, name it in only= as well"
        progress.logger.warning(text, ", ".join(unread))
