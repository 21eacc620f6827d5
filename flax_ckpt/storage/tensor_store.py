"""Reads arrays that others wrote, whatever their codecs, through TensorStore."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from flax_ckpt.errors import DamagedCheckpointError
from flax_ckpt.format.arrays import prefix
from flax_ckpt.storage.store import ArrayRead, Arrays

_BATCH = 256  # arrays that are being opened at one time


class TensorStoreStore:
    """Arrays of one PyTree directory, of which another reader has the descriptions.

    Args:
        directory: absolute path of the PyTree directory.
        ocdbt: whether its arrays are in an OCDBT database, else in plain files.
        zarr3: whether they are zarr version 3, else 2.
        fill_missing: whether a chunk that is missing is zeros, else an error.
    """

    def __init__(self, directory: str, *, ocdbt: bool, zarr3: bool, fill_missing: bool) -> None:
        self._directory = directory
        driver = "zarr3" if zarr3 else "zarr"
        self._spec = {"driver": driver, "fill_missing_data_reads": fill_missing}
        self._kvstore: dict[str, Any] = {"driver": "file", "path": f"{directory}/"}
        if ocdbt:
            self._kvstore = {"driver": "ocdbt", "base": self._kvstore, "path": ""}
        # No cache: every chunk is read once, and a reader must never see an old one.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})

    def _open(self, name: str) -> ts.Future[ts.TensorStore]:
        kvstore = self._kvstore | {"path": self._kvstore["path"] + prefix(name)}
        spec = ts.Spec({**self._spec, "kvstore": kvstore})
        return ts.open(spec, open=True, context=self._context)

    def _opened(self, names: Sequence[str]) -> Iterator[ts.TensorStore]:
        """The arrays in order, opened a batch at a time."""
        for i in range(0, len(names), _BATCH):
            pending = [(name, self._open(name)) for name in names[i : i + _BATCH]]
            for name, future in pending:
                yield self._wait(future, name)

    def _wait(self, future: ts.Future[Any], leaf: str) -> Any:
        try:
            return future.result()
        except ValueError as error:  # TensorStore's one type for whatever is wrong with the data
            why = f"cannot be read from {self._directory}: {error}"
            raise DamagedCheckpointError(f"{leaf}: {why}") from error

    def read_arrays(self, reads: Sequence[ArrayRead]) -> Arrays:
        """See :class:`ArrayStore`."""
        arrays = self._opened([read.name for read in reads])
        pending = [
            [array[tuple(slice(*span) for span in box)].read() for box in read.regions]
            for read, array in zip(reads, arrays, strict=True)
        ]
        return [
            [np.asarray(self._wait(future, read.leaf)) for future in futures]
            for read, futures in zip(reads, pending, strict=True)
        ]
