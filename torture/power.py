"""The power goes: what may be on the disk then, after every call of a save and in many orders.

The calls of a process are recorded, and replayed up to some moment, some of those that were not
synced left out. The model is POSIX at its strictest. The bytes of a file are safe once it was
synced; until then any sector of 512 bytes may be old or new, and the file too short. An entry of a
directory is safe once the directory was synced, a rename once both were; until then it has happened
or not, whatever came before or after, but a rename always as a whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from flax_ckpt.format import names
from flax_ckpt.storage import lock
from torture.calls import READS, Call, intercepted
from torture.ledger import MEMORY, Ledger, foreign_problems, put_foreign
from torture.outcome import Outcome
from torture.scenarios import SCENARIOS, Scenario

SUBSETS = 1000
_SECTOR = 512


@dataclasses.dataclass(frozen=True)
class _Entries:
    """Names that change together; each belonged to `was` before, None for nothing."""

    changes: tuple[tuple[int, str, int | None], ...]
    needs: tuple[tuple[int, str, int], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Write:
    file: int
    offset: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class _Sync:
    what: int


@dataclasses.dataclass(frozen=True)
class _Said:
    what: tuple[Any, ...]


_Op = _Entries | _Write | _Sync | _Said


class Recording:
    """What a process did to the file system below a directory that is there already.

    Attributes:
        ops: in order.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.ops: list[_Op] = []
        self._directories: dict[int, dict[str, int]] = {}
        self._count = 0
        self._open: dict[int, tuple[int, int]] = {}  # file and place by descriptor
        self._lock = threading.RLock()
        self._adopt(root)
        self.first = len(self.ops)

    def _adopt(self, path: str) -> int:
        """What is there when the recording begins is on the disk."""
        number = self._new()
        if os.path.isdir(path):
            self._directories[number] = {}
            for name in sorted(os.listdir(path)):
                inner = self._adopt(os.path.join(path, name))
                self._enter(((number, name, inner),))
            self.ops.append(_Sync(number))
        else:
            with open(path, "rb") as file:
                self.ops += [_Write(number, 0, file.read()), _Sync(number)]
        return number

    def _new(self) -> int:
        self._count += 1
        return self._count - 1

    def _enter(self, changes: Any, needs: Any = ()) -> None:
        self.ops.append(_Entries(changes, needs))
        for directory, name, what in changes:
            if what is None:
                del self._directories[directory][name]
            else:
                self._directories[directory][name] = what

    def _place(self, path: str) -> tuple[int, str]:
        *above, name = os.path.relpath(path, self.root).split(os.sep)
        directory = 0
        for part in above:
            directory = self._directories[directory][part]
        return directory, name

    def _find(self, path: str) -> int:
        directory, name = self._place(path)
        return 0 if name == "." else self._directories[directory][name]

    def say(self, *what: Any) -> None:
        """Takes note of what the process reports at this moment."""
        with self._lock:
            self.ops.append(_Said(what))

    @contextlib.contextmanager
    def going_on(self, dropped: Callable[[Call], bool] = lambda _: False) -> Iterator[None]:
        """Records; what is `dropped` is made, but not recorded."""

        def around(call: Call, perform: Callable[..., Any]) -> Any:
            if call.name in READS:
                return perform()
            with self._lock:
                result = perform()
                if not (call.name == "exchange" and result) and not dropped(call):
                    self._record(call, result)
                return result

        with intercepted(self.root, around):
            yield

    def _record(self, call: Call, result: Any) -> None:
        match call.name:
            case "create":
                place, number = self._place(call.path), self._new()
                self._enter(((*place, number),))
                self._open[result] = (number, 0)
            case "open":
                self._open[result] = (self._find(call.path), 0)
            case "close":
                self._open.pop(call.descriptor)
            case "write" | "writev":
                number, offset = self._open[call.descriptor]
                self.ops.append(_Write(number, offset, call.data[:result]))
                self._open[call.descriptor] = (number, offset + result)
            case "fsync":
                self.ops.append(_Sync(self._open[call.descriptor][0]))
            case "mkdir":
                place, number = self._place(call.path), self._new()
                self._directories[number] = {}
                self._enter(((*place, number),))
            case "unlink" | "remove" | "rmdir":
                place = (*self._place(call.path), self._find(call.path))
                self._enter(((*place[:2], None),), (place,))
            case "link":
                self._enter(((*self._place(call.target), self._find(call.path)),))
            case "rename" | "replace":
                number = self._find(call.path)
                old, new = self._place(call.path), self._place(call.target)
                self._enter(((*old, None), (*new, number)), ((*old, number),))
            case "exchange":
                a, b = self._find(call.path), self._find(call.target)
                old, new = self._place(call.path), self._place(call.target)
                self._enter(((*old, b), (*new, a)), ((*old, a), (*new, b)))
            case "chmod" | "utime":
                pass
            case other:
                raise AssertionError(f"{other} is not known here")

    def ledger(self, count: int) -> Ledger:
        """What was reported before the call of that number."""
        ledger = Ledger()
        for op in self.ops[:count]:
            if isinstance(op, _Said):
                ledger.say(*op.what)
        return ledger

    def materialise(self, count: int, root: str, keep: Callable[[], float]) -> None:
        """Makes what the disk may hold when the power goes before the call of that number.

        Args:
            count: how many calls were made.
            root: a directory that is not there.
            keep: of a call that need not be on the disk, how much of it is; 0 to 1.
        """
        synced: dict[int, int] = {}
        for n, op in enumerate(self.ops[:count]):
            if isinstance(op, _Sync):
                synced[op.what] = n
        entries: dict[int, dict[str, int]] = {n: {} for n in self._directories}
        data: dict[int, bytearray] = {}
        for n, op in enumerate(self.ops[:count]):
            if isinstance(op, _Entries):
                safe = all(synced.get(d, -1) > n for d, *_ in op.changes)
                possible = all(entries[d].get(name) == what for d, name, what in op.needs)
                assert possible or not safe, "a call that must be on the disk needs one that is not"
                if safe or (possible and keep() >= 0.5):
                    for directory, name, what in op.changes:
                        entries[directory].pop(name, None)
                        if what is not None:
                            entries[directory][name] = what
            elif isinstance(op, _Write):
                part = 1.0 if synced.get(op.file, -1) > n else keep()
                _write(data.setdefault(op.file, bytearray()), op, part, keep)
        self._make(0, root, entries, data)

    def _make(
        self,
        directory: int,
        path: str,
        entries: dict[int, dict[str, int]],
        data: dict[int, bytearray],
    ) -> None:
        os.mkdir(path)
        for name, number in entries[directory].items():
            inner = os.path.join(path, name)
            if number in entries:
                self._make(number, inner, entries, data)
                continue
            content = bytes(data.get(number, b""))
            if name in (names.OWNER, names.LOCK):  # this process, which lives
                content = content.replace(f" {os.getpid()} ".encode(), b" 99999999 ")
            with open(inner, "wb") as file:
                file.write(content)


