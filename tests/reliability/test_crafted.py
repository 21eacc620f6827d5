"""Crafted files that a campaign of `torture/hostile.py` found to end in something else."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf import wrappers_pb2

import flax_ckpt as fc
from flax_ckpt.format import jsons

READS: tuple[Callable[[Path], object], ...] = fc.load, fc.metadata, fc.load_checkpointables


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fc.save(tmp_path / "a", {"w": jnp.arange(1 << 19), "n": np.arange(3)})
    for record in (tmp_path / "a" / "flax_ckpt.json", *(tmp_path / "a").rglob("flax_ckpt.crc32c")):
        record.unlink()
    return tmp_path / "a"


def test_root_metadata_of_too_many_values_are_refused_with_their_path(saved: Path) -> None:
    file = saved / "_CHECKPOINT_METADATA"
    file.write_bytes(b'{"a": [' + b"[]," * (1 << 20) + b"[]]}")
    for read in READS:
        with pytest.raises(fc.errors.FormatError, match=f"{file}: found [0-9]+ values"):
            read(saved)


@pytest.mark.parametrize("kind", ["pipe", "file"])
def test_a_folder_of_data_files_that_is_none_is_damage(saved: Path, kind: str) -> None:
    folder = saved / "state" / "d"
    folder.rename(saved.parent / "moved")
    os.mkfifo(folder) if kind == "pipe" else folder.write_bytes(b"x")
    for read in (fc.load, fc.load_checkpointables):
        with pytest.raises(fc.errors.DamagedCheckpointError, match=f"{folder}/.*is missing"):
            read(saved)


def test_a_link_in_place_of_array_metadatas_is_refused(saved: Path) -> None:
    folder = saved / "state" / "array_metadatas"
    folder.rename(saved.parent / "moved")
    folder.symlink_to(saved.parent / "moved")
    for read in READS:
        with pytest.raises(fc.errors.DamagedCheckpointError, match=f"{folder} is a link"):
            read(saved)


class Iterator:
    def get_state(self) -> int:
        return 1

    def set_state(self, state: object) -> None:
        raise AssertionError(state)


def test_a_link_in_place_of_the_positions_is_refused_before_it_is_listed(tmp_path: Path) -> None:
    fc.save_checkpointables(tmp_path / "a", {"data": Iterator()})
    (tmp_path / "a" / "flax_ckpt.json").unlink()
    folder = tmp_path / "a" / "data"
    folder.rename(tmp_path / "moved")
    folder.symlink_to(tmp_path / "moved")
    (tmp_path / "moved" / "process_0-of-1.json").rename(tmp_path / "moved" / "process_0-of-9.json")
    with pytest.raises(fc.errors.DamagedCheckpointError, match=f"{folder} is a link"):
        fc.load_checkpointables(tmp_path / "a", {"data": Iterator()})


TEXTS = {
    "many objects": (b'{"a":[' + b'{"":1},' * 700_000 + b"{}]}", 2_100_004),
    "objects in each other": (b'{"a":' * 600_000 + b"1" + b"}" * 600_000, 1_200_000),
    "strings of commas": (b'["a"' + b',"b,c{"' * 500_000 + b"]", None),
    "one string": (b'["' + b"[," * 2_000_000 + b'"]', None),
    "quotes without end": (b'"' + b'\\"' * 400_000 + b"," * 1_100_000, None),
}


@pytest.mark.parametrize("name", TEXTS)
def test_values_are_counted_outside_of_strings_and_take_no_memory(name: str) -> None:
    """The count of the last did not come back: each quote was sought the end of."""
    text, values = TEXTS[name]
    tracemalloc.start()
    try:
        if values:
            with pytest.raises(fc.errors.FormatError, match=f"file: found {values} values"):
                jsons.limited(text, "file")
        else:
            assert jsons.limited(text, "file") is text
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_text_of_a_terabyte_is_refused_before_it_is_read(tmp_path: Path) -> None:
    text = wrappers_pb2.StringValue(value="a config")
    fc.save_checkpointables(tmp_path / "a", {"config": text, "state": {"n": np.arange(3)}})
    file = tmp_path / "a" / "config" / "proto.pbtxt"
    os.truncate(file, 1 << 40)
    with pytest.raises(fc.errors.DamagedCheckpointError, match=f"{file} has {1 << 40} bytes"):
        fc.load_checkpointables(tmp_path / "a")
    found = fc.load_checkpointables(tmp_path / "a", on_damage="skip")
    assert found["config"] is fc.PLACEHOLDER
    assert found["state"]["n"].tolist() == [0, 1, 2]


def test_a_chunk_for_which_there_is_no_memory_does_not_end_the_process(
    tmp_path: Path, run_child: Any
) -> None:
    context = fc.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = True
    with context:
        fc.save(tmp_path / "a", {"n": np.arange(3)})
    (tmp_path / "a" / "flax_ckpt.json").unlink()
    file = tmp_path / "a" / "state" / "n" / "zarr.json"
    described = json.loads(file.read_bytes())
    described["shape"] = [1 << 43]
    described["chunk_grid"]["configuration"]["chunk_shape"] = [1 << 43]
    file.write_text(json.dumps(described))
    program = """
        import sys, flax_ckpt as fc
        try:
            fc.load(sys.argv[1])
        except fc.errors.DamagedCheckpointError as error:
            print(error)
    """
    said = run_child(program, tmp_path / "a").stdout
    assert said.startswith(f"n: there is no memory for a chunk of {1 << 46} bytes in {tmp_path}")


def test_a_restore_that_is_refused_holds_the_list_of_files_once(tmp_path: Path) -> None:
    with fc.training.Checkpointer(tmp_path) as run:
        run.save(1, {"w": np.ones(3)})
    body = b'{"a":"' + b"x" * (20 << 20) + b'"}'
    file = tmp_path / "1" / "flax_ckpt.json"
    file.write_bytes(body + f'\n"{crc32c.crc32c(body):08x}"\n'.encode())
    tracemalloc.start()
    try:
        with pytest.raises(fc.errors.FormatError, match=f"^{file}: format version None; this"):
            fc.restore(tmp_path, {"w": np.zeros(3)})
        assert tracemalloc.get_traced_memory()[1] < 2.5 * len(body)
    finally:
        tracemalloc.stop()
