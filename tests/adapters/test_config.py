"""A run's config comes back from its text; what cannot is refused by key; a change is a line."""

import dataclasses
import enum
import importlib
import math
import os
import pathlib
import struct
import subprocess
import sys
from collections import OrderedDict, namedtuple
from types import MappingProxyType

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.core import FrozenDict
from google.protobuf import struct_pb2, text_format, timestamp_pb2
from hypothesis import example, given
from hypothesis import strategies as st
from ml_collections import ConfigDict, FieldReference, FrozenConfigDict, config_dict

from flax_ckpt.adapters.config import diff, from_message, to_message
from flax_ckpt.errors import ConfigError
from flax_ckpt.format.config_pb import RunConfig
from flax_ckpt.format.protos import message_to_text, text_to_message


def _through_text(config):
    message = to_message(config)
    read = text_to_message(message_to_text(message))
    assert read == message or "nan" in message_to_text(message)
    return read


def _restored(config):
    return from_message(_through_text(config))


def _same(saved, read, *, ordered=True) -> bool:
    """Equal, with equal types, float bits and, if `ordered`, key order; NaN is NaN.

    A scalar type is the same as its dtype.
    """
    if isinstance(saved, type) and isinstance(read, type | np.dtype):
        return np.dtype(saved) == np.dtype(read)
    if type(saved) is not type(read):
        return False
    if isinstance(saved, dict | ConfigDict):
        keys = list(saved), list(read)
        if (keys[0] != keys[1]) if ordered else (set(keys[0]) != set(keys[1])):
            return False
        return all(_same(saved[key], read[key], ordered=ordered) for key in keys[0])
    if isinstance(saved, list | tuple):
        pairs = zip(saved, read, strict=False)
        return len(saved) == len(read) and all(_same(*pair, ordered=ordered) for pair in pairs)
    if isinstance(saved, float):
        both_nan = math.isnan(saved) and math.isnan(read)
        return both_nan or struct.pack("<d", saved) == struct.pack("<d", read)
    return saved == read


_DTYPES = [np.dtype(n) for n in ("float32", "bfloat16", "int4", "bool", "M8[ns]", "complex64")]
_TYPES = [jnp.bfloat16, jnp.float32, jnp.int4, jnp.bool_, np.float32, np.bool_, np.longdouble]
_TYPES += [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, float, int, bool, complex]
_KEYS = st.text(max_size=8) | st.text("ab._-", max_size=3) | st.integers(-(2**63), 2**63 - 1)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**2047), 2**2047)
    | st.floats()
    | st.text()
    | st.text("\\xu01\"'\n\r\0\x85\u2028{}")
    | st.binary()
    | st.sampled_from(_DTYPES)
)


def _containers(children):
    lists = st.lists(children, max_size=4)
    return lists | lists.map(tuple) | st.dictionaries(_KEYS, children, max_size=4)


def _dicts(leaves):
    return st.dictionaries(_KEYS, st.recursive(leaves, _containers, max_leaves=12), max_size=5)


def _as_config_dict(value):
    """What `ConfigDict(value)` is, but in order: dicts inside lists stay dicts."""
    out = ConfigDict(sort_keys=False, allow_dotted_keys=True)
    for key, child in value.items():
        out[key] = _as_config_dict(child) if isinstance(child, dict) else child
    return out


@given(_dicts(_LEAVES | st.sampled_from(_TYPES)))
@example({"a": -0.0, "b": math.nan, "c": -math.inf, "d": 5e-324, "e": 2**53 + 1})
@example({"a": [-(2**63), 2**63 - 1, 2**63, -(2**63) - 1, True, 1, 1.0], 1: "int", "1": "str"})
@example({"": {"": ()}, "a.b": [{"a.b": {}}], 2**63 - 1: {}})
def test_a_nested_config_comes_back_from_its_text(config):
    message = _through_text(config)
    assert _same(_as_config_dict(config), from_message(message))
    assert diff(to_message(config), message) == []


