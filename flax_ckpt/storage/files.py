"""Small files and directories on a POSIX file system, and making them durable.

Every change of the file system goes through here: a failpoint lies before and after it, it is made
again if a signal interrupts it, and its error names the path.
"""

import concurrent.futures
import contextlib
import ctypes
import errno
import functools
import os
import shutil
import stat
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Concatenate, Final, ParamSpec, TypeVar

from flax_ckpt.errors import CheckpointExistsError, DamagedCheckpointError, InvalidLayoutError
from flax_ckpt.format import names
from flax_ckpt.storage import failpoints

if sys.platform == "darwin":
    import fcntl

PathLike = str | os.PathLike[str]
P = ParamSpec("P")
T = TypeVar("T")

MAX_WRITE: Final = 8 << 20  # ext4 takes several times as long for calls of 64 MiB

_SYNCS: Final = 8  # at a time
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100

# Of a file that is read whole and is no chunk of an array; of one with a line for each leaf, which
# on a mesh of 4,096 devices has 40 KB.
MAX_BYTES: Final = 64 << 20
MAX_TREE_BYTES: Final = 1 << 30


def local_path(path: PathLike) -> str:
    """The absolute path on a local or mounted file system, without a trailing slash.

    Raises:
        InvalidLayoutError: a URL; object stores are for a later release.
    """
    text = os.fsdecode(path)
    if not text or "\0" in text:
        raise InvalidLayoutError(f"{text!r} is no path: it is empty, or has a NUL in it")
    scheme, separator, _ = text.partition("://")
    if separator and scheme.isalnum():
        raise InvalidLayoutError(
            f"{text}: this release saves to and loads from local and mounted file systems, not"
            f" {scheme}://; mount the bucket, or copy the checkpoint"
        )
    return os.path.abspath(os.path.expanduser(text))


@contextlib.contextmanager
def naming(path: str) -> Generator[None]:
    """Calls on descriptors do not say in their errors of which file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


def _change(make: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """A change of what is at a path, which can be made again if it was interrupted."""
    once = failpoints.around(make)

    @functools.wraps(make)
    def call(path: str, /, *args: P.args, **kwargs: P.kwargs) -> T:
        while True:
            with naming(path), contextlib.suppress(InterruptedError):
                return once(path, *args, **kwargs)

    return call


@_change
def create(path: str) -> int:
    """Makes a file that was not there, and opens it for writing."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)


@_change
def append(path: str, fd: int, buffers: list[memoryview]) -> None:
    """Writes the buffers to an open file; what was written is taken out of the list."""
    while buffers:
        large = (n for n, view in enumerate(buffers) if len(view) > MAX_WRITE)
        call = [view[:MAX_WRITE] for view in buffers[: next(large, len(buffers)) + 1]]
        advance(buffers, os.writev(fd, call))


def advance(buffers: list[memoryview], count: int) -> None:
    """Drops the bytes that a call has transferred, so that the next goes on where it stopped."""
    while buffers and count >= len(buffers[0]):
        count -= len(buffers.pop(0))
    if count:
        buffers[0] = buffers[0][count:]


@_change
def sync_path(path: str) -> None:
    """Returns when a file, or the entries of a directory, survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync leaves it in the drive's cache there
        else:
            os.fsync(fd)
    finally:
        os.close(fd)


@_change
def mkdir(path: str) -> None:
    """Makes a directory that was not there."""
    os.mkdir(path)


@_change
def mkdirs(path: str) -> None:
    """Makes a directory and those above it that are missing."""
    os.makedirs(path, exist_ok=True)


@_change
def rename(source: str, target: str) -> None:
    """Gives something another name; a file of that name is replaced."""
    try:
        os.rename(source, target)
    except OSError:
        # Over NFS the answer to a rename that happened can get lost: look before believing it.
        if os.path.lexists(source) or not os.path.isdir(target):
            raise


@_change
def link(source: str, target: str) -> None:
    """Gives a file a second name."""
    os.link(source, target)


@_change
def unlink(path: str) -> None:
    """Removes a file."""
    os.unlink(path)


@_change
def clear(path: str) -> None:
    """Removes what is at a path, of whatever kind, if there is something."""
    if os.path.islink(path) or os.path.isfile(path):
        os.unlink(path)
    elif os.path.lexists(path):
        shutil.rmtree(path)


@_change
def chmod(path: str, mode: int) -> None:
    """Sets permission bits."""
    os.chmod(path, mode)


@_change
def touch(path: str) -> None:
    """Sets the times of a file to now."""
    os.utime(path)


@_change
def _exchange(source: str, target: str) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    arguments = (_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target))
    if libc.renameat2(*arguments, _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        raise OSError(code, os.strerror(code), target)
    return False


def exchange(source: str, target: str) -> None:
    """Each gets the other's name, at once where the file system can do that."""
    if _exchange(source, target):
        return
    # Three renames, and back if one of them fails.
    aside = f"{target}.replaced{names.TMP_SUFFIX}"
    clear(aside)
    with contextlib.ExitStack() as undo:
        for old, new in ((target, aside), (source, target), (aside, source)):
            rename(old, new)
            undo.callback(rename, new, old)
        undo.pop_all()


