"""The public names: adding or removing one is a decision, made by editing the list below."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
import types

import pytest

import flax_ckpt as fc

FUNCTIONS = {
    "checkpointables_metadata",
    "delete",
    "delete_async",
    "is_orbax_checkpoint",
    "load",
    "load_async",
    "load_checkpointables",
    "load_checkpointables_async",
    "metadata",
    "restore",
    "restore_train_state",
    "save",
    "save_async",
    "save_checkpointables",
    "save_checkpointables_async",
    "verify",
}
CLASSES = {
    "AsyncResponse",
    "Best",
    "CheckpointMetadata",
    "CheckpointableHandler",
    "CheckpointCallback",
    "Context",
    "Report",
    "Restored",
    "StatefulCheckpointable",
    "Verification",
}
ALIASES = {
    "AbstractCheckpointable",
    "Checkpointable",
    "PyTreeMetadata",
}
MODULES = {
    "arrays",
    "errors",
    "handlers",
    "leaves",
    "multihost",
    "options",
    "partial",
    "path",
    "training",
    "tree",
}
CONSTANTS = {"PLACEHOLDER"}
PUBLIC = FUNCTIONS | CLASSES | ALIASES | MODULES | CONSTANTS

NAMES_IN = {
    "arrays": {
        "AbstractArray",
        "AbstractScalar",
        "AbstractShardedArray",
        "ArrayLike",
        "DType",
        "Scalar",
        "Shape",
        "to_shape_dtype_struct",
    },
    "leaves": {
        "ArrayLeaf",
        "LeafHandler",
        "LeafRegistry",
        "LeafWrite",
        "LoadRules",
        "SavedLeaf",
        "Shard",
        "Target",
        "host_write",
        "whole",
    },
    "multihost": {
        "is_primary_host",
        "process_count",
        "process_index",
        "sync_global_processes",
    },
    "testing": {"HandlerTests", "LeafTests"},
    "tree": {
        "AbstractLeaf",
        "JsonType",
        "Leaf",
        "PyTree",
        "PyTreeKey",
        "PyTreeKeyPath",
        "PyTreeOf",
        "merge",
    },
}

# Loaded when a value of theirs is met, or never. They cost a user seconds, or a conflict.
NOT_LOADED = ("absl", "flax", "grain", "ml_collections", "orbax", "safetensors", "sklearn")


def test_public_names_are_pinned() -> None:
    assert sorted(fc.__all__) == sorted(PUBLIC)


def test_no_other_name_is_visible() -> None:
    visible = {
        name
        for name, value in vars(fc).items()
        if not name.startswith("_") and name != "annotations"
        # A room is an attribute of the package once something imports it.
        if not (isinstance(value, types.ModuleType) and value.__name__ == f"flax_ckpt.{name}")
    }
    assert visible <= PUBLIC, f"not in __all__: {sorted(visible - PUBLIC)}"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_public_modules_are_ours(name: str) -> None:
    module = getattr(fc, name)
    assert isinstance(module, types.ModuleType)
    assert module.__name__ == f"flax_ckpt.{name}"


@pytest.mark.parametrize("name", sorted(NAMES_IN))
def test_names_in_modules_are_pinned(name: str) -> None:
    module = importlib.import_module(f"flax_ckpt.{name}")
    assert set(module.__all__) == NAMES_IN[name]


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_public_functions_are_documented(name: str) -> None:
    assert inspect.isfunction(getattr(fc, name))
    assert inspect.getdoc(getattr(fc, name)), f"{name} has no docstring"


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_public_classes_are_documented(name: str) -> None:
    assert inspect.isclass(getattr(fc, name))
    assert getattr(fc, name).__doc__, f"{name} has no docstring"


def test_import_is_light() -> None:
    program = "import sys, flax_ckpt; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert sorted(set(NOT_LOADED) & set(done.stdout.split())) == []


def test_the_suites_for_authors_need_no_pytest() -> None:
    program = "import sys, flax_ckpt; print('flax_ckpt.testing' in sys.modules)\n"
    program += "import flax_ckpt.testing; print('pytest' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["False", "False"]
