"""A run whose batches come from an iterator, as a program that kills itself after a step.

python -m tests.training.feeding <kind> <root> <log> <step after which to kill, or 0>

It appends one line for each step to the log: the step, the records of its batch, the loss.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training.train_state import TrainState

import flax_ckpt as fc

RECORDS, BATCH = 72, 4
STEPS = RECORDS // BATCH
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(RECORDS, 5)).astype(np.float32)


def dataset() -> Iterator[Any]:
    source = grain.MapDataset.source(np.arange(RECORDS)).shuffle(seed=3)
    return iter(source.batch(BATCH).to_iter_dataset())


def loader() -> Iterator[Any]:
    sampler = grain.samplers.IndexSampler(RECORDS, shuffle=True, seed=3, num_epochs=1)
    return iter(
        grain.DataLoader(
            data_source=np.arange(RECORDS),
            sampler=sampler,
            operations=[grain.transforms.Batch(BATCH)],
            worker_count=0,
        )
    )


class Drawing:
    """Draws without putting back; its state has an array, bytes, a tuple and numbers."""

    def __init__(self, seed: int = 3) -> None:
        self.rng = np.random.RandomState(seed)
        self.left = np.arange(RECORDS)

    def __iter__(self) -> Drawing:
        return self

    def __next__(self) -> np.ndarray:
        if not len(self.left):
            raise StopIteration
        drawn = self.rng.choice(len(self.left), BATCH, replace=False)
        batch, self.left = self.left[drawn], np.delete(self.left, drawn)
        return batch

    def get_state(self) -> Any:
        return {"left": self.left, "rng": self.rng.get_state(), "seen": [b"\x00\xff", None, True]}

    def set_state(self, state: Any) -> None:
        assert state["seen"] == [b"\x00\xff", None, True]
        self.left = state["left"]
        self.rng.set_state(state["rng"])


class SavesItself:
    """A `StatefulCheckpointable` with a file of its own."""

    def __init__(self) -> None:
        self.inner = Drawing()

    def __next__(self) -> np.ndarray:
        return next(self.inner)

    async def save(self, directory: Any) -> Any:
        return self.write(directory, [self.inner.left.tolist(), self.inner.rng.get_state()[1:3]])

    async def write(self, directory: Any, state: Any) -> None:
        left, (words, position) = state
        directory = await directory.await_creation()
        text = json.dumps([left, words.tolist(), position])
        (directory / "drawing.json").write_text(text)

    async def load(self, directory: Any) -> Any:
        return self.read(directory)

    async def read(self, directory: Any) -> None:
        left, words, position = json.loads((directory / "drawing.json").read_text())
        self.inner.left = np.array(left)
        self.inner.rng.set_state(("MT19937", np.array(words), position))


KINDS = {"dataset": dataset, "loader": loader, "plain": Drawing, "stateful": SavesItself}


@jax.jit
def init() -> TrainState:
    params = {"w": jnp.zeros((5, 1))}
    return TrainState.create(apply_fn=jnp.dot, params=params, tx=optax.adam(0.1))


@jax.jit
def train_step(state: TrainState, x: jax.Array) -> tuple[TrainState, jax.Array]:
    def loss_fn(params: Any) -> jax.Array:
        return jnp.mean((x @ params["w"] - x.sum(1, keepdims=True)) ** 2)

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def train(kind: str, root: Path, log: Path, kill_after: int = 0) -> TrainState:
    iterator: Any = KINDS[kind]()
    with (
        log.open("a") as file,
        fc.CheckpointCallback(root, every_n_steps=3, data_iterator=iterator) as ckpt,
    ):
        state, step = ckpt.restore_or_init(jax.eval_shape(init), init=init)
        while step < STEPS:
            batch = next(iterator)
            state, loss = train_step(state, INPUTS[batch])
            step += 1
            print(json.dumps([step, batch.tolist(), float(loss).hex()]), file=file, flush=True)
            ckpt.on_step_end(step, state)
            if step == kill_after:
                os.kill(os.getpid(), signal.SIGKILL)
    return state


if __name__ == "__main__":
    train(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
