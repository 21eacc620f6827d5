"""`verify`: whether what is saved can be restored, found out by reading all of it.

found = fc.verify("/runs/7/checkpoints")
print(found)                    # a line for each step, and one for each damaged leaf and file
assert found.ok
"""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Collection
from typing import Final

from flax_ckpt._load import identity
from flax_ckpt.errors import CheckpointNotFoundError, FlaxCkptError, InvalidLayoutError
from flax_ckpt.format import jsons, names
from flax_ckpt.format.checkpoint import RootMetadata, file_crc
from flax_ckpt.handlers.saved_tree import SavedTree
from flax_ckpt.storage import deletion, files, kinds
from flax_ckpt.storage.record import Record, noting
from flax_ckpt.training import progress, steps

_BATCH: Final = 256 << 20  # bytes of arrays in memory at a time

Damage = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Checked:
    """What was found in one checkpoint.

    Attributes:
        path: where it is.
        leaves: damaged leaves, each with the reason: `state/params/w`.
        files: damaged files that are no leaf's, each with the reason, by their whole path.
        unchecked: what could not be checked, and why.
        count: how many leaves there are, empty nodes left out.
        nbytes: how many bytes were read.
    """

    path: str
    leaves: Damage
    files: Damage
    unchecked: tuple[str, ...]
    count: int
    nbytes: int

    @property
    def ok(self) -> bool:
        """Whether nothing was found damaged."""
        return not (self.leaves or self.files)

    def __str__(self) -> str:
        state = "whole" if self.ok else "DAMAGED"
        lines = [f"{self.path}: {state}, {self.count} leaves, {progress.size(self.nbytes)}"]
        lines += [f"  leaf {path}: {why}" for path, why in self.leaves]
        lines += [f"  file {path}: {why}" for path, why in self.files]
        lines += [f"  not checked: {what}" for what in self.unchecked]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Verification:
    """What :func:`verify` found; it prints as a line for each checkpoint, and its damage.

    Attributes:
        path: what was asked for.
        checkpoints: that one, or those of the root, in order.
        unchecked: what else is in the root.
    """

    path: str
    checkpoints: tuple[Checked, ...]
    unchecked: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was found damaged."""
        return all(found.ok for found in self.checkpoints)

    def __str__(self) -> str:
        lines = [str(found) for found in self.checkpoints]
        return "\n".join([*lines, *(f"not checked: {what}" for what in self.unchecked)])


def verify(path: files.PathLike) -> Verification:
    """Reads all of a checkpoint, or of all checkpoints in a root, and says what is damaged.

    Every byte that a load would use is compared with the checksums that were saved. Of what Orbax
    wrote, which has next to none, arrays are decoded and files parsed; `unchecked` says how far
    that goes. About 256 MB are in memory at a time, or one chunk if that is larger.

    Args:
        path: of a checkpoint, or the root of a run.

    Raises:
        CheckpointNotFoundError: there is nothing, or no checkpoint in it.
        InvalidLayoutError: a file, one checkpointable of a checkpoint, something unfinished.

    >>> import tempfile, numpy as np, flax_ckpt as fc
    >>> path = tempfile.mkdtemp() + "/ckpt"
    >>> fc.save(path, {"w": np.ones(3), "step": 1})
    >>> found = fc.verify(path)
    >>> found.ok, found.checkpoints[0].count
    (True, 2)
    """
    here = files.local_path(path)
    kinds.require_directory(here)
    if kinds.unfinished(here) or kinds.owner(here):
        raise InvalidLayoutError(f"{here} {kinds.describe(here)}")
    inside = [here]
    if not kinds.is_checkpoint(here):
        inside = [os.path.join(here, n) for n in sorted(os.listdir(here), key=kinds.by_number)]
    cut = {} if inside == [here] else _incomplete(here)
    found: list[Checked] = []
    unchecked: list[str] = []
    for place in [path for path in inside if path in cut or os.path.isdir(path)]:
        if why := kinds.unfinished(place):
            unchecked.append(f"{place} is {why}")
        elif os.path.basename(place) == steps.SUPERSEDED and place != here:
            unchecked.append(f"{place} has steps that were moved aside: verify it by its path")
        elif one := cut.get(place) or _found_at(place):
            found.append(one)
    if found == [*cut.values()]:
        raise CheckpointNotFoundError(f"{here} has no checkpoint; it has: {kinds.contents(here)}")
    return Verification(here, tuple(found), tuple(unchecked))


def _found_at(path: str) -> Checked | None:
    """What is in a directory as it stays; None if it is no checkpoint, or deleted meanwhile."""
    try:
        while kinds.is_checkpoint(path):
            before = identity(path)
            found = _Check(path).run()
            if found.ok or identity(path) == before:
                return found
    except OSError as error:  # nobody may look
        return _unread(path, str(error))


def _incomplete(root: str) -> dict[str, Checked]:
    """The steps of a run that were copied, and not to the end, by their path."""
    try:
        found = {steps.path_of(root, n): why for n, why in steps.incomplete(root).items()}
    except (InvalidLayoutError, OSError):  # no run; or nobody may look, which is told of the step
        return {}
    return {path: _unread(path, why.removeprefix(f"{path} ")) for path, why in found.items()}


def _unread(path: str, why: str) -> Checked:
    """A checkpoint of which nothing can be read."""
    return Checked(path, (), ((path, why),), (), 0, 0)


class _Check:
    """The check of one checkpoint."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.leaves: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self.broken: dict[str, str] = {}  # trees, of which no leaf can be read
        self.unchecked: list[str] = []
        self.covered: set[str] = set()  # directories of arrays, read file by file
        self.count = self.nbytes = self.arrays = self.without = 0  # the last have no checksum

    def run(self) -> Checked:
        with noting(self.files, self.path):
            record, deleting = Record(self.path), deletion.read(self.path)
            hidden = deleting.checkpointable_name if deleting else None
            if hidden:
                self.unchecked.append(f"{hidden!r}, whose deletion was not finished")
            entries = [entry for entry in os.scandir(self.path) if kinds.is_item(entry)]
            items = {entry.name: entry.path for entry in entries if entry.name != hidden}
            if kinds.holds_tree(self.path):
                items = {"": self.path}
            for name, where in items.items():
                if (inner := Record(where)).lists(names.TREE_METADATA):
                    self._tree(name, inner)
                elif not record.native and name != names.METRICS:
                    self.unchecked.append(f"{name!r}, which is no PyTree: its files were not read")
            if not record.native:
                self._foreign(record, items)
            done = self.covered | self._deleted(record) | {hidden}
            for name in record.crcs:
                if done.isdisjoint(itertools.accumulate(name.split("/"), os.path.join)):
                    with noting(self.files, os.path.join(self.path, name)):
                        self.nbytes += record.check(name)
        for where, why in self.broken.items():  # unless a file that is named already says so
            if not any(path in why for path in self.files):
                self.files[where] = why
        found = tuple(self.leaves.items()), tuple(self.files.items()), tuple(self.unchecked)
        return Checked(self.path, *found, self.count, self.nbytes)

    def _tree(self, name: str, record: Record) -> None:
        where = record.directory
        with noting(self.broken, where), SavedTree(where, damage={}) as saved:
            self.nbytes += saved.check(_BATCH)
            self.count += sum(not leaf.is_empty for leaf in saved.leaves.values())
            for path, why in (saved.damage or {}).items():
                found = self.files if os.path.isabs(path) else self.leaves
                found[os.path.join(name, path)] = why
            encodings = [array.encoding for array in saved.stored.values()]
            self.arrays += len(encodings)
            self.without += sum(not (encoding and encoding.trailer) for encoding in encodings)
            if record.native and names.MANIFEST not in record.crcs:
                self.covered |= {os.path.join(name, array) for array in saved.stored}
        if not record.native and os.path.lexists(os.path.join(where, names.CHUNK_TABLE)):
            lost = os.path.join(self.path, names.INTEGRITY)
            self.files[lost] = "the file is missing, so that most others cannot be checked"

    def _deleted(self, record: Record) -> set[str | None]:
        """What a deletion left in the record: its items, and the metadata that it rewrote."""
        with contextlib.suppress(FlaxCkptError, OSError):
            data = deletion.read_metadata(record)
            if data and file_crc(data) != record.crcs.get(names.CHECKPOINT_METADATA):
                gone = record.listed() - set(os.listdir(self.path))
                return {names.CHECKPOINT_METADATA, *filter(lambda n: record.listed(f"{n}/"), gone)}
        return set()

    def _foreign(self, record: Record, items: Collection[str]) -> None:
        """Parses what can be parsed, and says what is missing, or that leaves unchecked."""
        with noting(self.files, path := os.path.join(self.path, names.CHECKPOINT_METADATA)):
            root = RootMetadata.from_bytes(deletion.read_metadata(record) or b"", path)
            saved = () if isinstance(root.item_handlers, str) else root.item_handlers
            for name in set(saved).difference(items):
                self.files[os.path.join(self.path, name)] = "the checkpointable is missing"
        if not (items or self.files):
            self.files[self.path] = "there is no checkpointable in it"
        for name in (names.CHECKPOINT_METADATA, f"{names.METRICS}/{names.METRICS_FILE}"):
            if record.lists(name):
                with noting(self.files, path := os.path.join(self.path, name)):
                    data = record.read(name)
                    self.nbytes += len(data)
                    jsons.parse_object(data, path)
        text = f"{self.without} of {self.arrays} arrays have no checksum: they were only decoded"
        self.unchecked += [text] if self.without else []
        self.unchecked.append("files beside the arrays have no checksums: JSON was only parsed")
