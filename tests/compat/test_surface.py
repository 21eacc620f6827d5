"""Every public name of Orbax v1 is here under the same name, or stands in a list with its reason.

The test walks Orbax's modules with `inspect`: functions and their parameters (kind, position,
default), classes, constructors, public methods and properties, fields of options, members of
enums. A difference that is not listed fails it, and so does a listed one that is gone.

`python -m tests.compat.test_surface` writes the list into docs/orbax.md.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import orbax.checkpoint.experimental.v1 as ocp
import pytest

import flax_ckpt as fc

MODULES = (
    "",
    "arrays",
    "errors",
    "handlers",
    "multihost",
    "options",
    "partial",
    "path",
    "path.step",
    "training",
    "training.errors",
    "training.pathways",
    "training.preservation_policies",
    "training.save_decision_policies",
    "tree",
)

# What differs on purpose: the reason, and the names it is for. `name(parameter)` is one parameter
# of a function or constructor; of a class or module that is missing, what it holds is not listed.
ALLOWED: dict[str, tuple[str, ...]] = {
    # Whole areas.
    "deprecated: Orbax keeps these names for callers of earlier versions": (
        "load_pytree",
        "load_pytree_async",
        "pytree_metadata",
        "save_pytree",
        "save_pytree_async",
        "training.Checkpointer.load_pytree",
        "training.Checkpointer.load_pytree_async",
        "training.Checkpointer.pytree_metadata",
        "training.Checkpointer.save_pytree",
        "training.Checkpointer.save_pytree_async",
        "Context(array_options)",
        "Context(async_options)",
        "Context(atomicity_options)",
        "Context(checkpoint_layout)",
        "Context(checkpointables_options)",
        "Context(deletion_options)",
        "Context(file_options)",
        "Context(memory_options)",
        "Context(multiprocessing_options)",
        "Context(pathways_options)",
        "Context(pytree_options)",
        "Context(safetensors_options)",
        "Context.array_options",
        "Context.async_options",
        "Context.checkpointables_options",
        "Context.deletion_options",
        "Context.file_options",
        "Context.memory_options",
        "Context.multiprocessing_options",
        "Context.pathways_options",
        "Context.pytree_options",
        "Context.safetensors_options",
    ),
    "Pathways, a runtime of one vendor's cloud": (
        "Context.pathways",
        "multihost.is_pathways_backend",
        "options.ArrayOptions.Saving(enable_pinned_host_transfer)",
        "options.PathwaysOptions",
        "training.pathways",
    ),
    "the PID regulator of transfers: a save keeps nothing but the snapshot": (
        "options.MemoryOptions(expected_surge_bytes)",
        "options.MemoryOptions(regulator_options)",
        "options.MemoryOptions.RegulatorOptions",
    ),
    "soft deletion on GCS": (
        "Context.deletion",
        "options.DeletionOptions",
    ),
    # Single names.
    "Safetensors and other layouts come with `interop`, in a later release": (
        "Context.checkpoint_layout",
        "Context.safetensors",
        "options.CheckpointLayout",
        "options.SafetensorsOptions",
    ),
    "a commit is always one atomic rename; there is no other mode to choose": (
        "Context.atomicity",
        "options.AtomicityMode",
        "options.AtomicityOptions",
    ),
    "converts to the options of Orbax v0, which is not here": (
        "options.AsyncOptions.v0",
        "options.FileOptions.v0",
        "options.MultiprocessingOptions.v0",
    ),
    "no need: directories are made in the background always": (
        "options.AsyncOptions(create_directories_asynchronously)",
    ),
    "no need: the check of the target is one look at the file system": (
        "options.FileOptions(skip_sync_file_validations)",
    ),
    "no need: bytes go between the arrays' own memory and the file, without a buffer to bound": (
        "options.MemoryOptions(read_concurrent_bytes)",
        "options.MemoryOptions(write_concurrent_bytes)",
    ),
    "a leaf that is transferred later could change under the save; the snapshot is always whole": (
        "options.MemoryOptions(is_prioritized_key_fn)",
        "options.MemoryOptions(serialization_status_callback)",
        "options.MemoryOptions(transfer_concurrent_bytes)",
    ),
    "rich types are classes that the checkpoint names, and nothing is imported because of a name": (
        "options.PyTreeOptions(saving)",
        "options.PyTreeOptions.Saving",
    ),
    "`None` stands for the global registry; Orbax makes a read-only copy of it": (
        "options.CheckpointablesOptions(registry)",
    ),
    "finds the tree as `load` does, with `AUTO`; Orbax's asks for `state`": (
        "load_async(checkpointable_name)",
    ),
    "`None` stands for the standard validator": (
        "handlers.PyTreeHandler(array_metadata_validator)",
    ),
    "True by default there: compressed floats save little and cost most of the time": (
        "options.ArrayOptions.Saving(use_compression)",
    ),
    "one process writes each shard, its first replica; there is nothing to choose": (
        "options.ArrayOptions.Saving(enable_replica_parallel_separate_folder)",
        "options.ArrayOptions.Saving(max_replicas_for_replica_parallel)",
        "options.ArrayOptions.Saving(min_slice_bytes_for_replica_parallel)",
        "options.ArrayOptions.Saving(use_replica_parallel)",
    ),
    "these files and this check are part of every save": (
        "options.ArrayOptions.Saving(array_metadata_store)",
        "options.ArrayOptions.Saving(enable_post_merge_validation)",
        "options.ArrayOptions.Saving(enable_write_sharding_file)",
    ),
    "each process reads its own part; sending it through devices would need a collective": (
        "options.ArrayOptions.Loading(load_and_broadcast_options)",
        "options.ArrayOptions.Loading(use_load_and_broadcast)",
        "options.ArrayOptions.Loading.LoadAndBroadcastOptions",
        "path.step.standard_name_format(single_host_load_and_broadcast)",
    ),
    "positional here, as Orbax calls it: a user's function may name its parameters freely": (
        "options.ArrayOptions.Saving.ScopedStorageOptionsCreator.__call__(key)",
        "options.ArrayOptions.Saving.ScopedStorageOptionsCreator.__call__(value)",
    ),
    "logs go to `logging`, and durations to the INFO line": (
        "multihost.sync_global_processes(record_event_name)",
        "training.Checkpointer(logger)",
    ),
    "layouts in device memory are not kept": ("arrays.to_shape_dtype_struct(support_format)",),
    "only `numpy.dtype`, which `jax.numpy.dtype` is": (
        "arrays.DType(align)",
        "arrays.DType(copy)",
        "arrays.DType(dtype)",
        "arrays.DType(kwargs)",
    ),
    "saving and loading check it, and name every leaf": (
        "handlers.PyTreeHandler.validate_abstract_leaves_handleable",
        "handlers.PyTreeHandler.validate_leaves_handleable",
    ),
}

PENDING = ()

MISSING = object()
# Methods that Python calls; they are as public as the named ones.
SPECIAL = frozenset(
    {"__call__", "__contains__", "__enter__", "__exit__", "__iter__", "__truediv__"}
)


@dataclasses.dataclass(frozen=True)
class Thing:
    """A public name: what it is, and its parameters; None if nobody is to call it."""

    kind: str
    parameters: Mapping[str, Any] | None = None


def walk(root: Any, library: str) -> Iterator[tuple[str, Thing]]:
    """Yields the public names of a library's modules, outer names before inner ones."""
    for dotted in MODULES:
        module = at(root, dotted)
        if dotted:
            yield dotted, Thing("module")
        for name, value in sorted(vars(module).items()):
            if name.startswith("_") or isinstance(value, types.ModuleType):
                continue
            home = getattr(value, "__module__", None) or ""
            if "_src" in module.__name__ and not home.startswith(library):
                continue  # what the module imported for itself
            yield from describe(f"{dotted}.{name}".lstrip("."), value, library)


