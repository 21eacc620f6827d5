"""Encodings: keys, descriptions and chunks, there and back; garbage is a typed error."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import crc32c
import numpy as np
import pytest
import tensorstore as ts
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from flax_ckpt.errors import DamagedCheckpointError, FormatError
from flax_ckpt.format import arrays
from flax_ckpt.format.arrays import Encoding, StoredArray, numpy_dtype, parse

ENCODINGS = [Encoding(zarr3, compressed) for zarr3 in (True, False) for compressed in (True, False)]
DTYPES = sorted(arrays._DTYPES)  # pyright: ignore[reportPrivateUsage]


def chunk_of(spec: arrays.ArraySpec) -> np.ndarray[Any, Any]:
    return np.arange(spec.chunk_nbytes, dtype=np.uint8)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_description_comes_back(encoding: Encoding, dtype: str) -> None:
    for shape, chunk in (((), ()), ((3, 4), (2, 4)), ((0, 5), (1, 5))):
        spec = arrays.ArraySpec(shape, dtype, chunk)
        found = parse(encoding.metadata(spec), zarr3=encoding.zarr3)
        assert found == StoredArray(shape, numpy_dtype(dtype), chunk, encoding)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
@pytest.mark.parametrize(("name", "index"), [("w", (1, 0)), ("", (0, 0)), ("a/b.c", (1, 1))])
def test_tensorstore_reads_what_the_keys_and_values_say(
    encoding: Encoding, name: str, index: tuple[int, ...]
) -> None:
    spec = arrays.ArraySpec((4, 6), "int16", (2, 3))
    store = ts.KvStore.open({"driver": "memory"}).result()
    store[encoding.metadata_key(name)] = encoding.metadata(spec)
    data, padding = encoding.encode(chunk_of(spec)[:-4], 4)
    value = data.tobytes() + bytes(padding)
    if encoding.trailer:
        value += crc32c.crc32c(value).to_bytes(4, "little")
    store[encoding.chunk_key(name, index)] = value
    driver = "zarr3" if encoding.zarr3 else "zarr"
    found = ts.open({"driver": driver}, kvstore=store / arrays.prefix(name)).result()
    low = [i * step for i, step in zip(index, spec.chunk_shape, strict=True)]
    box = tuple(slice(a, a + step) for a, step in zip(low, spec.chunk_shape, strict=True))
    expected = np.frombuffer(chunk_of(spec)[:-4].tobytes() + bytes(4), np.int16).reshape(2, 3)
    np.testing.assert_array_equal(found[box].read().result(), expected)
    stored = np.frombuffer(value[: len(value) - encoding.trailer], np.uint8)
    decoded = encoding.decode(stored, spec.chunk_nbytes, "w")
    assert decoded.tobytes() == expected.tobytes()


def test_keys_of_rank_0() -> None:
    assert [Encoding(zarr3).chunk_key("w", ()) for zarr3 in (True, False)] == [b"w/c", b"w/0"]


def test_without_compression_nothing_is_copied() -> None:
    data = np.zeros(8, np.uint8)
    encoded, padding = Encoding().encode(data, 3)
    assert encoded is data
    assert padding == 3


@given(st.binary(max_size=200), st.sampled_from(ENCODINGS))
def test_garbage_is_no_chunk(data: bytes, encoding: Encoding) -> None:
    try:
        found = encoding.decode(np.frombuffer(data, np.uint8), 64, "w")
    except DamagedCheckpointError as error:
        assert str(error).startswith("w")  # noqa: PT017
    else:
        assert len(found) == 64


def test_a_frame_that_does_not_hold_is_damage() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(range(64)))
    encoding = Encoding(zarr3=False, compressed=True)
    assert encoding.decode(np.frombuffer(frame, np.uint8), 64, "w").tobytes() == bytes(range(64))
    for wrong, message in (
        (frame[:-3], "damaged zstd frame"),
        (frame + b"x", "damaged zstd frame"),
        (zstandard.ZstdCompressor().compress(bytes(63)), "expected 64"),
    ):
        with pytest.raises(DamagedCheckpointError, match=message):
            encoding.decode(np.frombuffer(wrong, np.uint8), 64, "w")


@pytest.mark.parametrize(
    ("zarr3", "change"),
    [
        (True, {"codecs": [{"name": "bytes"}, {"name": "gzip"}, {"name": "crc32c"}]}),
        (True, {"codecs": "zstd"}),
        (True, {"zarr_format": 2}),
        (True, {"shape": [math.inf]}),
        (False, {"compressor": {"id": "blosc"}}),
        (False, {"order": "F"}),
        (False, {"filters": [{"id": "delta"}]}),
        (False, {"dimension_separator": "/"}),
        (False, {"dtype": "<zz"}),
        (False, {"dtype": "|O"}),
        (False, {"dtype": None}),
        (False, {"shape": [-1, 2]}),
        (False, {"shape": None}),
        (False, {"chunks": ["a", "b"]}),
    ],
)
def test_other_descriptions_are_format_errors(zarr3: bool, change: dict[str, Any]) -> None:
    encoding = Encoding(zarr3)
    document = json.loads(encoding.metadata(arrays.ArraySpec((4, 6), "int16", (2, 3))))
    data = json.dumps(document | change).encode()
    with contextlib.suppress(FormatError):
        assert parse(data, zarr3=zarr3).encoding is None


@given(st.binary(max_size=60), st.booleans())
def test_garbage_is_no_description(data: bytes, zarr3: bool) -> None:
    with pytest.raises(FormatError):
        parse(data, zarr3=zarr3)
