"""Processes that are killed at any moment: a sample of the campaign, and of its ledger."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import flax_ckpt as fc
from torture import crashes, ledger, scenarios

SEED = 20


def test_what_was_reported_as_saved_survives_kills() -> None:
    *runs, starts, phases = crashes.campaign(0.05, SEED)
    for outcome in (*runs, starts):
        assert not outcome.wrong, f"seed {SEED}: {outcome.wrong}"
        assert outcome.runs > 5
    assert phases.runs > 12


@pytest.fixture
def saved(tmp_path: Path) -> ledger.Ledger:
    """The ledger of a directory in which two steps were saved, and one overwritten."""
    found = ledger.Ledger()
    ledger.put_foreign(str(tmp_path))
    scenarios.save(str(tmp_path), 1, found.say)
    scenarios.overwrite(str(tmp_path), 1, found.say)
    assert not found.problems(str(tmp_path))
    return found


def test_the_ledger_notices_what_is_lost_old_or_mixed(tmp_path: Path, saved: ledger.Ledger) -> None:
    root = str(tmp_path)
    shutil.rmtree(tmp_path / "1")
    shutil.copytree(tmp_path / "2", tmp_path / "3")
    shutil.rmtree(tmp_path / "2" / "params")
    scenarios.overwrite(root, 5, lambda *_: None)
    problems = {problem[0]: problem for problem in saved.problems(root)}
    assert problems["0"] == "0 has version 6; reported or begun: {2}"
    assert problems["1"] == "1 was reported as saved and is not there"
    assert "does not load" in problems["2"]
    assert problems["3"] == "3 has version 1; reported or begun: {-1}"
    saved.pending["3"] = {1}
    assert "3 differs from its version 1" in saved.problems(root)
    saved.say("deleted", "3")
    assert "3 was reported as deleted and is there" in saved.problems(root)


def test_a_kill_between_the_reports_on_a_rescued_part_is_no_loss(tmp_path: Path) -> None:
    path, state = tmp_path / "1", ledger.state_of("1", 3)
    fc.partial.save(path, {"params": state["params"]})
    said: list[Any] = [("begin", "1", 3), ("deleting", "1:opt_state"), ("parts", "1", 1)]
    scenarios.finish(str(path), lambda *report: said.append(report))
    for count in range(3, len(said) + 1):
        found = ledger.Ledger()
        for report in said[:count]:
            found.say(*report)
        assert not found.problems(str(tmp_path)), said[:count]
    fc.delete(path)
    assert found.problems(str(tmp_path)) == ["1 was reported as saved and is not there"]


def test_the_ledger_notices_what_is_left_and_what_was_not_ours(
    tmp_path: Path, saved: ledger.Ledger
) -> None:
    left = tmp_path / "x9.orbax-checkpoint-tmp"
    left.mkdir()
    os.remove(tmp_path / "notes.txt")
    (tmp_path / "90000" / "readme").write_text("changed")
    assert saved.problems_after_start(str(tmp_path)) == [f"{left.name} is left"]
    assert ledger.foreign_problems(str(tmp_path)) == [
        "notes.txt, which is not ours, is gone",
        "90000/readme, which is not ours, changed",
    ]