class _Protocol(Protocol):
    pass


_of_protocols = _Protocol.__init__
_PROPERTIES = (property, functools.cached_property)


def describe(name: str, value: Any, library: str) -> Iterator[tuple[str, Thing]]:
    """Yields a name and, of a class that the library defines, the public ones in it."""
    yield name, thing(value)
    if not inspect.isclass(value) or not value.__module__.startswith(library):
        return
    if issubclass(value, enum.Enum):
        for member in value:
            yield f"{name}.{member.name}", Thing("value")
        return
    own = [base for base in value.__mro__ if base.__module__.startswith(library)]
    inner = {key: None for base in reversed(own) for key in vars(base)}
    for key in inner:
        found = inspect.getattr_static(value, key)
        described = (types.FunctionType, classmethod, staticmethod, *_PROPERTIES, type)
        if (not key.startswith("_") or key in SPECIAL) and isinstance(found, described):
            yield from describe(f"{name}.{key}", unwrapped(value, key), library)


def unwrapped(owner: Any, key: str) -> Any:
    found = inspect.getattr_static(owner, key)
    return found if isinstance(found, _PROPERTIES) else getattr(owner, key)


def thing(value: Any) -> Thing:
    """What a value is, for the comparison."""
    if inspect.isclass(value):
        if issubclass(value, enum.Enum):
            return Thing("class")
        abstract = getattr(value, "_is_protocol", False) or issubclass(value, BaseException)
        return Thing("class", None if abstract else parameters(value))
    if isinstance(value, _PROPERTIES):
        return Thing("value")
    if inspect.isroutine(value):
        return Thing("async" if inspect.iscoroutinefunction(value) else "call", parameters(value))
    return Thing("value")


