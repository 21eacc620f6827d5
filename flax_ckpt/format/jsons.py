"""JSON as the format uses it: parsing that answers garbage with one typed error."""

import json
from typing import Any, TypeGuard

from flax_ckpt.errors import FormatError


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """The JSON object in `data`.

    Args:
        data: UTF-8 text.
        what: the file, for error messages.

    Raises:
        FormatError: it is no JSON, or no object.
    """
    try:
        value: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what}: not valid JSON ({error or 'nested too deeply'})") from error
    if not is_object(value):
        raise FormatError(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value


def dump(value: Any) -> bytes:
    """Compact JSON; a value that JSON cannot hold raises `TypeError` or `ValueError`."""
    return json.dumps(value, separators=(",", ":")).encode()


def is_object(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a parsed value is a JSON object."""
    return isinstance(value, dict)


def is_list(value: Any) -> TypeGuard[list[Any]]:
    """Whether a parsed value is a JSON array."""
    return isinstance(value, list)
