"""Every kind of leaf and tree: what is saved comes back, bit for bit, or is refused by name."""

from __future__ import annotations

import collections
import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_ckpt as fc
from flax_ckpt.errors import (
    DuplicateNameError,
    FormatError,
    TreeMismatchError,
    UnsupportedLeafError,
)

NUMPY_DTYPES = [
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
]
EXTENSION_DTYPES = [
    *("bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz"),
    *("float8_e5m2fnuz", "float8_e3m4", "float8_e8m0fnu", "float4_e2m1fn", "int2", "int4"),
]
DTYPES = NUMPY_DTYPES + EXTENSION_DTYPES
NEEDS_X64 = {"int64", "uint64", "float64", "complex128"}


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name) if name in EXTENSION_DTYPES else name)


def filled(shape: tuple[int, ...], name: str) -> np.ndarray[Any, Any]:
    """Random bits: also NaNs with payloads, infinities, negative zeros."""
    dtype = dtype_of(name)
    rng = np.random.default_rng(len(shape))
    if name == "bool":
        return rng.integers(0, 2, shape).astype(bool)
    if name in ("int2", "int4"):
        return rng.integers(-2, 2, shape).astype(dtype)
    if name == "float4_e2m1fn":
        return rng.integers(-3, 4, shape).astype(np.float32).astype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    return np.frombuffer(rng.bytes(nbytes), dtype).reshape(shape).copy()


SHAPES: dict[str, Callable[[str], np.ndarray[Any, Any]]] = {
    "rank 0": lambda name: filled((), name),
    "zero size": lambda name: filled((3, 0, 2), name),
    "empty": lambda name: filled((0,), name),
    "rank 1": lambda name: filled((7,), name),
    "strided": lambda name: filled((6, 10), name)[1::2, ::-3],
    "fortran": lambda name: np.asfortranarray(filled((4, 5), name)),
    "transposed": lambda name: filled((2, 3, 4), name).transpose(2, 0, 1),
}


def same_bits(found: Any, expected: Any) -> None:
    found, expected = np.asarray(found), np.asarray(expected)
    native = expected.astype(expected.dtype.newbyteorder("="))
    assert (found.dtype, found.shape) == (native.dtype, native.shape)
    assert found.tobytes() == native.tobytes()


def round_trip(tree: Any, abstract: Any = None) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        fc.save(f"{directory}/ckpt", tree)
        return fc.load(f"{directory}/ckpt", abstract)


# Arrays.


@pytest.mark.parametrize("name", DTYPES)
def test_numpy_arrays_of_every_dtype_and_layout(name: str) -> None:
    tree = {key: make(name) for key, make in SHAPES.items()}
    abstract = {key: np.zeros(value.shape, value.dtype) for key, value in tree.items()}
    for wanted in (None, abstract):
        loaded = round_trip(tree, wanted)
        for key, value in tree.items():
            assert type(loaded[key]) is np.ndarray
            same_bits(loaded[key], value)
            assert loaded[key].flags.writeable


@pytest.mark.parametrize("name", [name for name in NUMPY_DTYPES if dtype_of(name).itemsize > 1])
def test_big_endian_numpy_arrays(name: str) -> None:
    tree = {key: make(name).astype(">" + dtype_of(name).str[1:]) for key, make in SHAPES.items()}
    abstract = {key: np.zeros(value.shape, value.dtype) for key, value in tree.items()}
    for wanted in (None, abstract):
        loaded = round_trip(tree, wanted)
        for key, value in tree.items():
            same_bits(loaded[key], value)


@pytest.mark.parametrize("name", [name for name in DTYPES if name not in NEEDS_X64])
def test_jax_arrays_of_every_dtype(name: str) -> None:
    tree = {key: jnp.asarray(make(name)) for key, make in SHAPES.items()}
    abstract = {key: jax.ShapeDtypeStruct(a.shape, a.dtype) for key, a in tree.items()}
    for wanted in (None, abstract, tree, dict.fromkeys(tree, jax.Array)):
        loaded = round_trip(tree, wanted)
        for key, value in tree.items():
            assert isinstance(loaded[key], jax.Array)
            same_bits(loaded[key], value)


@pytest.mark.parametrize("name", sorted(NEEDS_X64))
def test_jax_arrays_of_64_bits(name: str) -> None:
    with jax.enable_x64(True):
        tree = {key: jnp.asarray(make(name)) for key, make in SHAPES.items()}
        loaded = round_trip(tree)
    for key, value in tree.items():
        assert isinstance(loaded[key], jax.Array)
        same_bits(loaded[key], value)


