"""What an author says of the values that a handler is for, and the comparison with what is loaded.

class TestPointHandler(HandlerTests):   # `HandlerTests` and `LeafTests` are `Samples`
    handler = PointHandler

    def values(self):
        return [Point(1, 2.5), Point(-1, 0)]
"""

from collections.abc import Sequence
from typing import Any, ClassVar


class Samples:
    """Values to save, and what belongs to them. Define `values`, and the rest where it differs.

    Attributes:
        needs_abstract: whether a value only loads into an abstract form that the caller gives.
    """

    needs_abstract: ClassVar[bool] = False

    def values(self) -> Sequence[Any]:
        """Values to save, one at least: new objects at each call, equal to those before."""
        raise NotImplementedError(f"{type(self).__name__} must define `values`")

    def abstracts(self, value: Any) -> Sequence[Any]:
        """Abstract forms that load `value` as it was saved; None need not be among them."""
        return ()

    def misfits(self, value: Any) -> Sequence[Any]:
        """Abstract forms that the handler takes, but that `value` does not fit."""
        return ()

    def refused(self) -> Sequence[Any]:
        """Values that the handler does not take."""
        return (object(),)

    def refused_abstracts(self) -> Sequence[Any]:
        """Abstract forms that it does not take."""
        return (object(),)

    def change(self, value: Any) -> None:
        """Changes `value` in place, if it can be changed."""

    def same(self, found: Any, saved: Any) -> bool:
        """Whether what was loaded is what was saved."""
        return bool(found == saved)

    def _takes(self, value: Any) -> Any:
        """What the handler says of a value."""

    def _loads(self, abstract: Any) -> Any:
        """What it says of an abstract form."""

    def test_it_says_what_it_takes(self) -> None:
        """What the handler says of values and abstract forms is true of what it takes, no more."""
        for value in self.values():
            assert self._takes(value) is True, f"does not take {value!r}"
            for abstract in (*self.abstracts(value), *self.misfits(value)):
                assert self._loads(abstract) in (True, None), f"does not load into {abstract!r}"
        for value in self.refused():
            assert self._takes(value) is False, f"takes {value!r}"
        for abstract in self.refused_abstracts():
            assert self._loads(abstract) in (False, None), f"loads into {abstract!r}"

    def forms(self, index: int) -> list[Any]:
        """All abstract forms of a value, None included if it is one."""
        forms = [*([] if self.needs_abstract else [None]), *self.abstracts(self.values()[index])]
        assert forms, "`needs_abstract` is set, but `abstracts` gives no abstract form"
        return forms

    def check(self, found: Any, index: int, when: str) -> None:
        """Compares what was loaded with a new object that is like the one saved."""
        saved = self.values()[index]
        assert self.same(found, saved), f"{when}: saved {saved!r}, loaded {found!r}"
