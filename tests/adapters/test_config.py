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

from flax_ckpt.adapters.config import diff, from_message, to_message, to_plain
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
    """Equal, with equal types, float bits and, if `ordered`, key order; NaN is NaN."""
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


_DTYPES = [np.dtype(n) for n in ("float32", "bfloat16", "int4", ">f4", "bool", "S3", "M8[ns]")]
_TYPES = [jnp.bfloat16, jnp.float32, jnp.int4, jnp.bool_, np.float32, np.bool_, np.longdouble]
_TYPES += [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, jnp.floating, float, int, bool, complex]
_KEYS = st.text(max_size=8) | st.text("ab._-", max_size=3) | st.integers()
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
    | st.sampled_from(_TYPES)
)


def _containers(children):
    lists = st.lists(children, max_size=4)
    return lists | lists.map(tuple) | st.dictionaries(_KEYS, children, max_size=4)


_CONFIGS = st.dictionaries(_KEYS, st.recursive(_LEAVES, _containers, max_leaves=12), max_size=5)


def _as_config_dict(value):
    """What `ConfigDict(value)` is, but in order: dicts inside lists stay dicts."""
    out = ConfigDict(sort_keys=False, allow_dotted_keys=True)
    for key, child in value.items():
        out[key] = _as_config_dict(child) if isinstance(child, dict) else child
    return out


@given(_CONFIGS)
@example({"a": -0.0, "b": math.nan, "c": -math.inf, "d": 5e-324, "e": 2**53 + 1})
@example({"a": [-(2**63), 2**63 - 1, 2**63, -(2**63) - 1, True, 1, 1.0], 1: "int", "1": "str"})
@example({"": {"": ()}, "a.b": [{"a.b": {}}], 2**64: {}})
def test_a_nested_config_comes_back_from_its_text(config):
    message = _through_text(config)
    assert _same(config, to_plain(message))
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
    assert restored.dtype is jnp.bfloat16
    assert restored["nested.deeper.steps"] == 3  # as in any ConfigDict without dotted keys


def test_the_text_is_readable():
    config = {"learning_rate": 1e-3, "layers": (2, 2), "model": {"dtype": jnp.bfloat16, "é": {}}}
    config["model"]["activation"] = "gelu"
    config |= {3: None, "on": True, "seed": 2**64, "raw": b"\0", "p": np.dtype("int4"), "s": "a\nb"}
    assert message_to_text(to_message(config)) == (
        "# proto-message: flax_ckpt.RunConfig\n"
        "config {\n"
        '  field { key: "learning_rate" float: 0.001 }\n'
        '  field { key: "layers" tuple { item { int: 2 } item { int: 2 } } }\n'
        "  field {\n"
        '    key: "model"\n'
        "    dict {\n"
        '      field { key: "dtype" type: "jax.numpy.bfloat16" }\n'
        '      field { key: "é" dict { } }\n'
        '      field { key: "activation" str: "gelu" }\n'
        "    }\n"
        "  }\n"
        "  field { int_key: 3 none: true }\n"
        '  field { key: "on" bool: true }\n'
        '  field { key: "seed" big_int: "18446744073709551616" }\n'
        '  field { key: "raw" bytes: "\\000" }\n'
        '  field { key: "p" dtype: "int4" }\n'
        '  field { key: "s" str: "a\\nb" }\n'
        "}\n"
    )


@pytest.mark.parametrize("value", [*_DTYPES, *_TYPES], ids=repr)
def test_dtypes_and_scalar_types_come_back_as_the_same_kind(value):
    restored = _restored({"dtype": value}).dtype
    assert restored == value
    assert type(restored) is type(value)
    if isinstance(value, type):
        assert restored is value


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
    plain = to_plain(_through_text({**config, Name.SGD: 1, Level.LOW: 2}))
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
    assert to_plain(_through_text(as_dataclass)) == dataclasses.asdict(as_dataclass)
    configs = [ConfigDict(plain), FrozenConfigDict(plain), plain, OrderedDict(plain)]
    configs += [MappingProxyType(plain), FrozenDict(plain), ConfigDict(plain).lock()]
    for config in configs:
        restored = _restored(config)
        assert type(restored) is ConfigDict
        assert restored == ConfigDict(plain)
        assert not restored.is_locked
    assert _restored({}) == ConfigDict()
    assert to_message({}).HasField("config")


