"""What Orbax's older API leaves on disk, whole and with parts missing, and what it left undone.

The rules of `ORBAX_FORMAT.md`, section 8.3, on files that the installed Orbax wrote in every shape;
`test_layouts.py` has them on the one shape of v1. Of its section 7, what a reader may miss.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration

import flax_ckpt as fc
from tests.compat import trees

MODULE = "tests.compat.test_v0"
NOTES = {"a": [1, None, "größer"], "big": 2**80}
STEPS = (1, 2)
ROOT_METADATA = {"run": 7}


def tree() -> dict[str, Any]:
    """What both of v0's tree handlers save."""
    grid = trees.mesh(4, 2)
    return {
        "a": {"w": jnp.arange(24, dtype=jnp.float32).reshape(6, 4), "n": 3},
        "b": [np.arange(5, dtype=np.int64), jnp.arange(3, dtype=jnp.bfloat16), 1.5],
        "sharded": trees.put(trees.raw(3, "float32", (8, 6)), grid, "x", "y"),
        "big": jnp.asarray(trees.raw(7, "uint16", (40, 50))),  # too big for an index node
        "none": None,
        "empty": {},
        "key": jax.random.key(7),
    }


def with_text() -> dict[str, Any]:
    """Strings are for `PyTreeSave` alone."""
    return {**tree(), "text": "größer"}


# --- written by Orbax -----------------------------------------------------------------------


def write(folder: Path) -> trees.Results:
    return {
        name: trees.attempt(lambda w=work, n=name: w(folder / n) or [])
        for name, work in WRITERS.items()
    }


def _flat_standard(path: Path) -> None:
    import orbax.checkpoint as v0

    with v0.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree())


def _flat_pytree(**options: bool) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        import orbax.checkpoint as v0

        with v0.Checkpointer(v0.PyTreeCheckpointHandler(**options)) as checkpointer:
            checkpointer.save(path, v0.args.PyTreeSave(with_text()))

    return save


def _tracking() -> Any:
    """Metrics are saved only if there is something to choose by."""
    import orbax.checkpoint as v0

    return v0.CheckpointManagerOptions(best_fn=lambda metrics: metrics["loss"], best_mode="min")


def _manager(path: Path) -> None:
    import orbax.checkpoint as v0

    with v0.CheckpointManager(path, options=_tracking(), metadata=ROOT_METADATA) as manager:
        for step in STEPS:
            metrics = {"loss": 0.5 * step}
            manager.save(step, args=v0.args.StandardSave(tree()), metrics=metrics)


def _items(path: Path) -> None:
    import orbax.checkpoint as v0

    args = v0.args.Composite(
        params=v0.args.StandardSave(tree()),
        opt=v0.args.PyTreeSave(with_text()),
        notes=v0.args.JsonSave(NOTES),
        message=v0.args.ProtoSave(Duration(seconds=3)),
    )
    with v0.CheckpointManager(path, options=_tracking()) as manager:
        manager.save(1, args=args, custom_metadata={"note": "x"}, metrics={"loss": 0.5})


def _composite(path: Path) -> None:
    import orbax.checkpoint as v0

    with v0.Checkpointer(v0.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=v0.args.Composite(model=v0.args.PyTreeSave(with_text())))


def _partial(path: Path) -> None:
    """A root with a finished step, and one that was begun in parts and never finished."""
    import orbax.checkpoint.experimental.v1 as ocp

    ocp.partial.save(path / "1", {"a": jnp.ones(3)})
    ocp.partial.save(path / "1", {"b": jnp.zeros(2)})
    ocp.partial.finalize(path / "1")
    ocp.partial.save(path / "2", {"a": jnp.ones(3)})


def _deletion(path: Path) -> None:
    """An item whose deletion was interrupted after it was announced."""
    import orbax.checkpoint.experimental.v1 as ocp

    ocp.save_checkpointables(path, {"state": tree(), "old": tree()})
    with mock.patch.object(shutil, "rmtree", side_effect=OSError("the disk is gone")):
        try:
            ocp.delete(path, checkpointable_name="old")
        except OSError:
            return
    raise AssertionError("the deletion came to its end")


