"""What the keywords of the callback keep and save."""

import logging
import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt.training import preservation_policies as preserving
from flax_ckpt.training import save_decision_policies as deciding


def tree(step: int) -> dict[str, Any]:
    return {"params": {"w": np.full(3, float(step))}, "step": step}


def kept(root: Path) -> list[int]:
    return sorted(int(name) for name in os.listdir(root) if name.isdecimal())


def train(root: Path, losses: dict[int, Any], **options: Any) -> list[int]:
    with fc.CheckpointCallback(root, **({"every_n_steps": 1} | options)) as ckpt:
        ckpt.restore_or_init(tree(0))
        for step, loss in losses.items():
            ckpt.on_step_end(step, tree(step), metrics=None if loss is None else {"loss": loss})
    return kept(root)


def test_the_best_are_kept_besides_the_last(tmp_path: Path) -> None:
    losses = {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.2, 5: 0.9, 6: 0.8}
    assert train(tmp_path / "a", losses, keep_last=1, keep_best=("loss", "min", 2)) == [2, 4, 6]
    assert train(tmp_path / "b", losses, keep_last=2, keep_best=fc.Best("loss", "max")) == [5, 6]
    assert train(tmp_path / "c", losses, keep_last=1, keep_best=("loss",)) == [2, 6]


def test_the_latest_stays_however_bad_it_is(tmp_path: Path) -> None:
    assert train(tmp_path, {1: 0.1, 2: 0.2, 3: 9.9}, keep_last=1, keep_best=("loss",)) == [1, 3]


def test_of_equal_ones_the_later_is_the_best(tmp_path: Path) -> None:
    assert train(tmp_path, {1: 1, 2: 1, 3: 1, 4: 2}, keep_last=1, keep_best=("loss",)) == [3, 4]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_never_wins(tmp_path: Path, mode: str) -> None:
    losses = {1: math.nan, 2: 0.5, 3: math.nan, 4: math.nan, 5: math.nan}
    assert train(tmp_path, losses, keep_last=1, keep_best=("loss", mode, 3)) == [2, 5]


def test_infinity_is_a_number(tmp_path: Path) -> None:
    losses = {1: math.inf, 2: 0.5, 3: 0.7}
    assert train(tmp_path, losses, keep_last=1, keep_best=("loss", "max")) == [1, 3]


def test_a_step_without_the_metric_is_saved_and_no_candidate(tmp_path: Path, caplog: Any) -> None:
    options = {"keep_last": 1, "keep_best": ("eval/loss", "min", 2)}
    with fc.CheckpointCallback(tmp_path, every_n_steps=1, **options) as ckpt:
        ckpt.on_step_end(1, tree(1), metrics={"eval/loss": 3.0})
        for step in (2, 3, 4):
            assert ckpt.on_step_end(step, tree(step), metrics={"loss": 0.0, "accuracy": 1.0})
            ckpt.wait()
            assert ckpt.latest_step == step
    assert kept(tmp_path) == [1, 4]
    assert [record.getMessage() for record in caplog.records] == [
        "step 2 has no metric 'eval/loss', so it cannot be the best; it has: loss, accuracy"
    ]


def test_a_metric_that_is_no_number_is_no_candidate(tmp_path: Path) -> None:
    losses = {1: [1.0, 2.0], 2: 5.0, 3: 6.0}
    assert train(tmp_path, losses, keep_last=1, keep_best=("loss",)) == [2, 3]


def test_the_best_score_survives_a_resume(tmp_path: Path) -> None:
    options = {"keep_last": 1, "keep_best": ("loss", "min", 1)}
    assert train(tmp_path, {1: 0.1, 2: 0.5}, **options) == [1, 2]
    assert train(tmp_path, {3: 0.3, 4: 0.2}, **options) == [1, 4]
    assert train(tmp_path, {5: 0.05, 6: 0.2}, **options) == [5, 6]


