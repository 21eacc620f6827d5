"""How steps are called: which names are written, and which are taken for steps."""

from pathlib import Path
from typing import Any

import pytest

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