def test_placeholders_come_back_as_none_and_order_is_kept():
    config = ConfigDict({"z": 1, "a": config_dict.placeholder(int)}, sort_keys=False)
    config.required = config_dict.required_placeholder(str)
    restored = _restored({**config._fields, "derived": config.get_ref("required") + "x"})
    assert list(restored.items()) == [("z", 1), ("a", None), ("required", None), ("derived", None)]
    assert list(_restored(ConfigDict({"z": 1, "a": 2}))) == ["a", "z"]  # as it iterates


def test_a_dict_with_int_keys_and_with_dots():
    config = {"m": {1: "a", "1": "b", -(2**80): "c"}, "a.b": {"c.d": 1}, "x": {"y": 2}}
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


def test_every_bad_value_is_named_in_one_error():
    class Color(enum.Enum):
        RED = 1

    config = {
        "good": 1,
        "model": {"activation": jnp.tanh, "parts": [1, {"init": object()}], "cls": pathlib.Path},
        "kinds": {"set": {1}, "path": pathlib.PurePosixPath("x"), "enum": Color.RED},
        "odd": (1j, np.datetime64(1, "s"), np.timedelta64(1, "ns"), np.longdouble(1), range(3)),
        "record": np.dtype([("a", "f4")]),
        "name": "a\ud800",
    }
    assert _refused(config) == [
        "model.activation: the callable tanh; store its name",
        "model.parts[1].init: an object of type object; "
        "store the name or the numbers it is built from",
        "model.cls: the class Path; store its name",
        "kinds.set: a set; store a sorted list or tuple",
        "kinds.path: a pathlib.PurePosixPath; store str(path)",
        "kinds.enum: the enum member Color.RED; store its .name or .value",
        *(
            f"odd[{index}]: an object of type {name}; "
            "store the name or the numbers it is built from"
            for index, name in enumerate(
                ["complex", "numpy.datetime64", "numpy.timedelta64", "numpy.longdouble", "range"]
            )
        ),
        "record: the dtype [('a', '<f4')], which no name gives back; store what it is built from",
        "name: a string with lone surrogates, which UTF-8 cannot hold; store bytes",
    ]


@pytest.mark.parametrize("array", [np.zeros(()), np.ones((2, 3)), jnp.ones(()), jnp.ones(3)])
def test_arrays_belong_into_the_state(array):
    label = f"{type(array).__module__}.{type(array).__qualname__}"
    assert _refused({"model": {"table": array}}) == [
        f"model.table: an array ({label}); save it in the state, or store its .tolist()"
    ]


def test_bad_keys_are_named():
    lines = _refused({"m": {1.5: 1, True: 2, (1, 2): 3, None: 4, "\ud800": 5, b"k": 6}})
    kinds = {"1.5": "float", "True": "bool", "(1, 2)": "tuple", "None": "NoneType"}
    assert lines == [
        *(f"m[{key}]: a key of type {kind}; keys are str or int" for key, kind in kinds.items()),
        r"m['\ud800']: a string with lone surrogates, which UTF-8 cannot hold; store bytes",
        "m[b'k']: a key of type bytes; keys are str or int",
    ]
    lines = _refused(ConfigDict({"m": _as_config_dict({"x y": {"": jnp.sin}})}))
    assert lines == ["m['x y']['']: the callable sin; store its name"]


