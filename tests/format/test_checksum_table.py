"""The checksum table: what is damaged, stale or of other keys is found."""

from __future__ import annotations

import crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_ckpt.errors import DamagedCheckpointError, FormatError
from flax_ckpt.format.ocdbt import decode_table, encode_table

KEYS = [b"", b"a/c/0", b"a/zarr.json", b"b/c"]
CRCS = [0, 1, 2**32 - 1, 77]
TABLE = encode_table(KEYS, CRCS)


def sealed(body: bytes) -> bytes:
    return body + crc32c.crc32c(body).to_bytes(4, "little")


@given(st.dictionaries(st.binary(max_size=20), st.integers(0, 2**32 - 1)))
def test_tables_come_back(values: dict[bytes, int]) -> None:
    keys = sorted(values)
    data = encode_table(keys, [values[key] for key in keys])
    found = decode_table(data, keys)
    assert found.dtype == np.uint32
    assert dict(zip(keys, found.tolist(), strict=True)) == values
    assert len(data) == 28 + 4 * len(keys)


def test_the_bytes_are_fixed() -> None:
    keys_crc = crc32c.crc32c(b"\1\0\0\0\2\0\0\0" + b"a" + b"bc")
    body = b"fckptcrc" + b"\1\0\0\0" + b"\2" + bytes(7) + keys_crc.to_bytes(4, "little")
    data = sealed(body + b"\7\0\0\0" + b"\0\1\0\0")
    assert encode_table([b"a", b"bc"], [7, 256]) == data
    assert decode_table(data, [b"a", b"bc"]).tolist() == [7, 256]


def test_a_flipped_bit_anywhere_is_damage() -> None:
    assert decode_table(TABLE, KEYS).tolist() == CRCS
    for i in range(8 * len(TABLE)):
        bad = bytearray(TABLE)
        bad[i // 8] ^= 1 << i % 8
        with pytest.raises(DamagedCheckpointError, match=r"^params/table: found .*, expected "):
            decode_table(bytes(bad), KEYS, what="params/table")


def test_every_truncation_and_any_tail_is_damage() -> None:
    for n in range(len(TABLE)):
        with pytest.raises(DamagedCheckpointError, match=r"found .*, expected"):
            decode_table(TABLE[:n], KEYS)
    with pytest.raises(DamagedCheckpointError, match=r"found CRC-32C .*, expected"):
        decode_table(TABLE + b"\0", KEYS)
    with pytest.raises(DamagedCheckpointError, match="and 48 bytes, expected .* and 44 bytes for"):
        decode_table(sealed(TABLE), KEYS)


@pytest.mark.parametrize(
    "keys",
    [
        KEYS[:-1],
        [*KEYS, b"c"],
        [],
        [KEYS[0], *KEYS[2:], b"c"],
        KEYS[::-1],
        [b"", b"a/c", b"/0a/zarr.json", b"b/c"],  # the same bytes, cut at other places
    ],
)
def test_a_table_of_other_keys_is_damage(keys: list[bytes]) -> None:
    message = f"found 04.* and 44 bytes, expected .* for the {len(keys)} keys in the database"
    with pytest.raises(DamagedCheckpointError, match=message):
        decode_table(TABLE, keys)


def test_a_count_beyond_the_file_is_damage() -> None:
    body = bytearray(TABLE[:-4])
    body[12:20] = b"\xff" * 8
    with pytest.raises(DamagedCheckpointError, match="found ffffffffffffffff.*, expected 04"):
        decode_table(sealed(bytes(body)), KEYS)


def test_another_version_is_no_damage() -> None:
    body = bytearray(TABLE[:-4])
    body[8] = 2
    with pytest.raises(
        FormatError, match=r"found b.fckptcrc\\x02.* at its start, expected b.fckptcrc\\x01"
    ) as info:
        decode_table(sealed(bytes(body)), KEYS)
    assert info.type is FormatError


def test_the_writer_wants_32_bit_numbers() -> None:
    for bad in (-1, 2**32):
        with pytest.raises(OverflowError):
            encode_table([b"a"], [bad])


def test_a_large_table() -> None:
    keys = [b"params.layers_%06d.kernel/c/0/0" % i for i in range(400_000)]
    crcs = np.arange(400_000, dtype=np.uint32) * np.uint32(2654435761)
    data = encode_table(keys, crcs.tolist())
    assert np.array_equal(decode_table(data, keys), crcs)


@given(st.binary(max_size=80), st.booleans())
def test_garbage_is_an_error(data: bytes, with_magic: bool) -> None:
    head = b"fckptcrc" if with_magic else b""
    with pytest.raises(FormatError, match=r"found .*, expected"):
        decode_table(sealed(head + data), KEYS)
