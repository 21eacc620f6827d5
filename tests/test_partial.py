"""`partial`: leaves of several calls become one ordinary checkpoint, or stay as they were."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    DamagedCheckpointError,
    DuplicateNameError,
    FormatError,
    InvalidLayoutError,
)
from tests.crashes import each_death, failing_at

FIRST = {"layers": {"a": np.arange(6.0).reshape(2, 3)}, "step": 7, "name": "first", "none": None}
SECOND = {"layers": {"b": np.ones(3, np.int8)}, "other": "zweite", "deep": {"list": [1.5, "x"]}}
WHOLE = {**FIRST, **SECOND, "layers": {**FIRST["layers"], **SECOND["layers"]}}


@pytest.fixture(autouse=True)
def disk_that_answers_at_once(request: pytest.FixtureRequest) -> None:
    """Nothing here cuts the power but one test: syncs would be most of the time."""
    if "durable" not in request.node.name:
        request.getfixturevalue("monkeypatch").setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "made" / "ckpt"


def session(path: Path) -> Path:
    return path.parent / f"{path.name}.flax_ckpt.partial_save"


def save_both(path: Path) -> None:
    fc.partial.save(path, FIRST)
    fc.partial.save(path, SECOND)


def assert_whole(path: Path, expected: Any = WHOLE) -> None:
    jax.tree.map(np.testing.assert_array_equal, fc.load(path), expected)


def test_the_result_is_an_ordinary_checkpoint(path: Path) -> None:
    save_both(path)
    assert not path.exists()
    fc.partial.finalize(path)
    fc.save(path.parent / "other", WHOLE)
    assert_whole(path)
    assert sorted(os.listdir(path.parent)) == ["ckpt", "other"]
    assert sorted(os.listdir(path)) == sorted(os.listdir(path.parent / "other"))
    assert sorted(os.listdir(path / "state")) == sorted(os.listdir(path.parent / "other/state"))
    metadata = [json.loads((p / "state/_METADATA").read_text()) for p in path.parent.iterdir()]
    assert metadata[0] == metadata[1]
    assert fc.is_orbax_checkpoint(path)


def test_jax_arrays_of_several_devices(path: Path) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.NamedSharding(mesh, jax.P("x"))
    x = jax.device_put(jnp.arange(16.0), sharding)
    fc.partial.save(path, {"x": x})
    fc.partial.save(path, {"key": jax.random.key(1), "y": jnp.ones(2, jnp.bfloat16)})
    fc.partial.finalize(path)
    loaded = fc.load(path)
    assert loaded["x"].sharding == sharding
    np.testing.assert_array_equal(loaded["x"], x)
    assert jnp.array_equal(loaded["key"], jax.random.key(1)), loaded["key"]
    assert loaded["y"].dtype == jnp.bfloat16


def test_array_data_is_not_copied(path: Path) -> None:
    save_both(path)
    before = {file.stat().st_ino for file in session(path).glob("part_*/state/d/*")}
    assert len(before) >= 2
    fc.partial.finalize(path)
    assert before <= {file.stat().st_ino for file in (path / "state" / "d").iterdir()}


def test_a_later_process_goes_on(path: Path, run_child: Any) -> None:
    program = """
        import sys, numpy as np, flax_ckpt as fc
        fc.partial.save(sys.argv[1], {"a": np.ones(2)})
    """
    run_child(program, path)
    fc.partial.save(path, {"b": 1})
    fc.partial.finalize(path)
    assert_whole(path, {"a": np.ones(2), "b": 1})


def test_custom_metadata_merges_and_the_later_wins(path: Path) -> None:
    fc.partial.save(path, {"a": 1}, custom_metadata={"run": 1, "deep": {"a": 1, "b": [1]}})
    fc.partial.save(path, {"b": 1}, custom_metadata={"run": 2, "deep": {"b": 2}, "new": None})
    fc.partial.finalize(path)
    expected = {"run": 2, "deep": {"a": 1, "b": 2}, "new": None}
    assert fc.metadata(path).custom_metadata == expected


def test_calls_in_the_background_run_in_order_and_finalize_waits(path: Path) -> None:
    for i in range(5):
        fc.partial.save_async(path, {"list": {str(i): np.full(1000, i)}}, custom_metadata={"i": i})
    fc.partial.finalize(path)
    assert_whole(path, {"list": {str(i): np.full(1000, i) for i in range(5)}})
    assert fc.metadata(path).custom_metadata == {"i": 4}


def test_finalize_raises_a_failure_that_nobody_was_told_of(path: Path) -> None:
    fc.partial.save(path, FIRST)
    response = fc.partial.save_async(path, {"step": 8})
    with pytest.raises(DuplicateNameError, match="step is saved already"):
        fc.partial.finalize(path)
    with pytest.raises(DuplicateNameError, match="step is saved already"):
        response.result()
    assert not path.exists()
    fc.partial.finalize(path)
    assert_whole(path, FIRST)


REFUSED = {
    "the same leaf": ({"layers": {"a": 1}, "step": 8}, "(?s)layers/a is saved.*step is saved"),
    "a node for a leaf": ({"step": {"x": 1}}, "step is one leaf in one part, and has some"),
    "a leaf for a node": ({"layers": 1}, "layers is one leaf in one part, and has some"),
    "an empty list for a dict": ({"layers": []}, "layers is one leaf"),
    "a list for a dict": ({"layers": [1]}, "layers is a dict in one part and a list in another"),
    "the same None": ({"none": None}, "none is saved already"),
    "the same string": ({"name": "x"}, "name is saved already"),
    "one name on disk": ({"layers.a": 1}, "'layers'.*'a'.* and .*'layers.a'"),
    "a whole tree of one leaf": (np.ones(2), r"\(the whole tree\) is one leaf"),
}


def test_what_is_saved_already_is_refused_and_stays(path: Path) -> None:
    fc.partial.save(path, FIRST)
    before = sorted(p for p in session(path).rglob("*") if p.is_file())
    for state, text in REFUSED.values():
        with pytest.raises(DuplicateNameError, match=text):
            fc.partial.save(path, state)
        assert sorted(p for p in session(path).rglob("*") if p.is_file()) == before
    fc.partial.save(path, SECOND)
    fc.partial.finalize(path)
    assert_whole(path)


def test_empty_dicts_merge_into_dicts(path: Path) -> None:
    for state in ({"a": {}, "b": {}}, {"a": {"x": 1}, "b": {}}, {"a": {}}, {}):
        fc.partial.save(path, state)
    fc.partial.finalize(path)
    assert_whole(path, {"a": {"x": 1}, "b": {}})


class Row:
    """A node of the user's own that may have any elements of a list."""

    def __init__(self, elements: dict[int, Any]) -> None:
        self.elements = elements


