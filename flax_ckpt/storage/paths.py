"""Paths as users give them: strings, `pathlib`, `etils.epath`; relative ones, ones with `~`."""

import os

from flax_ckpt.errors import CheckpointNotFoundError, InvalidLayoutError


def local_path(path: str | os.PathLike[str]) -> str:
    """The absolute path on a local or mounted file system, without a trailing slash.

    Raises:
        InvalidLayoutError: a URL; object stores are for a later release.
    """
    text = os.fspath(path)
    if not text:
        raise InvalidLayoutError("the path is empty")
    scheme, separator, _ = text.partition("://")
    if separator and scheme.isalnum():
        raise InvalidLayoutError(
            f"{text}: this release saves to and loads from local and mounted file systems, not"
            f" {scheme}://; mount the bucket, or copy the checkpoint"
        )
    return os.path.abspath(os.path.expanduser(text))


def require_directory(path: str) -> None:
    """Checks that a directory is there.

    Raises:
        CheckpointNotFoundError: says what lies nearest.
        InvalidLayoutError: it is a file.
    """
    if os.path.isdir(path):
        return
    if os.path.lexists(path):
        raise InvalidLayoutError(f"{path} is a file; a checkpoint is a directory")
    nearest = os.path.dirname(path)
    while not os.path.isdir(nearest):
        nearest = os.path.dirname(nearest)
    raise CheckpointNotFoundError(f"{path} does not exist; {nearest} has: {contents(nearest)}")


def contents(path: str) -> str:
    """What is in a directory, as error messages print it."""
    there = sorted(os.listdir(path))
    return ", ".join(there[:12]) + (", …" if len(there) > 12 else "") if there else "nothing"
