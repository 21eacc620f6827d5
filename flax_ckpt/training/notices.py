"""What the user of a run is told once: it goes on, but perhaps not as meant."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf.message import Message

from flax_ckpt.adapters import config as configs
from flax_ckpt.adapters import state as states
from flax_ckpt.errors import ConfigError, FormatError
from flax_ckpt.format import protos

logger = logging.getLogger("flax_ckpt")

_ADVICE = {
    "was restored": "if it was saved under the index of its last update, go on from"
    " `int(state.step)`",
    "is saved": "pass the number of completed updates, `i + 1` in `for i in range(…)`",
}


def config_changes(saved: str | None, current: Message | None) -> None:
    """Tells what differs between the config that was saved, as text, and this run's."""
    if saved is None or current is None:
        return
    try:
        changes = configs.diff(protos.text_to_message(saved), current)
    except (FormatError, ConfigError) as error:
        logger.warning("the saved config cannot be compared with this run's: %s", error)
        return
    if changes:
        logger.info("config changed since the checkpoint: %s", "; ".join(changes))


def other_count(step: int, event: str, state: Any) -> bool:
    """Warns if a state counts another number of updates than its step, and says whether."""
    counted = states.step_of(state)
    if counted is None or np.ndim(counted) or not states.is_whole(counted) or int(counted) == step:
        return False
    text = "step %d %s, but the state counts %d updates: %s"
    logger.warning(text, step, event, counted, _ADVICE[event])
    return True


def no_metric(step: int, metric: str, metrics: Mapping[str, Any] | None) -> bool:
    """Warns if a step that is saved lacks the metric of the best, and says whether."""
    if metric in (metrics or {}):
        return False
    text = "step %d has no metric %r, so it cannot be the best; it has: %s"
    logger.warning(text, step, metric, ", ".join(metrics or {}) or "none")
    return True
