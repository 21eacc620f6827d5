"""Trees of every kind that can be saved, and how two of them are compared, bit for bit.

    for case in CASES.values():
        fc.save(path, case.tree())
        assert not differences(ocp.load(path), plain(case.tree()))

Trees are the same in every process: their bytes come from seeded generators. Nothing here knows
how `flax_ckpt` works: `plain` says by itself what a tree becomes when loaded without a target
(ORBAX_FORMAT.md, section 5.5).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import os
import subprocess
import sys
import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.core
import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jax.tree_util import FlattenedIndexKey, GetAttrKey, SequenceKey

# dtypes of ORBAX_FORMAT.md, section 3.4
NARROW = ("bool", "int8", "int16", "int32", "uint8", "uint16", "uint32", "float16", "float32")
NARROW += ("bfloat16", "complex64")
WIDE = ("int64", "uint64", "float64", "complex128")
EXOTIC = ("float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz")
EXOTIC += ("float8_e5m2fnuz", "float8_e3m4", "float8_e8m0fnu", "float4_e2m1fn", "int2", "int4")
_BITS = {"bool": 1, "int2": 2, "int4": 4, "float4_e2m1fn": 4}

SHARDED = "sharded"
NAN_PAYLOADS = (0x7FC00001, 0xFFC12345, 0x7F800001, 0x80000000, 0x7F800000, 0x00000001)


@dataclasses.dataclass(frozen=True)
class Case:
    """One tree of the catalogue.

    Attributes:
        name: of the case, and of its directory.
        build: makes the tree.
        x64: whether it needs `jax_enable_x64`.
        chunk_bytes: `chunk_byte_size` to save it with.
        orbax_refuses: what Orbax 0.12.8 says when asked to save it; "" if it saves it.
    """

    name: str
    build: Callable[[], Any]
    x64: bool = False
    chunk_bytes: int | None = None
    orbax_refuses: str = ""

    def tree(self) -> Any:
        """The tree, with JAX configured as it needs."""
        jax.config.update("jax_enable_x64", self.x64)
        return self.build()


CASES: dict[str, Case] = {}


def case(name: str, **options: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Adds what a function builds to the catalogue."""

    def add(build: Callable[[], Any]) -> Callable[[], Any]:
        assert name not in CASES
        CASES[name] = Case(name, build, **options)
        return build

    return add


