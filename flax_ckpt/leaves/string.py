"""Python strings; their values are in `_strings.json`, not among the arrays."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from flax_ckpt.format import tree
from flax_ckpt.leaves.base import LeafWrite, LoadRules, SavedLeaf, Target


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
