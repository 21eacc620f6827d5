"""A process that ends with a save in flight: the checkpoint is there, or the end says it is not."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

import flax_ckpt as fc

PRELUDE = """
    import atexit, os, sys, threading
    path = sys.argv[1]
    atexit.register(lambda: print("registered before", flush=True))
    import numpy as np, flax_ckpt as fc
    atexit.register(lambda: print("registered after", flush=True))
    main_has_ended = threading.Event()
    threading._register_atexit(main_has_ended.set)  # runs before the hook of flax_ckpt

    class SlowHandler:
        # Waits in the background until the main thread has ended, then fails or not.
        async def save(self, directory, value):
            return self._write(directory, value)
        async def _write(self, directory, value):
            directory = await directory.await_creation()
            assert main_has_ended.wait(60)
            if value == "fails":
                raise OSError(28, "No space left on device")
        async def load(self, directory, abstract=None): ...
        async def metadata(self, directory): ...
        def is_handleable(self, value): return isinstance(value, str)
        def is_abstract_handleable(self, abstract): return None

    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry()
    context.checkpointables.registry.add(SlowHandler, checkpointable_name="slow")

    def begin(how, to=path):
        with context:
            tree = {"w": np.arange(50_000.0)}
            return fc.save_checkpointables_async(to, {"state": tree, "slow": how})
