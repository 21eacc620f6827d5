"""A checkpoint appears whole or not at all, and only once it is durable."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt.errors import CheckpointExistsError
from flax_ckpt.storage import files

SUFFIX = ".orbax-checkpoint-tmp"


def tree_of(value: float) -> dict[str, Any]:
    return {
        "w": jnp.full((40, 7), value),
        "n": np.full(3000, value),
        "s": float(value),
        "text": str(float(value)),
    }


def assert_holds(path: Path, value: float) -> None:
    loaded = fc.load(path)
    for name, expected in tree_of(value).items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), np.asarray(expected), name)


def left_overs(directory: Path) -> list[str]:
    return [name for name in os.listdir(directory) if SUFFIX in name]


# The calls that make a checkpoint durable, in order.


@dataclass
class Calls:
    """What was called on paths below `root`; call number `fail_at` fails instead."""

    root: Path
    fail_at: int | None = None
    log: list[tuple[str, str, bytes | None]] = field(default_factory=list)

    def note(self, call: str, path: str) -> None:
        if not path.startswith(str(self.root)):
            return
        content = Path(path).read_bytes() if os.path.isfile(path) else None
        self.log.append((call, path, content))
        if self.fail_at == len(self.log) - 1:
            raise OSError(errno.EIO, f"injected into {call}", path)

    def index(self, call: str, path: str | Path) -> list[int]:
        return [i for i, (c, p, _) in enumerate(self.log) if (c, p) == (call, str(path))]


@contextlib.contextmanager
def recorded(root: Path, fail_at: int | None = None) -> Iterator[Calls]:
    calls = Calls(root, fail_at)
    real = {name: getattr(os, name) for name in ("fsync", "mkdir", "rename")}
    real_library = ctypes.CDLL

    def fsync(fd: int) -> None:
        calls.note("fsync", os.readlink(f"/proc/self/fd/{fd}"))
        real["fsync"](fd)

    def mkdir(path: Any, *args: Any, **kwargs: Any) -> None:
        if not os.path.isdir(path):  # `makedirs` tries, and looks when it fails
            calls.note("mkdir", os.fspath(path))
        real["mkdir"](path, *args, **kwargs)

    def rename(source: Any, target: Any, **kwargs: Any) -> None:
        calls.note("rename", os.fspath(target))
        real["rename"](source, target, **kwargs)

    def library(*args: Any, **kwargs: Any) -> Any:
        libc = real_library(*args, **kwargs)

        def renameat2(old: int, source: bytes, new: int, target: bytes, flags: int) -> int:
            calls.note("rename", os.fsdecode(target))
            return libc.renameat2(old, source, new, target, flags)

        return SimpleNamespace(renameat2=renameat2) if hasattr(libc, "renameat2") else libc

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        patch.setattr(os, "mkdir", mkdir)
        patch.setattr(os, "rename", rename)
        patch.setattr(ctypes, "CDLL", library)
        yield calls


@pytest.mark.parametrize("overwrite", [False, True])
def test_every_file_and_directory_is_synced_before_the_rename(
    tmp_path: Path, overwrite: bool
) -> None:
    target = tmp_path / "ckpt"
    if overwrite:
        fc.save(target, tree_of(0))
    with recorded(tmp_path) as calls:
        fc.save(target, tree_of(1), overwrite=overwrite)
    (renamed,) = calls.index("rename", target)
    content = {path: data for call, path, data in calls.log[:renamed] if call == "fsync"}
    for directory, _, inside in os.walk(target):
        staged = directory.replace(str(target), str(target) + SUFFIX, 1)
        assert staged in content, f"the directory {directory} was not synced"
        for name in inside:
            now = Path(directory, name).read_bytes()
            assert content.get(os.path.join(staged, name)) == now, f"{name} changed after its sync"


def test_a_directory_is_synced_after_the_files_in_it(tmp_path: Path) -> None:
    with recorded(tmp_path) as calls:
        fc.save(tmp_path / "ckpt", tree_of(1))
    order = [path for call, path, _ in calls.log if call == "fsync"]
    for path in order:
        if f"{SUFFIX}/" in path:
            assert order.index(path) < max(
                i for i, other in enumerate(order) if other == os.path.dirname(path)
            )


def test_files_of_a_users_handler_are_synced_too(tmp_path: Path) -> None:
    registry = fc.handlers.local_registry().add(DeepHandler, checkpointable_name="deep")
    context = fc.Context()
    context.checkpointables.registry = registry
    with context, recorded(tmp_path) as calls:
        fc.save_checkpointables(tmp_path / "ckpt", {"deep": 1})
    staged = f"{tmp_path}/ckpt{SUFFIX}/deep/a/b"
    (renamed,) = calls.index("rename", tmp_path / "ckpt")
    for path in (staged, f"{staged}/file", os.path.dirname(staged)):
        assert calls.index("fsync", path), f"{path} was not synced"
        assert calls.index("fsync", path)[-1] < renamed


def test_the_parent_is_synced_after_the_rename(tmp_path: Path) -> None:
    with recorded(tmp_path) as calls:
        fc.save(tmp_path / "ckpt", tree_of(1))
    (renamed,) = calls.index("rename", tmp_path / "ckpt")
    assert calls.index("fsync", tmp_path)[-1] > renamed


def test_every_directory_made_above_the_target_is_durable(tmp_path: Path) -> None:
    """A checkpoint in a directory that a power cut takes away is no checkpoint."""
    target = tmp_path / "runs" / "7" / "ckpt"
    with recorded(tmp_path) as calls:
        fc.save(target, tree_of(1))
    for made in (target.parent, target.parent.parent):
        (created,) = calls.index("mkdir", made)
        syncs = [i for i in calls.index("fsync", made.parent) if i > created]
        assert syncs, f"the entry of {made} in {made.parent} was never synced"


# Failure at any point.


class DeepHandler:
    """Writes a file two directories down."""

    async def save(self, directory: Any, value: Any) -> Awaitable[None]:
        return self._write(directory)

    async def _write(self, directory: Any) -> None:
        folder = await directory.await_creation() / "a" / "b"
        folder.mkdir(parents=True)
        (folder / "file").write_text("content")

    async def load(self, directory: Any, abstract: Any = None) -> Awaitable[Any]:
        raise NotImplementedError

    async def metadata(self, directory: Any) -> None:
        return None

    def is_handleable(self, value: Any) -> bool:
        return True

    def is_abstract_handleable(self, abstract: Any) -> bool | None:
        return None


def count_calls(root: Path, save: Callable[[], None]) -> int:
    with recorded(root) as calls:
        save()
    return len(calls.log)


class Without:
    """A C library that has no `renameat2`, as on macOS."""


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: Without())


@pytest.fixture(params=["atomic exchange", "two renames"])
def exchanging(request: pytest.FixtureRequest) -> None:
    if request.param == "two renames":
        request.getfixturevalue("no_exchange")


def fails(root: Path, k: int, target: Path, *, overwrite: bool = False) -> tuple[bool, Any]:
    """Saves while call number `k` fails; whether the save raised, and that call."""
    with recorded(root, fail_at=k) as calls:
        try:
            fc.save(target, tree_of(1), overwrite=overwrite)
        except OSError as error:
            if "injected" not in str(error):
                raise
            return True, calls.log[k][:2]
    return False, calls.log[k][:2]


def test_a_failure_at_any_call_leaves_no_target(tmp_path: Path) -> None:
    wrong: list[str] = []
    first = tmp_path / "n" / "p" / "ckpt"
    for k in range(count_calls(tmp_path, lambda: fc.save(first, tree_of(0)))):
        target = tmp_path / str(k) / "p" / "ckpt"
        raised, call = fails(tmp_path, k, target)
        assert raised, f"{call} failed, and nobody was told"
        if os.path.lexists(target):
            wrong.append(f"{call} failed, the save raised, and the target is there")
            continue
        fc.save(target, tree_of(2))
        assert_holds(target, 2)
        assert left_overs(target.parent) == []
    assert wrong == []


@pytest.mark.usefixtures("exchanging")
def test_a_failure_at_any_call_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """Clearing up what was replaced may fail in silence: the new one is durable by then."""
    first = tmp_path / "count"
    fc.save(first, tree_of(0))
    wrong: list[str] = []
    told = 0
    number = count_calls(tmp_path, lambda: fc.save(first, tree_of(1), overwrite=True))
    for k in range(number):
        target = tmp_path / str(k)
        fc.save(target, tree_of(0))
        raised, call = fails(tmp_path, k, target, overwrite=True)
        told += raised
        if float(fc.load(target)["s"]) != (not raised):
            wrong.append(f"{call} failed, the save raised={raised}, and the target is the other")
            continue
        assert_holds(target, float(not raised))
        fc.save(target, tree_of(2), overwrite=True)
        assert_holds(target, 2)
    assert wrong == []
    assert told >= number - 1
    assert left_overs(tmp_path) == []


def test_the_error_of_a_failed_save_names_the_checkpoint(tmp_path: Path) -> None:
    with recorded(tmp_path, fail_at=0), pytest.raises(OSError, match="injected") as raised:
        fc.save(tmp_path / "ckpt", tree_of(1))
    assert f"while saving the checkpoint {tmp_path}/ckpt" in raised.value.__notes__


@pytest.mark.usefixtures("no_exchange")
def test_overwrite_without_an_atomic_exchange(tmp_path: Path) -> None:
    fc.save(tmp_path / "ckpt", tree_of(0))
    fc.save(tmp_path / "ckpt", tree_of(1), overwrite=True)
    assert_holds(tmp_path / "ckpt", 1)
    assert os.listdir(tmp_path) == ["ckpt"]


@pytest.mark.usefixtures("no_exchange")
def test_a_failed_second_rename_puts_the_old_checkpoint_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "ckpt"
    fc.save(target, tree_of(0))
    rename = os.rename

    def refuse(source: Any, to: Any, **kwargs: Any) -> None:
        if str(source) == f"{target}{SUFFIX}":
            raise OSError(errno.EIO, "injected")
        rename(source, to, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(OSError, match="injected"):
            fc.save(target, tree_of(1), overwrite=True)
    assert_holds(target, 0)
    fc.save(target, tree_of(2), overwrite=True)
    assert_holds(target, 2)


def test_what_was_there_survives_a_commit_that_can_neither_be_finished_nor_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, sync, exchange, made = tmp_path / "ckpt", files.sync_path, files.exchange, list[str]()
    fc.save(target, tree_of(0))

    def failing_exchange(source: str, other: str) -> None:
        made.append(source)
        if len(made) == 2:
            raise OSError(errno.EIO, "no exchange", other)
        exchange(source, other)

    def failing_sync(path: str) -> None:
        if made and path == str(tmp_path):
            raise OSError(errno.EIO, "no sync", path)
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "exchange", failing_exchange)
        patch.setattr(files, "sync_path", failing_sync)
        with pytest.raises(OSError, match="no exchange"):
            fc.save(target, tree_of(1), overwrite=True)
    (old,) = left_overs(tmp_path)
    assert_holds(target, 1)
    shutil.move(tmp_path / old, tmp_path / "old")
    assert_holds(tmp_path / "old", 0)


# What may be at the target.


@pytest.mark.parametrize("kind", ["checkpoint", "directory", "file", "dangling link"])
def test_an_existing_target_is_refused_before_anything_is_written(
    tmp_path: Path, kind: str
) -> None:
    target = tmp_path / "ckpt"
    {
        "checkpoint": lambda: fc.save(target, tree_of(0)),
        "directory": target.mkdir,
        "file": target.touch,
        "dangling link": lambda: target.symlink_to("nowhere"),
    }[kind]()
    with pytest.raises(CheckpointExistsError) as raised:
        fc.save_async(target, tree_of(1))
    why = "already exists; pass overwrite=True to replace it, or"
    if kind == "file":
        why = "is a file, which is not overwritten;"
    assert str(raised.value) == f"{target} {why} save to another path"
    assert isinstance(raised.value, FileExistsError | ValueError)
    assert os.listdir(tmp_path) == ["ckpt"]


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_overwrite_spares_what_is_no_checkpoint(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "ckpt"
    work = target if kind == "file" else target / "thesis.tex"
    work.parent.mkdir(exist_ok=True)
    work.write_text("years of work")
    for overwrite in (True, False):
        with pytest.raises(CheckpointExistsError, match="not overwritten"):
            fc.save(target, tree_of(1), overwrite=overwrite)
    assert work.read_text() == "years of work"
    assert left_overs(tmp_path) == []


@pytest.mark.parametrize("kind", ["link to a checkpoint", "empty directory"])
def test_overwrite_works_on_a_link_and_on_an_empty_directory(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "ckpt"
    if kind == "empty directory":
        target.mkdir()
    else:
        fc.save(tmp_path / "real", tree_of(0))
        target.symlink_to("real")
    for value in (1, 2):  # the second finds what the first left
        fc.save(target, tree_of(value), overwrite=True)
        assert_holds(target, value)
    assert left_overs(tmp_path) == []


def test_a_parent_that_is_a_file_is_an_error_of_the_file_system(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file") as raised:
        fc.save(tmp_path / "file" / "run" / "ckpt", tree_of(1))
    assert isinstance(raised.value, NotADirectoryError | FileExistsError)
    assert os.listdir(tmp_path) == ["file"]


def test_a_parent_where_nothing_can_be_made_is_an_error_that_names_it() -> None:
    with pytest.raises(OSError, match="/proc/1/flax_ckpt_test") as raised:
        fc.save("/proc/1/flax_ckpt_test/ckpt", tree_of(1))
    assert raised.value.__notes__ == ["while saving the checkpoint /proc/1/flax_ckpt_test/ckpt"]


def test_the_next_save_removes_what_lies_at_the_staging_path(tmp_path: Path) -> None:
    for name, make in {
        "directory": lambda path: (path / "state").mkdir(parents=True),
        "file": lambda path: path.touch(),
        "link": lambda path: path.symlink_to(tmp_path),
    }.items():
        make(tmp_path / f"{name}{SUFFIX}")
        fc.save(tmp_path / name, tree_of(1))
        assert_holds(tmp_path / name, 1)
    assert left_overs(tmp_path) == []


# A reader beside the writer.

READER = """
    import json, sys, threading, flax_ckpt as fc
    path = sys.argv[1]
    stop = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), stop.set()), daemon=True).start()
    print("ready", flush=True)
    seen, errors = [], []
    while not stop.is_set():
        try:
            loaded = fc.load(path)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}"[:200])
            continue
        values = {float(v) for v in (loaded["s"], loaded["text"])}
        values |= {float(v) for v in [*loaded["w"].ravel()[:3], *loaded["n"][-3:]]}
        seen.append(sorted(values))
    print(json.dumps([seen, errors]))
