"""Power cuts: a sample of the campaign, what its model must notice, and what it found."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from torture import power
from torture.calls import Call
from torture.scenarios import SCENARIOS

SEED = 22


def test_what_was_reported_as_saved_survives_power_cuts() -> None:
    for outcome in power.campaign(0.006, SEED):
        assert not outcome.wrong, f"seed {SEED}: {outcome.wrong}"
        assert outcome.runs >= 8


def nothing() -> float:
    return 0.0


@pytest.mark.parametrize(
    ("scenario", "is_dropped", "problem"),
    [
        ("save", lambda call: call.path.endswith("/root"), "is not there"),
        (
            "overwrite",
            lambda call: call.path.endswith("/root"),
            "0 was reported as saved and is not",
        ),
        ("save", lambda call: "/params/d/" in call.path, "does not load"),
        ("save", lambda call: call.path.endswith("/params"), "does not load"),
        ("partial", lambda call: call.path.endswith(".partial_save"), "is not there"),
    ],
    ids=["parent", "parent when replacing", "data", "directory", "partial save"],
)
def test_the_model_notices_a_sync_that_is_left_out(
    tmp_path: Path, scenario: str, is_dropped: Callable[[Call], bool], problem: str
) -> None:
    (tmp_path / "root").mkdir()
    recording = power.record(
        SCENARIOS[scenario],
        str(tmp_path / "root"),
        lambda call: call.name == "fsync" and is_dropped(call),
    )
    (found, *_) = power.problems(recording, len(recording.ops), nothing)
    assert problem in found


def test_the_mark_of_a_finalized_save_is_not_on_the_disk_before_what_it_speaks_of(
    tmp_path: Path,
) -> None:
    recording = power.record(SCENARIOS["partial"], str(tmp_path))
    marked = next(n for n, op in enumerate(recording.ops) if "'finalized'" in str(op))
    for alone in itertools.count():  # of what was not synced, one change alone is on the disk
        changes = itertools.count()
        found = power.problems(recording, marked + 1, lambda: float(next(changes) == alone))  # noqa: B023
        assert not found
        if next(changes) <= alone:
            break
    assert alone
