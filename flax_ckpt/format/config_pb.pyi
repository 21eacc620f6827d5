# Types of the messages that config_pb.py builds at run time; a test holds the two together.
import builtins
from collections.abc import Iterable
from typing import Literal, TypeAlias, final

from google.protobuf.internal.containers import RepeatedCompositeFieldContainer
from google.protobuf.message import Message

_Key: TypeAlias = Literal["key", "int_key", "big_int_key"]
_Kind: TypeAlias = Literal[
    "none",
    "bool",
    "int",
    "big_int",
    "float",
    "str",
    "bytes",
    "dtype",
    "type",
    "list",
    "tuple",
    "dict",
    "config",
]

@final
class RunConfig(Message):
    @property
    def config(self) -> RunConfig.Dict: ...
    @property
    def provenance(self) -> RepeatedCompositeFieldContainer[RunConfig.Provenance]: ...
    def __init__(
        self,
        *,
        config: RunConfig.Dict | None = ...,
        provenance: Iterable[RunConfig.Provenance] | None = ...,
    ) -> None: ...

    @final
    class Provenance(Message):
        key: str
        value: str
        def __init__(self, *, key: str = ..., value: str = ...) -> None: ...

    @final
    class Dict(Message):
        @property
        def field(self) -> RepeatedCompositeFieldContainer[RunConfig.Entry]: ...
        def __init__(self, *, field: Iterable[RunConfig.Entry] | None = ...) -> None: ...

    @final
    class Items(Message):
        @property
        def item(self) -> RepeatedCompositeFieldContainer[RunConfig.Entry]: ...
        def __init__(self, *, item: Iterable[RunConfig.Entry] | None = ...) -> None: ...

    @final
    class Entry(Message):
        key: builtins.str
        int_key: builtins.int
        big_int_key: builtins.str
        none: builtins.bool
        bool: builtins.bool
        int: builtins.int
        big_int: builtins.str
        float: builtins.float
        str: builtins.str
        bytes: builtins.bytes
        dtype: builtins.str
        type: builtins.str
        @property
        def list(self) -> RunConfig.Items: ...
        @property
        def tuple(self) -> RunConfig.Items: ...
        @property
        def dict(self) -> RunConfig.Dict: ...
        @property
        def config(self) -> RunConfig.Dict: ...
        def WhichOneof(self, oneof_group: Literal["name", "kind"]) -> _Key | _Kind | None: ...
