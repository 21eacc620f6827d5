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
    if _has(path, names.MARKS):
        return True
    inside = [os.path.join(path, name) for name in os.listdir(path)]
    return any(map(holds_tree, inside)) and not checkpoints_in(path)


def holds_tree(path: str) -> bool:
    """Whether a directory is that of a PyTree."""
    return os.path.isfile(os.path.join(path, names.TREE_METADATA))


def is_item_tree(path: str) -> bool:
    """Whether a directory is a tree within a checkpoint, and none of its own, as v0's can be."""
    return holds_tree(path) and not _has(path, [names.CHECKPOINT_METADATA])


def is_item(entry: os.DirEntry[str]) -> bool:
    """Whether what is in a checkpoint is the directory of a checkpointable."""
    ignored = entry.name in names.IGNORED_ITEMS or names.is_unfinished(entry.name)
    return os.path.isdir(entry.path) and not ignored  # `is_dir` fails on a link to itself


def owner(path: str) -> str | None:
    """The checkpoint that the directory is a checkpointable of."""
    parent = os.path.dirname(path)
    return parent if _has(parent, (*_ROOT_MARKS, names.DELETION_RECORD)) else None


def unfinished(path: str) -> str | None:
    """Says of which operation a directory is left over; None if its name says nothing."""
    for place in (path, os.path.dirname(path)):
        session, _, _ = place.partition(names.TMP_SUFFIX)
        for suffix, whose, module in (
            (names.SESSION_SUFFIX, "", "flax_ckpt"),
            (names.PARTIAL_SUFFIX, " of Orbax", "orbax.checkpoint.experimental.v1"),
        ):
            if session.endswith(suffix):
                call = f"{module}.partial.finalize({session.removesuffix(suffix)!r})"
                return f"an unfinished partial save{whose}: {call} completes it"
    final, mark, _ = os.path.basename(path).partition(names.TMP_SUFFIX)
    if not mark or os.path.islink(path):
        return None
    if final.endswith(".deleted"):
        return "unfinished: what an interrupted deletion left; it can be removed"
    why = "the save that made it did not commit. If that does not run any more, it can be removed"
    return f"unfinished: {why}; the next save to the same path does so"


def checkpoints_in(path: str) -> list[str]:
    """Names of the checkpoints in a directory, by their last number."""
    there = [entry for entry in os.scandir(path) if names.TMP_SUFFIX not in entry.name]
    found = [entry.name for entry in there if _has(entry.path, _ROOT_MARKS)]
    return sorted(found, key=lambda name: (int((re.findall(r"\d+", name) or ["-1"])[-1]), name))


def describe(path: str) -> str:
    """Says what a directory is, after its path, that is not the checkpoint that was wanted."""
    if left := unfinished(path):
        return f"is {left}"
    if steps := checkpoints_in(path):
        shown = ("…, " if len(steps) > _SHOWN else "") + ", ".join(steps[-_SHOWN:])
        last = os.path.join(path, steps[-1])
        if not any(map(names.step_of, steps)):
            return f"is no checkpoint itself; there are some in it: {shown}. Give one of them"
        return f"is the root of a run, not one checkpoint; its steps: {shown}. Give one of them" + (
            f", e.g. {last}, or use flax_ckpt.restore_train_state, which finds the latest"
            if steps[-1].isdigit()
            else f": flax_ckpt.load({last!r})"
        )
    if whole := owner(path):
        calls = "flax_ckpt.load or flax_ckpt.delete with checkpointable_name"
        what = f"give that path (to {calls}={os.path.basename(path)!r})"
        return f"is one checkpointable of the checkpoint {whole}: {what}"
    if any(name.endswith(_SAFETENSORS) for name in os.listdir(path)):
        what = "safetensors files, which are no checkpoint of this format"
        return f"holds {what}: {contents(path)}. Load them with safetensors.flax.load_file"
    what = f"{names.CHECKPOINT_METADATA} nor a directory with {names.TREE_METADATA}"
    return f"is no checkpoint: it has neither {what}; it has: {contents(path)}"


def require_directory(path: str) -> None:
    """Checks that a directory is there.

    Raises:
        CheckpointNotFoundError: says what lies nearest.
        InvalidLayoutError: it is a file.
    """
    if not os.path.lexists(path):
        raise not_there(path)
    if not os.path.isdir(path):
        what = "a file; a checkpoint is a directory"
        if path.endswith(_SAFETENSORS):
            what = "a safetensors file, no checkpoint: load it with safetensors.flax.load_file"
        raise InvalidLayoutError(f"{path} is {what}")


def not_there(path: str) -> CheckpointNotFoundError:
    """The error for a path at which there is nothing: it says what lies nearest."""
    missing, nearest = path, os.path.dirname(path)
    while not os.path.isdir(nearest):
        missing, nearest = nearest, os.path.dirname(nearest)
    name, there = os.path.basename(missing), os.listdir(nearest)
    finalize = f"flax_ckpt.partial.finalize({path!r})"
    begun = {
        names.SESSION_SUFFIX: f"a partial save of it is unfinished: {finalize}",
        names.PARTIAL_SUFFIX: "a partial save of it by Orbax is unfinished: finalize it there",
        names.TMP_SUFFIX: "a save of it has begun and not committed",
    }
    known = [other for other in there if not names.is_unfinished(other)]
    similar = difflib.get_close_matches(name, known, 1)
    hints = [hint for suffix, hint in begun.items() if missing == path and name + suffix in there]
    hints += [f"did you mean {os.path.join(nearest, other)}?" for other in similar]
    text = f"{path} does not exist; {nearest} has: {contents(nearest)}"
    return CheckpointNotFoundError("; ".join([text, *hints[:1]]))


def by_number(name: str) -> list[str | int]:
    """A key to sort names by the numbers in them."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def contents(path: str) -> str:
    """What is in a directory, as error messages print it."""
    there = sorted(os.listdir(path), key=by_number)
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
    whole = owner(path)
    if whole or _has(path, names.MARKS):
        raise InvalidLayoutError(
            f"{path} is {f'in the checkpoint {whole}' if whole else 'one checkpoint'}, not the root"
            " of a run, in which each step gets a directory of its own: give"
            f" {os.path.dirname(whole or path)}. Nothing was written"
        )


def _has(path: str, files: Iterable[str]) -> bool:
    return any(os.path.lexists(os.path.join(path, name)) for name in files)
