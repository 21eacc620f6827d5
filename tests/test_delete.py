"""`delete`: what is asked for goes, all else stays and can be read, also after an interruption."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    DeletionInProgressError,
    DeletionRecoveryError,
    InvalidLayoutError,
)
from tests.crashes import each_death

ITEMS = {"params": {"w": np.arange(5.0)}, "opt_state": {"m": np.ones(3)}, "step": {"n": 7}}
LEFT = {name: ITEMS[name] for name in ("params", "step")}


@pytest.fixture(autouse=True)
def disk_that_answers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    fc.save_checkpointables(tmp_path / "run" / "100", ITEMS, custom_metadata={"ü": [1]})
    return tmp_path / "run" / "100"


def assert_has(path: Path, expected: dict[str, Any]) -> None:
    loaded = fc.load_checkpointables(path)
    assert sorted(loaded) == sorted(expected)
    for name, tree in expected.items():
        for key, value in tree.items():
            np.testing.assert_array_equal(loaded[name][key], value)
            np.testing.assert_array_equal(
                fc.load(path, checkpointable_name=name)[key], value, f"{name} alone"
            )
    assert fc.checkpointables_metadata(path).custom_metadata == {"ü": [1]}


def delete_item(path: Path) -> bool:
    return fc.delete(path, checkpointable_name="opt_state")


# --- A whole checkpoint -----------------------------------------------------------------------


def test_a_checkpoint_is_deleted(ckpt: Path) -> None:
    assert fc.delete(ckpt) is True
    assert os.listdir(ckpt.parent) == []
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        fc.delete(ckpt)
    assert fc.delete(ckpt, missing_ok=True) is False
    assert fc.delete(ckpt, checkpointable_name="params", missing_ok=True) is False


def test_in_the_background(ckpt: Path) -> None:
    response = fc.delete_async(ckpt)
    assert response.result() is True
    assert not ckpt.exists()
    with pytest.raises(CheckpointNotFoundError):
        fc.delete_async(ckpt)


def test_it_leaves_its_name_before_the_first_byte_goes(ckpt: Path) -> None:
    backup = ckpt.parent / "backup"
    shutil.copytree(ckpt, backup)

    def prepare(k: int) -> Any:
        shutil.rmtree(ckpt, ignore_errors=True)
        shutil.copytree(backup, ckpt)
        return lambda: fc.delete(ckpt)

    outcomes = set()
    for _ in each_death(prepare):
        outcomes.add(ckpt.exists())
        if ckpt.exists():
            assert_has(ckpt, ITEMS)
        assert fc.delete(ckpt) is True
        assert os.listdir(ckpt.parent) == ["backup"]
    assert outcomes == {True, False}


def _user_directory(root: Path) -> None:
    (root / "notes").mkdir()
    (root / "notes" / "thesis.txt").write_text("years of work")


NO_CHECKPOINT = {
    "the root of a run": (".", "is the root of a run, not one checkpoint; its steps: .*100"),
    "a user's directory": ("notes", "is no checkpoint: .*it has: thesis.txt. Nothing was deleted"),
    "an empty directory": ("empty", "is no checkpoint: .*it has: nothing"),
    "a file": ("100/orbax.checkpoint", "is a file"),
    "a checkpointable": ("100/params", "is one checkpointable of the checkpoint .*/100: give"),
    "an unfinished save": ("7.orbax-checkpoint-tmp", "is unfinished: the save that made it"),
    "a link": ("link", "is a link; delete what it leads to: .*/100"),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINT)
def test_what_is_no_checkpoint_is_never_deleted(ckpt: Path, kind: str) -> None:
    name, text = NO_CHECKPOINT[kind]
    root = ckpt.parent
    _user_directory(root)
    (root / "empty").mkdir()
    (root / "link").symlink_to(ckpt)
    shutil.copytree(ckpt, root / "7.orbax-checkpoint-tmp")
    before = sorted(root.rglob("*"))
    for more in ({}, {"missing_ok": True}, {"checkpointable_name": "params"}):
        with pytest.raises(InvalidLayoutError, match=text):
            fc.delete(root / name, **more)
    assert sorted(root.rglob("*")) == before


# --- One checkpointable -----------------------------------------------------------------------


def test_a_checkpointable_is_deleted_and_the_records_are_right(ckpt: Path) -> None:
    assert delete_item(ckpt) is True
    assert_has(ckpt, LEFT)
    assert not any("orbax-checkpoint-tmp" in name for name in os.listdir(ckpt))
    assert not (ckpt / "_CHECKPOINT_DELETION").exists()
    metadata = json.loads((ckpt / "_CHECKPOINT_METADATA").read_text())
    assert sorted(metadata["item_handlers"]) == ["params", "step"]
    listed = json.loads((ckpt / "flax_ckpt.json").read_text().splitlines()[0])["crc32c"]
    on_disk = {str(p.relative_to(ckpt)) for p in ckpt.rglob("*") if p.is_file()}
    assert on_disk - set(listed) == {"flax_ckpt.json"} | {n for n in on_disk if "/d/" in n}
    assert set(listed) <= on_disk
    with pytest.raises(CheckpointNotFoundError, match="no checkpointable 'opt_state'; it has: par"):
        delete_item(ckpt)
    assert fc.delete(ckpt, checkpointable_name="opt_state", missing_ok=True) is False
    with pytest.raises(CheckpointNotFoundError, match="no checkpointable 'opt_state'"):
        fc.load(ckpt, checkpointable_name="opt_state")


def test_damage_is_still_noticed_afterwards(ckpt: Path) -> None:
    delete_item(ckpt)
    for name in ("_CHECKPOINT_METADATA", "params/_METADATA"):
        whole = (ckpt / name).read_bytes()
        (ckpt / name).write_bytes(whole.replace(b"params", b"parans").replace(b'"w', b'"v'))
        with pytest.raises(DamagedCheckpointError, match=name):
            fc.load(ckpt, checkpointable_name="params")
        (ckpt / name).write_bytes(whole)
    shutil.rmtree(ckpt / "step")
    with pytest.raises(DamagedCheckpointError, match="the file is missing"):
        fc.load_checkpointables(ckpt)


def test_the_last_one_is_not_deleted(ckpt: Path) -> None:
    for name in ("params", "step"):
        fc.delete(ckpt, checkpointable_name=name)
    with pytest.raises(ValueError, match="only checkpointable of .*; delete the whole checkpoint"):
        delete_item(ckpt)
    assert_has(ckpt, {"opt_state": ITEMS["opt_state"]})


@pytest.mark.parametrize("name", ["metrics", "AUTO", "", ".", "..", "a/b", "_CHECKPOINT_METADATA"])
def test_names_that_no_checkpointable_has(ckpt: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not the name of a checkpointable that can be deleted"):
        fc.delete(ckpt, checkpointable_name=name)
    assert_has(ckpt, ITEMS)


def test_a_directory_that_is_no_checkpointable_stays(ckpt: Path) -> None:
    _user_directory(ckpt)
    with pytest.raises(InvalidLayoutError, match="is no checkpointable of .* which has: opt_state"):
        fc.delete(ckpt, checkpointable_name="notes")
    assert (ckpt / "notes" / "thesis.txt").exists()
    flat = ckpt.parent / "flat"
    shutil.copytree(ckpt / "params", flat)
    with pytest.raises(InvalidLayoutError, match="which has: none, being one PyTree"):
        fc.delete(flat, checkpointable_name="d")
    assert fc.delete(flat) is True


def test_an_interruption_anywhere_leaves_all_others_readable(tmp_path: Path) -> None:
    fc.save_checkpointables(tmp_path / "whole", ITEMS, custom_metadata={"ü": [1]})

    def prepare(k: int) -> Any:
        shutil.copytree(tmp_path / "whole", tmp_path / str(k))
        return lambda: delete_item(tmp_path / str(k))

    hidden = set()
    for k in each_death(prepare):
        path = tmp_path / str(k)
        pending = (path / "_CHECKPOINT_DELETION").exists()
        hidden.add(pending)
        for name, tree in LEFT.items():
            loaded = fc.load(path, checkpointable_name=name)
            assert sorted(loaded) == sorted(tree)
        assert fc.is_orbax_checkpoint(path)
        assert fc.checkpointables_metadata(path).custom_metadata == {"ü": [1]}
        if not pending and (path / "opt_state").exists():
            assert_has(path, ITEMS)
        else:
            assert_has(path, LEFT)
        if pending:
            for call in (lambda p: fc.load(p, checkpointable_name="opt_state"), fc.metadata):
                given = path if call is not fc.metadata else path / "opt_state"
                if given.exists() and (given / "_METADATA").exists():
                    with pytest.raises(DeletionInProgressError, match="begun and not ended"):
                        call(given)
            with pytest.raises(DeletionRecoveryError, match="'opt_state' .* was interrupted"):
                fc.delete(path, checkpointable_name="params")
        if pending or (path / "opt_state").exists():
            assert delete_item(path) is True
        assert_has(path, LEFT)
        assert [name for name in os.listdir(path) if "DELETION" in name] == []
    assert hidden == {True, False}


def test_what_is_being_deleted_is_left_out_with_a_warning(
    ckpt: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _interrupt(ckpt)
    assert_has(ckpt, LEFT)
    assert "'opt_state' is left out, as its deletion was not finished" in caplog.text
    assert fc.delete(ckpt) is True
    assert not ckpt.exists()


def _interrupt(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", _refuse)
        with pytest.raises(PermissionError):
            delete_item(path)


def _refuse(*args: Any, **kwargs: Any) -> None:
    raise PermissionError(1, "Operation not permitted", args[0])


BAD_RECORDS = {
    "no JSON": lambda record: "{",
    "another checkpoint's": lambda record: json.dumps(
        record
        | {
            key: record[key] | {"init_timestamp_nsecs": 1}
            for key in ("original_metadata", "updated_metadata")
        }
    ),
    "no name": lambda record: json.dumps({**record, "checkpointable_name": None}),
    "another name": lambda record: json.dumps({**record, "checkpointable_name": "params"}),
    "nothing changes": lambda record: json.dumps(
        {**record, "updated_metadata": record["original_metadata"]}
    ),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_record_that_makes_no_sense(ckpt: Path, case: str) -> None:
    _interrupt(ckpt)
    file = ckpt / "_CHECKPOINT_DELETION"
    file.write_text(BAD_RECORDS[case](json.loads(file.read_text())))
    before = sorted(ckpt.rglob("*"))
    for call in (fc.load_checkpointables, delete_item):
        with pytest.raises(DeletionRecoveryError, match="record of an unfinished deletion"):
            call(ckpt)
    assert sorted(ckpt.rglob("*")) == before
    assert fc.delete(ckpt) is True


# --- With Orbax -------------------------------------------------------------------------------

ORBAX = """
    import json, os, sys
    import numpy as np
    import orbax.checkpoint.experimental.v1 as ocp
    from orbax.checkpoint.experimental.v1._src.deletion import path_utils
    root = sys.argv[1]

    # What we deleted, and what we began to delete, at every point where it can stop.
    for name in sorted(os.listdir(root)):
        path = f"{root}/{name}"
        loaded = ocp.load_checkpointables(path, {"params": None})
        np.testing.assert_array_equal(loaded["params"]["w"], np.arange(5.0))
        if name.startswith("begun"):
            try:
                ocp.load_checkpointables(path, {"opt_state": None})
            except ocp.errors.DeletionInProgressError:
                pass
            assert ocp.delete(path, checkpointable_name="opt_state")
        if name != "whole":
            assert sorted(ocp.load_checkpointables(path)) == ["params", "step"], name

    # What Orbax deletes of ours, and what it begins to.
    assert ocp.delete(f"{root}/whole", checkpointable_name="opt_state")
    real = path_utils.delete_path
    async def stop(path, *args, **kwargs):
        raise PermissionError("stopped")
    items = {"params": {"w": np.arange(5.0)}, "opt_state": {"m": np.ones(3)}, "step": {"n": 7}}
    ocp.save_checkpointables(f"{root}/orbax", items, custom_metadata={"ü": [1]})
    path_utils.delete_path = stop
    try:
        ocp.delete(f"{root}/orbax", checkpointable_name="opt_state")
    except PermissionError:
        print("interrupted")
