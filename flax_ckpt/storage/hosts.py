"""The processes that save and load together: who is primary, and where they wait for each other.

Barriers go through the client of `jax.distributed`, never through a device collective: a save must
not queue behind the train step, and runs in a thread of its own.
"""

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Collection
from typing import Any

import jax
from jax._src import distributed  # the coordination client has no public name
from jax.experimental import multihost_utils

from flax_ckpt.errors import BarrierTimeoutError
from flax_ckpt.options import AsyncOptions, MultiprocessingOptions

_operations: Counter[str] = Counter()
_state: Any = distributed.global_state


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of one operation, and its name, the same in all of them.

    Attributes:
        index: this process.
        active: all processes that take part, in order.
        primary: the one that writes what is written once.
        operation: names this operation's barriers, the same in all processes.
        timeout_secs: how long a barrier waits.
    """

    index: int
    active: tuple[int, ...]
    primary: int
    operation: str
    timeout_secs: float

    @property
    def is_primary(self) -> bool:
        """Whether this process writes what is written once."""
        return self.index == self.primary

    @property
    def several(self) -> bool:
        """Whether there is anyone to wait for."""
        return len(self.active) > 1

    def barrier(self, point: str) -> None:
        """Waits until all processes are at `point`.

        Raises:
            BarrierTimeoutError: one of them is not there in time, or is gone.
        """
        if self.several:
            everyone = list(self.active)
            what = f"for processes {everyone} to be at"
            self._wait(_state.client.wait_at_barrier, point, what, everyone)

    def broadcast(self, point: str, value: Any) -> Any:
        """The primary's value in every process.

        Args:
            point: names it; once in an operation.
            value: what JSON can hold; that of the others is ignored.

        Raises:
            BarrierTimeoutError: the primary does not say in time.
        """
        if not self.several:
            return value
        if self.is_primary:
            self._say(point, value)
            return value
        return self._hear(point, self.primary)

    def gather(self, point: str, value: Any) -> list[Any]:
        """The values of all processes, in their order; as :meth:`broadcast`."""
        if not self.several:
            return [value]
        self._say(f"{point}/{self.index}", value)
        return [self._hear(f"{point}/{other}", other) for other in self.active]

    def _say(self, point: str, value: Any) -> None:
        _state.client.key_value_set(f"{self.operation}/{point}", json.dumps(value))

    def _hear(self, point: str, other: int) -> Any:
        what = f"for process {other} to say"
        return json.loads(self._wait(_state.client.blocking_key_value_get, point, what))

    def _wait(self, call: Callable[..., Any], point: str, what: str, *arguments: Any) -> Any:
        key = f"{self.operation}/{point}"
        try:
            return call(key, int(self.timeout_secs * 1000), *arguments)
        except Exception as error:  # the client raises one type for all: XlaRuntimeError
            raise BarrierTimeoutError(
                f"process {self.index} waited {what} {key!r}, in vain for {self.timeout_secs:g} s:"
                f" another has failed or makes another sequence of calls. The coordinator: {error}"
            ) from error

    def forget(self, points: str) -> None:
        """Frees what was broadcast under `points`, a common beginning, once all have read it."""
        if self.several and self.is_primary:
            _state.client.key_value_delete(f"{self.operation}/{points}/")


ALONE = Hosts(0, (0,), 0, "", 0)  # of what a process does without the others


def reached_preemption(step: int) -> bool:
    """Whether this is the step at which all processes are to save, before the cluster ends them.

    Ask at every step. JAX agrees on the step between the processes; without `jax.distributed`, or
    where its preemption service is off, it is never reached.
    """
    if _state.preemption_sync_manager is None:
        return False
    return multihost_utils.reached_preemption_sync_point(step)


def current(options: MultiprocessingOptions, waiting: AsyncOptions, what: str) -> Hosts:
    """The hosts of a new operation, seen from this process.

    Args:
        options: who takes part.
        waiting: how long a barrier waits.
        what: the path that is saved. It names the barriers, so that a save that fails on one
            process alone does not put later ones out of step.
    """
    everyone = tuple(options.active_processes or range(jax.process_count()))
    if options.primary_host not in everyone:
        why = f"{options.primary_host}, which is not among the active processes {list(everyone)}"
        raise ValueError(f"multiprocessing.primary_host is {why}; set it to one of them")
    _operations[what] += len(everyone) > 1
    operation = f"{options.barrier_sync_key_prefix or ''}flax_ckpt/{what}/{_operations[what]}"
    active, primary = tuple(sorted(everyone)), options.primary_host
    return Hosts(jax.process_index(), active, primary, operation, waiting.timeout_secs)


def process_count() -> int:
    """How many processes the run has."""
    return jax.process_count()


def process_index() -> int:
    """Which of them this one is, from 0."""
    return jax.process_index()


def is_primary_host(primary_host: int | None) -> bool:
    """Whether this process is the one of that index; None: every process is."""
    return primary_host in (None, jax.process_index())


async def sync_global_processes(
    key: str,
    *,
    operation_id: str,
    timeout: int | None = None,
    processes: Collection[int] | None = None,
) -> None:
    """Waits until all processes have called this with the same key.

    Args:
        key: names the point; used only once within an operation.
        operation_id: names the operation.
        timeout: seconds to wait; None: 300.
        processes: those that call; None: all.

    Raises:
        BarrierTimeoutError: not all were there in time.
        ValueError: this process is not among them, or the timeout is not above 0.
    """
    everyone = tuple(sorted(range(jax.process_count()) if processes is None else processes))
    index = jax.process_index()
    if timeout is not None and timeout <= 0:
        raise ValueError(f"timeout must be above 0 seconds, got {timeout}")
    if index not in everyone:
        others = f"the processes {list(everyone)}, of which it is none"
        raise ValueError(f"process {index} waits at {key!r} for {others}")
    hosts = Hosts(index, everyone, everyone[0], operation_id, timeout or 300)
    await asyncio.to_thread(hosts.barrier, key)
