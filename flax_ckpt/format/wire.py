"""Bytes of an OCDBT database below its nodes: numbers, frames, prefix coding, file tables.

Written from TensorStore's public description of the format (`kvstore/ocdbt/index.rst`). A
`Reader` checks every length against the bytes that are left before it allocates anything, so
hostile input costs at most a small multiple of its own size, or of the limit it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from flax_ckpt.errors import DamagedCheckpointError, FormatError

MAX_KEY: Final = 65_535
MAX_OFFSET: Final = 2**63 - 1
# Prefix coding can turn one byte into 65,535: what keys and paths of one node may grow to.
MAX_EXPANDED: Final = 256 << 20
_FRAME_BYTES: Final = 18  # magic 4, length 8, version 1, compression 1, CRC 4


class DataFile(NamedTuple):
    """One row of a data file table.

    Attributes:
        path: relative to the database directory, checked to stay inside it; "" is no file.
        base: what paths are relative to in the nodes that are stored in this file.
    """

    path: str
    base: str


def shorten(key: bytes) -> str:
    """`key` for an error message, cut to 80 bytes."""
    return repr(key) if len(key) <= 80 else f"{key[:80]!r}… ({len(key)} bytes)"


def uint64s(values: Sequence[int], what: str) -> NDArray[np.uint64]:
    """`values` as an array. Raises `FormatError` for one below 0 or above 2**63 - 1."""
    try:
        out = np.fromiter(values, np.int64, len(values))
    except OverflowError:
        out = np.array([-1])
    if len(out) and int(out.min()) < 0:
        bad = next(v for v in values if not 0 <= v <= MAX_OFFSET)
        raise FormatError(f"{what}: found {bad}, expected 0 to {MAX_OFFSET}")
    return out.astype(np.uint64)


def encode_varint(value: int) -> bytes:
    """One unsigned LEB128 number."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def encode_varints(values: NDArray[np.uint64]) -> bytes:
    """A column of unsigned LEB128 numbers."""
    top = int(values.max()) if len(values) else 0
    if top < 0x80:
        return values.astype(np.uint8).tobytes()
    longest = -(-top.bit_length() // 7)
    lengths = np.ones(len(values), np.int64)
    for k in range(1, longest):
        lengths += values >= np.uint64(1 << 7 * k)
    ends = np.cumsum(lengths)
    starts = ends - lengths
    out = np.empty(int(ends[-1]), np.uint8)
    for k in range(longest):
        rest = np.flatnonzero(lengths > k)
        part = (values[rest] >> np.uint64(7 * k)) & np.uint64(0x7F)
        more = (lengths[rest] > k + 1).astype(np.uint64) << np.uint64(7)
        out[starts[rest] + k] = part | more
    return out.tobytes()


def common_prefixes(keys: Sequence[bytes]) -> NDArray[np.int64]:
    """Length of the common prefix of each key with the key before it; 0 for the first.

    Compares eight bytes of every pair at a time, without a Python loop over the keys.
    """
    out = np.zeros(len(keys), np.int64)
    lengths = np.fromiter(map(len, keys), np.int64, len(keys))
    starts = np.cumsum(lengths) - lengths
    blob = b"".join((*keys, bytes(8)))
    words = np.ndarray((len(blob) - 7,), "<u8", blob, strides=(1,))
    pairs = np.arange(1, len(keys))
    at = 0
    while len(pairs):
        differ = words[starts[pairs] + at] ^ words[starts[pairs - 1] + at]
        lowest = differ & (~differ + np.uint64(1))
        bits = np.where(differ == 0, 64, np.bitwise_count(lowest - np.uint64(1)))
        same = bits.astype(np.int64) >> 3
        shorter = np.minimum(lengths[pairs], lengths[pairs - 1])
        out[pairs] = np.minimum(at + same, shorter)
        at += 8
        pairs = pairs[(differ == 0) & (shorter > at)]
    return out


def encode_files(paths: Sequence[str]) -> bytes:
    """A data file table whose rows are `paths`, all with an empty base path."""
    raw = [path.encode() for path in paths]
    shared = common_prefixes(raw)
    suffixes = [path[skip:] for path, skip in zip(raw, shared.tolist(), strict=True)]
    return b"".join(
        (
            encode_varint(len(raw)),
            encode_varints(shared[1:].astype(np.uint64)),
            encode_varints(uint64s([len(s) for s in suffixes], "path length")),
            bytes(len(raw)),
            *suffixes,
        )
    )


def encode_frame(magic: int, parts: Sequence[bytes]) -> bytes:
    """An uncompressed node or manifest: header, `parts`, CRC-32C of all that."""
    body = b"".join((b"\0\0", *parts))  # version 0, no compression
    length = _FRAME_BYTES - 2 + len(body)
    head = magic.to_bytes(4, "big") + length.to_bytes(8, "little")
    crc = crc32c.crc32c(body, crc32c.crc32c(head))
    return b"".join((head, body, crc.to_bytes(4, "little")))


def open_frame(data: bytes, magic: int, what: str, limit: int) -> Reader:
    """A reader of the body of a node or manifest, its checksum verified.

    Args:
        data: the whole frame.
        magic: the number it must start with.
        what: names the frame in errors.
        limit: most bytes that a compressed body may decode to.

    Raises:
        DamagedCheckpointError: magic, length, CRC-32C or zstd stream are wrong.
        FormatError: unknown version or compression; body larger than `limit`.
    """
    if len(data) < _FRAME_BYTES:
        raise DamagedCheckpointError(
            f"{what}: found {len(data)} bytes, expected at least {_FRAME_BYTES}"
        )
    if (found := int.from_bytes(data[:4], "big")) != magic:
        raise DamagedCheckpointError(
            f"{what}: found magic number {found:#010x}, expected {magic:#010x}"
        )
    if (length := int.from_bytes(data[4:12], "little")) != len(data):
        raise DamagedCheckpointError(
            f"{what}: found {len(data)} bytes, expected {length} as its header says"
        )
    stored = int.from_bytes(data[-4:], "little")
    if (crc := crc32c.crc32c(memoryview(data)[:-4])) != stored:
        raise DamagedCheckpointError(f"{what}: found CRC-32C {crc:#010x}, expected {stored:#010x}")
    reader = Reader(data, what, 12, len(data) - 4)
    reader.varint("format version", 0)
    if reader.varint("compression method", 1):
        reader = Reader(_decompress(data[reader.pos : -4], what, limit), what)
    return reader


def _decompress(data: bytes, what: str, limit: int) -> bytes:
    decoder = zstandard.ZstdDecompressor()
    try:
        size = zstandard.get_frame_parameters(data).content_size
        if size not in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
            if size > limit:
                raise FormatError(
                    f"{what}: found a zstd body of {size} bytes, expected at most {limit}"
                )
            return decoder.decompress(data, allow_extra_data=False)
        return decoder.decompress(data, max_output_size=limit, allow_extra_data=False)
    except zstandard.ZstdError as e:
        raise DamagedCheckpointError(
            f"{what}: found a body that is not one zstd frame of at most {limit} bytes: {e}"
        ) from e


class Reader:
    """Reads one body from front to back; raises `FormatError` where it does not hold.

    Attributes:
        pos: index of the next byte.
    """

    def __init__(self, data: bytes, what: str, pos: int = 0, end: int | None = None) -> None:
        self._data = data
        self._end = len(data) if end is None else end
        self.what = what
        self.pos = pos

    def error(self, name: str, found: object, expected: object) -> FormatError:
        """The error for a field that is not as it should be."""
        return FormatError(f"{self.what}: {name}: found {found}, expected {expected}")

    def take(self, count: int, name: str) -> bytes:
        """The next `count` bytes."""
        left = self._end - self.pos
        if count > left:
            raise self.error(name, f"{left} bytes", f"{count} bytes")
        self.pos += count
        return self._data[self.pos - count : self.pos]

    def byte(self, name: str) -> int:
        """The next byte."""
        return self.take(1, name)[0]

    def varint(self, name: str, most: int = MAX_OFFSET) -> int:
        """The next number, at most `most`."""
        return int(self.varints(1, name, most)[0])

    def varints(self, count: int, name: str, most: int = MAX_OFFSET) -> NDArray[np.uint64]:
        """The next `count` numbers, each at most `most`."""
        if not count:
            return np.zeros(0, np.uint64)
        span = min(self._end - self.pos, 10 * count)
        window = np.frombuffer(self._data, np.uint8, span, self.pos)
        ends = np.flatnonzero(window < 0x80)[:count]
        if len(ends) < count:
            raise self.error(name, f"{len(ends)} numbers in {span} bytes", f"{count} numbers")
        lengths = np.diff(ends, prepend=-1)
        if (longest := int(lengths.max())) > 10:
            raise self.error(name, f"a number of {longest} bytes", "at most 10 bytes")
        starts = ends - lengths + 1
        values = (window[starts] & 0x7F).astype(np.uint64)
        for k in range(1, longest):
            rest = np.flatnonzero(lengths > k)
            part = window[starts[rest] + k].astype(np.uint64)
            if k == 9 and int(part.max()) > 1:
                raise self.error(name, "a number above 64 bits", f"at most {most}")
            values[rest] |= (part & np.uint64(0x7F)) << np.uint64(7 * k)
        if (top := int(values.max())) > most:
            raise self.error(name, top, f"at most {most}")
        self.pos += int(ends[-1]) + 1
        return values

    def uint64s(self, count: int, name: str) -> NDArray[np.uint64]:
        """The next `count` fixed 64-bit numbers."""
        return np.frombuffer(self.take(8 * count, name), "<u8").astype(np.uint64)

    def finish(self) -> None:
        """Checks that nothing is left."""
        if self.pos != self._end:
            raise self.error("end", f"{self._end - self.pos} more bytes", "none")

    def prefixed(
        self, shared: NDArray[np.uint64], suffix: NDArray[np.uint64], name: str, before: int = 0
    ) -> list[bytes]:
        """Byte strings from their lengths and the suffix bytes that come next.

        Args:
            shared: bytes that each string, but for the first, takes from the one before.
            suffix: bytes that are stored of each string.
            name: what the strings are.
            before: bytes that the caller will put in front of each.
        """
        shared = np.concatenate((np.zeros(1, np.uint64), shared))
        lengths = shared + suffix
        if (longest := int(lengths.max()) + before) > MAX_KEY:
            raise self.error(f"{name} length", longest, f"at most {MAX_KEY}")
        if len(bad := np.flatnonzero(shared[1:] > lengths[:-1])):
            at = int(bad[0])
            raise self.error(f"{name} prefix", int(shared[at + 1]), f"at most {int(lengths[at])}")
        if (total := int(lengths.sum()) + before * len(lengths)) > MAX_EXPANDED:
            raise self.error(f"{name}s", f"{total} bytes", f"at most {MAX_EXPANDED}")
        blob = self.take(int(suffix.sum()), f"{name} bytes")
        out: list[bytes] = []
        last, pos = b"", 0
        for skip, size in zip(shared.tolist(), suffix.tolist(), strict=True):
            last = last[:skip] + blob[pos : pos + size]
            pos += size
            out.append(last)
        return out

    def files(self, base: str) -> list[DataFile]:
        """A data file table; its paths are relative to `base`."""
        count = self.varint("data file count", self._end - self.pos)
        if not count:
            return []
        shared = self.varints(count - 1, "path prefix length", MAX_KEY)
        suffix = self.varints(count, "path suffix length", MAX_KEY)
        bases = self.varints(count, "base path length", MAX_KEY)
        # A prefix that reaches past a base path means that the base path is the same one.
        shorter = np.minimum(bases[1:], bases[:-1])
        if np.any((shared > shorter) & (bases[1:] != bases[:-1])):
            raise self.error("path prefix length", "one beyond the base path", "one within it")
        raw = self.prefixed(shared, suffix, "path", len(base.encode()))
        return [self._file(p, b, base) for p, b in zip(raw, bases.tolist(), strict=True)]

    def _file(self, raw: bytes, base_length: int, above: str) -> DataFile:
        if base_length > len(raw):
            raise self.error("base path length", base_length, f"at most {len(raw)}")
        try:
            path, base = raw.decode(), raw[:base_length].decode()
        except UnicodeDecodeError:
            raise self.error("data file path", shorten(raw), "UTF-8") from None
        if path:
            check_path(above + path, self.what)
        return DataFile(above + path if path else "", above + base)

    def pick(self, files: Sequence[DataFile], count: int) -> list[DataFile]:
        """The next `count` data file ids, looked up in `files`."""
        ids: list[int] = self.varints(count, "data file id").tolist()
        if ids and (top := max(ids)) >= len(files):
            raise self.error("data file id", top, f"less than {len(files)}")
        return [files[i] for i in ids]


def check_path(path: str, what: str) -> None:
    """Raises `FormatError` unless `path` names a file below the database directory."""
    parts = path.split("/")
    try:
        size = len(path.encode())
    except UnicodeEncodeError:  # a lone surrogate
        size = 0
    if not 0 < size <= MAX_KEY or path[0] == "/" or not parts[-1] or ".." in parts or "\0" in path:
        raise FormatError(
            f"{what}: data file path: found {path[:200]!r}, "
            "expected a relative path inside the database"
        )
