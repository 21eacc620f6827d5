"""What is saved can be loaded, however large: or the save says that it cannot be."""

from __future__ import annotations

import os
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf.struct_pb2 import Struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_ckpt as fc
from flax_ckpt.errors import DamagedCheckpointError, FlaxCkptError
from flax_ckpt.format import jsons
from flax_ckpt.storage import files

MIB = 1 << 20


class Blob:
    """What a user's handler keeps in one large file."""

    def __init__(self, size: int) -> None:
        self.size = size


class BlobHandler:
    async def save(self, directory: Any, checkpointable: Blob) -> Awaitable[None]:
        async def write() -> None:
            path = await directory.await_creation()
            with open(path / "blob", "wb") as file:
                file.truncate(checkpointable.size)

        return write()

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Awaitable[Blob]:
        async def read() -> Blob:
            return Blob(os.path.getsize(directory / "blob"))

        return read()

    async def metadata(self, directory: Any) -> None:
        return None

    def is_handleable(self, checkpointable: Any) -> bool:
        return isinstance(checkpointable, Blob)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool | None:
        return None


def test_a_file_of_a_users_handler_may_have_any_size(tmp_path: Path) -> None:
    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry()
    context.checkpointables.registry.add(BlobHandler, checkpointable_name="blob")
    size = files.MAX_BYTES + 5
    with context:
        fc.save_checkpointables(tmp_path / "ckpt", {"blob": Blob(size)})
        assert fc.load_checkpointables(tmp_path / "ckpt")["blob"].size == size
        assert fc.verify(tmp_path / "ckpt").ok
        with open(tmp_path / "ckpt/blob/blob", "r+b") as file:
            file.seek(files.MAX_BYTES)
            file.write(b"\1")
        with pytest.raises(DamagedCheckpointError, match=r"blob/blob: CRC-32C"):
            fc.load_checkpointables(tmp_path / "ckpt")


def test_files_with_a_line_for_each_leaf_may_be_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_BYTES", 20_000)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))
    placed = NamedSharding(mesh, PartitionSpec("data"))
    tree = {f"{i:04}" + "x" * 50: jax.device_put(jnp.full(4, i), placed) for i in range(300)}
    tree["key"] = jax.random.key(0)
    tree |= {f"string {i}": str(i) for i in range(10)}
    fc.save(tmp_path / "ckpt", tree)
    large = [p.name for p in (tmp_path / "ckpt").rglob("*") if p.stat().st_size > files.MAX_BYTES]
    assert {"_METADATA", "_sharding", "process_0"} <= set(large)
    loaded = fc.load(tmp_path / "ckpt", tree)
    np.testing.assert_array_equal(loaded["0299" + "x" * 50], np.full(4, 299))
    assert fc.verify(tmp_path / "ckpt").ok


class Feed:
    def get_state(self) -> Any:
        return {"row": b"x" * (25 * MIB)}

    def set_state(self, state: Any) -> None: ...


STRUCT = Struct()
STRUCT["text"] = "x" * (16 * MIB)


@pytest.mark.parametrize(
    ("value", "custom"),
    [
        ({"text": "x" * (32 * MIB)}, None),
        (STRUCT, None),
        (Feed(), None),
        (1, {"numbers": [0] * (MIB - 15)}),
    ],
    ids=["characters", "message", "position", "custom metadata"],
)
def test_what_is_too_large_to_be_read_is_not_saved(tmp_path: Path, value: Any, custom: Any) -> None:
    fc.save(tmp_path / "before", {"w": 1})
    with pytest.raises(FlaxCkptError, match="expected at most"):
        fc.save_checkpointables(
            tmp_path / "ckpt", {"part": value, "a" * 50: 1}, custom_metadata=custom
        )
    assert os.listdir(tmp_path) == ["before"]


def test_strings_of_a_tree_have_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsons, "_MAX_BYTES", 1000)
    with pytest.raises(FlaxCkptError, match=r"_strings.json: found \d+ values in 10\d\d bytes"):
        fc.save(tmp_path / "ckpt", {"text": "x" * 1000})
    assert os.listdir(tmp_path) == []


def test_punctuation_within_a_string_is_no_value(tmp_path: Path) -> None:
    text = ',:[{"\\' * (MIB // 2)
    fc.save(tmp_path / "ckpt", {"text": text})
    assert fc.load(tmp_path / "ckpt") == {"text": text}
