"""Two processes overwrite one checkpoint, one of them stopped at each call of its commit in turn.

Whoever reports a save has saved; one that is refused gets a typed error; nothing is left or mixed.
"""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

import flax_ckpt as fc
from flax_ckpt.errors import CheckpointExistsError
from flax_ckpt.storage import commit, files

SUFFIX = ".orbax-checkpoint-tmp"

# Saves what it is told to; stops at the n-th change of its commit, until it is told to go on.
OTHER = """
    import sys
    import numpy as np
    import flax_ckpt as fc
    from flax_ckpt.storage import files

    left = None

    def stopping(change):
        def call(*args, **kwargs):
            global left
            if left is not None:
                left -= 1
                if left == -1:
                    print("stopped", change.__name__, flush=True)
                    sys.stdin.readline()
            return change(*args, **kwargs)
        return call

    def begin(sync):
        def call(root):
            global left
            sync(root)
            left = number
        return call

    for name in ("rename", "exchange", "unlink", "sync_path", "clear"):
        setattr(files, name, stopping(getattr(files, name)))
    files.sync_tree = begin(files.sync_tree)
    for line in sys.stdin:
        path, number, value = line.split()
        number = int(number)
        try:
            fc.save(path, {"w": np.full(5, int(value))}, overwrite=True)
            print("saved", flush=True)
        except Exception as error:
            print(type(error).__name__, error, flush=True)
        left = None
"""


class Other:
    """The other process."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", textwrap.dedent(OTHER)]
        pipe = subprocess.PIPE
        self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def tell(self, line: object = "") -> str:
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        print(line, file=self._child.stdin, flush=True)
        return self._child.stdout.readline().strip()

    def end(self) -> None:
        self._child.kill()
        self._child.communicate()


@pytest.fixture(scope="module")
def other() -> Iterator[Other]:
    child = Other()
    yield child
    child.end()


def value_of(path: Path) -> int:
    (value,) = set(fc.load(path)["w"].tolist())
    return value


@pytest.mark.parametrize("is_there", [True, False])
def test_nobody_takes_a_save_that_is_being_committed_for_a_left_over(
    other: Other, tmp_path: Path, is_there: bool
) -> None:
    stops: list[str] = []
    for number in range(20):
        path = tmp_path / str(number)
        if is_there:
            fc.save(path, {"w": np.full(5, 1)})
        said = other.tell(f"{path} {number} 2")
        if said == "saved":
            break
        stops.append(said)
        refused = ""
        try:
            fc.save(path, {"w": np.full(5, 3)}, overwrite=True)
            assert value_of(path) == 3
        except CheckpointExistsError as error:
            refused = str(error)
        assert not refused or "is being saved by process" in refused
        assert other.tell() == "saved", stops
        assert value_of(path) == 2 if refused else value_of(path) in (2, 3), stops
        assert os.listdir(tmp_path) == [path.name], stops
        assert ".owner" not in os.listdir(path)
        fc.delete(path)
    assert "stopped exchange" in stops if is_there else "stopped rename" in stops
    assert len(stops) > 2


def test_of_two_machines_the_first_commits_nothing_of_the_second(
    other: Other, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ckpt"
    fc.save(path, {"w": np.full(5, 1)})
    assert other.tell(f"{path} 0 2").startswith("stopped")
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    writing: Any = commit.Staging(str(path), overwrite=True)
    writing.create(["state"])
    said = other.tell()
    expected = f"process {os.getpid()} on elsewhere has begun to save to {path}. This save was not"
    assert said.startswith(f"CheckpointExistsError {expected} committed")
    assert value_of(path) == 1
    writing.discard()
    fc.save(path, {"w": np.full(5, 3)}, overwrite=True)
    assert value_of(path) == 3
    assert os.listdir(tmp_path) == ["ckpt"]


def test_of_two_machines_the_first_discards_nothing_of_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ckpt"
    second: Any = None

    def taken_over(root: str) -> None:
        nonlocal second
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        second = commit.Staging(str(path))
        second.create(["state"])
        raise OSError(errno.EIO, "Input/output error", root)

    monkeypatch.setattr(files, "sync_tree", taken_over)
    expected = f"^process {os.getpid()} on elsewhere has begun to save to {path}. This save was not"
    with pytest.raises(CheckpointExistsError, match=expected):
        fc.save(path, {"w": np.full(5, 1)})
    assert os.listdir(tmp_path) == [f"ckpt{SUFFIX}"]
    assert sorted(os.listdir(second.path)) == [".owner", "state"]
    second.commit()
    assert os.listdir(tmp_path) == ["ckpt"]


def test_a_save_whose_staging_directory_was_removed_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sync = tmp_path / "ckpt", files.sync_tree

    def removed(root: str) -> None:
        sync(root)
        shutil.rmtree(root)

    monkeypatch.setattr(files, "sync_tree", removed)
    with pytest.raises(CheckpointExistsError, match=f"^{path}{SUFFIX} is gone: somebody has rem"):
        fc.save(path, {"w": np.full(5, 1)})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "link", "pipe", "bytes"])
def test_an_owner_that_is_none_is_no_obstacle(tmp_path: Path, kind: str) -> None:
    run = tmp_path / "run"
    left = run / f"2{SUFFIX}"
    left.mkdir(parents=True)
    makes = {"folder": Path.mkdir, "link": lambda p: p.symlink_to("nowhere"), "pipe": os.mkfifo}
    makes.get(kind, lambda p: p.write_bytes(b"\xff" * 9))(left / ".owner")
    with fc.training.Checkpointer(run, cleanup_tmp_directories=kind != "pipe") as checkpointer:
        assert checkpointer.save(2, {"w": np.full(5, 1)})
    assert "2" in os.listdir(run)
    assert left.name not in os.listdir(run)


def test_two_may_remove_the_same_left_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(5):
        left = tmp_path / f"{number}{SUFFIX}"
        left.mkdir()
        for name in range(1000):
            (left / str(name)).touch()
        both = [threading.Thread(target=commit.remove_left_over, args=[str(left)]) for _ in "12"]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
    assert not os.listdir(tmp_path)
    assert not caplog.records


def test_what_a_killed_overwrite_put_aside_goes_with_the_next_save(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    fc.save(path, {"w": np.full(5, 1)})
    aside, live = tmp_path / f"ckpt{SUFFIX}-old-1", tmp_path / f"ckpt{SUFFIX}-old-2"
    (aside / "state").mkdir(parents=True)
    live.mkdir()
    (live / ".owner").write_text(commit.identity(os.getppid()))
    fc.save(path, {"w": np.full(5, 2)}, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["ckpt", live.name]
    assert value_of(path) == 2


def test_a_kill_right_after_the_rename_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    program = f"import numpy, flax_ckpt as fc; fc.save({str(path)!r}, {{'w': numpy.full(5, 4)}})"
    environment = {**os.environ, "FLAX_CKPT_FAILPOINT": "commit.clear:before=kill"}
    killed = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert ".owner" in os.listdir(path)
    assert value_of(path) == 4
    assert ocp.load(path)["w"].tolist() == [4] * 5
    found = fc.verify(path)
    assert found.ok, found
    fc.save(path, {"w": np.full(5, 5)}, overwrite=True)
    assert value_of(path) == 5
    assert os.listdir(tmp_path) == ["ckpt"]
