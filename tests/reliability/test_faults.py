"""Calls of the file system that fail: a sample of the campaign, and what it found."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

import flax_ckpt as fc
from flax_ckpt.format import names
from flax_ckpt.storage import lock
from torture import faults
from torture.calls import Call, intercepted
from torture.ledger import Ledger, state_of

SEED = 23


def test_no_fault_loses_a_step_or_leaves_something_open() -> None:
    for outcome in faults.campaign(0.001, SEED):
        assert not outcome.wrong, f"seed {SEED}: {outcome.wrong}"
        assert outcome.runs


@pytest.mark.parametrize("limit", [0, 400, 5000])
def test_a_full_disk(limit: int) -> None:
    assert not faults.full_disk(limit)


def test_the_campaign_notices_errors_without_a_path_and_what_stays_open(tmp_path: Path) -> None:
    ledger = Ledger()

    def around(call: Call, perform: Any) -> Any:
        if call.name == "mkdir":
            raise OSError(errno.EIO, "somewhere")
        return perform()

    with open(tmp_path / "file", "w"):
        found = faults.attempt("save", str(tmp_path), ledger, around, may_fail=False)
    assert f"{tmp_path}/file is still there" in found
    assert any(problem.startswith("OSError: [Errno 5] somewhere") for problem in found)


def fail_syncs_of(root: Path) -> Any:
    def around(call: Call, perform: Any) -> Any:
        if call.name == "fsync" and call.path == str(root):
            raise OSError(errno.EIO, "Input/output error")
        return perform()

    return intercepted(str(root), around)


def test_a_new_state_is_not_removed_while_it_may_have_the_name_on_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "0"
    fc.save_checkpointables(path, state_of("0", 1))
    with fail_syncs_of(tmp_path), pytest.raises(OSError, match="Input/output error: '/"):
        fc.save_checkpointables(path, state_of("0", 2), overwrite=True)
    assert fc.load_checkpointables(path)["params"]["version"] == 1
    # The exchange may be on the disk, and the way back not: then this is what has the name.
    (left,) = tmp_path.glob(f"0{names.TMP_SUFFIX}*")
    assert (left / names.INTEGRITY).exists()
    fc.save_checkpointables(path, state_of("0", 3), overwrite=True)
    assert os.listdir(tmp_path) == ["0"]


def test_a_deletion_whose_sync_failed_is_synced_before_the_first_byte_goes(tmp_path: Path) -> None:
    path = tmp_path / "0"
    fc.save_checkpointables(path, state_of("0", 1))
    for _ in range(2):
        with fail_syncs_of(tmp_path), pytest.raises(OSError, match="Input/output error: '/"):
            fc.delete(path)
        (left,) = tmp_path.iterdir()
        assert (left / names.INTEGRITY).exists()
    assert fc.delete(path)
    assert not list(tmp_path.iterdir())


def test_a_directory_that_cannot_be_read_is_no_empty_one(tmp_path: Path) -> None:
    def around(call: Call, perform: Any) -> Any:
        if call.name == "scandir" and call.path.endswith("/params"):
            raise OSError(errno.EACCES, "Permission denied", call.path)
        return perform()

    with intercepted(str(tmp_path), around), pytest.raises(PermissionError, match="/params'"):
        fc.save_checkpointables(tmp_path / "0", state_of("0", 1))
    assert not (tmp_path / "0").exists()


def test_a_lock_file_that_somebody_removed_is_made_again(tmp_path: Path) -> None:
    with fc.training.Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, {"w": 1})
        text = (tmp_path / names.LOCK).read_text()
        os.remove(tmp_path / names.LOCK)
        checkpointer.save(2, {"w": 2})
        assert (tmp_path / names.LOCK).read_text() == text
    assert not (tmp_path / names.LOCK).exists()


def test_what_is_left_of_a_stale_lock_goes(tmp_path: Path) -> None:
    left = tmp_path / f"{names.LOCK}-0123"
    left.write_text("gone 1 1\n")
    held = lock.acquire(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [names.LOCK]
    held.release()
