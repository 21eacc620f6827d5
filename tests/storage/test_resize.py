"""Arrays wanted in another shape, and chunks that are missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest
import tensorstore as ts
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_ckpt as fc
from flax_ckpt.errors import DamagedCheckpointError, FormatError, TreeMismatchError
from flax_ckpt.format.arrays import Encoding
from flax_ckpt.storage.database import Database, DataFileReader
from flax_ckpt.storage.record import Record

VALUES = np.arange(1, 8 * 12 + 1, dtype=np.float32).reshape(8, 12)
SHAPES = [(8, 12), (4, 12), (8, 4), (16, 12), (8, 16), (2, 20), (40, 4), (0, 12), (4, 0), (64, 64)]
MESH = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
SPECS = [(), ("x",), ("y", "x"), ("x", "y"), (None, ("x", "y"))]


def resizing() -> fc.Context:
    context = fc.Context()
    context.array.loading.enable_padding_and_truncation = True
    return context


def resized(shape: tuple[int, ...]) -> Any:
    """What is expected, said with NumPy."""
    pads = [(0, max(0, n - m)) for n, m in zip(shape, VALUES.shape, strict=True)]
    return np.pad(VALUES, pads)[tuple(map(slice, shape))]


@pytest.fixture(scope="module", params=["small", "zstd"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    context = fc.Context()
    context.array.saving.storage_options.chunk_byte_size = 3 * 12 * 4
    context.array.saving.use_compression = request.param == "zstd"
    path = tmp_path_factory.mktemp(request.param) / "ckpt"
    with context:
        fc.save(path, {"jax": jnp.asarray(VALUES), "numpy": VALUES})
    return path


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_cut_and_filled_at_the_ends(saved: Path, shape: tuple[int, int]) -> None:
    wanted = {"jax": jax.ShapeDtypeStruct(shape, np.float32), "numpy": np.empty(shape, np.float32)}
    with resizing():
        loaded = fc.load(saved, wanted)
    assert isinstance(loaded["jax"], jax.Array)
    np.testing.assert_array_equal(loaded["jax"], resized(shape))
    np.testing.assert_array_equal(loaded["numpy"], resized(shape))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("shape", [(4, 24), (24, 8), (64, 64)], ids=str)
def test_into_eight_devices(saved: Path, shape: tuple[int, int], spec: Any) -> None:
    sharding = NamedSharding(MESH, PartitionSpec(*spec))
    wanted = {"jax": jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding), "numpy": ...}
    with resizing():
        loaded = fc.load(saved, wanted)["jax"]
    assert loaded.sharding == sharding
    for shard in loaded.addressable_shards:
        np.testing.assert_array_equal(shard.data, resized(shape)[shard.index])


@pytest.mark.parametrize("shape", [(4, 16), (16, 4)], ids=str)
def test_orbax_does_the_same(saved: Path, shape: tuple[int, int]) -> None:
    sharding = NamedSharding(MESH, PartitionSpec("x"))
    wanted = {"jax": jax.ShapeDtypeStruct(shape, np.float32, sharding=sharding), "numpy": ...}
    context = ocp.Context()
    context.array.loading.enable_padding_and_truncation = True
    with context:
        np.testing.assert_array_equal(ocp.load(saved, wanted)["jax"], resized(shape))


def test_without_the_option_another_shape_is_a_mismatch(saved: Path) -> None:
    wanted = {"jax": jax.ShapeDtypeStruct((4, 12), np.float32), "numpy": np.empty((9, 12))}
    with pytest.raises(TreeMismatchError) as raised:
        fc.load(saved, wanted)
    assert [str(d) for d in raised.value.differences] == [
        "jax: saved float32[8,12], wanted float32[4,12]",
        "numpy: saved float32[8,12] (numpy), wanted float64[9,12] (numpy)",
    ]


def test_the_rank_must_be_the_same(saved: Path) -> None:
    with resizing(), pytest.raises(TreeMismatchError, match=r"wanted float32\[96\]"):
        fc.load(saved, {"jax": jax.ShapeDtypeStruct((96,), np.float32), "numpy": ...})


def test_a_typed_key_is_not_resized(tmp_path: Path) -> None:
    """A key of zeros, or a part of one, is no key."""
    fc.save(tmp_path / "ckpt", {"k": jax.random.split(jax.random.key(0), 4)})
    with resizing(), pytest.raises(TreeMismatchError, match="k: saved key<"):
        fc.load(tmp_path / "ckpt", {"k": jax.random.split(jax.random.key(0), 8)})


def test_it_goes_together_with_a_cast(saved: Path) -> None:
    with resizing():
        wanted = {"jax": jax.ShapeDtypeStruct((9, 2), jnp.bfloat16), "numpy": ...}
        loaded = fc.load(saved, wanted)["jax"]
    np.testing.assert_array_equal(loaded, resized((9, 2)).astype(jnp.bfloat16))


def test_only_the_chunks_that_are_needed_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, packed = fc.Context(), fc.Context()
    for context in (plain, packed):
        context.array.saving.storage_options.chunk_byte_size = 1 << 20
    packed.array.saving.use_compression = True
    values = np.zeros((64, 1 << 18), np.float32)
    for context, name in ((plain, "plain"), (packed, "packed")):
        with context:
            fc.save(tmp_path / name, {"w": values})
    counts = {"bytes": 0, "chunks": 0}
    read_into, decode = DataFileReader.read_into, Encoding.decode

    def reading(self: DataFileReader, offset: int, *buffers: Any) -> None:
        counts["bytes"] += sum(map(len, buffers))
        read_into(self, offset, *buffers)

    def decoding(self: Encoding, *args: Any) -> Any:
        counts["chunks"] += 1
        return decode(self, *args)

    monkeypatch.setattr(DataFileReader, "read_into", reading)
    monkeypatch.setattr(Encoding, "decode", decoding)
    for name in ("plain", "packed"):
        with resizing():
            fc.load(tmp_path / name, {"w": np.empty((3, 1 << 18), np.float32)})
    assert counts["bytes"] < 4 * (1 << 20) + (1 << 18)
    assert counts["chunks"] == 3


# Missing chunks.


def foreign(path: Path, *, zarr3: bool = True, ocdbt: bool = True) -> Path:
    """A checkpoint by Orbax whose array `w` has lost its chunks."""
    context = ocp.Context()
    context.array.saving.use_ocdbt, context.array.saving.use_zarr3 = ocdbt, zarr3
    context.array.saving.use_compression = False
    with context:
        ocp.save(path, {"w": np.ones(5000, np.float32), "v": np.arange(3)})
    if ocdbt:
        base = f"file://{path}/state/"
        store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
        chunks = ts.KvStore.KeyRange(*(("w/c", "w/d") if zarr3 else ("w/0", "w/1")))
        store.delete_range(chunks).result()
    else:
        (path / "state" / "w" / ("c/0" if zarr3 else "0")).unlink()
    return path


@pytest.mark.parametrize("zarr3", [True, False])
@pytest.mark.parametrize("ocdbt", [True, False])
def test_chunks_that_another_writer_left_out_are_zeros_if_told_so(
    tmp_path: Path, ocdbt: bool, zarr3: bool
) -> None:
    path = foreign(tmp_path / "ckpt", zarr3=zarr3, ocdbt=ocdbt)
    with pytest.raises(DamagedCheckpointError, match="w: "):
        fc.load(path)
    context = fc.Context()
    context.array.loading.raise_array_data_missing_error = False
    with context:
        loaded = fc.load(path)
    np.testing.assert_array_equal(loaded["w"], np.zeros(5000, np.float32))
    np.testing.assert_array_equal(loaded["v"], np.arange(3))


def test_in_our_own_checkpoints_a_missing_chunk_is_an_error_whatever_is_set(tmp_path: Path) -> None:
    context = fc.Context()
    context.array.loading.raise_array_data_missing_error = False
    context.array.saving.use_ocdbt = False
    with context:
        fc.save(tmp_path / "ckpt", {"w": np.ones(5)})
        (tmp_path / "ckpt" / "state" / "w" / "c" / "0").unlink()
        with pytest.raises(DamagedCheckpointError, match="w: .*is missing"):
            fc.load(tmp_path / "ckpt")


@pytest.mark.parametrize("zarr3", [True, False])
def test_a_data_file_that_is_a_link_is_refused_whoever_reads_it(
    tmp_path: Path, zarr3: bool
) -> None:
    """TensorStore would follow it out of the checkpoint."""
    context = ocp.Context()
    context.array.saving.use_zarr3 = zarr3
    with context:
        ocp.save(tmp_path / "ckpt", {"w": np.ones(5000), "v": np.arange(9000)})
    state = tmp_path / "ckpt" / "state"
    with Database(Record(str(state)), checked=False) as database:
        used = {ref.file for ref in database.values.values() if not isinstance(ref, bytes)}
    assert used
    for file in used:
        (state / file).rename(tmp_path / "outside")
        (state / file).symlink_to(tmp_path / "outside")
        with pytest.raises(FormatError, match="is a link that leads to"):
            fc.load(tmp_path / "ckpt")
        (state / file).unlink()
        (tmp_path / "outside").rename(state / file)
    fc.load(tmp_path / "ckpt")
