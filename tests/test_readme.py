"""The code in the README runs as it stands there."""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def test_the_readme_trains_restores_and_lets_orbax_read(tmp_path: Path, run_child: Any):
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    program = "\n".join(blocks).replace("/tmp/run", str(tmp_path / "run"))
    program += "\nprint(int(state.step), sorted(step))\n"
    done = run_child(program)
    assert done.stdout.strip() == "500 ['opt_state', 'params', 'train_state']"
    assert {path.name for path in (tmp_path / "run/checkpoints").iterdir()} == {"300", "400", "500"}
