"""Checkpoints of every kind that this package's releases wrote: each is read by all later ones."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import flax_ckpt as fc
from tests.compat import trees
from tests.golden import make, make_ours
from tests.storage import test_processes as processes
from torture.damage import Rows

VERSIONS = sorted(path.stem for path in make.HERE.glob("flax-ckpt-*.zip"))
CASES = (*make_ours.TREES, "partial", "processes")


@pytest.fixture(scope="module", params=VERSIONS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    with zipfile.ZipFile(make.HERE / f"{request.param}.zip") as archive:
        archive.extractall(made)
    return made


def expected(name: str) -> Any:
    if name == "partial":
        return {half["t"]: half for half in make_ours.HALVES.values()}
    if name == "processes":
        values = np.arange(96, dtype=np.float32).reshape(8, 12)
        whole = processes.expected()
        return {name: values.astype(array.dtype) for name, array in whole.items()}
    return trees.plain(make_ours.TREES[name]())


@pytest.mark.parametrize("name", CASES)
def test_each_tree_loads_bit_for_bit(folder: Path, name: str) -> None:
    found, wanted = fc.load(folder / name), expected(name)
    if name == "processes":  # of more devices than a process here may have
        assert (found.pop("text"), found.pop("empty")) == ("é0", {})
        found = jax.tree.map(np.asarray, found)
    assert trees.differences(found, wanted) == []
    if "sharded" in name:
        assert trees.sharding_differences(found, wanted) == []
    if name in make_ours.TREES:
        assert fc.metadata(folder / name).custom_metadata == make.CUSTOM_METADATA


@pytest.mark.parametrize("name", make_ours.TREES)
def test_each_tree_loads_elsewhere(folder: Path, name: str) -> None:
    wanted = make_ours.TREES[name]()
    found = fc.load(folder / name, trees.abstract(wanted, trees.other_mesh))
    assert trees.differences(found, wanted) == []


@pytest.mark.parametrize("name", [*CASES, "linen", "nnx"])
def test_each_is_whole(folder: Path, name: str) -> None:
    found = fc.verify(folder / name)
    assert found.ok, str(found)
    assert len(found.checkpoints) == (len(make.STEPS) if name in ("linen", "nnx") else 1)
    assert found.unchecked == ()
    assert all(one.unchecked == () and one.count for one in found.checkpoints)


def test_runs_with_all_that_is_in_them(folder: Path) -> None:
    for run, step, state in make_ours.runs():
        like = make.state(0) if run == "linen" else make_ours.Model(7)()
        rows = Rows()
        out = fc.restore(folder / run, like, step=step, data_iterator=rows)
        assert type(out.state) is type(state)
        assert trees.differences(jax.tree.leaves(out.state), jax.tree.leaves(state)) == []
        assert (out.step, out.metrics, rows.row) == (step, make.metrics(step), step)
        assert out.config.to_dict() == make_ours.CONFIG
        assert out.provenance["versions"]["flax_ckpt"] in folder.name


def test_a_run_goes_on(folder: Path) -> None:
    with fc.CheckpointCallback(folder / "linen", every_n_steps=1, keep_last=None) as callback:
        _, step = callback.restore_or_init(make.state(0))
        assert step == make.STEPS[-1]
        assert callback.on_step_end(step + 1, make.state(step + 1))
    assert fc.verify(folder / "linen").ok


def test_this_version_is_among_them_and_all_are_small() -> None:
    assert f"flax-ckpt-{make_ours.VERSION}" in VERSIONS
    assert all((make.HERE / f"{v}.zip").stat().st_size < 150_000 for v in VERSIONS)
