"""Trees: their types, and merging them.

merged = fc.tree.merge({"params": params}, {"step": 7})
"""

from flax_ckpt.handlers.merge import merge
from flax_ckpt.leaves.types import (
    AbstractLeaf,
    JsonType,
    Leaf,
    PyTree,
    PyTreeKey,
    PyTreeKeyPath,
    PyTreeOf,
)

__all__ = [
    "AbstractLeaf",
    "JsonType",
    "Leaf",
    "PyTree",
    "PyTreeKey",
    "PyTreeKeyPath",
    "PyTreeOf",
    "merge",
]
