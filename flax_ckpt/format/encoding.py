"""Encodings of arrays: which keys an array has, and what the values are.

    encoding = Encoding(zarr3=True, compressed=True)
    encoding.chunk_key("w", (0, 1)) == b"w/c/0/1"
    value, padding = encoding.encode(chunk, padding)   # + CRC-32C of both, if there is a trailer
    encoding.decode(value, nbytes, "w") == chunk

Source: the specifications of zarr 2 and 3. A chunk of zarr 3 is the codecs `bytes`, perhaps `zstd`,
and `crc32c`, whose 4 bytes follow it; one of zarr 2 has no checksum.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import crc32c
import numpy as np
import zstandard
from numpy.typing import NDArray

from flax_ckpt.errors import DamagedCheckpointError, FormatError
from flax_ckpt.format import arrays, jsons

_LEVEL: Final = 1  # of zstd; higher ones are slower and gain little on weights
_TRAILER: Final = 4
_CODEC_ZSTD: Final = {"configuration": {"checksum": False, "level": _LEVEL}, "name": "zstd"}
_ZARR2: Final[dict[str, Any]] = {"dimension_separator": ".", "filters": None, "order": "C"}

Bytes = NDArray[np.uint8]


class Encoding(NamedTuple):
    """How arrays are encoded.

    Attributes:
        zarr3: as zarr version 3, else 2.
        compressed: whether chunks are compressed with zstd.
    """

    zarr3: bool = True
    compressed: bool = False

    @property
    def trailer(self) -> int:
        """How many bytes of CRC-32C follow each chunk."""
        return _TRAILER if self.zarr3 else 0

    def metadata_key(self, name: str) -> bytes:
        """The key of the description of an array."""
        return arrays.zarr_key(name) if self.zarr3 else f"{arrays.prefix(name)}.zarray".encode()

    def chunk_key(self, name: str, index: tuple[int, ...]) -> bytes:
        """The key of one chunk; `index` has one number per axis."""
        if self.zarr3:
            return arrays.chunk_key(name, index)
        return f"{arrays.prefix(name)}{'.'.join(map(str, index or (0,)))}".encode()

    def metadata(self, spec: arrays.ArraySpec) -> bytes:
        """The description of an array."""
        if not self.zarr3:
            return _zarr2_json(spec, compressed=self.compressed)
        if not self.compressed:
            return spec.to_zarr3_json()
        document = jsons.parse_object(spec.to_zarr3_json(), "zarr.json")
        document["codecs"].insert(1, _CODEC_ZSTD)
        return jsons.dump(document)

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

    def decode(self, value: bytes, nbytes: int, what: str) -> Bytes:
        """The chunk, its CRC-32C checked if it has one.

        Args:
            value: as stored, the CRC-32C included.
            nbytes: size of the chunk.
            what: names it in errors.

        Raises:
            DamagedCheckpointError: not the bytes that were written.
        """
        body = memoryview(value)[: len(value) - self.trailer]
        if self.trailer and crc32c.crc32c(body).to_bytes(4, "little") != value[-self.trailer :]:
            raise DamagedCheckpointError(f"{what}: damaged: not the CRC-32C that it was saved with")
        if self.compressed:
            try:  # a frame that says it is larger is not decoded
                size = zstandard.frame_content_size(body)
                if size == nbytes:
                    body = zstandard.ZstdDecompressor().decompress(body, allow_extra_data=False)
            except zstandard.ZstdError as error:
                raise DamagedCheckpointError(f"{what}: damaged zstd frame: {error}") from error
        if len(body) != nbytes:
            raise DamagedCheckpointError(f"{what}: has {len(body)} bytes, expected {nbytes}")
        return np.frombuffer(body, np.uint8)


DEFAULT: Final = Encoding()


class Described(NamedTuple):
    """What the description of a stored array says."""

    spec: arrays.ArraySpec
    encoding: Encoding


def parse(data: bytes, *, zarr3: bool, what: str) -> Described:
    """The opposite of `Encoding.metadata`.

    Raises:
        FormatError: no array, or one of codecs that we do not write.
    """
    found = _parse_zarr3(data, what) if zarr3 else _parse_zarr2(data, what)
    if found is None:
        raise FormatError(f"{what}: describes an array of codecs that are not those we write")
    return found


def _parse_zarr3(data: bytes, what: str) -> Described | None:
    document = jsons.parse_object(data, what)
    codecs: Any = document.get("codecs")
    second: Any = codecs[1] if jsons.is_list(codecs) and len(codecs) == 3 else None
    compressed = jsons.is_object(second) and second.get("name") == "zstd"
    if compressed:  # without it, all the rest must be as usual
        document = {**document, "codecs": [codecs[0], codecs[2]]}
    info = arrays.parse_zarr3(jsons.dump(document))
    if not info.native or not info.crc32c:
        return None
    spec = arrays.ArraySpec(info.shape, info.dtype, info.chunk_shape)
    return Described(spec, Encoding(True, compressed))


def _zarr2_json(spec: arrays.ArraySpec, *, compressed: bool) -> bytes:
    dtype = arrays.numpy_dtype(spec.dtype)
    return jsons.dump(
        {
            **_ZARR2,
            "chunks": spec.chunk_shape,
            "compressor": {"id": "zstd", "level": _LEVEL} if compressed else None,
            "dtype": dtype.str if dtype.isbuiltin == 1 else spec.dtype,
            "fill_value": None,
            "shape": spec.shape,
            "zarr_format": 2,
        }
    )


def _parse_zarr2(data: bytes, what: str) -> Described | None:
    document = jsons.parse_object(data, what)
    name, compressor = document.get("dtype"), document.get("compressor")
    compressed = jsons.is_object(compressor) and compressor.get("id") == "zstd"
    usual = all(document.get(key, value) == value for key, value in _ZARR2.items())
    if not usual or not isinstance(name, str) or not (compressed or compressor is None):
        return None
    try:
        dtype = np.dtype(name).name if name[:1] in "<|" else name
        spec = arrays.ArraySpec(tuple(document["shape"]), dtype, tuple(document["chunks"]))
    except (KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{what}: {error!r} in the description of an array") from error
    return Described(spec, Encoding(False, compressed))
