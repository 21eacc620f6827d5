"""A run's config ⇄ a protocol-buffer message, and what changed between two of them.

What comes back equals what was saved, but for these: a dataclass or another mapping is a dict, a
dict a `ConfigDict` where `ConfigDict(config)` makes it one, a frozen or locked `ConfigDict` an
open one, a `FieldReference` its value, a scalar type such as `jnp.bfloat16` its dtype, which
equals it, a NumPy scalar the Python number, an instance of a subclass one of its base.
"""

import contextlib
import dataclasses
import difflib
import pprint
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, cast

import numpy as np
from google.protobuf.message import Message

from flax_ckpt.errors import ConfigError
from flax_ckpt.format import protos
from flax_ckpt.format.config_pb import Entry, RunConfig

# Each level is two nested messages, and protobuf's own limit for a binary message is 100.
_MAX_DEPTH: Final = 40
_CONTAINERS: Final = frozenset({"list", "tuple", "dict", "config"})
_New = Callable[..., Any] | None  # makes an empty ConfigDict, or says that dicts stay dicts


class _Name(str):
    """A dtype in a diff, shown by name: this process need not have it."""

    __repr__ = str.__str__


def to_message(config: object) -> Message:
    """Turns a config into a message.

    Args:
        config: an `ml_collections.ConfigDict`, dict, dataclass, or a protocol-buffer message of
            your own, which is returned as it is.

    Raises:
        ConfigError: values that cannot be saved, all of them, each with its key.

    >>> print(to_message({"layers": (2, 2)}).item[0].tuple.item[1].int)
    2
    """
    if isinstance(config, Message):
        return config
    root = Entry()
    problems = list(_write(root, config, "", ()))
    kind = root.WhichOneof("kind")
    if not problems and kind not in ("dict", "config"):
        problems = [f"a {type(config).__name__} is no ConfigDict, dict, dataclass or message"]
    if problems:
        raise ConfigError("\n  ".join(["this config cannot be saved:", *problems]))
    return RunConfig(item=getattr(root, kind).item)


def add_provenance(message: Message, provenance: Mapping[str, Any]) -> Message:
    """The message, if it is ours with where it comes from; one that is there is replaced."""
    if isinstance(message, RunConfig):
        found: Any = to_message(provenance_of(message) | dict(provenance))
        del message.provenance[:]
        message.provenance.extend(found.item)
    return message


def provenance_of(message: Message) -> dict[str, Any]:
    """Where a config comes from, as `add_provenance` was told; empty if nobody did."""
    return _read_items(message.provenance, "", None) if isinstance(message, RunConfig) else {}


def from_message(message: Message) -> Any:
    """Turns a message into a config: our own into a `ConfigDict`, any other into itself.

    The `ConfigDict` keeps the saved order of its keys and is not locked.

    Raises:
        ConfigError: a dtype that this process does not have, or a file edited into nonsense.

    >>> from_message(to_message({"model": {"layers": (2, 2)}})).model.layers
    (2, 2)
    """
    if not isinstance(message, RunConfig):
        return message
    from ml_collections import ConfigDict

    return _read_items(message.item, "", ConfigDict)