def test_jax_arrays_of_64_bits_without_x64_are_an_error_that_says_what_to_do(
    tmp_path: Path,
) -> None:
    with jax.enable_x64(True):
        fc.save(tmp_path / "ckpt", {"a": {"b": jnp.arange(3)}, "c": jnp.float32(1)})
    with pytest.raises(TreeMismatchError) as raised:
        fc.load(tmp_path / "ckpt")
    assert str(raised.value) == (
        f"{tmp_path}/ckpt/state does not fit the wanted tree, 1 difference:\n"
        "  a/b: saved int64[3], wanted int64[3], which JAX would silently make int32:"
        " set jax_enable_x64, or ask for a 32-bit dtype or for NumPy"
    )
    narrow = {"a": {"b": jax.ShapeDtypeStruct((3,), np.int32)}, "c": None}
    same_bits(fc.load(tmp_path / "ckpt", narrow)["a"]["b"], np.arange(3, dtype=np.int32))
    host = {"a": {"b": np.ndarray}, "c": None}
    same_bits(fc.load(tmp_path / "ckpt", host)["a"]["b"], np.arange(3))


def test_weak_types_come_from_the_abstract_leaf() -> None:
    tree = {"a": jnp.float32(1.5), "b": jnp.ones(3)}
    abstract = jax.eval_shape(lambda: {"a": 1.5 * jnp.asarray(1.0), "b": jnp.ones(3)})
    abstract["a"] = jax.ShapeDtypeStruct((), np.float32, weak_type=True)
    loaded = round_trip(tree, abstract)
    assert (loaded["a"].weak_type, loaded["b"].weak_type) == (True, False)


def test_subclasses_of_numpy_arrays_that_lose_something_are_refused() -> None:
    """A mask that vanishes without a word is damage."""
    masked = np.ma.masked_array([1.0, 2.0, 3.0], mask=[False, True, False])
    with pytest.raises(UnsupportedLeafError, match="m: "):
        round_trip({"m": masked})


# Keys.


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_prng_keys(impl: str) -> None:
    key = jax.random.key(3, impl=impl)
    tree = {"one": key, "array": jax.random.split(key, (2, 3)), "raw": jax.random.key_data(key)}
    abstract = jax.eval_shape(lambda: tree)
    for wanted in (None, abstract, tree, dict.fromkeys(tree)):
        loaded = round_trip(tree, wanted)
        for name, value in tree.items():
            assert loaded[name].dtype == value.dtype, name
            assert loaded[name].shape == value.shape, name
        same_bits(jax.random.key_data(loaded["array"]), jax.random.key_data(tree["array"]))
        assert jax.random.bits(loaded["one"]) == jax.random.bits(key)


def test_sharded_keys() -> None:
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    keys = jax.device_put(jax.random.split(jax.random.key(0), (8, 3)), sharding)
    other = NamedSharding(mesh, PartitionSpec(None))
    for wanted, expected in [
        (None, sharding),
        (jax.ShapeDtypeStruct(keys.shape, keys.dtype), sharding),
        (jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=other), other),
        (jax.device_put(keys, other), other),
    ]:
        loaded = round_trip({"k": keys}, {"k": wanted})["k"]
        assert (loaded.dtype, loaded.shape) == (keys.dtype, keys.shape)
        assert loaded.sharding.is_equivalent_to(expected, keys.ndim)
        same_bits(jax.random.key_data(loaded), jax.random.key_data(keys))


def test_a_key_of_another_implementation_is_a_difference() -> None:
    wanted = {"k": jax.eval_shape(lambda: jax.random.key(0, impl="rbg"))}
    with pytest.raises(
        TreeMismatchError, match=r"k: saved key<threefry2x32>\[\], wanted key<rbg>\[\]"
    ):
        round_trip({"k": jax.random.key(0)}, wanted)


