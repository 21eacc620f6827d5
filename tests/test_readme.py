"""The code in the README runs as it stands there."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def test_the_readme_trains_restores_and_lets_orbax_read(tmp_path: Path, run_child: Any):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 5
    program = "\n".join(blocks).replace("/tmp/run", str(tmp_path / "run"))
    program += "\nprint(int(state.step), sorted(step))\n"
    done = run_child(program)
    *report, last = done.stdout.splitlines()
    assert last == "500 ['opt_state', 'params', 'train_state']"
    assert [line.split()[:2] for line in report[2:4]] == [["loaded", "2"], ["kept", "2"]]
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"300", "400", "500"}


def test_the_readme_lists_every_example_and_notebook():
    text = (ROOT / "README.md").read_text()
    programs = [*(ROOT / "examples").glob("*.py"), *(ROOT / "notebooks").glob("*.ipynb")]
    assert [path.name for path in programs if f"({path.relative_to(ROOT)})" not in text] == []


def test_every_link_of_the_readme_leads_somewhere():
    links = re.findall(r"\]\((?!https:)([^)]+)\)", (ROOT / "README.md").read_text())
    assert [link for link in links if not (ROOT / link).exists()] == []
