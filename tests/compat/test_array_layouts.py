"""Arrays in every layout that the options offer: we read them back, and so does stock Orbax."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as v0
import orbax.checkpoint.experimental.v1 as ocp
import pytest

import flax_ckpt as fc
from tests.compat import trees

# Orbax's readers say that they take the shardings from the checkpoint.
pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning")

PARTS = (
    *("jax_dtypes", "numpy_dtypes", "rank0", "zero_size", "strings", "python_numbers"),
    *("typed_keys", "sharded"),
)


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is set of `array.saving`."""

    ocdbt: bool = True
    zarr3: bool = True
    compressed: bool = False
    file_size: int | None = None
    chunk_bytes: int | None = None

    def __str__(self) -> str:
        parts = ["ocdbt" if self.ocdbt else "files", "zarr3" if self.zarr3 else "zarr2"]
        parts += ["zstd"] * self.compressed + ["sizes"] * bool(self.file_size)
        return "-".join(parts)

    def context(self) -> fc.Context:
        context = fc.Context()
        saving = context.array.saving
        saving.use_ocdbt, saving.use_zarr3 = self.ocdbt, self.zarr3
        saving.use_compression = self.compressed
        saving.ocdbt_target_data_file_size = self.file_size
        saving.storage_options.chunk_byte_size = self.chunk_bytes
        return context


LAYOUTS = [
    Layout(compressed=True),
    Layout(zarr3=False),
    Layout(zarr3=False, compressed=True, chunk_bytes=48),
    Layout(ocdbt=False),
    Layout(ocdbt=False, compressed=True, chunk_bytes=48),
    Layout(ocdbt=False, zarr3=False),
    Layout(ocdbt=False, zarr3=False, compressed=True),
    Layout(file_size=1000, chunk_bytes=300),
]


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    before = jax.config.jax_enable_x64
    yield
    jax.config.update("jax_enable_x64", before)


def tree() -> Any:
    return {name: trees.CASES[name].tree() for name in PARTS}


@pytest.fixture(scope="module", params=LAYOUTS, ids=str)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp(str(request.param)) / "ckpt"
    with request.param.context():
        fc.save(path, tree())
        fc.save(path.with_name("bare"), trees.CASES["bare_jax"].tree())
    return request.param, path


def test_the_files_are_those_of_the_layout(saved: tuple[Layout, Path]) -> None:
    layout, path = saved
    metadata = json.loads((path / "state" / "_METADATA").read_bytes())
    assert (metadata["use_ocdbt"], metadata["use_zarr3"]) == (layout.ocdbt, layout.zarr3)
    assert (path / "state" / "manifest.ocdbt").exists() is layout.ocdbt
    described = {p.name for p in (path / "state").rglob("*") if p.name in ("zarr.json", ".zarray")}
    expected = set() if layout.ocdbt else {"zarr.json" if layout.zarr3 else ".zarray"}
    assert described == expected
    if layout.file_size:
        sizes = [p.stat().st_size for p in (path / "state" / "d").iterdir()]
        assert len(sizes) > 5


def test_we_load_it(saved: tuple[Layout, Path]) -> None:
    expected = trees.plain(tree())
    found = fc.load(saved[1])
    assert trees.differences(found, expected) == []
    assert trees.sharding_differences(found, expected) == []


def test_we_load_it_on_another_mesh(saved: tuple[Layout, Path]) -> None:
    expected = trees.scalars_as_arrays(tree())
    found = fc.load(saved[1], trees.abstract(expected, trees.other_mesh))
    moved = trees.moved(expected, trees.other_mesh)
    assert trees.differences(found, expected) == []
    assert trees.sharding_differences(found, moved) == []


def test_orbax_loads_it(saved: tuple[Layout, Path]) -> None:
    expected = trees.plain(tree())
    found = ocp.load(saved[1])
    assert trees.differences(found, expected) == []
    assert trees.sharding_differences(found, expected) == []


def test_orbax_loads_it_on_another_mesh(saved: tuple[Layout, Path]) -> None:
    expected = trees.scalars_as_arrays(tree())
    found = ocp.load(saved[1], trees.abstract(expected, trees.other_mesh))
    assert trees.differences(found, expected) == []


def test_the_older_orbax_api_loads_it(saved: tuple[Layout, Path]) -> None:
    expected = trees.plain(tree())
    with v0.PyTreeCheckpointer() as reader:
        found = reader.restore(saved[1] / "state")
    assert trees.differences(found, expected) == []
    with v0.StandardCheckpointer() as standard:
        found = standard.restore(saved[1] / "state")
    assert trees.differences(found, expected) == []


def test_a_tree_that_is_one_array(saved: tuple[Layout, Path]) -> None:
    path = saved[1].with_name("bare")
    expected = trees.CASES["bare_jax"].tree()
    assert trees.differences(fc.load(path), expected) == []
    assert trees.differences(ocp.load(path), expected) == []


# A run.


@pytest.mark.parametrize(
    "layout", [Layout(compressed=True), Layout(ocdbt=False, zarr3=False)], ids=str
)
def test_steps_of_a_run_are_resumed_here_and_listed_by_orbax(
    tmp_path: Path, layout: Layout
) -> None:
    state = {"params": {"w": jax.numpy.arange(6.0).reshape(2, 3)}, "step": 3}
    with fc.CheckpointCallback(tmp_path, every_n_steps=1, context=layout.context()) as callback:
        callback.on_step_end(3, state, metrics={"loss": 0.5})
    assert trees.differences(fc.restore_train_state(tmp_path, state), state) == []
    with v0.CheckpointManager(tmp_path) as manager:
        found = manager.restore(3, args=v0.args.Composite(params=v0.args.PyTreeRestore()))
        assert manager.all_steps() == [3]
    assert trees.differences(found["params"], state["params"]) == []


# Files are named after keys.


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        (["..", "x"], "'..': is no path of a directory below the tree's"),
        (["a/../../b"], "is no path"),
        (["/etc"], "is no path"),
        (["a//b"], "is no path"),
        (["end/"], "is no path"),
        (["nul\0"], "is no path"),
        (["_METADATA"], "_METADATA is a file of the format"),
        (["array_metadatas/process_0"], "array_metadatas is a file of the format"),
        (["", "x"], "without a name only a tree of one array can be stored"),
        (["a", "a/c/0"], "'a/c/0': lies in the directory of the array 'a'"),
    ],
)
def test_keys_that_are_no_directories_are_refused(
    tmp_path: Path, keys: list[str], why: str
) -> None:
    with Layout(ocdbt=False).context(), pytest.raises(fc.errors.UnsupportedLeafError) as raised:
        fc.save(tmp_path / "a" / "ckpt", {key: np.ones(2) for key in keys})
    assert why in str(raised.value)
    assert str(raised.value).endswith("Rename the keys, or leave array.saving.use_ocdbt as it is")
    assert list(tmp_path.iterdir()) == []


def test_keys_with_slashes_are_directories(tmp_path: Path) -> None:
    expected = {"a/b": np.arange(3), "a/c.d": np.arange(4), "é x": {"y": np.arange(5)}}
    with Layout(ocdbt=False).context():
        fc.save(tmp_path / "ckpt", expected)
    for load in (fc.load, ocp.load):
        assert trees.differences(load(tmp_path / "ckpt"), expected) == []
