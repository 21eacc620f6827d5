"""The notebooks' code runs, cell after cell, and none is committed with outputs."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def cells(notebook: Path) -> list[Any]:
    return [c for c in json.loads(notebook.read_text())["cells"] if c["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_has_no_outputs(notebook: Path, run_child: Any) -> None:
    install, *code = ["".join(cell["source"]) for cell in cells(notebook)]
    assert install.startswith("%pip install")
    done = run_child("\n".join(code))
    assert done.stdout
    assert all(cell["outputs"] == [] for cell in cells(notebook))


def test_there_is_a_notebook() -> None:
    assert [path.name for path in NOTEBOOKS] == ["quickstart.ipynb"]
