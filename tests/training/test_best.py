"""`step="best"`: by what the steps of a run say themselves, without a callback."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt.training import best
from tests.training.test_restore import damage

NAN = float("nan")


def by(metric: str, mode: str = "min") -> Any:
    return {"flax_ckpt": {"best": {"metric": metric, "mode": mode}}, "user": 1}


def like(value: int = 0) -> Any:
    return {"params": {"w": np.full(3, value)}}


_LOSS = by("eval/loss")


def save(root: Path, metrics: dict[int, Any], custom: Any = _LOSS) -> None:
    with fc.training.Checkpointer(root) as run:
        for step, of_step in metrics.items():
            state = like(step)
            run.save_checkpointables(
                step, state, force=True, metrics=of_step, custom_metadata=custom
            )


def loss(*values: Any) -> dict[int, Any]:
    return {step: {"eval/loss": value} for step, value in enumerate(values, 1)}


def test_the_best_step_comes_back(tmp_path: Path):
    save(tmp_path, loss(3.0, 1.0, 2.0))
    out = fc.restore(tmp_path, like(), step="best")
    assert (out.step, out.metrics) == (2, {"eval/loss": 1.0})
    assert fc.restore_train_state(tmp_path, like(), step="best")["params"]["w"].tolist() == [2] * 3
    with fc.CheckpointCallback(tmp_path) as ckpt:
        assert ckpt.restore_or_init(like(), step="best")[1] == 2


def test_mode_max_wants_the_greatest(tmp_path: Path):
    save(
        tmp_path, loss(3.0, 4, 2.0), {"flax_ckpt": {"best": {"metric": "eval/loss", "mode": "max"}}}
    )
    assert best.ranked(str(tmp_path)) == [2, 1, 3]


def test_of_equal_steps_the_later_wins(tmp_path: Path):
    save(tmp_path, loss(1.0, 2.0, 1.0))
    assert best.ranked(str(tmp_path)) == [3, 1, 2]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_never_wins_nor_does_what_is_no_number(tmp_path: Path, mode: str):
    metrics = loss(NAN, 2.0, [1.0], NAN) | {5: {"other": 0.0}, 6: None}
    save(tmp_path, metrics, by("eval/loss", mode))
    assert best.ranked(str(tmp_path)) == [2]


def test_what_the_newest_step_says_counts(tmp_path: Path):
    save(
        tmp_path, {1: {"a": 1.0, "b": 2.0}}, {"flax_ckpt": {"best": {"metric": "a", "mode": "min"}}}
    )
    save(
        tmp_path, {2: {"a": 2.0, "b": 3.0}}, {"flax_ckpt": {"best": {"metric": "b", "mode": "min"}}}
    )
    save(tmp_path, {3: {"a": 0.0, "b": 1.0}}, {"flax_ckpt": {"provenance": {}}})
    assert best.ranked(str(tmp_path)) == [3, 1, 2]


def test_if_no_step_has_the_metric_the_error_says_which_there_are(tmp_path: Path):
    save(tmp_path, {1: {"loss": 1.0}, 2: {"accuracy": 0.5, "eval/loss": NAN}})
    with pytest.raises(fc.errors.CheckpointNotFoundError) as caught:
        fc.restore(tmp_path, like(), step="best")
    assert str(caught.value) == (
        f"no step of {tmp_path} has a number as 'eval/loss', by which the best is chosen. The"
        " metrics of its steps: accuracy, eval/loss, loss"
    )


@pytest.mark.parametrize("custom", [None, {"flax_ckpt": {"best": {"metric": "eval/loss"}}}])
def test_if_no_step_says_what_is_best_the_error_says_what_to_do(tmp_path: Path, custom: Any):
    save(tmp_path, {1: None}, custom)
    with pytest.raises(fc.errors.CheckpointNotFoundError) as caught:
        fc.restore(tmp_path, like(), step="best")
    assert str(caught.value) == (
        f"no step of {tmp_path} says by which metric it may be the best, as those of a"
        " CheckpointCallback with keep_best= do. The metrics of its steps: none. Give the number of"
        " a step"
    )


def test_a_damaged_best_step_raises_and_the_next_best_is_named(tmp_path: Path):
    save(tmp_path, loss(2.0, 1.0, 3.0))
    damage(tmp_path / "2" / "params")
    with pytest.raises(fc.errors.DamagedCheckpointError) as caught:
        fc.restore(tmp_path, like(), step="best")
    note = f"step 2 is the best of {tmp_path}; the next best is step 1"
    assert caught.value.__notes__ == [note]


def test_one_checkpoint_is_no_run_with_a_best_step(tmp_path: Path):
    save(tmp_path, loss(2.0))
    with pytest.raises(fc.errors.CheckpointNotFoundError, match="not a root with step best"):
        fc.restore(tmp_path / "1", like(), step="best")


def test_a_step_that_the_run_deletes_meanwhile_is_passed_over(tmp_path: Path):
    save(tmp_path, loss(2.0, 1.0, 3.0))

    def delete(path: str) -> bool:
        shutil.rmtree(tmp_path / "2", ignore_errors=True)
        return True

    assert fc.restore(tmp_path, like(), step="best", only=delete).step == 1
