"""What the user of a run is told once: it goes on, but perhaps not as meant."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from google.protobuf.message import Message

from flax_ckpt.adapters import config as configs
from flax_ckpt.adapters import state as states
from flax_ckpt.errors import ConfigError, FormatError, StateError
from flax_ckpt.format import protos
from flax_ckpt.training import metadata, progress

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
        progress.logger.warning("the saved config cannot be compared with this run's: %s", error)
        return
    if changes:
        progress.logger.info("config changed since the checkpoint: %s", "; ".join(changes))


def other_count(step: int, event: str, state: Any) -> bool:
    """Warns if a state counts another number of updates than its step, and says whether."""
    counted = states.step_of(state)
    if counted is None or np.ndim(counted) or not states.is_whole(counted) or int(counted) == step:
        return False
    text = "step %d %s, but the state counts %d updates: %s"
    progress.logger.warning(text, step, event, counted, _ADVICE[event])
    return True


def numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as JSON has them; one that is no number is left out with a warning, not the state."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        try:
            array = metadata.numbers(name, value)
            found[str(name)] = array.item() if array.size == 1 else array.tolist()
        except StateError as error:
            progress.logger.warning("not saved: %s", error)
    return found


def no_metric(step: int, metric: str, metrics: Mapping[str, Any] | None) -> bool:
    """Warns if a step that is saved lacks the metric of the best, and says whether."""
    if isinstance((metrics or {}).get(metric), int | float):
        return False
    text = "step %d has no metric %r, so it cannot be the best; it has: %s"
    progress.logger.warning(text, step, metric, ", ".join(metrics or {}) or "none")
    return True


def told(writer: progress.Writer, step: int, scalars: Mapping[str, float]) -> None:
    """Tells a writer; one that fails is worth a warning, not the run."""
    try:
        writer.write_scalars(step, scalars)
    except Exception:
        progress.logger.warning("the writer refused the figures of step %d", step, exc_info=True)


def interrupted(step: int, is_saved: bool, latest: int | None) -> None:
    """Says what has become of the last state of a loop that was left in the middle."""
    if is_saved:
        progress.logger.info("interrupted: step %d, the last one seen, is saved", step)
        return
    text = "interrupted: step %d is not saved, since %s. The newest saved step is %s"
    why = "its arrays were donated, or it or the data have changed in place"
    progress.logger.warning(text, step, why, latest)


def leaving(step: int, is_saved: bool, directory: str) -> None:
    """Says that the process was told to end, and what is saved."""
    text = "this process was told to end: step %d %s saved, %s"
    progress.logger.warning(text, step, "is" if is_saved else "is NOT", directory)
