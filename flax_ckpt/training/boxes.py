"""Saved leaves under another path than the one wanted: in a box or without, in a list or a dict.

Linen's `Partitioned` is saved as `kernel/value`, as variables of NNX were by Orbax; and NNX's
states have dicts with the keys 0, 1, … where an optimizer has a tuple.
"""

from collections.abc import Mapping, Sequence

from flax_ckpt.format import tree


def match(saved: Sequence[tree.KeyPath], wanted: Mapping[str, tree.KeyPath]) -> list[tree.KeyPath]:
    """For each saved path the wanted one that it stands for, if that is not saved itself."""
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
