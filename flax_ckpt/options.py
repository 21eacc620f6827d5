"""Options of a :class:`flax_ckpt.Context`, one group per room of the library.

    ctx = fc.Context()
    ctx.pytree.loading.partial_load = True
    with ctx:                      # from here on the options are frozen
        fc.load(path, abstract)

The names are Orbax v1's. An option that this release does not honour is not here, and setting it
is an error instead of silence.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Protocol, dataclass_transform

from etils import epath

from flax_ckpt.errors import ContextFrozenError


@dataclass_transform(kw_only_default=True)
class _Options:
    """Base: a dataclass that refuses unknown names, and changes while its Context is active."""

    _active: ClassVar[int] = 0  # an instance that is frozen has one of its own

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(kw_only=True)(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        known = [field.name for field in dataclasses.fields(self)]  # type: ignore[arg-type]
        group = type(self).__qualname__
        if name not in known:
            raise AttributeError(f"{group} has no option {name!r}; it has: {', '.join(known)}")
        if self._active:
            what = f"cannot set {group}.{name}: the Context that holds it is active."
            how = "Set options before `with ctx:`, or derive a new one: `Context(ctx)`."
            raise ContextFrozenError(f"{what} {how}")
        object.__setattr__(self, name, value)


def freeze(values: Iterable[object], by: int) -> None:
    """Counts one activation more (`by=1`) or less (`by=-1`) of all option groups, also nested."""
    for options in values:
        if isinstance(options, _Options):
            object.__setattr__(options, "_active", options._active + by)  # pyright: ignore[reportPrivateUsage]
            freeze(vars(options).values(), by)


def copy(options: Any) -> Any:
    """A copy of an option group that is frozen by nobody; values that are no groups are shared."""
    if not isinstance(options, _Options):
        return options
    values = {f.name: copy(getattr(options, f.name)) for f in dataclasses.fields(options)}  # type: ignore[arg-type]
    return type(options)(**values)


class AsyncOptions(_Options):
    """How saves run in the background.

    Attributes:
        timeout_secs: seconds to wait for other processes at each point where all must meet.
        post_finalization_callback: called without arguments, in the background thread, after the
            checkpoint is durable. What it raises is the error of that save.
    """

    timeout_secs: int = 1200
    post_finalization_callback: Callable[[], None] | None = None


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


class FileOptions(_Options):
    """How directories and files are made.

    Attributes:
        path_permission_mode: mode of the checkpoint's directories, such as 0o750; None: the umask.
            The owner may always read and write.
        path_class: class of the paths that metadata returns.
    """

    path_permission_mode: int | None = None
    path_class: type[epath.Path] = epath.Path


class PyTreeOptions(_Options):
    """How the structure of trees is saved and loaded."""

    class Loading(_Options):
        """Options for loading.

        Attributes:
            partial_load: leaves that the abstract tree does not name are not loaded, instead of
                being an error. A leaf that it names and the checkpoint lacks is an error all the
                same, unless it is `PLACEHOLDER`: an abstract leaf never comes back as data.
        """

        partial_load: bool = False

    loading: Loading = dataclasses.field(default_factory=Loading)


class ArrayOptions(_Options):
    """How arrays are saved and loaded."""

    class Saving(_Options):
        """Options for saving.

        Attributes:
            storage_options: how one array is stored.
            use_ocdbt: arrays of a tree go into one OCDBT database; False: a directory with plain
                files for each array, named as it.
            use_zarr3: arrays are stored as zarr version 3; False: as version 2.
            use_compression: chunks are compressed with zstd. Weights hardly compress, and saving
                takes several times as long: unlike in Orbax the default is False.
            ocdbt_target_data_file_size: bytes after which a process begins another data file of
                the database; 0 or None: never.
            scoped_storage_options_creator: called with the key path (as
                `jax.tree_util.tree_map_with_path` gives it) and the value of every leaf; what it
                returns wins over `storage_options`, field by field. None: nothing to change.
        """

        class ScopedStorageOptionsCreator(Protocol):
            """Chooses the storage options of one leaf."""

            def __call__(
                self, key: tuple[Any, ...], value: Any, /
            ) -> ArrayOptions.Saving.StorageOptions | None:
                """The options of the leaf at a key path; None: those of the tree."""

        class StorageOptions(_Options):
            """How one array is stored.

            Attributes:
                dtype: dtype on disk of JAX and NumPy arrays. Set for the whole tree it converts
                    only arrays of its own kind, float to float or integer to integer, so that a
                    step counter survives; for one leaf any but complex to real. Numbers and
                    typed keys stay as they are. Loading casts back to the dtype that is wanted.
                chunk_byte_size: upper bound of a chunk, in bytes; None: 64 MiB.
                shard_axes: axes along which an array is cut into chunks first, each at least
                    once; axes that a leaf lacks are of no account.
            """

            dtype: Any = None
            chunk_byte_size: int | None = None
            shard_axes: tuple[int, ...] | None = None

        storage_options: StorageOptions = dataclasses.field(default_factory=StorageOptions)
        use_ocdbt: bool = True
        use_zarr3: bool = True
        use_compression: bool = False
        ocdbt_target_data_file_size: int | None = None
        scoped_storage_options_creator: ScopedStorageOptionsCreator | None = None

    class Loading(_Options):
        """Options for loading.

        Attributes:
            enable_padding_and_truncation: an array may be wanted in another shape of the same
                rank: each axis is cut, or filled with zeros, at its end.
            raise_array_data_missing_error: False to take chunks that are missing from another
                writer's checkpoint as zeros. In our own, a missing chunk is always an error.
        """

        enable_padding_and_truncation: bool = False
        raise_array_data_missing_error: bool = True

    saving: Saving = dataclasses.field(default_factory=Saving)
    loading: Loading = dataclasses.field(default_factory=Loading)


class CheckpointablesOptions(_Options):
    """Which handlers are used.

    Attributes:
        registry: a :class:`flax_ckpt.handlers.CheckpointableHandlerRegistry`, as
            :func:`flax_ckpt.handlers.local_registry` makes it. None: the global registry.
    """

    registry: Any = None


class MemoryOptions(_Options):
    """How host memory is used.

    Attributes:
        deepcopy_host_arrays: NumPy leaves are copied before a save returns, so that the caller
            may overwrite them. False: no copy; the caller leaves them alone until it is done.
    """

    deepcopy_host_arrays: bool = True
