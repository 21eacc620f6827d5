"""`flax_ckpt.RunConfig`: the protocol buffer that holds a run's config.

>>> from google.protobuf import text_format
>>> message = RunConfig(item=[Entry(key="learning_rate", float=1e-3)])
>>> text_format.MessageToString(message, as_one_line=True)
'item { key: "learning_rate" float: 0.001 }'

The descriptor is built from the text below, at import, and registered in the default pool: a
generated `_pb2.py` refuses to load under a protobuf runtime older than its compiler. Types are in
`config_pb.pyi`. Field names are what a file holds: one may be added, none renamed or reused.
"""

import re
from typing import Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

PROTO: Final = """
message RunConfig {
  repeated Entry item = 1;         // in insertion order
  repeated Entry provenance = 2;   // reserved: versions, commit, argv
}
message Items { repeated Entry item = 1; }
message Entry {
  oneof name { string key = 1; int64 int_key = 2; }   // in a dict, none in a list
  oneof kind {
    bool none = 3; bool bool = 4; double float = 5; string str = 6; bytes bytes = 7;
    int64 int = 8; string big_int = 9;                // beyond 64 bits, in decimal
    string dtype = 10;                                // of a dtype or scalar type: "bfloat16"
    Items list = 11; Items tuple = 12; Items dict = 13; Items config = 14;   // a ConfigDict
  }
}
"""
_Field = descriptor_pb2.FieldDescriptorProto
_TOKEN: Final = re.compile(r"(message|oneof) (\w+)|(repeated )?(\w+) (\w+) = (\d+);")


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="flax_ckpt/run_config.proto", package="flax_ckpt", syntax="proto3"
    )
    for scope, scope_name, repeated, kind, name, number in _TOKEN.findall(PROTO):
        if scope == "message":
            file.message_type.add(name=scope_name)
        elif scope == "oneof":
            file.message_type[-1].oneof_decl.add(name=scope_name)
        else:
            message, is_message = file.message_type[-1], kind[0].isupper()
            message.field.add(
                name=name,
                number=int(number),
                label=_Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL,
                type=_Field.Type.Value(f"TYPE_{'MESSAGE' if is_message else kind.upper()}"),
                type_name=f".flax_ckpt.{kind}" if is_message else None,
                oneof_index=len(message.oneof_decl) - 1 if message.oneof_decl else None,
            )
    return file


# The pool takes the same bytes twice without complaint, so importing this again is harmless.
_pool = descriptor_pool.Default()
_pool.AddSerializedFile(_file().SerializeToString(deterministic=True))
RunConfig, Items, Entry = (
    message_factory.GetMessageClass(_pool.FindMessageTypeByName(f"flax_ckpt.{name}"))
    for name in ("RunConfig", "Items", "Entry")
)