WRITERS: dict[str, Callable[[Path], None]] = {
    "flat_standard": _flat_standard,
    "flat_pytree": _flat_pytree(),
    "flat_files": _flat_pytree(use_ocdbt=False),
    "flat_zarr3": _flat_pytree(use_zarr3=True),
    "flat_files_zarr3": _flat_pytree(use_ocdbt=False, use_zarr3=True),
    "manager": _manager,
    "items": _items,
    "composite": _composite,
    "partial": _partial,
    "deletion": _deletion,
}
ROLES: dict[str, trees.Role] = {"write": write}

# Each single tree: the checkpoint, the directory of the tree in it, and what it holds.
SHAPES: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "flat_standard": ("flat_standard", "", tree),
    "flat_pytree": ("flat_pytree", "", with_text),
    "flat_files": ("flat_files", "", with_text),
    "flat_zarr3": ("flat_zarr3", "", with_text),
    "flat_files_zarr3": ("flat_files_zarr3", "", with_text),
    "default": ("manager/2", "default", tree),
    "composite": ("composite", "model", with_text),
}
OCDBT = [name for name in SHAPES if "files" not in name]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("v0")
    assert trees.run(MODULE, folder, ["write"]) == {name: [] for name in WRITERS}
    return folder


@pytest.fixture
def copy(written: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies something that was written, to edit it."""
    return lambda name: Path(shutil.copytree(written / name, tmp_path / Path(name).name))


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def ckpt(copy: Callable[[str], Path], shape: str) -> Path:
    return copy(SHAPES[shape][0])


def check(path: Path, expected: Any) -> None:
    """Loads a checkpoint in every way."""
    assert trees.differences(fc.load(path), trees.plain(expected)) == []
    for sharding in (trees.first_device, trees.other_mesh):
        found = fc.load(path, trees.abstract(expected, sharding))
        assert trees.differences(found, expected) == []
        moved = trees.moved(expected, sharding)
        assert trees.sharding_differences(found, moved) == []
    fc.metadata(path)


# --- R1: the root ---------------------------------------------------------------------------


def test_r1_every_shape_as_it_is(ckpt: Path, shape: str) -> None:
    expected = SHAPES[shape][2]()
    check(ckpt, expected)
    found = fc.load(ckpt)
    assert trees.sharding_differences(found, trees.plain(expected)) == []
    _, item, _ = SHAPES[shape]
    check(ckpt / item, expected)  # the directory of the tree itself


def _remove(*names: str) -> Callable[[Path], None]:
    def remove(path: Path) -> None:
        for name in names:
            for file in path.rglob(name):
                file.unlink()

    return remove


def _write(data: bytes) -> Callable[[Path], None]:
    return lambda path: (path / "_CHECKPOINT_METADATA").write_bytes(data) and None


def _handlers(value: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        file = path / "_CHECKPOINT_METADATA"
        file.write_text(json.dumps({**json.loads(file.read_text()), "item_handlers": value}))

    return write


R1_CHANGES: dict[str, Callable[[Path], None]] = {
    "no commit file": _remove("commit_success.txt"),
    "no metadata": _remove("_CHECKPOINT_METADATA"),
    "neither": _remove("commit_success.txt", "_CHECKPOINT_METADATA"),
    "empty metadata": _write(b""),
    "garbage": _write(b"\x00{]"),
    "handlers a string": _handlers("some.Handler"),
    "handlers an object": _handlers({"default": "some.Handler", "model": "some.Handler"}),
    "handlers null": _handlers(None),
}


@pytest.mark.parametrize("change", R1_CHANGES)
def test_r1_what_a_root_may_miss(ckpt: Path, shape: str, change: str) -> None:
    R1_CHANGES[change](ckpt)
    expected = SHAPES[shape][2]()
    assert trees.differences(fc.load(ckpt), trees.plain(expected)) == []
    _, item, _ = SHAPES[shape]
    if item:
        found = fc.load_checkpointables(ckpt)
        assert trees.differences(found, {item: trees.plain(expected)}) == []


def test_r1_a_flat_one_has_no_items(written: Path) -> None:
    with pytest.raises(fc.errors.InvalidLayoutError, match="use flax_ckpt.load$"):
        fc.load_checkpointables(written / "flat_standard")


def test_r1_items_under_any_name(written: Path) -> None:
    path = written / "items" / "1"
    wanted = {"params": None, "opt": None, "notes": None, "message": Duration}
    found = fc.load_checkpointables(path, wanted)
    assert found.pop("notes") == NOTES
    assert found.pop("message") == Duration(seconds=3)
    expected = {"params": trees.plain(tree()), "opt": trees.plain(with_text())}
    assert trees.differences(found, expected) == []
    described = fc.checkpointables_metadata(path)
    assert set(described.metadata) == {"params", "opt", "notes", "message"}
    assert described.custom_metadata == {"note": "x"}


# --- R2, R3, R4 -----------------------------------------------------------------------------


def test_r2_identifiers_in_the_metadata_are_not_read(ckpt: Path, shape: str) -> None:
    file = ckpt / SHAPES[shape][1] / "_METADATA"
    data = json.loads(file.read_text())
    entries = data["tree_metadata"].values()
    data["tree_metadata"] = {f"x{n}": entry for n, entry in enumerate(entries)}
    file.write_text(json.dumps(data))
    check(ckpt, SHAPES[shape][2]())


def test_r3_flags_that_are_absent(ckpt: Path, shape: str) -> None:
    """zarr 2 is the default; whether there is a database is looked up."""
    file = ckpt / SHAPES[shape][1] / "_METADATA"
    data = json.loads(file.read_text())
    assert data.pop("use_ocdbt") == ("files" not in shape)
    assert data["use_zarr3"] == shape.endswith("zarr3")
    if not data["use_zarr3"]:
        del data["use_zarr3"]
    file.write_text(json.dumps(data))
    check(ckpt, SHAPES[shape][2]())


@pytest.mark.parametrize("shape", OCDBT)
def test_r4_the_manifests_of_processes_are_not_needed(ckpt: Path, shape: str) -> None:
    (manifest,) = ckpt.rglob("ocdbt.process_0/manifest.ocdbt")
    manifest.unlink()
    check(ckpt, SHAPES[shape][2]())


# --- R5: what is no checkpoint, what is hidden ----------------------------------------------


def test_r5_metrics_are_left_out_in_bulk(written: Path) -> None:
    assert list(fc.load_checkpointables(written / "manager" / "1")) == ["default"]
    found = fc.load_checkpointables(written / "manager" / "1", {"metrics": None})
    assert found == {"metrics": {"loss": 0.5}}


def test_r5_names_that_are_no_steps_are_skipped(copy: Callable[[str], Path]) -> None:
    root = copy("manager")
    assert (root / "metadata" / "_ROOT_METADATA").is_file()
    shutil.copytree(root / "2", root / "3.orbax-checkpoint-tmp")
    shutil.copytree(root / "2", root / "4.orbax-checkpoint-tmp-1699999999")
    shutil.copytree(root / "2", root / "trash" / "5")
    shutil.copytree(root / "2", root / "007")
    out = fc.restore(root, tree())
    assert out.step == 2
    assert trees.differences(out.state, tree()) == []
    with pytest.raises(fc.errors.CheckpointNotFoundError, match="has no step 7; it has: 1, 2"):
        fc.restore(root, tree(), step=7)


def test_r5_an_unfinished_save_is_none(copy: Callable[[str], Path]) -> None:
    path = copy("manager") / "2"
    unfinished = path.rename(path.with_name("2.orbax-checkpoint-tmp"))
    for read in (fc.load, fc.load_checkpointables, fc.metadata):
        with pytest.raises(fc.errors.InvalidLayoutError, match="unfinished"):
            read(unfinished)
    assert fc.restore(path.parent, tree()).step == 1


def test_r5_an_item_that_is_not_finished_is_not_listed(copy: Callable[[str], Path]) -> None:
    path = copy("items/1")
    (path / "opt").rename(path / "opt.orbax-checkpoint-tmp")
    assert set(fc.checkpointables_metadata(path).metadata) == {"params", "notes", "message"}


def test_r5_a_descriptor_is_no_item(copy: Callable[[str], Path]) -> None:
    path = copy("manager/2")
    (path / "descriptor").mkdir()
    (path / "descriptor" / "descriptor.pbtxt").write_text("uuid: '7'")
    assert list(fc.load_checkpointables(path)) == ["default"]


def test_r5_an_item_whose_deletion_began_is_gone(written: Path) -> None:
    path = written / "deletion"
    assert (path / "_CHECKPOINT_DELETION").is_file()
    assert (path / "old" / "_METADATA").is_file()
    assert list(fc.load_checkpointables(path)) == ["state"]
    assert list(fc.checkpointables_metadata(path).metadata) == ["state"]
    check(path, tree())
    for name in ({"old": None}, {"state": None, "old": None}):
        with pytest.raises(fc.errors.DeletionInProgressError, match="'old' .* is being deleted"):
            fc.load_checkpointables(path, name)


def test_r5_a_save_in_parts_without_its_end_is_none(written: Path) -> None:
    root = written / "partial"
    session = root / "2.partial_save"
    (pending,) = session.glob("*.pending_*")
    assert (pending / "_CHECKPOINT_METADATA").is_file()
    for path in (session, pending):
        for read in (fc.load, fc.load_checkpointables, fc.restore):
            with pytest.raises(fc.errors.FlaxCkptError, match="unfinished|no committed step"):
                read(path)
    out = fc.restore(root, {"a": jnp.zeros(3), "b": jnp.zeros(2)})
    assert out.step == 1
    assert trees.differences(out.state, {"a": jnp.ones(3), "b": jnp.zeros(2)}) == []
    with fc.CheckpointCallback(root, every_n_steps=1) as callback:
        assert callback.latest_step == 1


# --- R6: shardings and array metadata -------------------------------------------------------


def test_r6_without_shardings_arrays_come_to_one_device(ckpt: Path, shape: str) -> None:
    (ckpt / SHAPES[shape][1] / "_sharding").unlink()
    expected = SHAPES[shape][2]()
    found = fc.load(ckpt)
    assert trees.differences(found, trees.plain(expected)) == []
    assert len(found["sharded"].devices()) == 1


def test_r6_without_array_metadatas_keys_are_their_data(ckpt: Path, shape: str) -> None:
    shutil.rmtree(ckpt / SHAPES[shape][1] / "array_metadatas")
    expected = SHAPES[shape][2]()
    expected["key"] = jax.random.key_data(expected["key"])
    check(ckpt, expected)


@pytest.mark.parametrize(
    ("old", "new", "devices"),
    [
        ("cpu:0", "TFRT_CPU_0", 1),
        ("cpu:0", "TPU_0(process=0,(0,0,0,0))", 1),
    ],
)
def test_r6_names_of_devices(ckpt: Path, shape: str, old: str, new: str, devices: int) -> None:
    file = ckpt / SHAPES[shape][1] / "_sharding"
    text = file.read_text()
    assert old in text or "TFRT_CPU_0" in text
    file.write_text(text.replace(old, new).replace("TFRT_CPU_0", new))
    expected = SHAPES[shape][2]()
    found = fc.load(ckpt)
    assert trees.differences(found, trees.plain(expected)) == []
    assert len(found["a"]["w"].devices()) == devices


def test_r6_devices_that_are_not_here(ckpt: Path, shape: str) -> None:
    file = ckpt / SHAPES[shape][1] / "_sharding"
    data = json.loads(file.read_text())
    for name, text in data.items():
        placed = json.loads(text)
        for row in placed.get("device_mesh", {}).get("mesh", []):
            for device in row:
                device["id"] += 512
        data[name] = json.dumps(placed)
    file.write_text(json.dumps(data))
    found = fc.load(ckpt)
    assert trees.differences(found, trees.plain(SHAPES[shape][2]())) == []
    assert len(found["sharded"].devices()) == 1


# --- R7: other items ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "file", "abstract", "expected"),
    [
        ("notes", "metadata", None, NOTES),
        ("message", "proto.pbtxt", Duration, Duration(seconds=3)),
        ("metrics", "metrics", None, {"loss": 0.5}),
    ],
)
def test_r7_items_that_are_no_trees(
    written: Path, item: str, file: str, abstract: Any, expected: Any
) -> None:
    path = written / "items" / "1"
    assert (path / item / file).is_file()
    assert fc.load_checkpointables(path, {item: abstract}) == {item: expected}


def test_r7_json_under_the_name_of_v1(copy: Callable[[str], Path]) -> None:
    path = copy("items/1")
    (path / "notes" / "metadata").rename(path / "notes" / "data.json")
    assert fc.load_checkpointables(path, {"notes": None}) == {"notes": NOTES}


# --- R8: what Orbax lets pass silently ------------------------------------------------------


def test_r8_wide_arrays_are_not_narrowed(ckpt: Path, shape: str) -> None:
    assert not jax.config.jax_enable_x64
    wanted = trees.abstract(SHAPES[shape][2]())
    wanted["b"][0] = jax.ShapeDtypeStruct((5,), np.int64)
    with pytest.raises(fc.errors.TreeMismatchError, match=r"b/0: saved int64\[5\].*x64"):
        fc.load(ckpt, wanted)


def test_r8_numpy_shapes_are_compared(ckpt: Path, shape: str) -> None:
    wanted = trees.abstract(SHAPES[shape][2]())
    wanted["b"][0] = np.zeros(4, np.int64)
    with pytest.raises(fc.errors.TreeMismatchError, match=r"b/0: saved int64\[5\] \(numpy\), want"):
        fc.load(ckpt, wanted)


# --- section 7: what must be there ----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("_METADATA", "no PyTree|no checkpoint"),
        ("manifest.ocdbt", "manifest.ocdbt: the file is missing"),
        ("d", "/d/[0-9a-f]{32}: .*missing"),
        ("ocdbt.process_0", "big|ocdbt.process_0"),
    ],
)
@pytest.mark.parametrize("shape", OCDBT)
def test_what_must_be_there_is_named(ckpt: Path, shape: str, name: str, text: str) -> None:
    path = ckpt / SHAPES[shape][1] / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(fc.errors.FlaxCkptError, match=text):
        fc.load(ckpt)


def test_an_item_that_is_not_there_is_named_and_the_rest_loads(copy: Callable[[str], Path]) -> None:
    path = copy("items/1")
    shutil.rmtree(path / "opt")
    found = fc.load_checkpointables(path, {"params": None})
    assert trees.differences(found, {"params": trees.plain(tree())}) == []
    with pytest.raises(fc.errors.CheckpointNotFoundError, match="no checkpointable 'opt'; it has"):
        fc.load_checkpointables(path, {"opt": None})


def test_what_is_there_besides_does_no_harm(ckpt: Path, shape: str) -> None:
    item = ckpt / SHAPES[shape][1]
    for folder in {ckpt, item}:
        (folder / "notes.txt").write_text("mine")
        (folder / "checkpoint").write_text("not of msgpack")
    (item / "mine").mkdir()
    (item / "mine" / "notes.txt").write_text("mine")
    check(ckpt, SHAPES[shape][2]())


if __name__ == "__main__":
    trees.main(ROLES)