@pytest.mark.parametrize("impl", ["of another JAX", "rbg"])
def test_a_key_that_this_jax_does_not_have_or_of_other_data_is_named(
    tmp_path: Path, impl: str
) -> None:
    """`rbg` has keys of four numbers."""
    fc.save(tmp_path / "a", {"k": {"x": jax.random.key(5)}, "n": np.arange(3)})
    described = tmp_path / "a" / "state" / "array_metadatas" / "process_0"
    described.write_text(described.read_text().replace("threefry2x32", impl))
    for record in (tmp_path / "a" / "flax_ckpt.json", *(tmp_path / "a").rglob("flax_ckpt.crc32c")):
        record.unlink()
    for read in (fc.load, fc.metadata):
        with pytest.raises(fc.errors.FormatError) as raised:
            read(tmp_path / "a")
        assert str(tmp_path) in str(raised.value)
        assert f"k/x: kind '{impl}'" in str(raised.value)
    wish: dict[str, Any] = {"k": {"x": jax.Array}, "n": np.ndarray}
    with pytest.raises(TreeMismatchError, match=rf"k/x: saved key<{impl}>\[\], wanted .*Array"):
        fc.load(tmp_path / "a", wish)
    data = fc.load(tmp_path / "a", wish | {"k": {"x": np.ndarray}})["k"]["x"]
    same_bits(data, np.asarray(jax.random.key_data(jax.random.key(5))))


# Scalars and strings.

NUMBERS = [
    *(0, 1, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)),
    *(0.0, -0.0, 1.5, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan),
    *(True, False),
]


@pytest.mark.parametrize("number", NUMBERS, ids=repr)
def test_python_numbers(number: Any) -> None:
    for wanted in (None, number, type(number)):
        loaded = round_trip({"n": number}, {"n": wanted})["n"]
        assert type(loaded) is type(number)
        assert repr(loaded) == repr(number)


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**30])
def test_larger_ints_are_refused(number: int) -> None:
    with pytest.raises(UnsupportedLeafError, match=f"n: the int {number} cannot be saved"):
        round_trip({"n": number, "fine": np.ones(2)})


@pytest.mark.parametrize("name", DTYPES)
def test_numpy_scalars(name: str) -> None:
    scalar = filled((), name)[()]
    assert isinstance(scalar, np.generic)
    loaded = round_trip({"n": scalar}, {"n": scalar})["n"]
    assert type(loaded) is type(scalar)
    same_bits(loaded, scalar)
    same_bits(round_trip({"n": scalar})["n"], scalar)
    same_bits(round_trip({"n": scalar}, {"n": type(scalar)})["n"], scalar)


STRINGS = [
    "",
    "a",
    "é漢😀",
    "line\nbreak\r\n\t\0",
    '"quoted" \\ {}',
    "~ / .",
    "x" * 10_000,
    "\u2028",
]


@pytest.mark.parametrize("text", STRINGS, ids=range(len(STRINGS)))
def test_strings(text: str) -> None:
    for wanted in (None, "", str):
        assert round_trip({"s": text}, {"s": wanted})["s"] == text
    assert round_trip(text) == text


def test_a_string_that_utf8_cannot_hold_comes_back_or_is_refused() -> None:
    try:
        assert round_trip({"s": "\ud800"}) == {"s": "\ud800"}
    except (FormatError, UnsupportedLeafError) as error:
        assert "s" in str(error)  # noqa: PT017


def test_a_key_that_utf8_cannot_hold_is_a_typed_error() -> None:
    with pytest.raises(fc.errors.FlaxCkptError):
        round_trip({"\ud800": np.ones(2)})


def test_a_name_too_long_for_the_format_is_an_error_of_the_call(tmp_path: Path) -> None:
    with pytest.raises(FormatError):
        fc.save_async(tmp_path / "ckpt", {"k" * 70_000: np.ones(2)}).result()


# Trees.


class Point(NamedTuple):
    x: Any
    y: Any


class Nothing(NamedTuple):
    pass


@flax.struct.dataclass
class State:
    step: Any
    params: Any
    name: str = flax.struct.field(pytree_node=False, default="static")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Plain:
    a: Any
    b: Any


@jax.tree_util.register_pytree_node_class
class Custom:
    def __init__(self, *children: Any) -> None:
        self.children = children

    def tree_flatten(self) -> tuple[Any, None]:
        return self.children, None

    @classmethod
    def tree_unflatten(cls, aux: None, children: Any) -> Custom:
        return cls(*children)


