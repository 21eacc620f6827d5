"""The import directions, the forbidden imports and the sizes of the package's modules.

The rules read source text and import nothing, so they hold for code that no test runs. A broken
rule prints one line per place, as `file:line: what is wrong`.

To add a room, put its name into `TIERS`; to load another library on demand, into `ON_DEMAND`.
"""

from __future__ import annotations

import ast
import graphlib
import importlib.util
import io
import tokenize
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "flax_ckpt"
ROOT = Path(__file__).resolve().parents[1]

# A room imports from its own tier and from those above it in this list, never from one below.
TIERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("_async", "format", "options"),
    ("storage",),
    ("leaves",),
    ("context",),
    ("handlers",),
    ("arrays", "multihost", "tree"),  # public names of the rooms above
    ("interop",),
    ("_save", "_load", "_metadata", "partial"),
    ("training",),
    ("path",),
    ("inspection",),
    ("cli", "__main__"),
    ("testing",),
)
RANK = {room: rank for rank, tier in enumerate(TIERS) for room in tier}
FREE_FUNCTIONS = RANK["_save"]  # also every other `_name.py` at the top of the package

# `adapters` stands beside the tiers: it knows the user's objects and nothing of checkpoints.
ADAPTERS = "adapters"
ADAPTERS_IMPORT = frozenset({"errors", "format", ADAPTERS})
IMPORT_ADAPTERS = frozenset({"training", "testing", ADAPTERS})

# Loaded when a value of theirs is met, so that `import flax_ckpt` stays light.
ON_DEMAND = frozenset({"absl", "flax", "grain", "ml_collections", "safetensors"})

FORBIDDEN = {
    "orbax": "the engine does not import its peer",
    "pickle": "a checkpoint never runs code",
    "cloudpickle": "a checkpoint never runs code",
    "dill": "a checkpoint never runs code",
    "marshal": "a checkpoint never runs code",
    "shelve": "a checkpoint never runs code",
}
FORBIDDEN_CALLS = frozenset({"__import__", "compile", "eval", "exec"})

MAX_MODULE_LINES = 400
MAX_PACKAGE_CODE = 8_250  # without blank lines, comments and docstrings


@dataclass(frozen=True)
class Import:
    """One imported module, as `import` and `from … import` name it."""

    line: int
    module: str
    in_function: bool
    for_types: bool  # under `if TYPE_CHECKING:`


def imports(source: str, module: str, modules: frozenset[str]) -> Iterator[Import]:
    """Yields the imports of `module`, wherever in its source they stand.

    `from package import name` is an import of `package.name` if that is one of `modules`.
    """

    def visit(node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name, in_function, for_types)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, modules)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                name = full if full in modules else base
                yield Import(node.lineno, name, in_function, for_types)
        elif isinstance(node, ast.If) and _is_type_checking(node.test):
            for child in node.body:
                yield from visit(child, in_function, True)
            for child in node.orelse:
                yield from visit(child, in_function, for_types)
        else:
            inside = in_function or isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
            )
            for child in ast.iter_child_nodes(node):
                yield from visit(child, inside, for_types)

    yield from visit(ast.parse(source), False, False)


def _absolute(node: ast.ImportFrom, module: str, modules: frozenset[str]) -> str:
    if not node.level:
        return node.module or ""
    is_package = any(other.startswith(module + ".") for other in modules)
    package = module if is_package else module.rpartition(".")[0]
    return importlib.util.resolve_name("." * node.level + (node.module or ""), package)


def _is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def room_of(module: str) -> str:
    """Returns the room of a module of the package; the package itself is the room `""`."""
    return module.split(".")[1] if "." in module else ""


def rank_of(room: str) -> int | None:
    """Returns the tier of a room, or None if the room is not known."""
    if room.startswith("_") and room not in RANK:
        return FREE_FUNCTIONS
    return RANK.get(room)


def _wrong_direction(importer: str, imported: str) -> str | None:
    """Says why the room `importer` may not import the room `imported`, or returns None."""
    if importer == "":
        return None  # the public names come from everywhere
    if imported == "":
        return f"{importer} imports {PACKAGE} itself; import the module that has the name"
    for room in (importer, imported):
        if room != ADAPTERS and rank_of(room) is None:
            return f"{room} is in no tier; add it to TIERS in tests/test_layers.py"
    if importer == ADAPTERS:
        if imported not in ADAPTERS_IMPORT:
            return f"adapters imports {imported}; it may import only errors and format"
    elif imported == ADAPTERS:
        if importer not in IMPORT_ADAPTERS:
            return f"{importer} imports adapters; only training may"
    elif rank_of(importer) < rank_of(imported):
        return f"{importer} imports {imported}, which lies above it"
    return None


