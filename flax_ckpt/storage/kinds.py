"""What a directory is: a checkpoint, a part of one, the root of a run, something unfinished.

kinds.is_checkpoint("/run/100")        # True
kinds.describe("/run")                 # "is the root of a run, not one checkpoint; its ..."
"""

import os
import re
from collections.abc import Iterable

from flax_ckpt.errors import InvalidLayoutError
from flax_ckpt.format import names
from flax_ckpt.storage.paths import contents, is_safetensors

_SHOWN = 12  # steps in a message
_ROOT_MARKS = names.MARKS - {names.TREE_METADATA}  # of a checkpoint with checkpointables


def is_checkpoint(path: str) -> bool:
    """Whether a path is a finished checkpoint, of any layout."""
    if not os.path.isdir(path) or unfinished(path) or owner(path):
        return False
    return _has(path, names.MARKS) or bool(_trees(path) and not checkpoints_in(path))


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
    if any(map(is_safetensors, os.listdir(path))):
        return (
            f"holds safetensors files, which are no checkpoint of this format: {contents(path)}."
            " Load them with safetensors.flax.load_file"
        )
    return (
        f"is no checkpoint: it has neither {names.CHECKPOINT_METADATA} nor a directory with"
        f" {names.TREE_METADATA}; it has: {contents(path)}"
    )


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


def _trees(path: str) -> list[str]:
    return [e.name for e in os.scandir(path) if _has(e.path, [names.TREE_METADATA])]
