"""Leaves in boxes: Linen's `Partitioned` is saved as `kernel/value`, as NNX's variables were."""

from typing import Any, Final

from flax_ckpt.format import tree
from flax_ckpt.handlers import keypaths
from flax_ckpt.handlers.saved_tree import SavedTree

_VALUE: Final = tree.Key("value", tree.DICT)


def match(saved: SavedTree, wanted: Any) -> None:
    """Takes `kernel/value` for a wanted `kernel` that is not there, and the other way round."""
    for path in [] if wanted is None else keypaths.flatten(wanted)[0]:
        if path not in saved.leaves:
            other = path[:-1] if path[-1:] == (_VALUE,) else (*path, _VALUE)
            if other in saved.leaves:
                saved.leaves[path] = saved.leaves.pop(other)
