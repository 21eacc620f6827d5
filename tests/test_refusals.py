"""What a save refuses before it begins, or when a handler is not what it has to be."""

import os
import re
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt.errors import CheckpointNotFoundError, InvalidLayoutError, NotHandleableError
from flax_ckpt.format.names import LOCK
from flax_ckpt.storage import commit, hosts

TREE = {"w": np.ones(3)}


def test_nothing_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is nothing to save: `checkpointables` is empty"):
        fc.save_checkpointables(tmp_path / "c", {})
    with pytest.raises(ValueError, match="checkpointable 'config' is None: leave it out instead"):
        fc.save_checkpointables(tmp_path / "c", {"state": TREE, "config": None})
    assert os.listdir(tmp_path) == []


class Forgets:
    """A handler whose `save` writes at once, and returns nothing to wait for."""

    async def save(self, directory: Any, value: Any) -> Any:
        return None

    async def load(self, directory: Any, abstract: Any = None) -> Any: ...

    async def metadata(self, directory: Any) -> Any: ...

    def is_handleable(self, value: Any) -> bool:
        return True

    def is_abstract_handleable(self, abstract: Any) -> bool | None:
        return None


def test_a_handler_has_to_return_what_writes(tmp_path: Path) -> None:
    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry().add(
        Forgets, checkpointable_name="z"
    )
    message = "checkpointable 'z': Forgets.save returned None, not an awaitable that writes it"
    with context, pytest.raises(NotHandleableError, match=re.escape(message)):
        fc.save_checkpointables(tmp_path / "c", {"state": TREE, "z": 1})
    assert os.listdir(tmp_path) == []
    fc.save(tmp_path / "c", TREE)


def test_the_primary_process_is_one_of_those_that_save(tmp_path: Path) -> None:
    context = fc.Context()
    context.multiprocessing.primary_host = 3
    message = "primary_host is 3, which is not among the active processes [0]"
    with context, pytest.raises(ValueError, match=re.escape(message)):
        fc.save(tmp_path / "c", TREE)


def test_a_process_alone_agrees_with_itself() -> None:
    assert hosts.ALONE.gather("point", {"a": 1}) == [{"a": 1}]
    assert hosts.ALONE.broadcast("point", [1]) == [1]


def test_an_object_store_is_named_as_that() -> None:
    with pytest.raises(InvalidLayoutError, match="not gs://; mount the bucket"):
        fc.save("gs://bucket/run/1", TREE)


def test_what_is_not_there_is_not_removed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="is not there, or is no directory"):
        commit.remove(str(tmp_path / "c"))


def test_a_lock_for_which_there_is_no_room_is_not_left_behind(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    run = fc.training.Checkpointer(tmp_path)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            run.save(1, TREE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == []
    assert run.save(1, TREE)
    run.close()


def test_a_lock_that_was_removed_by_hand_stops_nothing(tmp_path: Path) -> None:
    with fc.training.Checkpointer(tmp_path) as run:
        run.save(1, TREE)
        (tmp_path / LOCK).unlink()
        run.save(2, TREE)
    assert sorted(os.listdir(tmp_path)) == ["1", "2"]
