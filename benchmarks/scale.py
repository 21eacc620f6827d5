"""How the costs of flax_ckpt grow: with the leaves of a tree, and with the steps of a run.

    python -m benchmarks.scale                    # part of `make bench`
    python -m benchmarks.scale --quick

Trees of 1,024 leaves and more, 64 bytes each, so that only the leaves cost. Each measurement is a
process of its own; the table gives the fastest of three, the seconds that the work takes where
nobody interferes. The figures replace a section of docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.measure import wake_memory

ROOT = Path(__file__).resolve().parents[1]
SECTION = "`make bench`, growth"
LEAVES = (12_500, 25_000, 50_000, 100_000, 200_000)
QUICK_LEAVES = (50, 100)
MEASURES = ("save", "save_async blocks", "load", "metadata")
DEPENDENCIES = (
    "jax, jax.experimental.multihost_utils, tensorstore, google.protobuf.text_format"
    ", google.protobuf.descriptor_pb2, google.protobuf.message_factory, etils.epath, msgspec"
    ", zstandard, crc32c, ml_dtypes, numpy.typing, concurrent.futures.thread"
)
ROUNDS = 3
AWAKE = 1 << 29  # more bytes than any of the trees takes

Numbers = dict[str, float]


@contextlib.contextmanager
def timed(found: Numbers, name: str) -> Iterator[None]:
    """Seconds of what is done inside.

    A full garbage collection, 75 ms and more in a process with JAX, is charged to whoever makes it
    necessary: not to what happens to come next.
    """
    gc.collect()
    wake_memory(AWAKE)
    begin = time.perf_counter()
    yield
    found[name] = time.perf_counter() - begin


def measure_tree(leaves: int, folder: Path) -> Numbers:
    import jax
    import numpy as np

    import flax_ckpt as fc

    values = np.random.default_rng(leaves).standard_normal((leaves, 16), np.float32)
    tree = {f"block_{i // 100:04}": {} for i in range(leaves)}
    for i in range(leaves):
        tree[f"block_{i // 100:04}"][f"leaf_{i % 100:02}"] = jax.device_put(values[i])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
    fc.save(folder / "first", {"a": tree["block_0000"]["leaf_00"]})
    fc.load(folder / "first")
    found: Numbers = {}
    with timed(found, "save"):
        fc.save(folder / "saved", tree)
    with timed(found, "save_async blocks"):
        response = fc.save_async(folder / "second", tree)
    response.result()
    del tree
    with timed(found, "metadata"):
        fc.metadata(folder / "saved")
    with timed(found, "load"):
        loaded = jax.block_until_ready(fc.load(folder / "saved", abstract))
    for i in range(0, leaves, 97):
        leaf = loaded[f"block_{i // 100:04}"][f"leaf_{i % 100:02}"]
        if np.asarray(leaf).tobytes() != values[i].tobytes():
            sys.exit(f"leaf {i}: the loaded values differ from those saved")
    return found


def measure_listing(steps: int, folder: Path) -> Numbers:
    import shutil

    import numpy as np

    import flax_ckpt as fc

    with fc.training.Checkpointer(folder / "run") as checkpointer:
        checkpointer.save(0, {"w": np.zeros(4)})
    for step in range(1, steps):
        shutil.copytree(folder / "run" / "0", folder / "run" / str(step))
    seconds: Numbers = {}
    with timed(seconds, "listing"), fc.training.Checkpointer(folder / "run") as checkpointer:
        latest = checkpointer.latest
        found = len(checkpointer.checkpoints)
    if found != steps or latest is None or latest.step != steps - 1:
        sys.exit(f"{found} steps are listed, there are {steps}")
    return seconds


def measure_import(_: int, folder: Path) -> Numbers:
    code = f"import gc, time, {DEPENDENCIES}; gc.collect(); t = time.perf_counter()"
    code += "; import flax_ckpt"
    code += "; print(time.perf_counter() - t)"
    # Compiled before, as an installed package is.
    env = os.environ | {"PYTHONPYCACHEPREFIX": str(folder), "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-c", code]
    for _ in range(2):
        child = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if child.returncode:
            sys.exit(child.stderr)
    return {"import": float(child.stdout)}


KINDS: dict[str, Callable[[int, Path], Numbers]] = {
    "tree": measure_tree,
    "listing": measure_listing,
    "import": measure_import,
}


def fastest(kind: str, size: int, base: Path) -> Numbers:
    """The fastest of some processes, by measure."""
    rounds: list[Numbers] = []
    for _ in range(ROUNDS):
        with tempfile.TemporaryDirectory(prefix="scale-", dir=base) as folder:
            child = subprocess.run(
                [sys.executable, "-m", "benchmarks.scale", "--child", kind, str(size), folder],
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
            )
        if child.returncode:
            sys.exit(f"{child.stderr[-2000:]}\nFAILED: {kind} {size}")
        rounds.append(json.loads(child.stdout.splitlines()[-1]))
    return {measure: min(found[measure] for found in rounds) for measure in rounds[0]}


def as_markdown(trees: dict[int, Numbers], single: dict[str, str]) -> str:
    lines = [f"| leaves | {' | '.join(MEASURES)} |", "|---" * (len(MEASURES) + 1) + "|"]
    for leaves, found in trees.items():
        lines.append(f"| {leaves:,} | {' | '.join(f'{found[m]:.3f} s' for m in MEASURES)} |")
    top = max(max(found.values()) for found in trees.values())
    lines += [
        "",
        "```mermaid",
        "xychart-beta",
        '    title "Seconds by leaves: save, load, metadata"',
    ]
    lines += [f"    x-axis [{', '.join(f'{leaves // 1000}k' for leaves in trees)}]"]
    lines += [f'    y-axis "seconds" 0 --> {top * 1.1:.2f}']
    for name in ("save", "load", "metadata"):
        lines.append(f"    line [{', '.join(f'{found[name]:.3f}' for found in trees.values())}]")
    lines += ["```", "", "| what | seconds |", "|---|---|"]
    return "\n".join([*lines, *(f"| {what} | {seconds} |" for what, seconds in single.items())])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--markdown", type=Path, help="default: docs/performance.md, if not quick")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        kind, size, folder = options.child
        print(json.dumps(KINDS[kind](int(size), Path(folder))), flush=True)
        return
    base = Path(os.environ.get("BENCH_DIR", ROOT / "build"))
    base.mkdir(parents=True, exist_ok=True)
    trees: dict[int, Numbers] = {}
    for leaves in QUICK_LEAVES if options.quick else LEAVES:
        trees[leaves] = fastest("tree", leaves, base)
        print(leaves, {name: round(value, 4) for name, value in trees[leaves].items()}, flush=True)
    described, steps = (100, 20) if options.quick else (20_000, 1000)
    single = {
        f"`metadata()` of {described:,} leaves": ("tree", described, "metadata"),
        f"listing {steps:,} steps, `Checkpointer` opened": ("listing", steps, "listing"),
        "`import flax_ckpt`, its dependencies imported already": ("import", 0, "import"),
    }
    shown = {
        what: f"{fastest(kind, size, base)[measure]:.3f}"
        for what, (kind, size, measure) in single.items()
    }
    for what, seconds in shown.items():
        print(f"{what}: {seconds} s")
    target = options.markdown or (None if options.quick else ROOT / "docs" / "performance.md")
    if target:
        report.replace_section(target, SECTION, as_markdown(trees, shown))
        print(f"written: {target}")


if __name__ == "__main__":
    main()
