"""A sample of the campaign that damages checkpoints; `make torture` runs all of it."""

from __future__ import annotations

import random
from typing import Any

import pytest

from torture import damage
from torture.outcome import Outcome

SEED = random.randrange(1 << 32)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    found = damage.campaign(0.003, SEED)
    return {outcome.what: outcome for outcome in found}


def test_nothing_that_is_ours_comes_out_wrong(outcomes: dict[str, Outcome]) -> None:
    wrong = {what: outcome.wrong for what, outcome in outcomes.items() if outcome.wrong}
    assert not wrong, f"seed {SEED}: {wrong}"


def test_every_kind_of_damage_was_done(outcomes: dict[str, Outcome]) -> None:
    assert all(outcome.runs for outcome in outcomes.values())
    assert outcomes["ours, 8 devices: a byte flipped, one at a time"].runs > 200
    assert outcomes["ours, 1 device: two files of equal size swapped"].runs >= 3


def test_what_is_damaged_is_noticed(outcomes: dict[str, Outcome]) -> None:
    for kind in ("a byte flipped, one at a time", "of the step before, a chunk"):
        notes: dict[str, Any] = outcomes[f"ours, 1 device: {kind}"].notes
        assert notes["noticed"] > 10 * notes.get("harmless", 0)