def test_huge_ints_cycles_and_depth_are_refused():
    assert _refused({"a": [1 << 2048]}) == ["a[0]: an int of 2049 bits, at most 2048; store bytes"]
    assert _refused({"a": {1 << 20_000: 1}}) == [
        "a[a int]: an int of 20001 bits, at most 2048; store bytes"
    ]
    cycle = {"ok": {}}
    cycle["self"] = [cycle]
    assert _refused(cycle) == ["self[0]: contains itself; a config is a tree"]
    cyclic = ConfigDict()
    cyclic.me = cyclic
    assert _refused(cyclic) == ["me: contains itself; a config is a tree"]
    twice = {"shared": 1}
    assert to_plain(to_message({"a": twice, "b": twice})) == {"a": twice, "b": twice}

    def nested(levels):
        return {"a": nested(levels - 1)} if levels else {}

    deepest = _through_text(nested(39))
    assert to_plain(deepest) == nested(39)
    assert RunConfig.FromString(deepest.SerializeToString()) == deepest
    (line,) = _refused(nested(40))
    assert line.endswith(".a: nested deeper than 40 levels; flatten the config")


def test_a_config_dict_that_cannot_be_walked_is_refused():
    broken = ConfigDict({"a": 2.0})
    broken.b = 1 / broken.get_ref("a")
    broken.a = 0.0
    (line,) = _refused(broken)
    assert line.startswith("b: a FieldReference that cannot be computed: ZeroDivisionError(")
    mixed = ConfigDict({"m": {1: 1}})
    mixed.m["a"] = 2
    assert _refused(mixed) == ["m: int and str keys in one ConfigDict; pass sort_keys=False"]


@pytest.mark.parametrize(("config", "found"), [([1], "[1] of type list"), (None, "None of type")])
def test_what_is_no_config_is_refused(config, found):
    with pytest.raises(ConfigError, match="a config is an ml_collections") as e:
        to_message(config)
    assert found in str(e.value)
    assert _refused(jnp.sin) == ["config: the callable sin; store its name"]


# What cannot be read: files edited by hand, or written by another version.


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('field { key: "a" dtype: "f99x" }', "a: this process has no dtype 'f99x'"),
        ('field { key: "a" type: "os.system" }', "a: this process has no type 'os.system'"),
        ('field { key: "a" type: "numpy.ndarray" }', "a: this process has no type 'numpy.ndarray'"),
        ('field { key: "a" type: "numpy.load" }', "a: this process has no type 'numpy.load'"),
        ('field { key: "a" type: "builtins.eval" }', "a: this process has no type 'builtins.eval'"),
        ('field { key: "a" big_int: "x1" }', "a: 'x1' is not an integer"),
        ('field { big_int_key: "x" int: 1 }', "config: 'x' is not an integer"),
        ('field { key: "a" list { item { } } }', "a[0]: a saved field without a value; was it"),
        ("field { int: 1 }", "config: a saved field without a key"),
        ('field { key: "a" int: 1 } field { key: "a" int: 2 }', "the saved config holds a twice"),
    ],
)
def test_a_damaged_config_is_refused_by_key(text, error):
    message = text_format.Parse(f"config {{ {text} }}", RunConfig())
    for read in (from_message, to_plain):
        with pytest.raises(ConfigError) as caught:
            read(message)
        assert str(caught.value).startswith(error)


# Messages of the user's own.


def test_a_compiled_message_is_its_own_config():
    message = timestamp_pb2.Timestamp(seconds=3)
    assert to_message(message) is message
    assert from_message(message) is message
    assert to_plain(message) == {"seconds": 3, "nanos": 0}
    assert diff(message, timestamp_pb2.Timestamp(seconds=3)) == []
    assert diff(message, timestamp_pb2.Timestamp(nanos=5)) == ["seconds 3 → 0", "nanos 0 → 5"]
    assert diff(message, to_message({})) == [
        "the config's message type google.protobuf.Timestamp → flax_ckpt.RunConfig"
    ]
    before, after = struct_pb2.Struct(), struct_pb2.Struct()
    before.update({"lr": 0.1, "layers": [1, 2], "gone": None})
    after.update({"lr": 0.2, "layers": [1, 3], "new": True})
    assert diff(before, before) == []
    assert sorted(diff(before, after)) == [
        "fields.gone.null_value removed (was 'NULL_VALUE')",
        "fields.layers.list_value.values[1].number_value 2.0 → 3.0",
        "fields.lr.number_value 0.1 → 0.2",
        "fields.new.bool_value added: True",
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
        "model.dtype jax.numpy.bfloat16 → jax.numpy.float32",
        "model.layers (2, 2) → (2, 3, 4)",
        "model.blocks[0].n 1 → 5",
        "model.depth added: 12",
        "gone.a removed (was 1)",
        "gone.b removed (was {})",
        "['x y'] None → int4",
        "new.c.d added: 'e\\nf'",
    ]


