"""How the directories of a run's steps are called: `23`, `0023`, `step_23`, `step_0023`.

steps = fc.path.step
written = steps.standard_name_format(step_prefix="step", step_format_fixed_length=4)
both = steps.composite_name_format(written, [written, steps.standard_name_format()])
fc.training.Checkpointer(root, step_name_format=both)  # reads `23` too, writes `step_0024`
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

from etils import epath

from flax_ckpt.errors import StepNotFoundError
from flax_ckpt.storage.files import local_path
from flax_ckpt.training import steps
from flax_ckpt.training.metadata import CheckpointMetadata, listed

PathLike = str | os.PathLike[str]
_LAST_NUMBER = re.compile(r"\d+$", re.ASCII)
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


@dataclasses.dataclass(frozen=True)
class _StandardNameFormat:
    naming: steps.Naming

    def build_name(self, step: int) -> str:
        return self.naming.name(step)

    def find_all(self, base_path: PathLike) -> Iterator[CheckpointMetadata[None]]:
        root = epath.Path(base_path)
        try:
            found = [entry.name for entry in os.scandir(root)]
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in found:
            digits = _LAST_NUMBER.search(name)
            step = int(digits[0]) if digits else -1
            if self.build_name(step) == name and steps.is_checkpoint(f"{root}/{name}"):
                yield listed(step, root / name)

    def find_step(self, base_path: PathLike, step: int) -> CheckpointMetadata[None]:
        path = epath.Path(base_path) / self.build_name(step)
        if not steps.is_checkpoint(os.fspath(path)):
            raise StepNotFoundError(f"step {step} is not at {path}", step=step, path=path)
        return listed(step, path)


@dataclasses.dataclass(frozen=True)
class _CompositeNameFormat:
    write_name_format: NameFormat[CheckpointMetadata[None]]
    read_name_formats: Sequence[NameFormat[CheckpointMetadata[None]]]

    def build_name(self, step: int) -> str:
        return self.write_name_format.build_name(step)

    def find_all(self, base_path: PathLike) -> Iterator[CheckpointMetadata[None]]:
        found: dict[int, CheckpointMetadata[None]] = {}
        for name_format in self.read_name_formats:
            for metadata in name_format.find_all(base_path):
                found.setdefault(metadata.step, metadata)
        yield from found.values()

    def find_step(self, base_path: PathLike, step: int) -> CheckpointMetadata[None]:
        for name_format in self.read_name_formats[:-1]:
            try:
                return name_format.find_step(base_path, step)
            except ValueError:
                continue  # perhaps it is called as the next format says
        return self.read_name_formats[-1].find_step(base_path, step)


def standard_name_format(
    *, step_prefix: str | None = None, step_format_fixed_length: int | None = None
) -> NameFormat[CheckpointMetadata[None]]:
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
    if step_format_fixed_length is not None and step_format_fixed_length < 1:
        raise ValueError(
            f"step_format_fixed_length must be at least 1, got {step_format_fixed_length}"
        )
    naming = steps.Naming(step_prefix or "", step_format_fixed_length or 1)
    return _StandardNameFormat(naming)


def of_run(directory: PathLike) -> NameFormat[CheckpointMetadata[None]]:
    """The names that the steps of a run have already; plain numbers for a new run.

    Raises:
        InvalidLayoutError: they are called in several ways.
    """
    return _StandardNameFormat(steps.naming(local_path(directory)))


def composite_name_format(
    write_name_format: NameFormat[CheckpointMetadata[None]],
    read_name_formats: Sequence[NameFormat[CheckpointMetadata[None]]],
) -> NameFormat[CheckpointMetadata[None]]:
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


def matcher(name_format: NameFormat[Any]) -> Callable[[str], bool]:
    """Whether a name is one that the format gives to a step."""

    def is_step(name: str) -> bool:
        numbers = re.findall(r"\d+", name, re.ASCII)
        return any(name_format.build_name(int(digits)) == name for digits in numbers)

    return is_step
