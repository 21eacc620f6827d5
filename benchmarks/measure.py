"""One measurement in a process of its own; `benchmarks.run` starts it.

    python -m benchmarks.measure '{"part": "save", "subject": "orbax", "case": "small", ...}'

The last line on standard output is the result in JSON. Values that differ from those saved end the
process with exit status 1.
"""

from __future__ import annotations

import contextlib
import gc
import json
import mmap
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.subjects import CASES, QUICK_CASES, SUBJECTS, Array, Case, State, Subject

# Which numbers each part gives; times in seconds, memory in bytes.
MEASURES = {
    "save": ("save", "save_memory"),
    "train": ("blocking", "train_memory"),
    "load": ("load", "load_memory"),
}
WARM_UP = Case("a first save and load", 2, (8,))
WARM_STEPS = 2  # compiles, and brings the allocator to its steady state
STEPS = 3  # whose peak memory is the one without a save

Result = dict[str, float | None]


class Peak:
    """Peak resident memory from now on, as the kernel keeps it: exact, and no thread disturbs.

    Only Linux has it; elsewhere it is None.
    """

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before = self.now()

    def now(self) -> int | None:
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return None
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def extra(self, before: int | None = None) -> int | None:
        """How far the peak has risen above `before`, or above where it began."""
        now, start = self.now(), self.before if before is None else before
        return None if now is None or start is None else max(0, now - start)


def parts(subject: str) -> list[str]:
    """The parts that a subject takes part in, in the order in which they must run."""
    return ["save", "train", "load"] if subject in ("flax_ckpt", "orbax") else ["save", "load"]


def measure_save(subject: Subject, case: Case, folder: Path) -> Result:
    state = make_state(case, subject.uses_jax)
    warm_up(subject, folder / "first")
    os.sync()  # what others left unwritten is not this subject's to wait for
    begin_quietly(case)
    peak = Peak()
    begin = time.perf_counter()
    subject.save(folder / "saved", state)
    seconds = time.perf_counter() - begin
    memory = peak.extra() if subject.uses_jax else None
    return {"save": seconds, "save_memory": memory}


def measure_train(subject: Subject, case: Case, folder: Path) -> Result:
    """A save while training goes on: each step is given the state to reuse its memory."""
    import jax

    step = jax.jit(lambda state: {k: v + 1 for k, v in state.items()}, donate_argnums=0)
    state = make_state(case, jax_arrays=True)
    warm_up(subject, folder / "first_trained")
    for _ in range(WARM_STEPS):
        state = jax.block_until_ready(step(state))
    quiet = Peak()
    for _ in range(STEPS):
        state = jax.block_until_ready(step(state))
    usual = quiet.now()
    os.sync()
    begin_quietly(case)
    peak = Peak()
    begin = time.perf_counter()
    wait = subject.save_async(folder / "trained", state)
    blocking = time.perf_counter() - begin
    end = in_thread(wait)
    state = jax.block_until_ready(step(state))
    while not end():
        state = jax.block_until_ready(step(state))
    return {"blocking": blocking, "train_memory": peak.extra(usual)}


def measure_load(subject: Subject, case: Case, folder: Path) -> Result:
    compare(subject.prepare_load(folder / "first", WARM_UP)(), WARM_UP, steps=0)
    read_once(folder / "saved")
    load = subject.prepare_load(folder / "saved", case)
    begin_quietly(case)
    peak = Peak()
    begin = time.perf_counter()
    state = load()
    seconds = time.perf_counter() - begin
    memory = peak.extra() if subject.uses_jax else None
    compare(state, case, steps=0)
    if (folder / "trained").exists():
        compare(subject.prepare_load(folder / "trained", case)(), case, WARM_STEPS + STEPS)
    return {"load": seconds, "load_memory": memory}


PARTS = {"save": measure_save, "train": measure_train, "load": measure_load}


def make_state(case: Case, jax_arrays: bool) -> State:
    arrays = dict(case.arrays())
    if not jax_arrays:
        return arrays
    import jax
    import jax.numpy as jnp

    return jax.block_until_ready({name: jnp.array(array) for name, array in arrays.items()})


def warm_up(subject: Subject, path: Path) -> None:
    """A tiny save: what a library sets up once in a process is not measured."""
    state = make_state(WARM_UP, subject.uses_jax)
    if subject.is_async:
        subject.save_async(path, state)()
    else:
        subject.save(path, state)


def in_thread(wait: Callable[[], None]) -> Callable[[], bool]:
    """Waits in the background; what it returns says whether the end came, or raises its error."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            wait()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def ended() -> bool:
        if thread.is_alive():
            return False
        if errors:
            raise errors[0]
        return True

    return ended


def begin_quietly(case: Case) -> None:
    """What nobody's save or load should pay for, or be spared by chance."""
    gc.collect()
    wake_memory(4 * case.nbytes)


def wake_memory(nbytes: int) -> None:
    """Takes so much memory and frees it again.

    A virtual machine hands memory that was free for some seconds to its host, and gets it back at
    0.4 GB/s: that would be measured, and of one subject more than of the other.
    """
    with mmap.mmap(-1, nbytes) as memory:
        np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1


def read_once(folder: Path) -> None:
    """Brings all files into the page cache."""
    buffer = bytearray(1 << 20)
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass


def compare(state: State, case: Case, steps: int) -> None:
    """Ends the process unless every leaf has the very bits that were saved."""
    if sorted(state) != case.names():
        sys.exit(f"the loaded tree has other leaves: {len(state)}, {case.leaves} were saved")
    for name, expected in case.arrays():
        for _ in range(steps):
            expected = expected + np.float32(1)
        found: Array = np.asarray(state[name])
        if found.dtype != expected.dtype or found.shape != expected.shape:
            sys.exit(f"{name}: loaded {found.dtype}{found.shape}, saved {expected.shape}")
        if found.tobytes() != expected.tobytes():
            sys.exit(f"{name}: the loaded values differ from those saved")


def main(job: dict[str, Any]) -> None:
    case = (QUICK_CASES if job["quick"] else CASES)[job["case"]]
    result = PARTS[job["part"]](SUBJECTS[job["subject"]](), case, Path(job["folder"]))
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
