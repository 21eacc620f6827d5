"""Errors of the steps of a run; all others are in `flax_ckpt.errors`."""

from flax_ckpt.errors import StepAlreadyExistsError, StepNotFoundError

__all__ = ["StepAlreadyExistsError", "StepNotFoundError"]