def test_every_kind_of_the_issue_comes_back_equal():
    reference = FieldReference(3)
    config = ConfigDict(
        {
            "learning_rate": 1e-3,
            "layers": (64, (2, [1.5, None])),
            "nothing": None,
            "seed": 2**53 + 1,
            "salt": -(2**70),
            "dtype": jnp.bfloat16,
            "param_dtype": np.dtype("bfloat16"),
            "name": "two\nlines",
            "blocks": [ConfigDict({"width": 1}), {"width": 2}],
            "nested": {"deeper": {"steps": reference}},
            "lookup": {1: "one", -5: "minus five"},
            "empty": config_dict.placeholder(int),
        }
    )
    config.twice = reference * 2
    restored = _restored(config)
    assert restored == config
    assert _same(config.copy_and_resolve_references(), restored)
    assert restored.twice == 6
    assert restored.nested.deeper.steps == 3
    assert type(restored.blocks[0]) is ConfigDict
    assert type(restored.blocks[1]) is dict
    assert restored.dtype == jnp.bfloat16
    assert restored["nested.deeper.steps"] == 3  # as in any ConfigDict without dotted keys


def test_the_text_is_readable():
    config = {"learning_rate": 1e-3, "layers": (2, 2), "model": {"dtype": jnp.bfloat16, "é": {}}}
    config["model"] |= {"activation": "gelu", "blocks": [{"width": 2}, {"width": 3}]}
    config |= {3: None, "on": True, "seed": 2**64, "raw": b"\0", "p": np.dtype("int4"), "s": "a\nb"}
    assert message_to_text(to_message(config)) == (
        "# proto-message: flax_ckpt.RunConfig\n"
        'item { key: "learning_rate" float: 0.001 }\n'
        'item { key: "layers" tuple { item { int: 2 } item { int: 2 } } }\n'
        "item {\n"
        '  key: "model"\n'
        "  dict {\n"
        '    item { key: "dtype" dtype: "bfloat16" }\n'
        '    item { key: "é" dict { } }\n'
        '    item { key: "activation" str: "gelu" }\n'
        "    item {\n"
        '      key: "blocks"\n'
        "      list {\n"
        '        item { dict { item { key: "width" int: 2 } } }\n'
        '        item { dict { item { key: "width" int: 3 } } }\n'
        "      }\n"
        "    }\n"
        "  }\n"
        "}\n"
        "item { int_key: 3 none: true }\n"
        'item { key: "on" bool: true }\n'
        'item { key: "seed" big_int: "18446744073709551616" }\n'
        'item { key: "raw" bytes: "\\000" }\n'
        'item { key: "p" dtype: "int4" }\n'
        'item { key: "s" str: "a\\nb" }\n'
    )


@pytest.mark.parametrize("value", [*_DTYPES, *_TYPES], ids=repr)
def test_dtypes_and_scalar_types_come_back_as_the_dtype_they_equal(value):
    restored = _restored({"dtype": value}).dtype
    assert isinstance(restored, np.dtype)
    assert restored == value


@pytest.mark.parametrize(
    "value",
    [
        np.float32(1e-3),
        np.float64(0.1),
        np.float16(0.1),
        np.int64(-3),
        np.uint64(2**64 - 1),
        np.bool_(True),
        np.str_("s"),
        np.bytes_(b"b"),
        ml_dtypes.bfloat16(0.1),
        ml_dtypes.int4(-3),
    ],
    ids=repr,
)
def test_numpy_scalars_come_back_as_python_values(value):
    restored = _restored({"a": value}).a
    assert restored == value
    assert type(restored) in (bool, int, float, str, bytes)


def test_subclasses_come_back_as_the_value_they_equal():
    class Level(enum.IntEnum):
        LOW = 1

    class Name(enum.StrEnum):
        SGD = "sgd"

    class Old(str, enum.Enum):  # noqa: UP042, str() of a member is not its value
        ADAM = "adam"

    pair = namedtuple("pair", "x y")(1, 2)
    config = {"level": Level.LOW, "name": Name.SGD, "old": Old.ADAM, "pair": pair}
    plain = _restored({**config, Name.SGD: 1, Level.LOW: 2}).to_dict()
    assert plain == {"level": 1, "name": "sgd", "old": "adam", "pair": (1, 2), "sgd": 1, 1: 2}
    assert [type(value) for value in plain.values()] == [int, str, str, tuple, int, int]


