"""Small files and directories on a POSIX file system, and making them durable.

Every write to a checkpoint that is not array data goes through here, and every sync.
"""

import errno
import os
import stat
import sys
from collections.abc import Iterator

from flax_ckpt.errors import (
    CheckpointExistsError,
    DamagedCheckpointError,
    FormatError,
    InvalidLayoutError,
)
from flax_ckpt.format import names

if sys.platform == "darwin":
    import fcntl

PathLike = str | os.PathLike[str]

MAX_BYTES = 64 << 20  # of a file that is read whole and is no chunk of an array


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


def sync(fd: int) -> None:
    """Returns when what was written to `fd` survives a power cut."""
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # fsync leaves it in the drive's cache there
    else:
        os.fsync(fd)


def sync_path(path: str) -> None:
    """Syncs a file, or the entries of a directory."""
    fd = os.open(path, os.O_RDONLY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def sync_tree(root: str) -> None:
    """Syncs every regular file under `root`, then every directory, the innermost first."""
    for name in walk(root):
        sync_path(os.path.join(root, name))
    for directory, _, _ in os.walk(root, topdown=False):
        sync_path(directory)


def make_directory(path: str) -> None:
    """Makes a directory and those above it that are missing, each durably."""
    if os.path.isdir(path):
        return
    if os.path.lexists(path):
        raise CheckpointExistsError(
            f"{path} is a file, or leads nowhere; there must be a directory"
        )
    make_directory(os.path.dirname(path))
    os.makedirs(path, exist_ok=True)  # another process may have been faster
    sync_path(os.path.dirname(path))


def write(path: str, data: bytes) -> None:
    """Creates a file with these bytes; it is durable after :func:`sync_tree`."""
    with open(path, "xb") as file:
        file.write(data)


def replace(path: str, data: bytes, *, exclusive: bool = False) -> None:
    """Gives a file these bytes, at once and durably.

    Args:
        path: the file.
        data: all of it.
        exclusive: whether it is an error, `FileExistsError`, if it is there.
    """
    temporary = path + names.TMP_SUFFIX
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        sync(file.fileno())
    if exclusive:
        os.link(temporary, path)
        os.unlink(temporary)
    else:
        os.replace(temporary, path)
    sync_path(os.path.dirname(path))


def read(path: str, most: int = MAX_BYTES) -> bytes:
    """The bytes of a regular file.

    Raises:
        DamagedCheckpointError: it is something else, or has more bytes than `most`.
    """
    with open(path, "rb", opener=open_regular) as file:
        if (size := os.stat(file.fileno()).st_size) > most:
            raise DamagedCheckpointError(f"{path} has {size} bytes, expected at most {most}")
        return file.read()


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
        why = (
            f"a link that leads to {os.readlink(path)}" if os.path.islink(path) else error.strerror
        )
        raise DamagedCheckpointError(f"{path:.300} is {why}") from error
    if stat.S_ISREG(os.fstat(fd).st_mode):
        return fd
    os.close(fd)
    raise DamagedCheckpointError(f"{path} is no regular file")


def refuse_links(root: str) -> int:
    """Raises `FormatError` if there is a link, a pipe or a device under `root`; counts the rest."""
    count = 0
    for count, path in enumerate(_entries(root), 1):  # noqa: B007
        if os.path.islink(path):
            raise FormatError(f"{path} is a link that leads to {os.readlink(path)}")
        if not (os.path.isfile(path) or os.path.isdir(path)):
            raise FormatError(f"{path} is neither a file nor a directory")
    return count


def walk(root: str) -> list[str]:
    """Paths of all regular files under `root`, relative to it, with `/`, sorted."""
    regular = [path for path in _entries(root) if stat.S_ISREG(os.lstat(path).st_mode)]
    return sorted(os.path.relpath(path, root) for path in regular)


def _entries(root: str) -> Iterator[str]:
    for directory, folders, regular in os.walk(root):
        yield from (os.path.join(directory, name) for name in (*folders, *regular))
