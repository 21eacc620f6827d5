"""Saved leaves under another path than the one wanted: in a box or without, in a list or a dict.

Linen's `Partitioned` is saved as `kernel/value`, as variables of NNX were by Orbax; and NNX's
states have dicts with the keys 0, 1, … where an optimizer has a tuple.
"""

from typing import Any, Final

from flax_ckpt.format import tree
from flax_ckpt.handlers import keypaths
from flax_ckpt.handlers.saved_tree import SavedTree

_VALUE: Final = "value"


def match(saved: SavedTree, wanted: Any) -> None:
    """Takes `kernel/value` for a wanted `kernel` that is not there, and the other way round."""
    there = {_names(path): path for path in saved.leaves}
    for path in [] if wanted is None else keypaths.flatten(wanted)[0]:
        if path not in saved.leaves:
            names = _names(path)
            other = names[:-1] if names[-1:] == (_VALUE,) else (*names, _VALUE)
            found = there.get(names) or there.get(other)
            if found in saved.leaves:
                saved.leaves[path] = saved.leaves.pop(found)


def _names(path: tree.KeyPath) -> tuple[str, ...]:
    return tuple([key.key for key in path])