def in_threads(count: int, work: Callable[[T], object], items: Iterable[T]) -> None:
    """Does the work for each item, here and in so many threads; raises if it raises for one."""
    items, given = list(items), list[concurrent.futures.Future[object]]()
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        # Once the interpreter begins to end, executors take no more: what is left is done here.
        with contextlib.suppress(RuntimeError):
            given.extend(pool.submit(work, item) for item in items[1:])
        try:
            for item in items[:1] + items[1 + len(given) :]:
                work(item)
            for future in given:
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def sync_tree(root: str) -> None:
    """Syncs every regular file under `root`, then the directories, the innermost first."""
    in_threads(_SYNCS, sync_path, [os.path.join(root, name) for name in walk(root)])
    for directory in directories(root):
        sync_path(directory)


def make_directory(path: str) -> None:
    """Makes a directory and those above it that are missing, each durably."""
    if os.path.isdir(path):
        return
    if os.path.lexists(path):
        why = "is a file, or leads nowhere; there must be a directory"
        raise CheckpointExistsError(f"{path} {why}")
    make_directory(os.path.dirname(path))
    mkdirs(path)  # another process may have been faster
    try:
        sync_path(os.path.dirname(path))
    except OSError:  # else the next call would take it for durable
        with contextlib.suppress(OSError):
            os.rmdir(path)
        raise


@contextlib.contextmanager
def creating(path: str) -> Generator[int]:
    """Makes a file that was not there: its descriptor. If what follows fails, there is none."""
    fd = create(path)
    try:
        try:
            yield fd
        finally:
            with naming(path):
                os.close(fd)
    except OSError:
        clear(path)
        raise


def write(path: str, *data: bytes | memoryview) -> None:
    """Creates a file with these bytes; the commit makes it durable."""
    with creating(path) as fd:
        append(path, fd, list(map(memoryview, data)))


def replace(path: str, data: bytes, *, exclusive: bool = False) -> None:
    """Gives a file these bytes, at once and durably.

    Args:
        path: the file.
        data: all of it.
        exclusive: whether it is an error, `FileExistsError`, if it is there.
    """
    temporary = path + names.TMP_SUFFIX
    clear(temporary)  # of a crash
    try:
        write(temporary, data)
        sync_path(temporary)
        (link if exclusive else rename)(temporary, path)
    finally:
        clear(temporary)
    sync_path(os.path.dirname(path))


def read(path: str, most: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
        DamagedCheckpointError: it is something else, or has more bytes than `most`.
    """
    with naming(path), open(path, "rb", opener=open_regular) as file:
        if (size := os.stat(file.fileno()).st_size) > most:
            raise DamagedCheckpointError(f"{path} has {size} bytes, expected at most {most}")
        return file.read()


def blocks(path: str) -> Iterator[bytes]:
    """The bytes of a regular file of any size, a part at a time."""
    with naming(path), open(path, "rb", opener=open_regular) as file:
        while block := file.read(MAX_WRITE):
            yield block


def open_regular(path: str, flags: int) -> int:
    """Opens a regular file: a pipe would not answer, and a link could lead anywhere.

    Raises:
        DamagedCheckpointError: it is something else.
    """
    try:
        fd = os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG):
            raise
        refuse_link(path)
        raise DamagedCheckpointError(f"{path:.300} is {error.strerror}") from error
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise DamagedCheckpointError(f"{path} is no regular file")


def refuse_link(path: str) -> None:
    """Raises `DamagedCheckpointError` if a path is that of a link."""
    if os.path.islink(path):
        why = "no link in a checkpoint is followed; copy it with what they lead to, as cp -RL does"
        raise DamagedCheckpointError(f"{path} is a link that leads to {os.readlink(path)}: {why}")


def refuse_links(root: str) -> int:
    """Counts what is under `root`; a link, a pipe or a device is a `DamagedCheckpointError`."""
    count = 0
    for count, path in enumerate(_entries(root), 1):  # noqa: B007
        refuse_link(path)
        if not (os.path.isfile(path) or os.path.isdir(path)):
            raise DamagedCheckpointError(f"{path} is neither a file nor a directory")
    return count


def walk(root: str) -> list[str]:
    """Paths of all regular files under `root`, relative to it, with `/`, sorted."""
    regular = [path for path in _entries(root) if stat.S_ISREG(os.lstat(path).st_mode)]
    return sorted(os.path.relpath(path, root) for path in regular)


def directories(root: str) -> list[str]:
    """Those under `root`, the innermost first, and `root` itself."""
    return [directory for directory, _, _ in os.walk(root, topdown=False, onerror=_raise)]


def _entries(root: str) -> Iterator[str]:
    for directory, folders, regular in os.walk(root, onerror=_raise):
        yield from (os.path.join(directory, name) for name in (*folders, *regular))


def _raise(error: OSError) -> None:
    raise error
