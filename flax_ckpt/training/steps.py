"""The steps of a run: directories named by the number of completed updates.

What is on disk is the evidence; there is no index that could disagree with it.
"""

import datetime
import logging
import os
import re

from flax_ckpt.errors import CheckpointNotFoundError
from flax_ckpt.format import names
from flax_ckpt.storage import commit, files, kinds
from flax_ckpt.storage.paths import contents, require_directory

logger = logging.getLogger("flax_ckpt")

SUPERSEDED = "superseded"
_STEP = re.compile(r"0|[1-9]\d*")


def committed(root: str) -> list[int]:
    """Steps that were committed under `root`, in order; empty if it is not there."""
    try:
        found = [entry.name for entry in os.scandir(root) if _STEP.fullmatch(entry.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(name) for name in found if is_checkpoint(os.path.join(root, name)))


def is_checkpoint(path: str) -> bool:
    """Whether a directory is a checkpoint: a rename gives it its name when it is complete."""
    return any(os.path.lexists(os.path.join(path, name)) for name in names.MARKS)


def path_of(root: str, step: int) -> str:
    """Where a step is, or will be."""
    return os.path.join(root, str(step))


def require_steps(root: str) -> list[int]:
    """The committed steps under `root`.

    Raises:
        CheckpointNotFoundError: there are none; says what is there.
    """
    require_directory(root)
    found = committed(root)
    if found:
        return found
    named = kinds.checkpoints_in(root)
    hint = f"; restore one of these by its path: {os.path.join(root, named[-1])}" if named else ""
    raise CheckpointNotFoundError(f"{root} has no committed step; it has: {contents(root)}{hint}")


def delete(root: str, step: int) -> None:
    """Deletes a step; it is out of the listing before its first byte goes."""
    commit.remove(path_of(root, step))


def supersede(root: str, after: int) -> None:
    """Moves the steps later than `after` aside, so that the latest follows the run that goes on.

    They are kept in `<root>/superseded/<step>-<utc>`; one WARNING says which.
    """
    later = [step for step in committed(root) if step > after]
    if not later:
        return
    aside = os.path.join(root, SUPERSEDED)
    os.makedirs(aside, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    for step in reversed(later):
        os.rename(path_of(root, step), os.path.join(aside, f"{step}-{now}"))
    files.sync_path(aside)
    files.sync_path(root)
    logger.warning(
        "this run goes on from step %d: the later steps %s were moved to %s", after, later, aside
    )


def clean(root: str) -> None:
    """Removes what killed saves and deletions left under `root`; only what bears our mark."""
    if not os.path.isdir(root):
        return
    for entry in os.scandir(root):
        step, mark, _ = entry.name.partition(names.TMP_SUFFIX)
        ours = mark and _STEP.fullmatch(step.removesuffix(".deleted").removesuffix(".replaced"))
        if ours and not commit.has_owner(entry.path):
            commit.remove_left_over(entry.path)