def parameters(value: Callable[..., Any]) -> dict[str, Any]:
    """Kind, position and default of each parameter."""
    found: dict[str, Any] = {}
    factories = {}
    if dataclasses.is_dataclass(value):
        factories = {f.name: f.default_factory for f in dataclasses.fields(value)}
    if getattr(value, "__init__", None) is _of_protocols:
        return found  # which is put in place when the class is first called
    signature = inspect.signature(value)
    given = [p for p in signature.parameters.values() if p.name != "self"]
    for position, parameter in enumerate(given):
        default = parameter.default
        if factories.get(parameter.name, dataclasses.MISSING) is not dataclasses.MISSING:
            default = factories[parameter.name]()
        named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_KEYWORD)
        place = None if named else position
        found[parameter.name] = (parameter.kind.name, place, plain(default))
    return found


def plain(default: Any) -> Any:
    """A default that compares equal across libraries: of their own classes the name."""
    if default is None or isinstance(default, bool | int | float | str):
        return default
    if isinstance(default, enum.Enum):
        return default.name
    return default if isinstance(default, type) else type(default).__name__


def at(root: Any, dotted: str) -> Any:
    """The attribute of a dotted name; a field without a default is one of its class too."""
    for part in filter(None, dotted.split(".")):
        annotated = inspect.isclass(root) and any(
            part in vars(base).get("__annotations__", ()) for base in root.__mro__
        )
        found = root if root is MISSING else inspect.getattr_static(root, part, MISSING)
        if found is MISSING and annotated:
            return None
        root = MISSING if found is MISSING else unwrapped(root, part)
    return root


def differences(theirs: Any, library: str, ours: Any) -> list[str]:
    """What `ours` lacks or has otherwise; of what is missing only the outermost name."""
    found: list[str] = []
    missing: list[str] = []
    for name, expected in walk(theirs, library):
        if begins(name, missing):
            continue
        value = at(ours, name)
        if value is MISSING:
            missing.append(name)
            continue
        here = thing(value)
        if {expected.kind, here.kind} in ({"call", "async"}, {"call", "value"}):
            found.append(f"{name}(kind)")
        wrong = [] if expected.parameters is None else unlike(expected.parameters, here.parameters)
        found += [f"{name}({key})" for key in wrong]
    return sorted(missing + found)


def unlike(theirs: Mapping[str, Any], ours: Mapping[str, Any] | None) -> list[str]:
    """Parameters that are missing or otherwise here, and those that only here must be given."""
    ours = ours or {}
    required = inspect.Parameter.empty
    more = [
        key
        for key, (kind, _, default) in ours.items()
        if key not in theirs and default is required and not kind.startswith("VAR")
    ]
    return [key for key in theirs if ours.get(key) != theirs[key]] + more


def begins(name: str, prefixes: Any) -> bool:
    """Whether a name is one of these or lies in one of them."""
    return any(name == p or name.startswith((f"{p}.", f"{p}(")) for p in prefixes)


def judged(found: list[str], allowed: Mapping[str, tuple[str, ...]], pending: Any) -> str:
    """What is wrong with a list of differences; empty if all is well."""
    listed = [name for names in allowed.values() for name in names]
    new = [name for name in found if name not in listed and not begins(name, pending)]
    gone = [name for name in listed if name not in found and not begins(name, pending)]
    twice = sorted({name for name in listed if listed.count(name) > 1})
    lines = [f"    {name!r},  # differs, and no reason is given" for name in new]
    lines += [f"    {name!r},  # listed, but no difference any more" for name in gone]
    lines += [f"    {name!r},  # listed twice" for name in twice]
    return "\n".join(lines)


def table() -> str:
    """The differences and their reasons, as docs/orbax.md has them."""
    rows = [
        f"| {', '.join(f'`{name}`' for name in names)} | {why} |" for why, names in ALLOWED.items()
    ]
    return "\n".join(["| Orbax v1 has | why it is not the same here |", "|---|---|", *rows])


DOCS = Path(__file__).parents[2] / "docs/orbax.md"
BEGIN, END = "<!-- differences: from tests/compat/test_surface.py -->\n", "\n<!-- end -->"


def documented(text: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}{table()}{END}{rest.partition(END)[2]}"


def test_orbaxs_public_names_are_ours() -> None:
    wrong = judged(differences(ocp, "orbax", fc), ALLOWED, PENDING)
    assert not wrong, f"compared with Orbax v1:\n{wrong}"


