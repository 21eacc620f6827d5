"""Two processes save one checkpoint together; each writes its own shards."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import flax_ckpt as fc

SUFFIX = ".orbax-checkpoint-tmp"

# What every child begins with: joins the other process, builds the tree.
PRELUDE = """
    import os, signal, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

    port, index, path = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
    assert jax.process_count() == 2 and jax.device_count() == 4

    import flax_ckpt as fc

    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))

    def place(values, spec):
        sharding = NamedSharding(mesh, spec)
        return jax.make_array_from_callback(values.shape, sharding, lambda i: values[i])

    def tree(offset=0):
        values = np.arange(96, dtype=np.float32).reshape(8, 12) + offset
        specs = dict(rows=P("x"), columns=P(None, "x"), both=P("x", "y"), local=P("y"), all=P())
        placed = {name: place(values, spec) for name, spec in specs.items()}
        half = place(values.astype(jnp.bfloat16), P("y"))
        return {**placed, "text": f"é{offset}", "empty": {}, "bf16": half}

    def check(loaded, offset=0):
        for name, expected in tree(offset).items():
            if isinstance(expected, jax.Array):
                assert loaded[name].sharding == expected.sharding, (name, loaded[name].sharding)
                pairs = zip(loaded[name].addressable_shards, expected.addressable_shards)
                for ours, theirs in pairs:
                    np.testing.assert_array_equal(ours.data, theirs.data, name)
            else:
                np.testing.assert_equal(loaded[name], expected)

    class FailingHandler:
        async def save(self, directory, value):
            return self._write(directory, value)
        async def _write(self, directory, value):
            await directory.await_creation()
            if index == 1 and value == "raise":
                raise ValueError("process 1 cannot write")
            if index == 1 and value == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        async def load(self, directory, abstract=None): ...
        async def metadata(self, directory): ...
        def is_handleable(self, value): return isinstance(value, str)
        def is_abstract_handleable(self, abstract): return None

    context = fc.Context()
    context.asynchronous.timeout_secs = int(sys.argv[4])
    context.checkpointables.registry = fc.handlers.local_registry()
    context.checkpointables.registry.add(FailingHandler, checkpointable_name="extra")

    def leave():
        sys.stdout.flush()
        os._exit(0)  # the other one may be gone: no shutdown together
"""


@dataclasses.dataclass
class Outcome:
    code: int
    out: str
    err: str


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_two(program: str, path: Path, timeout_secs: int = 60) -> list[Outcome]:
    source = textwrap.dedent(PRELUDE) + textwrap.dedent(program)
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    port = free_port()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", source, str(port), str(index), str(path), str(timeout_secs)],
            env=environment,
            cwd=os.sep,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    outcomes: list[Outcome] = []
    try:
        for child in children:
            out, err = child.communicate(timeout=100)
            outcomes.append(Outcome(child.returncode, out, err))
    finally:
        for child in children:
            child.kill()
    return outcomes


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two processes, which have read it back and overwritten it once."""
    path = tmp_path_factory.mktemp("processes") / "made" / "ckpt"
    program = """
        with context:
            fc.save(path, tree())
            check(fc.load(path))
            fc.save_async(path, tree(1000), overwrite=True).result()
            check(fc.load(path), 1000)
            abstract = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
                if isinstance(leaf, jax.Array) else leaf, tree())
            check(fc.load(path, abstract), 1000)
            moved = NamedSharding(mesh, P("y", "x"))
            other = jax.ShapeDtypeStruct((8, 12), jnp.float32, sharding=moved)
            rows = fc.load(path, {**abstract, "rows": other})["rows"]
            for shard in rows.addressable_shards:
                values = np.arange(96, dtype=np.float32).reshape(8, 12) + 1000
                np.testing.assert_array_equal(shard.data, values[shard.index])
        print("done")
    """
    for outcome in run_two(program, path):
        assert (outcome.code, outcome.out) == (0, "done\n"), outcome.err
    return path


def expected() -> dict[str, Any]:
    values = np.arange(96, dtype=np.float32).reshape(8, 12) + 1000
    single = dict.fromkeys(("rows", "columns", "both", "local", "all"), values)
    return {**single, "bf16": values.astype(jnp.bfloat16)}


def test_both_processes_read_back_what_they_saved(saved: Path) -> None:
    assert sorted(os.listdir(saved.parent)) == ["ckpt"]


def test_each_process_wrote_its_own_shards(saved: Path) -> None:
    sizes = {
        name: sum(p.stat().st_size for p in (saved / "state" / name).rglob("*") if p.is_file())
        for name in ("ocdbt.process_0", "ocdbt.process_1")
    }
    assert min(sizes.values()) > 96 * 4
    assert sorted(os.listdir(saved / "state" / "array_metadatas")) == ["process_0", "process_1"]


def test_a_single_process_reads_it(saved: Path) -> None:
    loaded = fc.load(saved)
    for name, values in expected().items():
        np.testing.assert_array_equal(np.asarray(loaded[name]), values, name)
    assert (loaded["text"], loaded["empty"]) == ("é1000", {})


def test_damage_to_a_shard_of_either_process_is_noticed(saved: Path) -> None:
    for index in range(2):
        (file,) = (saved / "state" / f"ocdbt.process_{index}" / "d").iterdir()
        whole = file.read_bytes()
        file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
        with pytest.raises(fc.errors.DamagedCheckpointError, match=file.name):
            fc.load(saved)
        file.write_bytes(whole)
    fc.load(saved)


