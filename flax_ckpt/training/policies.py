"""When to save, and what to keep: pure functions of steps and a clock that is a parameter."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol


@dataclasses.dataclass(frozen=True)
class Moment:
    """What a save policy decides by.

    Attributes:
        step: number of completed updates.
        now: seconds, of a clock that does not go back.
        last_step: step of the last save that was begun or resumed from; None: none yet.
        last_time: when that was, or when the run began.
    """

    step: int
    now: float
    last_step: int | None
    last_time: float


class SavePolicy(Protocol):
    """Whether to save at a step."""

    uses_clock: bool

    def should_save(self, moment: Moment) -> bool:
        """True to save now."""
        ...


@dataclasses.dataclass(frozen=True)
class EveryNSteps:
    """Saves at the multiples of `n`.

    >>> EveryNSteps(100).should_save(Moment(200, 0.0, None, 0.0))
    True
    """

    n: int
    uses_clock = False

    def __post_init__(self) -> None:
        if self.n < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {self.n}")

    def should_save(self, moment: Moment) -> bool:
        """See :class:`SavePolicy`."""
        return moment.step % self.n == 0 and moment.step != moment.last_step


@dataclasses.dataclass(frozen=True)
class EverySecs:
    """Saves when `secs` have passed since the last save began.

    >>> EverySecs(600).should_save(Moment(7, 599.0, None, 0.0))
    False
    """

    secs: float
    uses_clock = True

    def __post_init__(self) -> None:
        if not self.secs > 0:
            raise ValueError(f"every_secs must be positive, got {self.secs}")

    def should_save(self, moment: Moment) -> bool:
        """See :class:`SavePolicy`."""
        return moment.now - moment.last_time >= self.secs and moment.step != moment.last_step


def should_save(policies: Sequence[SavePolicy], moment: Moment) -> bool:
    """Whether any of the policies wants to save."""
    return any(policy.should_save(moment) for policy in policies)


def to_delete(steps: Sequence[int], keep_last: int | None) -> list[int]:
    """Steps that need not be kept; the latest always is.

    Args:
        steps: the committed steps, in order.
        keep_last: how many to keep; None: all.

    >>> to_delete([1, 2, 3, 4], keep_last=2)
    [1, 2]
    """
    return [] if keep_last is None else list(steps[: -max(keep_last, 1)])
