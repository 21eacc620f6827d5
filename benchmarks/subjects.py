"""What is compared: flax_ckpt, its peers, and the data that all of them save.

A subject imports its library when it is made: no process holds a library that it does not measure.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
State = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A tree of equal float32 leaves; the values depend on the case alone."""

    title: str
    leaves: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.leaves * int(np.prod(self.shape)) * 4

    def names(self) -> list[str]:
        return [f"leaf_{number:05}" for number in range(self.leaves)]

    def arrays(self) -> Iterator[tuple[str, Array]]:
        """One leaf at a time, so that a check needs no second copy of all of them."""
        for number, name in enumerate(self.names()):
            rng = np.random.default_rng([2, number])
            yield name, rng.standard_normal(self.shape, dtype=np.float32)


CASES = {
    "small": Case("5,000 leaves of 4 KB (20 MB)", 5000, (1024,)),
    "large": Case("96 leaves (1.0 GB)", 96, (1024, 2560)),
}
QUICK_CASES = {
    "small": Case("40 leaves of 4 KB", 40, (1024,)),
    "large": Case("6 leaves (1.5 MB)", 6, (256, 256)),
}


class Subject(Protocol):
    """A way to save and load a flat dict of arrays; durable when `save` returns."""

    uses_jax: bool
    is_async: bool

    def save(self, path: Path, state: State) -> None: ...

    def save_async(self, path: Path, state: State) -> Callable[[], None]:
        """Begins a save; what it returns waits for the end."""
        ...

    def prepare_load(self, path: Path, case: Case) -> Callable[[], State]:
        """What it returns is timed: the load, to arrays that are ready."""
        ...


class CheckpointLibrary:
    """flax_ckpt or Orbax v1, which have the same three functions; all options at their defaults."""

    uses_jax = True
    is_async = True

    def __init__(self, library: ModuleType) -> None:
        self._library = library

    def save(self, path: Path, state: State) -> None:
        self._library.save(path, state)

    def save_async(self, path: Path, state: State) -> Callable[[], None]:
        return self._library.save_async(path, state).result

    def prepare_load(self, path: Path, case: Case) -> Callable[[], State]:
        import jax

        leaf = jax.ShapeDtypeStruct(case.shape, np.float32)
        abstract = dict.fromkeys(case.names(), leaf)
        return lambda: jax.block_until_ready(self._library.load(path, abstract))


class Safetensors:
    """One file from `safetensors.flax`, synced, as the library itself does not."""

    uses_jax = True
    is_async = False

    def __init__(self) -> None:
        import safetensors.flax

        self._library = safetensors.flax

    def save(self, path: Path, state: State) -> None:
        path.mkdir()
        file = path / "model.safetensors"
        self._library.save_file(state, file)
        for synced in (file, path, path.parent):
            sync(synced)

    def save_async(self, path: Path, state: State) -> Callable[[], None]:
        raise NotImplementedError("safetensors has no asynchronous save")

    def prepare_load(self, path: Path, case: Case) -> Callable[[], State]:
        import jax

        file = path / "model.safetensors"
        return lambda: jax.block_until_ready(self._library.load_file(file))


class Raw:
    """The limit: all bytes from memory to one file, and back into memory that is there already.

    No names, no checks, and no JAX.
    """

    uses_jax = False
    is_async = False
    _CALL_BUFFERS = 1024  # IOV_MAX of Linux and macOS
    _CALL_BYTES = 8 << 20  # larger calls take longer on ext4

    def save(self, path: Path, state: State) -> None:
        path.mkdir()
        fd = os.open(path / "data", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            pending = [memoryview(array).cast("B") for array in state.values()]
            while pending:
                small = len(pending[0]) < self._CALL_BYTES // self._CALL_BUFFERS
                buffers = pending[: self._CALL_BUFFERS] if small else [pending[0]]
                written = os.writev(fd, [view[: self._CALL_BYTES] for view in buffers])
                while pending and written >= len(pending[0]):
                    written -= len(pending.pop(0))
                if written:
                    pending[0] = pending[0][written:]
            os.fsync(fd)
        finally:
            os.close(fd)
        sync(path)
        sync(path.parent)

    def save_async(self, path: Path, state: State) -> Callable[[], None]:
        raise NotImplementedError("a plain write has no asynchronous form")

    def prepare_load(self, path: Path, case: Case) -> Callable[[], State]:
        state = np.ones((case.leaves, *case.shape), np.float32)  # ones: the pages exist

        def load() -> State:
            view = memoryview(state).cast("B")
            with open(path / "data", "rb", buffering=0) as file:
                done = 0
                while done < len(view):
                    count = file.readinto(view[done:])
                    if not count:
                        raise EOFError(f"{path} ends after {done} of {len(view)} bytes")
                    done += count
            return dict(zip(case.names(), state, strict=True))

        return load


def sync(path: Path) -> None:
    """Syncs a file, or the entries of a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _flax_ckpt() -> Subject:
    import flax_ckpt

    return CheckpointLibrary(flax_ckpt)


def _orbax() -> Subject:
    from orbax.checkpoint import v1

    return CheckpointLibrary(v1)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "flax_ckpt": _flax_ckpt,
    "orbax": _orbax,
    "safetensors": Safetensors,
    "raw": Raw,
}
