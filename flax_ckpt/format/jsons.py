"""JSON as the format uses it: parsing that answers garbage with one typed error."""

import json
import re
from typing import Any, Final, TypeGuard, TypeVar

import msgspec

from flax_ckpt.errors import FormatError

T = TypeVar("T")

_MAX_VALUES: Final = 1 << 20
_MAX_BYTES: Final = 32 << 20
# One that does not end goes to the end of the text, so that none is looked at twice.
_STRING: Final = re.compile(rb'(?s)"(?:[^"\\]++|\\.)*+"?')
_PART: Final = re.compile(rb'(?s)(?:[^"]++|"(?:[^"\\]++|\\.)*+"?){1,9999}+')  # of the text


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`.

    Args:
        data: UTF-8 text.
        what: the file, for error messages.

    Raises:
        FormatError: it is no JSON, or no object, or so much that it would fill the memory.
    """
    limited(data, what)
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: not valid JSON ({error or 'nested too deeply'})") from error
    if not is_object(value):
        raise FormatError(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value


def limited(data: bytes, what: str) -> bytes:
    """The same text, checked for how much memory it can take when it is parsed.

    Whatever is read with this check is written with it too: else it would be lost.

    Raises:
        FormatError: more than about 160 MB.
    """
    values = _count(data)
    if values > _MAX_VALUES and len(data) <= _MAX_BYTES:
        values = sum(_count(_STRING.sub(b"", part[0])) for part in _PART.finditer(data))
    if len(data) > _MAX_BYTES or values > _MAX_VALUES:
        limits = f"at most {_MAX_VALUES} values in {_MAX_BYTES} bytes"
        raise FormatError(f"{what}: found {values} values in {len(data)} bytes, expected {limits}")
    return data


def _count(data: bytes) -> int:
    return sum(map(data.count, (b",", b"[", b"{", b":")))


def decode(data: bytes, kind: type[T], what: str) -> T:
    """The structure that `data` describes, checked while it is parsed.

    Args:
        data: UTF-8 text.
        kind: a `msgspec.Struct`; fields that it does not have are passed over.
        what: the file, for error messages.

    Raises:
        FormatError: it is no JSON, or not of this structure.
    """
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        # Python writes and reads NaN, which is no JSON: in a user's own metadata it may be.
        raw = parse_object(data, what)
    try:
        return msgspec.json.decode(msgspec.json.encode(raw), type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FormatError(f"{what}: malformed: {error}") from error


def dump(value: Any) -> bytes:
    """Compact JSON; a value that JSON cannot hold raises `TypeError` or `ValueError`."""
    return json.dumps(value, separators=(",", ":")).encode()


def checked_metadata(custom_metadata: Any) -> dict[str, Any]:
    """A user's own metadata as they will be read.

    Raises:
        FormatError: no dict, or one that JSON cannot hold.
    """
    try:
        return parse_object(dump(custom_metadata), "custom_metadata")
    except (TypeError, ValueError) as error:
        raise FormatError(f"custom_metadata must be a dict that JSON can hold: {error}") from error


def is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a parsed value is a JSON object."""
    return isinstance(value, dict)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Whether a parsed value is a JSON array."""
    return isinstance(value, list)
