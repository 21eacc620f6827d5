"""The report of a restore: what it lists, how it prints."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flax_ckpt as fc


def save(root: Path, state: Any) -> None:
    with fc.CheckpointCallback(root) as ckpt:
        ckpt.on_step_end(1, state)


def test_it_lists_what_became_of_every_leaf(tmp_path: Path):
    saved = {"params": {"encoder": np.ones(3), "old": np.ones(5)}, "ema": np.ones(2)}
    save(tmp_path, saved)
    like = {"params": {"backbone": np.zeros(3), "head": np.zeros(7), "scale": np.ones(1)}}
    report = fc.restore(
        tmp_path,
        like,
        exclude="params/scale",
        rename={"params/encoder": "params/backbone"},
        missing="init",
        init=lambda: {"params": {"head": np.full(7, 2.0)}},
        unexpected="ignore",
    ).report
    assert report == fc.Report(
        loaded=("params/backbone",),
        nbytes=24,
        seconds=0.0,
        kept=("params/scale",),
        kept_nbytes=8,
        initialised=("params/head",),
        initialised_nbytes=56,
        ignored=("params/old", "train_state/ema"),
        ignored_nbytes=56,
        renamed=(("params/encoder", "params/backbone"),),
    )


def test_of_a_whole_restore_only_what_was_loaded_is_listed(tmp_path: Path):
    save(tmp_path, {"params": {"w": np.ones(3)}, "opt_state": (), "step": 1})
    report = fc.restore(tmp_path, {"params": {"w": np.ones(3)}, "opt_state": (), "step": 0}).report
    assert report == fc.Report(("params/w", "train_state/step"), 32, seconds=0.0)


def test_two_reports_are_equal_whatever_time_it_took():
    report = fc.Report(("params/w",), 8, seconds=1.0)
    assert report == dataclasses.replace(report, seconds=2.0)
    assert report != dataclasses.replace(report, kept=("params/b",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.nbytes = 9  # type: ignore[misc]


def test_it_prints_as_a_table():
    report = fc.Report(
        loaded=tuple(f"params/encoder/{i}/kernel" for i in range(12)),
        nbytes=1_234_567,
        seconds=0.0312,
        damaged=((1500, "params/w: damaged"),),
        kept=("params/head/bias", "params/head/kernel"),
        kept_nbytes=520,
        ignored=("params/old",),
        ignored_nbytes=12_000,
        renamed=(("params/backbone/w", "params/encoder/w"),),
    )
    assert str(report) == (
        "restored 1.2 MB in 31 ms\n"
        "             leaves    bytes\n"
        "loaded           12   1.2 MB  params/encoder/0/kernel, params/encoder/1/kernel,"
        " params/encoder/2/kernel, … 9 more\n"
        "kept              2    520 B  params/head/bias, params/head/kernel\n"
        "initialised       0      0 B\n"
        "ignored           1  12.0 kB  params/old\n"
        "renamed           1           params/backbone/w → params/encoder/w\n"
        "step 1500 was passed over: params/w: damaged"
    )
