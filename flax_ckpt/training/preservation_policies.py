"""What to keep: pure functions of the steps that are there.

    policies = fc.training.preservation_policies
    policy = policies.AnyPreservationPolicy(
        [policies.LatestN(3), policies.BestN(get_metric_fn=lambda m: m["accuracy"], n=2)]
    )
    fc.training.Checkpointer(root, preservation_policy=policy)

They are asked after each save; the step just saved stays in any case. A user's own policy is any
object with `should_preserve`.
"""

import dataclasses
import datetime
import itertools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, runtime_checkable

from flax_ckpt.training.metadata import CheckpointMetadata
from flax_ckpt.training.steps import require_at_least

Checkpoints = Sequence[CheckpointMetadata[Any]]


@dataclasses.dataclass(kw_only=True)
class PreservationContext:
    """What is going on when a policy is asked: nothing so far."""


Context = PreservationContext


@runtime_checkable
class PreservationPolicy(Protocol):
    """Decides which steps are kept.

    >>> class TheFirst:
    ...     def should_preserve(self, checkpoints, *, context):
    ...         return [i == 0 for i in range(len(checkpoints))]
    >>> isinstance(TheFirst(), PreservationPolicy)
    True
    """

    def should_preserve(self, checkpoints: Checkpoints, *, context: Context) -> Sequence[bool]:
        """Whether to keep each.

        Args:
            checkpoints: the committed steps, in order.
            context: what is going on.

        Returns:
            As many as `checkpoints`.
        """
        ...


@dataclasses.dataclass
class PreserveAll:
    """Keeps all.

    >>> PreserveAll().should_preserve([], context=PreservationContext())
    []
    """

    def should_preserve(self, checkpoints: Checkpoints, *, context: Context) -> list[bool]:
        """See :class:`PreservationPolicy`."""
        return [True] * len(checkpoints)


@dataclasses.dataclass
class LatestN:
    """Keeps the latest.

    Attributes:
        n: how many; None: all.

    >>> LatestN(3)
    LatestN(n=3)
    """

    n: int | None = None

    def __post_init__(self) -> None:
        require_at_least(0, n=self.n)

    def should_preserve(self, checkpoints: Checkpoints, *, context: Context) -> list[bool]:
        """See :class:`PreservationPolicy`."""
        return _latest([True] * len(checkpoints), self.n)


@dataclasses.dataclass
class LatestDuration:
    """Keeps what is younger than a duration when the latest step is saved, and what follows it.

    Attributes:
        duration: the age.

    >>> LatestDuration(datetime.timedelta(hours=24)).duration.days
    1
    """

    duration: datetime.timedelta

    def should_preserve(self, checkpoints: Checkpoints, *, context: Context) -> list[bool]:
        """See :class:`PreservationPolicy`."""
        young = (checkpoints[-1].time - step.time <= self.duration for step in checkpoints)
        return list(itertools.accumulate(young, max))


@dataclasses.dataclass
class EveryNSeconds:
    """Keeps the first, and then each that was saved long enough after the last one kept.

    Attributes:
        interval_secs: how long.

    >>> EveryNSeconds(3600)
    EveryNSeconds(interval_secs=3600)
    """

    interval_secs: int

    def should_preserve(self, checkpoints: Checkpoints, *, context: Context) -> list[bool]:
        """See :class:`PreservationPolicy`."""
        return _spaced(
            [c.time for c in checkpoints], datetime.timedelta(seconds=self.interval_secs)
        )


