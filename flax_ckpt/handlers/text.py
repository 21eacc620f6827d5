"""Handlers of checkpointables that are one small text file: protocol buffers, JSON, metrics.

Only the primary process writes it; every process reads it.
"""

import json
import os
from collections.abc import Awaitable
from typing import Any, ClassVar, cast, final

from etils import epath
from google.protobuf.message import Message

from flax_ckpt.context import resolve
from flax_ckpt.errors import CheckpointNotFoundError, FormatError, NotHandleableError
from flax_ckpt.format import names, protos
from flax_ckpt.handlers.base import PathAwaitingCreation
from flax_ckpt.storage import files, hosts
from flax_ckpt.storage.record import Record


async def _write(directory: PathAwaitingCreation, filename: str, text: str) -> None:
    path = await directory.await_creation()
    if hosts.is_primary_host(resolve().multiprocessing.primary_host):
        files.write(os.fspath(path / filename), text.encode())


@final
class ProtoHandler:
    """Saves and loads protocol-buffer messages in text format.

    The file's first line is a comment with the message's full name, so that a message whose class
    this process has registered loads without naming it.

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

    def __init__(self, filename: str = names.PROTO_FILE) -> None:
        self._filename = filename

    async def save(
        self, directory: PathAwaitingCreation, checkpointable: Message
    ) -> Awaitable[None]:
        """See :class:`CheckpointableHandler`; the message is turned into text before returning.

        Raises:
            NotHandleableError: not a message.
        """
        if not self.is_handleable(checkpointable):
            raise NotHandleableError(
                f"checkpointable {directory.name!r}: ProtoHandler saves protocol-buffer messages,"
                f" got a {type(checkpointable).__name__}"
            )
        text = protos.message_to_text(checkpointable)
        return _write(directory, self._filename, text)

    async def load(
        self, directory: epath.Path, abstract_checkpointable: type[Message] | None = None
    ) -> Awaitable[Message]:
        """See :class:`CheckpointableHandler`.

        Args:
            directory: where the file is.
            abstract_checkpointable: the message class; None: the one that the file names, if
                this process has registered it. Nothing is imported because a file names it.

        Raises:
            FormatError: the text is not of that message, or its class is not known here.
        """
        return self._load(directory, abstract_checkpointable)

    async def _load(self, directory: epath.Path, message_type: type[Message] | None) -> Message:
        data = Record(os.fspath(directory)).read(self._filename)
        try:
            return protos.text_to_message(data.decode(), message_type)
        except UnicodeDecodeError as error:
            raise FormatError(f"{directory}: not UTF-8 text: {error}") from error

    async def metadata(self, directory: epath.Path) -> type[Message] | None:
        """The message's class; None if this process has not registered it."""
        try:
            return type(await self._load(directory, None))
        except FormatError:
            return None

    def is_handleable(self, checkpointable: Any) -> bool:
        """True for protocol-buffer messages."""
        return isinstance(checkpointable, Message)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """True for message classes."""
        abstract = abstract_checkpointable
        return isinstance(abstract, type) and issubclass(abstract, Message)


def _to_json(value: Any) -> str:
    text = json.dumps(value)
    _require_string_keys(value)
    return text


def _require_string_keys(value: Any) -> None:
    """JSON would turn other keys into strings without a word."""
    if isinstance(value, dict):
        for key, inner in cast("dict[Any, Any]", value).items():
            if not isinstance(key, str):
                raise TypeError(f"the key {key!r} is no string")
            _require_string_keys(inner)
    elif isinstance(value, list | tuple):
        for inner in cast("list[Any]", value):
            _require_string_keys(inner)


class JsonHandler:
    """Saves and loads what JSON can hold: dicts with string keys, lists, numbers, strings.

    Args:
        filename: of the file; by default one that Orbax's v1 and v0 handlers both read.
    """

    TYPESTR: ClassVar = names.TYPE_JSON
    ALIASES: ClassVar = names.JSON_TYPES

    def __init__(self, filename: str | None = None) -> None:
        self._filenames = [filename] if filename else []
        self._filenames += [names.JSON_LEGACY_FILE, names.JSON_FILE]

    async def save(self, directory: PathAwaitingCreation, checkpointable: Any) -> Awaitable[None]:
        """See :class:`CheckpointableHandler`.

        Raises:
            NotHandleableError: JSON cannot hold it.
        """
        try:
            text = _to_json(checkpointable)
        except (TypeError, ValueError, RecursionError) as error:
            raise NotHandleableError(
                f"checkpointable {directory.name!r}: JSON cannot hold it: {error}"
            ) from error
        return _write(directory, self._filenames[0], text)

    async def load(
        self, directory: epath.Path, abstract_checkpointable: None = None
    ) -> Awaitable[Any]:
        """See :class:`CheckpointableHandler`.

        Raises:
            CheckpointNotFoundError: none of the known files is there.
            FormatError: it is no JSON.
        """
        return self._load(directory)

    async def _load(self, directory: epath.Path) -> Any:
        record = Record(os.fspath(directory))
        for filename in self._filenames:
            if record.lists(filename):
                data = record.read(filename)
                try:
                    return json.loads(data)
                except (ValueError, RecursionError) as error:
                    raise FormatError(f"{directory / filename}: not valid JSON: {error}") from error
        raise CheckpointNotFoundError(
            f"{directory}: no JSON file; looked for {', '.join(dict.fromkeys(self._filenames))}"
        )

    async def metadata(self, directory: epath.Path) -> None:
        """None: JSON needs no abstract form."""
        return None

    def is_handleable(self, checkpointable: Any) -> bool:
        """True if JSON can hold it."""
        try:
            _to_json(checkpointable)
        except (TypeError, ValueError, RecursionError):
            return False
        return True

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        """None: the checkpoint decides."""
        return None


@final
class MetricsHandler(JsonHandler):
    """JSON in the file where Orbax keeps a step's metrics."""

    TYPESTR: ClassVar = names.TYPE_METRICS
    ALIASES: ClassVar = frozenset({names.TYPE_METRICS})

    def __init__(self) -> None:
        super().__init__(names.METRICS_FILE)
