"""Handlers of checkpointables that are one small text file: protocol buffers, JSON, metrics.

Only the primary process writes it; every process reads it.
"""

import contextlib
import json
import os
from collections.abc import Awaitable, Callable
from typing import Any, ClassVar, cast, final

from etils import epath
from google.protobuf.message import Message

from flax_ckpt.context import resolve
from flax_ckpt.errors import CheckpointNotFoundError, FormatError, NotHandleableError
from flax_ckpt.format import jsons, names, protos
from flax_ckpt.handlers.base import PathAwaitingCreation
from flax_ckpt.storage import files, hosts
from flax_ckpt.storage.record import Record

_NOT_TEXT = TypeError, ValueError, RecursionError


class TextHandler:
    """One text file; what it holds is for the functions to say, which raise `ValueError` if not.

    Args:
        encode: the text of a value.
        decode: the value of a text, as the abstract value says.
        *filenames: the first is written; of all the first that is there is read.
    """

    _REFUSAL: ClassVar[str]

    def __init__(
        self, encode: Callable[[Any], str], decode: Callable[[str, Any], Any], *filenames: str
    ) -> None:
        self._encode, self._decode, self._filenames = encode, decode, filenames

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        """See :class:`CheckpointableHandler`; the value is turned into text before returning.

        Raises:
            NotHandleableError: the text cannot hold it.
        """
        try:
            text = self._encode(checkpointable)
        except _NOT_TEXT as error:
            why = f"{self._REFUSAL}: {error}"
            raise NotHandleableError(f"checkpointable {directory.name!r}: {why}") from error
        return self._write(directory, text)

    async def _write(self, directory: PathAwaitingCreation, text: str) -> None:
        path = await directory.await_creation()
        if hosts.is_primary_host(resolve().multiprocessing.primary_host):
            files.write(os.fspath(path / self._filenames[0]), text.encode())

    async def load(
        self, directory: epath.Path, abstract_checkpointable: Any = None
    ) -> Awaitable[Any]:
        """See :class:`CheckpointableHandler`.

        Raises:
            CheckpointNotFoundError: no file is there.
            FormatError: it is not of this kind.
        """
        return self._load(directory, abstract_checkpointable)

    async def _load(self, directory: epath.Path, abstract: Any) -> Any:
        record = Record(os.fspath(directory))
        for filename in filter(record.lists, self._filenames):
            data = record.read(filename)
            try:
                return self._decode(data.decode(), abstract)
            except (ValueError, RecursionError) as error:
                why = f"{type(self).__name__} cannot read it: {error}"
                raise FormatError(f"{directory / filename}: {why}") from error
        wanted = ", ".join(dict.fromkeys(self._filenames))
        raise CheckpointNotFoundError(f"{directory}: found none of the files {wanted}")


@final
class ProtoHandler(TextHandler):
    """Saves and loads protocol-buffer messages in text format.

    The file's first line is a comment with the message's full name, so that a message whose class
    this process has registered loads without naming it: nothing is imported because a file does.
    Else the message class is the abstract value.

    Args:
        filename: of the text file.

    >>> import tempfile, flax_ckpt as fc
    >>> from google.protobuf.duration_pb2 import Duration
    >>> registry = fc.handlers.local_registry()
    >>> _ = registry.add(fc.handlers.ProtoHandler, checkpointable_name="proto_config")
    >>> ctx = fc.Context()
    >>> ctx.checkpointables.registry = registry
    >>> path = tempfile.mkdtemp() + "/ckpt"
    >>> with ctx:
    ...     fc.save_checkpointables(path, dict(proto_config=Duration(seconds=3)))
    ...     fc.load_checkpointables(path, dict(proto_config=Duration))["proto_config"].seconds
    3
    """

    TYPESTR: ClassVar = names.TYPE_PROTO
    ALIASES: ClassVar = names.PROTO_TYPES
    _REFUSAL: ClassVar = "ProtoHandler saves protocol-buffer messages"

    def __init__(self, filename: str = names.PROTO_FILE) -> None:
        super().__init__(_message_text, protos.text_to_message, filename)

    async def metadata(self, directory: epath.Path) -> type[Message] | None:
        """The message's class; None if this process has not registered it."""
        with contextlib.suppress(FormatError):
            message: Message = await self._load(directory, None)
            return type(message)

    def is_handleable(self, checkpointable: Any) -> bool:
        """True for protocol-buffer messages."""
        return isinstance(checkpointable, Message)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """True for message classes."""
        abstract = abstract_checkpointable
        return isinstance(abstract, type) and issubclass(abstract, Message)


def _message_text(value: Any) -> str:
    if not isinstance(value, Message):
        raise TypeError(f"got a {type(value).__name__}")
    return protos.message_to_text(value)


class JsonHandler(TextHandler):
    """Saves and loads what JSON can hold: dicts with string keys, lists, numbers, strings.

    Args:
        filename: of the file; by default one that Orbax's v1 and v0 handlers both read.
    """

    TYPESTR: ClassVar = names.TYPE_JSON
    ALIASES: ClassVar = names.JSON_TYPES
    _REFUSAL: ClassVar = "JSON cannot hold it"

    def __init__(self, filename: str | None = None) -> None:
        known = names.JSON_LEGACY_FILE, names.JSON_FILE
        super().__init__(_json_text, _json_value, *filter(None, (filename, *known)))

    async def metadata(self, directory: epath.Path) -> None:
        """None: JSON needs no abstract form."""

    def is_handleable(self, checkpointable: Any) -> bool:
        """True if JSON can hold it."""
        with contextlib.suppress(*_NOT_TEXT):
            return bool(_json_text(checkpointable))
        return False

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """None: the checkpoint decides."""


def _json_value(text: str, _: object) -> Any:
    jsons.limited(text.encode(), "JSON")
    return json.loads(text)


def _json_text(value: Any) -> str:
    text, nodes = json.dumps(value), [value]
    jsons.limited(text.encode(), "JSON")  # more than this could not be loaded
    for node in nodes:  # JSON would turn keys that are no strings into some without a word
        if jsons.is_object(node):
            if wrong := [key for key in cast("Any", node) if not isinstance(key, str)]:
                raise TypeError(f"the key {wrong[0]!r} is no string")
            nodes += node.values()
        elif isinstance(node, list | tuple):
            nodes += cast("Any", node)
    return text


@final
class MetricsHandler(JsonHandler):
    """JSON in the file where Orbax keeps a step's metrics."""

    TYPESTR: ClassVar = names.TYPE_METRICS
    ALIASES: ClassVar = frozenset({names.TYPE_METRICS})

    def __init__(self) -> None:
        super().__init__(names.METRICS_FILE)