def diff(saved: Message, current: Message) -> list[str]:
    """Lists what differs between two configs, a line for each key; empty if they are equal.

    The order of keys does not count, nor does provenance; `1` and `1.0` differ, NaN equals NaN.
    Messages of your own are compared line by line of their text.

    Raises:
        ConfigError: a file edited into nonsense.

    >>> diff(to_message({"rate": 1e-3, "a": {"b": 1}}), to_message({"rate": 3e-4, "c": "d"}))
    ['rate 0.001 → 0.0003', 'a.b removed (was 1)', "c added: 'd'"]
    """
    if not (isinstance(saved, RunConfig) and isinstance(current, RunConfig)):
        was, now = (protos.message_to_text(message).split("\n") for message in (saved, current))
        lines = difflib.unified_diff(was, now, n=0, lineterm="")
        return [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    old, new = (dict(_leaves(_read_items(m.item, "", None), "")) for m in (saved, current))
    changes: list[str] = []
    for path in old | new:
        if path not in new:
            changes.append(f"{path} removed (was {old[path]})")
        elif path not in old:
            changes.append(f"{path} added: {new[path]}")
        elif old[path] != new[path]:
            changes.append(f"{path} {old[path]} → {new[path]}")
    return changes


def _write(entry: Entry, value: Any, path: str, around: tuple[int, ...]) -> Iterator[str]:
    """Fills an entry, and yields what cannot be saved; `around` has the ids of its containers."""
    try:
        if isinstance(value, _ml("FieldReference")):
            value = value.get()
        kind, stored = _stored(value)
        if kind not in _CONTAINERS:
            setattr(entry, kind, stored)
            return
        if id(value) in around or len(around) >= _MAX_DEPTH:
            raise ValueError(f"contains itself, or is nested deeper than {_MAX_DEPTH} levels")
    except Exception as error:  # a FieldReference may compute anything
        yield f"{path or 'config'}: {error}"
        return
    target = getattr(entry, kind)
    target.SetInParent()  # an empty container is there, too
    for key, child in stored:
        item, here = target.item.add(), _join(path, key)
        try:
            if kind in ("dict", "config"):
                setattr(item, "key" if isinstance(key, str) else "int_key", key)
        except (TypeError, ValueError):
            yield f"{here}: a key is a str or an int of 64 bits"
        else:
            yield from _write(item, child, here, (*around, id(value)))


def _ml(name: str) -> Any:
    # Nobody holds such an object without having imported the package; nothing is of class ().
    return getattr(sys.modules.get("ml_collections"), name, ())


def _stored(value: Any) -> tuple[str, Any]:
    """The field of an entry for a value, and what it holds; for a container, its pairs."""
    cls = type(cast(object, value))
    if isinstance(value, _ml("ConfigDict")):
        return "config", value.items(preserve_field_references=True)
    if dataclasses.is_dataclass(cls):
        return "dict", [(f.name, getattr(value, f.name)) for f in dataclasses.fields(cls)]
    if issubclass(cls, Mapping):
        return "dict", value.items()
    if issubclass(cls, list | tuple):
        return "list" if issubclass(cls, list) else "tuple", enumerate(value)
    if issubclass(cls, np.generic) and value.dtype.kind not in "mM":
        value = value.item()  # but not of a time, which would lose its unit
    if value is None:
        return "none", True
    for scalar in (bool, float, str, bytes):
        if isinstance(value, scalar):
            return scalar.__name__, value
    if isinstance(value, int):
        return ("int", value) if value.bit_length() < 64 else ("big_int", str(int(value)))
    if issubclass(cls, type | np.dtype):
        name = value.__name__ if issubclass(cls, type) else value.name
        with contextlib.suppress(TypeError):  # no dtype has that name
            if np.dtype(name) == value:
                return "dtype", np.dtype(name).name
    raise TypeError(f"cannot save a {cls.__name__}; store a name, a number or a list instead")


def _read_items(items: Iterable[Entry], path: str, new: _New, *, inside: bool = True) -> Any:
    """Reads a dict: into a `new` ConfigDict, if given, but one that is not `inside` of a list."""
    dotted = any("." in item.key for item in items)
    read: Any = new(sort_keys=False, allow_dotted_keys=dotted) if new and inside else {}
    for item in items:
        key = item.int_key if item.WhichOneof("name") == "int_key" else item.key
        value = _read(item, _join(path, key), new, inside)
        try:
            if key in read:
                raise KeyError("it is there twice")
            read[key] = value
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{_join(path, key)}: cannot be read back: {error}") from error
    return read


def _read(entry: Entry, path: str, new: _New, inside: bool) -> object:
    kind = entry.WhichOneof("kind")
    if kind is None:
        raise ConfigError(f"{path}: no value; was it written by a newer flax_ckpt?")
    value = getattr(entry, kind)
    match kind:
        case "dict" | "config":
            return _read_items(value.item, path, new, inside=inside or kind == "config")
        case "list" | "tuple":
            items = [_read(x, _join(path, i), new, False) for i, x in enumerate(value.item)]
            return items if kind == "list" else tuple(items)
        case "dtype" | "big_int":
            convert = int if kind == "big_int" else np.dtype if new else _Name
            try:
                return convert(value)
            except (TypeError, ValueError, SyntaxError, OverflowError, MemoryError) as error:
                raise ConfigError(f"{path}: this process has no {kind} {value!r}") from error
        case _:
            return None if kind == "none" else value


def _leaves(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(cast(object, value), dict) and (value or not path):
        for key, child in value.items():
            yield from _leaves(child, _join(path, key))
    else:
        yield path, pprint.saferepr(value)


def _join(path: str, key: object) -> str:
    if isinstance(key, str) and key.isidentifier():
        return f"{path}.{key}" if path else key
    return f"{path}[{key!r}]"
