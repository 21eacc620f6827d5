"""Python's own leaves: numbers, each a rank-0 array, and strings.

An int is stored as int64 or uint64, a float as float64; strings are in `_strings.json`.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from flax_ckpt.errors import TreeMismatchError
from flax_ckpt.format import tree
from flax_ckpt.leaves import dtypes
from flax_ckpt.leaves.base import LeafWrite, LoadRules, SavedLeaf, Target
from flax_ckpt.leaves.ndarray import host_write

_KINDS: Final[dict[str, type]] = {"bool": bool, "int": int, "float": float}


class ScalarLeaf:
    """Saves and loads `int` from -2**63 to 2**64 - 1, `float` and `bool`."""

    value_types = (tree.SCALAR,)

    def handles(self, value: Any) -> bool:
        """See :class:`LeafHandler`."""
        if isinstance(value, np.generic):  # np.float64 is a float
            return False
        if isinstance(value, int):
            return -(2**63) <= value < 2**64
        return isinstance(value, float)

    def handles_abstract(self, abstract: Any) -> bool:
        """True for the types `int`, `float`, `bool`, and for their values."""
        if isinstance(abstract, np.generic):
            return False
        return isinstance(abstract, int | float) or abstract in (int, float, bool)

    def write(self, value: Any, *, copy: bool) -> LeafWrite:
        """See :class:`LeafHandler`."""
        return host_write(tree.SCALAR, np.asarray(value))  # int64, or uint64 where it has to be

    def describe(self, saved: SavedLeaf) -> Any:
        """The zero of its type, as Orbax has it: `0`, `0.0` or `False`."""
        return _KINDS.get(dtypes.kind(saved.dtype), float)()

    def target(self, saved: SavedLeaf, abstract: Any, rules: LoadRules) -> Target | str:
        """See :class:`LeafHandler`."""
        if abstract is None and saved.dtype is not None:
            abstract = _KINDS.get(dtypes.kind(saved.dtype), complex)
        wanted: type = abstract if isinstance(abstract, type) else type(abstract)
        if saved.shape != () or saved.dtype is None:
            return f"Python {wanted.__name__}"
        if rules.strict and not dtypes.matches(saved.dtype, np.dtype(wanted), (), strict=True):
            return f"Python {wanted.__name__}"
        return Target(saved, ((),), wanted, rules.strict)

    def build(self, targets: Sequence[Target], data: Sequence[Sequence[NDArray[Any]]]) -> list[Any]:
        """See :class:`LeafHandler`."""
        return [_convert(part.item(), t) for t, (part,) in zip(targets, data, strict=True)]


def _convert(value: Any, target: Target) -> Any:
    wanted = target.abstract
    try:
        result = wanted(value)
        if not target.strict or result == value or value != value:
            return result
    except (TypeError, ValueError, OverflowError):
        pass  # as an int, neither NaN, infinity nor a complex number is anything
    raise TreeMismatchError(
        f"{tree.show(target.saved.path)}: the saved number {value!r} does not fit a Python"
        f" {wanted.__name__}"
    )


class StringLeaf:
    """Saves and loads `str`."""

    value_types = (tree.STRING,)

    def handles(self, value: Any) -> bool:
        """See :class:`LeafHandler`."""
        return isinstance(value, str)

    def handles_abstract(self, abstract: Any) -> bool:
        """True for `str` and for any string."""
        return abstract is str or isinstance(abstract, str)

    def write(self, value: Any, *, copy: bool) -> LeafWrite:
        """See :class:`LeafHandler`."""
        return LeafWrite(tree.STRING, string=str(value))

    def describe(self, saved: SavedLeaf) -> Any:
        """The word `string`, as Orbax has it."""
        return "string"

    def target(self, saved: SavedLeaf, abstract: Any, rules: LoadRules) -> Target | str:
        """See :class:`LeafHandler`."""
        return Target(saved, (), str) if saved.value_type == tree.STRING else "a string"

    def build(self, targets: Sequence[Target], data: Sequence[Sequence[NDArray[Any]]]) -> list[Any]:
        """See :class:`LeafHandler`; nothing is read, the saved leaf has the value."""
        return [target.saved.string for target in targets]
