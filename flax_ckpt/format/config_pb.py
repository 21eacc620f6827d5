"""`flax_ckpt.RunConfig`: the protocol buffer that holds a run's config.

>>> from google.protobuf import text_format
>>> message = RunConfig()
>>> entry = message.config.field.add(key="learning_rate", float=1e-3)
>>> text_format.MessageToString(message, as_one_line=True)
'config { field { key: "learning_rate" float: 0.001 } }'

The descriptor is built here, at import, and registered in the default pool: a generated
`_pb2.py` refuses to load under a protobuf runtime older than its compiler. Types are in
`config_pb.pyi`. As a `.proto` it reads:

    message RunConfig {
      Dict config = 1;
      repeated Provenance provenance = 2;    // versions, commit, argv: filled by a later release
      message Provenance { string key = 1; string value = 2; }
      message Dict { repeated Entry field = 1; }             // in insertion order
      message Items { repeated Entry item = 1; }
      message Entry {                                        // a value; inside a Dict, with key
        oneof name { string key = 1; int64 int_key = 2; string big_int_key = 3; }
        oneof kind {
          bool none = 4;   bool bool = 5;     int64 int = 6;     string big_int = 7;   // decimal
          double float = 8; string str = 9;   bytes bytes = 10;
          string dtype = 11;                  // np.dtype:    "bfloat16"
          string type = 12;                   // scalar type: "jax.numpy.bfloat16"
          Items list = 13; Items tuple = 14;  Dict dict = 15;    Dict config = 16;     // ConfigDict
        }
      }
    }

Field names are what a file holds, so one may be added and none renamed or reused.
"""

from __future__ import annotations

from typing import Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_Field = descriptor_pb2.FieldDescriptorProto
_DICT: Final = ".flax_ckpt.RunConfig.Dict"
_ITEMS: Final = ".flax_ckpt.RunConfig.Items"
_ENTRY: Final = ".flax_ckpt.RunConfig.Entry"
_PROVENANCE: Final = ".flax_ckpt.RunConfig.Provenance"

# Field name → a scalar type or the full name of a message. The position gives the number.
_KEYS: Final = {
    "key": _Field.TYPE_STRING,
    "int_key": _Field.TYPE_INT64,
    "big_int_key": _Field.TYPE_STRING,
}
_KINDS: Final = {
    "none": _Field.TYPE_BOOL,
    "bool": _Field.TYPE_BOOL,
    "int": _Field.TYPE_INT64,
    "big_int": _Field.TYPE_STRING,
    "float": _Field.TYPE_DOUBLE,
    "str": _Field.TYPE_STRING,
    "bytes": _Field.TYPE_BYTES,
    "dtype": _Field.TYPE_STRING,
    "type": _Field.TYPE_STRING,
    "list": _ITEMS,
    "tuple": _ITEMS,
    "dict": _DICT,
    "config": _DICT,
}


def _add(
    message: descriptor_pb2.DescriptorProto,
    name: str,
    kind: _Field.Type.ValueType | str,
    *,
    repeated: bool = False,
    oneof: int | None = None,
) -> None:
    field = message.field.add(
        name=name,
        number=len(message.field) + 1,
        label=_Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL,
        oneof_index=oneof,
    )
    if isinstance(kind, str):
        field.type, field.type_name = _Field.TYPE_MESSAGE, kind
    else:
        field.type = kind


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="flax_ckpt/run_config.proto", package="flax_ckpt", syntax="proto3"
    )
    run = file.message_type.add(name="RunConfig")
    _add(run, "config", _DICT)
    _add(run, "provenance", _PROVENANCE, repeated=True)
    provenance = run.nested_type.add(name="Provenance")
    _add(provenance, "key", _Field.TYPE_STRING)
    _add(provenance, "value", _Field.TYPE_STRING)
    _add(run.nested_type.add(name="Dict"), "field", _ENTRY, repeated=True)
    _add(run.nested_type.add(name="Items"), "item", _ENTRY, repeated=True)
    entry = run.nested_type.add(name="Entry")
    for index, (oneof, fields) in enumerate((("name", _KEYS), ("kind", _KINDS))):
        entry.oneof_decl.add(name=oneof)
        for name, kind in fields.items():
            _add(entry, name, kind, oneof=index)
    return file


# The pool takes the same bytes twice without complaint, so importing this again is harmless.
descriptor_pool.Default().AddSerializedFile(_file().SerializeToString(deterministic=True))
_descriptor = descriptor_pool.Default().FindMessageTypeByName("flax_ckpt.RunConfig")
RunConfig = message_factory.GetMessageClass(_descriptor)
for _nested in _descriptor.nested_types:
    if not hasattr(RunConfig, _nested.name):  # protobuf in pure Python leaves that to the compiler
        setattr(RunConfig, _nested.name, message_factory.GetMessageClass(_nested))
