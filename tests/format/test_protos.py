"""The text of `proto.pbtxt`: exact, readable, and refused with a reason."""

import ast
import contextlib
import importlib
import math
import os
import pathlib
import re
import struct
import subprocess
import sys

import pytest
from google.protobuf import (
    descriptor_pb2,
    descriptor_pool,
    message_factory,
    struct_pb2,
    text_format,
    timestamp_pb2,
)
from hypothesis import example, given
from hypothesis import strategies as st

from flax_ckpt.errors import FormatError
from flax_ckpt.format import config_pb, names
from flax_ckpt.format.protos import message_to_text, text_to_message

_F = descriptor_pb2.FieldDescriptorProto
_NAME = "flax_ckpt_test_protos.User"


def _user_class():
    """What a user's `_pb2.py` would register: proto2, so that presence and extensions are met."""
    file = descriptor_pb2.FileDescriptorProto(
        name="flax_ckpt_test_protos.proto", package="flax_ckpt_test_protos", syntax="proto2"
    )
    enum = file.enum_type.add(name="Optimizer")
    enum.value.add(name="SGD", number=0)
    enum.value.add(name="ADAM", number=1)
    user = file.message_type.add(name="User")
    user.extension_range.add(start=100, end=200)
    entry = user.nested_type.add(name="RatesEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=_F.TYPE_STRING, label=_F.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=_F.TYPE_DOUBLE, label=_F.LABEL_OPTIONAL)
    own = ".flax_ckpt_test_protos."
    for number, (name, kind, label, type_name) in enumerate(
        [
            ("double", _F.TYPE_DOUBLE, _F.LABEL_OPTIONAL, ""),
            ("single", _F.TYPE_FLOAT, _F.LABEL_OPTIONAL, ""),
            ("text", _F.TYPE_STRING, _F.LABEL_OPTIONAL, ""),
            ("data", _F.TYPE_BYTES, _F.LABEL_OPTIONAL, ""),
            ("widths", _F.TYPE_INT64, _F.LABEL_REPEATED, ""),
            ("optimizer", _F.TYPE_ENUM, _F.LABEL_OPTIONAL, own + "Optimizer"),
            ("child", _F.TYPE_MESSAGE, _F.LABEL_OPTIONAL, own + "User"),
            ("rates", _F.TYPE_MESSAGE, _F.LABEL_REPEATED, own + "User.RatesEntry"),
            ("needed", _F.TYPE_INT64, _F.LABEL_REQUIRED, ""),
        ],
        start=1,
    ):
        user.field.add(
            name=name, number=number, type=kind, label=label, type_name=type_name or None
        )
    file.extension.add(
        name="extra",
        number=100,
        type=_F.TYPE_STRING,
        label=_F.LABEL_OPTIONAL,
        extendee=own + "User",
    )
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString(deterministic=True))
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(_NAME))


User = _user_class()


def _bits(value: float, code: str) -> bytes:
    return b"nan" if math.isnan(value) else struct.pack(code, value)


@given(st.floats(), st.floats(width=32))
@example(-0.0, -0.0)
@example(math.nan, math.inf)
@example(5e-324, 1.401298464324817e-45)
@example(1.7976931348623157e308, 3.4028234663852886e38)
def test_floats_come_back_to_the_bit(double, single):
    read = text_to_message(message_to_text(User(double=double, single=single)), User)
    assert _bits(read.double, "<d") == _bits(double, "<d")
    assert _bits(read.single, "<f") == _bits(single, "<f")


@given(st.text() | st.text("\\xuU0141\"'{}#:\n\r\t\0\x7f\x85\u2028\ufeffé😀 "), st.binary())
def test_strings_come_back(text, data):
    message = User(text=text, data=data, child=User(text=text), rates={text: 1.0})
    written = message_to_text(message)
    assert text_to_message(written, User) == message
    # What a reader that translates line ends and knows UTF-8 makes of it.
    assert written.encode().decode().replace("\r\n", "\n").replace("\r", "\n") == written


def test_the_first_line_names_the_message_and_every_parser_reads_on():
    message = timestamp_pb2.Timestamp(seconds=12, nanos=5)
    text = message_to_text(message)
    assert text == "# proto-message: google.protobuf.Timestamp\nseconds: 12\nnanos: 5\n"
    assert text.startswith(names.PROTO_HEADER)
    assert text_format.Parse(text, timestamp_pb2.Timestamp()) == message
    assert text_to_message(text) == message
    assert type(text_to_message(text)) is timestamp_pb2.Timestamp
    assert text_to_message("seconds: 12 nanos: 5", timestamp_pb2.Timestamp) == message  # Orbax's
    assert text_to_message(text.replace("\n", "\r\n")) == message


def test_unicode_stays_readable_and_short_blocks_stand_on_one_line():
    message = User(text="é 😀 {", child=User(child=User(), widths=[1, 2]))
    message.child.child.text = "x" * 80
    assert message_to_text(message).splitlines()[1:] == [
        'text: "é 😀 {"',
        "child {",
        "  widths: 1",
        "  widths: 2",
        "  child {",
        f'    text: "{"x" * 80}"',
        "  }",
        "}",
    ]
    message.child.child.text = "}"
    assert message_to_text(message).splitlines()[2:] == [
        'child { widths: 1 widths: 2 child { text: "}" } }'
    ]
    assert message_to_text(User(child=User())).splitlines()[1:] == ["child { }"]


def _refused(text, message_type=None):
    with pytest.raises(FormatError) as caught:
        text_to_message(text, message_type)
    return str(caught.value)


