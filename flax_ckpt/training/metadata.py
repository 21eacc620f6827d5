"""Metadata of the steps of a run, and of the run itself.

    for checkpoint in checkpointer.checkpoints:
        checkpoint.step, checkpoint.time, checkpoint.metrics

A listing reads no file: times and metrics are read when they are first asked for.
"""

import dataclasses
import datetime
import functools
import os
from collections.abc import Mapping
from typing import Any, TypeVar, cast, final

import jax
import numpy as np
from etils import epath

from flax_ckpt import _metadata
from flax_ckpt.errors import FormatError, StateError
from flax_ckpt.format import checkpoint, jsons, names
from flax_ckpt.leaves import dtypes
from flax_ckpt.storage import files
from flax_ckpt.storage.record import Record
from flax_ckpt.training import progress

T = TypeVar("T")


@final
class CheckpointMetadata(_metadata.CheckpointMetadata[T]):
    """Metadata of one step of a run.

    Wherever a :class:`Checkpointer` takes a step, it takes this too.

    Attributes:
        step: the step's number.
        metrics: what was given to `save`, or None; read from `path` unless they are given here.
        time: when the step was committed; for one that is about to be saved, now.
        is_damaged: whether one of the two could not be read.

    >>> from etils import epath
    >>> found = CheckpointMetadata(3, epath.Path("/run/3"), metadata=None, metrics={"loss": 0.5})
    >>> found.step, found.metrics
    (3, {'loss': 0.5})
    """

    step: int
    is_damaged = False
    _shown = ("step", "path", "metadata", "time", "custom_metadata", "metrics")

    def __init__(
        self,
        step: int,
        path: epath.Path,
        *,
        metadata: T,
        init_timestamp_nsecs: int | None = None,
        commit_timestamp_nsecs: int | None = None,
        custom_metadata: dict[str, Any] | None = None,
        metrics: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(path, metadata=metadata)
        times = init_timestamp_nsecs, commit_timestamp_nsecs
        self._root = checkpoint.RootMetadata({}, *times, custom_metadata or {})
        self.step = step
        if metrics is not None:  # else those on disk: a user's name format need not read them
            self.metrics = metrics

    @functools.cached_property
    def metrics(self) -> dict[str, Any] | None:
        """What was given to `save`, or None.

        Those of an old step that is damaged must not stop a run that goes on saving: a warning.
        """
        try:
            record = Record(os.path.join(self.path, names.METRICS))
            if record.lists(names.METRICS_FILE):
                return jsons.parse_object(record.read(names.METRICS_FILE), record.directory)
        except FormatError as error:
            self._tell("the metrics", error)
        return None

    def _tell(self, what: str, error: FormatError) -> None:
        self.is_damaged = True
        progress.logger.warning("%s of %s cannot be read: %s", what, self.path, error)

    @functools.cached_property
    def time(self) -> datetime.datetime:
        """When the step was committed, in UTC; if nobody wrote it down, the directory's time.

        That too if it cannot be read: see `metrics`.
        """
        try:
            if self.commit_timestamp is not None:
                return self.commit_timestamp
        except FormatError as error:
            self._tell("the time", error)
        return datetime.datetime.fromtimestamp(os.stat(self.path).st_mtime, tz=datetime.UTC)


def listed(step: int, path: epath.Path) -> CheckpointMetadata[None]:
    """Metadata of a step whose files are read when they are asked for."""
    found = cast("CheckpointMetadata[None]", object.__new__(CheckpointMetadata))
    found.step, found.path, found.metadata = step, path, None
    return found


def of_step(
    found: CheckpointMetadata[None], described: _metadata.CheckpointMetadata[T]
) -> CheckpointMetadata[T]:
    """What a step looks like, with its number and metrics."""
    step: Any = listed(found.step, found.path)
    vars(step).update(vars(described), metrics=found.metrics)
    return step


def to_json(value: Any, name: str = "") -> Any:
    """Metrics as JSON has them: what is an array or a NumPy number becomes plain numbers."""
    if isinstance(value, Mapping):
        parts = cast("Mapping[Any, Any]", value)
        return {key: to_json(part, f"{name}/{key}".strip("/")) for key, part in parts.items()}
    is_array = isinstance(value, np.ndarray | np.generic | jax.Array)
    return numbers(name, value).tolist() if is_array else value


def numbers(name: str, value: Any) -> Any:
    """A metric as an array of what JSON has.

    Raises:
        StateError: it is neither a real number nor an array of them.
    """
    array = np.asarray(value)
    kind = dtypes.kind(array.dtype)
    if kind in ("bool", "int", "float"):
        return array.astype(np.float64) if kind == "float" else array
    raise StateError(f"metric {name!r} is {value!r}: metrics are real numbers or arrays of them")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RootMetadata:
    """Metadata of a whole run.

    Attributes:
        directory: root of the steps.
        custom_metadata: what was given to the first :class:`Checkpointer` of the run.

    >>> import tempfile, flax_ckpt as fc
    >>> with fc.training.Checkpointer(tempfile.mkdtemp(), custom_metadata={"run": 7}) as run:
    ...     run.root_metadata().custom_metadata
    {'run': 7}
    """

    directory: epath.Path
    custom_metadata: dict[str, Any] | None = None


def write_root(root: str, custom_metadata: dict[str, Any]) -> None:
    """Writes the metadata of a run, unless it was written before.

    Raises:
        FormatError: JSON cannot hold it.
    """
    path = os.path.join(root, *names.ROOT_METADATA)
    if not os.path.lexists(path):
        custom = jsons.checked_metadata(custom_metadata)
        files.make_directory(os.path.dirname(path))
        files.replace(path, jsons.dump({"internal_metadata": {}, "custom_metadata": custom}))


def read_root(root: str) -> dict[str, Any]:
    """The metadata of a run; empty if it has none.

    Raises:
        FormatError: the file is no JSON object.
    """
    for parts in (names.ROOT_METADATA, names.ROOT_METADATA_LEGACY):
        path = os.path.join(root, *parts)
        if os.path.isfile(path):
            return jsons.parse_object(files.read(path), path).get("custom_metadata") or {}
    return {}