def test_every_shape_of_a_config_is_accepted():
    @dataclasses.dataclass(frozen=True)
    class Model:
        width: int = 64
        layers: tuple[int, ...] = (2, 2)

    @dataclasses.dataclass
    class Config:
        model: Model
        blocks: list[Model]
        steps: int = 3

    plain = {"model": {"width": 64, "layers": (2, 2)}, "steps": 3}
    as_dataclass = Config(Model(), [Model(1)])
    assert _restored(as_dataclass) == ConfigDict(dataclasses.asdict(as_dataclass))
    configs = [ConfigDict(plain), FrozenConfigDict(plain), plain, OrderedDict(plain)]
    configs += [MappingProxyType(plain), FrozenDict(plain), ConfigDict(plain).lock()]
    for config in configs:
        restored = _restored(config)
        assert type(restored) is ConfigDict
        assert restored == ConfigDict(plain)
        assert not restored.is_locked
    assert _restored({}) == ConfigDict()


def test_order_is_kept():
    config = {"z": {"z": 1, "a": 2}, "a": None}
    assert (
        list(_restored(config))
        == list(_restored(ConfigDict(config, sort_keys=False)))
        == ["z", "a"]
    )
    assert list(_restored(config).z) == ["z", "a"]
    assert list(_restored(ConfigDict(config))) == ["a", "z"]  # as it iterates


def test_a_dict_with_int_keys_and_with_dots():
    config = {"m": {1: "a", "1": "b", -(2**60): "c"}, "a.b": {"c.d": 1}, "x": {"y": 2}}
    restored = _restored(config)
    assert restored.to_dict() == config
    assert restored.x.allow_dotted_keys is False
    assert _restored({"x": {"y": 2}})["x.y"] == 2


# What cannot be saved.


def _refused(config) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        to_message(config)
    first, *lines = str(caught.value).split("\n  ")
    assert first == "this config cannot be saved:"
    return lines


def _unsaved(path, kind):
    return f"{path}: cannot save a {kind}; store a name, a number or a list instead"


def test_every_bad_value_is_named_in_one_error():
    class Layer:
        dtype = np.dtype("float32")

    config = {
        "good": 1,
        "model": {"activation": len, "parts": [1, {"init": object()}], "cls": pathlib.Path},
        "types": (Layer, jnp.floating),
        "name": "a\ud800",
        "table": np.ones((2, 3)),
    }
    assert _refused(config) == [
        _unsaved("model.activation", "builtin_function_or_method"),
        _unsaved("model.parts[1].init", "object"),
        _unsaved("model.cls", "type"),
        _unsaved("types[0]", "type"),
        _unsaved("types[1]", "type"),
        "name: 'utf-8' codec can't encode character '\\ud800' in position 1: "
        "surrogates not allowed",
        _unsaved("table", "ndarray"),
    ]


@pytest.mark.parametrize(
    "value",
    [
        enum.Enum("Color", "RED").RED,
        {1},
        pathlib.PurePosixPath("x"),
        1j,
        range(3),
        np.datetime64(1, "s"),
        np.timedelta64(1, "ns"),
        np.longdouble(1),
        np.zeros(1, [("a", "f4")])[0],
        np.dtype([("a", "f4")]),
        np.dtype(">f4"),
        np.zeros(()),
        jnp.ones(()),
        jnp.ones(3),
    ],
    ids=repr,
)
def test_what_is_no_plain_value_is_refused(value):
    assert _refused({"a": {"b": value}}) == [_unsaved("a.b", type(value).__name__)]


def test_bad_keys_are_named():
    lines = _refused({"m": {1.5: 1, True: 2, (1, 2): 3, None: 4, "\ud800": 5, b"k": 6, 2**63: 7}})
    keys = ["1.5", "True", "(1, 2)", "None", r"'\ud800'", "b'k'", str(2**63)]
    assert lines == [f"m[{key}]: a key is a str or an int of 64 bits" for key in keys]
    lines = _refused(ConfigDict({"m": _as_config_dict({"x y": {"": object()}})}))
    assert [line.partition(":")[0] for line in lines] == ["m['x y']['']"]


