"""The Context: options of everything that runs inside its `with` block.

    ctx = fc.Context()
    ctx.asynchronous.timeout_secs = 60
    with ctx:
        fc.save(path, tree)

A context given explicitly always beats the one of an enclosing `with`.
"""

from __future__ import annotations

import contextvars
from types import TracebackType
from typing import TypeVar, final

from flax_ckpt import options

T = TypeVar("T")

# The stack of active contexts of this thread and task; copied into what they start.
_ACTIVE: contextvars.ContextVar[tuple[Context, ...]] = contextvars.ContextVar(
    "flax_ckpt_contexts", default=()
)


@final
class Context:
    """A set of options, mutable until it is entered and while it is active frozen.

    A new Context starts from the defaults, also inside another one; `Context(parent)` starts from
    a copy of the parent's options.

    Args:
        context: the parent to copy the options of.

    >>> parent = Context()
    >>> parent.asynchronous.timeout_secs = 60
    >>> child = Context(parent)
    >>> child.pytree.loading.partial_load = True
    >>> child.asynchronous.timeout_secs, parent.pytree.loading.partial_load
    (60, False)
    >>> with parent:
    ...     parent.asynchronous.timeout_secs = 1  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    flax_ckpt.errors.ContextFrozenError: cannot set AsyncOptions.timeout_secs: the Context ...
    """

    def __init__(self, context: Context | None = None) -> None:
        self._array = _inherit(context, "array", options.ArrayOptions)
        self._pytree = _inherit(context, "pytree", options.PyTreeOptions)
        self._asynchronous = _inherit(context, "asynchronous", options.AsyncOptions)
        self._file = _inherit(context, "file", options.FileOptions)
        self._multiprocessing = _inherit(context, "multiprocessing", options.MultiprocessingOptions)
        self._checkpointables = _inherit(context, "checkpointables", options.CheckpointablesOptions)
        self._memory = _inherit(context, "memory", options.MemoryOptions)

    # Read-only on purpose: a group is changed through its own attributes, never replaced.
    @property
    def array(self) -> options.ArrayOptions:
        """How arrays are saved and loaded."""
        return self._array

    @property
    def pytree(self) -> options.PyTreeOptions:
        """How trees are saved and loaded."""
        return self._pytree

    @property
    def asynchronous(self) -> options.AsyncOptions:
        """How saves run in the background."""
        return self._asynchronous

    @property
    def file(self) -> options.FileOptions:
        """How directories and files are made."""
        return self._file

    @property
    def multiprocessing(self) -> options.MultiprocessingOptions:
        """Which processes take part."""
        return self._multiprocessing

    @property
    def checkpointables(self) -> options.CheckpointablesOptions:
        """Which handlers are used."""
        return self._checkpointables

    @property
    def memory(self) -> options.MemoryOptions:
        """How host memory is used."""
        return self._memory

    def __enter__(self) -> Context:
        for group in vars(self).values():
            options.freeze(group, +1)
        _ACTIVE.set((*_ACTIVE.get(), self))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _ACTIVE.set(_ACTIVE.get()[:-1])
        for group in vars(self).values():
            options.freeze(group, -1)

    def __repr__(self) -> str:
        groups = ", ".join(f"{name[1:]}={group!r}" for name, group in vars(self).items())
        return f"Context({groups})"


def _inherit(parent: Context | None, name: str, default: type[T]) -> T:
    return default() if parent is None else options.copy(getattr(parent, name))


def resolve(context: Context | None = None) -> Context:
    """The context to use: the one given, else the active one, else a new one with the defaults."""
    if context is not None:
        return context
    active = _ACTIVE.get()
    return active[-1] if active else Context()