"""


def test_a_reader_always_loads_one_of_the_two(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    fc.save(target, tree_of(0))
    reader = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(READER), str(target)],
        cwd=tmp_path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert reader.stdout is not None
    assert reader.stdout.readline() == "ready\n"
    for value in range(1, 80):
        fc.save(target, tree_of(value), overwrite=True)
    out, _ = reader.communicate(timeout=60)
    seen, errors = json.loads(out)
    assert seen
    assert [values for values in seen if len(values) != 1] == []
    assert errors == []


# A process killed in the middle.

BLOCKED = """
    import sys, numpy as np, flax_ckpt as fc

    class FifoHandler:
        async def save(self, directory, value):
            return self._write(directory)
        async def _write(self, directory):
            directory = await directory.await_creation()
            (directory / "half").write_text("written")
            print("blocked", flush=True)
            open(sys.argv[2]).read()
        async def load(self, directory, abstract=None): ...
        async def metadata(self, directory): ...
        def is_handleable(self, value): return True
        def is_abstract_handleable(self, abstract): return None

    registry = fc.handlers.local_registry().add(FifoHandler, checkpointable_name="fifo")
    context = fc.Context()
    context.checkpointables.registry = registry
    with context:
        tree = {"w": np.ones(5000)}
        fc.save_checkpointables(sys.argv[1], {"state": tree, "fifo": 1}, overwrite=True)
