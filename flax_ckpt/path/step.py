"""How the directories of a run's steps are called; see `Checkpointer(step_name_format=...)`."""

from flax_ckpt.training.steps import NameFormat, composite_name_format, standard_name_format

__all__ = ["NameFormat", "composite_name_format", "standard_name_format"]
