"""The callback of a training loop: saves in the background, resumes, keeps what is to be kept.

with fc.CheckpointCallback(workdir / "checkpoints", every_n_steps=500, config=config) as ckpt:
    state, step = ckpt.restore_or_init(abstract_state, init=init_fn)
    while step < config.num_steps:
        state, metrics = train_step(state, next(batches))
        step += 1
        ckpt.on_step_end(step, state, metrics=metrics)
"""

from __future__ import annotations

import logging
import operator
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Generic, Literal, TypeVar

import jax
import numpy as np

from flax_ckpt import _save
from flax_ckpt._async import AsyncResponse
from flax_ckpt.adapters import config as configs
from flax_ckpt.adapters import state as states
from flax_ckpt.context import Context, resolve
from flax_ckpt.errors import ConfigError, FormatError, SaveFailedError, StateError
from flax_ckpt.format import names, protos
from flax_ckpt.leaves import dtypes
from flax_ckpt.storage import hosts, kinds
from flax_ckpt.storage.paths import local_path
from flax_ckpt.training import policies, progress, steps
from flax_ckpt.training import restore as restoring

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
        self.directory = local_path(directory)
        kinds.require_root(self.directory)
        self._schedule = _schedule(every_n_steps, every_secs)
        self._keep_last = keep_last
        self._config = None if config is None else configs.to_message(config)
        self._at_end = at_end
        self._on_error = on_error
        self._context = resolve(context)
        self._response: AsyncResponse[None] | None = None
        self._saving: int | None = None
        self._last_step: int | None = None
        self._last_time = time.monotonic()
        self._decided: tuple[int, bool] | None = None
        self._seen: tuple[int, S, Mapping[str, Any] | None] | None = None
        self._resumed_from: int | None = None
        self._warned = self._superseded = False

    @property
    def _is_primary(self) -> bool:
        return hosts.is_primary(self._context.multiprocessing)

    @property
    def latest_step(self) -> int | None:
        """The newest committed step, from what is on disk; None if there is none."""
        found = steps.committed(self.directory)
        return found[-1] if found else None

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
        if self._is_primary:
            steps.clean(self.directory)
        if not steps.committed(self.directory) and step in ("latest", None):
            state = like if init is None else init()
            if init is None:
                _require_concrete(like, self.directory)
            return state, 0
        out = restoring.restore(self.directory, like, step=step, context=self._context)
        assert out.step is not None
        self._log_config_changes(out.config_text)
        self._resumed_from = self._last_step = out.step
        self._last_time = time.monotonic()
        return out.state, out.step

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
        if self._decided is None or self._decided[0] != step:
            due = self._schedule.due(
                step, now=time.monotonic(), last_step=self._last_step, last_time=self._last_time
            )
            self._decided = step, due
        return self._decided[1]

    def on_step_end(
        self,
        step: int,
        state: S,
        *,
        metrics: Mapping[str, Any] | None = None,
        force: bool = False,
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
        if self._response is not None and self._response.done():
            self.wait()
        self._seen = step, state, metrics
        if not (self.should_save(step) or force) or step == self._last_step:
            return False
        self._save(step, state, metrics)
        return True

    __call__ = on_step_end

    def _save(self, step: int, state: S, metrics: Mapping[str, Any] | None) -> None:
        began = time.perf_counter()
        step = _step_number(step)
        self.wait()
        if not self._superseded and self._is_primary:
            after = step - 1 if self._resumed_from is None else self._resumed_from
            steps.supersede(self.directory, after)
        self._superseded = True
        parts = {name: tree for name, tree in states.split(state).items() if tree is not None}
        trees, nbytes = list(parts), progress.nbytes(parts)
        if self._config is not None:
            parts[restoring.CONFIG] = self._config
        if metrics is not None:
            parts[names.METRICS] = {name: _number(name, value) for name, value in metrics.items()}
        path = steps.path_of(self.directory, step)
        self._response = _save.start(path, parts, self._context, trees=trees, internal=True)
        self._saving = self._last_step = step
        self._last_time = time.monotonic()
        self._warn_of_other_step(step, state)
        blocked = time.perf_counter() - began

        def finish(_: None) -> None:
            seconds = time.perf_counter() - began
            logger.info("saved %s", progress.line(path, step, nbytes, seconds, blocked))
            if self._is_primary:
                _retain(self.directory, self._keep_last, step)

        self._response.on_complete(finish)

    def _warn_of_other_step(self, step: int, state: S) -> None:
        counted = states.step_of(state)
        if self._warned or counted is None or np.ndim(counted) or int(counted) == step:
            return
        self._warned = True
        logger.warning(
            "step %d is saved, but the state counts %d updates: pass the number of completed"
            " updates, `i + 1` in `for i in range(…)`",
            step,
            int(counted),
        )

    def wait(self) -> None:
        """Returns when the save in flight is durable.

        Raises:
            SaveFailedError: it failed.
        """
        response, step = self._response, self._saving
        if response is None:
            return
        try:
            response.result()
        except Exception as error:
            self._response = None
            fate = "was saved, but what follows failed" if response.completed else "was not saved"
            if not response.completed:
                self._last_step = None
            failure = SaveFailedError(
                f"{response.what} (step {step}) {fate}: {type(error).__name__}: {error}",
                path=steps.path_of(self.directory, step or 0),
                step=step,
            )
            if self._on_error == "raise":
                raise failure from error
            logger.warning("%s", failure, exc_info=error)
        self._response = None

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
        if self._seen is not None and self._at_end and self._seen[0] != self._last_step:
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
        state = f"saving step {self._saving}" if self._response is not None else "idle"
        return f"CheckpointCallback({self.directory!r}, latest_step={self.latest_step}, {state})"


def _schedule(every_n_steps: int | None, every_secs: float | None) -> policies.Schedule:
    if every_n_steps is None and every_secs is None:
        every_secs = 600.0
    if every_secs is not None and jax.process_count() > 1:
        raise StateError(
            "with several processes the time of a save must be agreed, which this release does"
            " not do: give every_n_steps and no every_secs"
        )
    return policies.Schedule(every_n_steps, every_secs)


def _require_concrete(like: Any, directory: str) -> None:
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(like)):
        raise StateError(
            f"{directory} has no step to restore, and the state given is abstract: pass"
            " init=, a function that makes the first state"
        )


def _retain(root: str, keep_last: int | None, saved: int) -> None:
    """Deletes steps that need not be kept; one that cannot be deleted does not stop training."""
    for old in policies.to_delete(steps.committed(root), keep_last):
        try:
            if old != saved:
                steps.delete(root, old)
        except OSError as error:
            logger.warning("step %d could not be deleted: %s", old, error)


def _step_number(step: Any) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise StateError(f"a step is the number of completed updates, 0 or more; got {step!r}")
    return number


def _number(name: str, value: Any) -> Any:
    """A metric as JSON has it: a number, or nested lists of them."""
    array = np.asarray(value)
    kind = dtypes.kind(array.dtype)
    if kind not in ("bool", "int", "float"):
        raise StateError(
            f"metric {name!r} is {value!r}: metrics are real numbers or arrays of them"
        )
    return (array.astype(np.float64) if kind == "float" else array).tolist()
