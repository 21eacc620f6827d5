"""The steps of a run: directories named by the number of completed updates: `23`, `step_0023`.

What is on disk is the evidence; there is no index that could disagree with it. So is how the steps
are called: a run that Orbax began with `ckpt_000020` goes on with `ckpt_000030`.

steps = fc.path.step
written = steps.standard_name_format(step_prefix="step", step_format_fixed_length=4)
both = steps.composite_name_format(written, [written, steps.standard_name_format()])
fc.training.Checkpointer(root, step_name_format=both)  # reads `23` too, writes `step_0024`
"""

import contextlib
import dataclasses
import datetime
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from etils import epath

from flax_ckpt.errors import CheckpointNotFoundError, InvalidLayoutError, StepNotFoundError
from flax_ckpt.format import names
from flax_ckpt.storage import commit, files, kinds
from flax_ckpt.training import progress
from flax_ckpt.training.metadata import CheckpointMetadata, listed

M_co = TypeVar("M_co", covariant=True, bound=CheckpointMetadata[Any])


@runtime_checkable
class NameFormat(Protocol[M_co]):
    """How steps are called and found; any object with these methods will do."""

    def build_name(self, step: int) -> str:
        """The name of a step's directory."""
        ...

    def find_all(self, base_path: files.PathLike) -> Iterator[M_co]:
        """The committed steps under a root, in any order."""
        ...

    def find_step(self, base_path: files.PathLike, step: int) -> M_co:
        """A committed step under a root.

        Raises:
            ValueError: there is none.
        """
        ...


StepFormat = NameFormat[CheckpointMetadata[None]]

SUPERSEDED = "superseded"  # where later steps go when a run goes on from an earlier one
_METADATA = {names.CHECKPOINT_METADATA, names.INTEGRITY}


@dataclasses.dataclass(frozen=True)
class StandardNameFormat:
    """Steps are called `[<prefix>_]<step>`, with zeros up to a width."""

    prefix: str = ""
    width: int = 1

    def build_name(self, step: int) -> str:
        """The name of a step's directory."""
        return (self.prefix and f"{self.prefix}_") + f"{step:0{self.width}}"

    def find_all(self, base_path: files.PathLike) -> Iterator[CheckpointMetadata[None]]:
        """The committed steps under a root, in any order."""
        root = epath.Path(base_path)
        for name in _entries(base_path):
            found = names.step_of(name)
            if found and self.build_name(found[1]) == name and is_checkpoint(f"{root}/{name}"):
                yield listed(found[1], root / name)

    def find_step(self, base_path: files.PathLike, step: int) -> CheckpointMetadata[None]:
        """A committed step under a root."""
        path = epath.Path(base_path) / self.build_name(step)
        if not is_checkpoint(os.fspath(path)):
            raise StepNotFoundError(f"step {step} is not at {path}", step=step, path=path)
        return listed(step, path)


@dataclasses.dataclass(frozen=True)
class _CompositeNameFormat:
    write_name_format: StepFormat
    read_name_formats: Sequence[StepFormat]

    def build_name(self, step: int) -> str:
        return self.write_name_format.build_name(step)

    def find_all(self, base_path: files.PathLike) -> Iterator[CheckpointMetadata[None]]:
        formats = reversed(self.read_name_formats)  # the first of them has the last word
        yield from {m.step: m for each in formats for m in each.find_all(base_path)}.values()

    def find_step(self, base_path: files.PathLike, step: int) -> CheckpointMetadata[None]:
        for name_format in self.read_name_formats[:-1]:
            with contextlib.suppress(ValueError):  # perhaps it is called as the next format says
                return name_format.find_step(base_path, step)
        return self.read_name_formats[-1].find_step(base_path, step)


