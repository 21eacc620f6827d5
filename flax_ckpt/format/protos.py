"""Protocol-buffer messages as the text that a `proto.pbtxt` holds, and back.

The first line names the message; to every text-format parser, Orbax's included, it is a comment.
"""

from typing import Final

from google.protobuf import descriptor_pool, message_factory, text_format
from google.protobuf.message import Message

from flax_ckpt.errors import FormatError
from flax_ckpt.format import config_pb as config_pb  # registers our own message: found by name
from flax_ckpt.format import names

_WIDTH: Final = 96
_MAX_TEXT: Final = 16 << 20  # parsing it takes a second for each MB


def message_to_text(message: Message) -> str:
    """Writes a message in text format, its full name in the first line.

    Raises:
        FormatError: more than 16 MiB of text.

    Every number reads back to the same bits, but for the payload of a NaN. Fields that the
    message's own class does not know are left out.

    >>> from google.protobuf import timestamp_pb2
    >>> print(message_to_text(timestamp_pb2.Timestamp(seconds=12)), end="")
    # proto-message: google.protobuf.Timestamp
    seconds: 12
    """
    text = text_format.MessageToString(message, as_utf8=True)
    _check_size(text)
    return f"{names.PROTO_HEADER}{message.DESCRIPTOR.full_name}\n{_folded(text)}"


def text_to_message(text: str, message_type: type[Message] | None = None) -> Message:
    """Reads what `message_to_text`, or any text-format writer, wrote.

    Args:
        text: the file's content.
        message_type: the message's class. Without it, the class is the one that this process has
            registered under the name in the first line; nothing is imported to find it.

    Raises:
        FormatError: no class is known, the file holds another message, or it is not text format.

    >>> from google.protobuf import timestamp_pb2
    >>> text_to_message("seconds: 12", timestamp_pb2.Timestamp).seconds
    12
    """
    _check_size(text)
    header, line = names.PROTO_HEADER, text.partition("\n")[0]
    name = line.removeprefix(header).strip() if line.startswith(header) else None
    message_type = _registered(name) if message_type is None else message_type
    wanted = message_type.DESCRIPTOR.full_name
    if name not in (None, wanted):
        raise FormatError(f"the file holds a {name}, not a {wanted}: pass the class of {name}")
    try:
        return text_format.Parse(text, message_type())
    except (text_format.ParseError, ValueError, RecursionError) as error:
        raise FormatError(f"not a {wanted} in text format: {error}") from error


def _check_size(text: str) -> None:
    if len(text) > _MAX_TEXT:
        raise FormatError(f"found {len(text)} characters of text, expected at most {_MAX_TEXT}")


def _registered(name: str | None) -> type[Message]:
    try:
        descriptor = descriptor_pool.Default().FindMessageTypeByName(name or "")
    except (KeyError, TypeError):  # TypeError: not even a string that UTF-8 can hold
        why = f"the first line names no message that this process knows ({name!r})"
        what_to_do = "import the module that defines it first, or pass the message's class"
        raise FormatError(f"{why}: {what_to_do}") from None
    return message_factory.GetMessageClass(descriptor)


def _folded(text: str) -> str:
    """Puts each block that fits on one line on one line; a config then reads as a table."""
    lines: list[str] = []
    opened: list[int] = []
    for line in text.split("\n"):  # `name {`, `}` or `name: value`: newlines in it are escaped
        lines.append(line)
        if line.endswith("{"):
            opened.append(len(lines) - 1)
        elif line.endswith("}"):
            start = opened.pop()
            one = " ".join([lines[start], *(inner.strip(" ") for inner in lines[start + 1 :])])
            if len(one) <= _WIDTH:
                lines[start:] = [one]
    return "\n".join(lines)
