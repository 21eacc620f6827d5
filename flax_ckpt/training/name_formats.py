"""How the directories of a run's steps are called: `23`, `0023`, `step_23`, `step_0023`.

steps = fc.path.step
written = steps.standard_name_format(step_prefix="step", step_format_fixed_length=4)
both = steps.composite_name_format(written, [written, steps.standard_name_format()])
fc.training.Checkpointer(root, step_name_format=both)  # reads `23` too, writes `step_0024`
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from flax_ckpt.storage.files import PathLike
from flax_ckpt.training.metadata import CheckpointMetadata
from flax_ckpt.training.steps import StandardNameFormat, require_at_least

M_co = TypeVar("M_co", covariant=True, bound=CheckpointMetadata[Any])


@runtime_checkable
class NameFormat(Protocol[M_co]):
    """How steps are called and found; any object with these methods will do."""

    def build_name(self, step: int) -> str:
        """The name of a step's directory."""
        ...

    def find_all(self, base_path: PathLike) -> Iterator[M_co]:
        """The committed steps under a root, in any order."""
        ...

    def find_step(self, base_path: PathLike, step: int) -> M_co:
        """A committed step under a root.

        Raises:
            ValueError: there is none.
        """
        ...


StepFormat = NameFormat[CheckpointMetadata[None]]


@dataclasses.dataclass(frozen=True)
class _CompositeNameFormat:
    write_name_format: StepFormat
    read_name_formats: Sequence[StepFormat]

    def build_name(self, step: int) -> str:
        return self.write_name_format.build_name(step)

    def find_all(self, base_path: PathLike) -> Iterator[CheckpointMetadata[None]]:
        formats = reversed(self.read_name_formats)  # the first of them has the last word
        yield from {m.step: m for each in formats for m in each.find_all(base_path)}.values()

    def find_step(self, base_path: PathLike, step: int) -> CheckpointMetadata[None]:
        for name_format in self.read_name_formats[:-1]:
            with contextlib.suppress(ValueError):  # perhaps it is called as the next format says
                return name_format.find_step(base_path, step)
        return self.read_name_formats[-1].find_step(base_path, step)


def standard_name_format(
    *, step_prefix: str | None = None, step_format_fixed_length: int | None = None
) -> StepFormat:
    """The names that most runs have: a number, with a prefix and zeros before it if wanted.

    Args:
        step_prefix: what comes before the number; an underscore is put between.
        step_format_fixed_length: least number of digits; zeros are put before.

    >>> standard_name_format().build_name(23)
    '23'
    >>> standard_name_format(step_prefix="step", step_format_fixed_length=4).build_name(23)
    'step_0023'
    """
    if step_prefix is not None and step_prefix != os.path.basename(step_prefix):
        raise ValueError(f"step_prefix is part of a directory's name, got {step_prefix!r}")
    require_at_least(1, step_format_fixed_length=step_format_fixed_length)
    return StandardNameFormat(step_prefix or "", step_format_fixed_length or 1)


def composite_name_format(
    write_name_format: StepFormat, read_name_formats: Sequence[StepFormat]
) -> StepFormat:
    """Several names to read, one to write: for a run whose names have changed.

    Args:
        write_name_format: for steps to come.
        read_name_formats: for those that are there, `write_name_format` among them. Where two
            find the same step, the first counts.

    Raises:
        ValueError: `write_name_format` is not among `read_name_formats`.

    >>> plain, padded = standard_name_format(), standard_name_format(step_format_fixed_length=6)
    >>> composite_name_format(padded, [padded, plain]).build_name(23)
    '000023'
    """
    if write_name_format not in read_name_formats:
        raise ValueError(
            f"write_name_format {write_name_format} must be among read_name_formats"
            f" {list(read_name_formats)}: what is written must be found again"
        )
    return _CompositeNameFormat(write_name_format, tuple(read_name_formats))
