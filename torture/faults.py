"""Calls of the file system that fail: each one of a save in turn, once or from then on.

Whatever happens, what was saved before loads, an error is an `OSError` that names a path or has one
as its cause, nothing stays open or running, and once the fault is gone the next save works. Short
writes, and signals that interrupt a call, are no errors at all.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import glob
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import flax_ckpt as fc
from flax_ckpt.format import names
from flax_ckpt.storage import lock
from torture.calls import Call, intercepted
from torture.ledger import MEMORY, Ledger, foreign_problems, put_foreign, state_of
from torture.outcome import Outcome
from torture.scenarios import SCENARIOS

ERRORS = ("ENOSPC", "EIO", "EDQUOT", "EACCES", "EROFS")
_WRITES = frozenset({"write", "writev"})
# Python itself repeats others; after `close` the descriptor is gone whatever the kernel says.
_INTERRUPTED = frozenset({"mkdir", "rename", "link", "unlink", "rmdir", "chmod", "exchange"})


class _Fault:
    """Fails the call of that number, from 1; `forever`: and all after it."""

    def __init__(self, code: int, k: int, forever: bool, of: Callable[[Call], bool]) -> None:
        self.calls = 0
        self._code, self._k, self._forever, self._of = code, k, forever, of
        self._lock = threading.Lock()

    def __call__(self, call: Call, perform: Callable[..., Any]) -> Any:
        if not self._of(call):
            return perform()
        with self._lock:
            self.calls += 1
            hit = self.calls == self._k or (self._forever and self.calls > self._k)
        if not hit:
            return perform()
        if call.name == "close":
            perform()  # an error does not keep it open
        named = () if call.descriptor >= 0 else (call.path,)  # as the system does
        raise OSError(self._code, os.strerror(self._code), *named)


def _cut(call: Call, perform: Callable[..., Any]) -> Any:
    """Writes a third of what it is given."""
    return perform(-(-len(call.data) // 3)) if call.name == "writev" and call.data else perform()


def _open_and_running(root: str, before: list[threading.Thread]) -> list[str]:
    gc.collect()
    links = (f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd"))
    files = [target for link in links if root in (target := _target(link))]
    started = set(threading.enumerate()).difference(before)
    for thread in started:  # one that was told to end may need a moment
        thread.join(10)
    return files + [thread.name for thread in started if thread.is_alive()]


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except FileNotFoundError:  # that by which they were listed
        return ""


def _expected(error: BaseException, root: str) -> bool:
    """Whether it is, or was caused by, an error of the file system that names a path."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    of_files = any(isinstance(e, OSError) for e in chain)
    return of_files and root in f"{error} {getattr(error, '__notes__', '')}"


def attempt(
    scenario: str, root: str, ledger: Ledger, around: Callable[..., Any], may_fail: bool = True
) -> list[str]:
    """Runs a scenario with a fault, and says what was wrong then and after it is gone."""
    found, threads = list[str](), threading.enumerate()
    with pytest.MonkeyPatch.context() as patch, intercepted(root, around):
        patch.setattr(lock, "STALE_SECS", 0.01)
        try:
            SCENARIOS[scenario](root, 2, ledger.say)
        except Exception as error:
            if not may_fail or not _expected(error, root):
                found.append(f"{type(error).__name__}: {error}")
    _end_owners(root)
    found += ledger.problems_after_start(root) + foreign_problems(root)
    return found + [f"{what} is still there" for what in _open_and_running(root, threads)]


def _end_owners(root: str) -> None:
    """What this process could not remove is left to the next one, which it is about to play."""
    for path in glob.glob(os.path.join(root, "*", names.OWNER)):
        with open(path, "r+b") as file:
            text = file.read().replace(f" {os.getpid()} ".encode(), b" 99999999 ")
            file.seek(0)
            file.write(text)


@contextlib.contextmanager
def prepared(scenario: str) -> Iterator[Callable[[], tuple[str, Ledger]]]:
    """Gives a function that makes a directory in which the scenario has run once."""
    with tempfile.TemporaryDirectory(prefix="torture_faults_", dir=MEMORY) as place:
        template = os.path.join(place, "template")
        os.mkdir(template)
        put_foreign(template)

        def make() -> tuple[str, Ledger]:
            root = os.path.join(place, "root")
            shutil.rmtree(root, ignore_errors=True)
            shutil.copytree(template, root)
            ledger = Ledger()
            for what in said:
                ledger.say(*what)
            return root, ledger

        said: list[Any] = []
        SCENARIOS[scenario](template, 1, lambda *what: said.append(what))
        yield make