def test_huge_ints_cycles_and_depth_are_refused():
    (line,) = _refused({"a": [1 << 20_000]})
    assert line.startswith("a[0]: Exceeds the limit")
    deep = "contains itself, or is nested deeper than 40 levels"
    cycle = {"ok": {}}
    cycle["self"] = [cycle, cycle]
    assert _refused(cycle) == [f"self[0]: {deep}", f"self[1]: {deep}"]
    cyclic = ConfigDict()
    cyclic.me = cyclic
    assert _refused(cyclic) == [f"me: {deep}"]
    twice = {"shared": 1}
    assert _restored({"a": twice, "b": twice}).to_dict() == {"a": twice, "b": twice}

    def nested(levels):
        return {"a": nested(levels - 1)} if levels else {}

    deepest = _through_text(nested(39))
    assert from_message(deepest) == ConfigDict(nested(39))
    assert RunConfig.FromString(deepest.SerializeToString()) == deepest
    assert _refused(nested(40)) == [".".join("a" * 40) + f": {deep}"]


def test_a_config_dict_that_cannot_be_walked_is_refused():
    broken = ConfigDict({"a": 2.0, "needed": config_dict.required_placeholder(str)})
    broken.b = 1 / broken.get_ref("a")
    broken.a = 0.0
    assert [line.partition(": ")[0] for line in _refused(broken)] == ["b", "needed"]
    mixed = ConfigDict({"m": {1: 1}})
    mixed.m["a"] = 2
    (line,) = _refused(mixed)
    assert line.startswith("m: '<' not supported between")


def test_what_is_no_config_is_refused():
    expected = "a {} is no ConfigDict, dict, dataclass or message"
    assert _refused([1]) == [expected.format("list")]
    assert _refused(None) == [expected.format("NoneType")]
    (line,) = _refused(object())
    assert line.startswith("config: cannot save a object")


# What cannot be read: files edited by hand, or written by another version.


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('key: "a" dtype: "f99x"', "a: this process has no dtype 'f99x'"),
        ('key: "a" dtype: "os.system"', "a: this process has no dtype 'os.system'"),
        ('key: "a" dtype: "f4,("', "a: this process has no dtype 'f4,('"),
        ('key: "a" big_int: "x1"', "a: this process has no big_int 'x1'"),
        ('key: "a" list { item { } }', "a[0]: no value; was it written by a newer flax_ckpt?"),
        ('key: "a"', "a: no value; was it written by a newer flax_ckpt?"),
    ],
)
def test_a_damaged_config_is_refused_by_key(text, error):
    message = text_format.Parse(f"item {{ {text} }}", RunConfig())
    with pytest.raises(ConfigError) as caught:
        from_message(message)
    assert str(caught.value).startswith(error)


# Messages of the user's own.


def test_a_compiled_message_is_its_own_config():
    message = timestamp_pb2.Timestamp(seconds=3)
    assert to_message(message) is message
    assert from_message(message) is message
    assert diff(message, timestamp_pb2.Timestamp(seconds=3)) == []
    assert diff(message, timestamp_pb2.Timestamp(nanos=5)) == ["-seconds: 3", "+nanos: 5"]
    assert diff(message, to_message({"a": 1})) == [
        "-# proto-message: google.protobuf.Timestamp",
        "-seconds: 3",
        "+# proto-message: flax_ckpt.RunConfig",
        '+item { key: "a" int: 1 }',
    ]
    before, after = struct_pb2.Struct(), struct_pb2.Struct()
    before.update({"lr": 0.1, "layers": [1, 2], "gone": None})
    after.update({"new": True, "layers": [1, 2], "lr": 0.2})
    assert diff(before, before) == []
    assert diff(before, after) == [
        '-fields { key: "gone" value { null_value: NULL_VALUE } }',
        '-fields { key: "lr" value { number_value: 0.1 } }',
        '+fields { key: "lr" value { number_value: 0.2 } }',
        '+fields { key: "new" value { bool_value: true } }',
    ]


# Differences.


def _lines(saved, current):
    return diff(_through_text(saved), to_message(current))


