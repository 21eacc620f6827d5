"""An OCDBT database on disk, opened: its index in memory, its data files ready to read."""

from __future__ import annotations

import os
import threading

from flax_ckpt.errors import DamagedCheckpointError, FormatError
from flax_ckpt.format import names, ocdbt
from flax_ckpt.storage.datafile import DataFileReader
from flax_ckpt.storage.record import Record


class Database:
    """Use it in a `with` block; reading is safe from several threads.

    Args:
        record: reads the files of the database's directory.
        checked: whether there must be a table of checksums.

    Attributes:
        directory: where the manifest is.
        values: each key's value, or where it is, in key order.
        crcs: CRC-32C of each key's value; empty without a table.

    Raises:
        DamagedCheckpointError: the index is damaged.
        NumberedManifestError: only TensorStore reads this kind.
    """

    def __init__(self, record: Record, *, checked: bool) -> None:
        self.directory = record.directory
        self._readers: dict[str, DataFileReader] = {}
        self._lock = threading.Lock()
        path = os.path.join(self.directory, names.MANIFEST)
        manifest = ocdbt.decode_manifest(record.read(names.MANIFEST), what=path)
        try:
            self.values = ocdbt.read_tree(manifest, self._fetch)
            self.crcs: dict[bytes, int] = {}
            if checked:
                path = os.path.join(self.directory, names.CHUNK_TABLE)
                table = record.read(names.CHUNK_TABLE)
                crcs = ocdbt.decode_table(table, list(self.values), what=path)
                self.crcs = dict(zip(self.values, crcs.tolist(), strict=True))
        except BaseException:
            self.close()
            raise

    def _fetch(self, file: str, offset: int, length: int) -> bytes:
        return self.reader(file).read(offset, length)

    def reader(self, file: str) -> DataFileReader:
        """The data file, by its path relative to the directory."""
        with self._lock:
            if file not in self._readers:
                path = os.path.realpath(os.path.join(self.directory, file))
                if path != os.path.join(os.path.realpath(self.directory), file):
                    raise FormatError(f"{self.directory}: {file} is a link that leads to {path}")
                self._readers[file] = DataFileReader(path)
            return self._readers[file]

    def check_files(self) -> None:
        """Checks that all data files are there and inside the directory, for other readers."""
        for file in {ref.file for ref in self.values.values() if not isinstance(ref, bytes)}:
            self.reader(file)

    def read(self, key: bytes) -> bytes:
        """A value as it is, unchecked but for its length.

        Raises:
            DamagedCheckpointError: there is no such key.
        """
        value = self.values.get(key)
        if value is None:
            raise DamagedCheckpointError(
                f"{self.directory}: the database has no {key.decode(errors='replace')!r}"
            )
        if isinstance(value, bytes):
            return value
        return self._fetch(value.file, value.offset, value.length)

    def close(self) -> None:
        """Closes the data files."""
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
