"""When to save: pure functions of the step, of what was saved, and of what is going on.

    policies = fc.training.save_decision_policies
    policy = policies.AnySavePolicy(
        [policies.FixedIntervalPolicy(1000), policies.PreemptionCheckpointingPolicy()]
    )
    fc.training.Checkpointer(root, save_decision_policy=policy)

The clock is a parameter: the `time` of the step in question is now, that of an earlier one is when
its save began. A user's own policy is any object with `should_save`.
"""

import dataclasses
import datetime
from collections.abc import Container, Sequence
from typing import Any, Protocol, runtime_checkable

from flax_ckpt.options import MultiprocessingOptions
from flax_ckpt.training.metadata import CheckpointMetadata
from flax_ckpt.training.steps import require_at_least

Step = CheckpointMetadata[Any]
Steps = Sequence[CheckpointMetadata[Any]]


@dataclasses.dataclass(kw_only=True)
class DecisionContext:
    """What is going on when a policy is asked.

    Attributes:
        is_saving_in_progress: whether an earlier save still runs in the background.
        reached_preemption: whether the cluster has announced that it will end the processes, and
            this is the step at which all of them are to save.
        multiprocessing_options: which processes take part.
    """

    is_saving_in_progress: bool
    reached_preemption: bool
    multiprocessing_options: MultiprocessingOptions


@runtime_checkable
class SaveDecisionPolicy(Protocol):
    """Decides whether a step is saved.

    With several processes the primary one asks, and tells the others, unless the policy is one of
    those here that need no more than the number of the step.

    >>> class PowersOfTwo:
    ...     def should_save(self, step, previous_steps, *, context):
    ...         return step.step.bit_count() == 1
    >>> isinstance(PowersOfTwo(), SaveDecisionPolicy)
    True
    """

    def should_save(self, step: Step, previous_steps: Steps, *, context: DecisionContext) -> bool:
        """Whether to save.

        Args:
            step: the one in question; its `time` is now.
            previous_steps: those that were saved, in order, with the one that is being saved.
            context: what is going on.
        """
        ...


@dataclasses.dataclass
class FixedIntervalPolicy:
    """Saves at the multiples of a number of steps.

    Attributes:
        interval: number of steps.

    >>> FixedIntervalPolicy(0)
    Traceback (most recent call last):
    ValueError: interval must be at least 1, got 0
    """

    interval: int

    def __post_init__(self) -> None:
        require_at_least(1, interval=self.interval)

    def should_save(self, step: Step, previous_steps: Steps, *, context: DecisionContext) -> bool:
        """See :class:`SaveDecisionPolicy`."""
        return step.step % self.interval == 0


@dataclasses.dataclass
class SpecificStepsPolicy:
    """Saves at given steps.

    Attributes:
        steps: their numbers.

    >>> SpecificStepsPolicy({1, 10, 100})
    SpecificStepsPolicy(steps={1, 10, 100})
    """

    steps: Container[int]

    def should_save(self, step: Step, previous_steps: Steps, *, context: DecisionContext) -> bool:
        """See :class:`SaveDecisionPolicy`."""
        return step.step in self.steps


@dataclasses.dataclass(kw_only=True)
class ContinuousCheckpointingPolicy:
    """Saves as often as possible: whenever no other save runs.

    Attributes:
        minimum_interval_secs: least time between the last save and this one; None: none.

    >>> ContinuousCheckpointingPolicy(minimum_interval_secs=600)
    ContinuousCheckpointingPolicy(minimum_interval_secs=600)
    """

    minimum_interval_secs: int | None = None

    def should_save(self, step: Step, previous_steps: Steps, *, context: DecisionContext) -> bool:
        """See :class:`SaveDecisionPolicy`."""
        idle, least = not context.is_saving_in_progress, self.minimum_interval_secs
        if not idle or not previous_steps or least is None:
            return idle
        return step.time - previous_steps[-1].time >= datetime.timedelta(seconds=least)


@dataclasses.dataclass
class PreemptionCheckpointingPolicy:
    """Saves when the cluster has announced that it will end the processes.

    JAX learns of it from SIGTERM, if `jax.distributed` runs; ask at every step.

    >>> PreemptionCheckpointingPolicy()
    PreemptionCheckpointingPolicy()
    """

    def should_save(self, step: Step, previous_steps: Steps, *, context: DecisionContext) -> bool:
        """See :class:`SaveDecisionPolicy`."""
        return context.reached_preemption


@dataclasses.dataclass
class InitialSavePolicy:
    """Saves if nothing was saved before.

    >>> InitialSavePolicy()
    InitialSavePolicy()
    """

    def should_save(self, step: Step, previous_steps: Steps, *, context: DecisionContext) -> bool:
        """See :class:`SaveDecisionPolicy`."""
        return not previous_steps


@dataclasses.dataclass
class AnySavePolicy:
    """Saves if one of several policies says so.

    Attributes:
        policies: asked in order, until one says so.

    >>> AnySavePolicy([InitialSavePolicy(), FixedIntervalPolicy(100)]).policies[0]
    InitialSavePolicy()
    """

    policies: Sequence[SaveDecisionPolicy]

    def should_save(self, step: Step, previous_steps: Steps, *, context: DecisionContext) -> bool:
        """See :class:`SaveDecisionPolicy`."""
        return any(p.should_save(step, previous_steps, context=context) for p in self.policies)


# What Orbax does when nothing else is said.
AS_OFTEN_AS_POSSIBLE: SaveDecisionPolicy = AnySavePolicy(
    [InitialSavePolicy(), ContinuousCheckpointingPolicy(), PreemptionCheckpointingPolicy()]
)


def is_same_everywhere(policy: SaveDecisionPolicy) -> bool:
    """Whether every process comes to the same decision by itself."""
    if type(policy) is AnySavePolicy:
        return all(map(is_same_everywhere, policy.policies))
    same = FixedIntervalPolicy, SpecificStepsPolicy, PreemptionCheckpointingPolicy
    return type(policy) in same  # what is derived from one of them may ask for more