ORBAX = """
    import sys, jax, jax.numpy as jnp, numpy as np
    import orbax.checkpoint.experimental.v1 as ocp
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    names = ("rows", "columns", "both", "local", "all", "bf16")
    dtypes = {name: jnp.bfloat16 if name == "bf16" else np.float32 for name in names}
    wanted = {n: jax.ShapeDtypeStruct((8, 12), d, sharding=device) for n, d in dtypes.items()}
    loaded = ocp.load(sys.argv[1], {**wanted, "text": "", "empty": {}})
    values = np.arange(96, dtype=np.float32).reshape(8, 12) + 1000
    for name, dtype in dtypes.items():
        np.testing.assert_array_equal(loaded[name], values.astype(dtype), name)
    assert (loaded["text"], loaded["empty"]) == ("é1000", {})
    print("read")
"""


def test_stock_orbax_reads_it(saved: Path, run_child: Any) -> None:
    assert "read\n" in run_child(ORBAX, saved).stdout


FAILURE = """
    try:
        with context:
            fc.save_checkpointables(path, {"state": tree(), "extra": KIND})
    except Exception as error:
        names = "BarrierTimeoutError" if isinstance(error, fc.errors.BarrierTimeoutError) else ""
        print(names or type(error).__name__, "|", str(error).replace("\\n", " "), flush=True)
    else:
        print("saved", flush=True)
    leave()
"""


@pytest.mark.parametrize("kind", ["raise", "die"])
def test_when_one_process_fails_the_other_says_where_it_waited(tmp_path: Path, kind: str) -> None:
    first, second = run_two(FAILURE.replace("KIND", repr(kind)), tmp_path / "ckpt", 3)
    assert first.out.startswith("BarrierTimeoutError |"), first.out + first.err[-2000:]
    assert "/written'" in first.out
    assert "for processes [0, 1]" in first.out
    if kind == "raise":
        assert second.out == "ValueError | process 1 cannot write\n"
    else:
        assert second.code == -9
    assert os.listdir(tmp_path) == []


def test_what_every_process_has_is_written_once(tmp_path: Path) -> None:
    """Host values, and arrays on a device of each process: a fresh `TrainState.step` is one."""
    program = """
        with context:
            fc.save(path, {
                "numpy": np.arange(5), "scalar": 7, "step": jnp.int32(7),
                "key": jax.random.key(3), "all": place(np.arange(4.0), P()),
            })
            loaded = fc.load(path)
        np.testing.assert_array_equal(loaded["numpy"], np.arange(5))
        assert (loaded["scalar"], int(loaded["step"])) == (7, 7), loaded
        key = jax.random.key_data(loaded["key"])
        np.testing.assert_array_equal(key, jax.random.key_data(jax.random.key(3)))
        print("done", flush=True)
        leave()
    """
    for outcome in run_two(program, tmp_path / "ckpt", 5):
        assert (outcome.code, outcome.out) == (0, "done\n"), outcome.err[-3000:]
    loaded = fc.load(tmp_path / "ckpt")
    np.testing.assert_array_equal(loaded["numpy"], np.arange(5))
    assert (loaded["scalar"], int(loaded["step"])) == (7, 7)


def test_a_target_that_exists_is_refused_by_both(tmp_path: Path) -> None:
    program = """
        fc.save(path, {"a": place(np.ones(4), P("x"))})
        try:
            fc.save(path, {"a": place(np.zeros(4), P("x"))})
        except FileExistsError as error:
            print(type(error).__name__)
        with context:
            fc.save(path + "2", {"a": place(np.zeros(4), P("x"))})  # and they still keep step
        for shard in fc.load(path)["a"].addressable_shards:
            np.testing.assert_array_equal(shard.data, np.ones(2))
    """
    for outcome in run_two(program, tmp_path / "ckpt", 10):
        assert (outcome.code, outcome.out) == (0, "CheckpointExistsError\n"), outcome.err[-3000:]
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "ckpt2"]


def test_parts_of_one_tree_and_deletions(tmp_path: Path) -> None:
    program = """
        with context:
            full = tree()
            fc.partial.save(path, {"a": {"rows": full["rows"], "text": "é"}})
            try:
                fc.partial.save(path, {"a": {"rows": full["rows"]}})
            except ValueError as error:
                print(type(error).__name__, "a/rows is saved already" in str(error))
            fc.partial.save_async(path, {"a": {"both": full["both"]}, "n": np.arange(3)})
            fc.partial.finalize(path)
            loaded = fc.load(path)
            for name in ("rows", "both"):
                assert loaded["a"][name].sharding == full[name].sharding
                for ours, theirs in zip(
                    loaded["a"][name].addressable_shards, full[name].addressable_shards
                ):
                    np.testing.assert_array_equal(ours.data, theirs.data)
            fc.save_checkpointables(path + "2", {"keep": full, "go": full})
            assert fc.delete(path + "2", checkpointable_name="go")
            check(fc.load(path + "2", checkpointable_name="keep"))
            fc.save(path + "3", full)
            assert fc.delete(path + "3") and not fc.delete(path + "3", missing_ok=True)
        print("done", flush=True)
        leave()
    """
    for outcome in run_two(program, tmp_path / "ckpt", 20):
        assert outcome.out == "DuplicateNameError True\ndone\n", outcome.err[-3000:]
        assert outcome.code == 0
    assert sorted(os.listdir(tmp_path)) == ["ckpt", "ckpt2"]
    assert list(fc.load_checkpointables(tmp_path / "ckpt2")) == ["keep"]
    loaded = fc.load(tmp_path / "ckpt")
    values = np.arange(96, dtype=np.float32).reshape(8, 12)
    np.testing.assert_array_equal(loaded["a"]["rows"], values)
    np.testing.assert_array_equal(loaded["a"]["both"], values)
    assert (loaded["a"]["text"], loaded["n"].tolist()) == ("é", [0, 1, 2])
