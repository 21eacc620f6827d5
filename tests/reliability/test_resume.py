"""A sample of the campaign of runs that are killed and resumed."""

from torture import resume

SEED = 20_261_122


def test_a_killed_run_ends_with_the_bits_of_one_that_was_not() -> None:
    (outcome,) = resume.campaign(0.01, SEED)
    assert [f"seed {SEED}: {problem}" for problem in outcome.wrong] == []
    assert outcome.runs >= 1
