"""Small files and directories on a POSIX file system, and making them durable.

Every write to a checkpoint that is not array data goes through here, and every sync.
"""

import os
import stat
import sys
from collections.abc import Iterator

from flax_ckpt.errors import CheckpointExistsError, FormatError, InvalidLayoutError
from flax_ckpt.format import names

if sys.platform == "darwin":
    import fcntl

PathLike = str | os.PathLike[str]


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


def read(path: str) -> bytes:
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


def refuse_links(root: str) -> None:
    """Raises `FormatError` if there is a symbolic link under `root`: it could lead out of it."""
    for path in _entries(root):
        if os.path.islink(path):
            raise FormatError(f"{path} is a link that leads to {os.readlink(path)}")


def walk(root: str) -> list[str]:
    """Paths of all regular files under `root`, relative to it, with `/`, sorted."""
    regular = [path for path in _entries(root) if stat.S_ISREG(os.lstat(path).st_mode)]
    return sorted(os.path.relpath(path, root) for path in regular)


def _entries(root: str) -> Iterator[str]:
    for directory, folders, regular in os.walk(root):
        yield from (os.path.join(directory, name) for name in (*folders, *regular))
