"""The files at a checkpoint's root: `_CHECKPOINT_METADATA` and `flax_ckpt.json`.

The first is Orbax's: which checkpointables there are, when, and the user's own metadata. The
second is ours, a plain file that Orbax ignores: who wrote the checkpoint, and the CRC-32C of every
file that is not array data, its own included.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import uuid
from collections.abc import Iterable
from typing import Any

import crc32c
import msgspec

from flax_ckpt.errors import DamagedCheckpointError, DeletionRecoveryError, FormatError
from flax_ckpt.format import jsons, names, wire

FORMAT_VERSION = 1  # of `flax_ckpt.json` and of what it vouches for


@dataclasses.dataclass(frozen=True)
class RootMetadata:
    """`_CHECKPOINT_METADATA`.

    Attributes:
        item_handlers: type string of each checkpointable; a single string for a flat v0
            checkpoint, empty when the file does not say.
        init_timestamp_nsecs: when the save began, in ns since the epoch.
        commit_timestamp_nsecs: when it was finished.
        custom_metadata: the user's.
    """

    item_handlers: dict[str, str] | str = dataclasses.field(default_factory=dict[str, str])
    init_timestamp_nsecs: int | None = None
    commit_timestamp_nsecs: int | None = None
    custom_metadata: dict[str, Any] = dataclasses.field(default_factory=dict[str, Any])

    def to_bytes(self) -> bytes:
        """The file."""
        fixed = {"item_handlers": self.item_handlers, "metrics": {}, "performance_metrics": {}}
        encode = jsons.dump if self.custom_metadata else msgspec.json.encode
        return jsons.limited(encode(fixed | vars(self)), names.CHECKPOINT_METADATA)

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> RootMetadata:
        """Parses the file, leniently: Orbax's readers take an empty or odd one as empty.

        Raises:
            FormatError: it is too large.
        """
        jsons.limited(data, what)
        try:
            raw = jsons.parse_object(data, what)
        except FormatError:
            return cls()
        handlers: Any = raw.get("item_handlers")
        if jsons.is_object(handlers):
            handlers = {k: v for k, v in handlers.items() if isinstance(v, str)}
        elif not isinstance(handlers, str):
            handlers = {}
        custom: Any = raw.get("custom_metadata")
        init, commit = (_int_or_none(raw.get(f"{w}_timestamp_nsecs")) for w in ("init", "commit"))
        return cls(handlers, init, commit, custom if jsons.is_object(custom) else {})


def rewritten(metadata: dict[str, Any]) -> bytes:
    """`_CHECKPOINT_METADATA` as a deletion writes it, here and in Orbax."""
    return json.dumps(metadata, sort_keys=True).encode()


class DeletionRecord(msgspec.Struct, frozen=True):
    """`_CHECKPOINT_DELETION`: a checkpointable is being deleted; in Orbax's words.

    Attributes:
        checkpointable_name: which one.
        original_metadata: `_CHECKPOINT_METADATA` before the deletion.
        updated_metadata: and after it.
        operation_id: 32 hex digits.
        destination: where Orbax moves it, on some object stores; None: it is removed.
    """

    checkpointable_name: str
    original_metadata: dict[str, Any]
    updated_metadata: dict[str, Any]
    operation_id: str
    destination: str | None = None

    @classmethod
    def of(cls, original: dict[str, Any], name: str) -> DeletionRecord:
        """The record for the deletion of `name`, one of the metadata's `item_handlers`."""
        handlers = {key: value for key, value in original["item_handlers"].items() if key != name}
        return cls(name, original, original | {"item_handlers": handlers}, uuid.uuid4().hex)

    def to_bytes(self) -> bytes:
        """The file."""
        return rewritten(msgspec.structs.asdict(self))

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> DeletionRecord:
        """Parses the file.

        Raises:
            DeletionRecoveryError: it makes no sense.
        """
        try:
            record = msgspec.convert(jsons.parse_object(data, what), cls)
            name, original = record.checkpointable_name, record.original_metadata
            updated = cls.of(original, name).updated_metadata
            same = rewritten(updated) == rewritten(record.updated_metadata)
            if not same or name not in original["item_handlers"]:
                raise ValueError(f"its metadata do not differ by {name!r} alone")
            wire.check_path(name, what)
            if "/" in name or name == ".":
                raise ValueError(f"{name!r} is no name of a checkpointable")
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            why = f"the record of an unfinished deletion makes no sense: {error!r}"
            how = "Nothing is read from or deleted in this checkpoint but the whole of it"
            raise DeletionRecoveryError(f"{what}: {why}. {how}") from error
        return record


def _int_or_none(value: Any) -> int | None:
    return value if type(value) is int and abs(value) < 1 << 63 else None


def file_crc(data: bytes, more: Iterable[bytes] = ()) -> int:
    """The CRC-32C of a file; of one that ends in its own CRC-32C, that of what is before it.

    With its own CRC-32C at the end, every file has the same one: it would tell nothing.

    Args:
        data: the file, or how it begins.
        more: the rest of a large one.
    """
    crc, end = 0, b""
    for block in itertools.chain([data], more):
        end += block
        crc, end = crc32c.crc32c(memoryview(end)[:-4], crc), end[-4:]
    return crc if crc.to_bytes(4, "little") == end else crc32c.crc32c(end, crc)


class _Integrity(msgspec.Struct):
    format_version: int | str | None = None
    writers: dict[str, str] = {}
    crc32c: dict[str, str] = {}


@dataclasses.dataclass(frozen=True)
class Integrity:
    """`flax_ckpt.json`.

    Attributes:
        crc32c: :func:`file_crc` of every file that is not array data, by path relative to the root.
        writers: versions of what wrote the checkpoint.
    """

    crc32c: dict[str, int]
    writers: dict[str, str] = dataclasses.field(default_factory=dict[str, str])

    def to_bytes(self) -> bytes:
        """The file: one line of JSON, and one with that line's CRC-32C."""
        crcs = {path: f"{crc:08x}" for path, crc in sorted(self.crc32c.items())}
        body = msgspec.json.encode(_Integrity(FORMAT_VERSION, self.writers, crcs))
        return body + b"\n" + f'"{crc32c.crc32c(body):08x}"\n'.encode()

    @classmethod
    def from_bytes(cls, data: bytes, what: str) -> Integrity:
        """Parses and checks the file.

        Raises:
            DamagedCheckpointError: its own checksum is wrong, or it makes no sense.
        """
        body, _, tail = data.partition(b"\n")
        expected = f'"{crc32c.crc32c(body):08x}"\n'.encode()
        if tail != expected:
            found = f"its checksum line is {tail[:20]!r}, expected {expected!r}"
            raise DamagedCheckpointError(f"{what}: {found}: damaged; restore another step")
        raw = jsons.decode(body, _Integrity, what)
        if (version := raw.format_version) != FORMAT_VERSION:
            found = f"format version {version!r}; this release reads {FORMAT_VERSION}"
            raise FormatError(f"{what}: {found}: use a newer flax_ckpt")
        try:
            crcs = {path: int(crc, 16) for path, crc in raw.crc32c.items()}
            for path in crcs:
                wire.check_path(path, what)
            return cls(crcs, raw.writers)
        except ValueError as error:
            raise DamagedCheckpointError(f"{what}: malformed: {error!r}") from error
