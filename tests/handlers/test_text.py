"""Checkpointables that are one small text file: protocol buffers, JSON, metrics."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct

import flax_ckpt as fc
import flax_ckpt as ocp  # as in Orbax's documentation, the import swapped
from flax_ckpt.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    FormatError,
    NotHandleableError,
)


def message_class(name: str, pool: Any = None) -> Any:
    """A message with a string, a repeated int and a map, made at run time."""
    file = descriptor_pb2.FileDescriptorProto(name=f"tests/{name}.proto", package="flax_ckpt_tests")
    message = file.message_type.add(name=name)
    message.field.add(name="config_field", number=1, type=9, label=1)
    message.field.add(name="numbers", number=2, type=3, label=3)
    pool = pool or descriptor_pool.Default()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"flax_ckpt_tests.{name}"))


MyProtoMessage = message_class("MyProtoMessage")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ckpt"


def bound(handler: Any, name: str) -> fc.Context:
    context = fc.Context()
    context.checkpointables.registry = fc.handlers.local_registry().add(
        handler, checkpointable_name=name
    )
    return context


def test_the_example_of_orbaxs_documentation(path: Path) -> None:
    # Assuming MyProtoMessage is your compiled protobuf class
    my_proto_msg = MyProtoMessage(config_field="value")

    registry = ocp.handlers.local_registry()
    registry.add(
        ocp.handlers.ProtoHandler, checkpointable_name="proto_config"
    )  # fmt: skip
    ctx = ocp.Context()
    ctx.checkpointables.registry = registry
    with ctx:
        ocp.save_checkpointables(path, dict(proto_config=my_proto_msg))  # noqa: C408

    with ctx:
        loaded = ocp.load_checkpointables(path, dict(proto_config=MyProtoMessage))  # noqa: C408
    assert loaded == {"proto_config": my_proto_msg}


def test_the_file_is_text_and_names_its_message(path: Path) -> None:
    message = MyProtoMessage(config_field='é\n"quoted"', numbers=[1, -2, 2**62])
    fc.save_checkpointables(path, {"config": message})
    text = (path / "config" / "proto.pbtxt").read_text()
    assert text == (
        "# proto-message: flax_ckpt_tests.MyProtoMessage\n"
        'config_field: "é\\n\\"quoted\\""\n'
        "numbers: 1\nnumbers: -2\nnumbers: 4611686018427387904\n"
    )
    assert [p.name for p in (path / "config").iterdir()] == ["proto.pbtxt"]
    assert fc.load_checkpointables(path) == {"config": message}
    assert fc.load_checkpointables(path, {"config": MyProtoMessage}) == {"config": message}


def test_an_empty_message(path: Path) -> None:
    fc.save_checkpointables(path, {"config": Duration()})
    assert (
        path / "config/proto.pbtxt"
    ).read_text() == "# proto-message: google.protobuf.Duration\n"
    assert fc.load_checkpointables(path) == {"config": Duration()}


def test_a_message_in_the_middle_of_a_tree_is_not_a_leaf(path: Path) -> None:
    with pytest.raises(fc.errors.UnsupportedLeafError, match="a: a .*Duration cannot be saved"):
        fc.save(path, {"a": Duration()})


def test_a_message_that_this_process_does_not_know(path: Path) -> None:
    stranger = message_class("Stranger", descriptor_pool.DescriptorPool())
    fc.save_checkpointables(path, {"config": stranger(config_field="x"), "state": {"a": 1}})
    with pytest.raises(FormatError, match=r"knows \('flax_ckpt_tests.Stranger'\): import"):
        fc.load_checkpointables(path)
    assert fc.load_checkpointables(path, {"state": None}) == {"state": {"a": 1}}
    loaded = fc.load_checkpointables(path, {"config": stranger})["config"]
    assert loaded.config_field == "x"
    assert fc.checkpointables_metadata(path).metadata["config"] is None


def test_the_class_of_another_message_is_refused(path: Path) -> None:
    fc.save_checkpointables(path, {"config": Duration(seconds=3)})
    with pytest.raises(
        FormatError, match=r"holds a google.protobuf.Duration, not a google.*Struct"
    ):
        fc.load_checkpointables(path, {"config": Struct})


def test_what_is_no_message_is_refused_by_a_bound_handler(path: Path) -> None:
    with (
        bound(fc.handlers.ProtoHandler, "config"),
        pytest.raises(NotHandleableError, match="'config': ProtoHandler .* got a dict"),
    ):
        fc.save_checkpointables_async(path, {"config": {"a": 1}})
    assert not path.exists()


def test_the_message_is_taken_when_save_is_called(path: Path) -> None:
    message = Duration(seconds=1)
    response = fc.save_checkpointables_async(path, {"config": message})
    message.seconds = 2
    response.result()
    assert fc.load_checkpointables(path)["config"].seconds == 1


def test_another_filename(path: Path) -> None:
    class Named:
        def __new__(cls) -> Any:
            return fc.handlers.ProtoHandler(filename="run.txtpb")

    with bound(Named, "config"):
        fc.save_checkpointables(path, {"config": Duration(seconds=3)})
        assert [p.name for p in (path / "config").iterdir()] == ["run.txtpb"]
        assert fc.load_checkpointables(path)["config"] == Duration(seconds=3)


def test_metadata_is_the_class(path: Path) -> None:
    fc.save_checkpointables(path, {"config": Duration(seconds=3)})
    found = fc.checkpointables_metadata(path)
    assert found.metadata == {"config": Duration}
    assert fc.load_checkpointables(path, found) == {"config": Duration(seconds=3)}


# JSON.

JSON_VALUES = [
    {"a": [1, 2.5, None, True, "é\n"]},
    [1, "x", {}],
    "text",
    3,
    {"nested": {"deep": [[[]]]}},
]


@pytest.mark.parametrize("value", JSON_VALUES, ids=repr)
def test_json_comes_back(path: Path, value: Any) -> None:
    with bound(fc.handlers.JsonHandler, "notes"):
        fc.save_checkpointables(path, {"notes": value})
        assert fc.load_checkpointables(path) == {"notes": value}
    assert fc.load_checkpointables(path) == {"notes": value}  # by its type string
    (file,) = (path / "notes").iterdir()
    assert json.loads(file.read_text()) == value


def test_what_json_cannot_hold_is_refused_by_name(path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with bound(fc.handlers.JsonHandler, "notes"):
        for value in ({"a": object()}, {"a": {1, 2}}, loop, deep, {(1, 2): 3}):
            with pytest.raises(NotHandleableError, match="'notes': JSON cannot hold it"):
                fc.save_checkpointables_async(path, {"notes": value})
    assert not path.exists()
    while deep:  # one level at a time, or the interpreter recurses
        deep = deep.pop()


def test_keys_that_json_would_change_are_told(path: Path) -> None:
    """JSON turns an int key into a string: what comes back must equal what was saved, or fail."""
    value = {1: "a"}
    with bound(fc.handlers.JsonHandler, "notes"):
        try:
            fc.save_checkpointables(path, {"notes": value})
        except NotHandleableError:
            return
        assert fc.load_checkpointables(path) == {"notes": value}


def test_damaged_json_is_noticed(path: Path) -> None:
    with bound(fc.handlers.JsonHandler, "notes"):
        fc.save_checkpointables(path, {"notes": {"a": 1}})
    (file,) = (path / "notes").iterdir()
    file.write_text('{"a": 2}')
    with pytest.raises(DamagedCheckpointError, match=file.name):
        fc.load_checkpointables(path)
    file.unlink()
    with pytest.raises((DamagedCheckpointError, CheckpointNotFoundError), match=file.name):
        fc.load_checkpointables(path)


def test_json_from_orbax(path: Path, run_child: Any) -> None:
    program = """
        import sys, orbax.checkpoint.experimental.v1 as ocp
        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="notes")
        context = ocp.Context()
        context.checkpointables.registry = registry
        with context:
            ocp.save_checkpointables(sys.argv[1], {"notes": {"a": [1, "x"]}})
    """
    run_child(program, path)
    assert fc.load_checkpointables(path) == {"notes": {"a": [1, "x"]}}


def test_orbax_reads_json_and_messages(path: Path, run_child: Any) -> None:
    with bound(fc.handlers.JsonHandler, "notes"):
        parts = {"notes": {"a": [1, "x"]}, "config": Duration(seconds=3), "state": {"n": 1}}
        fc.save_checkpointables(path, parts)
    program = """
        import sys, orbax.checkpoint.experimental.v1 as ocp
        from google.protobuf.duration_pb2 import Duration
        registry = ocp.handlers.local_registry()
        registry.add(ocp.handlers.JsonHandler, checkpointable_name="notes")
        context = ocp.Context()
        context.checkpointables.registry = registry
        with context:
            loaded = ocp.load_checkpointables(
                sys.argv[1], {"notes": None, "config": Duration, "state": None})
        assert loaded["notes"] == {"a": [1, "x"]}, loaded
        assert loaded["config"] == Duration(seconds=3), loaded
        assert loaded["state"] == {"n": 1}, loaded
    """
    run_child(program, path)
