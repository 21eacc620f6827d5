"""Crafted checkpoints: each is refused with a typed error, or gives what it harmlessly says.

Every case changes a small valid checkpoint, ours with its checksums made right again, as who
crafts one can, or the same without our records, as another writer's. Then all that reads is called.
What counts as wrong: an error of another type or without the path, more than 2 s of CPU or 200 MB
of memory, a hang, a crash, anything opened outside of the checkpoint, a canary that changed.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torture.outcome import Outcome

SECONDS, MEGABYTES, HANGS = 2.0, 200, 20
_BATCH = 1000  # cases in one child process


class Hang(BaseException):
    """A call did not come back."""


def campaign(scale: float, seed: int, seconds: float = SECONDS) -> list[Outcome]:
    """All cases, or a sample of them from every group, in child processes.

    Args:
        scale: share of the cases of each group; one at least.
        seed: of the sample.
        seconds: of CPU that a call may take.
    """
    with tempfile.TemporaryDirectory(prefix="hostile-") as place:
        _run_child([place, "make"])
        cases = [tuple(case) for case in json.loads(_run_child([place, "list"]).stdout)]
        rng, chosen = random.Random(seed), list[int]()
        for group in dict.fromkeys(group for group, _ in cases):
            numbers = [i for i, case in enumerate(cases) if case[0] == group]
            chosen += rng.sample(numbers, max(1, round(scale * len(numbers))))
        outcomes = {group: Outcome(group) for group, _ in cases}
        for number, kind, problem in _results(place, chosen, seconds):
            group, title = cases[number]
            outcome = outcomes[group]
            outcome.check(not problem, f"{title}: {problem} (seed {seed})")
            for one in kind:
                outcome.notes[one] = int(str(outcome.notes.get(one, 0))) + 1
    return list(outcomes.values())


def _results(place: str, chosen: list[int], seconds: float) -> Iterator[tuple[int, list[str], str]]:
    """What came of each case; a child that dies is wrong, and another goes on after it."""
    while chosen:
        done = _run_child([place, "run", json.dumps(chosen[:_BATCH]), str(seconds)])
        if not done.stdout.startswith("ready"):
            raise RuntimeError(done.stderr)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
        yield from map(tuple, lines)
        rest = chosen[:_BATCH][len(lines) :]
        chosen = chosen[len(lines) :]
        if rest:
            ended = f"the process ended with {done.returncode}: {done.stderr[-600:]}"
            yield chosen.pop(0), [], ended


def _run_child(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torture.hostile", *arguments]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    if arguments[1] != "run" and found.returncode:
        raise RuntimeError(found.stderr)
    return found


class Watch:
    """Measures one call after another, and sees which files of ours are opened."""

    def __init__(self, place: str) -> None:
        self.place, self.inside = os.path.realpath(place), ""
        self.outside = list[str]()
        self._last: dict[int, str] = {}  # what each thread last opened by a link, if it did
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.inside or event not in ("open", "os.listdir", "os.scandir", "os.remove"):
            return
        last = self._last.pop(threading.get_ident(), "")
        if isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if event == "open" and arguments[2] & os.O_NOFOLLOW and os.path.islink(arguments[0]):
                # `open` has told of the link before it called the opener, which follows none.
                if last in self.outside:
                    self.outside.remove(last)
                folder, name = os.path.split(os.fsdecode(arguments[0]))
                path = os.path.join(os.path.realpath(folder), name)
            if path.startswith(self.place) and not (path + "/").startswith(self.inside + "/"):
                link = " by a link" if os.path.islink(arguments[0]) else ""
                self.outside.append(f"{event} of {path[len(self.place) + 1 :]}{link}")
                self._last[threading.get_ident()] = self.outside[-1]

    @contextlib.contextmanager
    def around(self, root: str) -> Iterator[dict[str, float]]:
        found = dict[str, float]()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, self.outside = _memory("VmRSS"), []
        signal.setitimer(signal.ITIMER_REAL, HANGS)
        faulthandler.dump_traceback_later(3 * HANGS, exit=True)
        began, self.inside = time.process_time(), os.path.realpath(root)
        try:
            yield found
        finally:
            self.inside = ""
            found["seconds"] = time.process_time() - began
            signal.setitimer(signal.ITIMER_REAL, 0)
            faulthandler.cancel_dump_traceback_later()
            found["megabytes"] = (_memory("VmHWM") - before) / 1024


def _memory(field: str) -> int:
    with contextlib.suppress(OSError):
        text = Path("/proc/self/status").read_text()
        return int(text.partition(f"{field}:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _hang(*_: object) -> None:
    raise Hang


def _run(place: str, chosen: list[int], seconds: float) -> None:
    from torture import hostile_cases as crafted

    cases, calls = crafted.cases(Path(place)), crafted.CALLS
    signal.signal(signal.SIGALRM, _hang)
    watch, outside = Watch(place), Path(place, "outside")
    usual: dict[tuple[str, str], str] = {}
    for base in crafted.BASES:
        for _ in range(2):  # the second time everything is imported and compiled
            root = _copy(place, base)
            for name, call in calls.items():
                usual[base, name] = crafted.text_of(call(str(root))).replace(str(root), "")
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 30), resource.RLIM_INFINITY))
    canaries = _content(outside)
    print("ready", flush=True)
    for number in chosen:
        case = cases[number]
        root = _copy(place, case.base)
        case.change(root / "100")
        problems, kinds = list[str](), set[str]()
        for name, call in calls.items():
            try:
                kind, said = _call(
                    watch, functools.partial(call, str(root)), str(root), crafted, seconds
                )
            except Hang:
                kind, said = "wrong", f"did not come back in {HANGS} s"
            if kind == "returned" and said != usual[case.base, name] and not case.may_differ:
                kind, said = "wrong", f"returned {said[:300]}"
            kinds.add(kind)
            if kind == "wrong":
                problems.append(f"{name}: {said}")
        if _content(outside) != canaries:
            problems.append("files outside were changed")
        notes = [kind for kind in ("refused", "returned") if kind in kinds]
        print(json.dumps([number, notes[:1], "; ".join(problems)]), flush=True)


def _copy(place: str, base: str) -> Path:
    root = Path(place, "work", "run")
    shutil.rmtree(root.parent, ignore_errors=True)
    shutil.copytree(Path(place, base), root.parent)
    return root


def _call(
    watch: Watch, call: Callable[[], Any], root: str, crafted: Any, seconds: float
) -> tuple[str, str]:
    """Whether a call was refused, or returned, and what; or what is wrong about it."""
    from flax_ckpt.errors import FlaxCkptError, NoEntryError

    kind, said = "returned", ""
    try:
        with watch.around(root) as found:
            value = call()
    except FlaxCkptError as error:
        kind, said = "refused", str(error)
        if root not in said and not isinstance(error, NoEntryError):  # that names the item
            kind, said = "wrong", f"{type(error).__name__} without the path: {said[:300]}"
    except Exception as error:
        kind, said = "wrong", f"{type(error).__name__}: {str(error)[:300]}"
    else:
        said = crafted.text_of(value).replace(root, "")
    if crafted.SECRET in said:
        kind, said = "wrong", f"tells what it must not: {said[:300]}"
    if watch.outside:
        kind, said = "wrong", f"{watch.outside[0]}; {said[:200]}"
    if found["seconds"] > seconds:
        kind, said = "wrong", f"{found['seconds']:.1f} s; {said[:200]}"
    if found["megabytes"] > MEGABYTES:
        kind, said = "wrong", f"{found['megabytes']:.0f} MB; {said[:200]}"
    return kind, said


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    place, what, *rest = sys.argv[1:]
    if what == "run":
        _run(place, json.loads(rest[0]), float(rest[1]))
    else:
        from torture import hostile_cases

        if what == "make":
            hostile_cases.make(Path(place))
        else:
            print(
                json.dumps([(case.group, case.title) for case in hostile_cases.cases(Path(place))])
            )
