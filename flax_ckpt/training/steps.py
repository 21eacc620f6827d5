"""The steps of a run: directories named by the number of completed updates.

What is on disk is the evidence; there is no index that could disagree with it. So is how the steps
are called: a run that Orbax began with `ckpt_000020` goes on with `ckpt_000030`.
"""

import dataclasses
import datetime
import logging
import os
from collections.abc import Callable

from flax_ckpt.errors import CheckpointNotFoundError, InvalidLayoutError
from flax_ckpt.format import names
from flax_ckpt.storage import commit, files, kinds
from flax_ckpt.storage.kinds import contents, require_directory

logger = logging.getLogger("flax_ckpt")

SUPERSEDED = "superseded"


@dataclasses.dataclass(frozen=True)
class Naming:
    """How the steps of a run are called: `[<prefix>_]<step>`, with zeros up to a width."""

    prefix: str = ""
    width: int = 1

    def name(self, step: int) -> str:
        """The name of a step's directory."""
        return (self.prefix and f"{self.prefix}_") + f"{step:0{self.width}}"


def committed(root: str) -> list[int]:
    """Steps that were committed under `root`, in order; empty if it is not there.

    Raises:
        InvalidLayoutError: they are called in several ways.
    """
    return _survey(root)[1]


def path_of(root: str, step: int) -> str:
    """Where a step is, or will be: it is called as those that are there.

    Raises:
        InvalidLayoutError: they are called in several ways.
    """
    return os.path.join(root, _survey(root)[0].name(step))


def naming(root: str) -> Naming:
    """How the steps of a run are called; plain numbers if there are none yet.

    Raises:
        InvalidLayoutError: they are called in several ways.
    """
    return _survey(root)[0]


def _survey(root: str) -> tuple[Naming, list[int]]:
    """How the committed steps under `root` are called, and which there are.

    Plain numbers come first: beside them, other names are no steps. Else there must be one way.
    """
    try:
        entries = [(e.name, step) for e in os.scandir(root) if (step := names.step_of(e.name))]
    except (FileNotFoundError, NotADirectoryError):
        entries = []
    found = {n: step for n, step in entries if is_checkpoint(os.path.join(root, n))}
    ways = {Naming(prefix, width) for prefix, n, width in found.values() if len(str(n)) < width}
    for name, (prefix, step, _) in found.items():
        if not any(way.prefix == prefix and way.name(step) == name for way in ways):
            ways.add(Naming(prefix))
    if len(ways) > 1 and Naming() not in ways:
        raise InvalidLayoutError(
            f"{root} has checkpoints of several names: {', '.join(sorted(found)[:12])}. Give one of"
            " them, or move those that are no steps of this run elsewhere"
        )
    way = Naming() if Naming() in ways or not ways else ways.pop()
    return way, sorted(n for name, (_, n, _) in found.items() if way.name(n) == name)


def is_checkpoint(path: str) -> bool:
    """Whether a directory is a checkpoint: a rename gives it its name when it is complete."""
    if any(os.path.lexists(os.path.join(path, name)) for name in names.MARKS):
        return True
    try:  # an old one has no file of its own, only trees; steps of a root are not among them
        items = [name for name in os.listdir(path) if not names.step_of(name)]
    except (FileNotFoundError, NotADirectoryError):
        return False
    finished = [name for name in items if not names.is_unfinished(name)]
    return any(kinds.is_item_tree(os.path.join(path, name)) for name in finished)


def require_steps(root: str) -> list[int]:
    """The committed steps under `root`.

    Raises:
        CheckpointNotFoundError: there are none; says what is there.
    """
    require_directory(root)
    if found := committed(root):
        return found
    named = kinds.checkpoints_in(root)
    hint = f"; restore one of these by its path: {os.path.join(root, named[-1])}" if named else ""
    raise CheckpointNotFoundError(f"{root} has no committed step; it has: {contents(root)}{hint}")


def supersede(root: str, after: int) -> None:
    """Moves the steps later than `after` aside, so that the latest follows the run that goes on.

    They are kept in `<root>/superseded/<step>-<utc>`; one WARNING says which.
    """
    way, found = _survey(root)
    later = [step for step in found if step > after]
    if not later:
        return
    aside = os.path.join(root, SUPERSEDED)
    os.makedirs(aside, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    for step in reversed(later):
        os.rename(os.path.join(root, way.name(step)), os.path.join(aside, f"{step}-{now}"))
    files.sync_path(aside)
    files.sync_path(root)
    logger.warning(
        "this run goes on from step %d: the later steps %s were moved to %s", after, later, aside
    )


def clean(root: str, is_step: Callable[[str], object]) -> None:
    """Removes what killed saves and deletions left under `root`; only what bears our mark.

    Args:
        root: of the run.
        is_step: whether a name is that of a step.
    """
    if not os.path.isdir(root):
        return
    for entry in os.scandir(root):
        name, mark, _ = entry.name.partition(names.TMP_SUFFIX)
        ours = mark and is_step(name.removesuffix(".deleted").removesuffix(".replaced"))
        if ours and not commit.has_owner(entry.path):
            commit.remove_left_over(entry.path)
