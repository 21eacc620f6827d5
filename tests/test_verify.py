"""`verify` and its command: what they find, what they say of it, and what they cannot check."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as v0
import orbax.checkpoint.experimental.v1 as ocp
import pytest
from google.protobuf.duration_pb2 import Duration

import flax_ckpt as fc
from flax_ckpt import cli, inspection
from flax_ckpt.errors import CheckpointNotFoundError, InvalidLayoutError
from flax_ckpt.storage import deletion
from flax_ckpt.storage.record import Record
from torture.damage import values

TREE = {"w": np.arange(1000.0), "b": np.ones(3), "text": "hello", "n": 3, "none": None}


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    fc.save_checkpointables(tmp_path / "ckpt", {"state": TREE, "config": Duration(seconds=3)})
    return tmp_path / "ckpt"


def flip(path: Path, position: int = -2) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def flip_leaf(tree: Path, name: str) -> None:
    """A byte of the first chunk of an array of rank 1."""
    ref = values(tree)[f"{name}/c/0".encode()]
    flip(tree / ref.file, ref.offset + 3)


def only(found: fc.Verification) -> Any:
    (one,) = found.checkpoints
    return one


def test_a_whole_checkpoint(ckpt: Path) -> None:
    found = fc.verify(ckpt)
    assert found.ok
    one = only(found)
    assert (one.leaves, one.files, one.unchecked, one.count) == ((), (), (), 4)
    assert one.nbytes > 8024
    assert str(found).startswith(f"{ckpt}: whole, 4 leaves, ")
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.path = "elsewhere"  # type: ignore[misc]


def test_damaged_leaves_and_files_are_listed(ckpt: Path) -> None:
    flip_leaf(ckpt / "state", "w")
    flip_leaf(ckpt / "state", "b")
    flip(ckpt / "config/proto.pbtxt")
    (ckpt / "commit_success.txt").unlink()
    found = fc.verify(ckpt)
    assert not found.ok
    one = only(found)
    assert [path for path, _ in one.leaves] == ["state/b", "state/w"]
    assert all(why.startswith("damaged: bytes ") for _, why in one.leaves)
    files = dict(one.files)
    assert set(files) == {str(ckpt / "config/proto.pbtxt"), str(ckpt / "commit_success.txt")}
    assert "the file is missing" in files[str(ckpt / "commit_success.txt")]
    text = str(found)
    assert f"{ckpt}: DAMAGED, 4 leaves" in text
    assert "\n  leaf state/w: damaged: bytes " in text
    assert f"\n  file {ckpt}/config/proto.pbtxt: CRC-32C " in text


def test_a_damaged_description_of_a_tree_is_a_file(ckpt: Path) -> None:
    flip(ckpt / "state/manifest.ocdbt")
    one = only(fc.verify(ckpt))
    assert one.leaves == ()
    assert [path for path, _ in one.files] == [str(ckpt / "state/manifest.ocdbt")]


def test_a_damaged_index_is_a_file(ckpt: Path) -> None:
    ends = [ref.offset + ref.length for ref in values(ckpt / "state").values()]
    (data,) = (ckpt / "state/d").iterdir()
    flip(data, max(ends) + 60)
    one = only(fc.verify(ckpt))
    assert one.leaves == ()
    assert data.name in str(one)


@pytest.mark.parametrize("ours", [True, False])
def test_a_record_that_is_damaged_or_lost(ckpt: Path, ours: bool) -> None:
    if ours:
        flip(ckpt / "flax_ckpt.json")
    else:
        (ckpt / "flax_ckpt.json").unlink()
    found = fc.verify(ckpt)
    assert not found.ok
    assert "flax_ckpt.json" in str(found)


def test_strings_are_leaves(ckpt: Path) -> None:
    flip(ckpt / "state/_strings.json")
    one = only(fc.verify(ckpt))
    assert [path for path, _ in one.leaves] == ["state/text"]
    assert [path for path, _ in one.files] == [str(ckpt / "state/_strings.json")]


@pytest.mark.parametrize("zarr3", [True, False])
def test_plain_files(tmp_path: Path, zarr3: bool) -> None:
    context = fc.Context()
    context.array.saving.use_ocdbt, context.array.saving.use_zarr3 = False, zarr3
    with context:
        fc.save(tmp_path / "ckpt", TREE)
    assert fc.verify(tmp_path / "ckpt").ok
    flip(tmp_path / "ckpt/state/w" / ("c/0" if zarr3 else "0"))
    one = only(fc.verify(tmp_path / "ckpt"))
    assert [path for path, _ in one.leaves] == ["state/w"]
    assert one.files == ()
    flip(tmp_path / "ckpt/state/b" / ("zarr.json" if zarr3 else ".zarray"))
    assert len(only(fc.verify(tmp_path / "ckpt")).files) == 2  # then no leaf can be read


def test_large_arrays_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "_BATCH", 4000)
    context = fc.Context()
    context.array.saving.storage_options.chunk_byte_size = 1000
    tree = {"a": np.arange(3000.0), "b": np.arange(6000.0).reshape(2, 3000), "c": np.ones(())}
    with context:
        fc.save(tmp_path / "ckpt", tree)
    assert only(fc.verify(tmp_path / "ckpt")).nbytes > 9001 * 8
    flip_leaf(tmp_path / "ckpt/state", "a")
    assert [path for path, _ in only(fc.verify(tmp_path / "ckpt")).leaves] == ["state/a"]


# What Orbax wrote.


def orbax_save(path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        noise = np.random.default_rng(0).normal(size=1000)
        ocp.save(path, {"w": noise, "j": jnp.ones(7), "text": "hello", "n": 3})
    return path


def test_of_orbax_it_says_what_it_cannot_check(tmp_path: Path) -> None:
    path = orbax_save(tmp_path / "ckpt")
    found = fc.verify(path)
    assert found.ok
    assert only(found).count == 4
    assert only(found).unchecked == (
        "3 of 3 arrays have no checksum: they were only decoded",
        "files beside the arrays have no checksums: JSON was only parsed",
    )
    assert "not checked: 3 of 3 arrays" in str(found)
    (path / "_CHECKPOINT_METADATA").write_bytes(b"{")
    assert [name for name, _ in only(fc.verify(path)).files] == [str(path / "_CHECKPOINT_METADATA")]


def test_what_of_orbax_does_not_decode_is_damaged(tmp_path: Path) -> None:
    path = orbax_save(tmp_path / "ckpt")
    for data in (path / "state").glob("ocdbt.process_0/d/*"):
        data.write_bytes(data.read_bytes()[:40])
    one = only(fc.verify(path))
    assert not one.ok
    assert str(path / "state") in str(one)


def test_a_flat_checkpoint_of_v0(tmp_path: Path) -> None:
    with v0.PyTreeCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "flat", {"w": np.ones(4)})
    found = fc.verify(tmp_path / "flat")
    assert found.ok
    assert only(found).count == 1


# Roots.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with fc.CheckpointCallback(tmp_path / "run", every_n_steps=1, keep_last=None) as callback:
        for step in (1, 2, 10):
            state = {"params": {"w": jnp.full(4, float(step))}, "step": step}
            callback.on_step_end(step, state, metrics={"loss": 1.0})
    return tmp_path / "run"


def test_all_steps_of_a_root(root: Path) -> None:
    flip_leaf(root / "2/params", "w")
    (root / "notes.txt").write_text("mine")
    (root / "logs").mkdir()
    found = fc.verify(root)
    assert [Path(one.path).name for one in found.checkpoints] == ["1", "2", "10"]
    assert [one.ok for one in found.checkpoints] == [True, False, True]
    assert not found.ok
    assert found.unchecked == ()


def test_what_else_is_in_a_root_is_named(root: Path) -> None:
    with fc.CheckpointCallback(root, every_n_steps=1, keep_last=None) as callback:
        state, step = callback.restore_or_init({"params": {"w": jnp.ones(4)}, "step": 0}, step=1)
        callback.on_step_end(step + 1, state)
    shutil.copytree(root / "1", root / "3.orbax-checkpoint-tmp")
    found = fc.verify(root)
    assert found.ok
    assert [Path(one.path).name for one in found.checkpoints] == ["1", "2"]
    left, superseded = found.unchecked
    assert left.startswith(f"{root}/3.orbax-checkpoint-tmp is unfinished: the save ")
    assert superseded == f"{root}/superseded has steps that were moved aside: verify it by its path"
    assert len(fc.verify(root / "superseded").checkpoints) == 2


@pytest.mark.parametrize(
    ("make", "kind", "text"),
    [
        (lambda path: None, CheckpointNotFoundError, "does not exist"),
        (lambda path: path.mkdir(), CheckpointNotFoundError, "has no checkpoint; it has: nothing"),
        (lambda path: path.write_text("x"), InvalidLayoutError, "is a file"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, make: Any, kind: Any, text: str) -> None:
    make(tmp_path / "it")
    with pytest.raises(kind, match=text):
        fc.verify(tmp_path / "it")


def test_unfinished_things_are_refused(ckpt: Path) -> None:
    with pytest.raises(InvalidLayoutError, match="is one checkpointable of the checkpoint"):
        fc.verify(ckpt / "state")
    unfinished = ckpt.rename(ckpt.with_name("ckpt.orbax-checkpoint-tmp"))
    with pytest.raises(InvalidLayoutError, match="the save that made it did not commit"):
        fc.verify(unfinished)
    fc.partial.save(ckpt, {"a": np.ones(2)})
    session = Path(f"{ckpt}.flax_ckpt.partial_save")
    with pytest.raises(InvalidLayoutError, match="an unfinished partial save"):
        fc.verify(session)
    unfinished.rename(ckpt)
    assert str(session) in fc.verify(ckpt.parent).unchecked[0]


def test_a_partial_save_when_it_is_complete(tmp_path: Path) -> None:
    fc.partial.save(tmp_path / "ckpt", {"a": np.ones(2000)})
    fc.partial.save(tmp_path / "ckpt", {"b": np.ones(2), "t": "x"})
    fc.partial.finalize(tmp_path / "ckpt")
    found = fc.verify(tmp_path / "ckpt")
    assert (found.ok, only(found).count) == (True, 3)


# Deletion.


def test_a_checkpointable_that_is_being_deleted_is_left_out(ckpt: Path) -> None:
    metadata = json.loads((ckpt / "_CHECKPOINT_METADATA").read_bytes())
    deletion.begin(str(ckpt), deletion.DeletionRecord.of(metadata, "config"))
    (ckpt / "config/proto.pbtxt").unlink()
    found = fc.verify(ckpt)
    assert found.ok, str(found)
    assert only(found).unchecked == ("'config', whose deletion was not finished",)


@pytest.mark.parametrize("by", ["us", "orbax"])
def test_a_checkpointable_that_was_deleted_is_not_missed(ckpt: Path, by: str) -> None:
    if by == "us":
        fc.delete(ckpt, checkpointable_name="config")
    else:
        ocp.delete(ckpt, checkpointable_name="config")
    found = fc.verify(ckpt)
    assert found.ok, str(found)
    assert not (ckpt / "config").exists()


def test_one_that_is_lost_without_a_deletion_is_missed(ckpt: Path) -> None:
    shutil.rmtree(ckpt / "config")
    assert [path for path, _ in only(fc.verify(ckpt)).files] == [str(ckpt / "config/proto.pbtxt")]


def test_a_step_that_is_deleted_meanwhile_is_left_out(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Record.read

    def read(self: Record, name: str, *most: int) -> bytes:
        if f"{root}/2" in self.directory and (root / "2").exists():
            fc.delete(root / "2")
        return real(self, name, *most)

    monkeypatch.setattr(Record, "read", read)
    found = fc.verify(root)
    assert found.ok, str(found)
    assert [Path(one.path).name for one in found.checkpoints] == ["1", "10"]
    monkeypatch.undo()


def test_a_checkpoint_that_is_replaced_meanwhile_is_read_again(
    ckpt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, times = Record.read, iter([True])

    def read(self: Record, name: str, *most: int) -> bytes:
        if next(times, False):
            fc.save_checkpointables(ckpt, {"state": {"other": np.ones(5)}}, overwrite=True)
        return real(self, name, *most)

    monkeypatch.setattr(Record, "read", read)
    found = fc.verify(ckpt)
    assert (found.ok, only(found).count) == (True, 1), str(found)


# Permissions and users' handlers.


@contextlib.contextmanager
def nobody() -> Iterator[Path]:
    """A directory of a user to whom permissions apply, who this process is meanwhile."""
    folder = Path(tempfile.mkdtemp())
    was = os.geteuid()
    try:
        if was == 0:
            os.chown(folder, 65534, 65534)
            os.seteuid(65534)
        yield folder
    finally:
        for directory, _, _ in os.walk(folder):
            os.chmod(directory, 0o700)
        os.seteuid(was)
        shutil.rmtree(folder)


def test_a_file_that_nobody_may_read_is_named() -> None:
    with nobody() as folder:
        fc.save(folder / "run/1", TREE)
        fc.save(folder / "run/2", TREE)
        (folder / "run/1/state/_sharding").chmod(0)
        (data,) = (folder / "run/1/state/d").iterdir()
        found = fc.verify(folder / "run")
        assert [one.ok for one in found.checkpoints] == [False, True]
        assert f"file {folder}/run/1/state/_sharding: [Errno 13] Permission denied" in str(found)
        data.chmod(0)
        assert f"Permission denied: '{data}'" in str(fc.verify(folder / "run/1"))
        (folder / "run/2").chmod(0)
        assert [one.ok for one in fc.verify(folder / "run").checkpoints] == [False, False]


class Blob:
    def __init__(self, data: bytes) -> None:
        self.data = data


class BlobHandler:
    async def save(self, directory: Any, checkpointable: Blob) -> Any:
        async def write() -> None:
            path = await directory.await_creation()
            (path / "blob").write_bytes(checkpointable.data)

        return write()

    async def load(self, directory: Any, abstract_checkpointable: Any = None) -> Any:
        async def read() -> Blob:
            return Blob((directory / "blob").read_bytes())

        return read()

    async def metadata(self, directory: Any) -> None: ...

    def is_handleable(self, checkpointable: Any) -> bool:
        return isinstance(checkpointable, Blob)

    def is_abstract_handleable(self, abstract_checkpointable: Any) -> bool:
        return isinstance(abstract_checkpointable, type)


def test_files_of_a_users_handler(tmp_path: Path) -> None:
    registry = fc.handlers.local_registry()
    registry.add(BlobHandler)
    context = fc.Context()
    context.checkpointables.registry = registry
    with context:
        fc.save_checkpointables(tmp_path / "ckpt", {"blob": Blob(b"0123"), "state": {"n": 1}})
    assert fc.verify(tmp_path / "ckpt").ok  # the handler is not needed
    flip(tmp_path / "ckpt/blob/blob")
    one = only(fc.verify(tmp_path / "ckpt"))
    assert [path for path, _ in one.files] == [str(tmp_path / "ckpt/blob/blob")]
    with context:
        found = fc.load_checkpointables(tmp_path / "ckpt", on_damage="skip")
    assert found == {"blob": fc.PLACEHOLDER, "state": {"n": 1}}


@pytest.mark.parametrize("kept", ["_CHECKPOINT_METADATA", "params", ""])
def test_a_step_that_was_not_copied_to_the_end_is_not_whole(root: Path, kept: str) -> None:
    for entry in (root / "10").iterdir():
        if entry.name != kept:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    found = fc.verify(root)
    assert [one.ok for one in found.checkpoints] == [True, True, False], str(found)


def test_a_part_that_is_missing_from_what_orbax_wrote_is_named(tmp_path: Path) -> None:
    path = orbax_save(tmp_path / "ckpt")
    shutil.rmtree(path / "state")
    assert only(fc.verify(path)).files == ((f"{path}/state", "the checkpointable is missing"),)


def test_of_other_parts_that_orbax_wrote_it_says_that_it_does_not_read_them(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with v0.CheckpointManager(tmp_path) as manager:
            arguments = v0.args.Composite(
                state=v0.args.StandardSave({"w": np.ones(3)}), cfg=v0.args.JsonSave({"a": 1})
            )
            manager.save(1, args=arguments)
    found = only(fc.verify(tmp_path / "1"))
    assert "'cfg', which is no PyTree: its files were not read" in found.unchecked


def test_a_link_is_named_with_what_to_do(ckpt: Path) -> None:
    (ckpt / "flax_ckpt.json").rename(ckpt.parent / "blob")
    (ckpt / "flax_ckpt.json").symlink_to("../blob")
    ((_, why),) = only(fc.verify(ckpt)).files
    assert why.endswith("is followed; copy it with what they lead to, as cp -RL does")


# The command.


def test_the_command(root: Path, ckpt: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(root), str(ckpt)]) == 0
    assert capsys.readouterr().out.count(": whole, ") == 4
    flip_leaf(root / "2/params", "w")
    assert cli.main(["verify", str(root), str(ckpt)]) == 1
    out = capsys.readouterr().out
    assert f"{root}/2: DAMAGED" in out
    assert "\n  leaf params/w: damaged: bytes" in out
    assert cli.main(["verify", "--json", str(root), str(ckpt)]) == 1
    first, second = json.loads(capsys.readouterr().out)
    assert (first["ok"], second["ok"]) == (False, True)
    assert first["checkpoints"][1]["leaves"][0][0] == "params/w"


def test_the_command_where_there_is_no_checkpoint(
    ckpt: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["verify", str(ckpt.parent / "other"), str(ckpt)]) == 2
    out, err = capsys.readouterr()
    assert ": whole, " in out
    assert "does not exist" in err
    for wrong in ([], ["verify"], ["show", "x"]):
        with pytest.raises(SystemExit) as left:
            cli.main(wrong)
        assert left.value.code == 2
    capsys.readouterr()


def test_the_command_stops_when_nobody_reads_on(root: Path) -> None:
    program = [sys.executable, "-m", "flax_ckpt", "verify", *[str(root)] * 3]
    with subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as command:
        assert command.stdout is not None
        command.stdout.close()
        _, said = command.communicate(timeout=120)
    assert (command.returncode, said) == (141, b"")


def test_the_command_asks_for_no_device(root: Path) -> None:
    """With a platform that is not there, JAX could not make one."""
    program = [sys.executable, "-m", "flax_ckpt", "verify", str(root)]
    environment = {**os.environ, "JAX_PLATFORMS": "nonesuch"}
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count(": whole, ") == 3
