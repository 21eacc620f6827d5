"""Checkpoints that older Orbax releases wrote; `tests/golden/make.py` made them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import jax
import pytest

import flax_ckpt as fc
from tests.compat import trees
from tests.golden import make

ITEMS = {"0.11.25": "pytree", "0.11.33": "pytree", "0.12.2": "state"}


@pytest.fixture(params=ITEMS)
def version(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(version: str, tmp_path: Path) -> Path:
    with zipfile.ZipFile(make.HERE / f"orbax-{version}.zip") as archive:
        archive.extractall(tmp_path)
    return tmp_path


@pytest.fixture(params=make.TREES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def expected(name: str) -> Any:
    return make.TREES[name]()


def test_as_saved(folder: Path, name: str) -> None:
    found, wanted = fc.load(folder / name), trees.plain(expected(name))
    assert trees.differences(found, wanted) == []
    assert trees.sharding_differences(found, wanted) == []


def test_by_name(folder: Path, name: str, version: str) -> None:
    wanted = {ITEMS[version]: trees.plain(expected(name))}
    assert trees.differences(fc.load_checkpointables(folder / name), wanted) == []


@pytest.mark.parametrize("sharding", [None, trees.first_device, trees.other_mesh])
def test_into_a_target(folder: Path, name: str, sharding: Any) -> None:
    wanted = expected(name)
    found = fc.load(folder / name, trees.abstract(wanted, sharding))
    assert trees.differences(found, wanted) == []
    if sharding is not None:
        placed = trees.moved(wanted, sharding)
        assert trees.sharding_differences(found, placed) == []


@pytest.mark.parametrize("name", make.FLAT)
def test_flat_ones_of_v0(folder: Path, name: str) -> None:
    wanted = make.FLAT[name]()
    found = fc.load(folder / name)
    assert trees.differences(found, trees.plain(wanted)) == []
    assert trees.sharding_differences(found, trees.plain(wanted)) == []
    found = fc.load(folder / name, trees.abstract(wanted, trees.other_mesh))
    assert trees.differences(found, wanted) == []
    placed = trees.moved(wanted, trees.other_mesh)
    assert trees.sharding_differences(found, placed) == []


@pytest.mark.parametrize("name", make.RUNS)
def test_runs_of_both_apis(folder: Path, name: str) -> None:
    for step in make.STEPS:
        wanted = make.state(step)
        out = fc.restore(folder / name, make.state(0), step=step)
        assert (out.step, out.metrics) == (step, make.metrics(step))
        assert type(out.state) is make.State
        assert trees.differences(jax.tree.leaves(out.state), jax.tree.leaves(wanted)) == []
    assert fc.restore(folder / name).step == make.STEPS[-1]
    params = fc.restore_train_state(folder / name, make.state(0).params)
    assert trees.differences(params, make.state(make.STEPS[-1]).params) == []


def test_a_run_goes_on(folder: Path) -> None:
    for name in make.RUNS:
        with fc.CheckpointCallback(folder / name, every_n_steps=1, keep_last=None) as callback:
            _, step = callback.restore_or_init(make.state(0))
            assert step == make.STEPS[-1]
            assert callback.on_step_end(step + 1, make.state(step + 1))
        out = fc.restore(folder / name, make.state(0))
        assert out.step == step + 1
        wanted = make.state(step + 1)
        assert trees.differences(jax.tree.leaves(out.state), jax.tree.leaves(wanted)) == []


def test_metadata(folder: Path) -> None:
    found = fc.metadata(folder / "leaves")
    assert found.custom_metadata == make.CUSTOM_METADATA
    assert found.init_timestamp_nsecs is not None
    assert found.metadata["jax"].shape == (3, 4)


def test_all_of_them_are_small() -> None:
    archives = list(make.HERE.glob("orbax-*.zip"))
    assert {path.stem.removeprefix("orbax-") for path in archives} == set(ITEMS)
    assert all(path.stat().st_size < 60_000 for path in archives)
