"""`jax.Array` leaves: any dtype that zarr has, any sharding; and typed PRNG keys.

Of keys (`jax.random.key`) the data is saved as an array, and the implementation beside it.

A sharding is kept as the JSON text of the `_sharding` file, and put back on the devices that are
here. Source: the format as Orbax writes it, `SingleDeviceSharding` and `NamedSharding`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import operator
from collections.abc import Sequence
from typing import Any

import jax
import msgspec
import numpy as np
from jax._src.interpreters import pxla
from jax.core import Tracer
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from numpy.typing import NDArray

from flax_ckpt.errors import StateError
from flax_ckpt.format import arrays, jsons, tree
from flax_ckpt.leaves import dtypes
from flax_ckpt.leaves.base import LeafWrite, LoadRules, SavedLeaf, Target, show, show_array
from flax_ckpt.storage.store import Region, Shard, whole

_jax: Any = jax  # jaxlib says nothing about the types of devices
_put: Any = getattr(pxla, "batched_device_put", None)

# For arrays that live on no device, so that Orbax loads them without a sharding of the caller's.
HOST = json.dumps({"sharding_type": "SingleDeviceSharding", "device_str": "cpu:0"})


_is_storable = functools.lru_cache(maxsize=256)(arrays.is_storable)  # asked of each leaf


class Held(msgspec.Struct, frozen=True, gc=False):
    """The memory of an array on one device, and where that is."""

    data: NDArray[Any]
    placed: Sharding

    def to_write(self) -> LeafWrite:
        """What is to be written."""
        shape, origin = _shared(self.data.shape)
        shards = (Shard(origin, self.data),)
        return LeafWrite(tree.ARRAY, shape, self.data.dtype, shape, shards, self.placed)


class ArrayLeaf:
    """Saves the shards that this process holds first; loads into any sharding."""

    value_types = (tree.ARRAY,)

    def handles(self, value: Any) -> bool:
        """True unless zarr has no such dtype: uint2, uint4, float8_e4m3."""
        return isinstance(value, jax.Array) and _is_storable(value.dtype)

    def handles_abstract(self, abstract: Any) -> bool:
        """True for `jax.Array`, `jax.ShapeDtypeStruct`, and what has shape, dtype, sharding."""
        if isinstance(abstract, type):
            return issubclass(abstract, jax.Array)
        is_array = all(hasattr(abstract, name) for name in ("shape", "dtype", "sharding"))
        return is_array and not is_key(abstract.dtype)

    def write(self, value: Any, *, copy: bool) -> LeafWrite:
        """See :class:`LeafHandler`."""
        held = self.hold(value)
        return held.to_write() if isinstance(held, Held) else held

    def hold(self, value: Any) -> LeafWrite | Held:
        """As `write`, but what can wait until the caller has gone on is left for later."""
        # On CPU the memory is referenced, not copied: JAX arrays do not change, and one that is
        # donated or deleted lives on until the save lets go of it.
        array: Any = value
        placed: Sharding = array.sharding
        if type(placed) is SingleDeviceSharding or placed.num_devices == 1:
            return Held(np.asarray(array), placed)
        firsts = [shard for shard in array.addressable_shards if shard.replica_id == 0]
        origins = [tuple([s.start or 0 for s in shard.index]) for shard in firsts]
        shards = [Shard(o, np.asarray(s.data)) for o, s in zip(origins, firsts, strict=True)]
        shape, dtype, spread = array.shape, np.dtype(array.dtype), not array.is_fully_addressable
        part = placed.shard_shape(shape)
        return LeafWrite(tree.ARRAY, shape, dtype, part, shards, placed, spread=spread)

    def describe(self, saved: SavedLeaf) -> Any:
        """A `jax.ShapeDtypeStruct`, with the saved sharding if its devices are here."""
        return _struct(saved.shape, saved.dtype, saved.sharding)

    def target(self, saved: SavedLeaf, abstract: Any, rules: LoadRules) -> Target | str:
        """See :class:`LeafHandler`."""
        if saved.shape is None or saved.dtype is None:
            return show(abstract)
        if abstract is None or isinstance(abstract, type):
            abstract = _struct(saved.shape, saved.dtype)
        shape, dtype = tuple(abstract.shape), np.dtype(abstract.dtype)
        fits = dtypes.matches(saved.dtype, dtype, shape, strict=rules.strict)
        if not rules.fits(saved.shape, shape) or not fits:
            return show_array(shape, dtype)
        if (canonical := dtypes.canonical(dtype)) != dtype:
            what = f"{show_array(shape, dtype)}, which JAX would silently make {canonical.name}"
            return f"{what}: set jax_enable_x64, or ask for a 32-bit dtype or for NumPy"
        placed = _placement(saved, abstract, rules)
        if placed is not None and not _fits(placed, shape):
            return f"{show_array(shape, dtype)} split as {placed}, which does not fit the shape"
        wish = _struct(shape, dtype, placed, bool(getattr(abstract, "weak_type", False)))
        return Target(saved, _regions(placed, shape), wish, rules.strict)

    def build(self, targets: Sequence[Target], data: Sequence[Sequence[NDArray[Any]]]) -> list[Any]:
        """See :class:`LeafHandler`. Aligned memory is adopted by JAX on CPU without a copy."""
        pairs = list(zip(targets, data, strict=True))
        pairs = [(t, [dtypes.convert(p, t.abstract.dtype, t) for p in each]) for t, each in pairs]
        unplaced = iter(to_device([p[0] for t, p in pairs if t.abstract.sharding is None]))
        found = [_assemble(t, p) if t.abstract.sharding else next(unplaced) for t, p in pairs]
        both = zip(targets, found, strict=True)
        return [_weak(array) if t.abstract.weak_type else array for t, array in both]


class KeyLeaf:
    """Saves and loads arrays of typed keys."""

    value_types = ()  # in `_METADATA` keys are arrays; `SavedLeaf.key_impl` tells
    _arrays = ArrayLeaf()

    def handles(self, value: Any) -> bool:
        """See :class:`LeafHandler`."""
        return isinstance(value, jax.Array) and is_key(value.dtype)

    def handles_abstract(self, abstract: Any) -> bool:
        """True for arrays and `ShapeDtypeStruct` of a key dtype."""
        is_array = hasattr(abstract, "dtype") and not isinstance(abstract, type)
        return is_array and is_key(abstract.dtype)

    def write(self, value: Any, *, copy: bool) -> LeafWrite:
        """See :class:`LeafHandler`."""
        written = self._arrays.write(jax.random.key_data(value), copy=copy)
        return written.replace(key_impl=str(jax.random.key_impl(value)))

    def describe(self, saved: SavedLeaf) -> Any:
        """A `ShapeDtypeStruct` of the key dtype and shape; None if this JAX has no such keys."""
        return saved.key_impl and _keys(saved.key_impl, saved.shape, saved.dtype)

    def target(self, saved: SavedLeaf, abstract: Any, rules: LoadRules) -> Target | str:
        """See :class:`LeafHandler`; the key's logical shape or that of its data may be asked."""
        keys = self.describe(saved)
        if keys is None or saved.shape is None:
            return show(abstract)
        if abstract is None or isinstance(abstract, type):
            return self._arrays.target(saved, jax.Array, rules)
        logical = is_key(abstract.dtype)
        like = keys if logical else saved
        if tuple(abstract.shape) != like.shape or abstract.dtype != like.dtype:
            return show_array(abstract.shape, abstract.dtype)
        placed = abstract.sharding  # fits the key data too: the trailing axis is not split
        if isinstance(abstract, jax.Array) and logical:
            placed = jax.random.key_data(abstract).sharding if abstract.committed else None
        wish = jax.ShapeDtypeStruct(saved.shape, np.dtype(np.uint32), sharding=placed)
        return self._arrays.target(saved, wish, rules)

    def build(self, targets: Sequence[Target], data: Sequence[Sequence[NDArray[Any]]]) -> list[Any]:
        """See :class:`LeafHandler`."""
        made, wrap = self._arrays.build(targets, data), jax.random.wrap_key_data
        return [wrap(a, impl=t.saved.key_impl) for a, t in zip(made, targets, strict=True)]


