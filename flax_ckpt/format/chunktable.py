"""The checksum table of a database: the CRC-32C of every value, in key order.

Each chunk carries its own CRC, which a stale or swapped block satisfies as well; the table says
which bytes belong under which key. A format of this package:

    8 bytes magic · u32le version 1 · u64le count · u32le CRC-32C of the keys ·
    u32le CRC-32C of each value (of a chunk: of its payload, without the CRC that is stored
    with it) · u32le CRC-32C of all bytes before it

The CRC of the keys is taken over the u32le lengths of all keys, then all keys, in order.
"""

import struct
from collections.abc import Sequence

import crc32c
import numpy as np
from numpy.typing import NDArray

from flax_ckpt.errors import DamagedCheckpointError, FormatError
from flax_ckpt.format import wire


def _head(keys: Sequence[bytes]) -> bytes:
    lengths = np.fromiter(map(len, keys), "<u4", len(keys))
    crc = crc32c.crc32c(b"".join(keys), crc32c.crc32c(lengths.tobytes()))
    return struct.pack("<8sIQI", b"fckptcrc", 1, len(keys), crc)


def encode_table(keys: Sequence[bytes], crcs: Sequence[int]) -> bytes:
    """The table as a file, from all keys of the database, increasing, and their values' CRCs."""
    return wire.with_crc(_head(keys) + np.array(crcs, "<u4").tobytes())


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
        FormatError: no table, or one of another version.
    """
    wire.check_crc(data, what)
    head = _head(keys)
    size = len(head) + 4 * len(keys) + 4
    if data[:12] != head[:12]:
        raise FormatError(f"{what}: found {data[:12]!r} at its start, expected {head[:12]!r}")
    if data[:24] != head or len(data) != size:
        raise DamagedCheckpointError(
            f"{what}: found {data[12:24].hex()} and {len(data)} bytes, expected {head[12:].hex()} "
            f"and {size} bytes for the {len(keys)} keys in the database"
        )
    return np.frombuffer(data, "<u4", len(keys), len(head))
