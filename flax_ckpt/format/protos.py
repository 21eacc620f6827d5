"""Messages as the text that a `proto.pbtxt` holds, and back; messages as plain values.

>>> from google.protobuf import timestamp_pb2
>>> text = message_to_text(timestamp_pb2.Timestamp(seconds=12))
>>> print(text, end="")
# proto-message: google.protobuf.Timestamp
seconds: 12
>>> text_to_message(text).seconds
12
>>> text_to_message(text, timestamp_pb2.Timestamp).seconds
12

The first line names the message; to every text-format parser, Orbax's included, it is a comment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar, cast, overload

from google.protobuf import descriptor_pool, message_factory, text_format
from google.protobuf.message import Message

from flax_ckpt.errors import FormatError
from flax_ckpt.format import config_pb as config_pb  # registers our own message: found by name
from flax_ckpt.format import names

_M = TypeVar("_M", bound=Message)
_WIDTH: Final = 96


def message_to_text(message: Message) -> str:
    """Writes a message in text format, its full name in the first line.

    Every number is written so that it reads back to the same bits, but for the payload of a NaN.
    Fields that the message's own class does not know are left out.
    """
    text = text_format.MessageToString(message, as_utf8=True)
    return f"{names.PROTO_HEADER}{message.DESCRIPTOR.full_name}\n{_folded(text)}"


@overload
def text_to_message(text: str, message_type: type[_M]) -> _M: ...
@overload
def text_to_message(text: str, message_type: None = None) -> Message: ...


def text_to_message(text: str, message_type: type[Message] | None = None) -> Message:
    """Reads what `message_to_text`, or any text-format writer, wrote.

    Args:
        text: the file's content.
        message_type: the message's class. Without it, the class is the one that this process has
            registered under the name in the first line; nothing is imported to find it.

    Raises:
        FormatError: no class is known, the file holds another message, or it is not text format.
    """
    name = _named(text)
    if message_type is None:
        message_type = _registered(name)
    wanted = message_type.DESCRIPTOR.full_name
    if name not in (None, wanted):
        raise FormatError(f"the file holds a {name}, not a {wanted}: pass the class of {name}")
    message = message_type()
    try:
        text_format.Parse(text, message)
    except text_format.ParseError as error:
        raise FormatError(f"not a {wanted} in text format: {_located(text, error)}") from error
    except ValueError as error:  # an escape that is no character, which the parser lets through
        raise FormatError(f"not a {wanted} in text format: {error}") from error
    except RecursionError:
        raise FormatError(f"not a {wanted} in text format: nested too deeply") from None
    return message


def message_to_plain(message: Message) -> dict[str, Any]:
    """Turns any message into nested dicts and lists, an enum into its name.

    A field that cannot be absent is there with its default, one that is absent is not.
    """
    fields = [
        (field, getattr(message, field.name))
        for field in message.DESCRIPTOR.fields
        if not field.has_presence or message.HasField(field.name)
    ]
    plain = {field.name: _plain(field, value) for field, value in fields}
    for field, value in message.ListFields():
        if field.is_extension:
            plain[f"[{field.full_name}]"] = _plain(field, value)
    return plain


def _plain(field: Any, value: Any) -> Any:
    if isinstance(value, Message):
        return message_to_plain(value)
    if isinstance(value, Mapping):
        inner = field.message_type.fields_by_name["value"]
        items = cast(Mapping[Any, Any], value).items()
        return {key: _plain(inner, item) for key, item in items}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return [_plain(field, item) for item in cast(Sequence[Any], value)]
    if field.enum_type is not None and value in field.enum_type.values_by_number:
        return field.enum_type.values_by_number[value].name
    return value


def _named(text: str) -> str | None:
    line = text.partition("\n")[0]
    known = line.startswith(names.PROTO_HEADER)
    return line.removeprefix(names.PROTO_HEADER).strip() if known else None


def _registered(name: str | None) -> type[Message]:
    if name is None:
        raise FormatError(
            f"the first line does not name a message ('{names.PROTO_HEADER}<full name>'): "
            "pass the message's class"
        )
    try:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(name)
    except (KeyError, TypeError):  # TypeError: not even a string that UTF-8 can hold
        raise FormatError(
            f"this process knows no protocol-buffer message {name!r}: import the module that "
            "defines it first, or pass the message's class"
        ) from None
    return message_factory.GetMessageClass(descriptor)


def _located(text: str, error: text_format.ParseError) -> str:
    number = error.GetLine()
    if number is None:
        return str(error)
    line = text.split("\n")[number - 1]
    # The prefix is line:column, which we spell out; some reasons go on with the line, or with ''.
    reason = str(error).partition(" : ")[2].removeprefix(f"'{line}': ").removeprefix("'': ")
    return f"line {number}, column {error.GetColumn()}, {line.strip()[:120]!r}: {reason}"


def _folded(text: str) -> str:
    """Puts each block that fits on one line on one line; a config then reads as a table.

    Safe on lines because text_format escapes every newline in a string: a line is `name {`, `}`
    or `name: value`.
    """
    lines: list[str] = []
    opened: list[int] = []
    for line in text.split("\n")[:-1]:
        lines.append(line)
        if line.endswith("{"):
            opened.append(len(lines) - 1)
        elif line.strip(" ") == "}":
            start = opened.pop()
            one = " ".join([lines[start], *(inner.strip(" ") for inner in lines[start + 1 :])])
            if len(one) <= _WIDTH:
                lines[start:] = [one]
    return "".join(f"{line}\n" for line in lines)
