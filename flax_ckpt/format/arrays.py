"""Array metadata: the zarr v3 documents that we write, zarr v3 and v2 documents that we read.

Source: the zarr v3 and v2 specifications, and the dtype names that TensorStore adds to them. We
write codecs `bytes` (little endian) and `crc32c`; arrays stored in any other way are described
here with `native=False` and read through TensorStore.

    spec = ArraySpec((4, 6), "float32", (2, 6))
    spec.chunk_grid, spec.chunk_nbytes == (2, 1), 48
    parse_zarr3(spec.to_zarr3_json()).native
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NoReturn, cast

import ml_dtypes
import numpy as np

from flax_ckpt.errors import FormatError

CHUNK_CRC_BYTES: Final = 4
DEFAULT_CHUNK_BYTES: Final = 64 << 20
_MAX_RANK: Final = 32  # of NumPy 1 and of TensorStore
_MAX_NBYTES: Final = 2**63 - 1
_MAX_JSON: Final = 1 << 20
_CACHED_JSON: Final = 4096

_NUMPY_NAMES: Final = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
_EXTENSION_NAMES: Final = (
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz"),
    *("float8_e5m2fnuz", "float8_e3m4", "float8_e8m0fnu", "float4_e2m1fn", "int2", "int4"),
)
_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {
    **{name: np.dtype(name).newbyteorder("<") for name in _NUMPY_NAMES},
    **{name: np.dtype(getattr(ml_dtypes, name)) for name in _EXTENSION_NAMES},
}
_NAMES: Final[Mapping[np.dtype[Any], str]] = {dtype: name for name, dtype in _DTYPES.items()}
# Of zarr v2, without byte order: "f4". It uses the extension names as they are.
_ZARR2_NAMES: Final = {_DTYPES[name].str[1:]: name for name in _NUMPY_NAMES}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The little-endian NumPy dtype of a zarr v3 `data_type`; int2 and int4 take one byte.

    Raises:
        FormatError: no dtype that TensorStore stores.
    """
    if (dtype := _DTYPES.get(name)) is None:
        raise FormatError(
            f"dtype: found {reprlib.repr(name)}, expected one of {', '.join(_DTYPES)}"
        )
    return dtype


def zarr_dtype(dtype: np.dtype[Any]) -> str:
    """The zarr v3 `data_type` of a NumPy dtype in any byte order; bytes are stored little-endian.

    Raises:
        FormatError: a dtype that TensorStore does not store: uint2, uint4, float8_e4m3, float128,
            object, text, bytes, records, dates.
    """
    name = _NAMES.get(dtype)
    if name is None and dtype.byteorder == ">":
        name = _NAMES.get(dtype.newbyteorder("<"))
    if name is None:
        raise FormatError(f"dtype: found {dtype}, expected one of {', '.join(_DTYPES)}")
    return name


def is_storable(dtype: Any) -> bool:
    """Whether `zarr_dtype` has a name for the dtype."""
    return dtype in _NAMES or (
        isinstance(dtype, np.dtype) and dtype.byteorder == ">" and dtype.newbyteorder("<") in _NAMES
    )


def zarr_key(name: str) -> bytes:
    """The key of the metadata of the array `name`; "" is a tree that is one bare array."""
    return f"{name}/zarr.json".encode() if name else b"zarr.json"


