"""What a campaign found, and how it is written into docs/reliability.md."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

_CELL = 200  # characters that a cell may have


@dataclasses.dataclass
class Outcome:
    """One line of the table.

    Attributes:
        what: what was done to how much: "each byte flipped, one at a time".
        runs: how often.
        wrong: a line for each run that did not end as it must, enough to run it again.
        notes: figures to show beside it: how many were noticed, a histogram.
    """

    what: str
    runs: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list[str])
    notes: dict[str, object] = dataclasses.field(default_factory=dict[str, object])

    def check(self, good: bool, problem: str) -> None:
        """Counts a run, and takes note of the problem if it did not end well."""
        self.runs += 1
        if not good:
            self.wrong.append(problem)


def as_markdown(outcomes: Sequence[Outcome]) -> str:
    """The table, and beneath it what went wrong."""
    below: list[str] = []
    lines = ["| what | runs | wrong | |", "|---|---:|---:|---|"]
    for outcome in outcomes:
        notes = "; ".join(f"{name}: {value}" for name, value in outcome.notes.items())
        shown = notes if len(notes) < _CELL else "see below"
        lines.append(f"| {outcome.what} | {outcome.runs:,} | {len(outcome.wrong):,} | {shown} |")
        below += ["", f"{outcome.what[0].upper()}{outcome.what[1:]}: {notes}."] * (shown != notes)
    lines += below
    for outcome in outcomes:
        if outcome.wrong:
            lines += ["", f"Wrong in “{outcome.what}”:", ""]
            lines += [f"- {problem}" for problem in outcome.wrong[:20]]
    return "\n".join(lines)
