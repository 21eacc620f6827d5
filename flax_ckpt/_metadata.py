"""What a checkpoint says about itself without loading it."""

import datetime
import functools
import os
from typing import Any, ClassVar, Generic, TypeVar

from etils import epath

from flax_ckpt.format.checkpoint import RootMetadata
from flax_ckpt.storage import deletion
from flax_ckpt.storage.record import Record

T = TypeVar("T")
PyTreeMetadata = Any  # a tree of abstract leaves, in dicts and lists


class CheckpointMetadata(Generic[T]):
    """Metadata of a checkpoint, from :func:`metadata` or :func:`checkpointables_metadata`.

    It can be given to `load` or `load_checkpointables` in place of the abstract value.

    Attributes:
        path: the checkpoint.
        metadata: the abstract tree, or a dict of abstract checkpointables by name.
        init_timestamp_nsecs: when the save began, in ns since the epoch.
        commit_timestamp_nsecs: when it was finished.
        custom_metadata: the user's own, as given to `save`.
    """

    path: epath.Path
    metadata: T
    _shown: ClassVar = ("path", "metadata", "commit_timestamp", "custom_metadata")

    def __init__(
        self,
        path: epath.Path,
        *,
        metadata: T,
        init_timestamp_nsecs: int | None = None,
        commit_timestamp_nsecs: int | None = None,
        custom_metadata: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.metadata = path, metadata
        times = init_timestamp_nsecs, commit_timestamp_nsecs
        self._root = RootMetadata({}, *times, custom_metadata or {})

    @functools.cached_property
    def _root(self) -> RootMetadata:
        """The checkpoint's own file, read when something in it is first asked for."""
        data = deletion.read_metadata(Record(os.path.abspath(self.path)))
        if data is None:
            os.stat(self.path)  # is there a checkpoint at all?
            return RootMetadata()
        return RootMetadata.from_bytes(data, os.fspath(self.path))

    @property
    def init_timestamp_nsecs(self) -> int | None:
        """When the save began, in ns since the epoch."""
        return self._root.init_timestamp_nsecs

    @property
    def commit_timestamp_nsecs(self) -> int | None:
        """When it was finished, in ns since the epoch."""
        return self._root.commit_timestamp_nsecs

    @property
    def custom_metadata(self) -> dict[str, Any] | None:
        """The user's own, as given to `save`."""
        return self._root.custom_metadata

    @property
    def init_timestamp(self) -> datetime.datetime | None:
        """When the save began, in UTC."""
        return _datetime(self.init_timestamp_nsecs)

    @property
    def commit_timestamp(self) -> datetime.datetime | None:
        """When it was finished, in UTC."""
        return _datetime(self.commit_timestamp_nsecs)

    def __repr__(self) -> str:
        shown = ", ".join(f"{name}={getattr(self, name)}" for name in self._shown)
        return f"CheckpointMetadata({shown})"


def _datetime(nsecs: int | None) -> datetime.datetime | None:
    return None if nsecs is None else datetime.datetime.fromtimestamp(nsecs / 1e9, tz=datetime.UTC)
