"""The benchmark runs: its numbers are not judged here."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.measure import MEASURES, parts
from benchmarks.subjects import SUBJECTS

ROOT = Path(__file__).resolve().parents[1]


def test_a_quick_run_has_all_subjects_and_measures(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    table = tmp_path / "report.md"
    table.write_text("before\n")
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--rounds", "1"]
    command += ["--cases", "small", "--json", str(report), "--markdown", str(table)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert child.returncode == 0, child.stdout + child.stderr

    case = json.loads(report.read_text())["cases"]["small"]
    assert case["rounds"].keys() == SUBJECTS.keys() == case["summary"].keys()
    for subject, rounds in case["rounds"].items():
        assert list(rounds) == [m for part in parts(subject) for m in MEASURES[part]]
        assert all(len(values) == 1 for values in rounds.values())
    text = table.read_text()
    assert text.startswith("before\n")
    assert "| Orbax |" in text
