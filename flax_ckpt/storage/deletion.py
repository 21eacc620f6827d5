"""How one checkpointable leaves a checkpoint while the others stay readable.

A record of the intent is published; the directory goes; `_CHECKPOINT_METADATA` is rewritten, then
`flax_ckpt.json`; the record goes last. Each step is durable before the next. Records are Orbax's,
so that each library hides what the other has begun to delete, and can finish it.
"""

import os

from flax_ckpt.errors import DamagedCheckpointError, DeletionRecoveryError, FormatError
from flax_ckpt.format import jsons, names
from flax_ckpt.format.checkpoint import DeletionRecord, Integrity, file_crc, rewritten
from flax_ckpt.storage import commit, files
from flax_ckpt.storage.record import Record


def read(root: str) -> DeletionRecord | None:
    """The record of a deletion in a checkpoint that was not finished.

    Raises:
        DeletionRecoveryError: it makes no sense, or is not of this checkpoint.
    """
    path = os.path.join(root, names.DELETION_RECORD)
    try:
        record = DeletionRecord.from_bytes(files.read(path), path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    described = os.path.join(root, names.CHECKPOINT_METADATA)
    data = files.read(described) if os.path.isfile(described) else b"{}"
    try:
        current = rewritten(jsons.parse_object(data, described))
        if current not in map(rewritten, (record.original_metadata, record.updated_metadata)):
            raise FormatError(f"{names.CHECKPOINT_METADATA} is neither the old nor the new one")
    except (FormatError, RecursionError) as error:
        why = f"the record of an unfinished deletion is not of this checkpoint: {error}"
        raise DeletionRecoveryError(f"{path}: {why}") from error
    return record


def begin(root: str, record: DeletionRecord) -> None:
    """Publishes the intent; from here on the checkpointable is hidden."""
    files.replace(os.path.join(root, names.DELETION_RECORD), record.to_bytes(), exclusive=True)


def finish(root: str, record: DeletionRecord) -> None:
    """Deletes what is left of the checkpointable; can be called again after a crash anywhere."""
    item = os.path.join(root, record.checkpointable_name)
    files.clear(item)
    files.sync_path(root)
    metadata = rewritten(record.updated_metadata)
    files.replace(os.path.join(root, names.CHECKPOINT_METADATA), metadata)
    integrity = os.path.join(root, names.INTEGRITY)
    if os.path.isfile(integrity):
        old = Integrity.from_bytes(files.read(integrity), integrity)
        gone = f"{record.checkpointable_name}/"
        kept = {p: c for p, c in old.crc32c.items() if not p.startswith(gone)}
        kept[names.CHECKPOINT_METADATA] = file_crc(metadata)
        files.replace(integrity, Integrity(kept, old.writers).to_bytes())
    path = os.path.join(root, names.DELETION_RECORD)
    commit.remove_left_over(path + names.TMP_SUFFIX)  # of a crash while it was published
    files.unlink(path)
    files.sync_path(root)


def read_metadata(record: Record) -> bytes | None:
    """The checked bytes of `_CHECKPOINT_METADATA`, also when a deletion has rewritten them.

    Orbax does not know `flax_ckpt.json`, and a crash may come between the two files.
    """
    if not record.lists(names.CHECKPOINT_METADATA):
        return None
    try:
        return record.read(names.CHECKPOINT_METADATA)
    except DamagedCheckpointError:
        path = os.path.join(record.directory, names.CHECKPOINT_METADATA)
        if os.path.isfile(path) and _items_were_deleted(record, data := files.read(path)):
            return data
        raise


def _items_were_deleted(record: Record, data: bytes) -> bool:
    """Whether the metadata are as a deletion writes them, and the items they lack are gone."""
    try:
        metadata = jsons.parse_object(data, names.CHECKPOINT_METADATA)
        kept, written = metadata["item_handlers"].keys(), rewritten(metadata)
    except (FormatError, KeyError, AttributeError, TypeError, RecursionError):
        return False
    lacking = {name for name in record.listed() if record.listed(f"{name}/")} - kept
    there = lacking.intersection(os.listdir(record.directory))
    return bool(lacking) and not there and data == written
