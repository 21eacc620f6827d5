"""A training state as named trees, and back: `params`, `opt_state`, and the rest.

    parts = split(state)             # {"params": …, "opt_state": …, "train_state": {"step": …}}
    state = merge(state, parts)      # the same type; `apply_fn` and `tx` are those of `state`

A state is anything with a part called `params`: Flax's `TrainState` and its subclasses, any
dataclass that is a PyTree, a dict, a named tuple; or anything that NNX's objects are in. Any other
tree is one part, `state`.
"""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any, Final, TypeVar, cast

import jax
import numpy as np

from flax_ckpt.adapters import nnx

_tree_util: Any = jax.tree_util  # jaxlib says nothing about the types of its trees
PARAMS: Final = nnx.PARAMS
OPT_STATE: Final = nnx.OPT_STATE
TRAIN_STATE: Final = "train_state"
WHOLE: Final = "state"

S = TypeVar("S")


def split(state: Any) -> dict[str, Any]:
    """The named trees of a training state; nothing is copied."""
    there = fields(state)
    parts = {name: there.pop(name) for name in (PARAMS, OPT_STATE) if name in there}
    if not parts:
        return {WHOLE: state}
    return parts | ({TRAIN_STATE: there} if there else {})


def merge(like: S, parts: Mapping[str, Any]) -> S:
    """A state of the type of `like` with the trees of `parts`; `like` is not changed."""
    if WHOLE in parts:
        return nnx.fill(like, parts[WHOLE])
    values = {name: parts[name] for name in (PARAMS, OPT_STATE) if name in parts}
    values |= parts.get(TRAIN_STATE, {})
    state: Any = like
    if is_nnx(state):
        return nnx.merge(state, values)
    own = _own_fields(state)
    values = {name: nnx.fill(own[name], value) for name, value in values.items()}
    if isinstance(like, dict):
        copied = copy.copy(state)  # a `defaultdict` has more than its items
        copied.update(values)
        return copied
    if isinstance(like, Mapping):
        return type(state)({**own, **values})
    if hasattr(state, "_replace"):
        return state._replace(**values)
    return dataclasses.replace(state, **values)


def is_nnx(state: Any) -> bool:
    """Whether a state consists of NNX's objects, so that its variables' types name its fields."""
    return PARAMS not in _own_fields(state) and nnx.holds_nodes(state, typed=True)


def whole(state: Any) -> Any:
    """A state as one tree, without NNX's objects."""
    return nnx.pure(state)


def fields(state: Any) -> dict[str, Any]:
    """The fields of a state that are data; none if it has none by name."""
    if is_nnx(state):
        return nnx.collections(state)
    return {name: nnx.pure(value) for name, value in _own_fields(state).items()}


def _own_fields(state: Any) -> Mapping[str, Any]:
    """The fields that a state's own type has."""
    if nnx.is_node(state):
        return {}
    if isinstance(state, Mapping):
        return cast("Mapping[str, Any]", state)
    if hasattr(state, "_asdict"):
        return state._asdict()
    if not dataclasses.is_dataclass(state) or isinstance(state, type):
        return {}
    pairs = _tree_util.tree_flatten_with_path(state, is_leaf=nnx.other_than(state))[0]
    if all(path and isinstance(path[0], jax.tree_util.GetAttrKey) for path, _ in pairs):
        return {path[0].name: value for path, value in pairs}  # JAX knows which are static
    # flax.struct marks static fields so.
    own = [f.name for f in dataclasses.fields(state) if f.metadata.get("pytree_node", True)]
    return {name: getattr(state, name) for name in own}


def step_of(state: Any) -> Any:
    """The number of updates that the state itself counts, or None."""
    return nnx.step_of(state) if is_nnx(state) else nnx.pure(_own_fields(state).get("step"))


def is_whole(state: Any) -> bool:
    """Whether a state seen earlier is still what it was: nothing donated, nothing of NNX's.

    NNX's objects and NumPy arrays change in place; nobody knows whether a train step has since.
    """
    if nnx.holds_nodes(state):
        return False
    return not any(
        leaf.is_deleted() if isinstance(leaf, jax.Array) else isinstance(leaf, np.ndarray)
        for leaf in jax.tree.leaves(state)
    )


def unfilled(state: S) -> S:
    """A state that stays as it is when the user goes on filling the dict that it is."""
    return cast("S", copy.copy(cast("object", state))) if isinstance(state, dict) else state
