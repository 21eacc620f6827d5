"""A run's config ⇄ a protocol-buffer message, and what changed between two of them.

>>> message = to_message({"learning_rate": 1e-3, "model": {"width": 64, "layers": (2, 2)}})
>>> from_message(message).model.layers
(2, 2)
>>> diff(message, to_message({"learning_rate": 3e-4, "model": {"width": 64, "depth": 12}}))
['learning_rate 0.001 → 0.0003', 'model.layers removed (was (2, 2))', 'model.depth added: 12']

What comes back equals what was saved, but for these: a dataclass or another mapping is a dict, a
dict a `ConfigDict` where `ConfigDict(config)` makes it one, a frozen or locked `ConfigDict` an
open one, a `FieldReference` its value, an empty placeholder None, a NumPy scalar the Python number
of the same value, a named tuple a tuple, a member of an `IntEnum` or `StrEnum` its value.
"""

from __future__ import annotations

import builtins
import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from enum import Enum
from pathlib import PurePath
from typing import Any, Final, Literal, NamedTuple, TypeAlias, cast

import jax.numpy as jnp
import ml_dtypes
import numpy as np
from google.protobuf.message import Message

from flax_ckpt.errors import ConfigError
from flax_ckpt.format import protos
from flax_ckpt.format.config_pb import RunConfig

# Each level is two nested messages, and protobuf's own limit for a binary message is 100.
_MAX_DEPTH: Final = 40
_MAX_BITS: Final = 2048  # 617 digits: Python may be set to print and read no more than 640
_BUILTIN_TYPES: Final = (bool, int, float, complex)
# Where a type's name in a file is looked up, and nowhere else. The first that has it names it.
_TYPE_MODULES: Final[Mapping[str, Any]] = {
    "builtins": builtins,
    "numpy": np,
    "ml_dtypes": ml_dtypes,
    "jax.numpy": jnp,
}
_MISSING: Final = object()
_New: TypeAlias = Callable[[bool], MutableMapping[str | int, object]]


class _Problem(Exception):
    """Why one value of a config cannot be saved; the caller adds its key."""


class _Name(str):
    """A dtype or type in a diff: shown by name, and known even where it cannot be imported."""

    __repr__ = str.__str__


def to_message(config: object) -> Message:
    """Turns a config into a message.

    Args:
        config: an `ml_collections.ConfigDict`, dict, dataclass, or a protocol-buffer message of
            your own, which is returned as it is.

    Raises:
        ConfigError: values that cannot be saved, all of them, each with its key.
    """
    if isinstance(config, Message):
        return config
    writer, entry = _Writer(), RunConfig.Entry()
    writer.write(entry, config, "")
    if writer.problems:
        raise ConfigError("\n  ".join(["this config cannot be saved:", *writer.problems]))
    kind = entry.WhichOneof("kind")
    if kind not in ("dict", "config"):
        raise ConfigError(
            "a config is an ml_collections.ConfigDict, a dict, a dataclass or a protocol-buffer "
            f"message, not {_short(config)} of type {_type_label(config)}"
        )
    return RunConfig(config=entry.dict if kind == "dict" else entry.config)


def from_message(message: Message) -> Any:
    """Turns a message into a config: our own into a `ConfigDict`, any other into itself.

    The `ConfigDict` keeps the saved order of its keys and is not locked.

    Raises:
        ConfigError: a dtype that this process does not have, or a file edited into nonsense.
    """
    if not isinstance(message, RunConfig):
        return message
    return _read_dict(message.config, "", _Reading(_new_config, _find_type), _new_config)


def to_plain(message: Message) -> dict[Any, Any]:
    """Turns a message, ours or another, into nested dicts, lists and tuples."""
    return _plain_dict(message, _find_type)


def diff(saved: Message, current: Message) -> list[str]:
    """Lists what differs between two configs, a line for each key; empty if they are equal.

    The order of keys does not count, nor does provenance; `1` and `1.0` differ, NaN equals NaN.
    """
    old, new = saved.DESCRIPTOR.full_name, current.DESCRIPTOR.full_name
    if old != new:
        return [f"the config's message type {old} → {new}"]
    plain = [_plain_dict(message, lambda _, name: _Name(name)) for message in (saved, current)]
    return list(_compare("", *plain))


