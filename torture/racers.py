"""The other processes of `torture.races`, each with what it is started for.

python -m torture.racers restorer <root>         # restores the latest step until it is told to end
python -m torture.racers loader <path>           # loads a checkpoint that is being replaced
python -m torture.racers claimer <root> <name>   # tries to save to a new run in each round
python -m torture.racers writer <root> <fifo>    # is stopped within a save

They say `ready` when they begin, are told what to do by lines on standard input, and say at the
end what they have seen, as JSON.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

import flax_ckpt as fc
from flax_ckpt.errors import CheckpointNotFoundError, FlaxCkptError, RunInUseError

SIZE = 3000


def tree_of(value: int) -> dict[str, Any]:
    """A state every leaf of which says which one it is."""
    w = np.full(SIZE, value, np.int64)
    return {"params": {"w": w, "b": w[:7].astype(np.float32)}, "number": value}


def value_of(state: Any) -> int | None:
    """Which state it is; None: leaves of several."""
    if "train_state" in state:  # of a step of a run
        state = {**state["train_state"], **state}
    params = state["params"]
    found = {int(state["number"]), *params["w"].tolist(), *map(int, params["b"].tolist())}
    return found.pop() if len(found) == 1 else None


def _say(found: Any) -> None:
    print(json.dumps(found), flush=True)


def _until_told(read: Callable[[], int | None]) -> None:
    """Reads again and again; says how often, which values came, and what went wrong."""
    end = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.readline(), end.set()), daemon=True).start()
    _say("ready")
    seen, wrong, last, begun = 0, [], -1, False
    while not end.is_set():
        try:
            value = read()
        except CheckpointNotFoundError as error:
            if begun:
                wrong.append(f"after {last}: {type(error).__name__}: {error}")
            continue
        except Exception as error:
            wrong.append(f"after {last}: {type(error).__name__}: {error}")
            continue
        begun = True
        if value is None or value < last:
            wrong.append(f"after {last} came {value}")
        else:
            seen, last = seen + 1, value
    _say({"seen": seen, "last": last, "wrong": wrong})


def restorer(root: str) -> None:
    def read() -> int | None:
        out = fc.restore(root)
        latest = fc.training.Checkpointer(root).latest
        if out.report.damaged:
            raise ValueError(f"passed over {out.report.damaged}")
        if latest is None or out.step is None or latest.step < out.step:
            raise ValueError(f"the latest is {latest}, after step {out.step} was restored")
        return out.step if value_of(out.state) == out.step else None

    _until_told(read)


def loader(path: str) -> None:
    _until_told(lambda: value_of(fc.load(path)))


def claimer(root: str, name: str) -> None:
    """In each round one of several must get the run, and all it saves must be its own."""
    _say("ready")
    for number in sys.stdin:
        run = f"{root}/{number.strip()}"
        ckpt = fc.CheckpointCallback(run, every_n_steps=1, at_end=False)
        try:
            ckpt.restore_or_init(tree_of(0))
            ckpt.on_step_end(1, tree_of(int(name)))
            ckpt.wait()
            _say("saved")
        except RunInUseError:
            _say("refused")
        except FlaxCkptError as error:
            refused = isinstance(error.__cause__, RunInUseError)
            _say("refused" if refused else f"{type(error).__name__}: {error}")
        sys.stdin.readline()  # it is held until all have tried
        ckpt.close()


class Waits:
    """A handler whose save ends when a pipe is opened."""

    fifo = ""

    async def save(self, directory: Any, value: Any) -> Any:
        return self._write(directory, value)

    async def _write(self, directory: Any, value: Any) -> None:
        path = await directory.await_creation()
        (path / "file").write_text(str(value))
        if value == 2:
            _say("within")
            with open(self.fifo) as pipe:
                pipe.read()

    async def load(self, directory: Any, abstract: Any = None) -> Any:
        return self._read(directory)

    async def _read(self, directory: Any) -> str:
        return (directory / "file").read_text()

    async def metadata(self, directory: Any) -> Any: ...

    def is_handleable(self, value: Any) -> bool:
        return isinstance(value, int)

    def is_abstract_handleable(self, abstract: Any) -> bool | None:
        return None


def writer(root: str, fifo: str) -> None:
    """Saves step 1, is within the save of step 2 for as long as the other wants, then saves 3."""
    Waits.fifo = fifo
    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry().add(
        Waits, checkpointable_name="waits"
    )
    run = fc.training.Checkpointer(root, context=context)
    _say("ready")
    said: list[str] = []
    for step in (1, 2, 3):
        try:
            run.save_checkpointables(step, {"state": tree_of(-step), "waits": step})
            said.append(f"saved {step}")
        except RunInUseError as error:
            said.append(f"refused {step}: {error}")
        except Exception as error:
            said.append(f"{type(error).__name__} {step}: {error}")
    run.close()
    _say(said)


if __name__ == "__main__":
    roles = {role.__name__: role for role in (restorer, loader, claimer, writer)}
    roles[sys.argv[1]](*sys.argv[2:])