def test_metric_and_mode_are_in_each_step(tmp_path: Path) -> None:
    train(tmp_path, {1: 0.1}, keep_best=("loss", "max", 2))
    found = fc.checkpointables_metadata(tmp_path / "1").custom_metadata
    assert found == {"flax_ckpt": {"best": {"metric": "loss", "mode": "max"}}}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("loss", 'keep_best is like ("eval/loss", "min", 2), got \'loss\''),
        ((), 'keep_best is like ("eval/loss", "min", 2), got ()'),
        (("loss", "least"), "keep_best needs the mode 'min' or 'max' and n of at least 1, got"),
        (("loss", "min", 0), "keep_best needs the mode 'min' or 'max' and n of at least 1, got"),
    ],
)
def test_a_wrong_keep_best_is_refused(tmp_path: Path, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match="keep_best") as caught:
        fc.CheckpointCallback(tmp_path, keep_best=wrong)
    assert str(caught.value).startswith(message)


def test_multiples_are_kept_besides_the_last(tmp_path: Path) -> None:
    steps = dict.fromkeys(range(1, 12))
    assert train(tmp_path, steps, keep_last=2, keep_every_n_steps=5) == [5, 10, 11]


def test_a_preservation_policy_stands_in_for_the_last(tmp_path: Path) -> None:
    steps, policy = dict.fromkeys(range(1, 8)), preserving.CustomSteps([2, 3])
    assert train(tmp_path / "a", steps, preservation_policy=policy) == [2, 3, 7]
    options = {"preservation_policy": policy, "keep_every_n_steps": 5}
    assert train(tmp_path / "b", steps, **options) == [2, 3, 5, 7]


def test_a_save_policy_alone_or_with_an_interval(tmp_path: Path) -> None:
    steps, policy = dict.fromkeys(range(1, 8)), deciding.SpecificStepsPolicy([2, 3])
    options = {"keep_last": None, "save_policy": policy, "at_end": False}
    assert train(tmp_path / "a", steps, **options, every_n_steps=None) == [2, 3]
    assert train(tmp_path / "b", steps, **options, every_n_steps=4) == [2, 3, 4]


def test_metrics_are_fetched_on_saving_steps_alone(tmp_path: Path) -> None:
    def loss(value: float) -> jax.Array:
        return jnp.float32(value)

    deleted = loss(7)
    deleted.delete()
    with fc.CheckpointCallback(tmp_path, every_n_steps=2, at_end=False) as ckpt:
        ckpt.on_step_end(1, tree(1), metrics={"loss": deleted})
        ckpt.on_step_end(2, tree(2), metrics={"loss": loss(0.5)})
        ckpt.on_step_end(3, tree(3), metrics={"loss": deleted})
    assert fc.restore(tmp_path).metrics == {"loss": 0.5}


class Writer:
    """As CLU's metric writers."""

    def __init__(self) -> None:
        self.scalars: list[tuple[int, dict[str, float]]] = []

    def write_scalars(self, step: int, scalars: Any) -> None:
        self.scalars.append((step, dict(scalars)))


def test_a_writer_and_jax_monitoring_are_told_how_long_each_save_took(tmp_path: Path) -> None:
    writer, heard = Writer(), dict[str, float]()

    def hear(event: str, value: float, **_: Any) -> None:
        heard[event] = value

    jax.monitoring.register_scalar_listener(hear)
    jax.monitoring.register_event_duration_secs_listener(hear)
    try:
        with fc.CheckpointCallback(tmp_path, every_n_steps=2, writer=writer) as ckpt:
            for step in range(1, 6):
                ckpt.on_step_end(step, tree(step))
        assert [step for step, _ in writer.scalars] == [2, 4, 5]
        for _, scalars in writer.scalars:
            assert scalars["checkpoint/save/bytes"] == 32
            seconds = [scalars[f"checkpoint/save/{name}_secs"] for name in ("duration", "blocked")]
            assert seconds[0] >= seconds[1] > 0
        assert heard["/flax_ckpt/save/bytes"] == 32
        assert heard["/flax_ckpt/save/duration_secs"] >= heard["/flax_ckpt/save/blocked_secs"]
        fc.restore(tmp_path)
        assert heard["/flax_ckpt/restore/bytes"] == 32
        assert heard["/flax_ckpt/restore/duration_secs"] > 0
    finally:
        jax.monitoring.unregister_scalar_listener(hear)
        jax.monitoring.unregister_event_duration_listener(hear)


def test_a_save_that_is_asked_for_again_is_told_of(tmp_path: Path, caplog: Any) -> None:
    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        ckpt.on_step_end(1, tree(1))
        with caplog.at_level(logging.INFO, "flax_ckpt"):
            assert not ckpt.on_step_end(1, tree(1), force=True)
    assert "step 1 is not saved again: it is saved" in caplog.text
