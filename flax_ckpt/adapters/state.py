"""A training state as named trees, and back: `params`, `opt_state`, and the rest.

    parts = split(state)             # {"params": …, "opt_state": …, "train_state": {"step": …}}
    state = merge(state, parts)      # the same type; `apply_fn` and `tx` are those of `state`

A state is anything with a part called `params`: Flax's `TrainState` and its subclasses, any
dataclass that is a PyTree, a dict, a named tuple. Any other tree is one part, `state`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, TypeVar, cast

import jax

PARAMS: Final = "params"
OPT_STATE: Final = "opt_state"
TRAIN_STATE: Final = "train_state"
WHOLE: Final = "state"

S = TypeVar("S")


def split(state: Any) -> dict[str, Any]:
    """The named trees of a training state; nothing is copied."""
    there = fields(state)
    if PARAMS not in there:
        return {WHOLE: state}
    rest = {name: there[name] for name in there if name not in (PARAMS, OPT_STATE)}
    parts = {name: there[name] for name in (PARAMS, OPT_STATE) if name in there}
    return parts | ({TRAIN_STATE: rest} if rest else {})


def merge(like: S, parts: Mapping[str, Any]) -> S:
    """A state of the type of `like` with the trees of `parts`; `like` is not changed."""
    values = {name: parts[name] for name in (PARAMS, OPT_STATE) if name in parts}
    values |= parts.get(TRAIN_STATE, {})
    state: Any = like
    if isinstance(like, Mapping):
        return type(state)({**fields(state), **values})
    if hasattr(state, "_replace"):
        return state._replace(**values)
    return dataclasses.replace(state, **values)


def fields(state: Any) -> Mapping[str, Any]:
    """The fields of a state that are data; none if it has none by name."""
    if isinstance(state, Mapping):
        return cast("Mapping[str, Any]", state)
    if hasattr(state, "_asdict"):
        return state._asdict()
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        return {
            field.name: getattr(state, field.name)
            for field in dataclasses.fields(state)
            if field.metadata.get("pytree_node", True)  # flax.struct marks static fields so
        }
    return {}


def step_of(state: Any) -> Any:
    """The number of updates that the state itself counts, or None."""
    return fields(state).get("step")


def is_whole(state: Any) -> bool:
    """Whether a state seen earlier is still what it was: none of its arrays was donated."""
    leaves = jax.tree.leaves(state)
    return not any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves)
