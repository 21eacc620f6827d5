"""Which directories under a root are steps, whoever named them, and how the next one is called."""

import re
import shutil
from pathlib import Path

import pytest

import flax_ckpt as fc
from flax_ckpt.errors import InvalidLayoutError
from flax_ckpt.training import steps


def make(root: Path, *names: str, mark: str = "_CHECKPOINT_METADATA") -> str:
    for name in names:
        (root / name / mark).parent.mkdir(parents=True)
        (root / name / mark).touch()
    return str(root)


@pytest.mark.parametrize(
    ("names", "found", "following"),
    [
        ((), [], "30"),
        (("1", "20"), [1, 20], "30"),
        (("0", "20"), [0, 20], "30"),
        (("0010", "0020"), [10, 20], "0030"),
        (("0010", "12345"), [10, 12345], "0030"),
        (("step_7", "step_20"), [7, 20], "step_30"),
        (("my_run_000007",), [7], "my_run_000030"),
        (("007", "20"), [20], "30"),
        (("5", "best_7", "copy_of_5"), [5], "30"),
        (("20.orbax-checkpoint-tmp", "20.partial_save", "x20", "20x", "superseded"), [], "30"),
        (("20.orbax-checkpoint-tmp-1699_3", "a.partial_save.pending_17_1"), [], "30"),
        (("١٢",), [], "30"),  # digits, but not ours
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_steps_and_the_name_of_the_next(tmp_path, names, found, following):
    root = make(tmp_path, *names)
    assert steps.committed(root) == found
    assert steps.naming(root).build_name(30) == following


@pytest.mark.parametrize("names", [("a_1", "b_2"), ("007", "0008"), ("a_1", "a_02")])
def test_several_ways_to_call_steps_are_refused(tmp_path, names):
    root = make(tmp_path, *names)
    with pytest.raises(InvalidLayoutError, match=f"of several names: {', '.join(sorted(names))}"):
        steps.committed(root)


def test_a_directory_without_a_mark_is_no_step(tmp_path):
    (tmp_path / "4").mkdir()
    (tmp_path / "5").touch()
    assert steps.committed(str(tmp_path)) == []
    assert steps.committed(str(tmp_path / "gone")) == []


@pytest.mark.parametrize("item", ["default", "params"])
def test_old_steps_have_no_mark_but_their_trees(tmp_path, item):
    root = make(tmp_path, f"4/{item}", "5/default.orbax-checkpoint-tmp", mark="_METADATA")
    assert steps.committed(root) == [4]
    assert steps.is_checkpoint(f"{root}/4")
    assert not steps.is_checkpoint(root)


def test_a_root_of_flat_steps_is_no_checkpoint(tmp_path):
    root = make(tmp_path, "4", "step_5", mark="_METADATA")
    assert not steps.is_checkpoint(root)


def test_a_checkpoint_beside_the_steps_makes_no_checkpoint_of_the_root(tmp_path):
    root = make(tmp_path, "4", "best")
    (tmp_path / "best" / "_METADATA").touch()
    assert not steps.is_checkpoint(root)
    assert steps.committed(root) == [4]


def test_later_steps_are_set_aside_under_any_name(tmp_path):
    root = make(tmp_path, "ckpt_0004", "ckpt_0008", "ckpt_0012")
    steps.supersede(root, 4)
    assert steps.committed(root) == [4]
    aside = sorted(path.name for path in (tmp_path / "superseded").iterdir())
    assert [re.sub(r"-\d{8}T.*", "", name) for name in aside] == ["12", "8"]


def test_cleaning_takes_what_a_killed_save_left_of_this_run(tmp_path):
    left = ["ckpt_08.orbax-checkpoint-tmp", "ckpt_04.deleted.orbax-checkpoint-tmp"]
    others = ["8.orbax-checkpoint-tmp", "best_08.orbax-checkpoint-tmp", "x.orbax-checkpoint-tmp"]
    root = make(tmp_path, "ckpt_04", *left, *others)
    steps.clean(root, steps.naming(root).build_name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["ckpt_04", *others])


def test_a_step_that_goes_while_it_is_looked_at_gives_way_to_the_next(tmp_path, monkeypatch):
    fc.save(tmp_path / "1", {"w": 1})
    looks, look = [], steps.is_checkpoint

    def beside_a_trainer(path: str) -> bool:
        looks.append(path)
        if len(looks) == 2:  # once to see how steps are called, then to list them
            fc.save(tmp_path / "2", {"w": 2})
            shutil.rmtree(tmp_path / "1")
        return look(path)

    monkeypatch.setattr(steps, "is_checkpoint", beside_a_trainer)
    assert steps.require_steps(str(tmp_path)) == [2]