def raw(seed: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """An array of random bit patterns: NaNs with payloads, infinities, subnormals."""
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    count = math.prod(shape)
    random = np.random.default_rng([seed, *map(ord, dtype)])
    if dtype == "int4" or dtype == "int2":
        half = 1 << (_BITS[dtype] - 1)
        return random.integers(-half, half, shape).astype(kind)
    if dtype in _BITS:
        patterns = random.integers(0, 1 << _BITS[dtype], count, np.uint8)
        return patterns.view(kind).reshape(shape)
    return np.frombuffer(random.bytes(count * kind.itemsize), kind).reshape(shape)


def _nans() -> np.ndarray:
    return np.array(NAN_PAYLOADS, np.uint32).view(np.float32)


# --- leaves ---------------------------------------------------------------------------------


@case("jax_dtypes")
def _jax_dtypes() -> Any:
    return {name: jnp.asarray(raw(1, name, (5, 3))) for name in NARROW + EXOTIC}


@case("jax_wide_dtypes", x64=True)
def _jax_wide_dtypes() -> Any:
    return {name: jnp.asarray(raw(2, name, (5, 3))) for name in WIDE}


@case("numpy_dtypes")
def _numpy_dtypes() -> Any:
    return {name: raw(3, name, (4, 5)) for name in NARROW + WIDE + EXOTIC}


@case("nan_payloads")
def _nan_payloads() -> Any:
    wide = np.array([0x7FF8000000000001, 0xFFF0000000000001], np.uint64).view(np.float64)
    half = np.array([0x7E01, 0xFE02, 0x8000], np.uint16)
    return {
        "jax": jnp.asarray(_nans()),
        "numpy": _nans(),
        "wide": wide,
        "half": half.view(np.float16),
        "brain": jnp.asarray(half.view(ml_dtypes.bfloat16)),
    }


@case("rank0")
def _rank0() -> Any:
    leaves: dict[str, Any] = {name: raw(4, name, ()) for name in ("float32", "int64", "bool")}
    leaves |= {f"jax_{name}": jnp.asarray(raw(5, name, ())) for name in NARROW + EXOTIC}
    return leaves | {"weak": jnp.asarray(3), "strong": jnp.asarray(3, jnp.int32)}


@case("rank1_to_7")
def _ranks() -> Any:
    shapes = [(2,) * rank for rank in range(1, 8)] + [(1,) * 9, (1, 7, 1)]
    return [jnp.asarray(raw(6, "float32", shape)) for shape in shapes]


@case("zero_size", orbax_refuses="Cannot save arrays with zero size")
def _zero_size() -> Any:
    return {
        "jax": [jnp.zeros((0,), jnp.float32), jnp.zeros((3, 0, 2), jnp.bfloat16)],
        "numpy": [np.zeros((0, 4), np.int64), np.zeros((0,), np.float16)],
        "beside": jnp.asarray(raw(7, "float32", (2,))),
    }


@case("python_numbers")
def _python_numbers() -> Any:
    return {
        "int": [0, -1, 7, 2**31, 2**53 + 1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1],
        "float": [0.0, -0.0, 0.1, 1e300, 5e-324, math.inf, -math.inf, math.nan],
        "bool": [True, False],
    }


@case("numpy_scalars", orbax_refuses="Unsupported leaf type for saving")
def _numpy_scalars() -> Any:
    names = ("int8", "int32", "int64", "uint64", "float16", "float32", "complex64", "bfloat16")
    scalars = {name: raw(8, name, (1,))[0] for name in names}
    return scalars | {"bool": np.bool_(True), "float64": np.float64(0.1)}


@case("strings")
def _strings() -> Any:
    odd = ["", "plain", "größer 雪 🎿", 'quo"te\\ \n\ttab', "\x00nul", "x" * 5000]
    return {"many": odd, "b": {"f/g": "slash", "t~0~1": "tilde"}, "array": jnp.ones(2)}


@case("only_strings")
def _only_strings() -> Any:
    return {"a": "x", "b": ["y", {"c": "z"}]}


@case("typed_keys")
def _typed_keys() -> Any:
    return {
        "threefry": jax.random.key(7),
        "rbg": jax.random.key(8, impl="rbg"),
        "unsafe_rbg": jax.random.key(9, impl="unsafe_rbg"),
        "many": jax.random.split(jax.random.key(10), (2, 3)),
        "many_rbg": jax.random.split(jax.random.key(11, impl="rbg"), 5),
        "raw": jax.random.PRNGKey(12),
    }


@case("numpy_layouts")
def _numpy_layouts() -> Any:
    square = raw(9, "float32", (6, 8))
    return {
        "fortran": np.asfortranarray(square),
        "transposed": square.T,
        "strided": square[::2, ::-3],
        "broadcast": np.broadcast_to(np.float32(2.5), (3, 4)),
    }


# --- containers -----------------------------------------------------------------------------


class Point(NamedTuple):
    x: Any
    y: Any


class Nothing(NamedTuple):
    pass


@functools.partial(jax.tree_util.register_dataclass, data_fields=["w", "b"], meta_fields=["tag"])
@dataclasses.dataclass
class Layer:
    w: Any
    b: Any
    tag: str = "static"


@flax.struct.dataclass
class Block:
    kernel: Any
    inner: Any
    name: str = flax.struct.field(pytree_node=False, default="static")


@jax.tree_util.register_pytree_with_keys_class
class WithKeys:
    def __init__(self, first: Any, second: Any) -> None:
        self.first, self.second = first, second

    def tree_flatten_with_keys(self) -> Any:
        return [(GetAttrKey("first"), self.first), (GetAttrKey("second"), self.second)], None

    @classmethod
    def tree_unflatten(cls, _: None, children: Iterable[Any]) -> WithKeys:
        return cls(*children)


@jax.tree_util.register_pytree_node_class
class WithoutKeys:
    def __init__(self, *children: Any) -> None:
        self.children = children

    def tree_flatten(self) -> Any:
        return self.children, None

    @classmethod
    def tree_unflatten(cls, _: None, children: Iterable[Any]) -> WithoutKeys:
        return cls(*children)


def _arrays(seed: int, count: int) -> list[jax.Array]:
    return [jnp.asarray(raw(seed, "float32", (2, n + 1))) for n in range(count)]


@case("plain_containers")
def _plain_containers() -> Any:
    a, b, c, d = _arrays(20, 4)
    many = [np.int32(n) * np.ones(1, np.int32) for n in range(13)]
    return {"list": [a, [b]], "tuple": (c, (d,)), "many": many, "deep": {"x": {"y": {"z": [1]}}}}


@case("typed_containers")
def _typed_containers() -> Any:
    a, b, c, d = _arrays(21, 4)
    return {
        "named": Point(a, Point(1, "s")),
        "dataclass": Layer(b, None),
        "struct": Block(c, {"deep": (d, Nothing())}),
        "frozen": flax.core.freeze({"k": {"v": np.ones(3)}}),
        "ordered": OrderedDict([("z", 1), ("a", 2.5)]),
    }


@case("registered_nodes")
def _registered_nodes() -> Any:
    a, b, c = _arrays(22, 3)
    return {"keys": WithKeys(a, {"n": 1}), "none": WithoutKeys(b, (c, True)), "no": WithoutKeys()}


@case("empty_nodes")
def _empty_nodes() -> Any:
    return {
        "none": None,
        "dict": {},
        "list": [],
        "tuple": (),
        "named": Nothing(),
        "optax": (optax.EmptyState(), optax.MaskedNode()),
        "nested": [None, {"a": ({}, [])}],
        "leaf": 1,
    }


@case("no_leaves")
def _no_leaves() -> Any:
    return {"a": None, "b": {"c": ()}}


@case("empty_dict", orbax_refuses="Found empty item")
def _empty_dict() -> Any:
    return {}


@case("empty_optax_state", orbax_refuses="Found empty item")
def _empty_optax_state() -> Any:
    return optax.identity().init({})


@case("adam")
def _adam() -> Any:
    params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
    return optax.adamw(1e-3).init(params)


@case("optax_chain")
def _optax_chain() -> Any:
    params = {"dense": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, 10, 100)
    labels = {"dense": {"kernel": "a", "bias": "b"}}
    parts = {"a": optax.adam(schedule), "b": optax.sgd(0.1, momentum=0.9)}
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.partition(parts, labels))
    return optax.MultiSteps(inner, 4).init(params)


