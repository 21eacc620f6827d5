"""Where a checkpoint comes from is in its config."""

import os
import platform
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import optax
from google.protobuf import timestamp_pb2
from ml_collections import ConfigDict

import flax_ckpt as fc

RUN = """
    import sys
    import numpy as np
    import flax_ckpt as fc
    with fc.CheckpointCallback(sys.argv[1], config={"rate": 1e-3}) as ckpt:
        ckpt.on_step_end(1, {"params": np.ones(3)})
"""


def git(directory: Path, *command: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    run = ["git", "-C", str(directory), *who, *command]
    return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()


def saved(script: Path, root: Path) -> dict[str, Any]:
    command = [sys.executable, str(script), str(root), "--secret"]
    path = os.pathsep.join(sys.path)
    subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": path})
    return fc.restore(root).provenance


def test_commit_versions_devices_and_arguments(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    script = code / "train.py"
    script.write_text(textwrap.dedent(RUN))
    git(code, "init", "-q")
    git(code, "add", ".")
    git(code, "commit", "-qm", "first")
    found = saved(script, tmp_path / "a")
    assert found["git"] == {"commit": git(code, "rev-parse", "HEAD"), "dirty": False}
    assert found["argv"] == [str(script), str(tmp_path / "a"), "--secret"]
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["jax"] == jax.__version__
    assert found["versions"]["flax"] == flax.__version__
    assert found["versions"]["optax"] == optax.__version__
    assert found["device"] == {"kind": jax.devices()[0].device_kind, "count": len(jax.devices())}
    script.write_text(script.read_text() + "# changed\n")
    assert saved(script, tmp_path / "b")["git"]["dirty"] is True


def test_outside_of_a_repository_there_is_no_commit(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(RUN))
    assert saved(script, tmp_path / "run")["git"] is None


def test_the_mesh_is_named(tmp_path: Path) -> None:
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    mesh = jax.sharding.Mesh(devices, ("data", "model"))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    with fc.CheckpointCallback(tmp_path, config={}) as ckpt:
        ckpt.on_step_end(1, {"params": jax.device_put(np.ones(4), sharding)})
    assert fc.restore(tmp_path).provenance["mesh"] == {"data": 1, "model": 1}


def test_it_is_a_part_of_the_config(tmp_path: Path) -> None:
    state = {"params": np.ones(3)}
    for name, given in (("none", None), ("empty", {})):
        with fc.CheckpointCallback(tmp_path / name, config=given) as ckpt:
            ckpt.on_step_end(1, state)
    out = fc.restore(tmp_path / "none")
    assert (out.config, out.provenance) == (None, {})
    out = fc.restore(tmp_path / "empty")
    assert out.config == ConfigDict()
    assert out.provenance["versions"]["jax"] == jax.__version__
    assert out.provenance["mesh"] is None
    config = ConfigDict({"rate": 0.1})
    with fc.CheckpointCallback(tmp_path / "b", config=config) as ckpt:
        ckpt.on_step_end(1, state)
    out = fc.restore(tmp_path / "b")
    assert out.config == config
    assert 'key: "rate"' in out.config_text
    assert "provenance {" in out.config_text


def test_a_message_of_ones_own_has_no_place_for_it(tmp_path: Path) -> None:
    config = timestamp_pb2.Timestamp(seconds=12)
    with fc.CheckpointCallback(tmp_path, config=config) as ckpt:
        ckpt.on_step_end(1, {"params": np.ones(3)})
    out = fc.restore(tmp_path)
    assert (out.config, out.provenance) == (config, {})
    assert config == timestamp_pb2.Timestamp(seconds=12)
