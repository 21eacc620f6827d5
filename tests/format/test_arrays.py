"""Array metadata: TensorStore opens ours, we read TensorStore's, hostile JSON is an error."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import crc32c
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_ckpt.errors import FormatError
from flax_ckpt.format.arrays import (
    ArraySpec,
    Encoding,
    StoredArray,
    choose_chunks,
    is_storable,
    numpy_dtype,
    parse,
    zarr_dtype,
)

NUMPY = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
EXTENSIONS = (
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz"),
    *("float8_e5m2fnuz", "float8_e3m4", "float8_e8m0fnu", "float4_e2m1fn", "int2", "int4"),
)
MIB = 1 << 20


def zarr_json(spec: ArraySpec) -> bytes:
    return Encoding().metadata(spec)


def chunk_grid(spec: ArraySpec) -> list[int]:
    return [-(-n // c) for n, c in zip(spec.shape, spec.chunk_shape, strict=True)]


def kvstore(path: Path) -> dict[str, str]:
    return {"driver": "file", "path": f"{path}/"}


def open_zarr(path: Path, driver: str, **spec: Any) -> ts.TensorStore:
    return ts.open({"driver": driver, "kvstore": kvstore(path), **spec}).result()


def sample(shape: tuple[int, ...], name: str) -> np.ndarray[Any, Any]:
    """0 and 1 in turn: values that every dtype holds (but for float8_e8m0fnu, which has no 0)."""
    return (np.arange(math.prod(shape)) % 2).reshape(shape).astype(numpy_dtype(name))


def store(path: Path, name: str, spec: ArraySpec, value: np.ndarray[Any, Any]) -> None:
    """Writes one array the way we store it, one file per key."""

    def put(key: bytes, data: bytes) -> None:
        file = path / key.decode()
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)

    put(Encoding().metadata_key(name), zarr_json(spec))
    for index in itertools.product(*map(range, chunk_grid(spec))):
        chunk = np.zeros(spec.chunk_shape, value.dtype)
        at = tuple(slice(i * c, i * c + c) for i, c in zip(index, spec.chunk_shape, strict=True))
        part = value[at]
        chunk[tuple(map(slice, part.shape))] = part
        payload = chunk.tobytes()
        assert len(payload) == spec.chunk_nbytes
        put(
            Encoding().chunk_key(name, index),
            payload + crc32c.crc32c(payload).to_bytes(4, "little"),
        )


# What we write.


@pytest.mark.parametrize("name", NUMPY + EXTENSIONS)
def test_tensorstore_reads_every_dtype(name: str, tmp_path: Path) -> None:
    spec = ArraySpec((5, 3), name, (2, 3))
    value = sample(spec.shape, name)
    store(tmp_path, "a.b", spec, value)
    found = open_zarr(tmp_path / "a.b", "zarr3", dtype=name).read().result()
    assert found.dtype == numpy_dtype(name)
    assert found.tobytes() == value.tobytes()
    info = parse(zarr_json(spec))
    assert info == StoredArray((5, 3), numpy_dtype(name), (2, 3), Encoding())


@pytest.mark.parametrize(
    ("shape", "chunk_shape", "keys"),
    [
        ((), (), ["c"]),
        ((3,), (2,), ["c/0", "c/1"]),
        ((4, 2, 3), (2, 2, 3), ["c/0/0/0", "c/1/0/0"]),
        ((0, 4), (1, 4), []),
        ((0,), (7,), []),
    ],
)
@pytest.mark.parametrize("name", ["", "w", "a.b/ü c"])
def test_tensorstore_reads_every_shape(
    name: str, shape: tuple[int, ...], chunk_shape: tuple[int, ...], keys: list[str], tmp_path: Path
) -> None:
    spec = ArraySpec(shape, "int16", chunk_shape)
    value = sample(shape, "int16")
    store(tmp_path, name, spec, value)
    array = open_zarr(tmp_path / name if name else tmp_path, "zarr3")
    assert array.shape == shape
    assert (array.chunk_layout.read_chunk.shape or ()) == chunk_shape
    assert np.array_equal(array.read().result(), value)
    root = tmp_path / name
    chunks = (p for p in root.rglob("*") if p.is_file() and p.name != "zarr.json")
    assert sorted(str(p.relative_to(root)) for p in chunks) == keys


def test_tensorstore_checks_our_checksum(tmp_path: Path) -> None:
    store(tmp_path, "w", ArraySpec((8,), "float32", (8,)), sample((8,), "float32"))
    file = tmp_path / "w/c/0"
    data = bytearray(file.read_bytes())
    data[3] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="Digest mismatch"):
        open_zarr(tmp_path / "w", "zarr3").read().result()


def test_the_document_is_compact_and_complete() -> None:
    document = zarr_json(ArraySpec((0, 4), "bfloat16", (1, 4)))
    assert b" " not in document
    assert json.loads(document) == {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [0, 4],
        "data_type": "bfloat16",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, 4]}},
        "chunk_key_encoding": {"name": "default"},
        "fill_value": 0.0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
    }
    fills = {name: json.loads(zarr_json(ArraySpec((), name, ())))["fill_value"] for name in NUMPY}
    assert fills["bool"] is False
    assert fills["complex64"] == [0.0, 0.0]
    assert (fills["uint8"], fills["float16"]) == (0, 0.0)
    for name in ("bool", "int4", "float8_e5m2"):
        assert b"endian" not in zarr_json(ArraySpec((), name, ()))


def test_chunk_sizes() -> None:
    assert ArraySpec((5, 0, 6), "float64", (2, 3, 6)).chunk_nbytes == 2 * 3 * 6 * 8
    assert ArraySpec((), "int4", ()).chunk_nbytes == 1


@pytest.mark.parametrize(
    ("shape", "dtype", "chunk_shape", "message"),
    [
        ((2,), "float32", (2, 1), "found rank 2 for an array of rank 1, expected the same rank"),
        ((1,) * 33, "float32", (1,) * 33, "found rank 33 for an array of rank 33, .* at most 32"),
        ((-1,), "float32", (1,), r"shape: found \(-1,\), expected 0 to"),
        ((2**60,), "int8", (1,), r"shape: found \(1152921504606846976,\), expected 0 to"),
        ((0, 2**63), "int8", (1, 1), "shape: found .*, expected 0 to"),
        ((2,), "float32", (0,), r"chunk shape: found \(0,\), expected 1 to"),
        ((2,), "float32", (2**60,), "chunk shape: found .*, expected 1 to"),
        ((2,), "uint4", (2,), "dtype: found 'uint4', expected one of bool, int8"),
    ],
)
def test_specs_that_cannot_be_stored(
    shape: tuple[int, ...], dtype: str, chunk_shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        ArraySpec(shape, dtype, chunk_shape)


# dtypes


def test_dtype_names_go_both_ways() -> None:
    for name in NUMPY:
        assert numpy_dtype(name) == np.dtype(name)
        assert repr(numpy_dtype(name)) == f"dtype('{name}')"
        assert zarr_dtype(np.dtype(name)) == name
        assert zarr_dtype(np.dtype(name).newbyteorder(">")) == name
    for name in EXTENSIONS:
        assert numpy_dtype(name) == np.dtype(getattr(ml_dtypes, name))
        assert zarr_dtype(np.dtype(getattr(ml_dtypes, name))) == name
    assert numpy_dtype("int4").itemsize == numpy_dtype("int2").itemsize == 1
    assert zarr_dtype(np.dtype("longlong")) == "int64"


@pytest.mark.parametrize(
    "dtype",
    [
        *map(np.dtype, ("O", "S3", "U3", "V4", "M8[ns]", "m8[s]", "longdouble", "f4,i2")),
        *(np.dtype(getattr(ml_dtypes, name)) for name in ("uint2", "uint4", "float8_e4m3")),
    ],
    ids=str,
)
def test_dtypes_that_cannot_be_stored(dtype: np.dtype[Any]) -> None:
    assert not is_storable(dtype)
    with pytest.raises(
        FormatError, match=r"dtype: found .*, expected one of bool, int8, .*, int4$"
    ):
        zarr_dtype(dtype)


@pytest.mark.parametrize("name", ["uint2", "uint4", "float8_e4m3", "object", "", "float128", "<f4"])
def test_names_that_are_no_dtype(name: str) -> None:
    with pytest.raises(FormatError, match=f"dtype: found '{name}', expected one of bool"):
        numpy_dtype(name)


# What we read.

BYTES = {"name": "bytes", "configuration": {"endian": "little"}}
CRC = {"name": "crc32c"}
ZSTD = {"name": "zstd", "configuration": {"level": 1, "checksum": False}}
SHARDED = {
    "name": "sharding_indexed",
    "configuration": {"chunk_shape": [2, 2], "codecs": [BYTES, ZSTD], "index_codecs": [BYTES, CRC]},
}


@pytest.mark.parametrize(
    ("metadata", "encoding"),
    [
        ({}, Encoding(crc32c=False)),
        ({"codecs": [BYTES]}, Encoding(crc32c=False)),
        ({"codecs": [BYTES, CRC]}, Encoding()),
        ({"codecs": [BYTES, ZSTD]}, Encoding(compressed=True, crc32c=False)),
        ({"codecs": [BYTES, ZSTD, CRC]}, Encoding(compressed=True)),
        ({"codecs": [BYTES, CRC, ZSTD]}, None),
        ({"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}, CRC]}, None),
        (
            {"codecs": [{"name": "transpose", "configuration": {"order": [1, 0]}}, BYTES]},
            None,
        ),
        ({"codecs": [SHARDED]}, None),
        ({"chunk_key_encoding": {"name": "v2"}}, None),
        (
            {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}}},
            None,
        ),
        (
            {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}},
            Encoding(crc32c=False),
        ),
        ({"fill_value": "NaN"}, Encoding(crc32c=False)),
        ({"attributes": {"units": "m"}, "dimension_names": ["x", None]}, Encoding(crc32c=False)),
    ],
)
def test_zarr3_documents_of_tensorstore(
    metadata: dict[str, Any], encoding: Encoding | None, tmp_path: Path
) -> None:
    grid = {"name": "regular", "configuration": {"chunk_shape": [2, 4]}}
    full = {"shape": [3, 4], "data_type": "float32", "chunk_grid": grid, **metadata}
    array = open_zarr(tmp_path, "zarr3", metadata=full, create=True)
    info = parse((tmp_path / "zarr.json").read_bytes())
    assert info == StoredArray((3, 4), np.dtype("float32"), (2, 4), encoding)
    if encoding and not encoding.compressed:  # then the chunks are where and what we say
        value = np.arange(12, dtype=np.float32).reshape(3, 4) + 1
        array.write(value).result()
        data = (tmp_path / Encoding().chunk_key("", (0, 0)).decode()).read_bytes()
        assert data[: len(data) - encoding.trailer] == value[:2].tobytes()


def test_zarr3_documents_of_one_byte_dtypes_need_no_byte_order() -> None:
    spec = ArraySpec((3,), "int4", (3,))
    document = json.loads(zarr_json(spec))
    document["codecs"] = ["bytes"]  # the short form of a codec without a configuration
    assert parse(json.dumps(document).encode()).encoding
    document["data_type"] = "int16"
    assert not parse(json.dumps(document).encode()).encoding


def test_zarr3_documents_of_others_are_described_but_not_native() -> None:
    document = json.loads(zarr_json(ArraySpec((3,), "int8", (3,))))
    info = parse(
        json.dumps(document | {"storage_transformers": [{"name": "indirection"}]}).encode()
    )
    assert info == StoredArray((3,), np.dtype("int8"), (3,))
    for dtype in ({"name": "numpy.datetime64", "configuration": {"unit": "s"}}, "r24"):
        with pytest.raises(FormatError, match=r"dtype: found '(numpy.datetime64|r24)', expected"):
            parse(json.dumps(document | {"data_type": dtype}).encode())


def changed(**fields: Any) -> bytes:
    document = json.loads(zarr_json(ArraySpec((3, 4), "int32", (3, 4))))
    return json.dumps({**document, **fields}).encode()


def grid(*chunk_shape: Any) -> dict[str, Any]:
    return {"name": "regular", "configuration": {"chunk_shape": list(chunk_shape)}}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"zarr.json: not valid JSON"),
        (b"{", "not valid JSON .Expecting property name"),
        (b"\xff\xfe\xff", "not valid JSON"),
        (b"[]", r"zarr.json: expected a JSON object, found list"),
        (b"[" * 100_000, "not valid JSON .maximum recursion depth"),
        (b'{"a":' * 50_000, "not valid JSON .maximum recursion depth"),
        (b'{"shape": [' + b"9" * 5000 + b"]}", "not valid JSON .Exceeds the limit"),
        (changed(shape=[float("inf")]), r"shape: found \[inf\], expected a list of integers"),
        (b" " * ((256 << 10) + 1), "found 262145 bytes, expected at most 262144"),
        (b"{}", "zarr_format: found None, expected 3"),
        (changed(zarr_format=2), "zarr_format: found 2, expected 3"),
        (changed(node_type="group"), "node_type: found 'group', expected 'array'"),
        (changed(shape=None), "shape: found None, expected a list of integers"),
        (changed(shape=[3, True]), r"shape: found \[3, True\], expected a list of integers"),
        (changed(shape=[3, 4.0]), r"shape: found \[3, 4.0\], expected a list of integers"),
        (changed(shape={"0": 3}), r"shape: found \{'0': 3\}, expected a list of integers"),
        (changed(shape=[3]), "found rank 2 for an array of rank 1, expected the same rank"),
        (changed(shape=[3, -4]), r"shape: found \(3, -4\), expected 0 to"),
        (changed(shape=[2**40, 2**40]), r"shape: found \(.*\), expected 0 to 2"),
        (changed(shape=[0, 10**4000]), r"shape: found \(.*\), expected 0 to 2"),
        (changed(chunk_grid=grid(3, 0)), r"chunk shape: found \(3, 0\), expected 1 to"),
        (changed(chunk_grid=grid(3, 10**4000)), r"chunk shape: found \(.*\), expected 1 to"),
        (changed(chunk_grid=grid(3, "4")), r"chunk_shape: found \[3, '4'\], expected a list"),
        (changed(chunk_grid=None), "chunk_grid: found None, expected a name and a configuration"),
        (changed(chunk_grid={"name": "rectilinear"}), "chunk_grid: found 'rectilinear', expected"),
        (changed(chunk_grid={"name": 3}), r"chunk_grid: found \{'name': 3\}, expected a name"),
        (changed(data_type=7), "data_type: found 7, expected a name"),
        (changed(data_type={"name": "int8", "configuration": []}), "data_type: found .*, expected"),
        (changed(chunk_key_encoding=[]), r"chunk_key_encoding: found \[\], expected a name"),
        (changed(codecs="bytes"), "codecs: found 'bytes', expected a list"),
        (changed(codecs=[None]), "codecs: found None, expected a name"),
        (changed(codecs=[{"configuration": {}}]), "codecs: found .*, expected a name"),
    ],
    ids=range(32),
)
def test_hostile_zarr3_documents(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        parse(data)


def test_a_value_nested_almost_too_deeply_is_a_format_error() -> None:
    """json reads some values that repr, one call deeper, cannot print."""
    for depth in range(800, 1000):
        nested = b"[" * depth + b"]" * depth
        with pytest.raises(FormatError, match=r"zarr_format: found \[\[|not valid JSON \(max"):
            parse(b'{"zarr_format":' + nested + b"}")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "configuration", "endian", "x"]), inner)
    ),
    max_leaves=8,
)
FIELDS = sorted(json.loads(zarr_json(ArraySpec((), "int8", ()))))


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), json_values, min_size=1, max_size=3))
def test_fuzzed_documents_raise_format_errors_only(fields: dict[str, Any]) -> None:
    try:
        info = parse(changed(**fields))
    except FormatError as e:
        message = str(e)
    else:
        message = ""
        assert info.chunk_shape == (3, 4)
    assert not message or (": found " in message and ", expected " in message)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.integers(0, 3), st.binary(max_size=3))
def test_edited_documents_raise_format_errors_only(at: int, cut: int, new: bytes) -> None:
    data = changed()
    edited = data[:at] + new + data[at + cut :]
    try:
        info = parse(edited)
    except FormatError as e:
        message = str(e)
    else:
        message = ""
        assert isinstance(info, StoredArray)
    assert not message or "not valid JSON (" in message or "found " in message


def test_equal_documents_are_parsed_once() -> None:
    first = parse(changed(shape=[3, 5]))
    assert parse(changed(shape=[3, 5])) is first


# Chunks.


def test_chunks_of_common_shapes() -> None:
    def chunks(*shape: int, single: bool = False, limit: int = 64 * MIB) -> tuple[int, ...]:
        return choose_chunks(shape, 4, single_shard=single, limit=limit)

    assert chunks() == ()
    assert chunks(0, 5) == (1, 5)
    assert chunks(4096, 4096) == (4096, 4096)  # 64 MiB
    assert chunks(4096, 8192) == (2048, 8192)
    assert chunks(32_000, 4096) == (4000, 4096)
    assert chunks(8, 4096, 14336) == (1, 1024, 14336)
    assert chunks(3, 2, 2**25) == (1, 1, 2**24)
    # A prime number of rows: uneven if one shard is the whole array, else one large chunk.
    assert chunks(10_007, 4096, single=True) == (3336, 4096)
    assert chunks(10_007, 4096) == (10_007, 4096)
    assert chunks(2 * 10_007, 4096) == (10_007, 4096)  # above the limit, yet not the whole
    # Rows just above the limit; elements above the limit.
    assert chunks(5, 2**24 + 2) == (1, 2**23 + 1)
    assert choose_chunks((3, 2), 16, single_shard=False, limit=8) == (1, 1)


@settings(max_examples=300, deadline=None)
@given(
    shape=st.one_of(
        st.lists(st.integers(0, 6), max_size=4),
        st.lists(st.integers(1, 60), min_size=2, max_size=2),
        st.lists(st.integers(1, 2000), min_size=1, max_size=1),
    ).map(tuple),
    itemsize=st.sampled_from([1, 2, 4, 16]),
    limit=st.sampled_from([1, 7, 64, 100, 1000, 10**6]),
    single=st.booleans(),
)
def test_every_chunk_is_contiguous(
    shape: tuple[int, ...], itemsize: int, limit: int, single: bool
) -> None:
    chunk = choose_chunks(shape, itemsize, single_shard=single, limit=limit)
    assert len(chunk) == len(shape)
    assert all(1 <= c <= max(n, 1) for c, n in zip(chunk, shape, strict=True))
    nbytes = math.prod(chunk) * itemsize
    divides = all(n % c == 0 for c, n in zip(chunk, shape, strict=True))
    if single:
        assert nbytes <= max(limit, itemsize)
    else:
        assert divides
    if math.prod(max(n, 1) for n in shape) * itemsize <= limit:
        assert chunk == tuple(max(n, 1) for n in shape)
    elif shape:
        assert nbytes * 8 >= limit  # not tiny
    position = np.arange(math.prod(shape)).reshape(shape)
    spec = ArraySpec(shape, "int8", chunk)
    for index in itertools.product(*map(range, chunk_grid(spec))):
        at = tuple(slice(i * c, i * c + c) for i, c in zip(index, chunk, strict=True))
        inside = position[at].ravel()
        assert np.array_equal(inside, np.arange(inside[0], inside[0] + inside.size))


def test_dtypes_and_templates_agree() -> None:
    """Each dtype of the table has its own fixed bytes, whatever was asked before."""
    documents = {name: zarr_json(ArraySpec((1,), name, (1,))) for name in NUMPY + EXTENSIONS}
    assert len(set(documents.values())) == len(NUMPY + EXTENSIONS)
    assert all(parse(data).dtype == numpy_dtype(name) for name, data in documents.items())
