"""A run that goes on from an earlier step, or past a damaged one: what is later is moved aside."""

import logging
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt.training import steps


def tree(value: float) -> dict[str, Any]:
    return {"params": {"w": np.full(3, float(value))}}


def train(root: Path, first: int, last: int, sign: int = 1, **options: Any) -> None:
    with fc.CheckpointCallback(root, every_n_steps=1, keep_last=None) as ckpt:
        ckpt.restore_or_init(tree(0), **options)
        for step in range(first, last + 1):
            ckpt.on_step_end(step, tree(sign * step))


def aside(root: Path) -> list[str]:
    found = root / "superseded"
    return sorted(path.name.partition("-")[0] for path in found.iterdir()) if found.exists() else []


def damage(step: Path) -> None:
    """Flips a bit in the array data of a step."""
    (data,) = (step / "params" / "d").iterdir()
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)


def values(root: Path) -> dict[int, float]:
    found = steps.committed(str(root))
    return {step: fc.restore(root, step=step).state["params"]["w"][0] for step in found}


def test_a_run_goes_on_past_a_damaged_latest_step(tmp_path: Path, caplog: Any) -> None:
    train(tmp_path, 1, 3)
    damage(tmp_path / "3")
    with caplog.at_level(logging.WARNING, "flax_ckpt"):
        train(tmp_path, 3, 4, sign=-1)
    assert values(tmp_path) == {1: 1, 2: 2, 3: -3, 4: -4}
    assert aside(tmp_path) == ["3"]
    assert "step 3 is damaged, trying the one before it" in caplog.text
    assert f"from step 2: the later steps [3] were moved to {tmp_path}/superseded" in caplog.text


def test_a_damaged_latest_step_stays_where_it_is_until_the_run_saves(tmp_path: Path) -> None:
    train(tmp_path, 1, 2)
    damage(tmp_path / "2")
    with fc.CheckpointCallback(tmp_path, at_end=False) as ckpt:
        assert ckpt.restore_or_init(tree(0))[1] == 1
    assert steps.committed(str(tmp_path)) == [1, 2]
    assert aside(tmp_path) == []


def test_a_run_goes_on_from_a_step_older_than_the_latest(tmp_path: Path) -> None:
    train(tmp_path, 1, 4)
    train(tmp_path, 2, 2, sign=-1, step=1)
    assert values(tmp_path) == {1: 1, 2: -2}
    assert aside(tmp_path) == ["2", "3", "4"]
    train(tmp_path, 3, 3, sign=-1)
    assert values(tmp_path) == {1: 1, 2: -2, 3: -3}, "the latest step is of the run that went on"


KILLED = """
    import os, signal, sys
    import numpy as np
    import flax_ckpt as fc
    tree = lambda value: {"params": {"w": np.full(3, float(value))}}
    ckpt = fc.CheckpointCallback(sys.argv[1], every_n_steps=int(sys.argv[2]), keep_last=None)
    _, step = ckpt.restore_or_init(tree(0), step=1)
    assert step == 1
    for step in range(2, 4):
        ckpt.on_step_end(step, tree(-step))
    ckpt.wait()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("saves", "found"), [(False, {1: 1, 2: 2, 3: 3}), (True, {1: 1, 2: -2})])
def test_killed_before_or_after_its_next_save(tmp_path: Path, saves: bool, found: Any) -> None:
    train(tmp_path, 1, 3)
    interval = "2" if saves else "100"
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path), interval]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert values(tmp_path) == found, "nothing is moved before something new is to be saved"
    assert aside(tmp_path) == (["2", "3"] if saves else [])
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        state, step = ckpt.restore_or_init(tree(0))
        assert (step, state["params"]["w"][0]) == (max(found), found[max(found)])


def test_what_was_moved_aside_can_be_restored_and_is_never_deleted(tmp_path: Path) -> None:
    train(tmp_path, 1, 3)
    with fc.CheckpointCallback(tmp_path, every_n_steps=1, keep_last=1) as ckpt:
        ckpt.restore_or_init(tree(0), step=1)
        for step in range(2, 9):
            ckpt.on_step_end(step, tree(-step))
    assert sorted(os.listdir(tmp_path)) == ["8", "superseded"]
    assert aside(tmp_path) == ["2", "3"]
    (third,) = (tmp_path / "superseded").glob("3-*")
    assert fc.restore_train_state(third, tree(0))["params"]["w"].tolist() == [3, 3, 3]


def test_twice_the_same_step_is_moved_aside(tmp_path: Path) -> None:
    train(tmp_path, 1, 2)
    train(tmp_path, 2, 2, step=1)
    train(tmp_path, 2, 2, step=1)
    assert aside(tmp_path) == ["2", "2"]
