"""Which leaf handler takes which leaf: a list, the last registered that accepts it wins."""

from collections.abc import Iterable
from typing import Any

from flax_ckpt.errors import NoLeafHandlerError
from flax_ckpt.format import tree
from flax_ckpt.leaves.array import ArrayLeaf, KeyLeaf
from flax_ckpt.leaves.base import LeafHandler, SavedLeaf
from flax_ckpt.leaves.host import NumpyLeaf, ScalarLeaf, StringLeaf


class LeafRegistry:
    """An ordered set of leaf handlers: those of this package, then your own.

    Args:
        handlers: your own; as with :meth:`add`.

    Lookup: to save, the last one whose `handles` is true of the value. To load, the one of typed
    keys if the leaf is one; else the last whose `handles_abstract` is true of the wish; without a
    wish the last that names the leaf's `value_type`.
    """

    def __init__(self, *handlers: LeafHandler) -> None:
        self._keys = KeyLeaf()
        self._last_first: list[LeafHandler] = []
        self._by_kind: dict[str, LeafHandler] = {}
        ours = StringLeaf(), ScalarLeaf(), NumpyLeaf(), self._keys, ArrayLeaf()
        for handler in (*ours, *handlers):
            self.add(handler)

    def add(self, handler: LeafHandler) -> None:
        """Registers a handler; it wins over those before it."""
        self._last_first.insert(0, handler)
        self._by_kind |= dict.fromkeys(handler.value_types, handler)

    def for_value(self, value: Any) -> LeafHandler | None:
        """The handler to save a value with."""
        for handler in self._last_first:
            if handler.handles(value):
                return handler
        return None

    def for_abstract(self, abstract: Any) -> LeafHandler | None:
        """The handler to load a leaf as `abstract` with."""
        return next((h for h in self._last_first if h.handles_abstract(abstract)), None)

    def for_saved(self, saved: SavedLeaf, abstract: Any = None) -> LeafHandler | None:
        """The handler to load a saved leaf with, as `abstract` if that is not None."""
        if abstract is not None:
            handler = self.for_abstract(abstract)
            is_array = isinstance(handler, ArrayLeaf)
            return self._keys if is_array and saved.key_impl is not None else handler
        if saved.key_impl is None:
            return self._by_kind.get(saved.value_type)
        return None if self._keys.describe(saved) is None else self._keys

    def missing(self, where: str, leaves: Iterable[SavedLeaf]) -> NoLeafHandlerError:
        """The error for saved leaves of which some are of a kind that no handler here loads."""
        unknown = [leaf for leaf in leaves if not leaf.is_empty and self.for_saved(leaf) is None]
        named = [f"  {tree.show(e.path)}: kind {e.key_impl or e.value_type!r}" for e in unknown]
        lines = named[:10]
        if len(unknown) > len(lines):
            lines.append(f"  … and {len(unknown) - len(lines)} more")
        first = f"{where}: no leaf handler is registered for {len(unknown)} of its leaves:"
        last = "Load it with PyTreeHandler(leaf_handler_registry=LeafRegistry(handler)), where"
        last += " `handler` is the leaf handler that they were saved with; or name the other leaves"
        last += " alone, with partial_load; or ask for their arrays with numpy.ndarray"
        return NoLeafHandlerError("\n".join([first, *lines, last]))
