"""The steps of a run: directories named by the number of completed updates.

What is on disk is the evidence; there is no index that could disagree with it.
"""

import datetime
import logging
import os
import re
from collections.abc import Callable

from flax_ckpt.errors import CheckpointNotFoundError
from flax_ckpt.format import names
from flax_ckpt.storage import commit, files
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
    raise CheckpointNotFoundError(f"{root} has no committed step; it has: {contents(root)}")


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


def clean(root: str, is_step: Callable[[str], object] = _STEP.fullmatch) -> None:
    """Removes what killed saves and deletions left under `root`; only what bears our mark.

    Args:
        root: of the run.
        is_step: whether a name is that of a step.
    """
    if not os.path.isdir(root):
        return
    for entry in os.scandir(root):
        step, mark, _ = entry.name.partition(names.TMP_SUFFIX)
        ours = mark and is_step(step.removesuffix(".deleted").removesuffix(".replaced"))
        if ours and not commit.has_owner(entry.path):
            commit.remove_left_over(entry.path)
