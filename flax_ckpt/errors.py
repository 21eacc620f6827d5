"""Every exception this package raises on purpose.

    FlaxCkptError
    ├── CheckpointNotFoundError   (FileNotFoundError)  nothing there; says what lies nearest
    │   ├── StepNotFoundError         (ValueError too)  a run has no such step; says which it has
    │   └── CheckpointableNotFoundError  (KeyError too)  a checkpoint has no such checkpointable
    ├── CheckpointExistsError     (FileExistsError, ValueError)  the target is taken
    │   └── StepAlreadyExistsError    the step was saved before
    ├── InvalidLayoutError        (ValueError)  something is there, but no checkpoint
    ├── FormatError               (ValueError)  bytes that do not follow the format
    │   ├── DamagedCheckpointError    a checksum, length or file of a checkpoint is wrong
    │   └── NoLeafHandlerError        a saved leaf is of a kind that is not known here
    ├── TreeMismatchError         (ValueError)  the saved tree and the wanted tree differ
    ├── UnsupportedLeafError      (TypeError, ValueError)  leaves that cannot be saved, all of them
    ├── DuplicateNameError        (ValueError)  two leaves would share one name on disk
    ├── ConfigError               (TypeError, ValueError)  a config value that cannot be saved
    ├── NoEntryError              (KeyError)    no handler for a checkpointable
    ├── AlreadyExistsError        (ValueError)  a handler is registered twice
    ├── NotHandleableError        (ValueError)  a bound handler refuses its checkpointable
    ├── ContextFrozenError        (RuntimeError)  an active Context was mutated
    ├── StateError                (ValueError)  a training state or step that cannot be used
    ├── RunInUseError             (RuntimeError)  another process saves into this run
    ├── DeletionInProgressError   (RuntimeError)  what is asked for is being deleted
    ├── DeletionRecoveryError     (RuntimeError)  an unfinished deletion that does not fit this one
    ├── SaveFailedError           (RuntimeError)  a background save failed; cause chained
    ├── SaveCancelledError        (RuntimeError)  a save was cancelled
    └── BarrierTimeoutError       (TimeoutError)  another process did not arrive

And one that is no error: Preempted (SystemExit), which ends a process that was told to end.

Each one also is the builtin that a caller would catch without knowing us.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass


class FlaxCkptError(Exception):
    """Base of all errors of this package."""


class CheckpointNotFoundError(FlaxCkptError, FileNotFoundError):
    """There is no checkpoint at the path."""


class CheckpointableNotFoundError(CheckpointNotFoundError, KeyError):
    """A checkpoint has no checkpointable of that name; says which it has."""


class CheckpointExistsError(FlaxCkptError, FileExistsError, ValueError):
    """A checkpoint is at the path already and `overwrite` was not asked for."""


class _StepError(FlaxCkptError):
    def __init__(
        self, message: str, *, path: str | os.PathLike[str], step: int | None = None
    ) -> None:
        super().__init__(message)
        self.step, self.path = step, os.fspath(path)


class StepNotFoundError(_StepError, CheckpointNotFoundError, ValueError):
    """A run has no such step.

    Attributes:
        step: the one asked for; None: the latest, of a run that has none.
        path: where it would be.
    """


class StepAlreadyExistsError(_StepError, CheckpointExistsError):
    """The step was saved before and `overwrite` was not asked for.

    Attributes:
        step: its number.
        path: where it is.
    """


class InvalidLayoutError(FlaxCkptError, ValueError):
    """The path exists but is not a checkpoint of a known layout."""


class FormatError(FlaxCkptError, ValueError):
    """Bytes or JSON that do not follow the on-disk format."""


class DamagedCheckpointError(FormatError):
    """A checkpoint whose bytes are not the ones that were saved."""


class NoLeafHandlerError(FormatError):
    """No leaf handler is registered for the kind of a saved leaf."""


@dataclass(frozen=True)
class Difference:
    """One leaf or node where the saved and the wanted tree differ.

    Attributes:
        path: key path of the leaf: `params/dense/kernel`.
        saved: what the checkpoint has, e.g. `float32[3,4]`, or `nothing`.
        wanted: what the caller asked for.
    """

    path: str
    saved: str
    wanted: str

    def __str__(self) -> str:
        return f"{self.path}: saved {self.saved}, wanted {self.wanted}"


class TreeMismatchError(FlaxCkptError, ValueError):
    """The wanted tree cannot be filled from the saved one.

    Attributes:
        differences: every difference found, in tree order.
    """

    def __init__(self, message: str, differences: Sequence[Difference] = ()) -> None:
        super().__init__(message)
        self.differences = tuple(differences)


class UnsupportedLeafError(FlaxCkptError, TypeError, ValueError):
    """Leaves of a type that cannot be saved."""


class DuplicateNameError(FlaxCkptError, ValueError):
    """Two leaves of one tree would be stored under the same name."""


class ConfigError(FlaxCkptError, TypeError, ValueError):
    """A value of a run's config that cannot be saved or read back."""


class NoEntryError(FlaxCkptError, KeyError):
    """No registered handler fits a checkpointable."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


class AlreadyExistsError(FlaxCkptError, ValueError):
    """A handler or a name is registered already."""


class NotHandleableError(FlaxCkptError, ValueError):
    """The handler bound to a name cannot take the value given for it."""


class ContextFrozenError(FlaxCkptError, RuntimeError):
    """Options of a Context were changed while it is active."""


class StateError(FlaxCkptError, ValueError):
    """A training state, step or restore target that cannot be used."""


class RunInUseError(FlaxCkptError, RuntimeError):
    """Another process saves into this run."""


class DeletionInProgressError(FlaxCkptError, RuntimeError):
    """A checkpointable whose deletion has begun and not ended."""


class DeletionRecoveryError(FlaxCkptError, RuntimeError):
    """The record of an unfinished deletion makes no sense, or is that of another one."""


class SaveFailedError(_StepError, RuntimeError):
    """A save that ran in the background failed; `__cause__` says why.

    Attributes:
        path: the checkpoint that was not written.
        step: the training step, if there is one.
    """


class SaveCancelledError(FlaxCkptError, RuntimeError):
    """A save was cancelled before it was committed."""


class BarrierTimeoutError(FlaxCkptError, TimeoutError):
    """Another process did not reach the same point in time."""


class Preempted(SystemExit):
    """The process was told to end, and the state is saved; see `CheckpointCallback`.

    Attributes:
        step: the one that is saved.
        code: exit code of the process: 128 and the number of the signal, as shells have it.
    """

    def __init__(self, code: int, step: int) -> None:
        super().__init__(code)
        self.step = step
