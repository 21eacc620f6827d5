"""The checkpoints of a run, by step; the names are Orbax v1's."""

from flax_ckpt.training import errors, preservation_policies, save_decision_policies
from flax_ckpt.training.checkpointer import Checkpointer
from flax_ckpt.training.metadata import CheckpointMetadata, RootMetadata

__all__ = ["CheckpointMetadata", "Checkpointer", "RootMetadata"]
__all__ += ["errors", "preservation_policies", "save_decision_policies"]
