"""Options of a :class:`flax_ckpt.Context`, one group per room of the library.

    ctx = fc.Context()
    ctx.pytree.loading.partial_load = True
    with ctx:                      # from here on the options are frozen
        fc.load(path, abstract)

The names are Orbax v1's. An option that this release does not honour is not here, and setting it
is an error instead of silence.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from etils import epath

from flax_ckpt.errors import ContextFrozenError


class _Options:
    """Base: refuses unknown names, and any change while a Context that holds it is active."""

    _active: int = 0

    def __setattr__(self, name: str, value: Any) -> None:
        known = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        if name not in known:
            raise AttributeError(
                f"{type(self).__qualname__} has no option {name!r}; it has: {', '.join(known)}"
            )
        if self._active:
            raise ContextFrozenError(
                f"cannot set {type(self).__qualname__}.{name}: the Context that holds it is active."
                " Set options before `with ctx:`, or derive a new one: `Context(ctx)`."
            )
        object.__setattr__(self, name, value)


def freeze(options: object, by: int) -> None:
    """Counts one activation more (`by=1`) or less (`by=-1`) of `options` and all groups in it."""
    if isinstance(options, _Options):
        object.__setattr__(options, "_active", options._active + by)  # pyright: ignore[reportPrivateUsage]
        for field in dataclasses.fields(options):  # type: ignore[arg-type]
            freeze(getattr(options, field.name), by)


def copy(options: Any) -> Any:
    """A copy of an option group that is frozen by nobody; values that are no groups are shared."""
    if not isinstance(options, _Options):
        return options
    values = {f.name: copy(getattr(options, f.name)) for f in dataclasses.fields(options)}  # type: ignore[arg-type]
    return type(options)(**values)


@dataclasses.dataclass(kw_only=True)
class AsyncOptions(_Options):
    """How saves run in the background.

    Attributes:
        timeout_secs: seconds to wait for other processes at each point where all must meet.
        post_finalization_callback: called without arguments, in the background thread, after the
            checkpoint is durable. What it raises is the error of that save.
    """

    timeout_secs: int = 1200
    post_finalization_callback: Callable[[], None] | None = None


@dataclasses.dataclass(kw_only=True)
class MultiprocessingOptions(_Options):
    """Which processes take part.

    Attributes:
        primary_host: index of the process that writes everything that is written once.
        active_processes: indices of the processes that call; None: all.
        barrier_sync_key_prefix: keeps the barriers of two concurrent users apart.
    """

    primary_host: int = 0
    active_processes: set[int] | None = None
    barrier_sync_key_prefix: str | None = None


@dataclasses.dataclass(kw_only=True)
class FileOptions(_Options):
    """How directories and files are made.

    Attributes:
        path_permission_mode: mode of the checkpoint's directories, such as 0o750; None: the umask.
        path_class: class of the paths that metadata returns.
    """

    path_permission_mode: int | None = None
    path_class: type[epath.Path] = epath.Path


@dataclasses.dataclass(kw_only=True)
class PyTreeOptions(_Options):
    """How the structure of trees is saved and loaded."""

    @dataclasses.dataclass(kw_only=True)
    class Loading(_Options):
        """Options for loading.

        Attributes:
            partial_load: leaves that the abstract tree does not name are not loaded, instead of
                being an error. A leaf that it names and the checkpoint lacks is an error all the
                same, unless it is `PLACEHOLDER`: an abstract leaf never comes back as data.
        """

        partial_load: bool = False

    loading: Loading = dataclasses.field(default_factory=Loading)


@dataclasses.dataclass(kw_only=True)
class ArrayOptions(_Options):
    """How arrays are saved."""

    @dataclasses.dataclass(kw_only=True)
    class Saving(_Options):
        """Options for saving.

        Attributes:
            storage_options: how one array is stored.
        """

        @dataclasses.dataclass(kw_only=True)
        class StorageOptions(_Options):
            """How one array is stored.

            Attributes:
                chunk_byte_size: upper bound of a chunk, in bytes; None: 64 MiB.
            """

            chunk_byte_size: int | None = None

        storage_options: StorageOptions = dataclasses.field(default_factory=StorageOptions)

    saving: Saving = dataclasses.field(default_factory=Saving)


@dataclasses.dataclass(kw_only=True)
class CheckpointablesOptions(_Options):
    """Which handlers are used.

    Attributes:
        registry: a :class:`flax_ckpt.handlers.CheckpointableHandlerRegistry`, as
            :func:`flax_ckpt.handlers.local_registry` makes it. None: the global registry.
    """

    registry: Any = None


@dataclasses.dataclass(kw_only=True)
class MemoryOptions(_Options):
    """How host memory is used.

    Attributes:
        deepcopy_host_arrays: NumPy leaves are copied before a save returns, so that the caller
            may overwrite them. False: no copy; the caller leaves them alone until it is done.
    """

    deepcopy_host_arrays: bool = True
