"""Handlers of checkpointables and their registries; the names are Orbax v1's."""

from flax_ckpt.handlers.base import (
    AbstractCheckpointable,
    Checkpointable,
    CheckpointableHandler,
    PathAwaitingCreation,
    StatefulCheckpointable,
)
from flax_ckpt.handlers.pytree import ArrayMetadataValidator, PyTreeHandler
from flax_ckpt.handlers.registry import (
    CheckpointableHandlerRegistry,
    global_registry,
    local_registry,
    register_handler,
)
from flax_ckpt.handlers.stateful import StatefulHandler
from flax_ckpt.handlers.text import JsonHandler, MetricsHandler, ProtoHandler

__all__ = ["AbstractCheckpointable", "Checkpointable", "CheckpointableHandler"]
__all__ += ["ArrayMetadataValidator", "CheckpointableHandlerRegistry", "PathAwaitingCreation"]
__all__ += ["JsonHandler", "ProtoHandler", "PyTreeHandler", "StatefulCheckpointable"]
__all__ += ["global_registry", "local_registry", "register_handler"]

# The last registered that accepts a value wins: a dict of numbers is a tree before it is JSON.
register_handler(ProtoHandler)
register_handler(JsonHandler)
register_handler(StatefulHandler)
register_handler(MetricsHandler, checkpointable_name="metrics")
register_handler(PyTreeHandler)
