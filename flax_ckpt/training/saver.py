"""One save at a time into the steps of a run: what `CheckpointCallback` and `Checkpointer` share.

saver = Saver("/run", context, save_policy, preservation_policy, standard_name_format())
if saver.is_due(step):
    saver.save(step, {"params": params}, metrics={"loss": loss})
saver.wait()
"""

from __future__ import annotations

import logging
import operator
import os
import threading
import time
from collections.abc import Collection, Mapping
from typing import Any

from etils import epath

from flax_ckpt import _save
from flax_ckpt._async import AsyncResponse
from flax_ckpt.context import Context
from flax_ckpt.errors import (
    SaveCancelledError,
    SaveFailedError,
    StateError,
    StepAlreadyExistsError,
    StepNotFoundError,
)
from flax_ckpt.format import names
from flax_ckpt.storage import commit, hosts
from flax_ckpt.storage.files import local_path
from flax_ckpt.training import progress, steps
from flax_ckpt.training.metadata import CheckpointMetadata
from flax_ckpt.training.name_formats import NameFormat, PathLike, matcher
from flax_ckpt.training.preservation_policies import PreservationContext, PreservationPolicy
from flax_ckpt.training.save_decision_policies import (
    DecisionContext,
    SaveDecisionPolicy,
    is_same_everywhere,
)

logger = logging.getLogger("flax_ckpt")

Step = CheckpointMetadata[None]