@case("bare_jax")
def _bare_jax() -> Any:
    return jnp.asarray(raw(23, "bfloat16", (3, 3)))


@case("bare_numpy")
def _bare_numpy() -> Any:
    return raw(24, "float64", (2, 2))


@case("bare_number")
def _bare_number() -> Any:
    return 42


@case("bare_string")
def _bare_string() -> Any:
    return "hello"


@case("bare_key")
def _bare_key() -> Any:
    return jax.random.key(3)


@case("bare_list")
def _bare_list() -> Any:
    return [jnp.arange(3, dtype=jnp.int32), 1]


# --- keys -----------------------------------------------------------------------------------


@case("odd_keys")
def _odd_keys() -> Any:
    keys = [
        "with space",
        "a/b",
        "ünïcode 雪",
        'quo"te',
        "per%cent",
        "ha#sh",
        "qu?es",
        "back\\slash",
    ]
    keys += ["(", "[0]", "*", "~", "new\nline", "a=b", "@", ":", "emoji 🎿"]
    return {key: jnp.full((2,), n, jnp.float32) for n, key in enumerate(keys)}


@case("path_keys")
def _path_keys() -> Any:
    keys = [".", "..", "../up", "/abs", "a//b", "c", "c/0", "d", "zarr.json", "a/../b"]
    return {key: jnp.full((3,), n, jnp.int32) for n, key in enumerate(keys)}


@case("trailing_slash")
def _trailing_slash() -> Any:
    return {"one/": jnp.ones(2), "two//": np.ones(3), "/": 1.5, "s/": jnp.zeros(())}


@case("empty_key")
def _empty_key() -> Any:
    return {"": jnp.ones(2), "x": {"": jnp.zeros(3), "y": 1}}


@case("nul_key")
def _nul_key() -> Any:
    return {"a\0b": jnp.ones(2), "a": 1}


@case("number_keys")
def _number_keys() -> Any:
    return {"ints": {0: 1.5, 1: jnp.ones(2), -3: 2}, "digits": {"0": 1, "01": 2, "2": [3]}}


@case("long_key")
def _long_key() -> Any:
    return {"k" * 300: {"j" * 2000: jnp.ones(2)}}


@case("hundreds_of_leaves")
def _hundreds_of_leaves() -> Any:
    rows = raw(25, "float32", (300, 8))
    return {f"layer_{n:04}": {"w": jnp.asarray(row)} for n, row in enumerate(rows)}


# --- sizes and places -----------------------------------------------------------------------