@pytest.mark.parametrize(
    ("saved", "current", "line"),
    [
        (1, 1.0, "a 1 → 1.0"),
        (True, 1, "a True → 1"),
        (0.0, -0.0, "a 0.0 → -0.0"),
        ("1", 1, "a '1' → 1"),
        ("int4", np.dtype("int4"), "a 'int4' → int4"),
        (np.float32, np.dtype("float32"), "a numpy.float32 → float32"),
        ([1], (1,), "a [1] → (1,)"),
        ({}, None, "a {} → None"),
        ({"b": 1}, [1], "a {'b': 1} → [1]"),
        ({}, {1: 2}, "a[1] added: 2"),
        ("x" * 300, "", f"a '{'x' * 199}… → ''"),
    ],
)
def test_kinds_differ(saved, current, line):
    assert _lines({"a": saved}, {"a": current}) == [line]


def test_what_does_not_count():
    assert _lines({"a": 1, "b": [{"c": 2, "d": 3}]}, {"b": [{"d": 3, "c": 2}], "a": 1}) == []
    assert _lines({"a": {"b": math.nan}}, ConfigDict({"a": {"b": math.nan}})) == []
    with_provenance = to_message({"a": 1})
    with_provenance.provenance.add(key="jax", value="1")
    assert diff(with_provenance, to_message({"a": 1})) == []


def test_a_diff_needs_no_type_that_is_gone():
    saved = to_message({"dtype": jnp.bfloat16, "lr": 1})
    saved.config.field[0].type = "jax.numpy.float3"
    line = "dtype jax.numpy.float3 → jax.numpy.bfloat16"
    assert diff(saved, to_message({"dtype": jnp.bfloat16, "lr": 1})) == [line]


def _shuffled(value, draw):
    if isinstance(value, dict):
        keys = draw(st.permutations(list(value)))
        return {key: _shuffled(value[key], draw) for key in keys}
    if isinstance(value, list | tuple):
        return type(value)(_shuffled(item, draw) for item in value)
    return value


@given(_CONFIGS, _CONFIGS, st.data())
def test_no_difference_means_equal(one, other, data):
    lines = diff(to_message(one), to_message(other))
    assert (lines == []) == _same(one, other, ordered=False)
    assert diff(to_message(one), to_message(_shuffled(one, data.draw))) == []
    assert all("\n" not in line for line in lines)


# Imports.


def test_ml_collections_is_imported_when_a_config_dict_is_made():
    program = """
import sys
from flax_ckpt.adapters.config import diff, to_message, to_plain
config = {"a": (1, None), "b": {"c": "d"}}
message = to_message(config)
assert to_plain(message) == config and diff(message, message) == []
found = {"ml_collections", "orbax"} & set(sys.modules)
assert not found, found
message.config.field.add(key="d", type="jax.numpy.bfloat16")
message.config.field.add(key="e", dtype="bfloat16")
from flax_ckpt.adapters.config import from_message
assert from_message(message).d == from_message(message).e
"""
    env = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=120)


def test_a_reload_keeps_old_messages_readable():
    from flax_ckpt.adapters import config as module
    from flax_ckpt.format import config_pb

    message = to_message({"a": 1})
    importlib.reload(config_pb)
    assert importlib.reload(module).from_message(message).a == 1
