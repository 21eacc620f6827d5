"""One save at a time into the steps of a run: what `CheckpointCallback` and `Checkpointer` share.

saver = Saver("/run", context, save_policy, preservation_policy)
saver.save(step, {"params": params}, metrics={"loss": loss})
saver.wait()
"""

import contextlib
import functools
import itertools
import operator
import os
import threading
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, TypeVar

from etils import epath

from flax_ckpt import _delete, _save, errors
from flax_ckpt._async import AsyncResponse
from flax_ckpt.context import Context, applied
from flax_ckpt.format import names
from flax_ckpt.storage import commit, files, hosts, kinds, lock
from flax_ckpt.training import notices, progress, steps
from flax_ckpt.training import save_decision_policies as deciding
from flax_ckpt.training.metadata import CheckpointMetadata, to_json
from flax_ckpt.training.preservation_policies import PreservationContext, PreservationPolicy

T = TypeVar("T")
Step = CheckpointMetadata[None]


class Saver:
    """Decides, saves in the background, and then removes what need not be kept.

    Args:
        directory: root of the run.
        context: options.
        save_policy: decides whether a step is saved.
        preservation_policy: decides which steps stay.
        name_format: how steps are called; None: as those that are there.
        on_error: "raise": a save that failed in the background raises; "warn": it is logged.
        writer: told how long each save took.

    Attributes:
        hosts: the processes that take part.
        response: of the save in flight, or of the last one until its end was noticed.
        deletion: the same, of a step.
    """

    def __init__(
        self,
        directory: files.PathLike,
        context: Context,
        save_policy: deciding.SaveDecisionPolicy,
        preservation_policy: PreservationPolicy,
        name_format: steps.StepFormat | None = None,
        on_error: Literal["raise", "warn"] = "raise",
        writer: progress.Writer | None = None,
    ) -> None:
        self.directory = files.local_path(directory)
        kinds.require_root(self.directory)
        self.context = context
        what = f"steps of {self.directory}"
        self.hosts = hosts.current(context.multiprocessing, context.asynchronous, what)
        self.response: AsyncResponse[bool] | None = None
        self.deletion: AsyncResponse[bool] | None = None
        self.on_error, self._writer = on_error, writer
        self._figures: dict[str, float] = {}
        self._lock: lock.RunLock | None = None
        self._save_policy, self._preservation_policy = save_policy, preservation_policy
        self._name_format = name_format or steps.naming(self.directory)
        self._root = epath.Path(self.directory)
        self._current: Step | None = None
        self._before: list[Step] = []
        self._cancelled = threading.Event()
        self._calls, self._saves = itertools.count(), 0
        self._after: int | None = None
        self._told_of_later = False
        # A clock that does not go back, and agrees with the times on disk.
        self._clock_offset = time.time_ns() - time.monotonic_ns()

    def now(self) -> int:
        """Nanoseconds since the epoch, of a clock that does not go back while this object lives."""
        return time.monotonic_ns() + self._clock_offset

    def committed(self) -> list[Step]:
        """The steps on disk, in order; their files are not read."""
        return steps.settled(self.directory, lambda _: self._name_format)

    @functools.cached_property
    def history(self) -> list[Step]:
        """What was saved and what is being saved, in order; from disk when first asked for."""
        return self.committed()

    def _without(self, step: int) -> list[Step]:
        return [other for other in self.history if other.step != step]

    def begin(self, after: int | None = None) -> None:
        """Takes the history from disk again, up to `after`; the next save moves later ones aside.

        Not before: perhaps another process still restores one.
        """
        self._after = after
        self.history = [s for s in self.committed() if after is None or s.step <= after]

    def clean(self) -> None:
        """Removes what killed saves and deletions left of the run's steps."""
        if self.hosts.is_primary:
            steps.clean(self.directory, self._name_format.build_name)

    def claim(self) -> None:
        """Makes sure that no other process saves here, from now until `release`.

        Raises:
            RunInUseError: one does.
        """
        if self._lock is not None:
            self._lock.check()
        elif self.hosts.is_primary:
            self._lock = lock.acquire(self.directory)

    def release(self) -> None:
        """Lets other processes save here."""
        if self._lock is not None:
            self._lock.release()
        self._lock = None

    def _once(self, what: str, change: Callable[[], T]) -> T | None:
        """What the primary process changes: after all have come to it, before any goes on."""
        call = f"{what} {next(self._calls)}"
        self.hosts.barrier(f"{call}: begin")
        result = change() if self.hosts.is_primary else None
        self.hosts.barrier(f"{call}: end")
        return result

    def path_of(self, step: int) -> str:
        """Where a step will be."""
        return os.path.join(self.directory, self._name_format.build_name(step))

    @property
    def is_saving(self) -> bool:
        """Whether a save is in flight."""
        return self.response is not None and not self.response.done()

    def is_due(self, step: int, *, besides: int | None = None) -> bool:
        """Whether a step is to be saved: never one that is not later than all others.

        Args:
            step: number of completed updates.
            besides: a step that will be replaced, and does not count.
        """
        history = self.history if besides is None else self._without(besides)
        if history and (latest := history[-1].step) >= step:
            if latest > step and not self._told_of_later:
                self._told_of_later = True
                text = "step %d is not saved, since step %d is: only later steps are, from %d on. A"
                text += " loop that resumes goes on from the step that was restored"
                progress.logger.warning(text, step, latest, latest + 1)
            return False
        if not self.hosts.several or deciding.is_same_everywhere(self._save_policy):
            return self._decide(step, history)
        decision = self._decide(step, history) if self.hosts.is_primary else None
        return self.hosts.broadcast(f"decision {self._saves}/{next(self._calls)}", decision)

    def _decide(self, step: int, history: list[Step]) -> bool:
        # Its path is the run's: to build the one it may get would cost more than the decision.
        asked = Step(step, self._root, metadata=None, commit_timestamp_nsecs=self.now())
        asked.metrics = None
        context = deciding.DecisionContext(
            is_saving_in_progress=self.is_saving,
            reached_preemption=hosts.reached_preemption(step),
            multiprocessing_options=self.context.multiprocessing,
        )
        return bool(self._save_policy.should_save(asked, history, context=context))

    def save(
        self,
        step: int,
        checkpointables: Mapping[str, Any],
        trees: Collection[str] = (),
        metrics: dict[str, Any] | None = None,
        custom: dict[str, Any] | None = None,
        force: bool = False,
        overwrite: bool = False,
    ) -> AsyncResponse[bool] | None:
        """Begins a save, if it is due, after the one in flight.

        Args:
            step: number of completed updates.
            checkpointables: values by name.
            trees: names of those that are trees.
            metrics: JSON to save with them, and arrays.
            custom: metadata, anything JSON can hold.
            force: save whatever the policy says.
            overwrite: whether the step, if it is there, is replaced.

        Raises:
            StepAlreadyExistsError: it is there, or being saved, and `overwrite` is false.
            SaveFailedError: an earlier save failed.
        """
        step = step_number(step)
        if reserved := names.RESERVED.intersection(checkpointables):
            raise ValueError(f"{min(reserved)!r} is a reserved name; call it something else")
        self.notice()
        if not overwrite:
            self._require_new(step)
        if not force and not self.is_due(step, besides=step if overwrite else None):
            return None
        began = time.perf_counter()
        self.wait()
        self.claim()
        if (after := self._after) is not None:
            self._once("superseding", lambda: steps.supersede(self.directory, after))
        self._after = None
        parts = dict(checkpointables)
        nbytes = progress.nbytes(parts)
        if metrics is not None:
            parts[names.METRICS] = to_json(metrics)
        path, self._before = self.path_of(step), self.history
        cancelled = self._cancelled = threading.Event()

        def permit() -> None:
            if cancelled.is_set() and not self.hosts.several:  # which could not agree
                raise errors.SaveCancelledError(f"the save of {path} was cancelled")
            if self._lock is not None:  # another process has it, if this one was stopped for long
                self._lock.check()

        how: Any = {"trees": trees, "internal": True, "permit": permit, "result": True}
        try:  # whoever interrupts what follows finds it in the history
            self._enter(step, path, custom, parts.get(names.METRICS))
            self.response = _save.start(path, parts, self.context, overwrite, custom, **how)
        except BaseException:
            self.history = self._before
            raise
        self._saves += 1
        blocked = time.perf_counter() - began

        def finish(_: bool) -> None:
            seconds = time.perf_counter() - began
            shown = f"blocked {progress.duration(blocked)}"
            progress.logger.info("saved %s", progress.line(path, step, nbytes, seconds, shown))
            figures = {"duration_secs": seconds, "blocked_secs": blocked, "bytes": nbytes}
            self._figures = progress.record("save", **figures)
            self.hosts.forget(f"decision {self._saves - 1}")
            if self.hosts.is_primary:
                self._retain(step, path)

        self.response.on_complete(finish)
        return self.response

    def _enter(self, step: int, path: str, custom: Any, metrics: Any) -> None:
        """Takes a save that begins into the history."""
        times: Any = dict.fromkeys(("init_timestamp_nsecs", "commit_timestamp_nsecs"), self.now())
        self._current = Step(step, epath.Path(path), metadata=None, custom_metadata=custom, **times)
        self._current.metrics = metrics  # not those of the step that is replaced
        self.history = sorted([*self._without(step), self._current], key=lambda saved: saved.step)

    def _retain(self, saved: int, path: str) -> None:
        """Deletes what need not be kept; a step that cannot be deleted does not stop training."""
        known = {step.step: step for step in self.history}  # with what was read of them
        found = [known.get(step.step, step) for step in self.committed()]
        keep = self._preservation_policy.should_preserve(found, context=PreservationContext())
        pairs = zip(found, keep, strict=True)
        stay = {saved, *(step.step for step, kept in pairs if kept or step.is_damaged)}
        renamed = [s for s in self._before if s.step == saved and os.fspath(s.path) != path]
        for step in [*renamed, *(s for s in found if s.step not in stay)]:
            try:
                commit.remove(os.fspath(step.path))
            except OSError as error:
                progress.logger.warning("step %d could not be deleted: %s", step.step, error)
        self.history = [step for step in self.history if step.step in stay]

    def wait(self) -> None:
        """Returns when what runs in the background has ended.

        Raises:
            SaveFailedError: the save failed, and nobody was told.
        """
        deletion, self.deletion = self.deletion, None
        if deletion is not None:
            deletion.result()
        response, current = self.response, self._current
        if response is None or current is None:
            return
        response.ended.wait()
        self.response, told = None, response.told
        figures, self._figures = self._figures, {}
        if self._writer is not None and figures:
            notices.told(self._writer, current.step, figures)
        try:
            response.result()
        except Exception as error:
            if not response.completed:
                self.history = self._before
            if told or isinstance(error, errors.SaveCancelledError):
                return
            fate = "was saved, but what follows failed" if response.completed else "was not saved"
            what = f"{response.what} (step {current.step}) {fate}: {type(error).__name__}: {error}"
            failure = errors.SaveFailedError(what, path=current.path, step=current.step)
            if self.on_error == "raise":
                raise failure from error
            progress.logger.warning("%s", failure, exc_info=error)

    def notice(self) -> None:
        """Raises the failure of a save that has ended; does not wait for one that has not."""
        if self.response is not None and self.response.done():
            self.wait()

    def _require_new(self, step: int) -> None:
        """Checks that a step was not saved, and is not being saved."""
        if paths := [other.path for other in self.history if other.step == step]:
            self.wait()
            what = f"step {step} is saved already, at {paths[0]}; pass overwrite=True to replace it"
            raise errors.StepAlreadyExistsError(what, step=step, path=paths[0])

    def cancel(self) -> None:
        """Ends the save in flight without a commit, unless it is committed already."""
        self._cancelled.set()
        self.wait()

    def find(self, step: int | CheckpointMetadata[Any] | None) -> Step:
        """A committed step; None: the latest.

        Raises:
            StepNotFoundError: says which steps there are.
            SaveFailedError: a save has failed.
        """
        self.notice()
        found = {other.step: other for other in self.committed()}
        number = step.step if isinstance(step, CheckpointMetadata) else step
        wanted = max(found, default=None) if number is None else number
        if wanted in found:
            return found[wanted]
        path = self.directory if wanted is None else self.path_of(step_number(wanted))
        which, there = "" if wanted is None else f" {wanted}", ", ".join(map(str, found)) or "none"
        message = f"{self.directory} has no step{which}; its steps: {there}"
        raise errors.StepNotFoundError(message, step=wanted, path=path)

    def delete(self, step: Step, name: str | None, missing_ok: bool) -> AsyncResponse[bool]:
        """Takes a step out of the listing, in all processes, and removes it in the background.

        Args:
            step: a committed one.
            name: which of its checkpointables; None: the whole step.
            missing_ok: whether it is no error that the step has none of that name.
        """
        path = os.fspath(step.path)
        if name is not None:
            with applied(self.context):
                how: Any = {"checkpointable_name": name, "missing_ok": missing_ok}
                self.deletion = _delete.delete_async(path, **how)
            return self.deletion
        doomed = self._once("deleting", lambda: commit.withdraw(path))
        self.history = self._without(step.step)

        def remove() -> bool:
            if doomed is not None:
                commit.remove_left_over(doomed)
            return True

        self.deletion = AsyncResponse(remove, f"step {path}", verb="deleted")
        return self.deletion


def step_number(step: Any) -> int:
    """A step as an int.

    Raises:
        StateError: it is none, or negative.
    """
    with contextlib.suppress(TypeError):  # it is no number at all
        if not isinstance(step, bool) and (number := operator.index(step)) >= 0:
            return number
    raise errors.StateError(f"a step is the number of completed updates, 0 or more; got {step!r}")
