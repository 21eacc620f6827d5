"""Times and memory of saving and loading: flax_ckpt beside Orbax, safetensors and plain files.

    python -m benchmarks.run                      # what `make bench` runs
    python -m benchmarks.run --cases small --rounds 1
    BENCH_DIR=/mnt/other python -m benchmarks.run

In each round every subject has its turn, so that what the machine does meanwhile falls on all of
them; each measurement is a process of its own. The values that were loaded are compared bit for
bit with those saved; a difference ends the benchmark with exit status 1. How the numbers are meant
stands in docs/performance.md.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.measure import MEASURES, parts
from benchmarks.subjects import CASES, QUICK_CASES, SUBJECTS

ROOT = Path(__file__).resolve().parents[1]
BUILD = Path("build")
PACKAGES = ["flax-ckpt", "orbax-checkpoint", "safetensors", "tensorstore", "jax", "numpy"]
ROUNDS = 5

# By case, subject and measure: one number per round.
Results = dict[str, dict[str, report.Rounds]]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cases", default=",".join(CASES), help=f"of {','.join(CASES)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--json", type=Path, default=BUILD / "benchmark.json")
    parser.add_argument(
        "--markdown",
        type=Path,
        help="file whose generated section is replaced; a full run takes docs/performance.md",
    )
    options = parser.parse_args(argv)
    options.cases = options.cases.split(",")
    unknown = [case for case in options.cases if case not in CASES]
    if unknown:
        parser.error(f"unknown cases: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    full = not options.quick and options.cases == list(CASES) and options.rounds >= ROUNDS
    if options.markdown is None and full:
        options.markdown = ROOT / "docs" / "performance.md"
    return options


def main(argv: list[str] | None = None) -> None:
    options = parse(argv)
    load_before = os.getloadavg()[0]
    base = Path(os.environ.get("BENCH_DIR", BUILD))
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="benchmark-", dir=base) as folder:
        results = run_rounds(options, Path(folder).resolve())
        found = describe(options, results, Path(folder).resolve(), load_before)
    print()
    print(report.as_text(found))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwritten: {options.json}")
    if options.markdown:
        report.update_markdown(options.markdown, found)
        print(f"written: {options.markdown}")


def run_rounds(options: argparse.Namespace, folder: Path) -> Results:
    results: Results = {case: {subject: {} for subject in SUBJECTS} for case in options.cases}
    for case in options.cases:
        for number in range(options.rounds):
            for subject in SUBJECTS:
                begin = time.perf_counter()
                values = run_turn(subject, case, folder / subject, quick=options.quick)
                for measure, value in values.items():
                    results[case][subject].setdefault(measure, []).append(value)
                shown = "  ".join(
                    f"{measure} {value:.3f} s"
                    for measure, value in values.items()
                    if measure in report.TIMES and value is not None
                )
                took = time.perf_counter() - begin
                print(
                    f"{case} {number + 1}/{options.rounds}  {subject:<12} {shown}  [{took:.0f} s]",
                    flush=True,
                )
    return results


def run_turn(subject: str, case: str, folder: Path, *, quick: bool) -> dict[str, float | None]:
    """All parts of one subject in one round, each in a new process."""
    folder.mkdir()
    values: dict[str, float | None] = {}
    for part in parts(subject):
        job = {
            "part": part,
            "subject": subject,
            "case": case,
            "folder": str(folder),
            "quick": quick,
        }
        result = run_child(job)
        values |= {measure: result[measure] for measure in MEASURES[part]}
    shutil.rmtree(folder)
    return values


def run_child(job: dict[str, Any]) -> dict[str, float | None]:
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure", json.dumps(job)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    if child.returncode != 0:
        tail = "".join(child.stderr.splitlines(keepends=True)[-20:])
        what = f"{job['subject']}, {job['case']}, {job['part']}"
        sys.exit(f"{tail}\nFAILED: {what} ended with exit status {child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def describe(
    options: argparse.Namespace, results: Results, folder: Path, load_before: float
) -> dict[str, Any]:
    """The whole report: where it was measured, all numbers, and their summary."""
    sizes = QUICK_CASES if options.quick else CASES
    return {
        "environment": {
            "cpus": os.cpu_count(),
            "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "system": f"{platform.system()} {platform.machine()}",
            "file_system": file_system(folder),
            "load_before": load_before,
            "load_after": os.getloadavg()[0],
            "versions": {"Python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "rounds": options.rounds,
        "quick": options.quick,
        "cases": {
            case: {
                "title": sizes[case].title,
                "leaves": sizes[case].leaves,
                "bytes": sizes[case].nbytes,
                "rounds": by_subject,
                "summary": {
                    subject: report.summarise(rounds, by_subject[report.OURS])
                    for subject, rounds in by_subject.items()
                },
            }
            for case, by_subject in results.items()
        },
    }


def file_system(folder: Path) -> str:
    """The kind of file system, e.g. `ext4`; the longest mount point that leads to `folder`."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    above = [m for m in mounts if folder.is_relative_to(m[1].replace("\\040", " "))]
    return max(above, key=lambda m: len(m[1]))[2] if above else "unknown"


if __name__ == "__main__":
    main()