TREES: dict[str, tuple[Any, Any]] = {
    "dicts": ({"a": {"b": {"c": 1}}, "d": 2}, {"a": {"b": {"c": 1}}, "d": 2}),
    "lists": ([1, [2, [3, []]]], [1, [2, [3, []]]]),
    "tuples": ((1, (2, ())), [1, [2, ()]]),
    "named tuple": (Point(1, Point("x", None)), {"x": 1, "y": {"x": "x", "y": None}}),
    "flax dataclass": (State(3, {"w": 1.5}), {"step": 3, "params": {"w": 1.5}}),
    "dataclass": (Plain(1, [2]), {"a": 1, "b": [2]}),
    "registered": (Custom(1, {"x": 2}), [1, {"x": 2}]),
    "none": ({"a": None, "b": [None, 1]}, {"a": None, "b": [None, 1]}),
    "empty": ({"a": {}, "b": [], "c": (), "d": 1}, {"a": {}, "b": [], "c": (), "d": 1}),
    "empty named tuple": ({"a": Nothing(), "b": 1}, {"a": None, "b": 1}),
    "optax": ((optax.EmptyState(), optax.MaskedNode(), 1), [None, None, 1]),
    "int keys": ({10: 1, 9: 2, 0: {1: 3}}, {"0": {"1": 3}, "10": 1, "9": 2}),
    "odd keys": (
        {"": 1, "a.b": 2, "a/c": 3, "é": 4, " ": 5, "\0": 6, "'": 7, "c": 8, "zarr.json": 9},
        {"": 1, "a.b": 2, "a/c": 3, "é": 4, " ": 5, "\0": 6, "'": 7, "c": 8, "zarr.json": 9},
    ),
    "more than ten": ([*range(12)], [*range(12)]),
    "ordered": (collections.OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
    "default": (collections.defaultdict(int, b=1), {"b": 1}),
    "bare": (5, 5),
    "all empty": ({}, {}),
    "deep": ([[[[[[[[[[1]]]]]]]]]], [[[[[[[[[[1]]]]]]]]]]),
}


@pytest.mark.parametrize("name", TREES)
def test_trees_without_an_abstract_tree_come_back_in_dicts_and_lists(name: str) -> None:
    tree, expected = TREES[name]
    assert round_trip(tree) == expected


@pytest.mark.parametrize("name", TREES)
def test_trees_with_an_abstract_tree_come_back_in_its_types(name: str) -> None:
    tree, _ = TREES[name]
    abstract = jax.tree.map(lambda leaf: type(leaf)(), tree)
    loaded = round_trip(tree, abstract)
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    assert jax.tree.leaves(loaded) == jax.tree.leaves(tree)
    assert type(loaded) is type(tree)


def test_the_tree_saved_and_the_abstract_tree_are_not_changed() -> None:
    tree = {"a": [np.ones(2), {"b": jnp.ones(2)}], "c": State(1, {})}
    abstract = jax.eval_shape(lambda: {"a": [jnp.ones(2), {"b": jnp.ones(2)}], "c": State(1, {})})
    before = (repr(tree), repr(abstract))
    round_trip(tree, abstract)
    assert (repr(tree), repr(abstract)) == before


# Refused.


class Opaque:
    pass


def test_all_unsupported_leaves_are_listed_by_path_and_type(tmp_path: Path) -> None:
    tree = {
        "params": {"fine": np.ones(2), "bad": Opaque()},
        "opt": [b"bytes", 3, 1 + 2j],
        "big": 2**64,
        "dates": np.array(["2020-01-01"], "datetime64[D]"),
        "objects": np.array([None, 1], dtype=object),
        "abstract": jax.ShapeDtypeStruct((2,), np.float32),
        "uint4": jnp.ones(2, jnp.uint4),
        "function": len,
    }
    with pytest.raises(UnsupportedLeafError) as raised:
        fc.save_async(tmp_path / "ckpt", tree)
    assert isinstance(raised.value, TypeError)
    first, *lines, advice = str(raised.value).splitlines()
    assert first == "checkpointable 'state': 9 of 11 leaves cannot be saved:"
    assert sorted(line.strip() for line in lines) == [
        "abstract: a jax.ShapeDtypeStruct cannot be saved"
        if jax.ShapeDtypeStruct.__module__ == "jax"
        else f"abstract: a {jax.ShapeDtypeStruct.__module__}.ShapeDtypeStruct cannot be saved",
        "big: the int 18446744073709551616 cannot be saved",
        "dates: ndarray of dtype datetime64[D] cannot be saved",
        "function: a builtins.builtin_function_or_method cannot be saved",
        "objects: ndarray of dtype object cannot be saved",
        "opt/0: a builtins.bytes cannot be saved",
        "opt/2: a builtins.complex cannot be saved",
        f"params/bad: a {__name__}.Opaque cannot be saved",
        "uint4: jax.Array of dtype uint4 cannot be saved",
    ]
    assert advice.startswith("Leaves may be JAX and NumPy arrays")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("tree", [{"a": 2**70}, {"a": None, "b": {"c": [2**64]}}, [10**20]])
def test_a_tree_that_json_could_hold_is_still_a_tree(tmp_path: Path, tree: Any) -> None:
    """`save` saves a PyTree or says why not: never a JSON file that `load` does not find."""
    with pytest.raises(UnsupportedLeafError):
        fc.save(tmp_path / "ckpt", tree)
    assert list(tmp_path.iterdir()) == []


def test_a_tracer_is_refused_by_path(tmp_path: Path) -> None:
    @jax.jit
    def step(x: Any) -> Any:
        fc.save(tmp_path / "ckpt", {"params": {"w": x}})
        return x

    with pytest.raises(UnsupportedLeafError, match=r"params/w: .*(jit|trace)"):
        step(jnp.ones(2))


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"a": {"b": 1}, "a.b": 2}, "['a']['b'] and ['a.b']"),
        ({"a": {"b": "x"}, "a.b": "y"}, "['a']['b'] and ['a.b']"),
        ({"a": {"b": np.ones(2)}, "a.b": "y"}, "['a']['b'] and ['a.b']"),
        ({"a": [1], "a.0": 2}, "['a']['0'] and ['a.0']"),
        ({"": {"a": 1}, ".a": 2}, "['']['a'] and ['.a']"),
    ],
)
def test_leaves_that_would_share_a_name_are_refused_with_both_paths(
    tmp_path: Path, tree: Any, names: str
) -> None:
    with pytest.raises(DuplicateNameError) as raised:
        fc.save_async(tmp_path / "ckpt", tree)
    assert names in str(raised.value)
    assert list(tmp_path.iterdir()) == []


