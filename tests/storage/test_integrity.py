"""Damage of special kinds; torture/damage.py tries each byte, length, file, chunk and block."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt.errors import DamagedCheckpointError, FlaxCkptError, FormatError
from flax_ckpt.format.arrays import Encoding
from flax_ckpt.format.ocdbt import ValueRef
from flax_ckpt.storage.database import Database
from flax_ckpt.storage.record import Record
from torture import damage


def save(path: Path, seed: int) -> Path:
    return damage.save(path, seed, 8)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("pristine") / "ckpt", 1)


@pytest.fixture
def ckpt(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "ckpt"))


def problem(path: Path, file: str) -> str | None:
    """What is wrong with how a load of a checkpoint with a damaged `file` ends; None: nothing."""
    try:
        found = damage.load(path)
    except FormatError as error:
        clues = [file, os.path.basename(file), *damage.tree_of(1, 8)]
        if file.startswith("state/d/"):
            return None if any(clue in str(error) for clue in clues) else f"names nothing: {error}"
        return None if str(path / file) in str(error) or file in str(error) else str(error)
    except Exception as error:
        return f"untyped {type(error).__name__}: {error}"
    return None if found == damage.expected(1, 8) else "silently wrong"


def test_the_untouched_checkpoint_loads(ckpt: Path) -> None:
    assert damage.load(ckpt) == damage.expected(1, 8)


def test_a_file_with_bytes_added_is_noticed_or_harmless(ckpt: Path) -> None:
    wrong: list[str] = []
    for file in damage.files_in(ckpt):
        whole = (ckpt / file).read_bytes()
        for more in (b"\0", b"\n", b"0" * 100):
            (ckpt / file).write_bytes(whole + more)
            found = problem(ckpt, file)
            wrong += [f"{file} + {more[:1]!r}: {found}"] if found else []
        (ckpt / file).write_bytes(whole)
    assert wrong == []


@pytest.mark.parametrize("directory", ["state", "config", "state/d", "state/array_metadatas"])
def test_a_missing_directory_is_an_error(ckpt: Path, directory: str) -> None:
    shutil.rmtree(ckpt / directory)
    with pytest.raises(FlaxCkptError, match=directory):
        damage.load(ckpt)


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
    assert len(stale) == 2000 * 8 + Encoding().trailer
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
        assert fc.load(new, {"text": {"string": str}}) == {"text": {"string": "number 2"}}
        with pytest.raises(DamagedCheckpointError, match="^numpy: "):
            fc.load(new, {"numpy": None})


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