def test_an_unknown_name_is_refused_and_imports_nothing():
    before = set(sys.modules)
    assert _refused("# proto-message: google.protobuf.source_context.Nope\n") == (
        "the first line names no message that this process knows "
        "('google.protobuf.source_context.Nope'): "
        "import the module that defines it first, or pass the message's class"
    )
    assert set(sys.modules) == before
    assert "knows ('\\ud800')" in _refused("# proto-message: \ud800\n")


def test_a_text_without_a_name_needs_the_class():
    assert _refused("seconds: 1\n") == (
        "the first line names no message that this process knows (None): "
        "import the module that defines it first, or pass the message's class"
    )


def test_the_class_given_must_be_the_one_named():
    text = message_to_text(timestamp_pb2.Timestamp(seconds=1))
    assert _refused(text, struct_pb2.Struct) == (
        "the file holds a google.protobuf.Timestamp, not a google.protobuf.Struct: "
        "pass the class of google.protobuf.Timestamp"
    )


def test_garbage_is_refused_with_its_line():
    header = "# proto-message: google.protobuf.Timestamp\n"
    assert _refused(header + "seconds: 12\n  nanoz: 5\n") == (
        "not a google.protobuf.Timestamp in text format: 3:3 : "
        'Message type "google.protobuf.Timestamp" has no field named "nanoz".'
    )
    assert "2:10 : 'seconds: 1e400000x'" in _refused(header + "seconds: 1e400000x\n")
    assert "format: 2:" in _refused(header + "\0\0\0")
    assert "can't decode byte 0xff" in _refused(r'text: "\377" ', User)
    assert "recursion" in _refused("child { " * 5000, User)


_WHOLE = message_to_text(
    User(text="aé\\\n", data=b"\0\xff", single=0.1, child=User(widths=[1, 2]), rates={"k": 0.5})
)


@pytest.mark.filterwarnings("ignore:invalid:DeprecationWarning")  # Python, of a bad escape
@given(st.data())
def test_no_damage_raises_anything_else(data):
    start = data.draw(st.integers(0, len(_WHOLE)))
    end = data.draw(st.integers(start, min(len(_WHOLE), start + 4)))
    put = data.draw(st.text("{}[]<>\"'\\xuU0178-:;,#\n\0\ud800", max_size=3))
    with contextlib.suppress(FormatError):
        text_to_message(_WHOLE[:start] + put + _WHOLE[end:])


# The descriptor of our own message.


def test_registering_again_changes_nothing():
    before = config_pb.RunConfig
    written = message_to_text(before(provenance=[config_pb.Entry(key="k", str="v")]))
    again = importlib.reload(config_pb)
    assert again.RunConfig.DESCRIPTOR.full_name == "flax_ckpt.RunConfig"
    assert again.RunConfig is before
    assert isinstance(text_to_message(written), again.RunConfig)
    assert text_to_message(written, again.RunConfig).provenance[0].str == "v"


def test_pure_python_protobuf_does_the_same():
    """The other implementation of the runtime; a process chooses one when it first imports it."""
    program = """
import importlib
from google.protobuf.internal import api_implementation
from flax_ckpt.adapters.config import from_message, to_message
from flax_ckpt.format import config_pb, protos
assert api_implementation.Type() == "python"
config = {"a": (1, 2.5, None, "é\\n", b"\\0", 2**70), 3: {}}
text = protos.message_to_text(to_message(config))
importlib.reload(config_pb)
assert from_message(protos.text_to_message(text)).to_dict() == config
"""
    root = str(pathlib.Path(__file__).parents[2])
    env = os.environ | {"PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python", "PYTHONPATH": root}
    subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=120)


def _stub_fields(node: ast.ClassDef) -> dict[str, str]:
    pattern = r"^(?:Final\[(.+)\]|builtins\.(\w+))$"
    fields = {item.target.id: re.match(pattern, ast.unparse(item.annotation)) for item in node.body}
    return {name: found[1] or found[2] for name, found in fields.items()}


def _descriptor_fields(descriptor) -> dict[str, str]:
    scalars = {
        _F.TYPE_BOOL: "bool",
        _F.TYPE_BYTES: "bytes",
        _F.TYPE_DOUBLE: "float",
        _F.TYPE_INT64: "int",
        _F.TYPE_STRING: "str",
    }
    proto = descriptor_pb2.DescriptorProto()
    descriptor.CopyToProto(proto)
    fields = {}
    for field in proto.field:
        kind = scalars.get(field.type) or field.type_name.removeprefix(".flax_ckpt.")
        many = field.label == _F.LABEL_REPEATED
        fields[field.name] = f"RepeatedCompositeFieldContainer[{kind}]" if many else kind
    return fields


def test_the_stub_agrees_with_the_descriptor():
    tree = ast.parse(pathlib.Path(config_pb.__file__).with_suffix(".pyi").read_text())
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    assert classes.keys() == {"RunConfig", "Items", "Entry"}
    for name, node in classes.items():
        assert _stub_fields(node) == _descriptor_fields(getattr(config_pb, name).DESCRIPTOR), name


def test_the_documented_schema_is_the_one_built():
    messages = (config_pb.RunConfig, config_pb.Items, config_pb.Entry)
    built = [(f.name, str(f.number)) for m in messages for f in m.DESCRIPTOR.fields]
    assert re.findall(r"(\w+) = (\d+);", config_pb.PROTO) == built
    oneofs = config_pb.Entry.DESCRIPTOR.oneofs_by_name
    assert [field.name for field in oneofs["name"].fields] == ["key", "int_key"]
    assert len(oneofs["kind"].fields) == len(config_pb.Entry.DESCRIPTOR.fields) - 2