# Casts, and the rule for numbers of rank 0.


@pytest.mark.parametrize("wanted", ["bfloat16", "float16", "float64", "int32", "complex64"])
def test_load_casts_to_the_dtype_that_is_named(wanted: str) -> None:
    values = np.array([1.0, 2.5, -3.0], np.float32)
    expected = values.astype(dtype_of(wanted))
    host = round_trip({"a": values}, {"a": np.zeros(3, dtype_of(wanted))})["a"]
    same_bits(host, expected)
    if wanted not in NEEDS_X64:
        struct = jax.ShapeDtypeStruct((3,), dtype_of(wanted))
        same_bits(round_trip({"a": jnp.asarray(values)}, {"a": struct})["a"], expected)


def test_load_casts_numbers_of_rank_0_as_it_casts_arrays() -> None:
    """A dtype named in the abstract tree of `load` is a cast, whatever the rank; as in Orbax."""
    loaded = round_trip(
        {"j": jnp.float32(1.5), "n": np.array(2.5), "s": 3.5},
        {"j": jax.ShapeDtypeStruct((), np.int32), "n": np.array(0, np.int8), "s": int},
    )
    assert (int(loaded["j"]), int(loaded["n"]), loaded["s"]) == (1, 2, 3)


@pytest.mark.parametrize("number", [math.nan, math.inf, 1 + 2j])
def test_a_number_that_int_cannot_hold_is_a_typed_error(number: Any) -> None:
    with pytest.raises(TreeMismatchError, match="^.*n: saved|^n: the saved number"):
        round_trip({"n": np.asarray(number)}, {"n": int})


def test_a_numpy_dtype_as_an_abstract_leaf() -> None:
    loaded = round_trip({"a": np.arange(3.0)}, {"a": np.dtype("float32")})["a"]
    same_bits(loaded, np.arange(3, dtype=np.float32))


def test_complex_does_not_become_real() -> None:
    with pytest.raises(TreeMismatchError, match=r"a: saved complex64\[2\] \(numpy\), wanted"):
        round_trip({"a": np.ones(2, np.complex64)}, {"a": np.ones(2, np.float32)})


def restored(tree: Any, like: Any, **kwargs: Any) -> Any:
    with tempfile.TemporaryDirectory() as directory:
        fc.save(f"{directory}/ckpt", tree)
        return fc.restore(f"{directory}/ckpt", like, **kwargs).state


