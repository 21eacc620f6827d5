"""Training that is killed and goes on, against training that is not: the same bits at the end.

python -m torture.resume <root> <steps> <file for the final states>

The program trains a Linen and an NNX network, with dropout, batch statistics, a schedule in the
optimizer and a data iterator each, and prints a line for each step. The campaign kills it at
random, any number of times.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training import train_state

import flax_ckpt as fc
from torture.outcome import Outcome

ROOT = Path(__file__).resolve().parents[1]
RECORDS, BATCH, WIDTH = 64, 8, 6
STEPS = 40  # 2N
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(RECORDS, WIDTH)).astype(np.float32)
WANTED = (INPUTS[:, :1] * INPUTS[:, 1:2]).astype(np.float32)


def campaign(scale: float, seed: int) -> list[Outcome]:
    rounds, chance = max(1, round(100 * scale)), random.Random(seed)
    outcome = Outcome(f"Linen and NNX, {STEPS} steps, killed 1 to 3 times and resumed")
    moments: list[int] = []
    with tempfile.TemporaryDirectory(prefix="flax_ckpt_resume_") as place:
        whole, _ = run(place, "whole", None)
        for number in range(rounds):
            lines: dict[Any, Any] = {}
            where, problem = f"{place}/{number}", ""
            kills = sorted(chance.sample(range(1, STEPS), chance.choice([1, 1, 2, 3])))
            for after in [*kills, None]:
                wait = chance.random() * 0.02
                said, ended = run(place, str(number), after, wait)
                if ended not in ((0,) if after is None else (0, -signal.SIGKILL)):
                    problem += f"it ended with {ended}; "
                if ended == -signal.SIGKILL:
                    moments.append(max(step for step, _ in said))
                lines |= said
            problem += "; ".join(f"{at} differs" for at in whole if lines.get(at) != whole[at])
            if Path(f"{where}.npz").read_bytes() != Path(f"{place}/whole.npz").read_bytes():
                problem += "; the final states differ"
            outcome.check(not problem, f"round {number}, seed {seed}, killed at {kills}: {problem}")
    outcome.notes["kills"] = len(moments)
    outcome.notes["after steps"] = f"{min(moments)} to {max(moments)}"
    return [outcome]


def run(
    place: str, name: str, kill_after: int | None, wait: float = 0
) -> tuple[dict[Any, Any], int]:
    """Starts the program, which may be killed a moment after a step; what it said of each step."""
    with subprocess.Popen(
        [sys.executable, "-m", "torture.resume", f"{place}/{name}", f"{place}/{name}.npz"],
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": "",
            "JAX_COMPILATION_CACHE_DIR": f"{place}/cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        said: dict[Any, Any] = {}
        for line in process.stdout:
            if not line.endswith("\n"):
                break  # killed while it wrote
            kind, step, *rest = json.loads(line)
            said[step, kind] = rest
            if kill_after is not None and step >= kill_after:
                kill_after = STEPS + 1
                time.sleep(wait)  # any moment of the steps and saves that follow
                process.kill()
    return said, process.returncode


# The program.


class Batches:
    """Draws records anew in each epoch."""

    def __init__(self) -> None:
        self.rng = np.random.RandomState(5)
        self.left = np.zeros(0, np.int64)

    def __iter__(self) -> Iterator[np.ndarray]:
        return self

    def __next__(self) -> np.ndarray:
        if not len(self.left):
            self.left = self.rng.permutation(RECORDS)
        batch, self.left = self.left[:BATCH], self.left[BATCH:]
        return batch

    def get_state(self) -> Any:
        return {"left": self.left, "rng": self.rng.get_state()}

    def set_state(self, state: Any) -> None:
        self.left = state["left"]
        self.rng.set_state(state["rng"])


class Run(NamedTuple):
    init: Callable[[], Any]
    like: Callable[[], Any]
    follow: Callable[[Any, Any, Any], tuple[Any, Any]]


def optimizer() -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.1, 5, STEPS)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(WIDTH)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=False, momentum=0.9)(x))
        x = nn.Dropout(0.3, deterministic=False)(x)
        return nn.Dense(1)(x)


class TrainState(train_state.TrainState):
    batch_stats: Any
    key: jax.Array


def linen() -> Run:
    net, tx = LinenNet(), optimizer()

    @jax.jit
    def init() -> Any:
        keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
        made = net.init(keys, INPUTS[:BATCH])
        return TrainState.create(apply_fn=net.apply, tx=tx, key=jax.random.key(2), **made)

    def follow(state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        key, dropout = jax.random.split(state.key)

        def loss_of(params: Any) -> Any:
            variables = {"params": params, "batch_stats": state.batch_stats}
            out, new = net.apply(variables, x, rngs={"dropout": dropout}, mutable=["batch_stats"])
            return jnp.mean((out - y) ** 2), new

        (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        return state.apply_gradients(grads=grads, key=key, **new), loss

    return Run(init, lambda: jax.eval_shape(init), jax.jit(follow, donate_argnums=0))


class NnxNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.last = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


def with_nnx() -> Run:
    def init() -> Any:
        net = NnxNet(nnx.Rngs(0))
        return net, nnx.Optimizer(net, optimizer(), wrt=nnx.Param)

    @nnx.jit
    def update(net: Any, tx: Any, x: Any, y: Any) -> Any:
        loss, grads = nnx.value_and_grad(lambda net: jnp.mean((net(x) - y) ** 2))(net)
        tx.update(net, grads)
        return loss

    def follow(state: Any, x: Any, y: Any) -> tuple[Any, Any]:
        return state, update(*state, x, y)

    return Run(nnx.jit(init), lambda: nnx.eval_shape(init), follow)


def main(root: str, final: str) -> None:
    ended: list[Any] = []
    runs = {"linen": linen(), "nnx": with_nnx()}
    batches = {kind: Batches() for kind in runs}
    callbacks: Any = {
        kind: fc.CheckpointCallback(
            f"{root}/{kind}", every_n_steps=3 + 2 * i, keep_last=2, data_iterator=batches[kind]
        )
        for i, kind in enumerate(runs)
    }
    states, steps = dict[str, Any](), dict[str, int]()
    for kind, (init, like, _) in runs.items():
        states[kind], steps[kind] = callbacks[kind].restore_or_init(like(), init=init)
    while (least := min(steps.values())) < STEPS:
        for kind in [kind for kind in runs if steps[kind] == least]:
            which = next(batches[kind])
            states[kind], loss = runs[kind].follow(states[kind], INPUTS[which], WANTED[which])
            steps[kind] += 1
            said = [kind, steps[kind], which.tolist(), float(loss).hex()]
            print(json.dumps(said), flush=True)
            callbacks[kind].on_step_end(steps[kind], states[kind])
    for kind in runs:
        callbacks[kind].close()
        state = nnx.state(states[kind]) if kind == "nnx" else states[kind]
        ended += [bits(leaf) for leaf in jax.tree.leaves(state)]
    np.savez(final, *ended)


def bits(leaf: Any) -> np.ndarray:
    is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


if __name__ == "__main__":
    main(*sys.argv[1:])
