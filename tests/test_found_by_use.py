"""What a user met who tried to break it: saves that overlap, threads, forks, and JAX's settings."""

import asyncio
import contextlib
import multiprocessing
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_ckpt as fc
from flax_ckpt.errors import CheckpointExistsError, DamagedCheckpointError, InvalidLayoutError
from flax_ckpt.storage import commit
from flax_ckpt.storage.commit import Staging

BIG = {f"a{i}": np.full(500_000, i, np.float32) for i in range(20)}


def test_a_save_that_is_refused_does_not_forget_the_one_in_flight(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    fc.save(path, {"v": 0})
    for _ in range(3):
        first = fc.save_async(path, {"v": 1, **BIG}, overwrite=True)
        with pytest.raises(fc.errors.UnsupportedLeafError):
            fc.save_async(path, {"bad": object()}, overwrite=True)
        second = fc.save_async(path, {"v": 2, **BIG}, overwrite=True)
        first.result()
        second.result()
        assert fc.load(path)["v"] == 2


def test_one_place_under_two_names_is_one_place(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    first = fc.save_async(tmp_path / "real" / "ckpt", {"v": 1, **BIG}, overwrite=True)
    second = fc.save_async(tmp_path / "link" / "ckpt", {"v": 2, **BIG}, overwrite=True)
    first.result()
    second.result()
    assert fc.load(tmp_path / "real" / "ckpt")["v"] == 2


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    fc.save(path, {"v": 0})
    with saving_elsewhere(path) as other:
        text = f"is being saved by process {other.pid} of this machine, which still runs"
        with pytest.raises(CheckpointExistsError, match=text):
            fc.save(path, {"v": 1}, overwrite=True)
        assert fc.load(path)["v"] == 0
        other.communicate(b"go on\n")
    assert fc.load(path)["v"] == "elsewhere"
    fc.save(path, {"v": 2}, overwrite=True)
    assert fc.load(path)["v"] == 2
    assert os.listdir(tmp_path) == ["ckpt"]


def test_what_a_killed_process_left_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "7"
    with saving_elsewhere(path) as other:
        other.kill()
    (left,) = tmp_path.iterdir()
    left.rename(tmp_path / f"{left.name}-0123")  # as if it died before the name was given
    with saving_elsewhere(path) as other:
        other.kill()
    fc.save(path, {"v": 2})
    with fc.CheckpointCallback(tmp_path, at_end=False) as callback:
        callback.restore_or_init({"v": 0})
    assert os.listdir(tmp_path) == ["7"]


def test_another_process_with_the_number_of_a_dead_one_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    left = tmp_path / "ckpt.orbax-checkpoint-tmp"
    left.mkdir()
    (left / ".owner").write_text(commit.identity(os.getppid()).rpartition(" ")[0] + " 1")
    fc.save(path, {"v": 2})
    assert os.listdir(tmp_path) == ["ckpt"]


@contextlib.contextmanager
def saving_elsewhere(path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Another process, in the middle of a save, which goes on when it is told to."""
    program = """
        import sys
        import flax_ckpt as fc
        from flax_ckpt.storage import native_write

        def write(*arguments):
            print("begun", flush=True)
            sys.stdin.readline()
            really(*arguments)

        really, native_write.write_arrays = native_write.write_arrays, write
        fc.save(sys.argv[1], {"v": "elsewhere", "n": 1}, overwrite=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"begun\n"
        yield other


def test_what_this_process_left_does_not_stop_it(tmp_path: Path) -> None:
    Staging(str(tmp_path / "ckpt")).create(["state"])
    fc.save(tmp_path / "ckpt", {"v": 1})
    assert os.listdir(tmp_path) == ["ckpt"]


def test_an_option_changed_after_the_call_is_for_the_next(tmp_path: Path) -> None:
    context = fc.Context()
    with fc.training.Checkpointer(tmp_path, context=context) as checkpointer:
        tree = {f"a{i}": jnp.full(4, 1 / 3) for i in range(2000)}
        response = checkpointer.save_async(0, tree)
        context.array.saving.storage_options.dtype = np.dtype(jnp.bfloat16)
        assert response is not None
        response.result()
        found: Any = checkpointer.load(0)
    assert {leaf.dtype for leaf in found.values()} == {np.dtype("float32")}


@pytest.mark.filterwarnings("ignore:.*fork:")
def test_a_fork_does_not_wait_for_the_saves_of_its_parent(tmp_path: Path) -> None:
    response = fc.save_async(tmp_path / "ckpt", BIG)
    child = multiprocessing.get_context("fork").Process(target=os.getpid)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    response.result()


def test_a_load_within_jit_becomes_a_constant(tmp_path: Path) -> None:
    fc.save(tmp_path / "ckpt", {"a": jnp.arange(8.0), "b": jnp.arange(8.0)})

    def add(x: Any) -> Any:
        return fc.load(tmp_path / "ckpt")["a"] + x

    assert jnp.array_equal(jax.jit(add)(jnp.ones(8)), jnp.arange(8.0) + 1)
    assert jax.eval_shape(add, jnp.ones(8)).shape == (8,)


def test_a_load_within_jit_elsewhere_becomes_a_constant(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    fc.save(path, {"a": jnp.arange(8.0)})
    for load in (
        lambda: fc.load_async(path).result()["a"],
        lambda: in_a_loop(lambda: fc.load(path)["a"]),
    ):
        found = jax.jit(lambda x, load=load: load() + x)(jnp.ones(8))
        assert jnp.array_equal(found, jnp.arange(8.0) + 1)


def test_a_thread_that_cannot_start_does_not_hold_up_the_end(
    tmp_path: Path, run_child: Any
) -> None:
    program = """
        import sys, threading
        import flax_ckpt as fc

        def refuse(self):
            raise RuntimeError("can't start new thread")

        really, threading.Thread.start = threading.Thread.start, refuse
        try:
            fc.save(sys.argv[1], {"a": 1})
        except RuntimeError as error:
            print(error)
        threading.Thread.start = really
        fc.save(sys.argv[1], {"a": 1})
    """
    done = run_child(
        "import warnings; warnings.simplefilter('ignore')\n" + textwrap.dedent(program),
        tmp_path / "ckpt",
    )
    assert done.stdout == "can't start new thread\n"
    assert fc.load(tmp_path / "ckpt") == {"a": 1}


def in_a_loop(call: Callable[[], Any]) -> Any:
    async def main() -> Any:
        return call()

    return asyncio.run(main())


@pytest.mark.parametrize("around", ["script", "loop", "background"])
def test_settings_of_jax_reach_the_load(tmp_path: Path, around: str) -> None:
    path = tmp_path / "ckpt"
    fc.save(path, {"a": jnp.ones(8), "wide": np.arange(3)})
    mesh = jax.make_mesh((8,), ("x",))
    placed = jax.NamedSharding(mesh.abstract_mesh, jax.P("x"))
    abstract = {
        "a": jax.ShapeDtypeStruct((8,), np.float32, sharding=placed),
        "wide": jax.ShapeDtypeStruct((3,), np.int64),
    }

    def load(wanted: Any = None) -> Any:
        if around == "background":
            return fc.load_async(path, wanted).result()
        return (
            in_a_loop(lambda: fc.load(path, wanted)) if around == "loop" else fc.load(path, wanted)
        )

    with jax.default_device(jax.devices()[3]):
        assert load()["a"].devices() == {jax.devices()[3]}
    with jax.set_mesh(mesh), jax.enable_x64(True):
        found = load(abstract)
    assert found["a"].sharding.num_devices == 8
    assert found["wide"].dtype == np.int64


def test_load_async_keeps_the_wish_as_it_was(tmp_path: Path) -> None:
    fc.save(tmp_path / "ckpt", BIG)
    wanted: dict[str, Any] = dict.fromkeys(BIG, np.ndarray)
    response = fc.load_async(tmp_path / "ckpt", wanted)
    wanted.clear()
    assert response.result().keys() == BIG.keys()


def test_metadata_is_read_again_while_the_checkpoint_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    fc.save(path, {"w": np.ones(3)})
    ended, problems, count = threading.Event(), list[BaseException](), [0]

    def look() -> None:
        while not ended.is_set():
            try:
                fc.metadata(path)
                fc.checkpointables_metadata(path)
                count[0] += 1
            except BaseException as error:
                problems.append(error)

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(60):
        fc.save(path, {"w": np.ones(3)}, overwrite=True)
    ended.set()
    thread.join()
    assert not problems
    assert count[0] > 0


def test_a_thread_that_outlives_the_main_one_loads(tmp_path: Path, run_child: Any) -> None:
    program = """
        import sys, threading
        import numpy as np
        import flax_ckpt as fc

        def work():
            threading.main_thread().join()
            fc.save(sys.argv[1], {"a": np.ones(3)})
            print(fc.load(sys.argv[1])["a"].sum())

        threading.Thread(target=work).start()
    """
    assert run_child(program, tmp_path / "ckpt").stdout == "3.0\n"


def test_a_small_leaf_that_is_kept_keeps_nothing_else(tmp_path: Path) -> None:
    fc.save(tmp_path / "ckpt", {"n": np.int32(3) * np.ones((), np.int32), **BIG})
    leaf = fc.load(tmp_path / "ckpt")["n"]
    while leaf.base is not None:
        leaf = leaf.base
    assert leaf.nbytes == 4


def test_a_tree_without_its_description_is_damaged(tmp_path: Path) -> None:
    fc.save(tmp_path / "ckpt", {"a": np.ones(3)})
    (tmp_path / "ckpt" / "state" / "_METADATA").unlink()
    with pytest.raises(DamagedCheckpointError, match="_METADATA: the file is missing"):
        fc.load(tmp_path / "ckpt")


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointExistsError, match="is a file, or leads nowhere; there must be a"):
        fc.save(tmp_path / "file" / "ckpt", {"a": 1})
    with pytest.raises(InvalidLayoutError, match="is no path: it is empty, or has a NUL in it"):
        fc.save(f"{tmp_path}/a\0b", {"a": 1})
    with pytest.raises(TypeError, match="checkpointables must be a dict of values by name"):
        fc.save_checkpointables(tmp_path / "ckpt", [{"a": 1}])  # type: ignore[arg-type]
    with contextlib.suppress(FileNotFoundError):
        pytest.fail(f"{os.listdir(tmp_path / 'ckpt')}")


def test_a_directory_that_holds_a_checkpoint_is_no_run(tmp_path: Path) -> None:
    fc.save(tmp_path / "one", {"a": 1})
    with pytest.raises(InvalidLayoutError, match="is no checkpoint itself; .* in it: one. Give"):
        fc.load(tmp_path)


def test_what_is_there_is_listed_by_number(tmp_path: Path) -> None:
    for name in ("10", "9", "100", "a2", "a10"):
        (tmp_path / name).mkdir()
    with pytest.raises(fc.errors.CheckpointNotFoundError, match="has: 9, 10, 100, a2, a10"):
        fc.load(tmp_path / "x")
