"""Two processes that by mistake use one directory: the second is told who has it."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt.errors import RunInUseError
from flax_ckpt.format.names import LOCK
from flax_ckpt.storage import commit, lock

RUN = """
    import sys
    import numpy as np
    import flax_ckpt as fc
    ckpt = fc.CheckpointCallback(sys.argv[1], every_n_steps=1)
    ckpt.restore_or_init({"params": np.zeros(3)})
    ckpt.on_step_end(1, {"params": np.ones(3)})
    ckpt.wait()
    print("saved", flush=True)
    sys.stdin.read()
    ckpt.close()
"""


def tree(value: float) -> dict[str, Any]:
    return {"params": np.full(3, float(value))}


@contextmanager
def run_elsewhere(root: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", textwrap.dedent(RUN), str(root)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "saved\n"
        yield other


def test_the_second_is_told_who_has_the_directory_and_since_when(tmp_path: Path) -> None:
    with run_elsewhere(tmp_path) as other:
        message = (
            f"{tmp_path} is in use: process {other.pid} on {socket.gethostname()} saves there since"
        )
        for use in (
            lambda ckpt: ckpt.restore_or_init(tree(0)),
            lambda ckpt: ckpt.on_step_end(1, tree(2)),  # it would move step 1 aside
        ):
            with pytest.raises(
                RunInUseError, match="^" + re.escape(message) + r" \d{4}-\d\d-\d\dT"
            ):
                use(fc.CheckpointCallback(tmp_path, every_n_steps=1))
        with pytest.raises(RunInUseError, match=re.escape(message)):
            fc.training.Checkpointer(tmp_path).save(2, tree(2))
        assert fc.restore(tmp_path).step == 1, "reading is free"
        other.communicate("end")
    assert sorted(os.listdir(tmp_path)) == ["1"]
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        assert ckpt.restore_or_init(tree(0))[1] == 1
        ckpt.on_step_end(2, tree(2))
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]


def test_the_lock_of_a_killed_process_of_this_machine_is_no_obstacle(tmp_path: Path) -> None:
    with run_elsewhere(tmp_path) as other:
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).exists()
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        assert ckpt.restore_or_init(tree(0))[1] == 1
        assert str(os.getpid()) in (tmp_path / LOCK).read_text()


def of_another_host(root: Path, host: str = "tpu-7", pid: int = 1234) -> Path:
    path = root / LOCK
    path.write_text(f"{host} {pid} 99\n2026-01-02T03:04:05+00:00\n")
    return path


@pytest.mark.parametrize(
    "host", ["tpu-7", f"{socket.gethostname()}:77"], ids=["elsewhere", "another container"]
)
@pytest.mark.parametrize("pid", [1234, os.getpid()], ids=["another number", "the same number"])
def test_another_hosts_lock_holds_as_long_as_its_heart_beats(
    tmp_path: Path, host: str, pid: int
) -> None:
    path, ended = of_another_host(tmp_path, host, pid), threading.Event()

    def beat() -> None:
        while not ended.wait(0.05):
            os.utime(path)

    heart = threading.Thread(target=beat)
    heart.start()
    try:
        with pytest.raises(RunInUseError) as caught:
            fc.CheckpointCallback(tmp_path).restore_or_init(tree(0))
    finally:
        ended.set()
        heart.join()
    assert str(caught.value) == (
        f"{tmp_path} is in use: process {pid} on {host.partition(':')[0]} saves there since"
        " 2026-01-02T03:04:05+00:00. Give this run another directory, or end that process. If it"
        f" is gone, remove {path}"
    )


def test_another_hosts_lock_that_nobody_touches_is_stale(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(lock, "STALE_SECS", 0.3)
    of_another_host(tmp_path)
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        ckpt.on_step_end(1, tree(1))
    assert os.listdir(tmp_path) == ["1"]


def test_a_run_whose_lock_was_taken_saves_no_more(tmp_path: Path) -> None:
    ckpt = fc.CheckpointCallback(tmp_path, every_n_steps=1, at_end=False)
    ckpt.on_step_end(1, tree(1))
    ckpt.wait()
    path = of_another_host(tmp_path)
    with pytest.raises(RunInUseError, match="process 1234 on tpu-7"):
        ckpt.on_step_end(2, tree(2))
    ckpt.close()
    assert path.exists(), "it is another's"
    assert sorted(os.listdir(tmp_path)) == [LOCK, "1"]


def test_all_who_save_from_one_process_share_it(tmp_path: Path) -> None:
    ckpt = fc.CheckpointCallback(tmp_path, every_n_steps=1)
    ckpt.on_step_end(1, tree(1))
    ckpt.wait()
    with fc.training.Checkpointer(tmp_path) as other:
        other.save(2, tree(2))
    assert (tmp_path / LOCK).exists()
    ckpt.close()
    assert not (tmp_path / LOCK).exists()


def test_the_heart_beats(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(lock, "BEAT_SECS", 0.01)
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        ckpt.on_step_end(1, tree(1))
        path = tmp_path / LOCK
        os.utime(path, (0, 0))
        while path.stat().st_mtime == 0:
            pass
    assert not path.exists()


@pytest.mark.parametrize("text", ["", "nonsense", "host\n", "\x00\xff"])
def test_a_lock_that_says_nothing_is_stale_in_the_end(
    tmp_path: Path, text: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(lock, "STALE_SECS", 0.2)
    (tmp_path / LOCK).write_text(text)
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        ckpt.on_step_end(1, tree(1))
    assert os.listdir(tmp_path) == ["1"]


def test_a_lock_that_was_taken_while_it_was_found_stale_stays_whose_it_is(
    tmp_path: Path, monkeypatch: Any
) -> None:
    path, rename = tmp_path / LOCK, os.rename
    with subprocess.Popen(["true"]) as ended:
        pass
    path.write_text(f"{commit.identity(os.getpid()).split()[0]} {ended.pid} 1\nthen\n")
    theirs = f"{commit.identity(os.getppid())}\nnow\n"

    def rename_too_late(source: str, target: str) -> None:
        path.write_text(theirs)
        monkeypatch.undo()
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_too_late)
    with pytest.raises(RunInUseError, match=f"process {os.getppid()} on .* since now"):
        fc.CheckpointCallback(tmp_path).restore_or_init(tree(0))
    assert os.listdir(tmp_path) == [LOCK]
    assert path.read_text() == theirs


def test_a_save_in_flight_is_not_committed_when_the_lock_was_taken(tmp_path: Path) -> None:
    begun, goes_on = threading.Event(), threading.Event()

    class Waits:
        async def save(self, directory: Any, value: Any) -> Any:
            return self.write(directory)

        async def write(self, directory: Any) -> None:
            await directory.await_creation()
            begun.set()
            goes_on.wait()

        async def load(self, directory: Any, abstract: Any = None) -> Any: ...
        async def metadata(self, directory: Any) -> Any: ...
        def is_handleable(self, value: Any) -> bool:
            return isinstance(value, int)

        def is_abstract_handleable(self, abstract: Any) -> bool | None:
            return None

    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry().add(
        Waits, checkpointable_name="waits"
    )
    run = fc.training.Checkpointer(tmp_path, context=context)
    response = run.save_checkpointables_async(1, {"waits": 1})
    begun.wait()
    of_another_host(tmp_path)
    goes_on.set()
    with pytest.raises(RunInUseError, match="process 1234 on tpu-7"):
        response.result()
    run.close()
    assert os.listdir(tmp_path) == [LOCK]
