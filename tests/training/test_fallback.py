"""The latest step is damaged, in every way there is: the newest whole one takes its place.

An explicit step raises; nothing is deleted; the run goes on. See also `test_superseded.py`.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
import pytest

import flax_ckpt as fc
from flax_ckpt import _load
from flax_ckpt.errors import DamagedCheckpointError, NoLeafHandlerError
from flax_ckpt.training import steps
from tests.storage.test_processes import run_two
from tests.training.test_data import Counter


def tree(value: float) -> dict[str, Any]:
    full = np.full(3, float(value))
    return {"params": {"w": full}, "opt_state": {"mu": full}, "ema": full, "text": f"{value:g}"}


def train(root: Path, *numbers: int, keep_last: int | None = None, **options: Any) -> int:
    """Saves these steps after what was restored; returns which step that was."""
    options = {"config": {"lr": 0.1}, "data_iterator": Counter(), **options}
    with fc.CheckpointCallback(root, every_n_steps=1, keep_last=keep_last, **options) as ckpt:
        _, begun = ckpt.restore_or_init(tree(0))
        for number in numbers:
            options["data_iterator"].n = number
            ckpt.on_step_end(number, tree(number), metrics={"loss": 1 / number})
    return begun


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fallback") / "run"
    train(root, 1, 2, 3)
    return root


@pytest.fixture
def run(saved: Path, tmp_path: Path) -> Path:
    """Steps 1 to 3, all parts of which say which they are of."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


def restored(root: Path, **options: Any) -> Any:
    iterator = Counter()
    out = fc.restore(root, tree(0), data_iterator=iterator, **options)
    assert out.state["text"] == str(out.step) == str(iterator.n)
    assert {out.state["params"]["w"][0], out.state["ema"][0]} == {out.step}
    assert out.state["opt_state"]["mu"][0] == out.step
    assert (out.metrics, dict(out.config)) == ({"loss": 1 / out.step}, {"lr": 0.1})
    return out


# What becomes of the latest step.


