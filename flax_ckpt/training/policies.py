"""When to save, and what to keep: pure functions of steps and a clock that is a parameter."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When to save: whatever of the two comes first, never the same step twice.

    Attributes:
        every_n_steps: save at its multiples.
        every_secs: save when so many seconds have passed since the last save began.

    >>> Schedule(every_n_steps=100).due(200, now=0.0, last_step=None, last_time=0.0)
    True
    >>> Schedule(every_secs=600).due(7, now=599.0, last_step=None, last_time=0.0)
    False
    """

    every_n_steps: int | None = None
    every_secs: float | None = None

    def __post_init__(self) -> None:
        if self.every_n_steps is not None and self.every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {self.every_n_steps}")
        if self.every_secs is not None and not self.every_secs > 0:
            raise ValueError(f"every_secs must be positive, got {self.every_secs}")

    def due(self, step: int, *, now: float, last_step: int | None, last_time: float) -> bool:
        """Whether to save.

        Args:
            step: number of completed updates.
            now: seconds, of a clock that does not go back.
            last_step: step of the last save that was begun or resumed from; None: none yet.
            last_time: when that was, or when the run began.
        """
        at_multiple = self.every_n_steps is not None and step % self.every_n_steps == 0
        in_time = self.every_secs is not None and now - last_time >= self.every_secs
        return step != last_step and (at_multiple or in_time)


def to_delete(steps: Sequence[int], keep_last: int | None) -> list[int]:
    """Steps that need not be kept; the latest always is.

    Args:
        steps: the committed steps, in order.
        keep_last: how many to keep; None: all.

    >>> to_delete([1, 2, 3, 4], keep_last=2)
    [1, 2]
    """
    return [] if keep_last is None else list(steps[: -max(keep_last, 1)])
