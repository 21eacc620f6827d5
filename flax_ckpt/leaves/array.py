"""`jax.Array` leaves: any dtype that zarr has, any sharding.

A sharding is kept as the JSON text of the `_sharding` file, and put back on the devices that are
here. Source: the format as Orbax writes it, `SingleDeviceSharding` and `NamedSharding`.
"""

import functools
import json
import operator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from numpy.typing import NDArray

from flax_ckpt.errors import StateError
from flax_ckpt.format import arrays, jsons, tree
from flax_ckpt.leaves import dtypes, transfer
from flax_ckpt.leaves.base import LeafWrite, LoadRules, SavedLeaf, Target, show_array
from flax_ckpt.storage.store import Region, Shard, whole

_jax: Any = jax  # jaxlib says nothing about the types of devices

# For arrays that live on no device, so that Orbax loads them without a sharding of the caller's.
HOST = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"})


class ArrayLeaf:
    """Saves the shards that this process holds first; loads into any sharding."""

    value_types = (tree.ARRAY,)

    def handles(self, value: Any) -> bool:
        """True unless zarr has no such dtype: uint2, uint4, float8_e4m3."""
        return isinstance(value, jax.Array) and arrays.is_storable(value.dtype)

    def handles_abstract(self, abstract: Any) -> bool:
        """True for `jax.Array`, `jax.ShapeDtypeStruct`, and what has shape, dtype, sharding."""
        if isinstance(abstract, type):
            return issubclass(abstract, jax.Array)
        is_array = all(hasattr(abstract, name) for name in ("shape", "dtype", "sharding"))
        return is_array and not is_key(abstract.dtype)

    def write(self, value: Any, *, copy: bool) -> LeafWrite:
        """See :class:`LeafHandler`."""
        # On CPU the memory is referenced, not copied: JAX arrays do not change, and one that is
        # donated or deleted lives on until the save lets go of it.
        array: Any = value
        placed: Sharding = array.sharding
        if type(placed) is SingleDeviceSharding or placed.num_devices == 1:
            data = np.asarray(array)
            shape, origin = _shared(data.shape)
            shards = (Shard(origin, data),)
            return LeafWrite(tree.ARRAY, shape, data.dtype, shape, shards, placed)
        shape, dtype = array.shape, np.dtype(array.dtype)
        shards = [
            Shard(tuple([s.start or 0 for s in shard.index]), np.asarray(shard.data))
            for shard in array.addressable_shards
            if shard.replica_id == 0
        ]
        spread = not array.is_fully_addressable
        part = placed.shard_shape(shape)
        return LeafWrite(tree.ARRAY, shape, dtype, part, shards, placed, spread=spread)

    def describe(self, saved: SavedLeaf) -> Any:
        """A `jax.ShapeDtypeStruct`, with the saved sharding if its devices are here."""
        assert saved.shape is not None
        return _struct(saved.shape, saved.dtype, _saved_placement(saved.sharding, saved.shape))

    def target(self, saved: SavedLeaf, abstract: Any, rules: LoadRules) -> Target | str:
        """See :class:`LeafHandler`."""
        if saved.shape is None or saved.dtype is None:
            return _show(abstract)
        if abstract is None or isinstance(abstract, type):
            abstract = _struct(saved.shape, saved.dtype)
        shape, dtype = tuple(abstract.shape), np.dtype(abstract.dtype)
        fits = dtypes.matches(saved.dtype, dtype, shape, strict=rules.strict)
        if not rules.fits(saved.shape, shape) or not fits:
            return _show(abstract)
        if not dtypes.is_canonical(dtype):  # a 64-bit one, without `jax_enable_x64`
            canonical = np.dtype(jax.dtypes.canonicalize_dtype(dtype))
            return (
                f"{show_array(shape, dtype)}, which JAX would silently make {canonical.name}:"
                " set jax_enable_x64, or ask for a 32-bit dtype or for NumPy"
            )
        placed = _placement(saved, abstract, rules)
        if placed is not None and not _fits(placed, shape):
            return f"{show_array(shape, dtype)} split as {placed}, which does not fit the shape"
        weak = bool(getattr(abstract, "weak_type", False))
        wish = _struct(shape, dtype, placed, weak)
        return Target(saved, _regions(placed, shape), wish, rules.strict)

    def build(self, targets: Sequence[Target], data: Sequence[Sequence[NDArray[Any]]]) -> list[Any]:
        """See :class:`LeafHandler`. Aligned memory is adopted by JAX on CPU without a copy."""
        result: list[Any] = []
        for target, parts in zip(targets, data, strict=True):
            wish: jax.ShapeDtypeStruct = target.abstract
            if parts[0].dtype != wish.dtype:
                parts = [dtypes.convert(part, wish.dtype, target) for part in parts]
            result.append(_assemble(target, parts) if wish.sharding else parts[0])
        unplaced = [i for i, target in enumerate(targets) if target.abstract.sharding is None]
        placed = transfer.to_device([result[i] for i in unplaced])
        for i, array in zip(unplaced, placed, strict=True):
            result[i] = array
        pairs = zip(result, targets, strict=True)
        return [_weak(array) if target.abstract.weak_type else array for array, target in pairs]