jax.tree_util.register_pytree_with_keys(
    Row,
    lambda row: ([(jax.tree_util.SequenceKey(i), x) for i, x in row.elements.items()], None),
    lambda _, children: Row(dict(enumerate(children))),
)


def test_a_list_may_come_in_any_order_but_not_with_gaps(path: Path) -> None:
    fc.partial.save(path, {"list": Row({2: "c"})})
    fc.partial.save(path, {"list": Row({0: "a"})})
    with pytest.raises(FormatError, match="a list of 2 has no element '1'"):
        fc.partial.finalize(path)
    fc.partial.save(path, {"list": Row({1: "b"})})
    fc.partial.finalize(path)
    assert_whole(path, {"list": ["a", "b", "c"]})


def test_unsupported_leaves_are_named_at_once(path: Path) -> None:
    with pytest.raises(fc.errors.UnsupportedLeafError, match="a: "):
        fc.partial.save_async(path, {"a": object()})


def test_nothing_to_finalize(path: Path) -> None:
    text = "no partial save to finalize: .* does not exist; call flax_ckpt.partial.save first"
    with pytest.raises(CheckpointNotFoundError, match=text):
        fc.partial.finalize(path)
    save_both(path)
    fc.partial.finalize(path)
    with pytest.raises(CheckpointExistsError, match="already exists"):
        fc.partial.finalize(path)
    with pytest.raises(FileExistsError, match="finished checkpoints are not added to"):
        fc.partial.save(path, {"more": 1})
    assert_whole(path)


def test_a_failed_first_call_leaves_nothing_to_finalize(path: Path) -> None:
    with failing_at(6), pytest.raises(OSError, match="injected"):
        fc.partial.save(path, FIRST)
    with pytest.raises(CheckpointNotFoundError, match="has no finished part"):
        fc.partial.finalize(path)