def broken_directions(sources: Mapping[str, str]) -> list[str]:
    """Checks the imports between the modules of the package.

    Args:
        sources: source text by dotted module name.

    Returns:
        One line for each import that a rule forbids, and one for an import cycle.
    """
    modules = frozenset(sources)
    found: list[str] = []
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        ours = [
            imported
            for imported in imports(source, module, modules)
            if imported.module.split(".")[0] == PACKAGE
        ]
        graph[module] = {imported.module for imported in ours}
        for imported in ours:
            where = _where(module, imported.line, modules)
            wrong = _wrong_direction(room_of(module), room_of(imported.module))
            if wrong:
                found.append(f"{where}: {wrong}")
            elif imported.in_function:
                found.append(f"{where}: import of {imported.module} inside a function")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        cycle = " -> ".join(reversed(error.args[1]))
        found.append(f"{_where(error.args[1][0], 1, modules)}: import cycle {cycle}")
    return found


def broken_imports(sources: Mapping[str, str]) -> list[str]:
    """Checks what the modules import from other packages, and the calls that could load code."""
    modules = frozenset(sources)
    found: list[str] = []
    for module, source in sources.items():
        for imported in imports(source, module, modules):
            library = imported.module.split(".")[0]
            where = _where(module, imported.line, modules)
            if library in FORBIDDEN:
                found.append(f"{where}: import of {imported.module}: {FORBIDDEN[library]}")
            elif library == PACKAGE or imported.for_types:
                continue
            elif imported.in_function and library not in ON_DEMAND:
                found.append(f"{where}: import of {imported.module} inside a function")
            elif not imported.in_function and library in ON_DEMAND:
                found.append(
                    f"{where}: import of {imported.module} at the top of the module; "
                    f"import it in the function that meets a value of it"
                )
        for node in ast.walk(ast.parse(source)):
            wrong = _forbidden_call(node) if isinstance(node, ast.Call) else None
            if wrong:
                found.append(f"{_where(module, node.lineno, modules)}: {wrong}")
    return found


def _forbidden_call(call: ast.Call) -> str | None:
    if isinstance(call.func, ast.Name) and call.func.id in FORBIDDEN_CALLS:
        return f"call of {call.func.id}"
    if ast.unparse(call.func).rpartition(".")[2] == "import_module" and not (
        call.args
        and isinstance(call.args[0], ast.Constant)
        and str(call.args[0].value).split(".")[0] in ON_DEMAND
    ):
        return "import_module of a name that is not a literal from ON_DEMAND"
    for keyword in call.keywords:
        if keyword.arg == "allow_pickle" and ast.unparse(keyword.value) != "False":
            return "allow_pickle: a checkpoint never runs code"
    return None


def broken_sizes(sources: Mapping[str, str]) -> list[str]:
    """Checks the number of lines of each module and of the package."""
    modules = frozenset(sources)
    lines = {module: source.count("\n") for module, source in sources.items()}
    found = [
        f"{_where(module, count, modules)}: {count} lines, the limit is {MAX_MODULE_LINES - 1}; "
        f"a second noun hides in there"
        for module, count in lines.items()
        if count >= MAX_MODULE_LINES
    ]
    total = sum(map(code_lines, sources.values()))
    if total >= MAX_PACKAGE_CODE:
        found.append(f"{PACKAGE}: {total} lines of code, the limit is {MAX_PACKAGE_CODE - 1}")
    return found