"""


def test_orbax_finishes_what_we_began_and_we_what_orbax_began(
    ckpt: Path, tmp_path: Path, run_child: Any
) -> None:
    root = tmp_path / "all"
    shutil.copytree(ckpt, root / "whole")

    def prepare(k: int) -> Any:
        shutil.copytree(ckpt, root / f"begun{k}")
        return lambda: delete_item(root / f"begun{k}")

    for k in each_death(prepare):
        path = root / f"begun{k}"
        if not (path / "_CHECKPOINT_DELETION").exists():
            shutil.rmtree(path)
    done = [p for p in root.iterdir() if not (p / "opt_state").exists() and "begun" in p.name]
    assert len(done) >= 2
    last = next(p for p in done if not (p / "_CHECKPOINT_DELETION").exists())
    last.rename(root / "done")
    assert run_child(ORBAX, root).stdout == "interrupted\n"
    orbax = root / "orbax"
    assert (orbax / "_CHECKPOINT_DELETION").exists()
    for path in root.iterdir():
        assert_has(path, LEFT)
    with pytest.raises(DeletionInProgressError, match="'opt_state' of .* is being deleted"):
        fc.load(orbax, checkpointable_name="opt_state")
    assert delete_item(orbax) is True
    for path in root.iterdir():
        assert_has(path, LEFT)
        with pytest.raises(CheckpointNotFoundError, match="no checkpointable 'opt_state'"):
            fc.load(path, checkpointable_name="opt_state")
        assert fc.delete(path, checkpointable_name="step") is True
        assert_has(path, {"params": ITEMS["params"]})


def test_a_changed_metadata_file_is_damage_unless_an_item_is_gone(ckpt: Path) -> None:
    """Orbax's way of writing alone is no reason to believe a file that was changed."""
    metadata = json.loads((ckpt / "_CHECKPOINT_METADATA").read_text())
    metadata["custom_metadata"] = {"ü": [2]}
    (ckpt / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata, sort_keys=True))
    with pytest.raises(DamagedCheckpointError, match="_CHECKPOINT_METADATA"):
        fc.load_checkpointables(ckpt)
    del metadata["item_handlers"]["opt_state"]
    (ckpt / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata, sort_keys=True))
    with pytest.raises(DamagedCheckpointError, match="_CHECKPOINT_METADATA"):
        fc.load_checkpointables(ckpt)
