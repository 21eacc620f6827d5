"""SIGKILL at any moment: what was reported as saved loads, and nothing is in the next start's way.

A child saves, overwrites and deletes, and reports through a pipe; its parent kills it, half of the
times after a random while, else where it is held at a chosen point of the commit path. The next
child goes on with what lies there, so that clean-ups are killed too.
"""

from __future__ import annotations

import collections
import dataclasses
import random
import shutil
import tempfile
import time
from typing import Any

from torture.children import Child
from torture.ledger import Ledger, foreign_problems, put_foreign
from torture.outcome import Outcome
from torture.scenarios import SCENARIOS

RUNS = 1000
EACH_PHASE = 20
_PER_ROOT = 5  # processes that follow each other in one directory
_COMMIT = ("commit.", "deletion.", "lock.")


@dataclasses.dataclass
class _Listener:
    """Hears what a child says: the ledger's part of it, and where it is."""

    ledger: Ledger
    phase: str = "before all"
    began: float | None = None
    held: bool = False
    ended: bool = False
    points: dict[str, list[tuple[str, int]]] = dataclasses.field(default_factory=dict)
    _stage: str = ""
    _seen: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    def hear(self, kind: str, *what: Any) -> None:
        if kind == "stage":
            self._stage, self.began = f"{what[0]}: ", time.monotonic()
        elif kind == "point":
            (point,) = what
            self._seen[point] += 1
            known = point if point.startswith(_COMMIT) else f"{point.partition('.')[0]} writes"
            self.phase = self._stage + known
            self.points.setdefault(self.phase, []).append((point, self._seen[point]))
        elif kind in ("held", "end"):
            self.held, self.ended = self.held or kind == "held", kind == "end"
        else:
            self._stage = ""
            self.ledger.say(kind, *what)


class _Campaign:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.hits: collections.Counter[str] = collections.Counter()
        self.points: dict[str, dict[str, list[tuple[str, int]]]] = {}  # by scenario and phase
        self.runs = [
            Outcome("SIGKILL after a random while"),
            Outcome("SIGKILL at a chosen point"),
        ]
        self.starts = Outcome("the start after that: cleans up, saves, loads")

    @property
    def killed(self) -> int:
        return sum(outcome.runs for outcome in self.runs)

    def root(self, scenario: str, count: int) -> None:
        """Processes that follow each other in one directory; all but the first are killed."""
        root, ledger = tempfile.mkdtemp(prefix="torture_crashes_"), Ledger()
        put_foreign(root)
        whole = self._follow(Child(scenario, root, 1), ledger, None)
        assert whole.ended, "the scenario does not run to its end by itself"
        seconds = time.monotonic() - (whole.began or 0)
        for _ in range(count):
            self._kill_one(scenario, root, ledger, seconds)
            for phase, points in whole.points.items():
                self.points.setdefault(scenario, {}).setdefault(phase, points)
        problems = ledger.problems_after_start(root) + foreign_problems(root)
        self.starts.check(not problems, f"{scenario} in {root}: {problems}")
        if not problems:
            shutil.rmtree(root)

    def _kill_one(self, scenario: str, root: str, ledger: Ledger, seconds: float) -> None:
        known = self.points.get(scenario)
        aimed = known is not None and self.random.random() < 0.6
        at, wait = "", self.random.uniform(0, seconds)
        if aimed and known:
            rarest = min(known, key=lambda phase: (self.hits[phase], self.random.random()))
            point, time_of = self.random.choice(known[rarest])
            at = f"{point}=hold@{time_of}"
        child = Child(scenario, root, self.random.randrange(2, 1 << 30), at)
        heard = self._follow(child, ledger, None if aimed else wait)
        for phase, points in heard.points.items():
            self.points.setdefault(scenario, {}).setdefault(phase, points)
        if heard.ended:
            return  # it was quicker
        self.hits[heard.phase] += 1
        problems = ledger.problems(root) + foreign_problems(root)
        self.runs[aimed].check(not problems, f"{scenario} in {root}, {at or wait}: {problems}")

    def _follow(self, child: Child, ledger: Ledger, wait: float | None) -> _Listener:
        """Listens until the child ends, is held, or has run for `wait` seconds; kills it."""
        heard = _Listener(ledger)
        while not heard.held:
            left = None
            if wait is not None and heard.began is not None:
                left = max(0.0, heard.began + wait - time.monotonic())
            lines = child.said(left)
            for line in lines or []:
                heard.hear(*line)
            if lines is None or left == 0.0:
                break
        child.end()
        while (lines := child.said(None)) is not None:  # what it said before it ended
            for line in lines:
                heard.hear(*line)
        return heard


def campaign(scale: float, seed: int) -> list[Outcome]:
    """Kills processes: `RUNS` of them, and until each phase was hit `EACH_PHASE` times."""
    found, scenarios = _Campaign(seed), list(SCENARIOS)
    for number in range(2 * RUNS):
        rarest = min(found.hits, key=lambda phase: found.hits[phase], default="")
        where = [name for name in scenarios if rarest in found.points.get(name, ())]
        again = found.random.choice(where) if where and number % 2 else None
        found.root(again or scenarios[number // 2 % len(scenarios)], _PER_ROOT)
        if found.killed >= RUNS * scale and min(found.hits.values()) >= EACH_PHASE * scale:
            break
    last = Outcome("phases of the commit that were hit", len(found.hits))
    last.notes = dict(sorted(found.hits.items()))
    return [*found.runs, found.starts, last]