"""


@pytest.mark.parametrize("existing", [False, True])
def test_the_next_save_clears_up_after_a_killed_one(tmp_path: Path, existing: bool) -> None:
    target, fifo = tmp_path / "ckpt", tmp_path / "fifo"
    os.mkfifo(fifo)
    if existing:
        fc.save(target, tree_of(0))
    command = [sys.executable, "-c", textwrap.dedent(BLOCKED), str(target), str(fifo)]
    with subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "blocked\n"
        child.send_signal(signal.SIGKILL)
    assert child.returncode == -signal.SIGKILL
    assert left_overs(tmp_path) == [f"ckpt{SUFFIX}"]
    if existing:
        assert_holds(target, 0)
    else:
        assert not target.exists()
    fc.save(target, tree_of(1), overwrite=existing)
    assert_holds(target, 1)
    assert left_overs(tmp_path) == []


# Two saves to one path.


class Gate:
    """Two events of one save: its background part has begun; it may go on."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.release = threading.Event()


class GateHandler(DeepHandler):
    async def save(self, directory: Any, value: Gate) -> Awaitable[None]:
        return self._wait(directory, value)

    async def _wait(self, directory: Any, gate: Gate) -> None:
        await directory.await_creation()
        gate.entered.set()
        assert gate.release.wait(60)


def test_two_saves_to_one_path_never_mix(tmp_path: Path) -> None:
    target = tmp_path / "ckpt"
    registry = fc.handlers.local_registry().add(GateHandler, checkpointable_name="gate")
    context = fc.Context()
    context.checkpointables.registry = registry
    gates = [Gate(), Gate()]
    outcome: dict[int, BaseException | None] = {}
    with context:
        first = fc.save_checkpointables_async(target, {"state": tree_of(1), "gate": gates[0]})
        assert gates[0].entered.wait(60)
        second = SimpleNamespace(result=lambda: None)
        try:
            second = fc.save_checkpointables_async(
                target, {"state": tree_of(2), "gate": gates[1]}, overwrite=True
            )
        except (fc.errors.FlaxCkptError, OSError) as error:  # refusing it is fine
            outcome[2] = error
        gates[1].entered.wait(1)  # or it waits for the first: then in vain
        gates[0].release.set()
        for value, response in ((1, first), (2, second)):
            try:
                response.result()
            except BaseException as error:
                outcome[value] = error
            finally:
                gates[1].release.set()
    succeeded = [value for value in (1, 2) if outcome.get(value) is None]
    assert succeeded, outcome
    assert_holds(target, succeeded[-1])