class _Writer:
    """Fills entries from values and collects what cannot be saved."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        self._open: list[int] = []  # ids of the containers around the current value

    def write(self, entry: RunConfig.Entry, value: object, path: str) -> None:
        try:
            value = _dereferenced(value)
            container = _container(value)
            if container is None:
                setattr(entry, *_scalar(value))
                return
            if id(value) in self._open:
                raise _Problem("contains itself; a config is a tree")
            if len(self._open) >= _MAX_DEPTH:
                raise _Problem(f"nested deeper than {_MAX_DEPTH} levels; flatten the config")
        except _Problem as problem:
            self.problems.append(f"{path or 'config'}: {problem}")
            return
        self._open.append(id(value))
        self._write_children(entry, *container, path)
        self._open.pop()

    def _write_children(
        self, entry: RunConfig.Entry, kind: str, children: Iterable[Any], path: str
    ) -> None:
        target = getattr(entry, kind)
        target.SetInParent()  # an empty container is there, too
        if kind in ("list", "tuple"):
            for index, child in enumerate(children):
                self.write(target.item.add(), child, f"{path}[{index}]")
            return
        for key, child in children:
            here = _join(path, key)
            try:
                field = target.field.add(**_key(key))
            except _Problem as problem:
                self.problems.append(f"{here}: {problem}")
            else:
                self.write(field, child, here)


def _is_ml(value: object, name: str) -> bool:
    # Nobody holds such an object without having imported the package.
    module = sys.modules.get("ml_collections")
    return module is not None and isinstance(value, getattr(module, name))


def _dereferenced(value: Any) -> object:
    if not _is_ml(value, "FieldReference"):
        return value
    try:
        return value.get()
    except Exception as error:  # a lazy computation may raise anything
        if type(error).__name__ == "RequiredValueError":
            return None
        raise _Problem(f"a FieldReference that cannot be computed: {error!r}") from error


def _container(value: Any) -> tuple[str, Iterable[Any]] | None:
    """The kind and the children of a value that has some: `(key, child)` pairs, or items."""
    if _is_ml(value, "ConfigDict"):
        try:
            return "config", value.items(preserve_field_references=True)
        except TypeError:  # by default it sorts
            raise _Problem("int and str keys in one ConfigDict; pass sort_keys=False") from None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
        return "dict", pairs
    if isinstance(value, Mapping):
        return "dict", cast(Mapping[Any, Any], value).items()
    if isinstance(value, list | tuple):
        return "list" if isinstance(value, list) else "tuple", cast(Iterable[Any], value)
    return None


def _key(key: object) -> dict[str, object]:
    if isinstance(key, str):
        return {"key": _utf8(key)}
    if isinstance(key, int) and not isinstance(key, bool):
        kind, value = _integer(key)
        return {f"{kind}_key": value}
    raise _Problem(f"a key of type {_type_label(key)}; keys are str or int")


def _scalar(value: Any) -> tuple[str, object]:
    if isinstance(cast(object, value), np.generic) and value.dtype.kind not in "mM":
        value = value.item()  # but not of a time, which would lose its unit
    match value:
        case None:
            return "none", True
        case bool():
            return "bool", value
        case int():
            return _integer(value)
        case float():
            return "float", float(value)
        case str():
            return "str", _utf8(value)
        case bytes():
            return "bytes", bytes(value)
        case np.dtype():
            return "dtype", _dtype_name(cast("np.dtype[Any]", value))
        case type() if _is_scalar_type(value):
            return "type", _type_name(value)
        case _:
            raise _Problem(_advice(value))


def _integer(value: int) -> tuple[str, object]:
    if -(2**63) <= value < 2**63:
        return "int", int(value)
    if value.bit_length() > _MAX_BITS:
        raise _Problem(f"an int of {value.bit_length()} bits, at most {_MAX_BITS}; store bytes")
    return "big_int", str(int(value))


def _utf8(value: str) -> str:
    value = str.__str__(value)  # of a StrEnum, its value
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Problem(
            "a string with lone surrogates, which UTF-8 cannot hold; store bytes"
        ) from None
    return value


def _dtype_name(dtype: np.dtype[Any]) -> str:
    for name in (dtype.name, dtype.str):
        try:
            if np.dtype(name) == dtype:
                return name
        except TypeError:
            continue
    raise _Problem(f"the dtype {dtype}, which no name gives back; store what it is built from")


def _is_scalar_type(value: type) -> bool:
    is_jax = isinstance(getattr(value, "dtype", None), np.dtype)  # `jnp.bfloat16.dtype`
    return is_jax or issubclass(value, np.generic) or value in _BUILTIN_TYPES


def _type_name(value: type) -> str:
    for name, module in _TYPE_MODULES.items():
        if getattr(module, value.__name__, None) is value:
            return f"{name}.{value.__name__}"
    raise _Problem(_advice(value))


def _advice(value: Any) -> str:
    label = _type_label(value)
    match value:
        case type():
            return f"the class {value.__qualname__}; store its name"
        case Enum():
            return f"the enum member {value}; store its .name or .value"
        case set() | frozenset():
            return f"a {label}; store a sorted list or tuple"
        case PurePath():
            return f"a {label}; store str(path)"
        case _ if hasattr(value, "__array__") and not isinstance(value, np.generic):
            return f"an array ({label}); save it in the state, or store its .tolist()"
        case _ if callable(value):
            return f"the callable {getattr(value, '__qualname__', label)}; store its name"
        case _:
            return f"an object of type {label}; store the name or the numbers it is built from"


def _type_label(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


class _Reading(NamedTuple):
    """What becomes of a saved `ConfigDict`, given whether keys hold dots, and of a dtype's name."""

    new_config: _New
    lookup: Callable[[str, str], object]


