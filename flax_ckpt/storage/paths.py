"""Paths as users give them: strings, `pathlib`, `etils.epath`; relative ones, ones with `~`."""

import difflib
import os

from flax_ckpt.errors import CheckpointNotFoundError, InvalidLayoutError
from flax_ckpt.format import names


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
    if is_safetensors(path) and os.path.lexists(path):
        raise InvalidLayoutError(
            f"{path} is a safetensors file, no checkpoint: load it with safetensors.flax.load_file"
        )
    if os.path.lexists(path):
        raise InvalidLayoutError(f"{path} is a file; a checkpoint is a directory")
    raise not_there(path)


def not_there(path: str) -> CheckpointNotFoundError:
    """The error for a path at which there is nothing: it says what lies nearest."""
    missing, nearest = path, os.path.dirname(path)
    while not os.path.isdir(nearest):
        missing, nearest = nearest, os.path.dirname(nearest)
    name, there = os.path.basename(missing), os.listdir(nearest)
    hint = ""
    known = [n for n in there if names.TMP_SUFFIX not in n and names.PARTIAL_SUFFIX not in n]
    if missing == path and f"{name}{names.SESSION_SUFFIX}" in there:
        hint = f"; a partial save of it is unfinished: flax_ckpt.partial.finalize({path!r})"
    elif missing == path and f"{name}{names.PARTIAL_SUFFIX}" in there:
        hint = "; a partial save of it by Orbax is unfinished: finalize it there"
    elif missing == path and f"{name}{names.TMP_SUFFIX}" in there:
        hint = "; a save of it has begun and not committed"
    elif similar := difflib.get_close_matches(name, known, 1):
        hint = f"; did you mean {os.path.join(nearest, similar[0])}?"
    return CheckpointNotFoundError(
        f"{path} does not exist; {nearest} has: {contents(nearest)}{hint}"
    )


def is_safetensors(name: str) -> bool:
    """Whether a file is a safetensors file, by its name."""
    return name.endswith(".safetensors")


def contents(path: str) -> str:
    """What is in a directory, as error messages print it."""
    there = sorted(os.listdir(path))
    return ", ".join(there[:12]) + (", …" if len(there) > 12 else "") if there else "nothing"
