"""How steps are called: which names are written, and which are taken for steps."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

import flax_ckpt as fc
from flax_ckpt.path.step import composite_name_format, standard_name_format

ENTRIES = ["7", "07", "007", "0007", "12345", "step_7", "step_0007", "ck_7", "7x", "\u0667", "-7"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with checkpoints of many names, one that is none, and one that is unfinished."""
    for name in [*ENTRIES, "7.orbax-checkpoint-tmp", "8"]:
        (tmp_path / name).mkdir()
        if name != "8":
            (tmp_path / name / "_CHECKPOINT_METADATA").write_text("{}")
    (tmp_path / "9").write_text("a file")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, ["12345", "7"]),
        ({"step_format_fixed_length": 2}, ["07", "12345"]),
        ({"step_format_fixed_length": 4}, ["0007", "12345"]),
        ({"step_prefix": "step"}, ["step_7"]),
        ({"step_prefix": "step", "step_format_fixed_length": 4}, ["step_0007"]),
        ({"step_prefix": "none"}, []),
    ],
)
def test_names_that_are_steps(root: Path, options: dict[str, Any], found: list[str]):
    name_format = standard_name_format(**options)
    assert sorted(m.path.name for m in name_format.find_all(root)) == found
    for metadata in name_format.find_all(root):
        assert name_format.build_name(metadata.step) == metadata.path.name
        assert name_format.find_step(root, metadata.step).path == metadata.path


def test_a_step_that_is_not_there_says_where_it_would_be(root: Path):
    with pytest.raises(ValueError, match=f"step 8 is not at {root}/8") as caught:
        standard_name_format().find_step(root, 8)
    assert isinstance(caught.value, fc.training.errors.StepNotFoundError)
    assert (caught.value.step, caught.value.path) == (8, f"{root}/8")


def test_a_root_that_is_not_there_has_no_steps(tmp_path: Path):
    assert list(standard_name_format().find_all(tmp_path / "none")) == []


def test_a_composite_reads_several_names_and_writes_one(root: Path):
    plain, prefixed = standard_name_format(), standard_name_format(step_prefix="step")
    both = composite_name_format(prefixed, [prefixed, plain])
    assert both.build_name(12) == "step_12"
    assert {m.step: m.path.name for m in both.find_all(root)} == {7: "step_7", 12345: "12345"}
    assert both.find_step(root, 12345).path.name == "12345"
    with pytest.raises(ValueError, match="step 99 is not at .*/99"):
        both.find_step(root, 99)


def test_what_a_composite_writes_must_be_found_again():
    plain, padded = standard_name_format(), standard_name_format(step_format_fixed_length=4)
    with pytest.raises(ValueError, match="must be among read_name_formats"):
        composite_name_format(padded, [plain])


@pytest.mark.parametrize("wrong", [{"step_prefix": "a/b"}, {"step_format_fixed_length": 0}])
def test_names_that_cannot_be_are_refused(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        standard_name_format(**wrong)


def test_the_formats_follow_the_protocol():
    assert isinstance(standard_name_format(), fc.path.step.NameFormat)
    assert fc.path.PathAwaitingCreation is fc.handlers.PathAwaitingCreation


class Epochs:
    """A user's own format, which says of a step where it is and no more."""

    def build_name(self, step: int) -> str:
        return f"{step}-epoch"

    def find_all(self, base_path: Any) -> Iterator[fc.training.CheckpointMetadata[None]]:
        for name in os.listdir(base_path):
            if name.endswith("-epoch"):
                path = epath.Path(base_path) / name
                yield fc.training.CheckpointMetadata(
                    int(name.split("-")[0]), path, metadata=None, metrics=None
                )

    def find_step(self, base_path: Any, step: int) -> fc.training.CheckpointMetadata[None]:
        return next(found for found in self.find_all(base_path) if found.step == step)


def test_metrics_are_those_on_disk_if_a_users_format_gives_none(tmp_path: Path):
    best = fc.training.preservation_policies.BestN(
        get_metric_fn=lambda metrics: metrics["acc"], n=1, keep_checkpoints_without_metrics=False
    )
    accs = {1: 0.1, 2: 0.9, 3: 0.2, 4: 0.25}
    for steps in ([1, 2, 3], [4]):  # the second time of a process that knows nothing of the best
        with fc.training.Checkpointer(
            tmp_path, step_name_format=Epochs(), preservation_policy=best
        ) as run:
            for step in steps:
                run.save(step, {"a": np.ones(2)}, metrics={"acc": accs[step]})
            run.wait()
            found = {checkpoint.step: checkpoint.metrics for checkpoint in run.checkpoints}
            assert found == {step: {"acc": accs[step]} for step in (2, steps[-1])}


def test_metrics_without_a_step_on_disk_are_none(tmp_path: Path):
    for path in (tmp_path, tmp_path / "none" / "3", Path("3")):
        found = fc.training.CheckpointMetadata(3, epath.Path(path), metadata=None)
        assert found.metrics is None
        assert not found.is_damaged
