"""Opens the array store that fits a PyTree directory."""

import contextlib
import os
from collections.abc import Generator

from flax_ckpt.format import names
from flax_ckpt.format.ocdbt import NumberedManifestError
from flax_ckpt.storage import files
from flax_ckpt.storage.database import Database
from flax_ckpt.storage.native_read import NativeStore
from flax_ckpt.storage.record import Record
from flax_ckpt.storage.store import ArrayStore
from flax_ckpt.storage.tensor_store import TensorStoreStore


@contextlib.contextmanager
def open_store(
    record: Record, *, ocdbt: bool | None, zarr3: bool, fill_missing: bool = False
) -> Generator[ArrayStore]:
    """The arrays of a directory.

    A foreign database's index is decoded here first, which checks that no path in it leads out of
    the directory before TensorStore sees it.

    Args:
        record: reads the directory's files.
        ocdbt: what `_METADATA` says; None: look.
        zarr3: likewise.
        fill_missing: chunks that are missing are zeros, unless we wrote the checkpoint.
    """
    if ocdbt is None:
        ocdbt = os.path.isfile(os.path.join(record.directory, names.MANIFEST))
    where = record.directory
    general = TensorStoreStore(where, ocdbt=ocdbt, zarr3=zarr3, fill_missing=fill_missing)
    database: Database | None = None
    checked = record.native and record.lists(names.CHUNK_TABLE)
    if ocdbt:
        with contextlib.suppress(NumberedManifestError):
            database = Database(record, checked=checked)
    if database is None:
        files.refuse_links(where)
        yield NativeStore(record, zarr3=zarr3) if record.native and not ocdbt else general
        return
    with database:
        if checked or (zarr3 and not fill_missing):
            yield NativeStore(database, None if checked else general, zarr3=zarr3)
        else:
            database.check_files()
            yield general
