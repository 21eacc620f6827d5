"""The example of a language model: killed, resumed, evaluated, each in a process of its own."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path

import flax_ckpt as fc
from tests.programs import finish, start
from tests.training.states import assert_same

CONFIG = "--config=configs/char_lm.py"
SMALL = {
    "num_characters": 20_000,
    "context": 16,
    "num_layers": 1,
    "num_heads": 2,
    "width": 16,
    "batch_size": 8,
    "log_every_steps": 1,
    "checkpoint_every_steps": 4,
}


def test_a_killed_run_goes_on_with_the_same_text_and_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    killed = start("train_char_lm", tmp_path / "a", CONFIG, num_steps=1_000_000, **SMALL)
    assert killed.stderr is not None
    log = next(line for line in killed.stderr if "saved step 8" in line)
    killed.kill()
    killed.communicate()
    assert (killed.returncode, "checkpoints/8" in log) == (-signal.SIGKILL, True)
    latest = fc.training.Checkpointer(tmp_path / "a" / "checkpoints").latest.step

    last = latest + 10
    resumed, unbroken = (
        start("train_char_lm", tmp_path / run, CONFIG, num_steps=last, **SMALL)
        for run in ("a", "b")
    )
    losses = [re.findall(r"step (\d+: \S+) bits", finish(run)[1]) for run in (resumed, unbroken)]
    assert losses[0] == losses[1][latest:]
    assert len(losses[0]) == 10
    a, b = (fc.restore(tmp_path / run / "checkpoints") for run in ("a", "b"))
    assert a.step == b.step == last
    assert_same(a.state, b.state)
    position = tmp_path / "a" / "checkpoints" / str(last) / "data" / "process_0-of-1.json"
    assert json.loads(position.read_text()) == {"next_index": last}
    assert {name: a.config[name] for name in SMALL} == SMALL

    printed, _ = finish(start("eval_char_lm", tmp_path / "a"))
    assert re.match(rf"test loss \d\.\d+ bits per character at step {last}\ndef main\(", printed)
