"""Files of a checkpointable, checked against the record of checksums that was saved with them.

`flax_ckpt.json` lies at the checkpoint's root and vouches for every file that is not array data.
A checkpoint without it was not written by us: its files are read as they are.
"""

from __future__ import annotations

import os

from flax_ckpt.errors import DamagedCheckpointError
from flax_ckpt.format import names
from flax_ckpt.format.checkpoint import Integrity
from flax_ckpt.storage import files


class Record:
    """Reads files of one directory of a checkpoint.

    Args:
        directory: absolute path of a checkpointable, or of the root itself.

    Attributes:
        native: whether the checkpoint has a record, so that all its files are checked.

    Raises:
        DamagedCheckpointError: the record itself is damaged.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self._prefix = ""
        self._integrity: Integrity | None = None
        parent, name = os.path.split(directory)
        for root, prefix in ((directory, ""), (parent, f"{name}/")):
            path = os.path.join(root, names.INTEGRITY)
            if os.path.isfile(path):
                self._integrity = Integrity.from_bytes(files.read(path), path)
                self._prefix = prefix
                break

    @property
    def native(self) -> bool:
        """Whether every file is checked."""
        return self._integrity is not None

    def listed(self, within: str = "") -> set[str]:
        """First parts of the paths that were saved in a sub-directory; empty without a record."""
        start = self._prefix + within
        listed = self._integrity.crc32c if self._integrity is not None else {}
        return {path[len(start) :].partition("/")[0] for path in listed if path.startswith(start)}

    def lists(self, name: str) -> bool:
        """Whether the file is there, or should be."""
        if self._integrity is not None and self._prefix + name in self._integrity.crc32c:
            return True
        return os.path.isfile(os.path.join(self.directory, name))

    def check_all(self) -> None:
        """Checks every file of the directory, for a reader that does not go through `read`."""
        for path in self._integrity.crc32c if self._integrity is not None else ():
            if path.startswith(self._prefix):
                self.read(path.removeprefix(self._prefix))

    def read(self, name: str) -> bytes:
        """The checked bytes of a file.

        Args:
            name: relative to the directory, with `/`.

        Raises:
            DamagedCheckpointError: missing, or not the bytes that were saved.
        """
        path = os.path.join(self.directory, name)
        try:
            data = files.read(path)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise DamagedCheckpointError(
                f"{path}: the file is missing; restore another step"
            ) from error
        if self._integrity is not None:
            self._integrity.check(self._prefix + name, data, path)
        return data
