"""The suite for leaf handlers."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flax_ckpt._load import load, metadata
from flax_ckpt._save import save
from flax_ckpt.context import Context
from flax_ckpt.errors import TreeMismatchError
from flax_ckpt.format import tree
from flax_ckpt.handlers import local_registry
from flax_ckpt.handlers.pytree import PyTreeHandler
from flax_ckpt.leaves.base import LeafHandler
from flax_ckpt.leaves.registry import LeafRegistry
from flax_ckpt.testing.samples import Samples


class LeafTests(Samples):
    """Tests of a leaf handler; values and their abstract forms are leaves.

    Attributes:
        handler: the class, built without arguments.

    >>> from flax_ckpt.leaves.host import StringLeaf
    >>> class TestStringLeaf(LeafTests):
    ...     handler = StringLeaf
    ...
    ...     def values(self):
    ...         return ["", "text"]
    >>> TestStringLeaf().test_it_says_what_it_takes()
    """

    handler: ClassVar[type[LeafHandler]]

    def _takes(self, value: Any) -> Any:
        return self.handler().handles(value)

    def _loads(self, abstract: Any) -> Any:
        return self.handler().handles_abstract(abstract)

    def test_it_is_a_leaf_handler(self) -> None:
        """It has the methods, and names the kind of leaf that it writes."""
        handler = self.handler()
        lacks = f"{self.handler.__name__} lacks methods of LeafHandler"
        assert isinstance(handler, LeafHandler), lacks
        known = {*handler.value_types, tree.ARRAY, tree.NUMPY, tree.SCALAR, tree.STRING}
        for value in self.values():
            kind = handler.write(value, copy=True).value_type
            assert kind in known, f"writes the kind {kind!r}, which is not among its value_types"
        assert not known & tree.EMPTY.keys(), "one of its value_types is that of an empty node"
        assert list(handler.build([], [])) == [], "of no targets it builds something"

    def test_a_leaf_may_change_once_it_is_written(self) -> None:
        """With `copy`, what `write` returns shares no memory that the caller may overwrite."""
        for value in self.values():
            written = self.handler().write(value, copy=True)
            before = [shard.data.tobytes() for shard in written.shards]
            self.change(value)
            after = [shard.data.tobytes() for shard in written.shards]
            assert after == before, f"what was written changed with {value!r}"

    def test_a_leaf_alone_and_one_of_its_metadata(self, tmp_path: Path) -> None:
        """Each abstract form loads the value; so does what `describe` returns."""
        with self._context():
            for i, value in enumerate(self.values()):
                path = tmp_path / str(i)
                save(path, value)
                described = [] if self.needs_abstract else [metadata(path).metadata]
                for form in described:
                    takes = self.handler().handles_abstract(form)
                    assert takes, f"`describe` returns {form!r}, which it does not take"
                for form in self.forms(i) + described:
                    self.check(load(path, form), i, f"loaded into {form!r}")

    def test_leaves_keep_their_places(self, tmp_path: Path) -> None:
        """Among other leaves and empty nodes; wanted alone, or not wanted."""
        values = self.values()
        forms = [self.forms(i)[0] for i in range(len(values))]
        context = self._context()
        context.pytree.loading.partial_load = True
        with context:
            save(tmp_path / "all", [*values, {}, 7, "text", None, np.arange(3), *values])
            found = load(tmp_path / "all", [*forms, {}, int, str, None, np.ndarray, *forms])
            for i, leaf in enumerate(found[: len(values)] + found[-len(values) :]):
                self.check(leaf, i % len(values), "loaded among others")
            others = found[len(values) : -len(values)]
            assert others[:4] == [{}, 7, "text", None], f"other leaves changed: {others}"
            save(tmp_path / "two", {"leaf": values[0], "n": 1})
            assert load(tmp_path / "two", {"n": int}) == {"n": 1}
            self.check(load(tmp_path / "two", {"leaf": forms[0]})["leaf"], 0, "loaded alone")

    def test_what_does_not_fit_is_told_by_path_with_both_sides(self, tmp_path: Path) -> None:
        """`target` returns how the wish reads, also where a string was saved."""
        text = {} if self.handler().handles("text") else {"text": "text"}
        with self._context():
            for i, value in enumerate(self.values()):
                save(tmp_path / str(i), {"leaf": value, **text})
                wishes = [{"leaf": misfit, **text} for misfit in self.misfits(value)]
                if text:
                    wishes += [{"leaf": self.forms(i)[0], "text": a} for a in self.abstracts(value)]
                for wish in wishes:
                    self._check_difference(tmp_path / str(i), wish)

    def _check_difference(self, path: Path, wish: Any) -> None:
        try:
            found = load(path, wish)
        except TreeMismatchError as error:
            (difference,) = error.differences
            told = difference.path in wish and difference.saved != difference.wanted
            assert told, f"says nothing of what differs: {difference}"
        else:
            raise AssertionError(f"{wish} does not fit, but it was loaded: {found}")

    def _context(self) -> Context:
        leaves = LeafRegistry(self.handler())

        class Trees(PyTreeHandler):
            def __init__(self) -> None:
                super().__init__(leaf_handler_registry=leaves)

        context = Context()
        context.checkpointables.registry = local_registry().add(Trees)
        return context