def _count(make: Callable[[], tuple[str, Ledger]], scenario: str) -> int:
    root, ledger = make()
    counting = _Fault(0, 0, False, lambda _: True)
    wrong = attempt(scenario, root, ledger, counting, may_fail=False)
    assert not wrong, f"{scenario} without a fault: {wrong}"
    return counting.calls


def campaign(scale: float, seed: int) -> list[Outcome]:
    """Each call of each scenario with each error, and disks that are full."""
    chosen = random.Random(seed)
    fails = {how: Outcome(f"each call fails {how}: {', '.join(ERRORS)}") for how in ONCE}
    short, signals = Outcome("every write is short"), Outcome("each call is interrupted once")
    for scenario in SCENARIOS:
        with prepared(scenario) as make:
            numbers = range(1, _count(make, scenario) + 1)
            cases = list(itertools.product(ERRORS, numbers, ONCE))
            for name, k, how in _sample(chosen, cases, scale):
                fault = _Fault(getattr(errno, name), k, how != "once", lambda _: True)
                wrong = attempt(scenario, *make(), fault)
                fails[how].check(not wrong, f"{scenario}, {name} at call {k}: {wrong}")
            for k in _sample(chosen, list(numbers), scale):
                fault = _Fault(errno.EINTR, k, False, lambda call: call.name in _INTERRUPTED)
                wrong = attempt(scenario, *make(), fault, may_fail=False)
                signals.check(not wrong, f"{scenario}, call {k}: {wrong}")
            wrong = attempt(scenario, *make(), _cut, may_fail=False)
            short.check(not wrong, f"{scenario}: {wrong}")
    full = Outcome("a disk that is full: files cannot grow beyond some size")
    for limit in _sample(chosen, [1, 100, 400, 1000, 3000, 5000, 9000, 20_000], scale):
        wrong = full_disk(limit)
        full.check(not wrong, f"{limit} bytes: {wrong}")
    return [*fails.values(), signals, short, full, mounted_and_full()]


ONCE = ("once", "from then on")


def _sample(chosen: random.Random, cases: list[Any], scale: float) -> list[Any]:
    return chosen.sample(cases, min(len(cases), max(1, round(scale * len(cases)))))


def full_disk(limit: int) -> list[str]:
    """What is wrong after saves that the kernel stops: `RLIMIT_FSIZE` stands for a full disk."""
    with prepared("save") as make:
        root, ledger = make()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # EFBIG, not the end
        found: list[str] = []
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            ledger.say("begin", "3", 2)
            fc.save_checkpointables(os.path.join(root, "3"), state_of("3", 2))
            ledger.say("durable", "3", 2)
        except OSError as error:
            if root not in str(error):
                found.append(f"{error} names no path")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, before)
        return found + ledger.problems_after_start(root) + foreign_problems(root)


_MOUNT = 'mount -t tmpfs -o size=1m none "$1" && exec "$2" -m torture.faults "$1"'


def mounted_and_full() -> Outcome:
    """Saves to a small file system of its own, in a process that is alone in seeing it."""
    outcome = Outcome("a file system of 1 MiB that gets full")
    with tempfile.TemporaryDirectory(prefix="torture_faults_") as place:
        command = ["unshare", "-m", "sh", "-c", _MOUNT, "sh", place, sys.executable]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "full after" not in done.stdout:
        outcome.notes["not tried, since nothing can be mounted here"] = done.stderr.strip()[-200:]
        return outcome
    outcome.check(done.returncode == 0, done.stdout + done.stderr)
    return outcome


def fill(root: str) -> list[str]:
    """Saves until the disk is full; says what is wrong then, and when there is room again."""
    ledger = Ledger()
    put_foreign(root)
    for step in itertools.count(1):
        try:
            ledger.say("begin", str(step), 1)
            fc.save_checkpointables(os.path.join(root, str(step)), state_of(str(step), 1))
            ledger.say("durable", str(step), 1)
        except OSError as error:
            expected = error.errno == errno.ENOSPC and root in str(error)
            break
    print(f"full after {step} steps", flush=True)
    found = [] if expected else ["the error is another one, or names no path"]
    for old in ("1", "2"):
        ledger.say("deleting", old)
        fc.delete(os.path.join(root, old))
        ledger.say("deleted", old)
    return found + ledger.problems_after_start(root) + foreign_problems(root)


if __name__ == "__main__":
    print(wrong := fill(sys.argv[1]))
    sys.exit(bool(wrong))