@case("many_chunks", chunk_bytes=1024)
def _many_chunks() -> Any:
    return {
        "even": jnp.asarray(raw(26, "float32", (64, 32))),
        "odd": raw(27, "float32", (37, 41)),
        "prime": jnp.asarray(raw(28, "uint8", (4099,))),
        "rank3": jnp.asarray(raw(29, "bfloat16", (3, 50, 33))),
        "keys": jax.random.split(jax.random.key(1), 300),
    }


@case("large")
def _large() -> Any:
    return {"w": jnp.asarray(raw(30, "float32", (513, 1025))), "b": raw(31, "int16", (70_001,))}


def mesh(*shape: int, names: str = "xyz") -> Mesh:
    """A mesh of the first devices."""
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return Mesh(devices, tuple(names[: len(shape)]))


def put(array: Any, on: Mesh, *spec: Any) -> jax.Array:
    """The array on a mesh."""
    return jax.device_put(array, NamedSharding(on, PartitionSpec(*spec)))


@case(SHARDED)
def _sharded() -> Any:
    grid, line = mesh(4, 2), mesh(8)
    big = raw(32, "float32", (16, 6))
    return {
        "both": put(big, grid, "x", "y"),
        "merged": put(big, grid, ("x", "y")),
        "columns": put(big.T, grid, None, "x"),
        "replicas": put(big, grid, "x"),
        "everywhere": put(big, grid),
        "odd_everywhere": put(raw(33, "int8", (3, 5)), grid),
        "line": put(raw(34, "bfloat16", (8, 3)), line, "x"),
        "rank0": put(raw(35, "float32", ()), line),
        "last_device": jax.device_put(raw(36, "int32", (4,)), jax.devices()[-1]),
        "part": put(raw(37, "float32", (4, 4)), mesh(2, 2), "y", "x"),
        "keys": put(jax.random.split(jax.random.key(5), 8), line, "x"),
        "beside": {"numpy": np.ones(2), "n": 3},
    }


@case("sharded_chunks", chunk_bytes=256)
def _sharded_chunks() -> Any:
    grid = mesh(4, 2)
    return {
        "both": put(raw(38, "float32", (64, 32)), grid, "x", "y"),
        "columns": put(raw(39, "float32", (30, 64)), grid, None, ("x", "y")),
        "rank3": put(raw(40, "int16", (6, 8, 10)), grid, "y", None, None),
        "everywhere": put(raw(41, "uint8", (999,)), grid),
    }


# --- what a tree becomes --------------------------------------------------------------------


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """Keys and children of a node; None for a leaf."""
    if node is None:
        return []
    found = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x: x is not node)[0]
    if len(found) == 1 and not found[0][0]:
        return None
    return [(path[0], child) for path, child in found]


def _name(key: Any) -> str:
    return str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))


def plain(node: Any) -> Any:
    """What a tree becomes when it is loaded as it was saved: dicts and lists."""
    children = _children(node)
    if children is None:
        return np.asarray(node) if isinstance(node, np.generic) else node
    if not children:
        return type(node)() if type(node) in (dict, list, tuple) else None
    if all(isinstance(key, SequenceKey | FlattenedIndexKey) for key, _ in children):
        return [plain(child) for _, child in children]
    return {_name(key): plain(child) for key, child in children}


def scalars_as_arrays(tree: Any) -> Any:
    """The tree with NumPy scalars as rank-0 arrays, which is what is saved of them."""
    return jax.tree.map(lambda x: np.asarray(x) if isinstance(x, np.generic) else x, tree)


# --- comparison -----------------------------------------------------------------------------