def test_the_page_for_those_who_come_has_the_list() -> None:
    again = "run `python -m tests.compat.test_surface`, which writes it"
    assert DOCS.read_text() == documented(DOCS.read_text()), again


# The comparison itself, on libraries made up for the purpose.


class Mode(enum.Enum):
    ON = 1
    OFF = 2


def library(**names: Any) -> Any:
    """A package with empty modules and these names in it."""
    root = types.ModuleType("made_up")
    for dotted in filter(None, MODULES):
        parent, _, last = dotted.rpartition(".")
        setattr(at(root, parent), last, types.ModuleType(dotted))
    for name, value in names.items():
        setattr(root, name, value)
    return root


def klass(source: str) -> Any:
    """The class `C` of a source text."""
    scope: dict[str, Any] = {"__name__": __name__, "dataclasses": dataclasses, "Mode": Mode}
    exec(source, scope)
    scope["C"].__module__ = "made_up"
    return scope["C"]


@pytest.mark.parametrize(
    ("theirs", "ours", "expected"),
    [
        (lambda a, *, b=1: 0, lambda a, *, b=1: 0, []),
        (lambda a: 0, lambda a, extra=None: 0, []),
        (lambda a, b: 0, lambda b, a: 0, ["f(a)", "f(b)"]),
        (lambda a: 0, lambda *, a: 0, ["f(a)"]),
        (lambda a=1: 0, lambda a=2: 0, ["f(a)"]),
        (lambda a=1: 0, lambda a: 0, ["f(a)"]),
        (lambda a: 0, lambda: 0, ["f(a)"]),
        (lambda: 0, lambda a: 0, ["f(a)"]),
        (lambda: 0, 3, ["f(kind)"]),
        (lambda a=Mode.ON: 0, lambda a=Mode.OFF: 0, ["f(a)"]),
    ],
)
def test_parameters_are_compared(theirs: Any, ours: Any, expected: list[str]) -> None:
    assert differences(library(f=theirs), "made_up", library(f=ours)) == expected


INIT = " def __init__(self, a=1): ...\n"
RUN = " async def run(self, b): ...\n"


@pytest.mark.parametrize(
    ("ours", "expected"),
    [
        (f"class C:\n{INIT}{RUN} x = property()", []),
        (f"class C:\n{INIT}{RUN} x: int", []),
        (f"class C:\n{RUN} x = property()", ["C(a)"]),
        (f"class C:\n{INIT} x = property()\n def run(self, b): ...", ["C.run(kind)"]),
        (f"class C:\n{INIT} x = property()\n async def run(self): ...", ["C.run(b)"]),
        (f"class C:\n{INIT} x = property()", ["C.run"]),
        (f"@dataclasses.dataclass\nclass C:\n a: int = 1\n{RUN}", ["C.x"]),
        ("class C: ...", ["C(a)", "C.run", "C.x"]),
    ],
)
def test_classes_are_compared(ours: str, expected: list[str]) -> None:
    theirs = library(C=klass(f"class C:\n{INIT}{RUN} x = property()"))
    assert differences(theirs, "made_up", library(C=klass(ours))) == expected


def test_fields_and_enums_are_compared() -> None:
    field = "@dataclasses.dataclass\nclass C:\n a: list = dataclasses.field(default_factory={})"
    theirs, ours = klass(field.format("list")), klass(field.format("dict"))
    assert differences(library(C=theirs), "made_up", library(C=theirs)) == []
    assert differences(library(C=theirs), "made_up", library(C=ours)) == ["C(a)"]
    more = enum.Enum("C", ["ON", "OFF"], module="made_up")
    assert differences(library(C=more), "made_up", library(C=more)) == []
    less = enum.Enum("C", ["ON"], module="made_up")
    assert differences(library(C=more), "made_up", library(C=less)) == ["C.OFF"]


def test_a_missing_class_is_one_difference() -> None:
    theirs = library(C=klass("class C:\n def run(self, a): ...\n class D: ..."))
    assert differences(theirs, "made_up", library()) == ["C"]
    assert differences(library(), "made_up", types.ModuleType("empty"))[:2] == ["arrays", "errors"]


def test_the_list_may_neither_lack_nor_keep_anything() -> None:
    assert judged(["a", "b(c)"], {"why": ("a", "b(c)")}, ()) == ""
    assert judged(["a", "tree.b"], {"why": ("a",)}, ("tree",)) == ""
    assert "'b(c)',  # differs" in judged(["a", "b(c)"], {"why": ("a",)}, ())
    assert "'a',  # listed, but no difference" in judged([], {"why": ("a",)}, ())
    assert "'a',  # listed twice" in judged(["a"], {"why": ("a",), "more": ("a",)}, ())


if __name__ == "__main__":
    DOCS.write_text(documented(DOCS.read_text()))
