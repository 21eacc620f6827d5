"""The Context: options of everything that runs inside its `with` block.

    ctx = fc.Context()
    ctx.asynchronous.timeout_secs = 60
    with ctx:
        fc.save(path, tree)

A context given explicitly always beats the one of an enclosing `with`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Generator
from typing import Any, Final, final, get_type_hints

from flax_ckpt import options


@final
@dataclasses.dataclass(init=False, eq=False)
class Context:
    """A set of options, mutable until it is entered and while it is active frozen.

    A new Context starts from the defaults, also inside another one; `Context(parent)` starts from
    a copy of the parent's options.

    Args:
        context: the parent to copy the options of.

    Attributes:
        array: how arrays are saved.
        pytree: how trees are loaded.
        asynchronous: how saves run in the background.
        file: how directories and files are made.
        multiprocessing: which processes take part.
        checkpointables: which handlers are used.
        memory: how host memory is used.

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

    array: options.ArrayOptions
    pytree: options.PyTreeOptions
    asynchronous: options.AsyncOptions
    file: options.FileOptions
    multiprocessing: options.MultiprocessingOptions
    checkpointables: options.CheckpointablesOptions
    memory: options.MemoryOptions

    def __init__(self, context: Context | None = None) -> None:
        for name, group in _GROUPS.items():
            value = group() if context is None else options.copy(getattr(context, name))
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        groups = ", ".join(vars(self))
        raise AttributeError(f"set an option of a group, not Context.{name}; groups: {groups}")

    def __enter__(self) -> Context:
        options.freeze(vars(self).values(), +1)
        _active.set((*_active.get(), self))
        return self

    def __exit__(self, *error: object) -> None:
        _active.set(_active.get()[:-1])
        options.freeze(vars(self).values(), -1)


_GROUPS: Final[dict[str, Any]] = get_type_hints(Context)

# The stack of active contexts of this thread and task. Tasks inherit it; a new thread begins with
# the defaults, which nobody gets to change them.
_active: contextvars.ContextVar[tuple[Context, ...]]
_active = contextvars.ContextVar("flax_ckpt_contexts", default=(Context(),))


def resolve(context: Context | None = None) -> Context:
    """The context to use: the one given, else the active one, else the defaults."""
    return _active.get()[-1] if context is None else context


@contextlib.contextmanager
def applied(context: Context) -> Generator[None]:
    """Within it `resolve` gives this context; unlike in the user's own `with`, nothing freezes."""
    before = _active.set((*_active.get(), context))
    try:
        yield
    finally:
        _active.reset(before)
