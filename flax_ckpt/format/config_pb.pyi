# Types of the messages that config_pb.py builds at run time; a test holds the two together.
import builtins
from typing import Final

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from google.protobuf.message import Message

PROTO: Final[str]

class RunConfig(Message):
    item: Final[RepeatedCompositeFieldContainer[Entry]]
    provenance: Final[RepeatedCompositeFieldContainer[Entry]]

class Items(Message):
    item: Final[RepeatedCompositeFieldContainer[Entry]]

class Entry(Message):
    key: builtins.str
    int_key: builtins.int
    none: builtins.bool
    bool: builtins.bool
    float: builtins.float
    str: builtins.str
    bytes: builtins.bytes
    int: builtins.int
    big_int: builtins.str
    dtype: builtins.str
    list: Final[Items]
    tuple: Final[Items]
    dict: Final[Items]
    config: Final[Items]