class Saver:
    """Decides, saves in the background, and then removes what need not be kept.

    Args:
        directory: root of the run.
        context: options.
        save_policy: decides whether a step is saved.
        preservation_policy: decides which steps stay.
        name_format: how steps are called.

    Attributes:
        hosts: the processes that take part.
        response: of the save in flight, or of the last one until its end was noticed.
        deletion: the same, of a step.
    """

    def __init__(
        self,
        directory: PathLike,
        context: Context,
        save_policy: SaveDecisionPolicy,
        preservation_policy: PreservationPolicy,
        name_format: NameFormat[Step],
    ) -> None:
        self.directory = local_path(directory)
        self.context = context
        what = f"steps of {self.directory}"
        self.hosts = hosts.current(context.multiprocessing, context.asynchronous, what)
        self.response: AsyncResponse[bool] | None = None
        self.deletion: AsyncResponse[bool] | None = None
        self._save_policy = save_policy
        self._preservation_policy = preservation_policy
        self._name_format = name_format
        self._root = epath.Path(self.directory)
        self._history: list[Step] | None = None
        self._current: Step | None = None
        self._cancelled = threading.Event()
        self._calls = self._saves = 0
        # A clock that does not go back, and agrees with the times on disk.
        self._clock_offset = time.time_ns() - time.monotonic_ns()

    def now(self) -> int:
        """Nanoseconds since the epoch, of a clock that does not go back while this object lives."""
        return time.monotonic_ns() + self._clock_offset

    def committed(self) -> list[Step]:
        """The steps on disk, in order; their files are not read."""
        return sorted(self._name_format.find_all(self.directory), key=operator.attrgetter("step"))

    @property
    def history(self) -> list[Step]:
        """What was saved and what is being saved, in order; from disk when first asked for."""
        if self._history is None:
            self._history = self.committed()
        return self._history

    def begin(self, after: int | None = None) -> None:
        """Takes the history from disk again, up to the step `after`."""
        found = self.committed()
        self._history = [step for step in found if after is None or step.step <= after]

    def clean(self) -> None:
        """Removes what killed saves and deletions left of the run's steps."""
        if self.hosts.is_primary:
            steps.clean(self.directory, matcher(self._name_format))

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
        history = self.history
        if besides is not None:
            history = [other for other in history if other.step != besides]
        if history and history[-1].step >= step:
            return False
        if not self.hosts.several or is_same_everywhere(self._save_policy):
            return self._decide(step, history)
        decision = self._decide(step, history) if self.hosts.is_primary else None
        self._calls += 1
        return self.hosts.broadcast(f"decision {self._saves}/{self._calls}", decision)

    def _decide(self, step: int, history: list[Step]) -> bool:
        # Its path is the run's: to build the one it may get would cost more than the decision.
        asked = Step(step, self._root, metadata=None, commit_timestamp_nsecs=self.now())
        context = DecisionContext(
            is_saving_in_progress=self.is_saving,
            reached_preemption=hosts.reached_preemption(step),
            multiprocessing_options=self.context.multiprocessing,
        )
        return bool(self._save_policy.should_save(asked, history, context=context))

    def save(
        self,
        step: int,
        checkpointables: Mapping[str, Any],
        *,
        trees: Collection[str] = (),
        metrics: dict[str, Any] | None = None,
        overwrite: bool = False,
        custom_metadata: dict[str, Any] | None = None,
    ) -> AsyncResponse[bool]:
        """Begins a save, after the one in flight.

        Args:
            step: number of completed updates.
            checkpointables: values by name.
            trees: names of those that are trees.
            metrics: JSON to save with them.
            overwrite: whether the step, if it is there, is replaced.
            custom_metadata: anything JSON can hold.

        Raises:
            SaveFailedError: an earlier save failed.
        """
        began = time.perf_counter()
        self.wait()
        parts = dict(checkpointables)
        nbytes = progress.nbytes(parts)
        if metrics is not None:
            parts[names.METRICS] = metrics
        path, now, cancelled = self.path_of(step), self.now(), threading.Event()
        self.response = _save.start(
            path,
            parts,
            self.context,
            overwrite,
            custom_metadata,
            trees=trees,
            internal=True,
            cancelled=cancelled,
            result=True,
        )
        self._cancelled = cancelled
        self._saves += 1
        self._current = Step(
            step,
            epath.Path(path),
            metadata=None,
            init_timestamp_nsecs=now,
            commit_timestamp_nsecs=now,
            custom_metadata=custom_metadata,
            metrics=parts.get(names.METRICS),
        )
        before = [other for other in self.history if other.step != step]
        replaced = [other for other in self.history if other.step == step]
        self._history = sorted([*before, self._current], key=operator.attrgetter("step"))
        blocked = time.perf_counter() - began

        def finish(_: bool) -> None:
            seconds = time.perf_counter() - began
            logger.info("saved %s", progress.line(path, step, nbytes, seconds, blocked))
            self.hosts.forget(f"decision {self._saves - 1}")
            if self.hosts.is_primary:
                self._remove([other for other in replaced if os.fspath(other.path) != path])
                self._retain(step)

        self.response.on_complete(finish)
        return self.response

    def _retain(self, saved: int) -> None:
        known = {os.fspath(step.path): step for step in self.history}  # with what was read of them
        found = [known.get(os.fspath(step.path), step) for step in self.committed()]
        policy = self._preservation_policy
        keep = policy.should_preserve(found, context=PreservationContext())
        stay = {s.step for s, kept in zip(found, keep, strict=True) if kept} | {saved}
        self._remove([step for step in found if step.step not in stay])
        self._history = [step for step in self.history if step.step in stay]

    def _remove(self, doomed: list[Step]) -> None:
        """Deletes steps; one that cannot be deleted does not stop training."""
        for step in doomed:
            try:
                commit.remove(os.fspath(step.path))
            except OSError as error:
                logger.warning("step %d could not be deleted: %s", step.step, error)

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
        told = response.told
        try:
            response.result()
        except Exception as error:
            if not response.completed:
                self._history = [step for step in self.history if step is not current]
            fate = "was saved, but what follows failed" if response.completed else "was not saved"
            if not told and not isinstance(error, SaveCancelledError):
                raise SaveFailedError(
                    f"{response.what} (step {current.step}) {fate}:"
                    f" {type(error).__name__}: {error}",
                    path=os.fspath(current.path),
                    step=current.step,
                ) from error
        finally:
            self.response = None

    def notice(self) -> None:
        """Raises the failure of a save that has ended; does not wait for one that has not."""
        if self.response is not None and self.response.done():
            self.wait()

    def require_new(self, step: int) -> None:
        """Checks that a step was not saved, and is not being saved.

        Raises:
            StepAlreadyExistsError: it was.
            SaveFailedError: it was to be, and failed.
        """
        there = [other for other in self.history if other.step == step]
        if not there:
            return
        self.wait()
        raise StepAlreadyExistsError(
            f"step {step} is saved already, at {there[0].path}; pass overwrite=True to replace it",
            step=step,
            path=there[0].path,
        )

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
        wanted = step.step if isinstance(step, CheckpointMetadata) else step
        if wanted is None and found:
            return found[max(found)]
        if wanted in found:
            return found[wanted]
        path = self.directory if wanted is None else self.path_of(step_number(wanted))
        raise StepNotFoundError(
            f"{self.directory} has no step{'' if wanted is None else f' {wanted}'}; its steps:"
            f" {', '.join(map(str, found)) or 'none'}",
            step=wanted,
            path=path,
        )

    def delete(self, step: Step) -> AsyncResponse[bool]:
        """Takes a step out of the listing, in all processes, and removes it in the background."""
        path = os.fspath(step.path)
        doomed = commit.withdraw(path) if self.hosts.is_primary else None
        self._calls += 1
        self.hosts.barrier(f"deleted {self._calls}")
        self._history = [other for other in self.history if other.step != step.step]

        def remove() -> bool:
            if doomed is not None:
                commit.remove_left_over(doomed)
            return True

        self.deletion = AsyncResponse(remove, f"deletion of {path}")
        return self.deletion


def step_number(step: Any) -> int:
    """A step as an int.

    Raises:
        StateError: it is none, or negative.
    """
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)
    except TypeError:
        number = -1
    if number < 0:
        raise StateError(f"a step is the number of completed updates, 0 or more; got {step!r}")
    return number
