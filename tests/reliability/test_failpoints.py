"""Points at which a change of the file system fails or ends the process: a sample; the rules."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import flax_ckpt
from torture import failpoints

SEED = 21
PACKAGE = Path(flax_ckpt.__file__).parent
CHANGES = {
    *("mkdir", "makedirs", "rename", "renames", "replace", "link", "symlink", "unlink", "remove"),
    *("rmdir", "removedirs", "chmod", "chown", "utime", "truncate", "ftruncate", "mkfifo", "fsync"),
    *("fdatasync", "write", "writev", "pwrite", "pwritev", "open", "rmtree", "move", "copy"),
    *("copy2", "copyfile", "copytree", "write_text", "write_bytes"),
}


def test_old_or_new_state_at_each_point() -> None:
    for outcome in failpoints.campaign(0.02, SEED):
        assert not outcome.wrong, f"seed {SEED}: {outcome.wrong}"
        assert outcome.runs >= 10


def _changes(source: str) -> Iterator[int]:
    """Lines that change the file system by themselves."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            if node.func.value.id in ("os", "shutil") and node.func.attr in CHANGES:
                yield node.lineno
        elif isinstance(node.func, ast.Name) and node.func.id == "open":
            mode = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "mode")]
            if any(set(ast.literal_eval(m)) & set("wxa+") for m in mode):
                yield node.lineno


def test_all_changes_of_the_file_system_are_made_in_one_module() -> None:
    found = {
        f"{file.relative_to(PACKAGE)}:{line}"
        for file in PACKAGE.rglob("*.py")
        for line in _changes(file.read_text())
    }
    elsewhere = {place for place in found if not place.startswith("storage/files.py")}
    assert not elsewhere
    assert len(found) > 8


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("os.rename(a, b)", True),
        ("shutil.rmtree(a)", True),
        ("open(a, mode='wb')", True),
        ("open(a)", False),
        ("files.rename(a, b)", False),
    ],
)
def test_the_rule(line: str, found: bool) -> None:
    assert list(_changes(line)) == [1] * found


PROGRAM = """
    import sys
    import numpy as np
    import flax_ckpt as fc
    for n in range(2):
        fc.save(f"{sys.argv[1]}/{n}", {"w": np.ones(3)})
"""


@pytest.mark.parametrize("action", ["raise", "kill"])
def test_the_variable(
    tmp_path: Path, run_child: Any, action: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAX_CKPT_FAILPOINT", f"commit.rename:before={action}@4")
    done = run_child(PROGRAM, tmp_path, check=False)
    if action == "kill":
        assert done.returncode == -9
    else:
        assert "OSError: [Errno 5] failpoint commit.rename:before: '/" in done.stderr
    assert [path.name for path in sorted(tmp_path.iterdir())][:1] == ["0"]
    assert not (tmp_path / "1").exists()


@pytest.mark.parametrize(
    "wrong", ["commit.rename=kill", "commit.rename:before=explode", "commit.rename:after=kill@x"]
)
def test_a_failpoint_that_makes_no_sense_is_refused(run_child: Any, monkeypatch: Any, wrong: str):
    monkeypatch.setenv("FLAX_CKPT_FAILPOINT", wrong)
    done = run_child("import flax_ckpt", check=False)
    said = f"FLAX_CKPT_FAILPOINT is like 'commit.rename:before=kill@2', got {wrong!r}"
    assert said in done.stderr
