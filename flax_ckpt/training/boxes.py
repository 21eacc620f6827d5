"""Saved leaves under another path than the one wanted: in a box or without, in a list or a dict.

Linen's `Partitioned` is saved as `kernel/value`, as variables of NNX were by Orbax; and NNX's
states have dicts with the keys 0, 1, … where an optimizer has a tuple.
"""

from collections.abc import Mapping

from flax_ckpt.format import tree


def match(path: tree.KeyPath, wanted: Mapping[str, tree.KeyPath]) -> tree.KeyPath:
    """The wanted path that a saved leaf stands for: its own, or one with or without the box."""
    text = tree.show(path)
    boxed = text.removesuffix("/value") if text.endswith("/value") else f"{text}/value"
    return wanted.get(text) or wanted.get(boxed) or path
