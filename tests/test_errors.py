"""What errors say when a path is not what was wanted: what it is, and what to call."""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt import errors
from flax_ckpt.errors import CheckpointNotFoundError, InvalidLayoutError

TREE = {"params": {"w": np.ones(2)}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    root = tmp_path / "run"
    for step in (100, 1500):
        fc.save_checkpointables(root / str(step), {"params": {"w": np.ones(2)}, "n": {"step": 1}})
    return root


def test_every_error_is_ours_and_a_builtin_and_in_the_tree() -> None:
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if not issubclass(kind, Exception) or name in ("FlaxCkptError", "_StepError"):
            continue
        assert issubclass(kind, errors.FlaxCkptError)
        builtin = [base for base in kind.__mro__ if base.__module__ == "builtins"]
        assert builtin[0] is not Exception, f"{name} is no builtin that a caller would catch"
        assert f"─ {name} " in (errors.__doc__ or ""), f"{name} is not in the tree"


def test_errors_are_those_that_callers_of_orbax_catch(tmp_path: Path) -> None:
    root, there = tmp_path / "run", "has no checkpointable 'ema'; it has: params"
    wanted = {"ema": None}
    with fc.training.Checkpointer(root) as run:
        run.save_checkpointables(1, {"params": TREE})
        for call in (
            lambda: fc.load_checkpointables(root / "1", wanted),
            lambda: fc.load(root / "1", checkpointable_name="ema"),
            lambda: fc.metadata(root / "1", "ema"),
            lambda: run.load_checkpointables(1, wanted),
            lambda: run.load(1, checkpointable_name="ema"),
        ):
            with pytest.raises(KeyError) as missing:
                call()
            assert isinstance(missing.value, errors.CheckpointableNotFoundError)
            assert str(missing.value) == f"{root}/1 {there}", "without the quotes of a KeyError"
        with pytest.raises(FileNotFoundError, match=there):
            run.delete(1, checkpointable_name="ema")
    with pytest.raises(ValueError, match="1 of 1 leaves cannot be saved") as refused:
        fc.save(tmp_path / "ckpt", {"a": object()})
    assert isinstance(refused.value, errors.UnsupportedLeafError)
    assert isinstance(refused.value, TypeError)


# --- Nothing there ----------------------------------------------------------------------------

READERS: list[Callable[[Path], Any]] = [
    fc.load,
    lambda path: fc.load_async(path).result(),
    fc.load_checkpointables,
    fc.metadata,
    fc.checkpointables_metadata,
    fc.restore,
    fc.delete,
]


@pytest.mark.parametrize("read", READERS)
def test_a_path_that_is_not_there(run: Path, read: Callable[[Path], Any]) -> None:
    text = f"{run}/150 does not exist; {run} has: 100, 1500; did you mean {run}/1500?"
    with pytest.raises(FileNotFoundError) as raised:
        read(run / "150")
    assert str(raised.value) == text
    with pytest.raises(CheckpointNotFoundError) as raised:
        read(run.parent / "Run" / "100" / "params")
    assert f"{run.parent} has: run; did you mean {run}?" in str(raised.value)
    with pytest.raises(CheckpointNotFoundError) as raised:
        read(run / "quite_another_name")
    assert str(raised.value).endswith(f"; {run} has: 100, 1500")


def test_a_save_that_did_not_commit_is_named(run: Path) -> None:
    (run / "2000.orbax-checkpoint-tmp").mkdir()
    with pytest.raises(CheckpointNotFoundError, match="a save of it has begun and not committed"):
        fc.load(run / "2000")


# --- A root for a step, a step for a root -------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [["7", "12"], ["0007", "0012"], ["step_7", "step_12"], ["ck_000007", "ck_000012"]],
)
def test_a_root_where_one_checkpoint_is_wanted(run: Path, names: list[str]) -> None:
    for old, new in zip(("100", "1500"), names, strict=True):
        (run / old).rename(run / new)
    (run / "metadata").mkdir()
    (run / "9.orbax-checkpoint-tmp").mkdir()
    last = run / names[-1]
    for read in (fc.load, fc.load_checkpointables, fc.metadata, fc.delete):
        with pytest.raises(InvalidLayoutError) as raised:
            read(run)
        text = str(raised.value)
        assert text.startswith(
            f"{run} is the root of a run, not one checkpoint; its steps: {', '.join(names)}."
        )
        assert str(last) in text
        assert "flax_ckpt." in text
    assert not fc.is_orbax_checkpoint(run)
    assert fc.restore(run).step == fc.restore(last).step == 12


def test_a_root_of_many_steps_names_the_last(tmp_path: Path) -> None:
    fc.save(tmp_path / "0", TREE)
    for step in range(1, 30):
        shutil.copytree(tmp_path / "0", tmp_path / str(step))
    with pytest.raises(InvalidLayoutError, match="its steps: …, 18, 19, .*, 29. Give one of"):
        fc.load(tmp_path)


def test_a_step_where_a_root_is_wanted(run: Path) -> None:
    before = sorted(run.rglob("*"))
    step = run / "100"
    for directory, text in (
        (step, f"{step} is one checkpoint, not the root of a run, .* give {run}. Nothing was writ"),
        (step / "params", f"is in the checkpoint {step}, not the root of a run, .*: give {run}"),
        (step / "new", f"is in the checkpoint {step}, not the root of a run"),
        (step / "_CHECKPOINT_METADATA", "is a file; the root of a run is a directory"),
        (run / "7.orbax-checkpoint-tmp", "is unfinished: .*: it cannot be the root of a run"),
    ):
        with pytest.raises(InvalidLayoutError, match=text):
            fc.CheckpointCallback(directory)
    text = f"100/params is one checkpointable of the checkpoint {step}: give that path"
    with pytest.raises(InvalidLayoutError, match=text):
        fc.restore(step / "params", TREE)
    with pytest.raises(CheckpointNotFoundError, match="is one checkpoint, not a root with step 7"):
        fc.restore(step, step=7)
    assert sorted(run.rglob("*")) == before


