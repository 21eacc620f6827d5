"""The code in the documentation runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def code(page: str, tmp_path: Path) -> str:
    """The blocks of a page, as one program that writes to a directory of the test's."""
    text = (ROOT / page).read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    return "\n".join(blocks).replace("/tmp/run", str(tmp_path / "run"))


def test_the_page_for_those_who_come_from_orbax(tmp_path: Path, run_child: Any) -> None:
    run_child(code("docs/orbax.md", tmp_path))


def test_the_guide_to_training(tmp_path: Path, run_child: Any) -> None:
    run_child(code("docs/training.md", tmp_path))


def test_the_page_about_types_of_ones_own(tmp_path: Path, run_child: Any) -> None:
    """Its suites are run by pytest, as a reader would."""
    (tmp_path / "test_page.py").write_text(code("docs/customization.md", tmp_path))
    program = "import sys, pytest; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '.']))"
    done = run_child(program)
    assert "13 passed" in done.stdout
