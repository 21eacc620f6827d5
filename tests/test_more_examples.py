"""The examples on digits, each in a process of its own: fine-tuning, averages, preemption."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import jax
import numpy as np

import flax_ckpt as fc
from tests.programs import finish, start
from tests.training.states import assert_same

DIGITS, PARITY, EMA = (
    f"--config=configs/{name}.py" for name in ("digits", "finetune_digits", "digits_ema")
)


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def accuracy(printed: str) -> tuple[float, int]:
    """What an evaluation printed, and for which step."""
    found = re.fullmatch(r"test accuracy ([\d.]+) at step (\d+)\n", printed)
    assert found is not None, printed
    return float(found[1]), int(found[2])


def damage(step: Path, params: Any) -> None:
    """Writes zeros over all parameters of a step."""
    (file,) = (step / "params" / "d").iterdir()
    data = file.read_bytes()
    for leaf in map(np.asarray, jax.tree.leaves(params)):
        data = data.replace(leaf.tobytes(), bytes(leaf.nbytes))
    assert data != file.read_bytes()
    file.write_bytes(data)


def test_a_new_head_learns_over_a_frozen_base_and_resumes_without_it(tmp_path: Path) -> None:
    base, workdir, unbroken = (tmp_path / name for name in ("digits", "parity", "unbroken"))
    finish(start("train_digits", base, DIGITS, num_steps=300))
    flags = (PARITY, f"--base={base}")
    other = start("finetune_digits", unbroken, *flags)
    _, log = finish(start("finetune_digits", workdir, *flags, num_steps=100))
    assert "start at step 0" in log
    assert re.search(r"loaded +10 ", log)
    assert re.search(r"renamed +10 .* params/BatchNorm_0/bias → params/base/BatchNorm_0/bias", log)
    finish(other)
    _, log = finish(start("finetune_digits", workdir, PARITY, "--base=/nonexistent"))
    assert "start at step 100" in log

    source, tuned, whole = (
        fc.restore(run / "checkpoints").state for run in (base, workdir, unbroken)
    )
    assert_same(tuned, whole)
    del source["params"]["Dense_0"]
    assert_same(tuned["params"]["base"], source["params"])
    assert_same(tuned["train_state"]["batch_stats"]["base"], source["train_state"]["batch_stats"])
    printed, _ = finish(start("eval_finetune_digits", workdir, PARITY))
    assert accuracy(printed) > (0.95, 300)


def test_a_run_that_is_told_to_end_saves_once_and_resumes_to_the_same_bits(tmp_path: Path) -> None:
    # A pipe holds less than the log of the whole run: it cannot end before this test reads on.
    often = {"log_every_steps": 1, "num_steps": 1000, "features": (4, 8)}
    with start(
        "train_digits_ema", tmp_path / "a", EMA, **often, checkpoint_every_steps=1000
    ) as told:
        assert told.stderr is not None
        assert any(" step 5:" in line for line in told.stderr)
        told.send_signal(signal.SIGTERM)
        log = told.stderr.read()
    assert told.returncode == 128 + signal.SIGTERM
    (step,) = saved_steps(tmp_path / "a")
    assert 5 <= step < 1000
    assert re.findall(r"saved step (\d+)", log) == [str(step)]

    runs = [
        start("train_digits_ema", tmp_path / run, EMA, **often | {"log_every_steps": 100})
        for run in ("a", "b")
    ]
    resumed, unbroken = (finish(run)[1] for run in runs)
    assert (f"start at step {step}\n" in resumed, "start at step 0\n" in unbroken) == (True, True)
    assert saved_steps(tmp_path / "a") == saved_steps(tmp_path / "b")
    a, b = (fc.restore(tmp_path / run / "checkpoints") for run in ("a", "b"))
    assert a.metrics == b.metrics
    assert_same(a.state, b.state)


def test_the_best_averages_are_kept_and_evaluated(tmp_path: Path) -> None:
    workdir = tmp_path / "ema"
    rough = {
        "learning_rate": 0.05,
        "ema_decay": 0.5,
        "batch_size": 8,
    }  # so the best is not the last
    every = {"log_every_steps": 20, "checkpoint_every_steps": 20, "num_steps": 400}
    _, log = finish(start("train_digits_ema", workdir, EMA, **rough, **every))
    found = re.findall(r"step (\d+): .*'eval/accuracy': '([\d.]+)'", log)
    scores = sorted((float(value), int(step)) for step, value in found)
    assert len(scores) == 20
    assert saved_steps(workdir) == sorted({scores[-1][1], scores[-2][1], 400})

    best = fc.restore(workdir / "checkpoints", step="best")
    assert best.step == scores[-1][1]
    damage(workdir / "checkpoints" / str(best.step), best.state["params"])  # not to be read
    printed, _ = finish(start("eval_digits_ema", workdir, EMA))
    assert accuracy(printed) > (0.9, 0)
    assert accuracy(printed)[1] == best.step
