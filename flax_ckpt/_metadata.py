"""What a checkpoint says about itself without loading it."""

import dataclasses
import datetime
from typing import Any, Generic, TypeVar, final

from etils import epath

T = TypeVar("T")
PyTreeMetadata = Any  # a tree of abstract leaves, in dicts and lists


@final
@dataclasses.dataclass(eq=False)
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
    _: dataclasses.KW_ONLY
    metadata: T
    init_timestamp_nsecs: int | None = None
    commit_timestamp_nsecs: int | None = None
    custom_metadata: dict[str, Any] | None = None

    @property
    def init_timestamp(self) -> datetime.datetime | None:
        """When the save began, in UTC."""
        return _datetime(self.init_timestamp_nsecs)

    @property
    def commit_timestamp(self) -> datetime.datetime | None:
        """When it was finished, in UTC."""
        return _datetime(self.commit_timestamp_nsecs)

    def __repr__(self) -> str:
        return (
            f"CheckpointMetadata(path={self.path}, metadata={self.metadata},"
            f" commit_timestamp={self.commit_timestamp}, custom_metadata={self.custom_metadata})"
        )


def _datetime(nsecs: int | None) -> datetime.datetime | None:
    if nsecs is None:
        return None
    return datetime.datetime.fromtimestamp(nsecs / 1e9, tz=datetime.UTC)