def test_the_session_is_no_checkpoint(path: Path) -> None:
    save_both(path)
    text = f"unfinished partial save: flax_ckpt.partial.finalize\\('{path}'\\) completes it"
    for place in (session(path), *session(path).iterdir()):
        with pytest.raises(InvalidLayoutError, match=text):
            fc.load(place)
        assert not fc.is_orbax_checkpoint(place)
        with pytest.raises(InvalidLayoutError, match=text):
            fc.delete(place)
    with pytest.raises(CheckpointNotFoundError, match="a partial save of it is unfinished"):
        fc.load(path)
    with pytest.raises(CheckpointNotFoundError):
        fc.restore(path.parent)
    fc.partial.finalize(session(path))  # Orbax takes its directory too
    assert_whole(path)


def test_a_part_that_was_damaged_is_not_made_a_checkpoint(path: Path) -> None:
    save_both(path)
    file = session(path) / "part_000001" / "state" / "_METADATA"
    file.write_bytes(file.read_bytes().replace(b"zweite", b"zweit_").replace(b"other", b"othes"))
    with pytest.raises(DamagedCheckpointError, match="_METADATA"):
        fc.partial.finalize(path)
    assert not path.exists()


def test_array_data_that_was_damaged_in_a_part_is_noticed_later(path: Path) -> None:
    save_both(path)
    (file,) = (session(path) / "part_000001" / "state" / "d").iterdir()
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)
    fc.partial.finalize(path)
    with pytest.raises(DamagedCheckpointError, match="deep/list/0: damaged"):
        fc.load(path)


def test_the_handler_in_an_ordinary_save(path: Path) -> None:
    """What a user's registry may do: a part that is alone is a tree like any other."""

    class Handler:
        def __new__(cls) -> Any:
            return fc.handlers.PyTreeHandler(partial_save_mode=True)

    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry()
    context.checkpointables.registry.add(Handler, checkpointable_name="params")
    with context:
        fc.save_checkpointables(path, {"params": FIRST})
    assert_whole(path, FIRST)


