"""Kinds of leaves: how a value in a tree becomes an array or a string on disk, and comes back.

A leaf handler of your own makes a type of yours a leaf:

>>> import dataclasses, tempfile
>>> import numpy as np
>>> import flax_ckpt as fc
>>> from flax_ckpt import leaves
>>> @dataclasses.dataclass
... class Point:
...     x: float
...     y: float
>>> class PointLeaf:
...     value_types = ("my_project.Point",)  # part of the checkpoints: it never changes
...
...     def handles(self, value):
...         return isinstance(value, Point)
...
...     def handles_abstract(self, abstract):
...         return abstract is Point
...
...     def write(self, value, *, copy):
...         return leaves.host_write("my_project.Point", np.array([value.x, value.y]))
...
...     def describe(self, saved):
...         return Point
...
...     def target(self, saved, abstract, rules):
...         if saved.shape != (2,):
...             return "a Point"
...         return leaves.Target(saved, (leaves.whole(saved.shape),), Point)
...
...     def build(self, targets, data):
...         return [Point(*part.tolist()) for (part,) in data]
>>> class TreesWithPoints(fc.handlers.PyTreeHandler):
...     def __init__(self):
...         super().__init__(leaf_handler_registry=leaves.LeafRegistry(PointLeaf()))
>>> ctx = fc.Context()
>>> ctx.checkpointables.registry = fc.handlers.local_registry().add(TreesWithPoints)
>>> path = tempfile.mkdtemp() + "/ckpt"
>>> with ctx:
...     fc.save(path, {"origin": Point(0.0, 0.5), "n": 1})
...     fc.load(path)
{'n': 1, 'origin': Point(x=0.0, y=0.5)}
"""

from flax_ckpt.leaves.array import ArrayLeaf
from flax_ckpt.leaves.base import LeafHandler, LeafWrite, LoadRules, SavedLeaf, Target
from flax_ckpt.leaves.host import host_write
from flax_ckpt.leaves.registry import LeafRegistry
from flax_ckpt.storage.store import Shard, whole

__all__ = ["ArrayLeaf", "LeafHandler", "LeafRegistry", "LeafWrite", "LoadRules"]
__all__ += ["SavedLeaf", "Shard", "Target", "host_write", "whole"]