def standard_name_format(
    *, step_prefix: str | None = None, step_format_fixed_length: int | None = None
) -> StepFormat:
    """The names that most runs have: a number, with a prefix and zeros before it if wanted.

    Args:
        step_prefix: what comes before the number; an underscore is put between.
        step_format_fixed_length: least number of digits; zeros are put before.

    >>> standard_name_format().build_name(23)
    '23'
    >>> standard_name_format(step_prefix="step", step_format_fixed_length=4).build_name(23)
    'step_0023'
    """
    if step_prefix is not None and step_prefix != os.path.basename(step_prefix):
        raise ValueError(f"step_prefix is part of a directory's name, got {step_prefix!r}")
    require_at_least(1, step_format_fixed_length=step_format_fixed_length)
    return StandardNameFormat(step_prefix or "", step_format_fixed_length or 1)


def composite_name_format(
    write_name_format: StepFormat, read_name_formats: Sequence[StepFormat]
) -> StepFormat:
    """Several names to read, one to write: for a run whose names have changed.

    Args:
        write_name_format: for steps to come.
        read_name_formats: for those that are there, `write_name_format` among them. Where two
            find the same step, the first counts.

    Raises:
        ValueError: `write_name_format` is not among `read_name_formats`.

    >>> plain, padded = standard_name_format(), standard_name_format(step_format_fixed_length=6)
    >>> composite_name_format(padded, [padded, plain]).build_name(23)
    '000023'
    """
    if write_name_format not in read_name_formats:
        what = f"write_name_format {write_name_format} must be among read_name_formats"
        raise ValueError(f"{what} {list(read_name_formats)}: what is written must be found again")
    return _CompositeNameFormat(write_name_format, tuple(read_name_formats))


def naming(root: str) -> StandardNameFormat:
    """How the steps of a run are called; plain numbers if there are none yet.

    Plain numbers come first: beside them, other names are no steps. Else there must be one way.

    Raises:
        InvalidLayoutError: they are called in several ways.
    """
    entries = [(name, step) for name in _entries(root) if (step := names.step_of(name))]
    found = {name: step for name, step in entries if is_checkpoint(os.path.join(root, name))}
    ways = {StandardNameFormat(p, width) for p, n, width in found.values() if len(str(n)) < width}
    for name, (prefix, step, _) in found.items():
        if all(way.build_name(step) != name for way in ways):
            ways.add(StandardNameFormat(prefix))
    if StandardNameFormat() in ways or not ways:
        return StandardNameFormat()
    if len(ways) > 1:
        what = f"{root} has checkpoints of several names: {', '.join(sorted(found)[:12])}"
        how = "Give one of them, or move those that are no steps of this run elsewhere"
        raise InvalidLayoutError(f"{what}. {how}")
    return ways.pop()


def committed(root: str) -> list[int]:
    """Steps that were committed under `root`, in order; empty if it is not there.

    Raises:
        InvalidLayoutError: they are called in several ways.
    """
    return [found.step for found in settled(root, naming)]


def settled(root: str, way: Callable[[str], StepFormat]) -> list[CheckpointMetadata[None]]:
    """The committed steps under `root`, in order, found while none came or went.

    Else a step that was listed may go, and a later one, which was not, be there already.
    """
    while True:
        before = set(_entries(root))
        found = sorted(way(root).find_all(root), key=lambda found: found.step)
        if set(_entries(root)) == before:
            return found


def incomplete(root: str) -> dict[int, str]:
    """Steps later than the last that has metadata of which a part is there, and what is wrong.

    No save leaves one: it was copied, and not to the end. It has nothing but what that last one
    has; so what else is called by a number is no part of the run.
    """
    way, cut, last, known = naming(root), dict[int, str](), -1, set[str]()
    numbers = {found[1] for name in _entries(root) if (found := names.step_of(name))}
    for step in sorted(numbers):
        there = set(_entries(path := os.path.join(root, way.build_name(step))))
        if any(os.path.lexists(os.path.join(path, mark)) for mark in _METADATA):
            last, known, cut = step, there, {}
        elif last >= 0 and os.path.islink(path) and not os.path.exists(path):
            cut[step] = f"{path} is a link that leads nowhere, to {os.readlink(path)}"
        elif last >= 0 and there <= known and os.path.isdir(path):  # nobody deletes it right now
            text = f"is incomplete: it has neither {' nor '.join(sorted(_METADATA))}"
            cut[step] = f"{path} {text}, but: {', '.join(sorted(there)) or 'nothing'}"
    return cut


