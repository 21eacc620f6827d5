"""Suites that the author of a handler inherits, to see that it does what handlers must do.

    from flax_ckpt.testing import HandlerTests

    class TestPointHandler(HandlerTests):       # in a test file: pytest finds what is inherited
        handler = PointHandler

        def values(self):
            return [Point(1, 2.5), Point(-1, 0)]

A failure says which part of the contract is broken. Nothing here imports pytest.
"""

from flax_ckpt.testing.suites import HandlerTests, LeafTests

__all__ = ["HandlerTests", "LeafTests"]