def test_a_line_for_each_changed_key():
    saved = {
        "learning_rate": 1e-3,
        "model": {"width": 64, "dtype": jnp.bfloat16, "layers": (2, 2), "blocks": [{"n": 1}, 2]},
        "gone": {"a": 1, "b": {}},
        "x y": None,
    }
    current = {
        "learning_rate": 3e-4,
        "model": {"depth": 12, "dtype": jnp.float32, "layers": (2, 3, 4), "blocks": [{"n": 5}, 2]},
        "new": {"c": {"d": "e\nf"}},
        "x y": np.dtype("int4"),
    }
    assert _lines(saved, current) == [
        "learning_rate 0.001 → 0.0003",
        "model.width removed (was 64)",
        "model.dtype bfloat16 → float32",
        "model.layers (2, 2) → (2, 3, 4)",
        "model.blocks [{'n': 1}, 2] → [{'n': 5}, 2]",
        "gone.a removed (was 1)",
        "gone.b removed (was {})",
        "['x y'] None → int4",
        "model.depth added: 12",
        "new.c.d added: 'e\\nf'",
    ]


@pytest.mark.parametrize(
    ("saved", "current", "lines"),
    [
        (1, 1.0, ["a 1 → 1.0"]),
        (True, 1, ["a True → 1"]),
        (0.0, -0.0, ["a 0.0 → -0.0"]),
        ("1", 1, ["a '1' → 1"]),
        ("int4", np.dtype("int4"), ["a 'int4' → int4"]),
        ([1], (1,), ["a [1] → (1,)"]),
        ({}, None, ["a {} → None"]),
        ({"b": 1}, [1], ["a.b removed (was 1)", "a added: [1]"]),
        ({}, {1: 2}, ["a removed (was {})", "a[1] added: 2"]),
    ],
)
def test_kinds_differ(saved, current, lines):
    assert _lines({"a": saved}, {"a": current}) == lines


def test_what_does_not_count():
    assert _lines({"a": 1, "b": [{"c": 2, "d": 3}]}, {"b": [{"d": 3, "c": 2}], "a": 1}) == []
    assert _lines({"a": {"b": math.nan}}, ConfigDict({"a": {"b": math.nan}})) == []
    assert _lines({"a": np.float32}, {"a": np.dtype("float32")}) == []
    with_provenance = to_message({"a": 1})
    with_provenance.provenance.add(key="jax", str="1")
    assert diff(with_provenance, to_message({"a": 1})) == []


def test_a_diff_needs_no_dtype_that_is_gone():
    saved = to_message({"dtype": jnp.bfloat16, "lr": 1})
    saved.item[0].dtype = "float3"
    line = "dtype float3 → bfloat16"
    assert diff(saved, to_message({"dtype": jnp.bfloat16, "lr": 1})) == [line]


def _shuffled(value, draw):
    if isinstance(value, dict):
        keys = draw(st.permutations(list(value)))
        return {key: _shuffled(value[key], draw) for key in keys}
    if isinstance(value, list | tuple):
        return type(value)(_shuffled(item, draw) for item in value)
    return value


@given(_dicts(_LEAVES), _dicts(_LEAVES), st.data())
def test_no_difference_means_equal(one, other, data):
    lines = diff(to_message(one), to_message(other))
    assert (lines == []) == _same(one, other, ordered=False)
    assert diff(to_message(one), to_message(_shuffled(one, data.draw))) == []
    assert all("\n" not in line for line in lines)


# Imports.


def test_ml_collections_is_imported_when_a_config_dict_is_made():
    program = """
import sys
from flax_ckpt.adapters.config import diff, from_message, to_message
message = to_message({"a": (1, None), "b": {"c": "d"}})
assert diff(message, message) == []
found = {"ml_collections", "orbax"} & set(sys.modules)
assert not found, found
message.item.add(key="d", dtype="bfloat16")
assert from_message(message).d.itemsize == 2
"""
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=120)


def test_a_reload_keeps_old_messages_readable():
    from flax_ckpt.adapters import config as module
    from flax_ckpt.format import config_pb

    message = to_message({"a": 1})
    importlib.reload(config_pb)
    assert importlib.reload(module).from_message(message).a == 1