WEAK = jax.ShapeDtypeStruct((), np.int32, weak_type=True)


@pytest.mark.parametrize(
    ("saved", "like"),
    [
        (jnp.int32(7), 0),
        (7, jnp.int32(0)),
        (7, WEAK),
        (np.int64(7), 0),
        (7, np.int16(0)),
        (np.array(7), jnp.int32(0)),
        (7.0, 0),
        (7, 0.0),
        (jnp.float32(7), np.float64(0)),
        (jnp.uint8(7), WEAK),
    ],
    ids=str,
)
def test_restore_gives_numbers_in_the_kind_of_like(saved: Any, like: Any) -> None:
    found = restored({"n": saved}, {"n": like})["n"]
    assert found == 7
    if like is WEAK:
        assert isinstance(found, jax.Array)
        assert (found.dtype, found.weak_type) == (np.int32, True)
        return
    assert isinstance(found, jax.Array) is isinstance(like, jax.Array)
    if not isinstance(like, jax.Array):
        assert type(found) is type(like)
    assert np.asarray(found).dtype == np.asarray(like).dtype


@pytest.mark.parametrize(
    ("saved", "like"),
    [
        (2**40, jnp.int32(0)),
        (300, np.int8(0)),
        (-1, np.uint32(0)),
        (1.5, 0),
        (1.5, jnp.int32(0)),
        (math.nan, 0),
        (math.inf, 0),
        (2**53 + 1, 0.0),
        (1e300, jnp.float32(0)),
        (True, 0),
        (1, True),
        (jnp.float32(0.1), jnp.bfloat16(0)),
        (jnp.bfloat16(1), jnp.float32(0)),
        (np.float32(0.1), np.float16(0)),
    ],
    ids=str,
)
def test_restore_refuses_numbers_that_do_not_fit(saved: Any, like: Any) -> None:
    with pytest.raises(TreeMismatchError, match=r"\bn: "):
        restored({"n": saved}, {"n": like})


def test_restore_refuses_another_dtype_of_an_array_unless_it_is_cast() -> None:
    tree, like = {"a": jnp.ones(3), "b": np.ones(3)}, {"a": jnp.ones(3, jnp.bfloat16), "b": None}
    like["b"] = np.ones(3, np.float32)
    with pytest.raises(TreeMismatchError) as raised:
        restored(tree, like)
    assert [str(d) for d in raised.value.differences] == [
        "a: saved float32[3], wanted bfloat16[3]",
        "b: saved float64[3] (numpy), wanted float32[3] (numpy)",
    ]
    same_bits(restored(tree, like, cast=True)["a"], like["a"])


def test_an_array_does_not_become_a_number_nor_a_string_an_array() -> None:
    with pytest.raises(TreeMismatchError) as raised:
        round_trip({"a": np.ones(2), "s": "x", "n": 1}, {"a": 0, "s": np.ones(1), "n": ""})
    assert [(d.path, d.saved) for d in raised.value.differences] == [
        ("a", "float64[2] (numpy)"),
        ("n", "int64[] (Python scalar)"),
        ("s", "string"),
    ]


# Any tree.

names = st.text(st.sampled_from("ab.é/ 0'"), min_size=0, max_size=4)
leaves = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(),
    st.booleans(),
    st.text(max_size=8).filter(lambda text: text.isprintable()),
    st.none(),
    st.sampled_from(NUMPY_DTYPES).flatmap(
        lambda name: st.sampled_from([(), (0,), (3,), (2, 3)]).map(
            lambda shape: filled(shape, name)
        )
    ),
    st.sampled_from(["float32", "int32", "bfloat16"]).map(lambda n: jnp.asarray(filled((3,), n))),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(names, inner, max_size=4),
        st.builds(Point, inner, inner),
        st.builds(State, inner, inner),
    ),
    max_leaves=12,
)


def joined_names(tree: Any) -> list[str]:
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in found]


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(trees)
def test_any_tree_comes_back(tree: Any) -> None:
    if tree is None:
        return
    try:
        loaded = round_trip(tree, tree)
    except DuplicateNameError:
        found = joined_names(tree)
        # Strings share a name also where one's is the beginning of another's, up to a slash.
        assert len(set(found)) < len(found) or any("/" in name for name in found)
        return
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
        assert type(ours) is type(theirs)
        if isinstance(theirs, str):
            assert ours == theirs
        else:
            same_bits(ours, theirs)