def describe(leaf: Any) -> str:
    """All that two equal leaves have in common, their bytes included."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return f"key {leaf.dtype} {leaf.shape} {_digest(jax.random.key_data(leaf))}"
    if isinstance(leaf, jax.Array):
        return f"jax {leaf.dtype.name} {leaf.shape} {_digest(leaf)}"
    if isinstance(leaf, np.ndarray):
        return f"numpy {leaf.dtype.str} {leaf.dtype.name} {leaf.shape} {_digest(leaf)}"
    if isinstance(leaf, float):
        return f"{type(leaf).__name__} {np.float64(leaf).tobytes().hex()}"
    return f"{type(leaf).__name__} {leaf!r}"


def _digest(array: Any) -> str:
    data = np.asarray(array)
    return f"{hashlib.sha256(data.tobytes()).hexdigest()[:12]} {data.reshape(-1)[:3]}"


def differences(found: Any, expected: Any) -> list[str]:
    """Where two trees are not the same: structure, leaf types, dtypes, shapes, bits."""
    left, right = jax.tree.structure(found), jax.tree.structure(expected)
    if left != right:
        return [f"structure: {_short(left)}, expected {_short(right)}"]
    wrong: list[str] = []
    for (path, a), b in zip(_leaves(found), jax.tree.leaves(expected), strict=True):
        if describe(a) != describe(b):
            wrong.append(f"{jax.tree_util.keystr(path)}: {describe(a)}, expected {describe(b)}")
    return wrong


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 600 else text[:600] + "…"


def sharding_differences(found: Any, expected: Any) -> list[str]:
    """JAX arrays of two equal trees that lie on devices in another way."""
    return [
        f"{jax.tree_util.keystr(path)}: on {a.sharding}, expected {b.sharding}"
        for (path, a), b in zip(_leaves(found), jax.tree.leaves(expected), strict=True)
        if isinstance(b, jax.Array) and not a.sharding.is_equivalent_to(b.sharding, b.ndim)
    ]


# --- abstract trees -------------------------------------------------------------------------


def abstract(tree: Any, sharding: Callable[[jax.Array], Any] | None = None) -> Any:
    """The tree with abstract leaves.

    Args:
        tree: concrete.
        sharding: says where each JAX array shall go; None: the wish names no sharding.
    """

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array):
            placed = None if sharding is None else sharding(leaf)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
        if isinstance(leaf, np.ndarray):
            return np.empty_like(leaf)
        return leaf if isinstance(leaf, str) else type(leaf)

    return jax.tree.map(one, tree)


def first_device(_: jax.Array) -> SingleDeviceSharding:
    """A sharding: all on one device."""
    return SingleDeviceSharding(jax.devices()[0])


def other_mesh(array: jax.Array) -> NamedSharding:
    """A sharding that no case is saved with: the first axis that 2 divides, over 2 x 4 devices."""
    axes: list[str | None] = [None] * array.ndim
    for axis, size in enumerate(array.shape):
        if size % 2 == 0 and size:
            axes[axis] = "x"
            break
    return NamedSharding(mesh(2, 4), PartitionSpec(*axes))


def moved(tree: Any, sharding: Callable[[jax.Array], Any]) -> Any:
    """The tree with its JAX arrays placed as `sharding` says."""
    return jax.tree.map(
        lambda x: jax.device_put(x, sharding(x)) if isinstance(x, jax.Array) else x, tree
    )


# --- processes ------------------------------------------------------------------------------


Results = dict[str, list[str]]  # complaints by the name of a check
Role = Callable[[Path], Results]
ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}


def attempt(check: Callable[[], list[str]]) -> list[str]:
    """What a check complains about; an exception is a complaint."""
    try:
        return check()
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames))
        cause = f" (cause: {error.__cause__!r})" if error.__cause__ else ""
        return [f"{type(error).__name__}: {error}{cause} [{where}]"]


def both(first: Role, second: Role) -> Role:
    """Two roles in one process, as starting JAX takes its time."""

    def role(folder: Path) -> Results:
        jax.config.update("jax_enable_x64", False)
        found = second(folder)
        return first(folder) | found

    return role


def start(module: str, role: str, folder: Path) -> subprocess.Popen[str]:
    """Runs one role of a test module in a process of its own; see `main`."""
    command = [sys.executable, "-m", module, role, str(folder)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | _ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Results:
    """Waits for a role and returns its results."""
    output, _ = process.communicate(timeout=300)
    role, folder = process.args[-2:]  # type: ignore[index]
    path = Path(folder) / f"{role}.json"
    assert process.returncode == 0, output[-4000:]
    return json.loads(path.read_text())


def run(module: str, folder: Path, *waves: Iterable[str]) -> Results:
    """Runs roles wave after wave, those of one wave side by side, and returns all results."""
    found: Results = {}
    for wave in waves:
        for process in [start(module, role, folder) for role in wave]:
            results = finish(process)
            assert not found.keys() & results.keys()
            found |= results
    return found


def main(roles: Mapping[str, Role]) -> None:
    """The other end of `start`: `python -m <module> <role> <folder>`."""
    role, folder = sys.argv[1], Path(sys.argv[2])
    results = roles[role](folder)
    (folder / f"{role}.json").write_text(json.dumps(results))
