"""The keywords of `CheckpointCallback` as policies: what to save and what to keep."""

import dataclasses
import datetime
from typing import Any

from flax_ckpt.training import preservation_policies as preserving
from flax_ckpt.training import save_decision_policies as deciding
from flax_ckpt.training.best import Best
from flax_ckpt.training.preservation_policies import PreservationPolicy
from flax_ckpt.training.save_decision_policies import SaveDecisionPolicy, Step, Steps
from flax_ckpt.training.steps import require_at_least


@dataclasses.dataclass
class Timer:
    """A save-decision policy: so many seconds after the last save began, or the run.

    Attributes:
        secs: how many.
        since: when the run began.
    """

    secs: float
    since: datetime.datetime = dataclasses.field(init=False)

    def start(self, nsecs: int) -> None:
        """The run begins now, in ns since the epoch."""
        self.since = datetime.datetime.fromtimestamp(nsecs / 1e9, tz=datetime.UTC)

    def should_save(self, step: Step, previous_steps: Steps, *, context: Any) -> bool:
        """See :class:`SaveDecisionPolicy`."""
        # A save that is later than now was dated by another machine's clock.
        saved = [last.time for last in previous_steps[-1:] if last.time <= step.time]
        return (step.time - max([self.since, *saved])).total_seconds() >= self.secs


def saving(
    every_n_steps: int | None, every_secs: float | None, policy: SaveDecisionPolicy | None
) -> tuple[SaveDecisionPolicy, Timer]:
    """What is saved: what one of the arguments asks for, without any a step every 600 s."""
    require_at_least(1, every_n_steps=every_n_steps)
    if every_secs is not None and not every_secs > 0:
        raise ValueError(f"every_secs must be positive, got {every_secs}")
    timer = Timer(600.0 if every_secs is None else every_secs)
    multiples = None if every_n_steps is None else deciding.FixedIntervalPolicy(every_n_steps)
    asked: list[SaveDecisionPolicy] = [p for p in (policy, multiples) if p is not None]
    if every_secs is not None or not asked:
        asked.append(timer)
    return asked[0] if len(asked) == 1 else deciding.AnySavePolicy(asked), timer


def keeping(
    last: int | None, every_n: int | None, best: Best | None, policy: PreservationPolicy | None
) -> PreservationPolicy:
    """What is kept: what one of the arguments keeps; `policy` stands in for `last`."""
    require_at_least(1, keep_last=last, keep_every_n_steps=every_n)
    newest = preserving.LatestN(last) if policy is None else policy
    multiples = None if every_n is None else preserving.EveryNSteps(every_n)
    return preserving.AnyPreservationPolicy([p for p in (newest, multiples, best) if p is not None])


def require_choice(**choices: tuple[str, ...]) -> None:
    """Checks keywords: for each its value, and then those that it may have."""
    for name, (value, *allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
