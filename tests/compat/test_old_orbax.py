"""Checkpoints that older Orbax releases wrote; `tests/golden/make.py` made them."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

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


def test_metadata(folder: Path) -> None:
    found = fc.metadata(folder / "leaves")
    assert found.custom_metadata == make.CUSTOM_METADATA
    assert found.init_timestamp_nsecs is not None
    assert found.metadata["jax"].shape == (3, 4)


def test_all_of_them_are_small() -> None:
    archives = list(make.HERE.glob("*.zip"))
    assert {path.stem.removeprefix("orbax-") for path in archives} == set(ITEMS)
    assert sum(path.stat().st_size for path in archives) < 100_000