def _write(content: bytearray, op: _Write, part: float, keep: Callable[[], float]) -> None:
    """Writes the sectors that are on the disk; the file may be as long as if all were."""
    if part <= 0:
        return
    end = op.offset + len(op.data)
    if part < 0.25:  # and the file is shorter
        end = op.offset + round(len(op.data) * part * 4) // _SECTOR * _SECTOR
    content.extend(bytes(max(0, end - len(content))))
    for start in range(op.offset, end, _SECTOR):
        if part >= 1 or keep() >= 0.5:
            stop = min(start + _SECTOR, end)
            content[start:stop] = op.data[start - op.offset : stop - op.offset]


def record(
    scenario: Scenario,
    root: str,
    dropped: Callable[[Call], bool] = lambda _: False,
) -> Recording:
    """Runs a scenario twice, one after the other."""
    put_foreign(root)
    recording = Recording(root)
    with recording.going_on(dropped):
        for seed in (1, 2):
            scenario(root, seed, recording.say)
    return recording


def problems(recording: Recording, count: int, keep: Callable[[], float]) -> list[str]:
    """What is wrong with one state of the disk, and after the next start from it."""
    with (
        tempfile.TemporaryDirectory(prefix="torture_power_", dir=MEMORY) as place,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(lock, "STALE_SECS", 0.01)  # how long a torn lock file is watched
        root = os.path.join(place, "root")
        recording.materialise(count, root, keep)
        ledger = recording.ledger(count)
        return ledger.problems_after_start(root) + foreign_problems(root)


def _keeping(chosen: random.Random) -> Callable[[], float]:
    """How much is kept, by chance: of some states nearly all, of others next to nothing."""
    share = chosen.choice((0.03, 0.2, 0.5, 0.8, 0.97))

    def keep() -> float:
        if chosen.random() < share:
            return chosen.choice((1.0, 1.0, 0.6))
        return chosen.choice((0.0, 0.0, 0.1, 0.2))

    return keep


def campaign(scale: float, seed: int) -> list[Outcome]:
    """Each moment with nothing and with all that was not synced, and random subsets."""
    chosen, found = random.Random(seed), []
    for name, scenario in SCENARIOS.items():
        root = tempfile.mkdtemp(prefix="torture_power_", dir=MEMORY)
        recording = record(scenario, root)
        moments = range(recording.first, len(recording.ops) + 1)
        each = [(count, lambda part=part: part) for count in moments for part in (0.0, 1.0)]
        cases = chosen.sample(each, round(len(each) * min(scale, 1)))
        cases += [(chosen.choice(moments), _keeping(chosen)) for _ in range(round(SUBSETS * scale))]
        outcome = Outcome(f"power cut: {name}, {len(moments) - 1} calls")
        for number, (count, keep) in enumerate(cases):
            wrong = problems(recording, count, keep)
            outcome.check(not wrong, f"case {number}, after {count} calls: {wrong}")
        found.append(outcome)
        shutil.rmtree(root)
    return found
