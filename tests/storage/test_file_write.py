"""Arrays outside the default layout: damage to them, reading them in part, several processes."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zstandard
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_ckpt as fc
from flax_ckpt.errors import DamagedCheckpointError, FormatError
from flax_ckpt.format.arrays import Encoding
from flax_ckpt.storage.database import Database
from flax_ckpt.storage.record import Record
from tests.storage.test_processes import run_two

LAYOUTS = [(o, z, c) for o, z, c in itertools.product((1, 0), repeat=3) if (o, z, c) != (1, 1, 0)]
NAMES = [
    "-".join(("ocdbt" if o else "files", f"zarr{z + 2}", "zstd"[: 4 * c])) for o, z, c in LAYOUTS
]
FLIPS = 6


def context(layout: tuple[int, int, int], chunk_bytes: int | None = None) -> fc.Context:
    made = fc.Context()
    saving = made.array.saving
    saving.use_ocdbt, saving.use_zarr3, saving.use_compression = map(bool, layout)
    saving.storage_options.chunk_byte_size = chunk_bytes
    return made


def tree() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    placed = NamedSharding(mesh, PartitionSpec("x", "y"))
    return {
        "jax": jnp.asarray(rng.normal(size=(5, 3)).astype(np.float32)),
        "sharded": jax.device_put(rng.normal(size=(8, 4)).astype(np.float32), placed),
        "numpy": rng.integers(0, 100, size=37),
        "flags": rng.integers(0, 2, size=9).astype(bool),
        "number": 7,
    }


@pytest.fixture(scope="module", params=LAYOUTS, ids=NAMES)
def pristine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pristine") / "ckpt"
    with context(request.param):
        fc.save(path, tree())
    return path


@pytest.fixture
def ckpt(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "ckpt"))


def same(loaded: Any) -> bool:
    pairs = zip(jax.tree.leaves(loaded), jax.tree.leaves(tree()), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


def state_files(path: Path) -> list[Path]:
    return sorted(file for file in (path / "state").rglob("*") if file.is_file())


def test_any_flipped_bit_is_noticed_or_harmless(ckpt: Path) -> None:
    rng = random.Random(1)
    silent: list[str] = []
    noticed = 0
    for file in state_files(ckpt):
        whole = file.read_bytes()
        for position in rng.sample(range(len(whole)), min(FLIPS, len(whole))):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.randrange(8)
            file.write_bytes(damaged)
            try:
                if not same(fc.load(ckpt)):
                    silent.append(f"{file} at {position}")
            except FormatError:
                noticed += 1
        file.write_bytes(whole)
    assert silent == []
    assert noticed > 20
    assert same(fc.load(ckpt))


def test_every_missing_file_is_noticed(ckpt: Path) -> None:
    for file in state_files(ckpt):
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises((FormatError, fc.errors.InvalidLayoutError)):
            fc.load(ckpt)
        file.write_bytes(whole)
    assert same(fc.load(ckpt))


def test_another_array_s_chunk_is_noticed_although_its_own_checksum_is_right(ckpt: Path) -> None:
    """Bytes that were written, but for another key."""
    chunks: dict[str, tuple[Path, int, int]] = {}
    if (ckpt / "state" / "manifest.ocdbt").exists():
        with Database(Record(str(ckpt / "state")), checked=True) as database:
            for key, ref in database.values.items():
                if not isinstance(ref, bytes) and key.startswith(b"sharded"):
                    place = ckpt / "state" / ref.file
                    chunks[key.decode()] = (place, ref.offset, ref.length)
    else:
        for file in (ckpt / "state" / "sharded").rglob("*"):
            if file.is_file() and file.name not in ("zarr.json", ".zarray"):
                chunks[str(file)] = (file, 0, file.stat().st_size)
    assert len(chunks) == 8
    found: dict[int, tuple[Path, int]] = {}
    for file, offset, length in chunks.values():  # of one length: compressed they may differ
        if length in found:
            other, start = found[length]
            data = other.read_bytes()[start : start + length]
            target = bytearray(file.read_bytes())
            target[offset : offset + length] = data
            file.write_bytes(target)
            break
        found[length] = (file, offset)
    with pytest.raises(DamagedCheckpointError, match="sharded"):
        fc.load(ckpt)


def test_compressible_data_becomes_small(tmp_path: Path) -> None:
    with context((1, 1, 1)):
        fc.save(tmp_path / "ckpt", {"w": np.zeros(1_000_000, np.float32)})
    assert sum(file.stat().st_size for file in state_files(tmp_path / "ckpt")) < 10_000
    assert not fc.load(tmp_path / "ckpt")["w"].any()


def test_a_frame_that_claims_to_be_huge_is_not_decoded() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    with pytest.raises(DamagedCheckpointError, match="w: has .* bytes, expected 64"):
        Encoding(zarr3=False, compressed=True).decode(np.frombuffer(frame, np.uint8), 64, "w")


# Two processes.


@pytest.mark.parametrize("layout", [(1, 1, 1), (0, 1, 0), (0, 0, 1)], ids=str)
def test_two_processes_write_it_together(tmp_path: Path, layout: tuple[int, int, int]) -> None:
    program = f"""
        saving = context.array.saving
        saving.use_ocdbt, saving.use_zarr3, saving.use_compression = map(bool, {layout})
        with context:
            fc.save(path, {{**tree(), "numpy": np.arange(5), "number": 3}})
            check(fc.load(path, {{**tree(), "numpy": np.ndarray, "number": 0}}))
        print("done", flush=True)
        leave()
    """
    for outcome in run_two(program, tmp_path / "ckpt", 20):
        assert (outcome.code, outcome.out) == (0, "done\n"), outcome.err[-3000:]
    loaded = fc.load(tmp_path / "ckpt")
    values = np.arange(96, dtype=np.float32).reshape(8, 12)
    for name in ("rows", "columns", "both", "local", "all"):
        np.testing.assert_array_equal(loaded[name], values)
    np.testing.assert_array_equal(loaded["numpy"], np.arange(5))
