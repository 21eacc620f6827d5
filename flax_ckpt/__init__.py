"""Checkpointing for Flax and Optax training: save, resume, evaluate, anywhere."""

import flax_ckpt.path as path
from flax_ckpt import arrays, errors, handlers, leaves, multihost, options, partial, training, tree
from flax_ckpt._async import AsyncResponse
from flax_ckpt._delete import delete, delete_async
from flax_ckpt._load import (
    checkpointables_metadata,
    is_orbax_checkpoint,
    load,
    load_async,
    load_checkpointables,
    load_checkpointables_async,
    metadata,
)
from flax_ckpt._metadata import CheckpointMetadata, PyTreeMetadata
from flax_ckpt._save import save, save_async, save_checkpointables, save_checkpointables_async
from flax_ckpt.context import Context
from flax_ckpt.handlers import (
    AbstractCheckpointable,
    Checkpointable,
    CheckpointableHandler,
    StatefulCheckpointable,
)
from flax_ckpt.inspection import Verification, verify
from flax_ckpt.leaves.base import PLACEHOLDER
from flax_ckpt.training.best import Best
from flax_ckpt.training.callback import CheckpointCallback
from flax_ckpt.training.restore import Report, Restored, restore, restore_train_state

__all__ = ["save", "save_async", "save_checkpointables", "save_checkpointables_async"]
__all__ += ["load", "load_async", "load_checkpointables", "load_checkpointables_async"]
__all__ += ["PLACEHOLDER", "AbstractCheckpointable", "Checkpointable"]
__all__ += ["CheckpointMetadata", "PyTreeMetadata", "checkpointables_metadata", "metadata"]
__all__ += ["delete", "delete_async", "is_orbax_checkpoint"]
__all__ += ["AsyncResponse", "CheckpointableHandler", "Context", "StatefulCheckpointable"]
__all__ += ["Best", "CheckpointCallback", "Report", "Restored", "restore", "restore_train_state"]
__all__ += ["Verification", "verify"]
__all__ += ["arrays", "errors", "handlers", "leaves", "multihost"]
__all__ += ["options", "partial", "path", "training", "tree"]