@functools.lru_cache(maxsize=4096)
def _keys(impl: str, shape: Any, dtype: Any) -> Any:
    """What keys of such data are like; None if this JAX has none."""
    with contextlib.suppress(TypeError, ValueError):
        wrap: Any = jax.random.wrap_key_data
        return jax.eval_shape(functools.partial(wrap, impl=impl), _struct(shape, dtype))


@functools.lru_cache(maxsize=4096)
def _shared(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A shape and its origin: one object for all that are equal, where NumPy makes new ones."""
    return shape, arrays.origin(len(shape))


@functools.lru_cache(maxsize=4096)
def _struct(
    shape: tuple[int, ...], dtype: Any, placed: Sharding | str | None = None, weak: bool = False
) -> jax.ShapeDtypeStruct:
    """One object for all leaves that are alike: it costs more to make than all else about them."""
    placed = _saved_placement(placed, shape) if isinstance(placed, str) else placed
    return jax.ShapeDtypeStruct(shape, dtype, sharding=placed, weak_type=weak)


def is_key(dtype: Any) -> bool:
    """Whether a dtype is that of typed PRNG keys."""
    return dtypes.is_kind(dtype, jax.dtypes.prng_key)


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
    try:
        placed = _from_text(text) if text else None
        return placed if placed is not None and _fits(placed, shape) else None
    except Exception:  # JAX has errors of its own for odd ones, which no public name covers
        return None  # the caller then says which leaves went to one device


def _regions(placed: Sharding | None, shape: tuple[int, ...]) -> tuple[Region, ...]:
    """The distinct boxes of an array that this process's devices need."""
    if placed is None or placed.num_devices == 1:
        return (whole(shape),)
    indices = placed.addressable_devices_indices_map(shape).values()
    return tuple(dict.fromkeys(_region(index, shape) for index in indices))


def _region(index: Any, shape: tuple[int, ...]) -> Region:
    """A tuple of slices as a region."""
    return tuple(s.indices(size)[:2] for s, size in zip(index, shape, strict=True))


def to_device(arrays: Sequence[NDArray[Any]]) -> list[jax.Array]:
    """The arrays on JAX's default device; on CPU aligned memory is adopted, not copied.

    `jax.device_put(list)` spends 25 µs on an array, most of them in Python on what is the same for
    all of a kind: a tree of 5,000 leaves takes longer to hand over than to read. What it calls in
    the end takes 4 µs, but is no public function; where it is missing, the public one does it all.
    """
    if _put is None:
        return jax.device_put(list(arrays))
    first: dict[Any, Any] = {}  # of each kind, put there by JAX: the others are made like it
    result: list[jax.Array] = []
    for array in arrays:
        kind = array.shape, array.dtype
        if (like := first.get(kind)) is None:
            made: Any = jax.device_put(array)
            if isinstance(made, Tracer):  # within `jit`, where it becomes a constant
                return jax.device_put(list(arrays))
            first[kind] = made.aval, made.sharding, list(made.devices())
        else:
            aval, placed, devices = like
            made = _put(aval, placed, [array], devices, committed=False)
        result.append(made)
    return result


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
    document = {
        "sharding_type": "NamedSharding",
        "shape": list(mesh.devices.shape),
        "axis_names": [str(name) for name in mesh.axis_names],
        "axis_types": [f"AxisType.{kind.name}" for kind in mesh.axis_types],
        "partition_spec": list(sharding.spec),
        "device_mesh": {"mesh": ids.tolist()},
    }
    return json.dumps(document)


@functools.lru_cache(maxsize=4096)
def _from_text(text: str) -> Sharding | None:
    """The sharding; None, or any error, if its devices are not here or the text is odd."""
    raw = json.loads(text)
    return {"SingleDeviceSharding": _single, "NamedSharding": _named}[raw["sharding_type"]](raw)


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
    # On other names JAX fails only when it compiles.
    axes = tuple([name.encode().decode() for name in raw["axis_names"]])
    # With what is there twice JAX can end the process.
    if not devices.size or any(len({*every}) < len(every) for every in (ids, axes)):
        return None
    mesh = Mesh(devices, axes, axis_types=tuple(kinds) or None)
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
            what = f"{sharding} is on an abstract mesh, and no mesh is set"
            raise StateError(f"{what}: call this within jax.set_mesh(mesh)")
        return NamedSharding(mesh, sharding.spec)
    return sharding
