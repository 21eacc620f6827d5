"""`PLACEHOLDER`: leaves of the wanted tree that are left alone; and trees wanted in part."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

import flax_ckpt as fc
from flax_ckpt.errors import TreeMismatchError
from flax_ckpt.storage.database import DataFileReader


class Pair(NamedTuple):
    a: Any
    b: Any


TREE = {
    "big": jnp.arange(300_000, dtype=jnp.float32),
    "pair": Pair(jnp.ones(3), np.arange(4)),
    "list": [jnp.zeros(2), 7],
    "text": "words",
    "key": jax.random.key(1),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("placeholder") / "ckpt"
    fc.save(path, TREE)
    return path


def wish(**changes: Any) -> Any:
    return {**jax.tree.map(lambda leaf: leaf, TREE), **changes}


def test_the_leaf_stays_and_the_others_are_loaded(saved: Path) -> None:
    assert fc.PLACEHOLDER is ...
    assert fc.PLACEHOLDER is ocp.PLACEHOLDER
    loaded = fc.load(saved, wish(big=..., text=..., key=..., pair=Pair(..., np.ndarray)))
    assert loaded["big"] is loaded["text"] is loaded["key"] is loaded["pair"].a is ...
    np.testing.assert_array_equal(loaded["pair"].b, np.arange(4))
    assert loaded["list"][1] == 7


def test_its_data_is_not_read(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    real = DataFileReader.read_into

    def counted(self: DataFileReader, offset: int, *buffers: Any) -> None:
        counts.append(sum(map(len, buffers)))
        real(self, offset, *buffers)

    monkeypatch.setattr(DataFileReader, "read_into", counted)
    fc.load(saved, wish())
    everything = sum(counts)
    counts.clear()
    fc.load(saved, wish(big=...))
    assert everything - sum(counts) >= TREE["big"].nbytes


def test_a_key_that_the_checkpoint_lacks_may_be_one(saved: Path) -> None:
    """As in Orbax."""
    wanted = wish(new=..., list=[..., ..., ...])
    loaded = fc.load(saved, wanted)
    assert loaded["new"] is ...
    assert loaded["list"] == [..., ..., ...]
    assert ocp.load(saved, wish(new=...))["new"] is ...


def test_it_stands_for_a_leaf_not_for_a_subtree(saved: Path) -> None:
    """As in Orbax."""
    with pytest.raises(TreeMismatchError) as raised:
        fc.load(saved, wish(pair=...))
    assert [str(d) for d in raised.value.differences] == [
        "pair/a: saved float32[3], wanted nothing",
        "pair/b: saved int64[4] (numpy), wanted nothing",
    ]
    with pytest.raises(ValueError, match="pair"):
        ocp.load(saved, wish(pair=...))


def test_a_whole_tree_of_them(saved: Path) -> None:
    assert fc.load(saved, jax.tree.map(lambda _: ..., TREE))["pair"] == Pair(..., ...)
    parts = fc.load_checkpointables(saved, {"state": jax.tree.map(lambda _: ..., TREE)})
    assert parts["state"]["big"] is ...


def test_where_nothing_was_saved_it_stays(tmp_path: Path) -> None:
    fc.save(tmp_path / "ckpt", {"none": None, "empty": {}, "a": 1})
    wanted = {"none": ..., "empty": ..., "a": 0}
    assert fc.load(tmp_path / "ckpt", wanted) == {"none": ..., "empty": ..., "a": 1}


# Trees wanted in part.


def partial() -> fc.Context:
    context = fc.Context()
    context.pytree.loading.partial_load = True
    return context


def test_what_is_not_named_is_not_loaded(saved: Path) -> None:
    with partial():
        loaded = fc.load(saved, {"text": "", "list": [jax.ShapeDtypeStruct((2,), np.float32)]})
    assert loaded["text"] == "words"
    np.testing.assert_array_equal(loaded["list"][0], np.zeros(2))


def test_an_abstract_leaf_never_comes_back_as_if_it_were_data(saved: Path) -> None:
    """Orbax hands it back. Here a leaf of the caller's that the checkpoint lacks is an error."""
    wanted = {"text": "", "new": jax.ShapeDtypeStruct((2,), np.float32)}
    with partial(), pytest.raises(TreeMismatchError) as raised:
        fc.load(saved, wanted)
    assert [str(d) for d in raised.value.differences] == ["new: saved nothing, wanted float32[2]"]
    with partial():
        assert fc.load(saved, {"text": "", "new": ...}) == {"text": "words", "new": ...}
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        assert ocp.load(saved, wanted)["new"] == wanted["new"]
