"""`Checkpointer`: the checkpoints of a run by step, with the calls of Orbax v1.

with fc.training.Checkpointer(root, save_decision_policy=every_1000) as checkpointer:
    for step in range(first, last):
        state = train_step(state)
        checkpointer.save_async(step, state)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self, TypeVar, final

from etils import epath

from flax_ckpt import _load
from flax_ckpt._async import AsyncResponse, parameters_of
from flax_ckpt.context import Context, applied, resolve
from flax_ckpt.errors import SaveFailedError, StepNotFoundError
from flax_ckpt.format.names import STATE
from flax_ckpt.storage import files
from flax_ckpt.training import metadata, saver, steps
from flax_ckpt.training import save_decision_policies as deciding
from flax_ckpt.training.metadata import CheckpointMetadata, RootMetadata
from flax_ckpt.training.preservation_policies import PreservationPolicy, PreserveAll

T = TypeVar("T")
Step = int | CheckpointMetadata[Any] | None


@final
class Checkpointer:
    """Saves and loads the checkpoints of a run; use it in a `with` block, or call `close`.

    One save runs at a time: one that is due waits for the one in flight, unless the policy says
    otherwise. A save that fails in the background raises `SaveFailedError` at the next call, at
    `wait`, or at `close`. The calls are to be made from one thread, in the same order in all
    processes.

    Args:
        directory: root of the run; it is made if it is not there.
        context: options of all that is done, which are copied; None: those active now.
        save_decision_policy: decides whether `save` saves; None: as often as possible without
            waiting, at first, and when the cluster is about to end the processes.
        preservation_policy: decides which steps stay when another has been saved; None: all.
        step_name_format: how the steps are called; None: plain numbers.
        custom_metadata: anything JSON can hold, about the whole run; written once.
        cleanup_tmp_directories: whether to remove first what killed saves have left.
        lightweight_initialize: of no effect: a step's files are read when they are asked for.

    >>> import tempfile, numpy as np, flax_ckpt as fc
    >>> every_10 = fc.training.save_decision_policies.FixedIntervalPolicy(10)
    >>> root = tempfile.mkdtemp()
    >>> with fc.training.Checkpointer(root, save_decision_policy=every_10) as checkpointer:
    ...     for step in range(1, 31):
    ...         if checkpointer.save(step, {"w": np.full(2, step)}, metrics={"loss": 1 / step}):
    ...             print(step, end=" ")
    10 20 30
    >>> checkpointer.load()["w"], checkpointer.checkpoints[0].metrics
    (array([30, 30]), {'loss': 0.1})
    """

    def __init__(
        self,
        directory: files.PathLike,
        *,
        context: Context | None = None,
        save_decision_policy: deciding.SaveDecisionPolicy | None = None,
        preservation_policy: PreservationPolicy | None = None,
        step_name_format: steps.StepFormat | None = None,
        custom_metadata: dict[str, Any] | None = None,
        cleanup_tmp_directories: bool = False,
        lightweight_initialize: bool = False,
    ) -> None:
        self._context = Context(resolve(context))  # a copy: the caller may change his own
        when = save_decision_policy or deciding.AS_OFTEN_AS_POSSIBLE
        keep = preservation_policy or PreserveAll()
        called = step_name_format or steps.standard_name_format()
        self._saver = saver.Saver(directory, self._context, when, keep, called)
        self._root = self._saver.directory
        if self._saver.hosts.is_primary:
            mode, is_new = self._context.file.path_permission_mode, not self.directory.exists()
            files.make_directory(self._root)
            if is_new and mode is not None:  # for others; the run goes on writing
                files.chmod(self._root, mode | 0o700)
            if custom_metadata is not None:
                metadata.write_root(self._root, custom_metadata)
            if cleanup_tmp_directories:
                self._saver.clean()

    @property
    def directory(self) -> epath.Path:
        """The root of the run."""
        return self._context.file.path_class(self._root)

    @property
    def latest(self) -> CheckpointMetadata[None] | None:
        """The newest committed step, from what is on disk; None if there is none."""
        return max(self.checkpoints, key=lambda found: found.step, default=None)

    @property
    def checkpoints(self) -> Sequence[CheckpointMetadata[None]]:
        """The committed steps in order, from what is on disk; their files are not read yet."""
        return self._saver.committed()

    def should_save(self, step: int) -> bool:
        """Whether `save` would save this step; steps must increase.

        Raises:
            SaveFailedError: an earlier save failed.
        """
        self._saver.notice()
        return self._saver.is_due(saver.step_number(step))

    def save_async(
        self,
        step: int,
        state: Any,
        *,
        checkpointable_name: str = STATE,
        force: bool = False,
        overwrite: bool = False,
        metrics: dict[str, Any] | None = None,
        custom_metadata: dict[str, Any] | None = None,
    ) -> AsyncResponse[bool] | None:
        """Saves one PyTree in the background; None if the policy says no. See :meth:`save`."""
        parts = {checkpointable_name: state}
        return self._saver.save(step, parts, parts, metrics, custom_metadata, force, overwrite)

    @parameters_of(save_async)
    def save(self, *args: Any, **named: Any) -> bool:
        """Saves one PyTree as a step, if the policy says so.

        Args:
            step: the step's number.
            state: any PyTree that :func:`flax_ckpt.save` takes.
            checkpointable_name: the sub-directory for the tree.
            force: save whatever the policy says.
            overwrite: replace the step if it is there; until the new one is durable the old one
                stays.
            metrics: anything JSON can hold, and arrays; what `BestN` compares.
            custom_metadata: anything JSON can hold.

        Returns:
            Whether it was saved; it is durable then.

        Raises:
            StepAlreadyExistsError: the step is there, and `overwrite` is false.
            SaveFailedError: an earlier save failed in the background.
            UnsupportedLeafError, DuplicateNameError, OSError: as :func:`flax_ckpt.save`.
        """
        response = self.save_async(*args, **named)
        return response is not None and response.result()

    def save_checkpointables_async(
        self,
        step: int,
        checkpointables: Mapping[str, Any],
        *,
        force: bool = False,
        overwrite: bool = False,
        metrics: dict[str, Any] | None = None,
        custom_metadata: dict[str, Any] | None = None,
    ) -> AsyncResponse[bool] | None:
        """Saves several checkpointables in the background; None if the policy says no."""
        parts, save = checkpointables, self._saver.save
        return save(step, parts, (), metrics, custom_metadata, force, overwrite)

    @parameters_of(save_checkpointables_async)
    def save_checkpointables(self, *args: Any, **named: Any) -> bool:
        """Saves several checkpointables as a step, if the policy says so; see :meth:`save`."""
        response = self.save_checkpointables_async(*args, **named)
        return response is not None and response.result()

    def load(
        self, step: Step = None, abstract_state: Any = None, *, checkpointable_name: str = STATE
    ) -> Any:
        """Loads one PyTree of a step.

        Args:
            step: its number or metadata; None: the latest.
            abstract_state: as for :func:`flax_ckpt.load`.
            checkpointable_name: which; `AUTO`: the only tree there is.

        Raises:
            StepNotFoundError: says which steps there are.
            CheckpointableNotFoundError: the step has no such checkpointable.
            TreeMismatchError, DamagedCheckpointError: as :func:`flax_ckpt.load`.
        """
        return self._read(_load.load, step, abstract_state, checkpointable_name=checkpointable_name)

    @parameters_of(load)
    def load_async(self, *args: Any, **named: Any) -> AsyncResponse[Any]:
        """Loads one PyTree in the background; see :meth:`load`."""
        named.setdefault("checkpointable_name", STATE)
        return self._read(_load.load_async, *args, **named)

    def load_checkpointables(
        self, step: Step = None, abstract_checkpointables: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Loads several checkpointables of a step.

        Args:
            step: its number or metadata; None: the latest.
            abstract_checkpointables: as for :func:`flax_ckpt.load_checkpointables`; None: all.

        Raises:
            StepNotFoundError: says which steps there are.
            NoEntryError, TreeMismatchError, DamagedCheckpointError: as there.
        """
        return self._read(_load.load_checkpointables, step, abstract_checkpointables)

    @parameters_of(load_checkpointables)
    def load_checkpointables_async(self, *args: Any, **named: Any) -> AsyncResponse[dict[str, Any]]:
        """Loads several checkpointables in the background; see :meth:`load_checkpointables`."""
        return self._read(_load.load_checkpointables_async, *args, **named)

    def _read(self, read: Callable[..., T], step: Step = None, *args: Any, **named: Any) -> T:
        """What one of the functions that read a checkpoint returns for a step."""
        path = self._saver.find(step).path
        with applied(self._context):
            return read(path, *args, **named)

    def metadata(self, step: Step = None) -> CheckpointMetadata[Any]:
        """What the PyTree of a step looks like; see :func:`flax_ckpt.metadata`.

        Raises:
            StepNotFoundError: says which steps there are.
        """
        found = self._saver.find(step)
        return metadata.of_step(found, self._read(_load.metadata, found))

    def checkpointables_metadata(self, step: Step = None) -> CheckpointMetadata[dict[str, Any]]:
        """What all checkpointables of a step look like; see :meth:`metadata`."""
        found = self._saver.find(step)
        return metadata.of_step(found, self._read(_load.checkpointables_metadata, found))

    def root_metadata(self) -> RootMetadata:
        """What was given as `custom_metadata` when the run began."""
        custom = metadata.read_root(self._root)
        return RootMetadata(directory=self.directory, custom_metadata=custom)

    def delete_async(
        self,
        step: int | CheckpointMetadata[Any],
        *,
        checkpointable_name: str | None = None,
        missing_ok: bool = False,
    ) -> AsyncResponse[bool]:
        """Deletes in the background; it leaves the listing at once. See :meth:`delete`."""
        self.wait()
        try:
            found = self._saver.find(step)
        except StepNotFoundError:
            if not missing_ok:
                raise
            return AsyncResponse(lambda: False, f"deletion of step {step}")
        return self._saver.delete(found, checkpointable_name, missing_ok)

    @parameters_of(delete_async)
    def delete(self, *args: Any, **named: Any) -> bool:
        """Deletes a step, whatever the preservation policy says, after what is in flight.

        Args:
            step: its number or metadata.
            checkpointable_name: which of its checkpointables; None: the whole step.
            missing_ok: whether it is no error that there is nothing to delete.

        Returns:
            Whether there was something.

        Raises:
            StepNotFoundError: says which steps there are.
            CheckpointableNotFoundError: the step has no such checkpointable.
            ValueError: the name cannot be one, or is that of the only checkpointable.
        """
        return self.delete_async(*args, **named).result()

    def cancel(self, step: Step = None) -> None:
        """Ends the save in flight; it leaves nothing, unless it was committed just before.

        With several processes, which could not agree on the moment, the save comes to its end.

        Args:
            step: a step that is then deleted, if it is there.
        """
        self._saver.cancel()
        if step is not None:
            self.delete(step, missing_ok=True)

    def reload(self) -> None:
        """Takes what the policies know of earlier steps from disk again."""
        self.wait()
        self._saver.begin()

    def is_saving_in_progress(self) -> bool:
        """Whether a save runs in the background."""
        return self._saver.is_saving

    def wait(self) -> None:
        """Returns when all that runs in the background has ended.

        Raises:
            SaveFailedError: a save failed.
        """
        self._saver.wait()

    def close(self) -> None:
        """As `wait`; other processes may save here then. May be called again."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.wait()
        except SaveFailedError as failure:
            if error is None:
                raise
            error.add_note(str(failure))
        finally:
            self._saver.release()

    def __repr__(self) -> str:
        latest, state = self.latest, "saving" if self._saver.is_saving else "idle"
        return f"Checkpointer({self._root!r}, latest={latest and latest.step}, {state})"