def warn_of_none(root: str) -> None:
    """Says of a run that begins anew if something there is called as a step is, but is none."""
    way, entries = naming(root), [(name, names.step_of(name)) for name in _entries(root)]
    named = sorted(name for name, found in entries if found and way.build_name(found[1]) == name)
    if found := [name for name in named if not os.path.isfile(os.path.join(root, name))]:
        text = "%s has no step to restore, and begins anew: %s is no whole checkpoint. Move it"
        text += " away: a save of the step that is called so would be refused"
        progress.logger.warning(text, root, ", ".join(found))


def path_of(root: str, step: int) -> str:
    """Where a step is; it is called as those that are there."""
    return os.path.join(root, naming(root).build_name(step))


def _entries(path: files.PathLike) -> list[str]:
    """The names in a directory; none if it is not there."""
    try:
        return os.listdir(path)
    except (FileNotFoundError, NotADirectoryError):
        return []


def is_checkpoint(path: str) -> bool:
    """Whether a directory is a checkpoint: a rename gives it its name when it is complete."""
    if any(os.path.lexists(os.path.join(path, name)) for name in names.MARKS):
        return True
    # An old one has no file of its own, only trees; steps of a root are not among them.
    items = [n for n in _entries(path) if not (names.step_of(n) or names.is_unfinished(n))]
    return any(kinds.is_item_tree(os.path.join(path, name)) for name in items)


def require_steps(root: str) -> list[int]:
    """The committed steps under `root`.

    Raises:
        CheckpointNotFoundError: there are none; says what is there.
    """
    kinds.require_directory(root)
    if found := committed(root):
        return found
    named, there = kinds.checkpoints_in(root), kinds.contents(root)
    hint = f"; restore one of these by its path: {os.path.join(root, named[-1])}" if named else ""
    raise CheckpointNotFoundError(f"{root} has no committed step; it has: {there}{hint}")


def supersede(root: str, after: int) -> None:
    """Moves the steps later than `after` aside, so that the latest follows the run that goes on.

    They are kept in `<root>/superseded/<step>-<utc>`; one WARNING says which.
    """
    later = sorted(step for step in {*committed(root), *incomplete(root)} if step > after)
    if not later:
        return
    aside, way = os.path.join(root, SUPERSEDED), naming(root)
    files.mkdirs(aside)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%S.%fZ")
    for step in reversed(later):
        files.rename(os.path.join(root, way.build_name(step)), os.path.join(aside, f"{step}-{now}"))
    files.sync_path(aside)
    files.sync_path(root)
    text = "this run goes on from step %d: the later steps %s were moved to %s"
    progress.logger.warning(text, after, later, aside)


def clean(root: str, build_name: Callable[[int], str]) -> None:
    """Removes what killed saves and deletions left under `root`; only what bears our mark.

    Args:
        root: of the run.
        build_name: how its steps are called.
    """
    for entry in _entries(root):
        name, mark, _ = entry.partition(names.TMP_SUFFIX)
        name = name.removesuffix(".deleted").removesuffix(".replaced")
        name = name.removesuffix(names.SESSION_SUFFIX)
        ours = mark and any(build_name(int(n)) == name for n in re.findall("[0-9]+", name))
        path = os.path.join(root, entry)
        if ours and not commit.owner(path):
            commit.remove_left_over(path)


def require_at_least(least: int, **values: int | None) -> None:
    """Checks numbers that are parameters, each under its name; None stands for no limit."""
    for name, value in values.items():
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
