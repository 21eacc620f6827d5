"""The callback of a training loop: saves in the background, resumes, keeps what is to be kept.

with fc.CheckpointCallback(workdir / "checkpoints", every_n_steps=500, config=config) as ckpt:
    state, step = ckpt.restore_or_init(abstract_state, init=init_fn)
    while step < config.num_steps:
        state, metrics = train_step(state, next(batches))
        step += 1
        ckpt.on_step_end(step, state, metrics=metrics)
"""

from __future__ import annotations

import dataclasses
import datetime
import logging
import os
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, TypeVar

import jax
import numpy as np

from flax_ckpt.adapters import config as configs
from flax_ckpt.adapters import state as states
from flax_ckpt.context import Context, resolve
from flax_ckpt.errors import ConfigError, FormatError, SaveFailedError, StateError
from flax_ckpt.format import protos
from flax_ckpt.training import metadata, steps
from flax_ckpt.training import restore as restoring
from flax_ckpt.training import save_decision_policies as deciding
from flax_ckpt.training.preservation_policies import LatestN
from flax_ckpt.training.save_decision_policies import SaveDecisionPolicy, Step, Steps
from flax_ckpt.training.saver import Saver, step_number

S = TypeVar("S")
logger = logging.getLogger("flax_ckpt")


class CheckpointCallback(Generic[S]):
    """Saves the state of a training loop; use it in a `with` block, or call `close`.

    A step is the number of completed updates: it names the directory, equals the `step` of the
    state, and is where a resumed loop goes on. A save that is due waits for the one in flight.

    Args:
        directory: root of the run's checkpoints; made when the first one is saved.
        every_n_steps: save at the multiples of this.
        every_secs: save when so many seconds have passed since the last save began. With neither
            of the two: every 600 s.
        keep_last: how many of the newest steps to keep; None: all.
        config: the run's config, saved with each step: a `ConfigDict`, dict, dataclass, or a
            protocol-buffer message.
        at_end: whether leaving the `with` block without an exception, or `close`, saves the last
            state seen if it is not saved yet.
        on_error: "raise": a save that failed in the background raises at the next call; "warn":
            it is logged, and training goes on.
        context: options of all saves and restores; None: those active now.

    Raises:
        InvalidLayoutError: `directory` is one checkpoint, not the root of a run.
        ConfigError: lists every key of the config that cannot be saved.

    >>> import tempfile, flax_ckpt as fc, jax.numpy as jnp
    >>> root = tempfile.mkdtemp()
    >>> with fc.CheckpointCallback(root, every_n_steps=2) as ckpt:
    ...     state, step = ckpt.restore_or_init({"params": jnp.zeros(2)})
    ...     for step in range(step + 1, 4):
    ...         state = {"params": state["params"] + 1}
    ...         print(step, ckpt.on_step_end(step, state))
    1 False
    2 True
    3 False
    >>> ckpt.latest_step
    3
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        every_n_steps: int | None = None,
        every_secs: float | None = None,
        keep_last: int | None = 3,
        config: Any = None,
        at_end: bool = True,
        on_error: Literal["raise", "warn"] = "raise",
        context: Context | None = None,
    ) -> None:
        if on_error not in ("raise", "warn") or (keep_last is not None and keep_last < 1):
            raise ValueError(
                "on_error must be 'raise' or 'warn' and keep_last at least 1 or None, got"
                f" {on_error!r} and {keep_last!r}"
            )
        self._at_end = at_end
        self._on_error = on_error
        self._context = resolve(context)
        self._config = None if config is None else configs.to_message(config)
        save_policy, self._timer = _schedule(every_n_steps, every_secs)
        self._saver = Saver(directory, self._context, save_policy, LatestN(keep_last))
        self.directory = self._saver.directory
        self._timer.start(self._saver.now())
        self._decided: tuple[int, bool] | None = None
        self._seen: tuple[int, S, Mapping[str, Any] | None] | None = None
        self._after = -1
        self._begun = self._warned = self._superseded = False

    @property
    def latest_step(self) -> int | None:
        """The newest committed step, from what is on disk; None if there is none."""
        return max(steps.committed(self.directory), default=None)

    def restore_or_init(
        self,
        like: S,
        *,
        init: Callable[[], S] | None = None,
        step: int | Literal["latest"] | None = "latest",
    ) -> tuple[S, int]:
        """The state to go on with, and the number of updates it has behind it.

        Args:
            like: a state of the wanted type, concrete or abstract.
            init: makes the first state; called only if there is nothing to restore.
            step: which step to resume from.

        Returns:
            The state and its step: restored, or `init()`, or `like` itself, and 0.

        Raises:
            StateError: nothing to restore, `like` is abstract, and there is no `init`.
            CheckpointNotFoundError: there is no such step.
            TreeMismatchError: the checkpoint does not fit `like`.
            DamagedCheckpointError: the step asked for, or every one, is damaged.
        """
        self._saver.clean()
        if not steps.committed(self.directory) and step in ("latest", None):
            if init is not None:
                return init(), 0
            leaves = jax.tree.leaves(states.split(like))
            if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
                raise StateError(
                    f"{self.directory} has no step to restore, and the state given is abstract:"
                    " pass init=, a function that makes the first state"
                )
            return like, 0
        out = restoring.restore(self.directory, like, step=step, context=self._context)
        assert out.step is not None
        self._log_config_changes(out.config_text)
        _warn_of_other_count(out.step, "was restored", out.state)
        self._begin(out.step)
        self._timer.start(self._saver.now())
        return out.state, out.step

    def _begin(self, after: int) -> None:
        """The run goes on after this step: what is later on disk is not of it."""
        self._after, self._begun = after, True
        self._saver.begin(after)

    def _log_config_changes(self, saved: str | None) -> None:
        if self._config is None or saved is None:
            return
        try:
            changes = configs.diff(protos.text_to_message(saved), self._config)
        except (FormatError, ConfigError) as error:
            logger.warning("the saved config cannot be compared with this run's: %s", error)
            return
        if changes:
            logger.info("config changed since the checkpoint: %s", "; ".join(changes))

    def should_save(self, step: int) -> bool:
        """Whether `on_step_end` will save at this step; decided once per step."""
        if not self._begun:
            self._begin(step_number(step) - 1)
        if self._decided is None or self._decided[0] != step:
            self._decided = step, self._saver.is_due(step)
        return self._decided[1]

    def on_step_end(
        self, step: int, state: S, *, metrics: Mapping[str, Any] | None = None, force: bool = False
    ) -> bool:
        """Call it after each update; saves if one is due.

        When it returns, the state may be donated to the next train step.

        Args:
            step: number of completed updates.
            state: after them.
            metrics: numbers to save with the step; fetched from the device only if it is saved.
            force: save in any case, unless this step is saved already.

        Returns:
            Whether a save began.

        Raises:
            SaveFailedError: an earlier save failed in the background.
        """
        self._guard(self._saver.notice)
        self._seen = step, state, metrics
        if not (self.should_save(step) or force) or self._is_saved(step):
            return False
        self._save(step, state, metrics)
        return True

    __call__ = on_step_end

    def _is_saved(self, step: int) -> bool:
        return any(saved.step == step for saved in self._saver.history)

    def _save(self, step: int, state: S, metrics: Mapping[str, Any] | None) -> None:
        step = step_number(step)
        self.wait()
        if not self._superseded:
            if self._saver.hosts.is_primary:
                steps.supersede(self.directory, self._after)
            self._saver.hosts.barrier("superseded")
            self._superseded = True
        parts = {name: tree for name, tree in states.split(state).items() if tree is not None}
        trees = list(parts)
        if self._config is not None:
            parts[restoring.CONFIG] = self._config
        if metrics is not None:
            metrics = {name: metadata.number(name, value) for name, value in metrics.items()}
        self._saver.save(step, parts, trees, force=True, metrics=metrics)
        self._warned = self._warned or _warn_of_other_count(step, "is saved", state)

    def wait(self) -> None:
        """Returns when the save in flight is durable.

        Raises:
            SaveFailedError: it failed.
        """
        self._guard(self._saver.wait)

    def _guard(self, wait: Callable[[], None]) -> None:
        """Waits, and raises or logs the failure of a save."""
        try:
            wait()
        except SaveFailedError as failure:
            if self._on_error == "raise":
                raise
            logger.warning("%s", failure, exc_info=failure.__cause__)

    def close(self) -> None:
        """Saves the last state seen if `at_end` and it is not saved yet; waits for all saves.

        Raises:
            SaveFailedError: a save failed.
        """
        failure: SaveFailedError | None = None
        try:
            self.wait()
        except SaveFailedError as error:
            failure = error  # told when the last state is safe
        if self._seen is not None and self._at_end and not self._is_saved(self._seen[0]):
            self._save(*self._seen)
            self.wait()
        self._seen = None
        if failure is not None:
            raise failure

    def __enter__(self) -> CheckpointCallback[S]:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if error is None:
            self.close()
            return
        try:
            self.wait()  # the state may be torn: it is not saved
        except SaveFailedError as failure:
            error.add_note(str(failure))

    def __repr__(self) -> str:
        state = "saving" if self._saver.is_saving else "idle"
        return f"CheckpointCallback({self.directory!r}, latest_step={self.latest_step}, {state})"


_NEVER = datetime.datetime.max.replace(tzinfo=datetime.UTC)


@dataclasses.dataclass
class _Timer:
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

    def should_save(self, step: Step, previous_steps: Steps, *, context: Any) -> bool:
        last = previous_steps[-1].time if previous_steps else self.since
        return (step.time - max(last, self.since)).total_seconds() >= self.secs


def _schedule(
    every_n_steps: int | None, every_secs: float | None
) -> tuple[SaveDecisionPolicy, _Timer]:
    steps.require_at_least(1, every_n_steps=every_n_steps)
    if every_secs is not None and not every_secs > 0:
        raise ValueError(f"every_secs must be positive, got {every_secs}")
    timer = _Timer(600.0 if every_secs is None else every_secs)
    if every_n_steps is None:
        return timer, timer
    fixed = deciding.FixedIntervalPolicy(every_n_steps)
    return (fixed if every_secs is None else deciding.AnySavePolicy([fixed, timer])), timer


_ADVICE = {
    "was restored": "if it was saved under the index of its last update, go on from"
    " `int(state.step)`",
    "is saved": "pass the number of completed updates, `i + 1` in `for i in range(…)`",
}


def _warn_of_other_count(step: int, event: str, state: Any) -> bool:
    """Warns if a state counts another number of updates than its step, and says whether."""
    counted = states.step_of(state)
    if counted is None or np.ndim(counted) or int(counted) == step:
        return False
    text = "step %d %s, but the state counts %d updates: %s"
    logger.warning(text, step, event, counted, _ADVICE[event])
    return True