def chunk_key(name: str, index: tuple[int, ...]) -> bytes:
    """The key of one chunk of the array `name`; `index` has one number per axis."""
    return "/".join((name, "c", *map(str, index)) if name else ("c", *map(str, index))).encode()


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """An array as we store it.

    Attributes:
        shape: extents, 0 allowed.
        dtype: zarr v3 name, see `numpy_dtype`.
        chunk_shape: extents of a chunk, 1 or more; the last chunk of an axis may reach beyond
            `shape` and is stored in full.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            numpy_dtype(self.dtype)
        _check_shapes(self.shape, self.chunk_shape)

    @property
    def chunk_grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis; 0 where the extent is 0."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.chunk_shape, strict=True))

    @property
    def chunk_nbytes(self) -> int:
        """Size of the payload of each chunk in bytes, without the CRC-32C that follows it."""
        return math.prod(self.chunk_shape) * _DTYPES[self.dtype].itemsize

    def to_zarr3_json(self) -> bytes:
        """The contents of `zarr.json`."""
        return _zarr3_json(self.shape, self.dtype, self.chunk_shape)


@lru_cache(maxsize=4096)
def _zarr3_json(shape: tuple[int, ...], dtype: str, chunk_shape: tuple[int, ...]) -> bytes:
    before, between, after = _zarr3_template(dtype)
    chunks, extents = ",".join(map(str, chunk_shape)), ",".join(map(str, shape))
    return f"{before}{chunks}{between}{extents}{after}".encode()


@lru_cache(maxsize=len(_DTYPES))
def _zarr3_template(dtype: str) -> tuple[str, str, str]:
    """What stands before the chunk shape, between it and the shape, and after that."""
    wide = _DTYPES[dtype].itemsize > 1
    endian: dict[str, Any] = {"configuration": {"endian": "little"}} if wide else {}
    document = {
        "chunk_grid": {"configuration": {"chunk_shape": "@"}, "name": "regular"},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{**endian, "name": "bytes"}, {"name": "crc32c"}],
        "data_type": dtype,
        "fill_value": _fill_value(dtype),
        "node_type": "array",
        "shape": "@",
        "zarr_format": 3,
    }
    before, between, after = json.dumps(document, separators=(",", ":")).split('"@"')
    return f"{before}[", f"]{between}[", f"]{after}"


def _fill_value(dtype: str) -> object:
    if dtype == "bool":
        return False
    if dtype.startswith("complex"):
        return [0.0, 0.0]
    return 0 if "int" in dtype else 0.0


@dataclass(frozen=True, slots=True)
class ZarrInfo:
    """What the metadata of a stored array says.

    Attributes:
        shape: extents.
        dtype: zarr v3 name, also of a zarr v2 array; may be one that `numpy_dtype` refuses.
        chunk_shape: extents of a chunk; of a shard, if the array is sharded.
        native: whether a chunk is the plain little-endian C-order buffer [and its CRC-32C] under
            the key that `chunk_key` gives.
        crc32c: whether a CRC-32C of 4 bytes follows each chunk; False unless `native`.
    """

    shape: tuple[int, ...]
    dtype: str
    chunk_shape: tuple[int, ...]
    native: bool
    crc32c: bool


def parse_zarr3(data: bytes) -> ZarrInfo:
    """Reads a zarr v3 `zarr.json`. Raises `FormatError` if it is none, or no array's."""
    return _cached_zarr3(data) if len(data) <= _CACHED_JSON else _parse_zarr3(data)


def parse_zarr2(data: bytes) -> ZarrInfo:
    """Reads a zarr v2 `.zarray`; `native` is False. Raises `FormatError` if it is none."""
    return _cached_zarr2(data) if len(data) <= _CACHED_JSON else _parse_zarr2(data)


def _parse_zarr3(data: bytes) -> ZarrInfo:
    document = _load(data, "zarr.json")
    _expect("zarr_format", document.get("zarr_format"), 3)
    _expect("node_type", document.get("node_type"), "array")
    shape = _ints(document.get("shape"), "shape")
    grid, grid_config = _named(document.get("chunk_grid"), "chunk_grid")
    _expect("chunk_grid", grid, "regular")
    chunk_shape = _ints(grid_config.get("chunk_shape"), "chunk_shape")
    _check_shapes(shape, chunk_shape)
    dtype, dtype_config = _named(document.get("data_type"), "data_type")
    keys, keys_config = _named(document.get("chunk_key_encoding"), "chunk_key_encoding")
    if (codecs := _list(document.get("codecs"))) is None:
        raise _error("codecs", document.get("codecs"), "a list")
    plain = (
        dtype in _DTYPES
        and not dtype_config
        and (keys, keys_config.get("separator", "/")) == ("default", "/")
        and not document.get("storage_transformers")
    )
    names = [_named(codec, "codecs") for codec in codecs]
    native = plain and _is_native(names, dtype)
    return ZarrInfo(shape, dtype, chunk_shape, native, native and len(names) == 2)


def _is_native(codecs: list[tuple[str, dict[str, object]]], dtype: str) -> bool:
    if [name for name, _ in codecs] not in (["bytes"], ["bytes", "crc32c"]):
        return False
    endian = codecs[0][1].get("endian")
    return endian == "little" or (endian is None and _DTYPES[dtype].itemsize == 1)


def _parse_zarr2(data: bytes) -> ZarrInfo:
    document = _load(data, ".zarray")
    _expect("zarr_format", document.get("zarr_format"), 2)
    shape = _ints(document.get("shape"), "shape")
    chunk_shape = _ints(document.get("chunks"), "chunks")
    _check_shapes(shape, chunk_shape)
    name = document.get("dtype")
    if not isinstance(name, str):
        raise _error("dtype", name, "a string")
    if name[:1] in ("<", ">", "|"):
        name = _ZARR2_NAMES.get(name[1:], name)
    return ZarrInfo(shape, name, chunk_shape, native=False, crc32c=False)


