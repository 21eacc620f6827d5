"""What a process does when it is killed, or its disk fails: each says before and after."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import flax_ckpt as fc
from flax_ckpt.format import names
from flax_ckpt.storage import kinds
from torture.ledger import ITEM, state_of

Say = Callable[..., None]
Scenario = Callable[[str, int, Say], None]


def _steps(root: str) -> list[int]:
    numbered = [n for n in os.listdir(root) if n.isdigit()]
    return sorted(int(n) for n in numbered if kinds.is_checkpoint(os.path.join(root, n)))


def _next(root: str) -> int:
    """A left-over of the step that was killed is in the way of this one."""
    return max(_steps(root), default=0) + 1


def save(root: str, seed: int, say: Say) -> None:
    """Two steps, one after the other."""
    for step in range(first := _next(root), first + 2):
        say("begin", str(step), seed)
        fc.save_checkpointables(os.path.join(root, str(step)), state_of(str(step), seed))
        say("durable", str(step), seed)


def save_async(root: str, seed: int, say: Say) -> None:
    """A step in the background."""
    _in_flight(root, seed, say, 1)


def two_in_flight(root: str, seed: int, say: Say) -> None:
    """Two steps in the background at once."""
    _in_flight(root, seed, say, 2)


def _in_flight(root: str, seed: int, say: Say, count: int) -> None:
    responses: list[tuple[str, fc.AsyncResponse[None]]] = []
    failed: list[OSError] = []
    for step in range(first := _next(root), first + count):
        say("begin", key := str(step), seed)
        state = state_of(key, seed)
        try:
            responses.append((key, fc.save_checkpointables_async(os.path.join(root, key), state)))
        except OSError as error:  # the one before is waited for
            failed.append(error)
    for key, response in responses:
        try:
            response.result()
            say("durable", key, seed)
        except OSError as error:
            failed.append(error)
    for error in failed[:1]:
        raise error


def overwrite(root: str, seed: int, say: Say) -> None:
    """A checkpoint gets another content, twice."""
    for version in (seed, seed + 1):
        say("begin", "0", version)
        path = os.path.join(root, "0")
        fc.save_checkpointables(path, state_of("0", version), overwrite=True)
        say("durable", "0", version)


def delete(root: str, seed: int, say: Say) -> None:
    """A checkpoint is deleted, one that an earlier process may have begun to delete."""
    save(root, seed, say)
    for step in _steps(root)[:-1]:
        say("deleting", key := str(step))
        fc.delete(os.path.join(root, key), missing_ok=True)
        say("deleted", key)


def delete_item(root: str, seed: int, say: Say) -> None:
    """One of its checkpointables is."""
    save(root, seed, say)
    for step in _steps(root)[-2:]:
        say("deleting", key := f"{step}{ITEM}")
        name = ITEM.removeprefix(":")
        fc.delete(os.path.join(root, str(step)), checkpointable_name=name, missing_ok=True)
        say("deleted", key)


def retention(root: str, seed: int, say: Say) -> None:
    """A run that resumes, cleans up, and keeps its last two steps."""
    first = _next(root)
    with fc.CheckpointCallback(root, every_n_steps=1, keep_last=2, at_end=False) as ckpt:
        ckpt.restore_or_init(state_of("", 0))
        for step in range(first, first + 3):
            for old in _steps(root):
                if old <= step - 2:
                    say("deleting", str(old))
            _train(ckpt, step, seed, say)


def supersede(root: str, seed: int, say: Say) -> None:
    """A run goes back to an earlier step; the later ones are moved aside."""
    first, like = _next(root), state_of("", 0)
    with fc.CheckpointCallback(root, every_n_steps=1, keep_last=None, at_end=False) as ckpt:
        ckpt.restore_or_init(like)
        for step in (first, first + 1):
            _train(ckpt, step, seed, say)
    with fc.CheckpointCallback(root, every_n_steps=1, keep_last=None, at_end=False) as ckpt:
        ckpt.restore_or_init(like, step=first)
        say("deleting", str(first + 1))
        _train(ckpt, first + 1, seed + 1, say)


def _train(ckpt: fc.CheckpointCallback[Any], step: int, version: int, say: Say) -> None:
    say("begin", str(step), version)
    ckpt.on_step_end(step, state_of(str(step), version))
    ckpt.wait()
    say("durable", str(step), version)


def partial(root: str, seed: int, say: Say) -> None:
    """A tree in two parts, after that which an earlier process may have left unfinished."""
    path = os.path.join(root, key := str(_next(root)))
    if os.path.exists(path + names.SESSION_SUFFIX):
        finish(path, say)
        path = os.path.join(root, key := str(_next(root)))
    state = state_of(key, seed)
    say("begin", key, seed)
    say("deleting", key + ITEM)  # it may be without that
    for count, name in enumerate(state, 1):
        fc.partial.save(path, {name: state[name]})
        say("parts", key, count)
    fc.partial.finalize(path)
    say("durable", key, seed)


def finish(path: str, say: Say) -> None:
    """Finalizes what is there of a partial save."""
    try:
        fc.partial.finalize(path)
    except fc.errors.CheckpointNotFoundError:
        return  # no part was saved
    key, tree = os.path.basename(path), fc.load(path)
    whole = "opt_state" in tree
    say("durable" if whole else "rescued", key, int(tree["params"]["version"]))


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        *(save, save_async, two_in_flight, overwrite, delete, delete_item),
        *(retention, supersede, partial),
    )
}
