"""The checksum table of a database: the CRC-32C of every value, in key order.

Each chunk carries its own CRC, which a stale or swapped block satisfies as well; the table says
which bytes belong under which key. A format of this package:

    8 bytes magic · u32le version 1 · u64le count · u32le CRC-32C of the keys ·
    u32le CRC-32C of each value (of a chunk: of its payload, without the CRC that is stored
    with it) · u32le CRC-32C of all bytes before it

The CRC of the keys is taken over the u32le lengths of all keys, then all keys, in order.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

import crc32c
import numpy as np
from numpy.typing import NDArray

from flax_ckpt.errors import DamagedCheckpointError, FormatError

MAGIC: Final = b"fckptcrc"
VERSION: Final = 1
_HEAD: Final = struct.Struct("<8sIQI")


def encode_table(keys: Sequence[bytes], crcs: Sequence[int] | NDArray[np.uint32]) -> bytes:
    """The table as a file.

    Args:
        keys: all keys of the database, increasing.
        crcs: the CRC-32C of each key's value.

    Raises:
        FormatError: not one 32-bit number per key.
    """
    if len(keys) != len(crcs):
        raise FormatError(f"checksum table: found {len(crcs)} values, expected {len(keys)}")
    try:
        column = np.asarray(crcs, np.uint32).astype("<u4")
    except OverflowError as e:
        raise FormatError(f"checksum table: expected 32-bit numbers: {e}") from e
    head = _HEAD.pack(MAGIC, VERSION, len(keys), _keys_crc(keys))
    body = head + column.tobytes()
    return body + crc32c.crc32c(body).to_bytes(4, "little")


def decode_table(
    data: bytes, keys: Sequence[bytes], *, what: str = "checksum table"
) -> NDArray[np.uint32]:
    """The CRC-32C of each key's value.

    Args:
        data: the whole file.
        keys: all keys that the database has now, increasing.
        what: names the file in errors.

    Raises:
        DamagedCheckpointError: not the bytes that were written, or a table of other keys.
        FormatError: a table of another version.
    """
    if len(data) < _HEAD.size + 4:
        raise DamagedCheckpointError(
            f"{what}: found {len(data)} bytes, expected at least {_HEAD.size + 4}"
        )
    magic, version, count, keys_crc = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise DamagedCheckpointError(f"{what}: found magic {magic!r}, expected {MAGIC!r}")
    stored = int.from_bytes(data[-4:], "little")
    if (crc := crc32c.crc32c(memoryview(data)[:-4])) != stored:
        raise DamagedCheckpointError(f"{what}: found CRC-32C {crc:#010x}, expected {stored:#010x}")
    if version != VERSION:
        raise FormatError(f"{what}: found version {version}, expected {VERSION}")
    if len(data) != (size := _HEAD.size + 4 * count + 4):
        raise DamagedCheckpointError(f"{what}: found {len(data)} bytes, expected {size}")
    if count != len(keys):
        raise DamagedCheckpointError(
            f"{what}: found {len(keys)} keys in the database, expected {count}"
        )
    if (crc := _keys_crc(keys)) != keys_crc:
        raise DamagedCheckpointError(
            f"{what}: found other keys in the database (CRC-32C {crc:#010x}), "
            f"expected {keys_crc:#010x}"
        )
    return np.frombuffer(data, "<u4", count, _HEAD.size).astype(np.uint32)


def _keys_crc(keys: Sequence[bytes]) -> int:
    lengths = np.fromiter(map(len, keys), "<u4", len(keys))
    return crc32c.crc32c(b"".join(keys), crc32c.crc32c(lengths.tobytes()))
