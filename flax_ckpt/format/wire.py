"""Bytes of an OCDBT database below its nodes: numbers, frames, strings, data file tables.

Written from TensorStore's public description of the format (`kvstore/ocdbt/index.rst`). A
`Reader` checks every length against the bytes that are left, or a limit, before it allocates.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final, TypeAlias

import crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from flax_ckpt.errors import DamagedCheckpointError, FormatError

Buffer: TypeAlias = bytes | memoryview
Column: TypeAlias = NDArray[np.uint64]

MAX_KEY: Final = 65_535
MAX_OFFSET: Final = 2**63 - 1
MAX_UINT64: Final = 2**64 - 1
MAX_NODE: Final = 128 << 20
_MAX_KEYS: Final = 64 << 20  # of a node, which prefix coding can grow 65,535 times
_EXPANSION: Final = 32  # of what is compressed beyond 64 MiB
_MAX_ROWS: Final = 1 << 20
_FRAME_BYTES: Final = 18  # magic 4, length 8, version 1, compression 1, CRC 4


def encode_varints(values: Sequence[int]) -> bytes:
    """Unsigned LEB128 numbers below 2**64."""
    column = np.array(values, np.uint64)
    width = max(1, -(-int(column.max(initial=0)).bit_length() // 7))
    rest = column[:, None] >> np.arange(0, 7 * width, 7).astype(np.uint64)
    groups = (rest & np.uint64(0x7F)).astype(np.uint8) | (rest > 0x7F) << np.uint8(7)
    rest[:, 0] = 1  # a zero has one group as well
    return groups[rest > 0].tobytes()


def encode_strings(strings: Sequence[bytes], *, marked: bool = False) -> bytes:
    """What `Reader.strings` reads; no string shares a prefix, and all marks are 0."""
    count = len(strings)
    lengths = encode_varints(list(map(len, strings)))
    marks = bytes(count if marked else 0)
    return b"".join((encode_varints([count]), bytes(max(count - 1, 0)), lengths, marks, *strings))


def encode_files(paths: Iterable[str]) -> bytes:
    """A data file table whose base paths are all empty."""
    return encode_strings([path.encode() for path in paths], marked=True)


def with_crc(data: bytes) -> bytes:
    """`data` and its CRC-32C."""
    return data + crc32c.crc32c(data).to_bytes(4, "little")


def check_crc(data: Buffer, what: str) -> None:
    """Raises `DamagedCheckpointError` unless `data` ends in the CRC-32C of what is before."""
    crc, stored = crc32c.crc32c(memoryview(data)[:-4]).to_bytes(4, "little"), data[-4:]
    if crc != stored:
        raise DamagedCheckpointError(f"{what}: found CRC-32C {crc.hex()}, expected {stored.hex()}")


def encode_frame(magic: bytes, *parts: bytes) -> bytes:
    """An uncompressed node or manifest: header, `parts`, CRC-32C of all that."""
    length = _FRAME_BYTES + sum(map(len, parts))
    return with_crc(b"".join((magic, length.to_bytes(8, "little"), b"\0\0", *parts)))


def open_frame(data: Buffer, magic: bytes, what: str) -> Reader:
    """A reader of the body of a node or manifest, its checksum verified.

    Args:
        data: the whole frame.
        magic: the 4 bytes it must start with.
        what: names the frame in errors.

    Raises:
        DamagedCheckpointError: magic, length, CRC-32C or zstd stream are wrong.
        FormatError: unknown version or compression; a compressed body that is too large.
    """
    if (found := data[:4]) != magic:
        raise DamagedCheckpointError(f"{what}: found magic {found.hex()}, expected {magic.hex()}")
    size = max(int.from_bytes(data[4:12], "little"), _FRAME_BYTES)
    if len(data) != size:
        raise DamagedCheckpointError(f"{what}: found {len(data)} bytes, expected {size}")
    check_crc(data, what)
    kind, body = data[12:14].hex(), memoryview(data)[14:-4]
    if kind == "0000":
        return Reader(body, what)
    if kind != "0001":
        raise FormatError(f"{what}: found version and compression {kind}, expected 0000 or 0001")
    most = grown(len(body), MAX_NODE)
    try:
        if (size := zstandard.frame_content_size(body)) > most:
            raise FormatError(f"{what}: found a body of {size} bytes, expected at most {most}")
        decoder = zstandard.ZstdDecompressor()
        return Reader(decoder.decompress(body, most, allow_extra_data=False), what)
    except zstandard.ZstdError as e:
        frame = f"one frame of at most {most} bytes"
        raise DamagedCheckpointError(f"{what}: found a bad zstd body, expected {frame}: {e}") from e


def grown(stored: int, most: int) -> int:
    """How much memory may be spent on what is stored in so many bytes; `most` at most."""
    return min(most, (64 << 20) + _EXPANSION * stored)


class Reader:
    """Reads one body from front to back; raises `FormatError` where it does not hold.

    Attributes:
        size: of the body in bytes.
        what: names it in errors.
    """

    def __init__(self, data: Buffer, what: str) -> None:
        self._data, self._pos = memoryview(data), 0
        self.size, self.what = len(data), what

    def error(self, name: str, found: object, expected: object) -> FormatError:
        """The error for a field that is not as it should be."""
        return FormatError(f"{self.what}: {name}: found {found}, expected {expected}")

    def take(self, count: int, name: str) -> bytes:
        """The next `count` bytes."""
        data = bytes(self._data[self._pos : self._pos + count])
        if len(data) != count:
            raise self.error(name, f"{len(data)} bytes", f"{count} bytes")
        self._pos += count
        return data

    def finish(self) -> None:
        """Checks that nothing is left."""
        if left := self.size - self._pos:
            raise self.error("end", f"{left} more bytes", "none")

    def varint(self, name: str, most: int) -> int:
        """The next number, at most `most`."""
        return int(self.varints(1, name, most)[0])

    def varints(self, count: int, name: str, most: int = MAX_OFFSET) -> Column:
        """The next `count` numbers, each at most `most`."""
        if not count:
            return np.zeros(0, np.uint64)
        span = min(self.size - self._pos, 10 * count)
        window = np.frombuffer(self._data, np.uint8, span, self._pos)
        ends = np.flatnonzero(window < 0x80)[:count] + 1
        if len(ends) < count:
            raise self.error(name, f"{len(ends)} numbers in {span} bytes", f"{count} numbers")
        lengths = np.diff(ends, prepend=0)
        if np.any((lengths > 10) | (lengths == 10) & (window[ends - 1] > 1)):
            raise self.error(name, "a number above 64 bits", f"at most {most}")
        starts = ends - lengths
        values = window[starts].astype(np.uint64) & np.uint64(0x7F)
        for k in range(1, int(lengths.max())):
            longer = np.flatnonzero(lengths > k)
            group = window[starts[longer] + k].astype(np.uint64) & np.uint64(0x7F)
            values[longer] |= group << np.uint64(7 * k)
        if (top := int(values.max())) > most:
            raise self.error(name, top, f"at most {most}")
        self._pos += int(ends[-1])
        return values

    def strings(self, name: str, prefix: bytes, *, marked: bool) -> tuple[list[bytes], Column]:
        """Prefix-coded strings: `prefix` before each, and a marked place in each (or its start)."""
        count = self.varint(f"{name} count", _MAX_ROWS)
        shared = np.zeros(count, np.uint64)  # bytes taken from the string before
        shared[1:] = self.varints(max(count - 1, 0), f"{name} prefix length", MAX_KEY)
        suffix = self.varints(count, f"{name} suffix length", MAX_KEY)
        marks = self.varints(count, f"{name} mark", MAX_KEY) if marked else np.zeros_like(shared)
        shared[1:] += np.uint64(len(prefix))
        shared[:1] = len(prefix)
        lengths = shared + suffix
        marks += np.uint64(len(prefix))
        if np.any(marks > lengths) or np.any(shared[1:] > lengths[:-1]):
            raise self.error(f"{name} prefix", "one beyond the string", "one within it")
        longest, total = int(lengths.max(initial=0)), int(lengths.sum())
        if longest > MAX_KEY or total > _MAX_KEYS:
            limits = f"{MAX_KEY} and {_MAX_KEYS} in all"
            raise self.error(f"{name} bytes", f"{longest} and {total} in all", limits)
        blob = self.take(int(suffix.sum()), f"{name} bytes")
        out: list[bytes] = []
        last, start = prefix, 0
        for skip, end in zip(shared.tolist(), np.cumsum(suffix).tolist(), strict=True):
            last = last[:skip] + blob[start:end] if skip else blob[start:end]
            start = end
            out.append(last)
        return out, marks

    def files(self, base: str) -> list[tuple[str, str]]:
        """A data file table: each file's path, and the base path of the nodes in it.

        Both are relative to the database directory; what is stored is relative to `base`.
        """
        raw, marks = self.strings("data file", base.encode(), marked=True)
        try:
            paths = [path.decode() for path in raw]
            bases = [path[:mark].decode() for path, mark in zip(raw, marks.tolist(), strict=True)]
        except UnicodeDecodeError as e:
            raise self.error("data file path", e.object[:80], "UTF-8") from None
        paths = ["" if path == base else path for path in paths]  # there is no file
        for path in filter(None, paths):
            check_path(path, self.what)
        return list(zip(paths, bases, strict=True))

    def pick(self, files: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
        """The next `count` data file ids, looked up in `files`."""
        return [files[i] for i in self.varints(count, "data file id", len(files) - 1).tolist()]


def check_path(path: str, what: str) -> None:
    """Raises `FormatError` unless a relative `path` names a file inside the directory."""
    parts, coded = path.split("/"), path.encode(errors="ignore")
    escapes = "" in (parts[0], parts[-1]) or ".." in parts
    if escapes or "\0" in path or len(coded) > MAX_KEY or coded.decode() != path:
        inside = "a relative path inside the directory"
        raise FormatError(f"{what}: file path: found {path[:200]!r}, expected {inside}")