def code_lines(source: str) -> int:
    """Counts the lines of a module that are neither blank, nor comment, nor docstring."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            lines -= set(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return len(lines)


def _where(module: str, line: int, modules: frozenset[str]) -> str:
    is_package = any(other.startswith(module + ".") for other in modules)
    return f"{module.replace('.', '/')}{'/__init__' if is_package else ''}.py:{line}"


def package_sources() -> dict[str, str]:
    """Returns the source of every module of the package by its dotted name."""
    sources: dict[str, str] = {}
    for file in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = file.read_text(encoding="utf-8")
    return sources


def report(broken: list[str]) -> str:
    return "\n" + "\n".join(broken)


# The package.


def test_the_sources_are_found() -> None:
    assert f"{PACKAGE}.errors" in package_sources()


def test_imports_go_one_way() -> None:
    broken = broken_directions(package_sources())
    assert not broken, report(broken)


def test_other_packages_are_imported_where_and_if_allowed() -> None:
    broken = broken_imports(package_sources())
    assert not broken, report(broken)


def test_modules_and_the_package_stay_small() -> None:
    broken = broken_sizes(package_sources())
    assert not broken, report(broken)


# The rules themselves, on packages made up for the purpose.


EMPTY_ROOMS = dict.fromkeys([*RANK, ADAPTERS, "format__names", "storage__files"], "")


def check(rule: Callable[[Mapping[str, str]], list[str]], **modules: str) -> list[str]:
    """Applies a rule to a package of the given modules; `a__b` is the module `a.b`."""
    named = {
        f"{PACKAGE}.{name.replace('__', '.')}": text
        for name, text in {**EMPTY_ROOMS, **modules}.items()
    }
    return rule({PACKAGE: "", **named})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("storage", "from flax_ckpt import errors"),
        ("storage", "from flax_ckpt.format import names"),
        ("storage", "from flax_ckpt.format.names import STATE"),
        ("storage", "import flax_ckpt.format.names"),
        ("format__tree", "from flax_ckpt.format import names"),
        ("format__tree", "from . import names"),
        ("_load", "from flax_ckpt import _metadata"),
        ("_metadata", "from flax_ckpt.handlers import base"),
        ("adapters__linen", "from flax_ckpt.format import names"),
        ("training", "from flax_ckpt.adapters import linen"),
        ("cli", "from flax_ckpt import inspection"),
    ],
)
def test_downward_imports_are_allowed(module: str, source: str) -> None:
    assert check(broken_directions, **{module: source}) == []


@pytest.mark.parametrize(
    ("module", "source", "line"),
    [
        ("errors", "from flax_ckpt import options", "errors.py:1: errors imports options"),
        (
            "format",
            "from flax_ckpt.storage import files",
            "format/__init__.py:1: format imports storage",
        ),
        ("format__tree", "from ..storage import files", "format/tree.py:1: format imports storage"),
        ("_async", "from flax_ckpt import storage", "_async.py:1: _async imports storage"),
        ("handlers", "from flax_ckpt import _save", "handlers.py:1: handlers imports _save"),
        ("leaves", "import flax_ckpt.handlers", "leaves.py:1: leaves imports handlers"),
        ("_extra", "from flax_ckpt import training", "_extra.py:1: _extra imports training"),
        ("inspection", "from flax_ckpt import cli", "inspection.py:1: inspection imports cli"),
        ("adapters", "from flax_ckpt import storage", "adapters.py:1: adapters imports storage"),
        ("_load", "from flax_ckpt import adapters", "_load.py:1: _load imports adapters"),
        ("leaves", "from flax_ckpt import Context", "leaves.py:1: leaves imports flax_ckpt itself"),
        ("leaves", "import flax_ckpt", "leaves.py:1: leaves imports flax_ckpt itself"),
        ("attic", "from flax_ckpt import errors", "attic.py:1: attic is in no tier"),
        (
            "format",
            "if TYPE_CHECKING:\n    from flax_ckpt import storage",
            "format/__init__.py:2: format imports storage",
        ),
        (
            "format",
            "try:\n    pass\nexcept ImportError:\n    from flax_ckpt import storage",
            "format/__init__.py:4: format imports storage",
        ),
        (
            "format",
            "class A:\n    async def f():\n        from flax_ckpt import storage",
            "format/__init__.py:3: format imports storage",
        ),
        (
            "training",
            "def f():\n    from flax_ckpt import _save",
            "training.py:2: import of flax_ckpt._save inside a function",
        ),
    ],
)
def test_other_imports_within_the_package_are_found(module: str, source: str, line: str) -> None:
    (found,) = check(broken_directions, **{module: source})
    assert found.startswith(f"flax_ckpt/{line}")


def test_a_cycle_within_a_room_is_found() -> None:
    (found,) = check(
        broken_directions,
        format__tree="from flax_ckpt.format import arrays",
        format__arrays="from flax_ckpt.format import tree",
    )
    assert "import cycle" in found
    assert "flax_ckpt.format.tree -> flax_ckpt.format.arrays" in found


@pytest.mark.parametrize(
    "source",
    [
        "import jax\nimport numpy as np",
        "def f():\n    import flax.linen as nn",
        "def f():\n    from ml_collections import ConfigDict",
        "if TYPE_CHECKING:\n    from flax import nnx",
        "import re\nPATTERN = re.compile('a')",
        "def f():\n    importlib.import_module('flax.nnx')",
        "np.load(path, allow_pickle=False)",
    ],
)
def test_allowed_imports_of_other_packages(source: str) -> None:
    assert check(broken_imports, leaves=source) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("import orbax.checkpoint", "1: import of orbax.checkpoint"),
        ("if TYPE_CHECKING:\n    from orbax import checkpoint", "2: import of orbax"),
        ("def f():\n    import pickle", "2: import of pickle"),
        ("from marshal import loads", "1: import of marshal"),
        ("import dill as d", "1: import of dill"),
        ("import flax.linen as nn", "1: import of flax.linen at the top"),
        ("def f():\n    import numpy", "2: import of numpy inside a function"),
        ("f = lambda: eval('1')", "1: call of eval"),
        ("exec(text)", "1: call of exec"),
        ("__import__(name)", "1: call of __import__"),
        ("x = 1\nimportlib.import_module(name)", "2: import_module"),
        ("import_module('os')", "1: import_module"),
        ("np.load(path, allow_pickle=True)", "1: allow_pickle"),
    ],
)
def test_other_imports_and_calls_are_found(source: str, message: str) -> None:
    (found,) = check(broken_imports, leaves=source)
    assert found.startswith(f"flax_ckpt/leaves.py:{message}")


def test_a_long_module_is_found() -> None:
    text = "x = 1\n" * MAX_MODULE_LINES
    (found,) = check(broken_sizes, leaves__array=text)
    assert found.startswith("flax_ckpt/leaves/array.py:400: 400 lines, the limit is 399")


def test_a_long_package_is_found() -> None:
    text = "x = 1\n" * (MAX_MODULE_LINES - 1)
    (found,) = check(broken_sizes, **{f"leaves__m{i}": text for i in range(21)})
    assert found == f"flax_ckpt: 8379 lines of code, the limit is {MAX_PACKAGE_CODE - 1}"
