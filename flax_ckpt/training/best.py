"""Which steps of a run are the best, by what its steps say themselves.

best.ranked("/run")    # [1500, 500, 1000]: the best one first

In the custom metadata of a step stands which metric was meant, and which way:
`{"flax_ckpt": {"best": {"metric": "eval/loss", "mode": "min"}}}`. The newest word counts.
"""

from collections.abc import Iterable
from typing import Any, Literal, NamedTuple, Self

from flax_ckpt.errors import CheckpointNotFoundError, FormatError
from flax_ckpt.training import progress, steps
from flax_ckpt.training.metadata import CheckpointMetadata
from flax_ckpt.training.preservation_policies import Checkpoints


class Best(NamedTuple):
    """Which steps are the best, and how many of them to keep; a plain tuple works too.

    It is a preservation policy: one that keeps these, and fewer if fewer have the metric.

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

    @classmethod
    def of(cls, given: tuple[Any, ...]) -> Self:
        """What was given as `keep_best`.

        Raises:
            ValueError: it is no metric, mode and number of steps.
        """
        if isinstance(given, str) or not 0 < len(given) <= 3 or not isinstance(given[0], str):
            raise ValueError(f'keep_best is like ("eval/loss", "min", 2), got {given!r}')
        best = cls(*given)
        if best.mode in ("min", "max") and best.n >= 1:
            return best
        raise ValueError(f"keep_best needs the mode 'min' or 'max' and n of at least 1, got {best}")

    def ranked(self, checkpoints: Iterable[CheckpointMetadata[Any]]) -> list[int]:
        """Steps from the best to the worst, of equal ones the later first.

        A step without the metric, or whose metric is NaN or no number, is not among them.
        """
        sign = 1 if self.mode == "min" else -1
        numbers = {c.step: (c.metrics or {}).get(self.metric) for c in checkpoints}
        # NaN is not equal to itself.
        worth = {s: sign * n for s, n in numbers.items() if isinstance(n, int | float) and n == n}
        return sorted(worth, key=lambda step: (worth[step], -step))

    def should_preserve(self, checkpoints: Checkpoints, *, context: Any) -> list[bool]:
        """See :class:`PreservationPolicy`."""
        kept = self.ranked(checkpoints)[: self.n]
        return [checkpoint.step in kept for checkpoint in checkpoints]

    def to_metadata(self) -> dict[str, Any]:
        """Custom metadata of a step, which say what is best."""
        return {"flax_ckpt": {"best": {"metric": self.metric, "mode": self.mode}}}


def ranked(root: str) -> list[int]:
    """The committed steps that have the metric, the best first; of equal ones the later.

    Raises:
        CheckpointNotFoundError: no steps, or none says what is best, or none has the metric.
    """
    steps.require_steps(root)
    found = steps.settled(root, steps.naming)[::-1]
    there = ", ".join(sorted({name for step in found for name in step.metrics or {}}))
    there = f"The metrics of its steps: {there or 'none'}"
    best = next(filter(None, map(_wish, found)), None)
    if best is None:
        text = f"no step of {root} says by which metric it may be the best, as those of a"
        text += f" CheckpointCallback with keep_best= do. {there}. Give the number of a step"
        raise CheckpointNotFoundError(text)
    if order := best.ranked(found):
        return order
    text = f"no step of {root} has a number as {best.metric!r}, by which the best is chosen"
    raise CheckpointNotFoundError(f"{text}. {there}")


def _wish(found: CheckpointMetadata[None]) -> Best | None:
    """What a step says is best, if it does."""
    try:
        custom = found.custom_metadata
    except FileNotFoundError:  # the run has deleted it
        return None
    except FormatError as error:
        text = "whether step %d says what is best cannot be read: %s"
        progress.logger.warning(text, found.step, error)
        return None
    match custom:
        case {"flax_ckpt": {"best": {"metric": str(metric), "mode": "min" | "max" as mode}}}:
            return Best(metric, mode)
        case _:
            return None
