"""Which handler saves and loads a checkpointable.

    registry = fc.handlers.local_registry()
    registry.add(fc.handlers.ProtoHandler, checkpointable_name="proto_config")
    ctx = fc.Context()
    ctx.checkpointables.registry = registry

To save: the handler bound to the name; else the last registered that accepts the value. To load:
the handler bound to the name; else the user's handler that the checkpoint names; else, if the
directory holds a PyTree, `PyTreeHandler`; else the handler the checkpoint names; else the last
that accepts the abstract value. A type string only selects among registered classes: nothing is
imported because a checkpoint names it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeVar

from flax_ckpt.errors import AlreadyExistsError, NoEntryError, NotHandleableError
from flax_ckpt.format import names
from flax_ckpt.handlers.base import CheckpointableHandler, HandlerType

Handler = CheckpointableHandler[Any, Any]
H = TypeVar("H", bound=HandlerType)


class CheckpointableHandlerRegistry:
    """Which handlers there are: for one name, or for every checkpointable they accept.

    Made by :func:`local_registry`; any object with these methods will do in its place.
    """

    def __init__(self) -> None:
        self._entries: list[tuple[HandlerType, str | None]] = []
        self._typestrs: dict[HandlerType, tuple[str, ...]] = {}

    def add(
        self,
        handler_type: HandlerType,
        *,
        checkpointable_name: str | None = None,
        secondary_typestrs: Sequence[str] | None = None,
    ) -> CheckpointableHandlerRegistry:
        """Registers a handler class.

        Args:
            handler_type: a class that can be built without arguments.
            checkpointable_name: binds it to this name; None: for all that it accepts.
            secondary_typestrs: further type strings under which checkpoints may name it.

        Raises:
            AlreadyExistsError: the name has a handler, or the class is registered for all.
            TypeError: not a class.
        """
        if not isinstance(handler_type, type):  # type: ignore[redundant-expr]
            what = f"a registry takes handler classes, not instances; got {handler_type!r}"
            how = "To give a handler arguments, subclass or wrap it in a class without any"
            raise TypeError(f"{what}. {how}")
        if (name := checkpointable_name) and self.has(name):
            bound = self.get(name).__name__
            raise AlreadyExistsError(f"the name {name!r} is bound to {bound} already")
        if not name and (handler_type, None) in self._entries:
            raise AlreadyExistsError(f"{handler_type.__name__} is registered already")
        self._entries.append((handler_type, name or None))
        if secondary_typestrs is not None:
            self._typestrs[handler_type] = tuple(secondary_typestrs)
        return self

    def get(self, checkpointable_name: str) -> HandlerType:
        """The handler class bound to a name.

        Raises:
            NoEntryError: none is.
        """
        bound = {name: handler_type for handler_type, name in self._entries if name}
        if checkpointable_name not in bound:
            what = f"no handler is bound to the name {checkpointable_name!r}"
            raise NoEntryError(f"{what}; bound names: {sorted(bound)}")
        return bound[checkpointable_name]

    def has(self, checkpointable_name: str) -> bool:
        """Whether a handler is bound to the name."""
        return any(name == checkpointable_name for _, name in self._entries)

    def get_all_entries(self) -> Sequence[tuple[HandlerType, str | None]]:
        """All handlers in order of registration, with the name each is bound to, or None."""
        return tuple(self._entries)

    def get_secondary_typestrs(self, handler_type: HandlerType) -> Sequence[str]:
        """Further type strings of a handler."""
        return self._typestrs.get(handler_type, ())

    def __repr__(self) -> str:
        return f"CheckpointableHandlerRegistry({_shown(self)})"


Registry: TypeAlias = CheckpointableHandlerRegistry
_global = CheckpointableHandlerRegistry()


def global_registry() -> CheckpointableHandlerRegistry:
    """The registry that every Context without one of its own uses."""
    return _global


def local_registry(
    other_registry: Registry | None = None, *, include_global_registry: bool = True
) -> Registry:
    """A new registry, to change without touching the global one.

    Args:
        other_registry: its entries come last, so they win.
        include_global_registry: whether to start with the global entries.
    """
    registry = CheckpointableHandlerRegistry()
    sources = _global if include_global_registry else None, other_registry
    for source in [source for source in sources if source is not None]:
        for handler_type, name in source.get_all_entries():
            more = source.get_secondary_typestrs(handler_type) or None
            registry.add(handler_type, checkpointable_name=name, secondary_typestrs=more)
    return registry


def register_handler(
    cls: H,
    *,
    checkpointable_name: str | None = None,
    secondary_typestrs: Sequence[str] | None = None,
) -> H:
    """Registers a handler class globally; also as a decorator. Arguments as `Registry.add`."""
    _global.add(cls, checkpointable_name=checkpointable_name, secondary_typestrs=secondary_typestrs)
    return cls


def typestr(handler_type: HandlerType) -> str:
    """How checkpoints name a handler: ours by a constant of the format, others by their class."""
    by_class = f"{handler_type.__module__}.{handler_type.__qualname__}"
    return getattr(handler_type, "TYPESTR", by_class)


def for_save(registry: Registry, name: str, value: Any, *, tree: bool = False) -> Handler:
    """The handler to save `value` as `name` with.

    A tree with leaves that cannot be saved goes to the PyTree handler, which names them. So does
    everything of which the caller says that it is a `tree`.

    Raises:
        NoEntryError: no handler accepts it.
    """
    if registry.has(name):
        return _build(registry.get(name))
    for handler in () if tree else map(_build, _unbound(registry)):
        if handler.is_handleable(value):
            return handler
    for handler_type in _unbound(registry):
        if typestr(handler_type) == names.TYPE_PYTREE:
            return _build(handler_type)
    what = f"checkpointable {name!r}: no handler accepts a {type(value).__name__}; registered"
    how = "Register one with flax_ckpt.handlers.register_handler"
    raise NoEntryError(f"{what}: {_shown(registry)}. {how}")


def for_load(
    registry: Registry, name: str, abstract: Any, recorded: str | None, is_pytree: bool
) -> Handler:
    """The handler to load the checkpointable `name` with.

    Args:
        registry: where to look.
        name: of the checkpointable.
        abstract: how the caller wants it; None: as it was saved.
        recorded: the type string that the checkpoint has for it.
        is_pytree: whether its directory holds a PyTree.

    Raises:
        NoEntryError: none fits.
        NotHandleableError: the one bound to the name, or that the checkpoint names, does not load
            into `abstract`.
    """
    entries = _unbound(registry)
    named = [h for h in entries if recorded in _aliases(registry, h)]
    ours = [h for h in entries if typestr(h) == names.TYPE_PYTREE]
    foreign = [h for h in named if not hasattr(h, "TYPESTR")]
    bound = [registry.get(name)] if registry.has(name) else []
    for handler_type in [*bound, *foreign, *(ours if is_pytree else []), *named]:
        handler = _build(handler_type)
        # Of a tree, the handler itself says which of its leaves cannot be loaded so.
        judged = abstract is not None and typestr(handler_type) != names.TYPE_PYTREE
        if judged and handler.is_abstract_handleable(abstract) is False:
            why = f"{handler_type.__name__} does not load into {abstract!r}"
            raise NotHandleableError(f"checkpointable {name!r}: {why}")
        return handler
    for handler in () if abstract is None else map(_build, entries):
        if handler.is_abstract_handleable(abstract):
            return handler
    what = f"checkpointable {name!r} was saved by {recorded or 'an unnamed handler'}, which is not"
    what += f" registered here; registered: {_shown(registry)}. Import and register its handler,"
    raise NoEntryError(f"{what} or name only the checkpointables that you want")


def _unbound(registry: Registry) -> list[HandlerType]:
    """The handlers that are bound to no name, the last registered first."""
    return [h for h, bound in reversed(registry.get_all_entries()) if bound is None]


def _aliases(registry: Registry, handler_type: HandlerType) -> list[str]:
    own = getattr(handler_type, "ALIASES", ())
    return [typestr(handler_type), *own, *registry.get_secondary_typestrs(handler_type)]


def _build(handler_type: HandlerType) -> Handler:
    try:
        return handler_type()
    except TypeError as error:
        why = f"cannot be built without arguments, as handlers must be: {error}"
        raise TypeError(f"{handler_type.__name__} {why}") from error


def _shown(registry: Registry) -> str:
    entries = [(h.__name__, name) for h, name in registry.get_all_entries()]
    return ", ".join(h + (f" for {name!r}" if name else "") for h, name in entries) or "none"
