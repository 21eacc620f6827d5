"""Whatever happens to the bytes of a checkpoint: an error that says where, or the right values."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_ckpt as fc
from flax_ckpt.errors import DamagedCheckpointError, FlaxCkptError, FormatError
from flax_ckpt.format.arrays import Encoding
from flax_ckpt.format.ocdbt import ValueRef
from flax_ckpt.storage.database import Database
from flax_ckpt.storage.record import Record

FLIPS_PER_FILE = 160
# Orbax asks whether these are there; their content is for people.
UNREAD = {"orbax.checkpoint", "commit_success.txt"}


def sharded(values: Any) -> jax.Array:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    return jax.device_put(values, NamedSharding(mesh, PartitionSpec("x", "y")))


def tree_of(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        "jax": jnp.asarray(rng.normal(size=(5, 3)).astype(np.float32)),
        "sharded": sharded(rng.normal(size=(8, 4)).astype(np.float32)),
        "numpy": rng.integers(0, 100, size=37),
        "key": jax.random.key(seed),
        "scalar": seed,
        "string": f"number {seed}",
        "empty": {},
    }


def save(path: Path, seed: int) -> Path:
    parts = {"state": tree_of(seed), "config": Duration(seconds=seed)}
    fc.save_checkpointables(path, parts, custom_metadata={"seed": seed})
    return path


def plain(tree: Any) -> Any:
    """Leaves as bytes and strings, so that == compares them bit for bit."""

    def leaf(value: Any) -> Any:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        array = np.asarray(value)
        return array.dtype.str, array.shape, array.tobytes()

    return jax.tree.map(leaf, tree)


def load(path: Path) -> Any:
    loaded = fc.load_checkpointables(path)
    return plain(loaded["state"]), loaded["config"].seconds, fc.metadata(path).custom_metadata


def expected(seed: int) -> Any:
    return plain(tree_of(seed)), seed, {"seed": seed}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pristine") / "ckpt", 1)


@pytest.fixture
def ckpt(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "ckpt"))


def files_of(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def problem(path: Path, file: str) -> str | None:
    """What is wrong with how a load of a checkpoint with a damaged `file` ends; None: nothing."""
    try:
        found = load(path)
    except FormatError as error:
        clues = [file, os.path.basename(file), *tree_of(1)]
        if file.startswith("state/d/"):
            return None if any(clue in str(error) for clue in clues) else f"names nothing: {error}"
        return None if str(path / file) in str(error) or file in str(error) else str(error)
    except Exception as error:
        return f"untyped {type(error).__name__}: {error}"
    return None if found == expected(1) else "silently wrong"


def test_the_untouched_checkpoint_loads(ckpt: Path) -> None:
    assert load(ckpt) == expected(1)


def test_any_flipped_byte_is_noticed_or_harmless(ckpt: Path) -> None:
    rng = random.Random(0)
    wrong: list[str] = []
    noticed = 0
    for file in files_of(ckpt):
        whole = (ckpt / file).read_bytes()
        positions = range(len(whole))
        if len(whole) > FLIPS_PER_FILE:
            positions = sorted(rng.sample(positions, FLIPS_PER_FILE))
        for position in positions:
            damaged = bytearray(whole)
            damaged[position] ^= 1 << rng.randrange(8)
            (ckpt / file).write_bytes(damaged)
            found = problem(ckpt, file)
            wrong += [f"{file} byte {position}: {found}"] if found else []
        noticed += len(positions)
        (ckpt / file).write_bytes(whole)
    assert wrong == []
    assert noticed > 1000


def test_every_byte_of_a_chunk_matters(ckpt: Path) -> None:
    file, chunk = chunk_of(ckpt / "state", "numpy")
    whole = file.read_bytes()
    for position in range(chunk.offset, chunk.offset + chunk.length):
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        file.write_bytes(damaged)
        with pytest.raises(DamagedCheckpointError, match=r"^numpy: damaged: bytes \d+ to \d+ of "):
            fc.load(ckpt)


@pytest.mark.parametrize("cut", ["all", "half", "one byte"])
def test_a_file_cut_short_is_noticed_or_harmless(ckpt: Path, cut: str) -> None:
    wrong: list[str] = []
    for file in files_of(ckpt):
        whole = (ckpt / file).read_bytes()
        kept = {"all": 0, "half": len(whole) // 2, "one byte": max(len(whole) - 1, 0)}[cut]
        (ckpt / file).write_bytes(whole[:kept])
        found = problem(ckpt, file)
        wrong += [f"{file}: {found}"] if found else []
        (ckpt / file).write_bytes(whole)
    assert wrong == []


def test_a_file_with_bytes_added_is_noticed_or_harmless(ckpt: Path) -> None:
    wrong: list[str] = []
    for file in files_of(ckpt):
        whole = (ckpt / file).read_bytes()
        for more in (b"\0", b"\n", b"0" * 100):
            (ckpt / file).write_bytes(whole + more)
            found = problem(ckpt, file)
            wrong += [f"{file} + {more[:1]!r}: {found}"] if found else []
        (ckpt / file).write_bytes(whole)
    assert wrong == []


def test_a_missing_file_is_named(ckpt: Path) -> None:
    wrong: list[str] = []
    for file in files_of(ckpt):
        aside = ckpt.parent / "aside"
        (ckpt / file).rename(aside)
        try:
            found = load(ckpt)
        except FlaxCkptError as error:
            if os.path.basename(file) not in str(error):
                wrong.append(f"{file}: not named: {error}")
        except Exception as error:
            wrong.append(f"{file}: untyped {type(error).__name__}: {error}")
        else:
            if found != expected(1) or file not in {*UNREAD, "flax_ckpt.json"}:
                wrong.append(f"{file}: not missed")
        aside.rename(ckpt / file)
    assert wrong == []


@pytest.mark.parametrize("directory", ["state", "config", "state/d", "state/array_metadatas"])
def test_a_missing_directory_is_an_error(ckpt: Path, directory: str) -> None:
    shutil.rmtree(ckpt / directory)
    with pytest.raises(FlaxCkptError, match=directory):
        load(ckpt)


def replaced_by_link(file: Path) -> None:
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")


def replaced_by_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("damage", [replaced_by_link, replaced_by_directory])
def test_a_data_file_that_is_no_file_is_a_typed_error(
    ckpt: Path, damage: Callable[[Path], None]
) -> None:
    file, _ = chunk_of(ckpt / "state", "numpy")
    damage(file)
    with pytest.raises(FormatError, match=file.name):
        fc.load(ckpt)


# Stale blocks: each is whole and has its own valid checksum, but belongs to another step.


def chunk_of(state: Path, array: str) -> tuple[Path, ValueRef]:
    """The data file and place of the first chunk of an array of rank 1."""
    with Database(Record(str(state)), checked=False) as database:
        ref = database.values[f"{array}/c/0".encode()]
    assert isinstance(ref, ValueRef)
    return state / ref.file, ref


def test_a_chunk_of_an_older_step_is_caught(tmp_path: Path) -> None:
    old, new = save(tmp_path / "1", 1), save(tmp_path / "2", 2)
    old_file, old_ref = chunk_of(old / "state", "numpy")
    new_file, new_ref = chunk_of(new / "state", "numpy")
    assert (old_ref.offset, old_ref.length) == (new_ref.offset, new_ref.length)
    stale = old_file.read_bytes()[old_ref.offset :][: old_ref.length]
    assert len(stale) == 37 * 8 + Encoding().trailer
    data = bytearray(new_file.read_bytes())
    data[new_ref.offset : new_ref.offset + new_ref.length] = stale
    new_file.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="^numpy: damaged: .*its own trailer"):
        fc.load(new)


def test_the_stale_chunk_is_caught_in_a_partial_load_too(tmp_path: Path) -> None:
    old, new = save(tmp_path / "1", 1), save(tmp_path / "2", 2)
    old_file, ref = chunk_of(old / "state", "numpy")
    new_file, _ = chunk_of(new / "state", "numpy")
    data = bytearray(new_file.read_bytes())
    data[ref.offset : ref.offset + ref.length] = old_file.read_bytes()[ref.offset :][: ref.length]
    new_file.write_bytes(data)
    context = fc.Context()
    context.pytree.loading.partial_load = True
    with context:
        assert fc.load(new, {"scalar": 0}) == {"scalar": 2}
        with pytest.raises(DamagedCheckpointError, match="^numpy: "):
            fc.load(new, {"numpy": None})


def replace(old: Path, new: Path, *patterns: str) -> None:
    for pattern in patterns:
        for stale in new.glob(pattern):
            stale.unlink()
        for file in old.glob(pattern):
            shutil.copy(file, new / file.relative_to(old))


@pytest.mark.parametrize(
    "patterns",
    [
        ("state/manifest.ocdbt", "state/d/*"),
        ("state/manifest.ocdbt", "state/d/*", "state/flax_ckpt.crc32c"),
        ("state/manifest.ocdbt", "state/d/*", "state/flax_ckpt.crc32c", "state/_*"),
        ("state/_strings.json",),
        ("config/proto.pbtxt",),
        ("_CHECKPOINT_METADATA",),
    ],
)
def test_files_of_an_older_step_are_caught(tmp_path: Path, patterns: tuple[str, ...]) -> None:
    old, new = save(tmp_path / "1", 1), save(tmp_path / "2", 2)
    replace(old, new, *patterns)
    with pytest.raises(DamagedCheckpointError, match=patterns[0].rpartition("/")[2]):
        load(new)


def test_the_data_file_of_an_older_step_under_the_new_name_is_caught(tmp_path: Path) -> None:
    old, new = save(tmp_path / "1", 1), save(tmp_path / "2", 2)
    old_file, _ = chunk_of(old / "state", "numpy")
    new_file, _ = chunk_of(new / "state", "numpy")
    shutil.copy(old_file, new_file)
    with pytest.raises(DamagedCheckpointError, match=str(new)):
        load(new)


def test_two_chunks_of_one_array_exchanged_are_caught(tmp_path: Path) -> None:
    context = fc.Context()
    context.array.saving.storage_options.chunk_byte_size = 64
    with context:
        fc.save(tmp_path / "ckpt", {"w": np.arange(16.0)})
    with Database(Record(str(tmp_path / "ckpt/state")), checked=False) as database:
        refs = [database.values[f"w/c/{i}".encode()] for i in (0, 1)]
    a, b = refs
    assert isinstance(a, ValueRef)
    assert isinstance(b, ValueRef)
    file = tmp_path / "ckpt/state" / a.file
    data = bytearray(file.read_bytes())
    one, other = data[a.offset :][: a.length], data[b.offset :][: b.length]
    data[a.offset : a.offset + a.length], data[b.offset : b.offset + b.length] = other, one
    file.write_bytes(data)
    with pytest.raises(DamagedCheckpointError, match="^w: damaged"):
        fc.load(tmp_path / "ckpt")


def test_a_file_added_to_the_tree_is_not_trusted(ckpt: Path) -> None:
    shutil.copy(ckpt / "state/array_metadatas/process_0", ckpt / "state/array_metadatas/process_1")
    with pytest.raises(DamagedCheckpointError, match="process_1"):
        fc.load(ckpt)
