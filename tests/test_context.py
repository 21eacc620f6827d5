"""The Context: mutable until it is entered, frozen while it is active, explicit beats ambient."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt import context as contexts
from flax_ckpt.errors import ContextFrozenError

FROZEN = (
    "cannot set {name}: the Context that holds it is active."
    " Set options before `with ctx:`, or derive a new one: `Context(ctx)`."
)
SETTINGS = {
    "asynchronous": ("timeout_secs", 5),
    "multiprocessing": ("primary_host", 1),
    "file": ("path_permission_mode", 0o700),
    "pytree.loading": ("partial_load", True),
    "array.saving.storage_options": ("chunk_byte_size", 64),
    "array.saving": ("storage_options", None),
    "array.loading": ("enable_padding_and_truncation", True),
    "checkpointables": ("registry", None),
    "memory": ("deepcopy_host_arrays", False),
}


def group(context: fc.Context, path: str) -> Any:
    found: Any = context
    for name in path.split("."):
        found = getattr(found, name)
    return found


def partial(value: bool) -> fc.Context:
    context = fc.Context()
    context.pytree.loading.partial_load = value
    return context


@pytest.mark.parametrize("path", SETTINGS)
def test_options_are_frozen_while_active(path: str) -> None:
    context = fc.Context()
    name, value = SETTINGS[path]
    options = group(context, path)
    before = getattr(options, name)
    with context, pytest.raises(ContextFrozenError) as raised:
        setattr(options, name, value)
    assert str(raised.value) == FROZEN.format(name=f"{type(options).__qualname__}.{name}")
    assert isinstance(raised.value, RuntimeError)
    assert getattr(options, name) is before
    setattr(options, name, value)  # afterwards it is free again
    assert getattr(options, name) == value


@pytest.mark.parametrize("path", SETTINGS)
def test_an_unknown_option_is_an_attribute_error(path: str) -> None:
    context = fc.Context()
    with pytest.raises(AttributeError, match="has no option 'no_such'; it has: "):
        group(context, path).no_such = 1
    with pytest.raises(AttributeError):
        _ = group(context, path).no_such


def test_a_group_cannot_be_replaced_nor_a_context_extended() -> None:
    context = fc.Context()
    with pytest.raises(AttributeError):
        context.array = fc.options.ArrayOptions()  # type: ignore[misc]
    with pytest.raises(AttributeError):
        context.no_such = 1  # type: ignore[attr-defined]


def test_it_stays_frozen_until_the_outermost_exit() -> None:
    context = fc.Context()
    with context:
        with context:
            pass
        with pytest.raises(ContextFrozenError):
            context.memory.deepcopy_host_arrays = False
    context.memory.deepcopy_host_arrays = False


def test_it_is_free_again_after_an_exception() -> None:
    context = fc.Context()
    with pytest.raises(RuntimeError, match="inside"), context:
        raise RuntimeError("inside")
    context.asynchronous.timeout_secs = 1
    assert contexts.resolve() is not context


def test_a_child_is_independent_of_its_parent() -> None:
    parent = partial(True)
    parent.array.saving.storage_options.chunk_byte_size = 100
    child = fc.Context(parent)
    assert child.pytree.loading.partial_load is True
    assert child.array.saving.storage_options.chunk_byte_size == 100
    child.array.saving.storage_options.chunk_byte_size = 200
    parent.pytree.loading.partial_load = False
    assert parent.array.saving.storage_options.chunk_byte_size == 100
    assert child.pytree.loading.partial_load is True


def test_a_child_of_an_active_parent_is_not_frozen() -> None:
    parent = partial(True)
    with parent:
        child = fc.Context(parent)
        child.pytree.loading.partial_load = False
        with child, pytest.raises(ContextFrozenError):
            child.pytree.loading.partial_load = True
        child.pytree.loading.partial_load = True
    assert parent.pytree.loading.partial_load is True


def test_a_new_context_has_the_defaults_also_inside_another() -> None:
    with partial(True):
        assert fc.Context().pytree.loading.partial_load is False


def test_nested_contexts_the_inner_one_counts(tmp_path: Path) -> None:
    fc.save(tmp_path / "ckpt", {"a": 1, "b": 2})
    with partial(False):
        with partial(True):
            assert fc.load(tmp_path / "ckpt", {"a": 0}) == {"a": 1}
        with pytest.raises(fc.errors.TreeMismatchError):
            fc.load(tmp_path / "ckpt", {"a": 0})


def test_an_explicit_context_beats_the_ambient_one(tmp_path: Path) -> None:
    """The callback is given one whose registry knows a handler for its config."""
    explicit = fc.Context()
    explicit.file.path_permission_mode = 0o711
    ambient = fc.Context()
    ambient.file.path_permission_mode = 0o755
    with ambient, fc.CheckpointCallback(tmp_path, every_n_steps=1, context=explicit) as ckpt:
        ckpt.on_step_end(1, {"params": {"w": np.ones(2)}})
    assert (tmp_path / "1").stat().st_mode & 0o777 == 0o711


def test_the_ambient_context_is_taken_when_the_callback_is_made(tmp_path: Path) -> None:
    ambient = fc.Context()
    ambient.file.path_permission_mode = 0o711
    with ambient:
        ckpt = fc.CheckpointCallback[Any](tmp_path, every_n_steps=1)
    ckpt.on_step_end(1, {"params": {"w": np.ones(2)}})
    ckpt.close()
    assert (tmp_path / "1").stat().st_mode & 0o777 == 0o711


def test_a_run_keeps_the_options_that_it_was_given(tmp_path: Path) -> None:
    context = fc.Context()
    context.array.saving.use_ocdbt = False
    run = fc.training.Checkpointer(tmp_path / "run", context=context)
    ckpt = fc.CheckpointCallback[Any](tmp_path / "ckpt", every_n_steps=1, context=context)
    context.array.saving.use_ocdbt = True
    with run, ckpt:
        run.save(1, {"w": np.ones(2)})
        ckpt.on_step_end(1, {"params": {"w": np.ones(2)}})
        assert run.load(1)["w"].tolist() == [1, 1]
    for tree in ("run/1/state", "ckpt/1/params"):
        assert (tmp_path / tree / "w").is_dir(), "an array's own directory"
        assert not (tmp_path / tree / "manifest.ocdbt").exists()


def test_restore_with_an_explicit_context_beats_the_ambient_one(tmp_path: Path) -> None:
    def context(handler_name: str) -> fc.Context:
        made = fc.Context()
        registry = fc.handlers.local_registry(include_global_registry=False)
        made.checkpointables.registry = registry.add(
            fc.handlers.MetricsHandler, checkpointable_name=handler_name
        )
        return made

    with fc.CheckpointCallback(tmp_path, every_n_steps=1) as ckpt:
        ckpt.on_step_end(1, {"params": {"w": np.ones(2)}}, metrics={"loss": 0.5})
    with context("unrelated"):  # without a handler for metrics
        out = fc.restore(tmp_path, context=context("metrics"))
    assert out.metrics == {"loss": 0.5}


def test_permission_bits_reach_every_directory(tmp_path: Path) -> None:
    context = fc.Context()
    context.file.path_permission_mode = 0o711
    with context:
        fc.save(tmp_path / "ckpt", {"a": np.ones(2)})
    modes = {
        str(path.relative_to(tmp_path)): path.stat().st_mode & 0o777
        for path in [tmp_path / "ckpt", *tmp_path.rglob("ckpt/**/*")]
        if path.is_dir()
    }
    assert set(modes.values()) == {0o711}, modes


def test_permission_bits_reach_the_root_of_a_run_that_is_made(tmp_path: Path) -> None:
    def mode(path: str) -> int:
        return (tmp_path / path).stat().st_mode & 0o777

    (tmp_path / "old").mkdir()
    before = mode("old")
    context = fc.Context()
    for bits in (0o500, 0o711):
        context.file.path_permission_mode = bits
        for root in (f"new_{bits}/run", "old"):
            with fc.training.Checkpointer(
                tmp_path / root, context=context, custom_metadata={"a": 1}
            ) as run:
                run.save(bits, {"a": np.ones(2)})
            assert mode(f"{root}/{bits}") == bits | 0o700, "its owner can delete it"
            assert mode(f"{root}/metadata") == before
        assert mode(f"new_{bits}/run") == bits | 0o200, "its owner goes on writing"
        assert mode(f"new_{bits}") == mode("old") == before, "what was there, or lies above"


def test_other_threads_do_not_see_the_context(tmp_path: Path) -> None:
    fc.save(tmp_path / "ckpt", {"a": 1, "b": 2})
    outcome: list[Any] = []

    def other() -> None:
        try:
            outcome.append(fc.load(tmp_path / "ckpt", {"a": 0}))
        except fc.errors.TreeMismatchError as error:
            outcome.append(type(error).__name__)

    with partial(True):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert outcome == ["TreeMismatchError"]


def test_one_context_in_many_threads_at_once(tmp_path: Path) -> None:
    """Entering and leaving is counted: no thread may thaw it for another, or leave it frozen."""
    context = partial(True)
    fc.save(tmp_path / "ckpt", {"a": 1, "b": 2})
    barrier = threading.Barrier(8)
    wrong: list[Any] = []

    def work() -> None:
        barrier.wait()
        for _ in range(200):
            with context:
                try:
                    context.memory.deepcopy_host_arrays = False
                except ContextFrozenError:
                    continue
                wrong.append("thawed")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    context.memory.deepcopy_host_arrays = False  # not frozen for ever


def test_a_save_in_the_background_keeps_its_context(tmp_path: Path) -> None:
    calls: list[str] = []
    context = fc.Context()
    context.asynchronous.post_finalization_callback = lambda: calls.append("finished")
    with context:
        response = fc.save_async(tmp_path / "ckpt", {"a": np.ones(2)})
    response.result()
    assert calls == ["finished"]


def test_repr_shows_the_options() -> None:
    context = fc.Context()
    context.asynchronous.timeout_secs = 77
    assert "timeout_secs=77" in repr(context)
