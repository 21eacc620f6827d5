"""Array metadata and encodings: what is stored of an array, under which keys, in which bytes.

Source: the specifications of zarr 2 and 3, and the dtype names that TensorStore adds. A chunk of
zarr 3 is the codecs `bytes` (little endian), perhaps `zstd`, and `crc32c`; one of zarr 2 has no
checksum. Arrays stored in any other way are described with `encoding=None`.

    spec = ArraySpec((4, 6), "float32", (2, 6))
    encoding = Encoding(compressed=True)
    encoding.chunk_key("w", (0, 1)) == b"w/c/0/1"
    parse(encoding.metadata(spec)).encoding == encoding
"""

import math
import re
import reprlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, NamedTuple

import ml_dtypes
import numpy as np
import zstandard
from numpy.typing import NDArray

from flax_ckpt.errors import DamagedCheckpointError, FormatError
from flax_ckpt.format import jsons

Bytes = NDArray[np.uint8]
Shape = tuple[int, ...]

DEFAULT_CHUNK_BYTES: Final = 64 << 20
_MAX_RANK: Final = 32  # of NumPy 1 and of TensorStore
_MAX_ELEMENTS: Final = 1 << 59
_MAX_JSON: Final = 256 << 10  # parsed documents are cached
_MAX_EXCESS: Final = 1 << 20  # bytes of a chunk that may be larger than its array

_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
        *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz"),
        *("float8_e5m2fnuz", "float8_e3m4", "float8_e8m0fnu", "float4_e2m1fn", "int2", "int4"),
    )
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_CODECS: Final[list[tuple[str, dict[str, Any]]]] = [("bytes", {"endian": "little"}), ("crc32c", {})]
_LEVEL: Final = 1  # of zstd; higher ones are slower and gain little on weights
_ZARR2_DTYPE: Final = re.compile("[<|][a-z][0-9]{1,2}")
_ZARR2: Final[dict[str, Any]] = {"dimension_separator": ".", "filters": None, "order": "C"}


def _error(name: str, found: object, expected: str) -> FormatError:
    # reprlib: a value may be nested too deeply for repr.
    return FormatError(f"{name}: found {reprlib.repr(found)}, expected {expected}")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a zarr v3 `data_type`; int2 and int4 take one byte.

    Raises:
        FormatError: no dtype that TensorStore stores.
    """
    if (dtype := _DTYPES.get(name)) is None:
        raise _error("dtype", name, f"one of {', '.join(_DTYPES)}")
    return dtype


def zarr_dtype(dtype: np.dtype[Any]) -> str:
    """The zarr v3 `data_type` of a NumPy dtype in any byte order; bytes are stored little-endian.

    Raises:
        FormatError: a dtype that TensorStore does not store: uint2, uint4, float8_e4m3, float128,
            object, text, bytes, records, dates.
    """
    if not is_storable(dtype):
        raise FormatError(f"dtype: found {dtype}, expected one of {', '.join(_DTYPES)}")
    return _NAMES[dtype.newbyteorder("=")]


def is_storable(dtype: Any) -> bool:
    """Whether `zarr_dtype` has a name for the dtype."""
    return isinstance(dtype, np.dtype) and (dtype in _NAMES or dtype.newbyteorder("=") in _NAMES)


def prefix(name: str) -> str:
    """What the keys of an array begin with; TensorStore adds a `/` unless there is one."""
    return "" if name in ("", "/") else name if name.endswith("/") else f"{name}/"


@lru_cache(maxsize=4096)
def origin(rank: int) -> tuple[int, ...]:
    """The index of an array's first element, and of its first chunk."""
    return (0,) * rank


@lru_cache(maxsize=4096)
def _grid_key(index: tuple[int, ...], zarr3: bool) -> str:
    return "/".join(("c", *map(str, index))) if zarr3 else ".".join(map(str, index or (0,)))


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
        numpy_dtype(self.dtype)
        _check_shapes(self.shape, self.chunk_shape)

    @property
    def chunk_nbytes(self) -> int:
        """Size of the payload of each chunk in bytes, without the CRC-32C that follows it."""
        return math.prod(self.chunk_shape) * _DTYPES[self.dtype].itemsize