def flip(file: Path, at: int | None = None) -> None:
    content = bytearray(file.read_bytes() or b"?")
    content[len(content) // 2 if at is None else at] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def make_directory(file: Path) -> None:
    file.unlink()
    file.mkdir()


WAYS = {way.__name__: way for way in (flip, cut, Path.unlink, make_directory)}
HARMLESS = {"orbax.checkpoint", "commit_success.txt"}  # they say nothing that is not elsewhere


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_any_file_of_the_latest_step_is_damaged(saved: Path, tmp_path: Path, way: Any) -> None:
    latest = saved / "3"
    files = sorted(str(f.relative_to(latest)) for f in latest.rglob("*") if f.is_file())
    assert {"config/proto.pbtxt", "data/process_0-of-1.json", "metrics/metrics"} < set(files)
    taken: dict[str, int] = {}
    for number, name in enumerate(files):
        root = Path(shutil.copytree(saved, tmp_path / str(number)))
        way(root / "3" / name)
        out = restored(root)
        taken[name] = out.step
        if out.step == 3:
            assert out.report.damaged == ()
            continue
        ((step, reason),) = out.report.damaged
        assert (out.step, step) == (2, 3)
        assert f"step 3 was passed over: {reason}" in str(out.report)
        with pytest.raises(DamagedCheckpointError) as caught:
            fc.restore(root, tree(0), step=3, data_iterator=Counter())
        assert str(caught.value) == reason
        assert str(root / "3") in reason or Path(name).name in reason, "it names the file"
    still_whole = {name for name, step in taken.items() if step == 3}
    is_gone = way in (Path.unlink, make_directory)
    integrity = {"flax_ckpt.json"} if is_gone else set[str]()
    assert still_whole <= HARMLESS | integrity | {n for n in files if "array_metadatas" in n}


@pytest.mark.parametrize(
    "directory", ["params", "opt_state", "train_state", "config", "data", "metrics", "params/d"]
)
def test_a_directory_of_the_latest_step_is_gone(run: Path, directory: str) -> None:
    shutil.rmtree(run / "3" / directory)
    out = restored(run)
    assert (out.step, [step for step, _ in out.report.damaged]) == (2, [3])
    with pytest.raises(DamagedCheckpointError, match=f"{run}/3/{directory}"):
        fc.restore(run, tree(0), step=3, data_iterator=Counter())


def only(*names: str) -> Callable[[Path], None]:
    def keep(step: Path) -> None:
        for path in sorted(step.rglob("*"), reverse=True):
            name = str(path.relative_to(step))
            if not any(
                f"{kept}/".startswith(f"{name}/") or name.startswith(kept) for kept in names
            ):
                path.rmdir() if path.is_dir() else path.unlink()

    return keep


@pytest.mark.parametrize(
    "what",
    [
        only(),
        only("params/d"),
        only("params"),
        only("params", "opt_state"),
        only("commit_success.txt"),
        only("orbax.checkpoint"),
        only("_CHECKPOINT_METADATA"),
        only("_CHECKPOINT_METADATA", "params"),
        only("_CHECKPOINT_METADATA", "params", "opt_state", "config", "data", "metrics"),
        only("flax_ckpt.json"),
        only("flax_ckpt.json", "params"),
        only("params/_METADATA"),
    ],
)
def test_only_a_part_of_the_latest_step_was_copied(
    run: Path, what: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    what(run / "3")
    before = sorted((run / "3").rglob("*"))
    with caplog.at_level(logging.WARNING, "flax_ckpt"):
        out = restored(run)
    assert out.step == 2
    ((step, reason),) = out.report.damaged
    assert step == 3
    assert reason in caplog.text
    assert "trying the " in caplog.text
    assert sorted((run / "3").rglob("*")) == before, "nothing is deleted"
    with pytest.raises(DamagedCheckpointError) as caught:
        fc.restore(run, tree(0), step=3, data_iterator=Counter())
    assert str(caught.value) == reason

    # The resumed run is not stopped by it.
    assert train(run, 3, 4) == 2
    assert steps.committed(str(run)) == [1, 2, 3, 4]
    assert [restored(run, step=step).step for step in (3, 4)] == [3, 4]
    (aside,) = (run / "superseded").iterdir()
    assert len(list(aside.rglob("*"))) == len(before)


def test_the_latest_step_is_a_link_to_what_is_not_mounted(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere = tmp_path / "mounted" / "3"
    elsewhere.parent.mkdir()
    (run / "3").rename(elsewhere)
    (run / "3").symlink_to(elsewhere)
    assert restored(run).step == 3
    elsewhere.parent.rename(tmp_path / "not_mounted")
    reason = f"{run / '3'} is a link that leads nowhere, to {elsewhere}"
    with caplog.at_level(logging.WARNING, "flax_ckpt"):
        out = restored(run)
    assert (out.step, out.report.damaged) == (2, ((3, reason),))
    assert reason in caplog.text
    with pytest.raises(DamagedCheckpointError, match=f"^{reason}$"):
        fc.restore(run, tree(0), step=3, data_iterator=Counter())
    assert [(c.path, c.ok) for c in fc.verify(run).checkpoints][-1] == (str(run / "3"), False)
    assert train(run, 3, 4) == 2
    assert [restored(run, step=step).step for step in (3, 4)] == [3, 4]
    (aside,) = (run / "superseded").iterdir()
    assert os.readlink(aside) == str(elsewhere)


def test_a_run_that_begins_beside_a_link_that_leads_nowhere(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "3").symlink_to("nowhere")
    with caplog.at_level(logging.WARNING, "flax_ckpt"), fc.CheckpointCallback(tmp_path) as ckpt:
        assert ckpt.restore_or_init(tree(0))[1] == 0
    assert "begins anew: 3 is no whole checkpoint" in caplog.text


def test_a_step_may_be_any_integer(run: Path) -> None:
    for step in (np.int64(2), np.uint8(2), jnp.int32(2)):
        assert restored(run, step=step).step == 2
        with fc.CheckpointCallback(run) as ckpt:
            assert ckpt.restore_or_init(tree(0), step=step)[1] == 2


def test_what_else_is_called_by_a_number_is_no_step(run: Path) -> None:
    (run / "2026").mkdir()
    (run / "2026" / "notes").mkdir()
    (run / "5").write_text("")
    assert restored(run).report.damaged == ()
    assert train(run, 4) == 3
    assert (run / "2026" / "notes").is_dir()


def test_a_callback_says_what_it_passed_over(run: Path) -> None:
    damage(run, 3)
    with fc.CheckpointCallback(run) as ckpt:
        assert ckpt.report is None
        assert ckpt.restore_or_init(tree(0))[1] == 2
        assert ckpt.report is not None
        ((step, reason),) = ckpt.report.damaged
        assert (step, "w: damaged" in reason) == (3, True)
        assert "step 3" in str(ckpt.report)
    shutil.rmtree(run)
    with fc.CheckpointCallback(run) as ckpt:
        ckpt.restore_or_init(tree(0))
        assert ckpt.report is None


def test_a_run_that_begins_beside_parts_of_steps_says_so(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.rmtree(run / "3")
    (run / "7").touch()
    (run / "logs_8").mkdir()
    for part in (run / "1", run / "2"):
        only("params")(part)
        (part / "params" / "_METADATA").unlink()
    with caplog.at_level(logging.WARNING, "flax_ckpt"):
        assert fc.CheckpointCallback(run).restore_or_init(tree(0))[1] == 0
    expected = f"{run} has no step to restore, and begins anew: 1, 2 is no whole checkpoint. Move"
    assert [text.startswith(expected) for text in caplog.messages] == [True]


def test_an_error_of_the_disk_may_pass_and_is_no_damage(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data,) = (run / "3" / "params" / "d").iterdir()
    number, read = data.stat().st_ino, os.preadv

    def preadv(fd: int, buffers: Any, offset: int) -> int:
        if os.fstat(fd).st_ino == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(fd, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(OSError, match=f"Input/output error: '{data}'"):
            restored(run)
        with pytest.raises(OSError, match=f"Input/output error: '{data}'"):
            train(run, 4)
    assert restored(run).step == 3


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
@pytest.mark.parametrize("left", [None, 0.0, 0.5])
def test_a_file_of_the_latest_step_that_orbax_wrote(
    tmp_path: Path, name: str, left: float | None
) -> None:
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        for step in (1, 2):
            checkpointer.save(step, {"params": {"w": np.full(3, float(step))}, "step": step})
    file = tmp_path / "run" / "2" / "state" / name
    whole = file.read_bytes()
    file.unlink() if left is None else file.write_bytes(whole[: int(left * len(whole))])
    out = fc.restore(tmp_path / "run", {"params": {"w": np.zeros(3)}, "step": 0})
    assert (out.step, out.state["step"], set(out.state["params"]["w"])) == (1, 1, {1.0})
    ((step, reason),) = out.report.damaged
    assert step == 2
    assert str(tmp_path / "run" / "2") in reason


def test_a_step_with_nothing_but_an_empty_file(run: Path) -> None:
    (run / "4").mkdir()
    (run / "4" / "_CHECKPOINT_METADATA").touch()
    out = restored(run)
    assert out.step == 3
    reason = f"{run}/4 lacks all checkpointables: it is incomplete"
    assert out.report.damaged == ((4, reason),)


def test_a_leaf_handler_that_is_not_there_is_no_damage(run: Path) -> None:
    meta = run / "3" / "params" / "_METADATA"
    assert b'"np.ndarray"' in meta.read_bytes()
    meta.write_bytes(meta.read_bytes().replace(b'"np.ndarray"', b'"theirs"'))
    (run / "3" / "flax_ckpt.json").unlink()
    with pytest.raises(NoLeafHandlerError, match="w: kind 'theirs'"):
        fc.restore(run)


def test_a_record_that_is_gone_is_told(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    (run / "3" / "flax_ckpt.json").unlink()
    with caplog.at_level(logging.WARNING, "flax_ckpt"):
        assert restored(run).step == 3
    expected = f"{run}/3: flax_ckpt.json is missing: of its files only the data of arrays can be"
    assert any(text.startswith(expected) for text in caplog.messages)


def test_a_flat_step_without_its_description_says_so(tmp_path: Path) -> None:
    fc.save(tmp_path / "1", {"w": np.ones(3)})
    shutil.rmtree(tmp_path / "1" / "state")
    metadata = {"item_handlers": "orbax.Handler", "init_timestamp_nsecs": 1}
    (tmp_path / "1" / "_CHECKPOINT_METADATA").write_text(json.dumps(metadata))
    (tmp_path / "1" / "flax_ckpt.json").unlink()
    with pytest.raises(DamagedCheckpointError, match="1 lacks all checkpointables"):
        fc.restore(tmp_path, {"params": np.ones(3)})


# Which steps are tried.


def damage(root: Path, *numbers: int) -> None:
    for number in numbers:
        (data,) = (root / str(number) / "params" / "d").iterdir()
        flip(data, 5)


def test_two_damaged_in_a_row(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    damage(run, 2)
    (run / "3" / "opt_state" / "_METADATA").unlink()
    with caplog.at_level(logging.WARNING, "flax_ckpt"):
        out = restored(run)
    assert (out.step, [step for step, _ in out.report.damaged]) == (1, [3, 2])
    assert "step 3 is damaged, trying the one before it: " in caplog.text
    assert "step 2 is damaged, trying the one before it: " in caplog.text
    assert "opt_state/_METADATA" in out.report.damaged[0][1]
    assert "w: damaged" in out.report.damaged[1][1]


def restore(root: Path) -> Any:
    return fc.restore(root, tree(0))


def resume(root: Path) -> Any:
    init: Any = lambda: pytest.fail("a run that has steps does not begin anew")  # noqa: E731
    return fc.CheckpointCallback(root).restore_or_init(tree(0), init=init)


@pytest.mark.parametrize("read", [restore, resume])
def test_if_all_are_damaged_each_reason_is_named(run: Path, read: Any) -> None:
    damage(run, 1, 3)
    (run / "2" / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(DamagedCheckpointError) as caught:
        read(run)
    first, *reasons = str(caught.value).splitlines()
    assert first == f"none of the steps of {run} is whole:"
    for reason, expected in zip(
        reasons,
        [
            f"step 3: w: damaged: .*{run}/3/params/d/",
            f"step 2: .*{run}/2/params/manifest.ocdbt: the file is missing",
            f"step 1: w: damaged: .*{run}/1/params/d/",
        ],
        strict=True,
    ):
        assert re.match(expected, reason), reason
    assert steps.committed(str(run)) == [1, 2, 3]


@pytest.mark.parametrize("step", [3, "best"])
def test_a_step_that_was_asked_for_raises(run: Path, step: Any) -> None:
    with fc.CheckpointCallback(run, keep_best=("loss", "min"), keep_last=None) as ckpt:
        shutil.rmtree(run / "3")
        ckpt.on_step_end(3, tree(3), metrics={"loss": 1 / 3}, force=True)
    damage(run, 3)
    with pytest.raises(DamagedCheckpointError, match="w: damaged"):
        fc.restore(run, tree(0), step=step)
    with pytest.raises(DamagedCheckpointError, match="w: damaged"):
        fc.restore(run / "3", tree(0))
    with pytest.raises(DamagedCheckpointError, match="w: damaged"):
        fc.CheckpointCallback(run).restore_or_init(tree(0), step=step)
    found = fc.training.Checkpointer(run).latest
    with pytest.raises(DamagedCheckpointError, match="w: damaged"):
        fc.restore(run, tree(0), step=found)


def test_the_best_is_found_although_the_latest_does_not_say_what_that_is(
    run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(run, 4, 5, keep_best=("loss", "max"))
    flip(run / "5" / "_CHECKPOINT_METADATA")
    with caplog.at_level(logging.WARNING, "flax_ckpt"):
        assert fc.restore(run, tree(0), step="best").step == 1
    assert f"{run}/5/_CHECKPOINT_METADATA: CRC-32C" in caplog.text


# What becomes of the damaged step.


def test_a_damaged_step_is_not_counted_as_kept(run: Path) -> None:
    damage(run, 3)
    for last in (4, 5, 6):
        assert train(run, last, keep_last=2) == (2 if last == 4 else last - 1)
        whole = steps.committed(str(run))
        assert len(whole) == 2
        assert [restored(run, step=step).step for step in whole] == whole
    assert [path.name[:2] for path in (run / "superseded").iterdir()] == ["3-"]


def test_before_the_first_save_nothing_goes(run: Path) -> None:
    damage(run, 3)
    with fc.CheckpointCallback(run, keep_last=1, at_end=False) as ckpt:
        assert ckpt.restore_or_init(tree(0))[1] == 2
    assert sorted(os.listdir(run)) == ["1", "2", "3"]


def test_a_step_whose_metrics_are_damaged_is_not_deleted(run: Path) -> None:
    flip(run / "1" / "metrics" / "metrics")
    with fc.CheckpointCallback(run, keep_best=("loss", "max", 1), keep_last=1) as ckpt:
        ckpt.on_step_end(4, tree(4), metrics={"loss": 0.1}, force=True)
    assert sorted(os.listdir(run)) == ["1", "2", "4"], "the best whole one and the latest besides"


def test_a_step_whose_time_is_damaged_is_not_deleted_and_stops_nothing(run: Path) -> None:
    (run / "1" / "_CHECKPOINT_METADATA").write_text("?")
    policy = fc.training.preservation_policies.EveryNSeconds(1000)
    with fc.CheckpointCallback(run, preservation_policy=policy) as ckpt:
        ckpt.on_step_end(4, tree(4), force=True)
    assert sorted(os.listdir(run)) == ["1", "4"]


# Several processes.

TWO = """
    state = lambda value: {"params": {"w": place(np.full(4, float(value)), P("x"))}}
    options = {"context": context, "every_n_steps": 1, "keep_last": None, "at_end": False}
    with fc.CheckpointCallback(path, **options) as ckpt:
        for step in range(1, 5):
            ckpt.on_step_end(step, state(step))
    if index == 0:
        from pathlib import Path
        for step, process in ((4, 0), (3, 1)):
            (data,) = Path(path, str(step), "params", f"ocdbt.process_{process}", "d").iterdir()
            data.write_bytes(bytes(len(data.read_bytes())))
    from jax.experimental import multihost_utils
    multihost_utils.sync_global_devices("damaged")
    with fc.CheckpointCallback(path, **options) as ckpt:
        restored, step = ckpt.restore_or_init(state(0))
        print(step, restored["params"]["w"].addressable_shards[0].data[0], flush=True)
    out = fc.restore(path, state(0), context=context)
    print(out.step, [step for step, _ in out.report.damaged], flush=True)
    for step in (3, 4):
        assert dict(out.report.damaged)[step].startswith("w: damaged"), out.report
    if index == 0:  # one alone may read for itself what it has whole
        out = fc.restore(path, {"params": {"w": np.zeros(4, np.float32)}}, context=context)
        print(out.step, flush=True)
"""


def test_processes_that_see_different_damage_agree_on_a_step(tmp_path: Path) -> None:
    first, second = run_two(TWO, tmp_path / "run", 20)
    said = ["2 2.0", "2 [4, 3]"]
    assert second.out.splitlines()[-2:] == said, second.err[-3000:]
    assert first.out.splitlines()[-3:] == [*said, "2"], first.err[-3000:]


def test_a_step_that_is_deleted_while_it_is_looked_at_is_not_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fc.CheckpointCallback(tmp_path, every_n_steps=1, keep_last=None) as ckpt:
        for step in (1, 2):
            ckpt.on_step_end(step, {"params": {"w": np.full(3, step)}})
    trees = _load.Layout.trees

    def deleted(layout: _load.Layout) -> list[str]:
        if os.path.basename(layout.path) == "2":
            fc.delete(layout.path)
        return trees.fget(layout)

    monkeypatch.setattr(_load.Layout, "trees", property(deleted))
    out = fc.restore(tmp_path)
    assert out.step == 1
    np.testing.assert_array_equal(out.state["params"]["w"], np.full(3, 1))
