"""Which step of a run is the best, by what its steps say themselves.

best.ranked("/run")    # [1500, 500, 1000]: the best one first

In the custom metadata of a step stands which metric was meant, and which way:
`{"flax_ckpt": {"best": {"metric": "eval/loss", "mode": "min"}}}`. The newest word counts.
"""

import math
from typing import Any

from flax_ckpt.errors import CheckpointNotFoundError
from flax_ckpt.training import steps
from flax_ckpt.training.metadata import CheckpointMetadata


def ranked(root: str) -> list[int]:
    """The committed steps that have the metric, the best first; of equal ones the later.

    Raises:
        CheckpointNotFoundError: no steps, or none says what is best, or none has the metric.
    """
    steps.require_steps(root)
    found = sorted(steps.naming(root).find_all(root), key=lambda step: -step.step)
    metrics = {step.step: step.metrics or {} for step in found}
    there = ", ".join(sorted({name for of_step in metrics.values() for name in of_step}))
    there = f"The metrics of its steps: {there or 'none'}"
    metric, mode = next(filter(None, map(_wish, found)), (None, None))
    if metric is None:
        raise CheckpointNotFoundError(
            f"no step of {root} says by which metric it may be the best, as those of a"
            f" CheckpointCallback with keep_best= do. {there}. Give the number of a step"
        )
    sign = 1 if mode == "min" else -1
    values = {step: _number(of_step.get(metric)) for step, of_step in metrics.items()}
    worth = {step: sign * value for step, value in values.items() if not math.isnan(value)}
    if not worth:
        raise CheckpointNotFoundError(
            f"no step of {root} has a number as {metric!r}, by which the best is chosen. {there}"
        )
    return sorted(worth, key=lambda step: worth[step])


def _wish(found: CheckpointMetadata[None]) -> tuple[str, str] | None:
    """The metric and the mode that a step names, if it does."""
    try:
        custom = found.custom_metadata
    except FileNotFoundError:  # the run has deleted it
        return None
    match custom:
        case {"flax_ckpt": {"best": {"metric": str(metric), "mode": "min" | "max" as mode}}}:
            return metric, mode
        case _:
            return None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan
