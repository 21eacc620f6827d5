"""What stock Orbax saves, we load: in every form that its options give the arrays.

Processes with Orbax write, another one reads with `flax_ckpt`; it compares with its own copy of
the trees.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct

import flax_ckpt as fc
from tests.compat import trees

MODULE = "tests.compat.test_ours_reads_orbax"

# Options of `ctx.array.saving`, by the name of the form.
FORMS: dict[str, dict[str, bool]] = {
    "default": {},
    "uncompressed": {"use_compression": False},
    "plain_files": {"use_ocdbt": False},
    "zarr2": {"use_zarr3": False},
    "zarr2_plain_files": {"use_zarr3": False, "use_ocdbt": False},
}
# All cases in the default form; in the others those that the form can make a difference to.
CORE = ("jax_dtypes", "jax_wide_dtypes", "numpy_dtypes", "nan_payloads", "rank0", "python_numbers")
CORE += ("strings", "typed_keys", "empty_nodes", "bare_jax", "bare_number", "odd_keys")
CORE += ("many_chunks", "sharded", "sharded_chunks", "only_strings")
CHOSEN = [
    (form, name) for form in FORMS for name in trees.CASES if form == "default" or name in CORE
]
SAVED = [(form, name) for form, name in CHOSEN if not trees.CASES[name].orbax_refuses]
CUSTOM = {"run": 7, "note": "größer", "nested": {"a": [1, None]}}
METRICS = {"loss": 0.25, "accuracy": 0.5}


# --- Orbax writes ---------------------------------------------------------------------------


def _writer(*forms: str) -> trees.Role:
    def write(folder: Path) -> trees.Results:
        import orbax.checkpoint.experimental.v1 as ocp

        return {
            f"{form}-{name}": trees.attempt(lambda f=form, n=name: _save(ocp, folder, f, n))
            for form, name in CHOSEN
            if form in forms
        }

    return write


def _save(ocp: Any, folder: Path, form: str, name: str) -> list[str]:
    case = trees.CASES[name]
    context = ocp.Context()
    for option, value in FORMS[form].items():
        setattr(context.array.saving, option, value)
    context.array.saving.storage_options.chunk_byte_size = case.chunk_bytes
    with context:
        ocp.save(folder / form / name, case.tree(), custom_metadata=CUSTOM)
    return []


def write_items(folder: Path) -> trees.Results:
    """Checkpoints of several items, runs, and what is saved in several calls."""
    import orbax.checkpoint.experimental.v1 as ocp

    writers: dict[str, Callable[[Any, Path], None]] = {
        "items": _save_items,
        "run": _save_run,
        "partial": _save_partial,
        "float64": lambda ocp, path: ocp.save(path, {"a": np.float64(0.1)}),
        "named": lambda ocp, path: ocp.save(path, items()["state"], checkpointable_name="model"),
    }

    def attempt(name: str) -> list[str]:
        return trees.attempt(lambda: writers[name](ocp, folder / name) or [])

    return {name: attempt(name) for name in writers}


def items() -> dict[str, Any]:
    message = Struct()
    message.update({"name": "größer", "rate": 1e-3})
    return {
        "state": {"w": jnp.arange(4.0), "n": 1},
        "opt": (jnp.ones(3), None),
        "message": message,
        "notes": {"text": "größer", "big": 2**70, "list": [1, None, "x"], "nan": 0.5},
    }


def _save_items(ocp: Any, path: Path) -> None:
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="notes")
    context = ocp.Context()
    context.checkpointables.registry = registry
    with context:
        ocp.save_checkpointables(path, items(), custom_metadata=CUSTOM)


def _save_run(ocp: Any, path: Path) -> None:
    with ocp.training.Checkpointer(path) as checkpointer:
        for step in (1, 2):
            value = items()
            parts = {"state": value["state"], "opt": value["opt"], "message": value["message"]}
            checkpointer.save_checkpointables(step, parts, metrics=METRICS, force=True)


def _save_partial(ocp: Any, path: Path) -> None:
    ocp.partial.save(path, {"a": jnp.ones(3)})
    ocp.partial.save(path, {"b": {"c": jnp.zeros((2, 2)), "s": "text"}})
    ocp.partial.finalize(path)


# --- we read --------------------------------------------------------------------------------


def _quiet(check: Callable[[], list[str]]) -> list[str]:
    """The check's complaints; a warning is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return trees.attempt(check)


def _reader(*modes: str) -> trees.Role:
    def read(folder: Path) -> trees.Results:
        return {
            f"{mode}-{form}-{name}": _quiet(lambda m=mode, p=path, n=name: MODES[m](p, n))
            for form, name, path in ((form, name, folder / form / name) for form, name in SAVED)
            for mode in modes
        }

    return read


def _as_saved(path: Path, name: str) -> list[str]:
    expected = trees.plain(trees.CASES[name].tree())
    found = fc.load(path)
    return trees.differences(found, expected) or trees.sharding_differences(found, expected)


def _items(path: Path, name: str) -> list[str]:
    expected = {"state": trees.plain(trees.CASES[name].tree())}
    return trees.differences(fc.load_checkpointables(path), expected)


def _wished(path: Path, name: str) -> list[str]:
    expected = trees.CASES[name].tree()
    found = fc.load(path, trees.abstract(expected))
    return trees.differences(found, expected) or trees.sharding_differences(found, expected)


def _placed(path: Path, name: str) -> list[str]:
    expected = trees.CASES[name].tree()
    found = fc.load(path, trees.abstract(expected, trees.other_mesh))
    moved = trees.moved(expected, trees.other_mesh)
    return trees.differences(found, expected) or trees.sharding_differences(found, moved)


def _metadata(path: Path, name: str) -> list[str]:
    expected = trees.plain(trees.CASES[name].tree())
    found = fc.metadata(path)
    wrong = [] if found.custom_metadata == CUSTOM else [f"custom {found.custom_metadata}"]
    both = found.init_timestamp_nsecs, found.commit_timestamp_nsecs
    wrong += [] if None not in both and both[0] <= both[1] else [f"times {both}"]
    left, right = jax.tree.structure(found.metadata), jax.tree.structure(expected)
    if left != right:
        return [*wrong, f"structure {left}, expected {right}"]
    pairs = zip(jax.tree.leaves(found.metadata), jax.tree.leaves(expected), strict=True)
    return wrong + [f"{a!r} for {b!r}" for a, b in pairs if not _describes(a, b)]


def _describes(abstract: Any, leaf: Any) -> bool:
    if isinstance(leaf, jax.Array):
        same = (abstract.shape, abstract.dtype) == (leaf.shape, leaf.dtype)
        return same and isinstance(abstract, jax.ShapeDtypeStruct)
    if isinstance(leaf, np.ndarray):
        return (abstract.shape, abstract.dtype) == (leaf.shape, leaf.dtype)
    return type(abstract) is type(leaf)


def read_items(folder: Path) -> trees.Results:
    return {
        f"read {name}": _quiet(lambda c=check: c(folder)) for name, check in _ITEM_CHECKS.items()
    }


def _same(found: Any, expected: Any) -> list[str]:
    return trees.differences(found, expected)


def _typed_items(folder: Path) -> list[str]:
    value = items()
    wanted = {"state": None, "opt": trees.abstract(value["opt"]), "message": Struct, "notes": None}
    found = fc.load_checkpointables(folder / "items", wanted)
    wrong = [] if found["message"] == value["message"] else [f"message {found['message']}"]
    wrong += [] if found["notes"] == value["notes"] else [f"notes {found['notes']}"]
    wrong += _same(found["opt"], value["opt"]) + _same(found["state"], value["state"])
    return wrong


def _foreign_message(folder: Path) -> list[str]:
    """Orbax does not say in the file which message it is: without a class that is an error."""
    try:
        fc.load_checkpointables(folder / "items", {"message": None})
    except fc.errors.FormatError as error:
        return [] if "message" in str(error) else [str(error)]
    return ["loaded a message of unknown class"]


def _wrong_class(folder: Path) -> list[str]:
    try:
        fc.load_checkpointables(folder / "items", {"message": Duration})
    except fc.errors.FormatError as error:
        return [] if "Duration" in str(error) else [str(error)]
    return ["loaded a Struct as a Duration"]


def _all_metadata(folder: Path) -> list[str]:
    found = fc.checkpointables_metadata(folder / "items")
    wrong = [] if set(found.metadata) == set(items()) else [f"items {set(found.metadata)}"]
    return wrong + ([] if found.custom_metadata == CUSTOM else ["custom_metadata"])


def _step(folder: Path) -> list[str]:
    value = items()
    wanted = {"state": None, "opt": None, "message": Struct}
    found = fc.load_checkpointables(folder / "run" / "2", wanted)
    expected = {"state": value["state"], "opt": trees.plain(value["opt"])}
    wrong = [] if found.pop("message") == value["message"] else ["message"]
    return wrong + _same(found, expected)


def _step_state(folder: Path) -> list[str]:
    return _same(fc.load(folder / "run" / "1"), items()["state"])


def _step_metrics(folder: Path) -> list[str]:
    found = fc.load_checkpointables(folder / "run" / "1", {"metrics": None})
    return _same(found, {"metrics": METRICS})


def _partial(folder: Path) -> list[str]:
    expected = {"a": jnp.ones(3), "b": {"c": jnp.zeros((2, 2)), "s": "text"}}
    return _same(fc.load(folder / "partial"), expected)


def _partial_items(folder: Path) -> list[str]:
    return _same(list(fc.load_checkpointables(folder / "partial")), ["state"])


def _float64(folder: Path) -> list[str]:
    return _same(fc.load(folder / "float64"), {"a": 0.1})


def _named(folder: Path) -> list[str]:
    by_default = _same(fc.load(folder / "named"), items()["state"])
    return by_default + _same(
        fc.load(folder / "named", checkpointable_name="model"), items()["state"]
    )


_ITEM_CHECKS: dict[str, Callable[[Path], list[str]]] = {
    check.__name__.strip("_"): check
    for check in (
        *(_typed_items, _foreign_message, _wrong_class, _all_metadata, _step, _step_state),
        *(_step_metrics, _partial, _partial_items, _float64, _named),
    )
}

MODES: dict[str, Callable[[Path, str], list[str]]] = {
    "as_saved": _as_saved,
    "items": _items,
    "metadata": _metadata,
    "wished": _wished,
    "placed": _placed,
}
ROLES: dict[str, trees.Role] = {
    "write_1": trees.both(_writer("default"), write_items),
    "write_2": _writer("uncompressed", "plain_files", "zarr2", "zarr2_plain_files"),
    "read_1": trees.both(_reader("as_saved", "items", "metadata"), read_items),
    "read_2": _reader("wished", "placed"),
}
WAVES = ("write_1", "write_2"), ("read_1", "read_2")


# --- the tests ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> trees.Results:
    return trees.run(MODULE, tmp_path_factory.mktemp("orbax"), *WAVES)


@pytest.mark.parametrize(("form", "name"), CHOSEN)
def test_orbax_saves(results: trees.Results, form: str, name: str) -> None:
    complaints, refusal = results[f"{form}-{name}"], trees.CASES[name].orbax_refuses
    if refusal:
        assert re.search(refusal, json.dumps(complaints))
    else:
        assert complaints == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("form", "name"), SAVED)
def test_we_load_it(results: trees.Results, form: str, name: str, mode: str) -> None:
    assert results[f"{mode}-{form}-{name}"] == []


@pytest.mark.parametrize("name", ["items", "run", "partial", "float64", "named"])
def test_orbax_saves_items(results: trees.Results, name: str) -> None:
    assert results[name] == []


@pytest.mark.parametrize("check", _ITEM_CHECKS)
def test_we_load_items(results: trees.Results, check: str) -> None:
    assert results[f"read {check}"] == []


if __name__ == "__main__":
    trees.main(ROLES)