@dataclasses.dataclass
class EveryNSteps:
    """Keeps steps at an interval.

    Attributes:
        interval_steps: number of steps.
        exact_interval: True: its multiples; False: the first, and then each that is so many steps
            or more after the last one kept.
        max_to_keep: how many of these, the latest; None: all.

    >>> EveryNSteps(1000)
    EveryNSteps(interval_steps=1000, exact_interval=True, max_to_keep=None)
    """

    interval_steps: int
    exact_interval: bool = True
    max_to_keep: int | None = None

    def __post_init__(self) -> None:
        require_at_least(1, interval_steps=self.interval_steps, max_to_keep=self.max_to_keep)

    def should_preserve(self, checkpoints: Checkpoints, *, context: Context) -> list[bool]:
        """See :class:`PreservationPolicy`."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        exact = [step % self.interval_steps == 0 for step in steps]
        kept = exact if self.exact_interval else _spaced(steps, self.interval_steps)
        return _latest(kept, self.max_to_keep)


@dataclasses.dataclass
class EveryNStepsClosest:
    """Keeps, for each multiple of a number of steps, the step that is closest, and the latest.

    Attributes:
        interval_steps: number of steps.
        max_to_keep: how many of these, the latest; None: all.

    >>> EveryNStepsClosest(1000, max_to_keep=5)
    EveryNStepsClosest(interval_steps=1000, max_to_keep=5)
    """

    interval_steps: int
    max_to_keep: int | None = None

    def __post_init__(self) -> None:
        require_at_least(1, interval_steps=self.interval_steps, max_to_keep=self.max_to_keep)

    def should_preserve(self, checkpoints: Checkpoints, *, context: Context) -> list[bool]:
        """See :class:`PreservationPolicy`."""
        multiples = [round(checkpoint.step / self.interval_steps) for checkpoint in checkpoints]

        def far(i: int) -> tuple[int, int]:  # of two that are as far, the later
            return abs(checkpoints[i].step - multiples[i] * self.interval_steps), -i

        groups = itertools.groupby(range(len(checkpoints)), key=multiples.__getitem__)
        kept = {min(group, key=far) for _, group in groups} | {len(checkpoints) - 1}
        return _latest([i in kept for i in range(len(checkpoints))], self.max_to_keep)


@dataclasses.dataclass
class CustomSteps:
    """Keeps given steps.

    Attributes:
        steps: their numbers.

    >>> CustomSteps([1, 10])
    CustomSteps(steps={1, 10})
    """

    steps: Collection[int]

    def __post_init__(self) -> None:
        self.steps = set(self.steps)

    def should_preserve(self, checkpoints: Checkpoints, *, context: Context) -> list[bool]:
        """See :class:`PreservationPolicy`."""
        return [checkpoint.step in self.steps for checkpoint in checkpoints]


@dataclasses.dataclass(kw_only=True)
class BestN:
    """Keeps the best by a metric; of equal ones the later, and NaN is worse than any number.

    Attributes:
        get_metric_fn: takes the metrics of a step and returns the number to compare.
        reverse: False: the greatest are the best; True: the least.
        n: how many; None: all.
        keep_checkpoints_without_metrics: whether steps without metrics are kept besides.

    >>> BestN(get_metric_fn=lambda metrics: metrics["loss"], reverse=True, n=2).n
    2
    """

    get_metric_fn: Callable[[Any], float]
    reverse: bool = False
    n: int | None = None
    keep_checkpoints_without_metrics: bool = True

    def __post_init__(self) -> None:
        require_at_least(0, n=self.n)

    def should_preserve(self, checkpoints: Checkpoints, *, context: Context) -> list[bool]:
        """See :class:`PreservationPolicy`."""
        if self.n is None or not 0 < self.n < len(checkpoints):
            return [self.n != 0] * len(checkpoints)
        measured = [i for i, c in enumerate(checkpoints) if c.metrics is not None]
        best = set(sorted(measured, key=lambda i: self._worth(checkpoints[i].metrics))[-self.n :])
        unmeasured = self.keep_checkpoints_without_metrics
        return [i in best or (unmeasured and c.metrics is None) for i, c in enumerate(checkpoints)]

    def _worth(self, metrics: Any) -> tuple[bool, float]:
        value = float(self.get_metric_fn(metrics))
        return not math.isnan(value), -value if self.reverse else value


@dataclasses.dataclass
class AnyPreservationPolicy:
    """Keeps what one of several policies keeps.

    Attributes:
        policies: all are asked.

    >>> AnyPreservationPolicy([LatestN(3), EveryNSteps(1000)]).policies[0]
    LatestN(n=3)
    """

    policies: Sequence[PreservationPolicy]

    def should_preserve(self, checkpoints: Checkpoints, *, context: Context) -> list[bool]:
        """See :class:`PreservationPolicy`."""
        kept = [policy.should_preserve(checkpoints, context=context) for policy in self.policies]
        return [any(each[i] for each in kept) for i in range(len(checkpoints))]


def _latest(kept: list[bool], n: int | None) -> list[bool]:
    """Of those kept, the last `n`."""
    counts = [*itertools.accumulate(reversed(kept))][::-1]  # of those kept, from each on
    return [keep and (n is None or count <= n) for keep, count in zip(kept, counts, strict=True)]


def _spaced(values: Sequence[Any], interval: Any) -> list[bool]:
    """The first, and each that is `interval` or more after the last one kept."""
    kept: list[bool] = []
    last: Any = None
    for value in values:
        kept.append(last is None or value - last >= interval)
        last = value if kept[-1] else last
    return kept
