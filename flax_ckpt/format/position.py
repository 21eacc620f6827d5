"""The state of a data iterator as JSON, with a tag around what JSON lacks.

    {"next_index": 7, "rng": {"$bytes": "AAE="}, "order": {"$array": ["<i8", [2], "..."]}}

Only these kinds are written and read, so that no state can choose code to run.
"""

import base64
import json
import re
import reprlib
from typing import Any, Final, cast

import numpy as np

from flax_ckpt.errors import FormatError, NotHandleableError
from flax_ckpt.format import jsons

_NUMBERS: Final = re.compile("[<>|=][biufc][0-9]{1,2}")


def encode(state: Any, what: str) -> bytes:
    """The state as UTF-8 text.

    Args:
        state: dicts with string keys, lists, tuples, numbers, strings, None, bytes, and NumPy
            arrays and scalars of numbers or bools.
        what: whose state it is, for error messages.

    Raises:
        NotHandleableError: names the place of something else in it.

    >>> encode({"row": 7, "seed": b"!"}, "it")
    b'{"row": 7, "seed": {"$bytes": "IQ=="}}'
    >>> decode(_, "it")
    {'row': 7, 'seed': b'!'}
    """
    return jsons.limited(json.dumps(_to_json(state, f"the state of {what}")).encode(), what)


def decode(data: bytes, what: str) -> Any:
    """What :func:`encode` was given.

    Raises:
        FormatError: not JSON, or a tag with something else behind it.
    """
    jsons.limited(data, what)
    try:
        return json.loads(data, object_hook=_from_json)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise FormatError(f"{what}: not the state of a data iterator: {error}") from error


def _to_json(value: Any, where: str) -> Any:
    if _is_numbers(value):
        return {"$array": [value.dtype.str, value.shape, _text(value.tobytes())]}
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        return {"$bytes": _text(value)}
    if isinstance(value, tuple):
        return {"$tuple": _to_json(list(cast("Any", value)), where)}
    if jsons.is_list(value):
        return [_to_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if jsons.is_object(value) and not any(map(_is_odd, value)):
        return {key: _to_json(item, f"{where}[{key!r}]") for key, item in value.items()}
    what = f"{where} is {value!r:.100}, a {type(value).__name__}; it may be of dicts with string"
    what += " keys that do not begin with '$', lists, tuples, numbers, strings, bytes, and NumPy"
    how = "An object with another state can save itself: see StatefulCheckpointable"
    raise NotHandleableError(f"{what} arrays of numbers. {how}")


def _is_numbers(value: Any) -> bool:
    return isinstance(value, np.ndarray | np.generic) and value.dtype.kind in "biufc"


def _is_odd(key: Any) -> bool:
    return not isinstance(key, str) or key.startswith("$")


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _from_json(found: dict[str, Any]) -> Any:
    match found:
        case {"$bytes": text}:
            return base64.b64decode(text)
        case {"$tuple": items}:
            return tuple(items)
        case {"$array": [str(dtype), shape, text]} if _NUMBERS.fullmatch(dtype):
            return np.frombuffer(base64.b64decode(text), dtype).reshape(shape).copy()[()]
        case {"$array": wrong}:
            raise ValueError(f"no array of numbers: {reprlib.repr(wrong)}")
        case _:
            return found
