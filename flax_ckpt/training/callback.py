"""The callback of a training loop: saves in the background, resumes, keeps what is to be kept.

with fc.CheckpointCallback(workdir / "checkpoints", every_n_steps=500, config=config) as ckpt:
    state, step = ckpt.restore_or_init(abstract_state, init=init_fn)
    while step < config.num_steps:
        state, metrics = train_step(state, next(batches))
        step += 1
        ckpt.on_step_end(step, state, metrics=metrics)
"""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, Generic, Literal, TypeVar

import jax

from flax_ckpt.adapters import state as states
from flax_ckpt.context import Context, resolve
from flax_ckpt.errors import Preempted, SaveFailedError, StateError
from flax_ckpt.storage import hosts
from flax_ckpt.training import notices, policies, preemption, progress, saver, steps
from flax_ckpt.training import restore as restoring
from flax_ckpt.training.contents import Contents
from flax_ckpt.training.report import Report

S = TypeVar("S")

_open: weakref.WeakValueDictionary[str, CheckpointCallback[Any]] = weakref.WeakValueDictionary()


class CheckpointCallback(Generic[S]):
    """Saves the state of a training loop; use it in a `with` block, or call `close`.

    A step is the number of completed updates: it names the directory, equals the `step` of the
    state, and is where a resumed loop goes on. A save that is due waits for the one in flight.

    Args:
        directory: root of the run's checkpoints; made when the first one is saved.
        every_n_steps: save at the multiples of this.
        every_secs: save when so many seconds have passed since the last save began.
        save_policy: save when this policy says so. With none of the three: every 600 s.
        keep_last: how many of the newest steps to keep; None: all.
        keep_every_n_steps: keep the multiples of this besides.
        keep_best: keep the best besides: a metric, "min" or "max", and how many, such as
            `("eval/loss", "min", 2)`. A step without the metric, or with NaN, is never among them.
        preservation_policy: keep what this policy keeps, in place of the last; the best and the
            multiples besides.
        config: the run's config, saved with each step: a `ConfigDict`, dict, dataclass, or a
            protocol-buffer message. Versions, commit, devices and command line go with it, if it is
            no message of your own; `{}` if there is nothing else to say.
        data_iterator: where the batches come from; its position is saved with each step, and
            `restore_or_init` puts it there, in place: an iterator of Grain, any object with
            `get_state` and `set_state`, or a `StatefulCheckpointable`.
        at_end: whether leaving the `with` block without an exception, or `close`, saves the last
            state seen if it is not saved yet: what an object that changes in place has become.
        on_error: "raise": a save that failed in the background raises at the next call; "warn":
            it is logged, and training goes on.
        on_preemption: what follows when one of `signals` has come, or JAX's own notice in a run of
            several processes, and the next step is saved: "exit" raises `Preempted`, a
            `SystemExit`; "stop" only sets `should_stop`.
        signals: taken note of from the first step on until `close`; none of a run of several
            processes, which JAX listens to.
        writer: told how long each save took: any object with CLU's `write_scalars`.
        context: options of all saves and restores, which are copied; None: those active now.

    Attributes:
        report: what the last `restore_or_init` did, with each damaged step that it passed over;
            None if it restored nothing.
        should_stop: whether a preemption notice has come, and the loop is to end.

    Raises:
        InvalidLayoutError: `directory` is one checkpoint, not the root of a run.
        ValueError: an argument makes no sense.
        ConfigError: lists every key of the config that cannot be saved.
        StateError: the position of `data_iterator` cannot be saved.

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
        save_policy: policies.SaveDecisionPolicy | None = None,
        keep_last: int | None = 3,
        keep_every_n_steps: int | None = None,
        keep_best: policies.Best | tuple[Any, ...] | None = None,
        preservation_policy: policies.PreservationPolicy | None = None,
        config: Any = None,
        data_iterator: Any = None,
        at_end: bool = True,
        on_error: Literal["raise", "warn"] = "raise",
        on_preemption: Literal["exit", "stop"] = "exit",
        signals: Collection[int] = (signal.SIGTERM,),
        writer: progress.Writer | None = None,
        context: Context | None = None,
    ) -> None:
        policies.require_choice(on_error=(on_error, "raise", "warn"))
        policies.require_choice(on_preemption=(on_preemption, "exit", "stop"))
        self._at_end, self._on_preemption = at_end, on_preemption
        self._context = Context(resolve(context))  # a copy: the caller may change his own
        contents = self._contents = Contents(config, data_iterator, keep_best, self._context)
        save, self._timer = policies.saving(every_n_steps, every_secs, save_policy)
        keep = policies.keeping(keep_last, keep_every_n_steps, contents.best, preservation_policy)
        self._saver = saver.Saver(directory, self._context, save, keep, None, on_error, writer)
        self.directory = self._saver.directory
        self._timer.start(self._saver.now())
        self._signals = preemption.Signals(() if self._saver.hosts.several else signals)
        weakref.finalize(self, self._signals.restore)
        self._decided: tuple[int, bool] | None = None
        self._seen: tuple[int, S, Mapping[str, Any] | None] | None = None
        self._begun = self._replaced = self.should_stop = False
        self.report: Report | None = None
        self._place = os.path.realpath(self.directory)
        if (older := _open.pop(self._place, None)) is not None:
            older._make_way()
        _open[self._place] = self

    @property
    def latest_step(self) -> int | None:
        """The newest committed step, from what is on disk; None if there is none."""
        return max(steps.committed(self.directory), default=None)

    def restore_or_init(
        self,
        like: S,
        *,
        init: Callable[[], S] | None = None,
        step: int | Literal["latest", "best"] | None = "latest",
        restart_data: bool = False,
    ) -> tuple[S, int]:
        """The state to go on with, and the number of updates it has behind it.

        Args:
            like: a state of the wanted type, concrete or abstract.
            init: makes the first state; called only if there is nothing to restore.
            step: which step to resume from, as for :func:`restore`.
            restart_data: whether the data iterator stays where it is, instead of being put where
                it was: for a run that was saved without it, or by another number of processes.

        Returns:
            The state and its step: restored, or `init()`, or `like` itself, and 0.

        Raises:
            StateError: nothing to restore, `like` is abstract, and there is no `init`.
            RunInUseError: another process saves here.
            CheckpointNotFoundError: there is no such step, or it has no position of the data.
            TreeMismatchError: the checkpoint does not fit `like`.
            DamagedCheckpointError: the step asked for, or every one, is damaged.
        """
        self.wait()
        self._saver.claim()
        self._saver.clean()
        self._seen = self._decided = self.report = None
        if not steps.committed(self.directory) and step in ("latest", "best", None):
            self._signals.install()
            steps.warn_of_none(self.directory)
            if init is not None:
                return init(), 0
            leaves = jax.tree.leaves(states.split(like))
            if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
                what = f"{self.directory} has no step to restore, and the state given is abstract"
                raise StateError(f"{what}: pass init=, a function that makes the first state")
            return like, 0
        iterator = None if restart_data else self._contents.data_iterator
        out = restoring.resume(self.directory, like, step, iterator, self._context)
        assert out.step is not None
        self.report = out.report
        notices.config_changes(out.config_text, self._contents.config)
        notices.other_count(out.step, "was restored", out.state)
        self._begin(out.step)
        self._timer.start(self._saver.now())
        return out.state, out.step

    def _begin(self, after: int) -> None:
        """The run goes on after this step: what is later on disk is not of it."""
        if self._replaced:
            text = f"this callback was replaced by a later one for {self.directory}: use that one"
            raise StateError(text)
        self._begun = True
        self._signals.install()
        self._saver.begin(after)

    def should_save(self, step: int) -> bool:
        """Whether `on_step_end` will save at this step; decided once per step."""
        step = saver.step_number(step)
        if not self._begun:
            self._begin(step - 1)
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
            Preempted: the process was told to end, and the step is saved.
        """
        self._saver.notice()
        step = saver.step_number(step)
        due = self.should_save(step) or force
        self._seen = step, states.unfilled(state), metrics
        told = self._signals.received is not None or hosts.reached_preemption(step)
        preempted = told and not self.should_stop
        if not (due or preempted):
            return False
        saves = self._save(step, state, metrics)
        if force and not saves:
            progress.logger.info("step %d is not saved again: it is saved", step)
        if preempted:
            self._leave(step)
        return saves

    __call__ = on_step_end

    def poll(self, step: int | None = None, state: S | None = None) -> None:
        """Call it now and then in what takes long between two steps, such as an evaluation.

        If the process was told to end, it saves and leaves as `on_step_end` would. Without a
        `state` it saves the last one seen, if that is whole: neither donated since nor an object
        that changes in place; else the next `on_step_end` does. Several processes have to agree on
        a step, and leave there.

        Raises:
            Preempted: the process was told to end, and the step is saved.
        """
        if self.should_stop or self._signals.received is None:
            return
        last = self._seen
        if step is not None and state is not None:
            last = self._seen = saver.step_number(step), state, None
        elif last is None or not (self._is_saved(last[0]) or self._contents.is_whole(last[1])):
            return
        self._save(*last)
        self._leave(last[0])

    def _leave(self, step: int) -> None:
        self.should_stop = True
        self.wait()
        notices.leaving(step, self._is_saved(step), self.directory)
        if self._on_preemption == "exit":
            raise Preempted(128 + (self._signals.received or signal.SIGTERM), step)

    def _is_saved(self, step: int) -> bool:
        return any(saved.step == step for saved in self._saver.history)

    def _save(self, step: int, state: S, metrics: Mapping[str, Any] | None) -> bool:
        """Begins a save and says so; not of a step that is saved already."""
        if self._is_saved(step):
            return False
        if not self._begun:
            self._begin(step - 1)
        self._saver.save(step, *self._contents.of(step, state, metrics), force=True)
        return True

    def wait(self) -> None:
        """Returns when the save in flight is durable.

        Raises:
            SaveFailedError: it failed.
        """
        self._saver.wait()

    def close(self) -> None:
        """Saves the last state seen if `at_end` and it is not saved yet; waits for all saves.

        Raises:
            SaveFailedError: a save failed.
        """
        self.__exit__(None, None, None)

    def _finish(self) -> None:
        failure: SaveFailedError | None = None
        try:
            self.wait()
        except SaveFailedError as error:
            failure = error  # told when the last state is safe
        if self._seen is not None and self._at_end and self._save(*self._seen):
            self.wait()
        last, self._seen = self._seen, None
        if failure is not None:
            raise failure
        if last is not None and self._signals.received is not None and not self.should_stop:
            self._leave(last[0])

    def __enter__(self) -> CheckpointCallback[S]:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            if error is None:
                self._finish()
            elif not isinstance(error, Exception):
                self._save_interrupted()
            self.wait()  # after any other error the state may be torn: it is not saved
        except SaveFailedError as failure:
            if error is None:
                raise
            error.add_note(str(failure))
        finally:
            self._release()

    def _save_interrupted(self) -> None:
        """After Ctrl-C, `sys.exit` and the like the last state seen is saved, if it is whole."""
        if self._seen is None or not self._at_end or self._is_saved(self._seen[0]):
            return
        whole = self._contents.is_whole(self._seen[1]) and self._save(*self._seen)
        notices.interrupted(self._seen[0], whole, self.latest_step)

    def _release(self) -> None:
        """Signals and the directory are others' again."""
        self._signals.restore()
        self._saver.release()
        if _open.get(self._place) is self:
            del _open[self._place]

    def _make_way(self) -> None:
        """For a later callback of the same directory, made by a notebook's cell that ran again."""
        self._saver.on_error = "warn"
        self._save_interrupted()
        self._replaced, self._begun = True, False
        self.wait()
        self._release()

    def __repr__(self) -> str:
        state = "saving" if self._saver.is_saving else "idle"
        return f"CheckpointCallback({self.directory!r}, latest_step={self.latest_step}, {state})"
