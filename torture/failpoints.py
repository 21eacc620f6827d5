"""Each failpoint of each way to save, once as an error and once as the end of the process.

What is there afterwards is the old or the new state, never a mixture, and the next start goes on.
"""

from __future__ import annotations

import collections
import copy
import os
import random
import shutil
import signal
import tempfile

from torture.children import Child
from torture.ledger import MEMORY, Ledger, foreign_problems, put_foreign
from torture.outcome import Outcome
from torture.scenarios import SCENARIOS

ACTIONS = {"raise": 0, "kill": -signal.SIGKILL}  # and how the process ends


class _Place:
    """A directory in which a scenario has run once, and what was reported."""

    def __init__(self, scenario: str, place: str) -> None:
        self._template, self._scenario = os.path.join(place, scenario), scenario
        os.makedirs(self._template)
        put_foreign(self._template)
        self._ledger = Ledger()
        self._run(self._template, self._ledger, "")

    def points(self) -> list[tuple[str, int]]:
        """Those that it comes by when it is left alone, the first and the last time each."""
        root, ledger = self._copy()
        seen, _, code = self._run(root, ledger, "")
        assert code == 0, f"{self._scenario} does not run by itself"
        return sorted({(point, time) for point, count in seen.items() for time in (1, count)})

    def problems(self, action: str, point: str, time: int) -> list[str]:
        """What is wrong after that happened at a point."""
        root, ledger = self._copy()
        _, errors, code = self._run(root, ledger, f"{point}={action}@{time}")
        found = [f"{text} does not name the path" for text in errors if root not in text]
        found += [f"exit code {code}"] if code != ACTIONS[action] else []
        found += ledger.problems(root)
        return found + ledger.problems_after_start(root) + foreign_problems(root)

    def _copy(self) -> tuple[str, Ledger]:
        root = f"{self._template}.run"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(self._template, root)
        return root, copy.deepcopy(self._ledger)

    def _run(
        self, root: str, ledger: Ledger, failpoint: str
    ) -> tuple[collections.Counter[str], list[str], int]:
        seen: collections.Counter[str] = collections.Counter()
        errors: list[str] = []
        child = Child(self._scenario, root, 2 if failpoint else 1, failpoint)
        while (lines := child.said()) is not None:
            for kind, *what in lines:
                if kind == "point":
                    seen[what[0]] += 1
                elif kind == "error":
                    errors.append(": ".join(what))
                else:
                    ledger.say(kind, *what)
        return seen, errors, child.wait()


def campaign(scale: float, seed: int) -> list[Outcome]:
    """Tries all of them, or a random sample."""
    chosen = random.Random(seed)
    found = {action: Outcome(f"each failpoint: {action}") for action in ACTIONS}
    with tempfile.TemporaryDirectory(prefix="torture_failpoints_", dir=MEMORY) as directory:
        for scenario in SCENARIOS:
            place = _Place(scenario, directory)
            cases = [(action, *at) for at in place.points() for action in ACTIONS]
            for case in chosen.sample(cases, max(1, round(scale * len(cases)))):
                problems = place.problems(*case)
                found[case[0]].check(not problems, f"{scenario}, {case}: {problems}")
    return list(found.values())