def _new_config(dotted: bool) -> Any:
    config_dict = importlib.import_module("ml_collections").ConfigDict
    return config_dict(sort_keys=False, allow_dotted_keys=dotted)


def _new_dict(_: bool) -> MutableMapping[str | int, object]:
    return {}


def _read_dict(saved: RunConfig.Dict, path: str, reading: _Reading, new: _New) -> Any:
    mapping = new(any("." in entry.key for entry in saved.field))
    for entry in saved.field:
        _, key = _stored(entry, "name", path)
        here = _join(path, key)
        if key in mapping:
            raise ConfigError(f"the saved config holds {here} twice")
        mapping[key] = _read(entry, here, reading, new)
    return mapping


def _read(entry: RunConfig.Entry, path: str, reading: _Reading, new: _New) -> object:
    kind, value = _stored(entry, "kind", path)
    match kind:
        case "config":
            return _read_dict(value, path, reading, reading.new_config)
        case "dict":  # inside a ConfigDict it becomes one, inside a list it stays a dict
            return _read_dict(value, path, reading, new)
        case "list" | "tuple":
            items = [
                _read(item, f"{path}[{index}]", reading, _new_dict)
                for index, item in enumerate(value.item)
            ]
            return items if kind == "list" else tuple(items)
        case "dtype" | "type":
            try:
                return reading.lookup(kind, value)
            except (KeyError, AttributeError, TypeError, ValueError, SyntaxError) as error:
                raise ConfigError(f"{path}: this process has no {kind} {value!r}") from error
        case _:
            return None if kind == "none" else value


def _stored(entry: RunConfig.Entry, oneof: Literal["name", "kind"], path: str) -> tuple[str, Any]:
    kind = entry.WhichOneof(oneof)
    if kind is None:
        what = "key" if oneof == "name" else "value; was it written by a newer flax_ckpt?"
        raise ConfigError(f"{path or 'config'}: a saved field without a {what}")
    value = getattr(entry, kind)
    if not kind.startswith("big_int"):
        return kind, value
    try:
        return kind, int(value, 0)
    except ValueError:
        raise ConfigError(f"{path or 'config'}: {_short(value)} is not an integer") from None


def _plain_dict(message: Message, lookup: Callable[[str, str], object]) -> dict[Any, Any]:
    if not isinstance(message, RunConfig):
        return protos.message_to_plain(message)
    return _read_dict(message.config, "", _Reading(_new_dict, lookup), _new_dict)


def _find_type(kind: str, name: str) -> object:
    if kind == "dtype":
        return np.dtype(name)
    module, _, attribute = name.rpartition(".")
    found = getattr(_TYPE_MODULES[module], attribute)
    if not isinstance(found, type) or not _is_scalar_type(found):
        raise TypeError(found)
    return found


def _compare(path: str, old: Any, new: Any) -> Iterator[str]:
    before, after = _as_dict(old), _as_dict(new)
    if before is not None and after is not None and (before or after):
        for key in before | after:
            sides = before.get(key, _MISSING), after.get(key, _MISSING)
            yield from _compare(_join(path, key), *sides)
    elif old is _MISSING:
        yield f"{path} added: {_short(new)}"
    elif new is _MISSING:
        yield f"{path} removed (was {_short(old)})"
    elif type(old) is type(new) and type(old) in (list, tuple) and len(old) == len(new):
        for index, sides in enumerate(zip(old, new, strict=True)):
            yield from _compare(f"{path}[{index}]", *sides)
    elif repr(old) != repr(new):  # tells 1 from 1.0 and True, 0.0 from -0.0; one NaN is another
        yield f"{path} {_short(old)} → {_short(new)}"


def _as_dict(value: Any) -> dict[Any, Any] | None:
    value = {} if value is _MISSING else value
    return cast(dict[Any, Any], value) if isinstance(value, dict) else None


def _join(path: str, key: object) -> str:
    if isinstance(key, str) and re.fullmatch(r"[\w/+:@-]+", key):
        return f"{path}.{key}" if path else key
    return f"{path}[{_short(key)}]"


def _short(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int too long to print
        text = f"a {_type_label(value)}"
    return text if len(text) <= 200 else f"{text[:200]}…"