@functools.lru_cache(maxsize=4096)
def _shared(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape and its origin: one object for all that are equal, where NumPy makes new ones."""
    return shape, arrays.origin(len(shape))


@functools.lru_cache(maxsize=4096)
def _struct(
    shape: tuple[int, ...], dtype: Any, placed: Sharding | None = None, weak: bool = False
) -> jax.ShapeDtypeStruct:
    """One object for all leaves that are alike: it costs more to make than all else about them."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed, weak_type=weak)


def is_key(dtype: Any) -> bool:
    """Whether a dtype is that of typed PRNG keys."""
    return dtypes.is_kind(dtype, jax.dtypes.prng_key)


def _show(abstract: Any) -> str:
    if abstract is None or isinstance(abstract, type):
        return "an array"
    return show_array(abstract.shape, np.dtype(abstract.dtype))


def _placement(saved: SavedLeaf, abstract: Any, rules: LoadRules) -> Sharding | None:
    """The sharding to load into; None: uncommitted on JAX's default device."""
    wanted = abstract.sharding
    if wanted is not None and not (isinstance(abstract, jax.Array) and not abstract.committed):
        return _concrete(wanted)
    assert saved.shape is not None
    # The last axis of key data is part of the key.
    shape = saved.shape if saved.key_impl is None else (*saved.shape[:-1], 1)
    placed = _saved_placement(saved.sharding, shape)
    if placed is None and saved.sharding and saved.value_type == tree.ARRAY:
        rules.fallbacks.append(saved.name)
    # Where arrays that are not committed to a device are anyway, they need not be.
    return None if placed is None or placed.device_set == {jax.devices()[0]} else placed


@functools.lru_cache(maxsize=4096)
def _saved_placement(text: str | None, shape: tuple[int, ...]) -> Sharding | None:
    """Where an array was, if its devices are here and what is recorded fits it."""
    placed = _from_text(text) if text else None
    return placed if placed is not None and _fits(placed, shape) else None


def _regions(placed: Sharding | None, shape: tuple[int, ...]) -> tuple[Region, ...]:
    """The distinct boxes of an array that this process's devices need."""
    if placed is None or placed.num_devices == 1:
        return (whole(shape),)
    indices = placed.addressable_devices_indices_map(shape).values()
    return tuple(dict.fromkeys(_region(index, shape) for index in indices))


def _region(index: Any, shape: tuple[int, ...]) -> Region:
    """A tuple of slices as a region."""
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def _assemble(target: Target, parts: Sequence[NDArray[Any]]) -> jax.Array:
    wish: jax.ShapeDtypeStruct = target.abstract
    by_region = dict(zip(target.regions, parts, strict=True))
    return jax.make_array_from_callback(
        wish.shape, wish.sharding, lambda index: by_region[_region(index, wish.shape)]
    )


def _weak(array: jax.Array) -> jax.Array:
    """The same array with a weak type, as a Python number that went through JAX has."""
    convert: Any = jax.lax.convert_element_type_p
    return convert.bind(array, new_dtype=array.dtype, weak_type=True, sharding=None)


@functools.lru_cache(maxsize=4096)
def sharding_text(sharding: Any) -> str:
    """The text for one sharding; of a kind that has none, its first device."""
    if not isinstance(sharding, NamedSharding):
        device = min(sharding.device_set, key=operator.attrgetter("id"))
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
def _from_text(text: str) -> Sharding | None:
    """The sharding, or None if its devices are not here or the text is of another kind."""
    try:
        raw = json.loads(text)
        return {"SingleDeviceSharding": _single, "NamedSharding": _named}[raw["sharding_type"]](raw)
    except (ValueError, TypeError, KeyError, RecursionError):
        return None  # the caller then says which leaves went to one device


def _single(raw: dict[str, Any]) -> SingleDeviceSharding | None:
    text = raw["device_str"]
    legacy = text.replace("TFRT_CPU_", "cpu:")  # older JAX printed CPU devices so
    return next((SingleDeviceSharding(d) for d in _jax.devices() if str(d) in (text, legacy)), None)


def _named(raw: dict[str, Any]) -> NamedSharding | None:
    shape = tuple(raw["shape"])
    by_id = {device.id: device for device in _jax.devices()}
    recorded = raw.get("device_mesh")
    if jsons.is_object(recorded):
        ids: list[int] = [int(item["id"]) for item in np.array(recorded["mesh"], object).flat]
    else:
        ids = sorted(by_id)[: int(np.prod(shape))]
    kinds = [jax.sharding.AxisType[t.rpartition(".")[2]] for t in raw.get("axis_types") or ()]
    devices = np.array([by_id[i] for i in ids], dtype=object).reshape(shape)  # or it fits none
    mesh = Mesh(devices, tuple(raw["axis_names"]), axis_types=tuple(kinds) or None)
    spec = [tuple(part) if jsons.is_list(part) else part for part in raw["partition_spec"]]
    return NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))


def _fits(placed: Any, shape: tuple[int, ...]) -> bool:
    """Whether an array of this shape can be placed so: every split axis is there and divides."""
    if isinstance(placed, NamedSharding) and len(placed.spec) > len(shape):
        return False
    try:
        placed.shard_shape(shape)
    except ValueError:
        return False
    return True


def _concrete(sharding: Any) -> Any:
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
