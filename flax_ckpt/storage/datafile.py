"""Array data on a POSIX file system: one append-only file per save, read back with checks.

Values start at multiples of 64 bytes, so that a buffer that holds a stretch of the file holds
each value at an address that JAX on CPU adopts without a copy. Each is followed by the CRC-32C of
its bytes, which makes it a zarr v3 chunk of the codecs `bytes` and `crc32c`.
"""

from __future__ import annotations

import os
import stat
import uuid
from typing import Final

import crc32c
import numpy as np

from flax_ckpt.errors import DamagedCheckpointError
from flax_ckpt.format import names
from flax_ckpt.format.arrays import Bytes

ALIGNMENT: Final = 64
TRAILER: Final = 4
_MAX_BUFFERS: Final = min(1024, os.sysconf("SC_IOV_MAX"))
_MAX_READ: Final = 1 << 30  # Linux reads at most 2 GiB - 4 KiB a call
_MAX_WRITE: Final = 8 << 20  # ext4 takes several times as long for calls of 64 MiB


class DataFileWriter:
    """Appends values to a new file; use it in a `with` block.

    Args:
        directory: of the database that the file is for.
        limit: bytes after which the next chunk begins another file; 0: never.

    Attributes:
        file: the path that the file got, relative to the directory.
        offset: how many bytes it has.
    """

    def __init__(self, directory: str, limit: int = 0) -> None:
        self._directory = directory
        self._limit = limit
        self._queue: list[memoryview] = []
        self._queued = 0
        self._open()

    def _open(self) -> None:
        self.file = f"{names.DATA_DIR}/{uuid.uuid4().hex}"
        self.offset = 0
        path = os.path.join(self._directory, self.file)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def append_chunk(self, data: Bytes, padding: int = 0) -> tuple[int, int]:
        """Appends one zarr chunk: data, `padding` zero bytes, CRC-32C of both.

        The data is not copied: it must not change until the file is closed.

        Returns:
            The chunk's offset in what is `file` then, and its CRC-32C.
        """
        if self._limit and self.offset and self.offset + len(data) > self._limit:
            self._flush()
            full = self._fd
            self._open()
            os.close(full)
        offset = self.offset
        crc = crc32c.crc32c(data.data)
        self.append(data.data)
        if padding:
            zeros = bytes(padding)
            crc = crc32c.crc32c(zeros, crc)
            self.append(zeros)
        gap = -(self.offset + TRAILER) % ALIGNMENT
        self.append(crc.to_bytes(TRAILER, "little") + bytes(gap))
        return offset, crc

    def append(self, data: bytes | memoryview) -> None:
        """Appends bytes as they are; they must not change until the file is closed."""
        if not data:
            return
        self._queue.append(memoryview(data))
        self._queued += len(data)
        self.offset += len(data)
        if self._queued >= _MAX_WRITE or len(self._queue) >= _MAX_BUFFERS - 1:
            self._flush()

    def _flush(self) -> None:
        while self._queue:
            call = [view[:_MAX_WRITE] for view in self._queue]  # only the last can be so large
            _advance(self._queue, os.writev(self._fd, call))
        self._queued = 0

    def __enter__(self) -> DataFileWriter:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        try:
            if error is None:
                self._flush()
        finally:
            os.close(self._fd)


def _advance(buffers: list[memoryview], count: int) -> None:
    """Drops the bytes that a call has transferred, so that the next goes on where it stopped."""
    while buffers and count >= len(buffers[0]):
        count -= len(buffers.pop(0))
    if count:
        buffers[0] = buffers[0][count:]


def aligned_empty(size: int) -> Bytes:
    """Uninitialised bytes whose address is a multiple of 64."""
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size]


class DataFileReader:
    """Reads stretches of one file; safe from several threads; must be closed.

    Args:
        path: the file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise DamagedCheckpointError(f"{path}: the data file is missing") from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._fd)
            raise DamagedCheckpointError(f"{path}: the data file is no regular file")
        self.size = status.st_size

    def read_into(self, offset: int, *buffers: Bytes) -> None:
        """Fills the buffers, one after another, with the bytes from `offset` on.

        Raises:
            DamagedCheckpointError: the file ends before.
        """
        pending = [buffer.data for buffer in buffers if len(buffer)]
        while pending:
            call = [pending[0][:_MAX_READ], *(pending[1:] if len(pending[0]) < _MAX_READ else [])]
            count = os.preadv(self._fd, call, offset)
            if count == 0:
                raise DamagedCheckpointError(
                    f"{self.path}: ends at byte {self.size}, but bytes from {offset} on were"
                    f" saved, {sum(map(len, pending))} more: the file was cut off"
                )
            offset += count
            _advance(pending, count)

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on."""
        if offset + length > self.size:
            raise DamagedCheckpointError(
                f"{self.path}: has {self.size} bytes, but bytes {offset} to {offset + length} were"
                " saved: the file was cut off"
            )
        buffer = np.empty(length, np.uint8)
        self.read_into(offset, buffer)
        return buffer.tobytes()

    def close(self) -> None:
        """Closes the file."""
        os.close(self._fd)
