"""An OCDBT database on disk: its data files, written and read, and its index, opened.

There is an append-only data file per save. Values start at multiples of 64 bytes, so that a buffer
that holds a stretch of the file holds each value at an address that JAX on CPU adopts without a
copy. Each is followed by the CRC-32C of its bytes, which makes it a zarr v3 chunk of the codecs
`bytes` and `crc32c`.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import uuid
from typing import Final

import numpy as np

from flax_ckpt.errors import DamagedCheckpointError, FormatError
from flax_ckpt.format import names, ocdbt
from flax_ckpt.format.arrays import Bytes
from flax_ckpt.storage import files
from flax_ckpt.storage.record import Record

ALIGNMENT: Final = 64
_NUMBERED: Final = re.compile(r"manifest\.[0-9a-f]{16}")
_MAX_BUFFERS: Final = min(1024, os.sysconf("SC_IOV_MAX"))
_MAX_READ: Final = 1 << 30  # Linux reads at most 2 GiB - 4 KiB a call


class DataFileWriter(contextlib.ExitStack):
    """Appends values to a new file; use it in a `with` block, and flush it at the end.

    Args:
        directory: of the database that the file is for.
        limit: bytes after which the next chunk begins another file; 0: never.

    Attributes:
        file: the path that the file got, relative to the directory.
        offset: how many bytes it has.
    """

    def __init__(self, directory: str, limit: int = 0) -> None:
        super().__init__()
        self.directory = directory
        self._limit = limit
        self._queue: list[memoryview] = []
        self._queued = 0
        self._open()

    def _open(self) -> None:
        self.close()
        self.file = f"{names.DATA_DIR}/{uuid.uuid4().hex}"
        self.offset = 0
        self._path = os.path.join(self.directory, self.file)
        files.mkdirs(os.path.dirname(self._path))
        self._fd = self.enter_context(files.creating(self._path))

    def append_chunk(self, data: memoryview, tail: bytes) -> ocdbt.ValueRef:
        """Appends a value that begins with `data` and ends with `tail`, and says where it is.

        The data is not copied: it must not change until it is flushed.
        """
        if self._limit and self.offset and self.offset + len(data) > self._limit:
            self.flush()
            self._open()
        place = ocdbt.ValueRef(self.file, self.offset, len(data) + len(tail))
        self.append(data)
        self.append(tail + bytes(-(self.offset + len(tail)) % ALIGNMENT))
        return place

    def append(self, data: bytes | memoryview) -> None:
        """Appends bytes as they are; they must not change until they are flushed."""
        self._queue.append(memoryview(data))
        self._queued += len(data)
        self.offset += len(data)
        if self._queued >= files.MAX_WRITE or len(self._queue) >= _MAX_BUFFERS - 1:
            self.flush()

    def flush(self) -> None:
        """Writes what was appended."""
        files.append(self._path, self._fd, self._queue)
        self._queued = 0


def aligned_empty(size: int) -> Bytes:
    """Uninitialised bytes whose address is a multiple of 64."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


class DataFileReader(io.FileIO):
    """Reads stretches of one file; safe from several threads; must be closed."""

    def __init__(self, path: str) -> None:
        try:
            super().__init__(path, opener=files.open_regular)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise DamagedCheckpointError(f"{path}: the data file is missing") from error

    def read_into(self, offset: int, *buffers: Bytes) -> None:
        """Fills the buffers, one after another, with the bytes from `offset` on.

        Raises:
            DamagedCheckpointError: the file ends before.
        """
        pending = [buffer.data for buffer in buffers if len(buffer)]
        self.check(offset, sum(map(len, pending)))
        while pending:
            call = [pending[0][:_MAX_READ], *(pending[1:] if len(pending[0]) < _MAX_READ else [])]
            with files.naming(self.name):
                count = os.preadv(self.fileno(), call, offset)
            if count == 0:
                self.check(offset, sum(map(len, pending)))
            offset += count
            files.advance(pending, count)

    def check(self, offset: int, length: int) -> None:
        """Checks that these bytes are there, before memory for them is asked for.

        Raises:
            DamagedCheckpointError: the file ends before.
        """
        if offset + length > (size := os.stat(self.fileno()).st_size):
            why = f"ends at byte {size}, but bytes from {offset} on were saved, {length} more"
            raise DamagedCheckpointError(f"{self.name}: {why}: the file was cut off")


class Database(contextlib.ExitStack):
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
    """

    def __init__(self, record: Record, *, checked: bool) -> None:
        super().__init__()
        self.directory, self._record = record.directory, record
        self._readers: dict[str, DataFileReader] = {}
        self._lock = threading.Lock()
        path = os.path.join(self.directory, names.MANIFEST)
        try:
            manifest = ocdbt.decode_manifest(record.read(names.MANIFEST), what=path)
        except ocdbt.NumberedManifestError:
            numbered = max(filter(_NUMBERED.fullmatch, os.listdir(self.directory)), default="")
            manifest = ocdbt.decode_manifest(record.read(numbered), what=path, is_last=True)
        try:
            self.values = ocdbt.read_tree(manifest, self._fetch)
            self.crcs: dict[bytes, int] = {}
            if checked:
                path = os.path.join(self.directory, names.CHUNK_TABLE)
                table = record.read(names.CHUNK_TABLE, files.MAX_TREE_BYTES)
                crcs = ocdbt.decode_table(table, list(self.values), what=path)
                self.crcs = dict(zip(self.values, crcs.tolist(), strict=True))
        except BaseException as error:
            self.close()
            if not isinstance(error, FormatError) or self.directory in str(error):
                raise
            raise type(error)(f"{self.directory}: {error}") from error

    def _fetch(self, file: str, offset: int, length: int) -> memoryview:
        self.reader(file).check(offset, length)
        buffer = np.empty(length, np.uint8)
        self.reader(file).read_into(offset, buffer)
        return buffer.data

    def reader(self, file: str) -> DataFileReader:
        """The data file, by its path relative to the directory."""
        with self._lock:
            if file not in self._readers:
                self._readers[file] = self.enter_context(DataFileReader(self._record.inside(file)))
            return self._readers[file]

    def check_files(self) -> None:
        """Checks that all data files are there and inside the directory, for other readers."""
        for file in {ref.file for ref in self.values.values() if not isinstance(ref, bytes)}:
            self.reader(file)

    def read(self, key: bytes, most: int = files.MAX_BYTES) -> bytes:
        """A value as it is, unchecked but for its length.

        Raises:
            DamagedCheckpointError: there is no such key, or it has more bytes than `most`.
        """
        value = self.values.get(key)
        if value is None:
            missing = key.decode(errors="replace")
            raise DamagedCheckpointError(f"{self.directory}: the database has no {missing!r}")
        if isinstance(value, bytes):
            return value
        if value.length > most:
            raise DamagedCheckpointError(f"{self.directory}: {key!r} has {value.length} bytes")
        return bytes(self._fetch(value.file, value.offset, value.length))
