"""The steps of Orbax's guide to checkpointables: one program, run with either import.

What it prints is the same, and each of the two reads what the other has written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROGRAM = '''
from __future__ import annotations

import dataclasses
import json
import sys

import aiofiles
import numpy as np

written, read = sys.argv[1:]


async def put(path, content):
    async with aiofiles.open(path, "w") as file:
        await file.write(json.dumps(content))


async def get(path):
    async with aiofiles.open(path) as file:
        return json.loads(await file.read())


# An object that saves itself.


@dataclasses.dataclass
class Cursor(ocp.StatefulCheckpointable):
    shard: int
    row: int

    async def save(self, directory):
        return self.write(directory, dataclasses.asdict(self))

    async def write(self, directory, fields):
        await put(await directory.await_creation() / "cursor.json", fields)

    async def load(self, directory):
        return self.read(directory)

    async def read(self, directory):
        for name, value in (await get(directory / "cursor.json")).items():
            setattr(self, name, value)


# A handler for a class that knows nothing of checkpoints.


@dataclasses.dataclass
class Point:
    x: int | float
    y: int | float


@dataclasses.dataclass
class AbstractPoint:
    x: type
    y: type


class PointHandler(ocp.CheckpointableHandler[Point, AbstractPoint]):
    async def save(self, directory, checkpointable):
        return self.write(directory, dataclasses.asdict(checkpointable))

    async def write(self, directory, fields):
        directory = await directory.await_creation()
        await put(directory / "point.json", fields)
        await put(directory / "types.json", {k: type(v).__name__ for k, v in fields.items()})

    async def load(self, directory, abstract_checkpointable=None):
        return self.read(directory, abstract_checkpointable)

    async def read(self, directory, abstract):
        point = Point(**await get(directory / "point.json"))
        if abstract is None:
            return point
        return Point(abstract.x(point.x), abstract.y(point.y))

    async def metadata(self, directory):
        types = await get(directory / "types.json")
        return AbstractPoint(**{k: {"int": int, "float": float}[v] for k, v in types.items()})

    def is_handleable(self, checkpointable):
        return isinstance(checkpointable, Point)

    def is_abstract_handleable(self, abstract_checkpointable):
        return isinstance(abstract_checkpointable, AbstractPoint)


class PairHandler(PointHandler):
    """The same for one name, registered under what a handler was once called."""

    def is_handleable(self, checkpointable):
        return isinstance(checkpointable, tuple)

    async def save(self, directory, checkpointable):
        return await super().save(directory, Point(*checkpointable))


state = {"params": np.arange(4), "opt_state": np.ones(4)}
try:
    ocp.save_checkpointables(written + "/none", dict(state=state, point=Point(1, 2)))
except Exception as error:
    print("without a handler:", isinstance(error, Exception))

ocp.handlers.register_handler(PointHandler)
parts = dict(model=state, cursor=Cursor(3, 400), point=Point(1, 2.5))
ocp.save_checkpointables(written + "/guide", parts)

registry = ocp.handlers.local_registry()
registry.add(PairHandler, checkpointable_name="pair", secondary_typestrs=["old.PairHandler"])
context = ocp.Context()
context.checkpointables.registry = registry
with context:
    ocp.save_checkpointables_async(written + "/bound", dict(pair=(1, 2))).result()

for root in (written, read):
    cursor = Cursor(0, 0)
    loaded = ocp.load_checkpointables(root + "/guide", dict(cursor=cursor, point=None))
    print(loaded, loaded["cursor"] is cursor)
    print(ocp.load_checkpointables(root + "/guide", dict(model=None)))
    wish = dict(point=AbstractPoint(float, int))
    print(ocp.load_checkpointables(root + "/guide", wish))
    print(ocp.checkpointables_metadata(root + "/guide").metadata["point"])
    with context:
        print(ocp.load_checkpointables(root + "/bound"))
        print(registry.has("pair"), registry.get("pair"), registry.has("point"))
        print(*registry.get_secondary_typestrs(PairHandler))
'''
OURS = "import flax_ckpt as ocp\n"
ORBAX = "import orbax.checkpoint.experimental.v1 as ocp\n"


def test_the_guide_runs_with_the_import_swapped(tmp_path: Path, run_child: Any) -> None:
    future = "from __future__ import annotations\n"
    assert future in PROGRAM

    def run(library: str, written: str, read: str) -> list[str]:
        program = future + library + PROGRAM.replace(future, "")
        folders = [tmp_path / written, tmp_path / read]
        return run_child(program, *folders).stdout.splitlines()

    alone = run(OURS, "ours", "ours")
    theirs = run(ORBAX, "orbax", "ours")
    again = run(OURS, "ours again", "orbax")
    assert alone == theirs == again
    assert alone[0] == "without a handler: True"
    assert alone[1] == "{'cursor': Cursor(shard=3, row=400), 'point': Point(x=1, y=2.5)} True"
    assert alone[3] == "{'point': Point(x=1.0, y=2)}"
    assert alone[4] == "AbstractPoint(x=<class 'int'>, y=<class 'float'>)"
    assert alone[5] == "{'pair': Point(x=1, y=2)}"
    assert len(alone) == 15
