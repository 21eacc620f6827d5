"""The notebooks run as Jupyter runs them, and none is committed with outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
EXECUTE = """
    import sys
    import nbclient
    import nbformat

    notebook = nbformat.read(sys.argv[1], as_version=4)
    nbclient.NotebookClient(notebook, timeout=100).execute()
    nbformat.write(notebook, sys.argv[2])
"""
SHOWN = {
    "quickstart": ["restored step 100 ", "loaded            8     56 B", "loss 0.00"],
    "finetune_and_inspect": [
        "encoder/Dense_1/kernel (64, 64) float32",
        "renamed           4 ",
        "does not fit the wanted tree",
        "start at step 0\n",
        "start at step 100\n",
        "this callback was replaced by a later one",
        "the encoder is unchanged: True",
    ],
}


def code_cells(notebook: Path) -> list[Any]:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def test_there_are_these_notebooks() -> None:
    assert {path.stem for path in NOTEBOOKS} == set(SHOWN)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_executed(
    notebook: Path, tmp_path: Path, run_child: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # what the first cell installs is there already
    for directory in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        monkeypatch.setenv(directory, str(tmp_path / directory))
    run_child(EXECUTE, notebook, executed := tmp_path / "executed.ipynb")
    outputs = [output for cell in code_cells(executed) for output in cell["outputs"]]
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert [shown for shown in SHOWN[notebook.stem] if shown not in text] == []
    assert "ERROR" not in text


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_installs_first_and_has_no_outputs(notebook: Path) -> None:
    cells = code_cells(notebook)
    assert "".join(cells[0]["source"]).startswith("%pip install -q flax-ckpt")
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert all(cell["metadata"] == {} for cell in cells)