# --- Part of a checkpoint, unfinished, of another kind --------------------------------------------


def test_the_directory_of_a_tree_loads_as_a_tree(run: Path) -> None:
    """Orbax refuses it. The bytes are checked as in the whole checkpoint."""
    np.testing.assert_array_equal(fc.load(run / "100" / "params")["w"], np.ones(2))
    file = run / "100" / "params" / "_METADATA"
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(errors.DamagedCheckpointError, match="_METADATA"):
        fc.load(run / "100" / "params")


def test_the_directory_of_another_checkpointable_names_the_whole(run: Path) -> None:
    fc.save_checkpointables(run / "7", {"params": {"w": 1}, "extra": {"text": [{"not": "a tree"}]}})
    os.remove(run / "7" / "params" / "_METADATA")
    with pytest.raises(InvalidLayoutError) as raised:
        fc.load(run / "7" / "params")
    assert f"is one checkpointable of the checkpoint {run / '7'}: give that path" in str(
        raised.value
    )
    assert "flax_ckpt.load or flax_ckpt.delete with checkpointable_name='params'" in str(
        raised.value
    )


def test_leftovers_say_what_they_are(run: Path) -> None:
    for name, text in (
        ("5.orbax-checkpoint-tmp", "is unfinished: the save that made it did not commit"),
        ("5.deleted.orbax-checkpoint-tmp", "is unfinished: what an interrupted deletion left"),
    ):
        shutil.copytree(run / "100", run / name)
        for read in (fc.load, fc.load_checkpointables, fc.metadata, fc.delete):
            with pytest.raises(InvalidLayoutError, match=f"{name} {text}"):
                read(run / name)
        assert not fc.is_orbax_checkpoint(run / name)


def test_safetensors_say_what_they_are(tmp_path: Path) -> None:
    directory = tmp_path / "model"
    directory.mkdir()
    file = directory / "model.safetensors"
    file.write_bytes(b"\2\0\0\0\0\0\0\0{}")
    with pytest.raises(InvalidLayoutError, match="is a safetensors file, no checkpoint: load it"):
        fc.load(file)
    with pytest.raises(InvalidLayoutError, match="holds safetensors files.*: model.safetensors"):
        fc.load(directory)


def test_what_is_a_checkpoint(run: Path) -> None:
    flat = run.parent / "flat"
    shutil.copytree(run / "100" / "params", flat)
    composite = run.parent / "composite"  # as old v0 writes it: no metadata at the root
    shutil.copytree(run / "100" / "params", composite / "params")
    odd = run.parent / "about.partial_save_and_more" / "7"
    shutil.copytree(run / "100", odd)
    for path in (run / "100", flat, composite, odd):
        assert fc.is_orbax_checkpoint(path), path
    (run.parent / "notes").mkdir()
    no = (run, run / "100" / "params", run / "nothing", flat / "_METADATA", run.parent / "notes")
    for path in no:
        assert not fc.is_orbax_checkpoint(path), path


# --- Permissions ----------------------------------------------------------------------------------


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o700, 0o750, 0o2770])
def test_every_directory_of_a_checkpoint_gets_the_mode(tmp_path: Path, mode: int) -> None:
    """Orbax sets it for the checkpoint's directory alone; files keep the umask's, as there."""
    context = fc.Context()
    context.file.path_permission_mode = mode
    paths = [tmp_path / "a" / "b" / name for name in ("whole", "parts")]
    with context:
        fc.save_checkpointables(paths[0], {"params": TREE, "other": {"n": 1}})
        fc.save(paths[0], TREE, overwrite=True)
        fc.partial.save(paths[1], TREE)
        session = tmp_path / "a" / "b" / "parts.flax_ckpt.partial_save" / "part_000000"
        assert {mode_of(p) for p in (session, *session.rglob("*")) if p.is_dir()} == {mode}
        fc.partial.finalize(paths[1])
    (tmp_path / "file").touch()
    for path in paths:
        directories = [p for p in (path, *path.rglob("*")) if p.is_dir()]
        assert len(directories) >= 3
        assert {mode_of(p) for p in directories} == {mode}
        assert {mode_of(p) for p in path.rglob("*") if p.is_file()} == {mode_of(tmp_path / "file")}
        assert fc.load(path)["params"]["w"].tolist() == [1, 1]
    (tmp_path / "directory").mkdir()
    assert mode_of(tmp_path / "a") == mode_of(tmp_path / "directory")


@contextlib.contextmanager
def an_ordinary_user() -> Iterator[None]:
    """The superuser may write everywhere."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_directory_that_cannot_be_written_to() -> None:
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o777)
        root = Path(place) / "run"
        with an_ordinary_user():
            root.mkdir()
            fc.save(root / "1", TREE)
            root.chmod(0o555)
            for act in (
                lambda: fc.save(root / "2", TREE),
                lambda: fc.save(root / "1", TREE, overwrite=True),
                lambda: fc.partial.save(root / "2", TREE),
                lambda: fc.delete(root / "1"),
            ):
                with pytest.raises(PermissionError, match=f"{root}/[12]"):
                    act()
            assert os.listdir(root) == ["1"]
            assert fc.load(root / "1")["params"]["w"].tolist() == [1, 1]
            root.chmod(0o755)
