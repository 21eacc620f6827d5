"""Files of a checkpointable, checked against the record of checksums that was saved with them.

`flax_ckpt.json` lies at the checkpoint's root and vouches for every file that is not array data.
A checkpoint without it was not written by us: its files are read as they are.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Generator
from typing import Literal, TypeAlias

from flax_ckpt._async import logger
from flax_ckpt.errors import DamagedCheckpointError, FlaxCkptError
from flax_ckpt.format import names, wire
from flax_ckpt.format.checkpoint import Integrity, file_crc
from flax_ckpt.storage import files, kinds

OnDamage: TypeAlias = Literal["raise", "skip"]
Damage: TypeAlias = dict[str, str]  # why, by the key path of a leaf, or the path of a file


def notes(on_damage: OnDamage) -> Damage | None:
    """Where damage is noted that is skipped; None if it raises."""
    if on_damage not in ("raise", "skip"):
        raise ValueError(f"on_damage must be 'raise' or 'skip', got {on_damage!r}")
    return {} if on_damage == "skip" else None


@contextlib.contextmanager
def noting(damage: Damage | None, *what: str) -> Generator[None]:
    """Takes note that these are damaged, instead of raising the error, if there is a place."""
    try:
        yield
    except (FlaxCkptError, OSError) as error:
        if damage is None:
            raise
        damage |= dict.fromkeys(what, str(error).removeprefix(f"{what[0]}: "))


def warn(where: str, damage: Damage | None) -> None:
    """Says once what was noted, each with the reason."""
    if damage:
        lines = [f"  {path}: {why}" for path, why in damage.items()]
        logger.warning("%s: damaged, and not loaded:\n%s", where, "\n".join(lines))


class Record:
    """Reads files of one directory of a checkpoint.

    Args:
        directory: absolute path of a checkpointable, or of the root itself.

    Attributes:
        native: whether the checkpoint has a record, so that all its files are checked.
        crcs: what is recorded: the CRC-32C of each file by its path in the directory.

    Raises:
        DamagedCheckpointError: the record itself is damaged.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.native = False
        self.crcs: dict[str, int] = {}
        self._is_item = bool(kinds.owner(directory))  # else the user may come to it by a link
        parent, name = os.path.split(directory)
        for root, prefix in ((directory, ""), (parent, f"{name}/")):
            path = os.path.join(root, names.INTEGRITY)
            if os.path.isfile(path):
                crcs = Integrity.from_bytes(files.read(path, files.MAX_TREE_BYTES), path).crc32c
                self.crcs = {p[len(prefix) :]: c for p, c in crcs.items() if p.startswith(prefix)}
                self.native = True
                break

    def listed(self, within: str = "") -> set[str]:
        """First parts of the paths that were saved in a sub-directory; empty without a record."""
        inside = [path[len(within) :] for path in self.crcs if path.startswith(within)]
        return {path.partition("/")[0] for path in inside}

    def lists(self, name: str) -> bool:
        """Whether the file is there, or should be."""
        return name in self.crcs or os.path.isfile(os.path.join(self.directory, name))

    def inside(self, name: str) -> str:
        """The path of a file, to which no link leads within the directory."""
        wire.check_path(name, self.directory)
        *folders, path = itertools.accumulate(name.split("/"), os.path.join, initial=self.directory)
        for folder in folders[0 if self._is_item else 1 :]:
            files.refuse_link(folder)
        return path

    def size(self, name: str) -> int | None:
        """How many bytes a file has that was saved; None: it is not there."""
        path = os.path.join(self.directory, name)
        return os.stat(path).st_size if name in self.crcs and os.path.isfile(path) else None

    def check_all(self, most: float = math.inf) -> None:
        """Checks every file of the directory, for a reader that does not go through `read`."""
        for name in self.crcs:
            self.check(name, most)

    def check(self, name: str, most: float = math.inf) -> int:
        """Checks a file of at most so many bytes, and returns the size."""
        path = self.inside(name)
        with _missing(path):
            if (size := os.lstat(path).st_size) > most:
                raise DamagedCheckpointError(f"{path} has {size} bytes, expected at most {most}")
            self._compare(name, path, file_crc(b"", files.blocks(path)))
            return size

    def read(self, name: str, most: int = files.MAX_BYTES) -> bytes:
        """The checked bytes of a file.

        Args:
            name: relative to the directory, with `/`.
            most: how many there may be.

        Raises:
            DamagedCheckpointError: missing, or not the bytes that were saved.
        """
        path = self.inside(name)
        with _missing(path):
            data = files.read(path, most)
        if self.native:
            self._compare(name, path, file_crc(data))
        return data

    def _compare(self, name: str, path: str, found: int) -> None:
        expected = self.crcs.get(name)
        if expected is None:
            why = f"not among the files that {names.INTEGRITY} lists: it was added later"
            raise DamagedCheckpointError(f"{path}: {why}")
        if found != expected:
            why = f"CRC-32C {found:08x}, saved with {expected:08x}: the file was changed after it"
            raise DamagedCheckpointError(f"{path}: {why} was saved; restore another step")


@contextlib.contextmanager
def _missing(path: str) -> Generator[None]:
    try:
        yield
    except (FileNotFoundError, NotADirectoryError) as error:
        why = "the file is missing; restore another step"
        raise DamagedCheckpointError(f"{path}: {why}") from error
