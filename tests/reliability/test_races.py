"""A sample of the campaign of readers, writers and donated steps at the same time."""

from torture import races

SEED = 20_261_122


def test_nothing_is_mixed_lost_or_refused_wrongly() -> None:
    found = races.campaign(0.01, SEED)
    assert [f"seed {SEED}: {problem}" for outcome in found for problem in outcome.wrong] == []
    assert all(outcome.runs > 0 for outcome in found)
    assert found[0].runs > 10, "hardly a step was saved"
