"""A sharding as the JSON text of the `_sharding` file, and back on the devices that are here.

Source: the format as Orbax writes it, `SingleDeviceSharding` and `NamedSharding`.
"""

import functools
import json
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, Sharding
from jax.sharding import SingleDeviceSharding as OneDevice

from flax_ckpt.errors import StateError
from flax_ckpt.format import jsons

_jax: Any = jax  # jaxlib says nothing about the types of devices

# For arrays that live on no device, so that Orbax loads them without a sharding of the caller's.
HOST = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"})


@functools.lru_cache(maxsize=4096)
def to_json(sharding: Sharding) -> str:
    """The text for one sharding; of a kind that has none, its first device."""
    if not isinstance(sharding, NamedSharding):
        devices: Any = sharding
        device = min(devices.device_set, key=lambda d: d.id)
        return json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": str(device)})
    mesh: Any = sharding.mesh
    ids = np.array([{"id": device.id} for device in mesh.devices.flat]).reshape(mesh.devices.shape)
    return json.dumps(
        {
            "sharding_type": "NamedSharding",
            "shape": list(mesh.devices.shape),
            "axis_names": [str(name) for name in mesh.axis_names],
            "axis_types": [f"AxisType.{kind.name}" for kind in mesh.axis_types],
            "partition_spec": list(sharding.spec),
            "device_mesh": {"mesh": ids.tolist()},
        }
    )


@functools.lru_cache(maxsize=4096)
def from_json(text: str) -> Sharding | None:
    """The sharding, or None if its devices are not here or the text is of another kind."""
    try:
        raw = json.loads(text)
        return {"SingleDeviceSharding": _single, "NamedSharding": _named}[raw["sharding_type"]](raw)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None  # the caller then says which leaves went to one device


def _single(raw: dict[str, Any]) -> OneDevice | None:
    text = raw["device_str"]
    legacy = text.replace("TFRT_CPU_", "cpu:")  # older JAX printed CPU devices so
    return next((OneDevice(d) for d in _jax.devices() if str(d) in (text, legacy)), None)


def _named(raw: dict[str, Any]) -> NamedSharding | None:
    shape = tuple(raw["shape"])
    by_id = {device.id: device for device in _jax.devices()}
    recorded = raw.get("device_mesh")
    if jsons.is_object(recorded):
        ids: list[int] = [int(item["id"]) for item in np.array(recorded["mesh"], object).flat]
    else:
        ids = sorted(by_id)[: int(np.prod(shape))]
    if not set(ids) <= by_id.keys() or len(ids) != int(np.prod(shape)):
        return None
    types = raw.get("axis_types")
    axis_types = tuple(AxisType[t.rpartition(".")[2]] for t in types) if types else None
    devices = np.array([by_id[i] for i in ids], dtype=object).reshape(shape)
    mesh = Mesh(devices, tuple(raw["axis_names"]), axis_types=axis_types)
    spec = [tuple(part) if jsons.is_list(part) else part for part in raw["partition_spec"]]
    return NamedSharding(mesh, PartitionSpec(*spec))


def fits(placed: Any, shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape can be placed so: every split axis is there and divides."""
    if isinstance(placed, NamedSharding) and len(placed.spec) > len(shape):
        return False
    try:
        placed.shard_shape(shape)
    except ValueError:
        return False
    return True


def concrete(sharding: Any) -> Any:
    """A sharding on an abstract mesh, put on the mesh that is set around the call.

    The empty abstract mesh, which `jax.typeof` reports of an array that is not sharded, is none.
    """
    if isinstance(sharding, NamedSharding) and not isinstance(sharding.mesh, Mesh):
        if sharding.mesh.empty:
            return None
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            raise StateError(
                f"{sharding} is on an abstract mesh, and no mesh is set: call this within"
                " jax.set_mesh(mesh)"
            )
        return NamedSharding(mesh, sharding.spec)
    return sharding