"""

ENDINGS = {
    "return": ("", 0),
    "raise": ("raise RuntimeError('the end')", 1),
    "exit 0": ("sys.exit(0)", 0),
    "exit 3": ("sys.exit(3)", 3),
    "exit text": ("sys.exit('a message')", 1),
    "interrupt": ("raise KeyboardInterrupt", None),
}
NOT_SAVED = (
    "flax_ckpt: checkpoint {path} was NOT saved: OSError: [Errno 28] No space left on device"
)


@dataclass
class Ended:
    code: int
    out: str
    err: str
    path: Path


def run(program: str, path: Path) -> Ended:
    source = textwrap.dedent(PRELUDE) + textwrap.dedent(program)
    done = subprocess.run(
        [sys.executable, "-c", source, str(path)],
        cwd=path.parent,
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    return Ended(done.returncode, done.stdout, done.stderr, path)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Ended]:
    """How each child process ended, by ending and fate of its save."""
    root = tmp_path_factory.mktemp("exit")
    keys = [(ending, fate) for ending in ENDINGS for fate in ("works", "fails")]
    programs = [f"begin({fate!r})\n{ENDINGS[ending][0]}" for ending, fate in keys]
    paths = [root / f"{ending}-{fate}".replace(" ", "-") / "ckpt" for ending, fate in keys]
    for path in paths:
        path.parent.mkdir()
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(keys, pool.map(run, programs, paths), strict=True))


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_save_in_flight_is_committed(ended: dict[tuple[str, str], Ended], ending: str) -> None:
    done = ended[ending, "works"]
    np.testing.assert_array_equal(fc.load(done.path)["w"], np.arange(50_000.0))
    assert os.listdir(done.path.parent) == ["ckpt"]
    expected = ENDINGS[ending][1]
    if expected is None:
        assert done.code != 0
    else:
        assert done.code == expected
    assert "NOT saved" not in done.err


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_save_that_fails_is_named_and_fails_the_process(
    ended: dict[tuple[str, str], Ended], ending: str
) -> None:
    done = ended[ending, "fails"]
    assert done.code != 0
    assert NOT_SAVED.format(path=done.path) in done.err.splitlines()
    assert os.listdir(done.path.parent) == []


def test_the_error_of_the_program_itself_is_still_shown(
    ended: dict[tuple[str, str], Ended],
) -> None:
    for fate in ("works", "fails"):
        assert "RuntimeError: the end" in ended["raise", fate].err
        assert "a message" in ended["exit text", fate].err
        assert "KeyboardInterrupt" in ended["interrupt", fate].err


@pytest.mark.parametrize("fate", ["works", "fails"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_exit_handlers_of_the_user_run(
    ended: dict[tuple[str, str], Ended], ending: str, fate: str
) -> None:
    """Also those that were registered before flax_ckpt was imported, which run last."""
    assert ended[ending, fate].out.splitlines() == ["registered after", "registered before"]


def test_an_error_that_was_raised_does_not_fail_the_exit(tmp_path: Path) -> None:
    program = """
        class FailsHandler(SlowHandler):
            async def _write(self, directory, value):
                await directory.await_creation()
                raise OSError(28, "No space left on device")
        registry = context.checkpointables.registry
        registry.add(FailsHandler, checkpointable_name="fails")
        with context:
            response = fc.save_checkpointables_async(path, {"fails": "now"})
            for _ in range(2):  # each ask is answered
                try:
                    response.result()
                except OSError as error:
                    print("told", error.errno)
            try:
                fc.save_checkpointables(path, {"fails": "now"})
            except OSError as error:
                print("told", error.errno)
    """
    done = run(program, tmp_path / "ckpt")
    assert (done.code, done.err) == (0, "")
    assert done.out.splitlines()[:3] == ["told 28"] * 3


def test_every_failed_save_is_named_and_the_others_are_committed(tmp_path: Path) -> None:
    program = """
        for number, fate in enumerate(["fails", "works", "fails"]):
            begin(fate, f"{path}{number}")
    """
    done = run(program, tmp_path / "ckpt")
    assert done.code == 1
    for number in (0, 2):
        assert NOT_SAVED.format(path=f"{done.path}{number}") in done.err.splitlines()
    assert os.listdir(tmp_path) == ["ckpt1"]
    assert fc.load(tmp_path / "ckpt1")["w"].shape == (50_000,)


def test_a_load_that_nobody_waits_for_is_no_save(tmp_path: Path) -> None:
    program = """
        response = fc.load_async(path)
    """
    done = run(program, tmp_path / "ckpt")
    assert "was NOT saved" not in done.err


def test_a_save_begun_in_a_thread_that_outlives_the_main_thread(tmp_path: Path) -> None:
    """Training in a thread of its own: its last save begins when the main thread has ended."""
    program = """
        def train():
            threading.main_thread().join()
            fc.save_async(path, {"w": np.arange(50_000.0)})
        threading.Thread(target=train).start()
    """
    done = run(program, tmp_path / "ckpt")
    assert (done.code, done.err) == (0, "")
    np.testing.assert_array_equal(fc.load(tmp_path / "ckpt")["w"], np.arange(50_000.0))


def test_a_save_begun_in_an_exit_handler(tmp_path: Path) -> None:
    program = """
        atexit.register(lambda: fc.save_async(path, {"w": np.arange(50_000.0)}))
    """
    done = run(program, tmp_path / "ckpt")
    saved = (tmp_path / "ckpt").exists()
    assert saved or (done.code != 0 and str(tmp_path / "ckpt") in done.err)


CALLBACK = """
    class Broken:
        pass
    state = {"params": {"w": np.arange(50_000.0)}, "step": 2}
    ckpt = fc.CheckpointCallback(path, every_n_steps=2, keep_last=None)
    ckpt.on_step_end(1, {**state, "step": 1})
    assert ckpt.on_step_end(2, state)
"""


FULL_DISK = CALLBACK.replace(
    "    assert",
    """
    ckpt.wait()
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert""",
)


@pytest.mark.parametrize("ending", ["return", "raise", "exit 3"])
def test_a_callback_that_is_never_closed(tmp_path: Path, ending: str) -> None:
    done = run(textwrap.dedent(CALLBACK) + ENDINGS[ending][0], tmp_path / "run")
    assert done.code == ENDINGS[ending][1]
    restored = fc.restore(tmp_path / "run")
    assert restored.step == 2
    np.testing.assert_array_equal(restored.state["params"]["w"], np.arange(50_000.0))


def test_a_callback_whose_last_save_fails(tmp_path: Path) -> None:
    done = run(textwrap.dedent(FULL_DISK), tmp_path / "run")
    assert done.code == 1
    assert f"flax_ckpt: checkpoint {tmp_path}/run/2 was NOT saved: " in done.err
    assert "File too large" in done.err
    assert os.listdir(tmp_path / "run") == []