def test_what_finalize_makes_is_durable_before_it_has_its_name(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_both(path)
    events: list[tuple[str, Any]] = []
    fsync, rename = os.fsync, os.rename

    def spy_sync(fd: int) -> None:
        events.append(("sync", os.fstat(fd).st_ino))
        fsync(fd)

    def spy_rename(source: str, target: str) -> None:
        events.append(("rename", target))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", spy_sync)
    monkeypatch.setattr(os, "rename", spy_rename)
    fc.partial.finalize(path)
    at = events.index(("rename", str(path)))
    before = {inode for kind, inode in events[:at] if kind == "sync"}
    everything = [path, *path.rglob("*")]
    assert [p for p in everything if p.stat().st_ino not in before] == []
    assert ("sync", path.parent.stat().st_ino) in events[at:]


# --- Interruptions ----------------------------------------------------------------------------


def test_a_process_that_dies_in_a_save_leaves_the_session(tmp_path: Path) -> None:
    def prepare(k: int) -> Any:
        fc.partial.save(tmp_path / str(k), FIRST)
        return lambda: fc.partial.save(tmp_path / str(k), SECOND)

    for k in each_death(prepare):
        path = tmp_path / str(k)
        parts = [p for p in session(path).iterdir() if p.name.startswith("part_")]
        if len(parts) == 1:
            fc.partial.save(path, SECOND)
        else:
            with pytest.raises(DuplicateNameError):
                fc.partial.save(path, SECOND)
        fc.partial.finalize(path)
        assert_whole(path)
        assert not session(path).exists()


def test_a_process_that_dies_in_finalize_leaves_the_old_or_the_new(tmp_path: Path) -> None:
    outcomes = set()

    def prepare(k: int) -> Any:
        save_both(tmp_path / str(k))
        return lambda: fc.partial.finalize(tmp_path / str(k))

    for k in each_death(prepare):
        path = tmp_path / str(k)
        outcomes.add(path.exists())
        if path.exists():
            assert_whole(path)
            fc.delete(path)  # and what is saved there now has nothing of the old
            fc.partial.save(path, {"new": 1})
            fc.partial.finalize(path)
            assert_whole(path, {"new": 1})
        else:
            fc.partial.save(path, {"more": 1})
            fc.partial.finalize(path)
            assert_whole(path, {**WHOLE, "more": 1})
        fc.delete(path)
    assert outcomes == {True, False}
    assert [p.name for p in tmp_path.iterdir() if not p.name[0].isdigit()] == []


def test_a_failure_in_finalize_can_be_tried_again(tmp_path: Path) -> None:
    for k in itertools.count():
        path = tmp_path / str(k)
        save_both(path)
        with failing_at(k) as made:
            try:
                fc.partial.finalize(path)
                raised = False
            except OSError:
                raised = True
        assert path.exists() != raised
        if raised:
            fc.partial.finalize(path)
        assert_whole(path)
        if len(made) <= k:
            return


def test_a_session_without_hard_links_says_so_and_stays(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_both(path)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted", args[0])

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        with pytest.raises(PermissionError) as raised:
            fc.partial.finalize(path)
    assert "the parts are as they were" in raised.value.__notes__[0]
    fc.partial.finalize(path)
    assert_whole(path)


# --- With Orbax -------------------------------------------------------------------------------

ORBAX_BEGINS = """
    import sys, numpy as np, jax.numpy as jnp, orbax.checkpoint.experimental.v1 as ocp
    for name in ("finished", "begun"):
        path = f"{sys.argv[1]}/{name}"
        ocp.partial.save(path, {"a": {"x": jnp.arange(6.0), "s": "text"}, "n": 1})
        ocp.partial.save(path, {"a": {"y": np.ones(3)}, "e": {}}, custom_metadata={"run": 2})
    ocp.partial.finalize(f"{sys.argv[1]}/finished")
    loaded = ocp.load(sys.argv[2])
    assert loaded["step"] == 7 and loaded["name"] == "first" and loaded["other"] == "zweite"
    assert loaded["deep"] == {"list": [1.5, "x"]} and loaded["none"] is None, loaded
    np.testing.assert_array_equal(loaded["layers"]["a"], np.arange(6.0).reshape(2, 3))
    np.testing.assert_array_equal(loaded["layers"]["b"], np.ones(3, np.int8))
    try:
        ocp.partial.finalize(sys.argv[3])
    except FileNotFoundError:
        print("not Orbax's")
"""


def test_orbax_and_we_keep_to_our_own_sessions(tmp_path: Path, run_child: Any) -> None:
    ours, unfinished = tmp_path / "ours", tmp_path / "unfinished"
    save_both(ours)
    fc.partial.finalize(ours)
    save_both(unfinished)
    assert run_child(ORBAX_BEGINS, tmp_path, ours, unfinished).stdout == "not Orbax's\n"
    fc.partial.finalize(unfinished)
    assert_whole(unfinished)

    expected = {"a": {"x": np.arange(6.0), "s": "text", "y": np.ones(3)}, "n": 1, "e": {}}
    assert_whole(tmp_path / "finished", expected)
    assert fc.metadata(tmp_path / "finished").custom_metadata == {"run": 2}
    (begun,) = tmp_path.glob("begun*")
    how = "orbax.checkpoint.experimental.v1.partial.finalize"
    text = re.escape(f"unfinished partial save of Orbax: {how}('{tmp_path}/begun') completes it")
    for place in (begun, *begun.iterdir()):
        with pytest.raises(InvalidLayoutError, match=text):
            fc.load(place)
    for call in (
        fc.partial.finalize,
        lambda path: fc.partial.finalize(f"{path}.partial_save"),
        lambda path: fc.partial.save(path, {"more": 1}),
    ):
        with pytest.raises(InvalidLayoutError) as raised:
            call(tmp_path / "begun")
        text = f"{begun} is a partial save that Orbax has begun: finish it there, with {how}; "
        assert str(raised.value) == text + "what it makes loads here"
    with pytest.raises(CheckpointNotFoundError, match="partial save of it by Orbax is unfinished"):
        fc.load(tmp_path / "begun")
    shutil.rmtree(begun)


def test_parts_must_be_stored_alike(path: Path) -> None:
    save_both(path)
    file = session(path) / "part_000000" / "state" / "_METADATA"
    (session(path) / "part_000000" / "flax_ckpt.json").unlink()
    file.write_text(file.read_text().replace('"use_zarr3":true', '"use_zarr3":false'))
    with pytest.raises(FormatError, match="must be saved with the same options"):
        fc.partial.finalize(path)