class Encoding(NamedTuple):
    """How arrays are encoded.

    Attributes:
        zarr3: as zarr version 3, else 2.
        compressed: whether chunks are compressed with zstd.
        crc32c: whether chunks of zarr 3 end in a CRC-32C; all that we write do.
    """

    zarr3: bool = True
    compressed: bool = False
    crc32c: bool = True

    @property
    def trailer(self) -> int:
        """How many bytes of CRC-32C follow each chunk."""
        return 4 if self.zarr3 and self.crc32c else 0

    def metadata_key(self, name: str) -> bytes:
        """The key of the description of an array; "" is a tree that is one bare array."""
        return f"{prefix(name)}{'zarr.json' if self.zarr3 else '.zarray'}".encode()

    def chunk_key(self, name: str, index: tuple[int, ...]) -> bytes:
        """The key of one chunk; `index` has one number per axis."""
        return (prefix(name) + _grid_key(index, self.zarr3)).encode()

    def metadata(self, spec: ArraySpec) -> bytes:
        """The description of an array."""
        return (_zarr3_json if self.zarr3 else _zarr2_json)(spec, self.compressed)

    def sizes(self, nbytes: int) -> tuple[int, int]:
        """The least and the most bytes that a chunk of `nbytes` bytes is stored in."""
        if not self.compressed:
            return nbytes + self.trailer, nbytes + self.trailer
        return nbytes >> 15, nbytes + (nbytes >> 7) + 1024  # zstd makes 128 KiB of 4 bytes at most

    def encode(self, data: Bytes, padding: int) -> tuple[Bytes, int]:
        """What is stored of a chunk that is `data` and as many zero bytes as `padding`.

        Returns:
            Bytes, and how many zero bytes follow them. Without compression these are the
            arguments; the CRC-32C is not among them.
        """
        if not self.compressed:
            return data, padding
        whole = np.concatenate([data, np.zeros(padding, np.uint8)]) if padding else data
        frame = zstandard.ZstdCompressor(level=_LEVEL).compress(whole.data)
        return np.frombuffer(frame, np.uint8), 0

    def decode(self, stored: Bytes, nbytes: int, what: str) -> Bytes:
        """The chunk of `nbytes` bytes that is stored as this, without its CRC-32C.

        Raises:
            DamagedCheckpointError: not such a chunk; `what` names it.
        """
        body: bytes | memoryview = stored.data
        if self.compressed:
            try:  # a frame that says it is larger is not decoded
                if zstandard.frame_content_size(body) == nbytes:
                    body = zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
            except zstandard.ZstdError as error:
                raise DamagedCheckpointError(f"{what}: damaged zstd frame: {error}") from error
        if len(body) != nbytes:
            raise DamagedCheckpointError(f"{what}: has {len(body)} bytes, expected {nbytes}")
        return np.frombuffer(body, np.uint8)


@lru_cache(maxsize=4096)
def _zarr3_json(spec: ArraySpec, compressed: bool) -> bytes:
    dtype = _DTYPES[spec.dtype]
    little = {"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {}
    zstd = {"configuration": {"checksum": False, "level": _LEVEL}, "name": "zstd"}
    fill = {"b": False, "c": [0.0, 0.0]}.get(dtype.kind, 0 if "int" in spec.dtype else 0.0)
    document = {
        "chunk_grid": {"configuration": {"chunk_shape": spec.chunk_shape}, "name": "regular"},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{**little, "name": "bytes"}, *[zstd] * compressed, {"name": "crc32c"}],
        "data_type": spec.dtype,
        "fill_value": fill,
        "node_type": "array",
        "shape": spec.shape,
        "zarr_format": 3,
    }
    return jsons.dump(document)


def _zarr2_json(spec: ArraySpec, compressed: bool) -> bytes:
    dtype = _DTYPES[spec.dtype]
    document = {
        **_ZARR2,
        "chunks": spec.chunk_shape,
        "compressor": {"id": "zstd", "level": _LEVEL} if compressed else None,
        "dtype": dtype.str if dtype.isbuiltin == 1 else spec.dtype,
        "fill_value": None,
        "shape": spec.shape,
        "zarr_format": 2,
    }
    return jsons.dump(document)


