"""What was reported as saved, and whether what lies on disk agrees with it."""

from __future__ import annotations

import os
import zlib
from typing import Any

import jax
import numpy as np

import flax_ckpt as fc
from flax_ckpt.format import names
from flax_ckpt.storage import kinds

# Where syncs cost nothing, for what does not depend on when they end.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
ITEM = ":opt_state"  # of a key: one of its checkpointables
_FOREIGN = {
    "notes.txt": b"mine",
    "7.backup/weights": b"\1\2",
    f"mine{names.TMP_SUFFIX}/5": b"not a step's",
    "90000/readme": b"a directory that is called as a step",
}


def state_of(key: str, version: int) -> dict[str, Any]:
    """Checkpointables whose every bit follows from the key and the version."""
    random = np.random.default_rng(zlib.crc32(f"{key}/{version}".encode()))
    return {
        "params": {
            "version": version,
            "text": f"{key}/{version}",
            "w": random.standard_normal((61, 17), np.float32),
            "b": [random.integers(0, 255, 700, np.uint8), np.zeros(0)],
        },
        "opt_state": {"m": random.standard_normal((40, 9)), "count": version},
    }


def same(a: Any, b: Any) -> bool:
    """Whether two trees are equal bit for bit."""
    leaves, other = jax.tree.leaves_with_path(a), jax.tree.leaves_with_path(b)
    return len(leaves) == len(other) and all(
        p == q and np.asarray(x).dtype == np.asarray(y).dtype and np.array_equal(x, y)
        for (p, x), (q, y) in zip(leaves, other, strict=True)
    )


class Ledger:
    """What a process that may end at any moment has said it did in a root.

    Attributes:
        durable: version by key, of what was reported as saved.
        pending: versions by key of saves that began since.
        doomed: keys whose deletion has begun.
        parts: by key, how many parts of it are saved that were not finalized.
    """

    def __init__(self) -> None:
        self.durable: dict[str, int] = {}
        self.pending: dict[str, set[int]] = {}
        self.doomed: set[str] = set()
        self.gone: set[str] = set()
        self.parts: dict[str, int] = {}

    def say(self, kind: str, key: str = "", version: int = 0) -> None:
        """Takes note: `begin`, `durable`, `deleting`, `deleted`; all else is for others.

        `rescued` is `durable` of what may be without `ITEM`. It is one report, as the process may
        end between two.
        """
        if kind == "begin":
            self.pending.setdefault(key, set()).add(version)
            self.gone -= {key, key + ITEM}
        elif kind in ("durable", "rescued"):
            self.durable[key] = version
            self.pending[key] = set()
            self.doomed -= {key, key + ITEM}
            self.doomed |= {key + ITEM} if kind == "rescued" else set()
            self.parts.pop(key, None)
        elif kind == "parts":
            self.parts[key] = version
        elif kind == "deleting":
            self.doomed.add(key)
        elif kind == "deleted":
            self.gone.add(key)

    def problems(self, root: str) -> list[str]:
        """Where the disk disagrees."""
        there = [n for n in os.listdir(root) if kinds.is_checkpoint(os.path.join(root, n))]
        found = [problem for key in there if (problem := self._problem(root, key))]
        lost = self.durable.keys() - self.doomed - set(there)
        found += [f"{key} was reported as saved and is not there" for key in lost]
        found += [f"{key} was reported as deleted and is there" for key in self.gone & set(there)]
        return found

    def _problem(self, root: str, key: str) -> str | None:
        try:
            got = fc.load_checkpointables(os.path.join(root, key))
        except Exception as error:
            return f"{key} is listed and does not load: {type(error).__name__}: {error}"
        got = got.get("state", got)  # of a partial save
        version = int(got["params"]["version"])
        allowed = self.pending.get(key, set()) | {self.durable.get(key, -1)}
        if version not in allowed:
            return f"{key} has version {version}; reported or begun: {allowed}"
        wanted = state_of(key, version)
        if (item := key + ITEM) in self.doomed and "opt_state" not in got:
            del wanted["opt_state"]
        elif item in self.gone:
            return f"{item} was reported as deleted and is there"
        if not same({name: got.get(name) for name in wanted}, wanted):
            return f"{key} differs from its version {version}"
        return None

    def _finalized_problems(self, path: str, count: int) -> list[str]:
        """What is wrong with so many parts of a checkpoint, when they are put together."""
        key = os.path.basename(path)
        try:
            if not os.path.exists(path):
                fc.partial.finalize(path)
            tree = fc.load(path)
        except Exception as error:
            return [f"{count} parts of {key} are lost: {type(error).__name__}: {error}"]
        whole = "opt_state" in tree
        self.say("durable" if whole else "rescued", key, int(tree["params"]["version"]))
        lost = count > len(tree)
        return [f"of {key} only {sorted(tree)} are there, of {count} parts"] if lost else []

    def problems_after_start(self, root: str) -> list[str]:
        """Begins a run there, as the next process would, and says what was in its way."""
        before = self.problems(root) + _superseded_problems(root)
        for key, count in list(self.parts.items()):
            before += self._finalized_problems(os.path.join(root, key), count)
        step = max([0, *(int(n) for n in os.listdir(root) if n.isdigit() and n != "90000")]) + 1
        try:
            with fc.training.Checkpointer(root, cleanup_tmp_directories=True) as checkpointer:
                self.say("begin", str(step), 1)
                state = state_of(str(step), 1)
                checkpointer.save_checkpointables(step, state, force=True, overwrite=True)
                self.say("durable", str(step), 1)
        except Exception as error:
            return [*before, f"the next start: {type(error).__name__}: {error}"]
        left = [name for name in os.listdir(root) if is_left_over(name)]
        return [*before, *self.problems(root), *(f"{name} is left" for name in left)]


def _superseded_problems(root: str) -> list[str]:
    found: list[str] = []
    aside = os.path.join(root, "superseded")
    for name in os.listdir(aside) if os.path.isdir(aside) else ():
        try:
            fc.load_checkpointables(os.path.join(aside, name))
        except Exception as error:
            found.append(f"superseded {name} does not load: {type(error).__name__}: {error}")
    return found


def is_left_over(name: str) -> bool:
    """Whether it is of a process that has ended, and ours."""
    marked = names.TMP_SUFFIX in name or name.startswith(names.LOCK)
    return marked and not any(path.startswith(name) for path in _FOREIGN)


def put_foreign(root: str) -> None:
    """Puts files and directories there that are none of ours."""
    for path, data in _FOREIGN.items():
        whole = os.path.join(root, path)
        os.makedirs(os.path.dirname(whole), exist_ok=True)
        with open(whole, "wb") as file:
            file.write(data)


def foreign_problems(root: str) -> list[str]:
    """What became of these."""
    found: list[str] = []
    for path, data in _FOREIGN.items():
        whole = os.path.join(root, path)
        if not os.path.exists(whole):
            found.append(f"{path}, which is not ours, is gone")
        else:
            with open(whole, "rb") as file:
                found += [] if file.read() == data else [f"{path}, which is not ours, changed"]
    return found