# Documents above `_CACHED_JSON` bytes are not kept: the caches must stay small.
_cached_zarr3 = lru_cache(maxsize=1024)(_parse_zarr3)
_cached_zarr2 = lru_cache(maxsize=1024)(_parse_zarr2)


def _load(data: bytes, what: str) -> dict[str, object]:
    """A JSON object, whatever the bytes are."""
    if len(data) > _MAX_JSON:
        raise FormatError(f"{what}: found {len(data)} bytes, expected at most {_MAX_JSON}")
    try:
        document: object = json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{what}: found {data[:40]!r}, expected a JSON object: {e}") from e
    if (fields := _dict(document)) is None:
        raise _error(what, document, "a JSON object")
    return fields


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def _error(name: str, found: object, expected: str) -> FormatError:
    # reprlib: a value may be nested too deeply for repr.
    return FormatError(f"{name}: found {reprlib.repr(found)}, expected {expected}")


def _expect(name: str, found: object, expected: object) -> None:
    if type(found) is not type(expected) or found != expected:
        raise _error(name, found, repr(expected))


def _named(value: object, what: str) -> tuple[str, dict[str, object]]:
    """Name and configuration of a zarr v3 extension point."""
    if isinstance(value, str):
        return value, {}
    fields = _dict(value)
    name, config = (fields or {}).get("name"), _dict((fields or {}).get("configuration", {}))
    if not isinstance(name, str) or config is None:
        raise _error(what, value, "a name and a configuration")
    return name, config


def _dict(value: object) -> dict[str, object] | None:
    return cast("dict[str, object]", value) if isinstance(value, dict) else None


def _list(value: object) -> list[object] | None:
    return cast("list[object]", value) if isinstance(value, list) else None


def _ints(value: object, what: str) -> tuple[int, ...]:
    items = _list(value)
    out = tuple(item for item in items or () if type(item) is int)  # a bool is none
    if items is None or len(out) != len(items):
        raise _error(what, value, "a list of integers")
    return out


def _check_shapes(shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> None:
    """Checks ranks, signs, and that no size in bytes exceeds 63 bits."""
    if len(shape) != len(chunk_shape) or len(shape) > _MAX_RANK:
        raise FormatError(
            f"chunk shape: found rank {len(chunk_shape)} for an array of rank {len(shape)}, "
            f"expected the same rank, at most {_MAX_RANK}"
        )
    if shape and (min(shape) < 0 or 16 * math.prod(shape) > _MAX_NBYTES or max(shape) > 1 << 62):
        raise _error("shape", shape, "0 to 2**59 elements")
    if shape and (min(chunk_shape) < 1 or 16 * math.prod(chunk_shape) > _MAX_NBYTES):
        raise FormatError(
            f"chunk shape: found {reprlib.repr(chunk_shape)}, expected 1 to 2**59 elements"
        )


def choose_chunks(
    shard_shape: tuple[int, ...],
    itemsize: int,
    *,
    single_shard: bool,
    limit: int = DEFAULT_CHUNK_BYTES,
) -> tuple[int, ...]:
    """A chunk shape such that each chunk is contiguous in a C-order shard.

    Leading axes become 1 until what is left of one row fits `limit`; that axis is split.

    Args:
        shard_shape: what one process writes of the array.
        itemsize: bytes per element.
        single_shard: the shard is the whole array, so that chunks need not divide it; the last
            one is then stored padded.
        limit: wanted chunk size in bytes. Exceeded by a chunk of a sharded array if the only
            divisors that keep to it would make chunks below an eighth of it.
    """
    shape = tuple(max(n, 1) for n in shard_shape)
    if not shape or math.prod(shape) * itemsize <= limit:
        return shape
    axis, row = 0, math.prod(shape[1:]) * itemsize
    while row > limit and axis + 1 < len(shape):
        axis += 1
        row //= shape[axis]
    extent, most = shape[axis], max(limit // row, 1)
    divisors = _divisors(extent)
    fit = max(d for d in divisors if d <= most)
    if fit * row * 8 < limit:
        if single_shard:
            fit = -(-extent // -(-extent // most))
        else:
            fit = min((d for d in divisors if d > most), default=extent)
    return (1,) * axis + (fit,) + shape[axis + 1 :]


@lru_cache(maxsize=256)
def _divisors(n: int) -> tuple[int, ...]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))
