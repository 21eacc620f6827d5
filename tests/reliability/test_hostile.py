"""A sample of the crafted checkpoints of `torture/hostile.py`, another one in each run.

How long a call may take is for the campaign; here it has to come back.
"""

import random

from torture.hostile import HANGS, campaign


def test_crafted_checkpoints_are_refused_or_harmless() -> None:
    outcomes = campaign(0.002, random.randrange(1 << 32), HANGS)
    for outcome in outcomes:
        assert not outcome.wrong, "\n".join(outcome.wrong)
        assert outcome.runs >= 1, outcome.what
    assert sum(outcome.runs for outcome in outcomes) >= 50
