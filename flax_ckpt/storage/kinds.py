"""What a directory is: a checkpoint, a part of one, the root of a run, something unfinished.

kinds.is_checkpoint("/run/100")        # True
kinds.describe("/run")                 # "is the root of a run, not one checkpoint; its ..."
"""

import difflib
import os
import re
from collections.abc import Iterable

from flax_ckpt.errors import CheckpointNotFoundError, InvalidLayoutError
from flax_ckpt.format import names

_SHOWN = 12  # names in a message
_SAFETENSORS = ".safetensors"
_ROOT_MARKS = names.MARKS - {names.TREE_METADATA}  # of a checkpoint with checkpointables


def is_checkpoint(path: str) -> bool:
    """Whether a path is a finished checkpoint, of any layout."""
    if not os.path.isdir(path) or unfinished(path) or owner(path):
        return False
    return _has(path, names.MARKS) or bool(
        not checkpoints_in(path) and any(holds_tree(entry.path) for entry in os.scandir(path))
    )


def holds_tree(path: str) -> bool:
    """Whether a directory is that of a PyTree."""
    return os.path.isfile(os.path.join(path, names.TREE_METADATA))


def is_item_tree(path: str) -> bool:
    """Whether a directory is a tree within a checkpoint, and none of its own, as v0's can be."""
    return holds_tree(path) and not _has(path, [names.CHECKPOINT_METADATA])


def is_item(entry: os.DirEntry[str]) -> bool:
    """Whether what is in a checkpoint is the directory of a checkpointable."""
    ignored = entry.name in names.IGNORED_ITEMS or names.is_unfinished(entry.name)
    return entry.is_dir() and not ignored


def owner(path: str) -> str | None:
    """The checkpoint that the directory is a checkpointable of."""
    parent = os.path.dirname(path)
    return parent if _has(parent, (*_ROOT_MARKS, names.DELETION_RECORD)) else None


def unfinished(path: str) -> str | None:
    """Says of which operation a directory is left over; None if its name says nothing."""
    for place in (path, os.path.dirname(path)):
        session, _, _ = place.partition(names.TMP_SUFFIX)
        if session.endswith(names.SESSION_SUFFIX):
            call = f"flax_ckpt.partial.finalize({session.removesuffix(names.SESSION_SUFFIX)!r})"
            return f"an unfinished partial save: {call} completes it"
        if session.endswith(names.PARTIAL_SUFFIX):
            final = session.removesuffix(names.PARTIAL_SUFFIX)
            call = f"orbax.checkpoint.v1.partial.finalize({final!r})"
            return f"an unfinished partial save of Orbax: {call} completes it"
    final, mark, _ = os.path.basename(path).partition(names.TMP_SUFFIX)
    if not mark or os.path.islink(path):
        return None
    if final.endswith(".deleted"):
        return "unfinished: what an interrupted deletion left; it can be removed"
    return (
        "unfinished: the save that made it did not commit. If that does not run any more, it can"
        " be removed; the next save to the same path does so"
    )


def checkpoints_in(path: str) -> list[str]:
    """Names of the checkpoints in a directory, by their last number."""
    found = [
        entry.name
        for entry in os.scandir(path)
        if entry.is_dir() and names.TMP_SUFFIX not in entry.name and _has(entry.path, _ROOT_MARKS)
    ]
    return sorted(found, key=lambda name: (int((re.findall(r"\d+", name) or ["-1"])[-1]), name))


def describe(path: str) -> str:
    """Says what a directory is, after its path, that is not the checkpoint that was wanted."""
    if left := unfinished(path):
        return f"is {left}"
    if steps := checkpoints_in(path):
        shown = ("…, " if len(steps) > _SHOWN else "") + ", ".join(steps[-_SHOWN:])
        last = os.path.join(path, steps[-1])
        return f"is the root of a run, not one checkpoint; its steps: {shown}. Give one of them" + (
            f", e.g. {last}, or use flax_ckpt.restore_train_state, which finds the latest"
            if steps[-1].isdigit()
            else f": flax_ckpt.load({last!r})"
        )
    if whole := owner(path):
        return (
            f"is one checkpointable of the checkpoint {whole}: give that path (to flax_ckpt.load"
            f" or flax_ckpt.delete with checkpointable_name={os.path.basename(path)!r})"
        )
    if any(name.endswith(_SAFETENSORS) for name in os.listdir(path)):
        return (
            f"holds safetensors files, which are no checkpoint of this format: {contents(path)}."
            " Load them with safetensors.flax.load_file"
        )
    return (
        f"is no checkpoint: it has neither {names.CHECKPOINT_METADATA} nor a directory with"
        f" {names.TREE_METADATA}; it has: {contents(path)}"
    )


def require_directory(path: str) -> None:
    """Checks that a directory is there.

    Raises:
        CheckpointNotFoundError: says what lies nearest.
        InvalidLayoutError: it is a file.
    """
    if os.path.isdir(path):
        return
    if path.endswith(_SAFETENSORS) and os.path.lexists(path):
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


def contents(path: str) -> str:
    """What is in a directory, as error messages print it."""
    there = sorted(os.listdir(path))
    shown = there[:_SHOWN] + ["…"] * (len(there) > _SHOWN)
    return ", ".join(shown) or "nothing"


def require_root(path: str) -> None:
    """Checks that steps may be made in a directory, if there is one.

    Raises:
        InvalidLayoutError: it is one checkpoint, or in one, or unfinished; or a file.
    """
    if os.path.lexists(path) and not os.path.isdir(path):
        raise InvalidLayoutError(f"{path} is a file; the root of a run is a directory")
    if left := unfinished(path):
        raise InvalidLayoutError(f"{path} is {left}: it cannot be the root of a run")
    step = owner(path) or (path if _has(path, names.MARKS) else None)
    if step is not None:
        raise InvalidLayoutError(
            f"{path} is {'one checkpoint' if step == path else f'in the checkpoint {step}'}, not"
            f" the root of a run, in which each step gets a directory of its own: give"
            f" {os.path.dirname(step)}. Nothing was written"
        )


def _has(path: str, files: Iterable[str]) -> bool:
    return any(os.path.lexists(os.path.join(path, name)) for name in files)
