"""The keywords of `CheckpointCallback` as policies: what to save, what to keep, which is best."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

from flax_ckpt.training import preservation_policies as preserving
from flax_ckpt.training import save_decision_policies as deciding
from flax_ckpt.training.metadata import CheckpointMetadata
from flax_ckpt.training.preservation_policies import Checkpoints, PreservationPolicy
from flax_ckpt.training.save_decision_policies import SaveDecisionPolicy
from flax_ckpt.training.steps import require_at_least

_NEVER = datetime.datetime.max.replace(tzinfo=datetime.UTC)


class Best(NamedTuple):
    """Which steps are the best, and how many of them to keep; a plain tuple works too.

    Attributes:
        metric: its name among those given to `on_step_end`.
        mode: "min" or "max": which is better.
        n: how many to keep.

    >>> Best("eval/loss")
    Best(metric='eval/loss', mode='min', n=1)
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    n: int = 1

    def ranked(self, checkpoints: Iterable[CheckpointMetadata[Any]]) -> list[int]:
        """Steps from the best to the worst, of equal ones the later first.

        A step without the metric, or whose metric is NaN or no number, is not among them.
        """
        sign = 1 if self.mode == "min" else -1
        worth = {c.step: sign * self._value(c.metrics) for c in checkpoints}
        candidates = [step for step, value in worth.items() if not math.isnan(value)]
        return sorted(candidates, key=lambda step: (worth[step], -step))

    def _value(self, metrics: dict[str, Any] | None) -> float:
        value = (metrics or {}).get(self.metric)
        return value if isinstance(value, int | float) else math.nan


def checked_best(best: tuple[Any, ...]) -> Best:
    """The `keep_best` that was given.

    Raises:
        ValueError: it is no metric, mode and number of steps.
    """
    if isinstance(best, str) or not 0 < len(best) <= 3 or not isinstance(best[0], str):
        raise ValueError(f'keep_best is like ("eval/loss", "min", 2), got {best!r}')
    best = Best(*best)
    if best.mode not in ("min", "max") or best.n < 1:
        raise ValueError(f"keep_best needs the mode 'min' or 'max' and n of at least 1, got {best}")
    return best


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """A preservation policy: the `n` best steps; fewer if fewer have the metric."""

    best: Best

    def should_preserve(self, checkpoints: Checkpoints, *, context: Any) -> list[bool]:
        """See :class:`PreservationPolicy`."""
        kept = self.best.ranked(checkpoints)[: self.best.n]
        return [checkpoint.step in kept for checkpoint in checkpoints]


@dataclasses.dataclass
class Timer:
    """A save-decision policy: so many seconds after the last save began, or the run.

    Attributes:
        secs: how many.
        since: when the run began.
    """

    secs: float
    since: datetime.datetime = _NEVER

    def start(self, nsecs: int) -> None:
        """The run begins now, in ns since the epoch."""
        self.since = datetime.datetime.fromtimestamp(nsecs / 1e9, tz=datetime.UTC)

    def should_save(
        self, step: deciding.Step, previous_steps: deciding.Steps, *, context: Any
    ) -> bool:
        """See :class:`SaveDecisionPolicy`."""
        last = previous_steps[-1].time if previous_steps else self.since
        return (step.time - max(last, self.since)).total_seconds() >= self.secs


def saving(
    every_n_steps: int | None, every_secs: float | None, policy: SaveDecisionPolicy | None
) -> tuple[SaveDecisionPolicy, Timer]:
    """What is saved: what one of the arguments asks for, without any a step every 600 s."""
    require_at_least(1, every_n_steps=every_n_steps)
    if every_secs is not None and not every_secs > 0:
        raise ValueError(f"every_secs must be positive, got {every_secs}")
    timer = Timer(600.0 if every_secs is None else every_secs)
    asked: list[SaveDecisionPolicy] = [] if policy is None else [policy]
    if every_n_steps is not None:
        asked.append(deciding.FixedIntervalPolicy(every_n_steps))
    if every_secs is not None or not asked:
        asked.append(timer)
    return asked[0] if len(asked) == 1 else deciding.AnySavePolicy(asked), timer


def keeping(
    last: int | None,
    every_n_steps: int | None,
    best: Best | None,
    policy: PreservationPolicy | None,
) -> PreservationPolicy:
    """What is kept: what one of the arguments keeps; `policy` stands in for `last`."""
    require_at_least(1, keep_last=last, keep_every_n_steps=every_n_steps)
    asked: list[PreservationPolicy] = [preserving.LatestN(last) if policy is None else policy]
    if every_n_steps is not None:
        asked.append(preserving.EveryNSteps(every_n_steps))
    if best is not None:
        asked.append(KeepBest(best))
    return asked[0] if len(asked) == 1 else preserving.AnyPreservationPolicy(asked)


def require_choice(**choices: tuple[str, ...]) -> None:
    """Checks keywords: for each its value, and then those that it may have."""
    for name, (value, *allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")