class StoredArray(NamedTuple):
    """What is known of a stored array before it is read.

    Attributes:
        shape: extents.
        dtype: of its elements.
        chunk_shape: extents of a chunk; of a shard, if the array is sharded.
        encoding: how its chunks are stored; None if in another way than those of `Encoding`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_shape: tuple[int, ...] = ()
    encoding: Encoding | None = None


@lru_cache(maxsize=256)
def parse(data: bytes, *, zarr3: bool = True) -> StoredArray:
    """The opposite of `Encoding.metadata`.

    Raises:
        FormatError: it describes no array, or one of a dtype that `numpy_dtype` refuses.
    """
    what = "zarr.json" if zarr3 else ".zarray"
    if len(data) > _MAX_JSON:
        raise FormatError(f"{what}: found {len(data)} bytes, expected at most {_MAX_JSON}")
    document = jsons.parse_object(data, what)
    return _parse_zarr3(document) if zarr3 else _parse_zarr2(document)


def _parse_zarr3(document: dict[str, Any]) -> StoredArray:
    for field, value in (("zarr_format", 3), ("node_type", "array")):
        if document.get(field) != value:
            raise _error(field, document.get(field), repr(value))
    grid, grid_config = _named(document.get("chunk_grid"), "chunk_grid")
    if grid != "regular":
        raise _error("chunk_grid", grid, "'regular'")
    shape = _ints(document.get("shape"), "shape")
    dtype, dtype_config = _named(document.get("data_type"), "data_type")
    chunk_shape = _ints(grid_config.get("chunk_shape"), "chunk_shape")
    keys, keys_config = _named(document.get("chunk_key_encoding"), "chunk_key_encoding")
    if not jsons.is_list(listed := document.get("codecs")):
        raise _error("codecs", listed, "a list")
    codecs = [_named(codec, "codecs") for codec in listed]
    if codecs[:1] == [("bytes", {})] and numpy_dtype(dtype).itemsize == 1:
        codecs[0] = _CODECS[0]  # one byte has no order
    compressed = len(codecs) > 1 and codecs[1][0] == "zstd"
    if compressed:
        del codecs[1]
    place = (keys, keys_config.get("separator", "/"))
    odd = dtype_config or document.get("storage_transformers") or place != ("default", "/")
    usual = not odd and codecs in (_CODECS[:1], _CODECS)
    encoding = Encoding(True, compressed, codecs == _CODECS) if usual else None
    return _stored(shape, dtype, chunk_shape, encoding)


def _parse_zarr2(document: dict[str, Any]) -> StoredArray:
    shape, chunk_shape = (_ints(document.get(key), key) for key in ("shape", "chunks"))
    name, compressor = document.get("dtype"), document.get("compressor")
    try:
        dtype = np.dtype(name).name if _ZARR2_DTYPE.fullmatch(str(name)) else str(name)
    except (TypeError, ValueError) as error:
        raise _error("dtype", name, "the name of one") from error
    compressed = jsons.is_object(compressor) and compressor.get("id") == "zstd"
    usual = all(document.get(key, value) == value for key, value in _ZARR2.items())
    usual = usual and (compressed or compressor is None)
    return _stored(shape, dtype, chunk_shape, Encoding(False, compressed) if usual else None)


def _named(value: Any, what: str) -> tuple[str, dict[str, Any]]:
    """Name and configuration of a zarr v3 extension point."""
    fields = {"name": value} if isinstance(value, str) else value
    if jsons.is_object(fields):
        name, config = fields.get("name"), fields.get("configuration", {})
        if isinstance(name, str) and jsons.is_object(config):
            return name, config
    raise _error(what, value, "a name and a configuration")


def _ints(value: Any, what: str) -> tuple[int, ...]:
    if not jsons.is_list(value) or any(type(item) is not int for item in value):  # a bool is none
        raise _error(what, value, "a list of integers")
    return tuple(value)


def _stored(shape: Shape, dtype: str, chunk: Shape, encoding: Encoding | None) -> StoredArray:
    """Checks the shapes, and that no chunk takes much more memory than the whole array."""
    _check_shapes(shape, chunk)
    found = StoredArray(shape, numpy_dtype(dtype), chunk, encoding)
    most = max(math.prod(shape) * found.dtype.itemsize, _MAX_EXCESS)
    if math.prod(shape) and math.prod(chunk) * found.dtype.itemsize > most:
        raise _error("chunk shape", chunk, f"no chunk larger than the array, of {shape}")
    return found


def _check_shapes(shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> None:
    """Checks ranks, signs, and that no size in bytes exceeds 63 bits."""
    if len(shape) != len(chunk_shape) or len(shape) > _MAX_RANK:
        ranks = f"found rank {len(chunk_shape)} for an array of rank {len(shape)}"
        raise FormatError(f"chunk shape: {ranks}, expected the same rank, at most {_MAX_RANK}")
    for what, extents, least in (("shape", shape, 0), ("chunk shape", chunk_shape, 1)):
        if min(extents, default=1) < least or max(*extents, math.prod(extents), 0) >= _MAX_ELEMENTS:
            raise _error(what, extents, f"{least} to 2**59 elements")


def choose_chunks(shard_shape: Shape, itemsize: int, *, single_shard: bool, limit: int) -> Shape:
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
        larger = min((d for d in divisors if d > most), default=extent)
        fit = -(-extent // -(-extent // most)) if single_shard else larger
    return (1,) * axis + (fit,) + shape[axis + 1 :]


def cut_chunks(shard_shape: Shape, itemsize: int, *, axes: tuple[int, ...], limit: int) -> Shape:
    """A chunk shape where the user says how to cut; it divides the shard.

    cut_chunks((8, 6), 4, axes=(1,), limit=64) == (8, 2)

    Args:
        shard_shape: what one process writes of the array.
        itemsize: bytes per element.
        axes: axes that are cut first, each at least once if it can be.
        limit: greatest size of a chunk in bytes; only chunks of one element may be larger.

    Raises:
        ValueError: an axis is negative.
    """
    if min(axes, default=0) < 0:
        raise ValueError(f"storage_options.shard_axes must be 0 or more, got {axes}")
    chunk = [max(extent, 1) for extent in shard_shape]
    axes = tuple(axis for axis in axes if axis < len(chunk))
    for axis in axes:
        chunk[axis] //= _divisors(chunk[axis])[:2][-1]
    while chunk and math.prod(chunk) * itemsize > limit and max(chunk) > 1:
        above_1 = [axis for axis, extent in enumerate(chunk) if extent > 1]
        # Without a wish the first axis: what is left then lies together in the shard.
        axis = max([axis for axis in axes if axis in above_1] or above_1[:1], key=chunk.__getitem__)
        chunk[axis] //= _divisors(chunk[axis])[:2][-1]
    return tuple(chunk)


@lru_cache(maxsize=256)
def _divisors(n: int) -> tuple[int, ...]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return tuple(sorted({*small, *(n // d for d in small)}))
