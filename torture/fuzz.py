"""Any bytes at all, given to each parser: it answers, or raises an error of this package.

A target is a parser with what its callers do with the result. What stands in a frame with a
checksum is put into one first: who crafts a file does that too. `campaign` needs atheris (extra
`torture`, Linux), which looks for inputs that reach new code; it begins with `tests/corpus/`. The
tests need it not: they replay the corpus, and :func:`mutations` of it.
"""

from __future__ import annotations

import contextlib
import random
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import crc32c

from torture.outcome import Outcome

CORPUS = Path(__file__).resolve().parents[1] / "tests" / "corpus"
MINUTES = 30
SECONDS, MEGABYTES = 5, 200  # for one input
_PROCESS = 4000  # MB: what traces comparisons keeps the arrays that they make, some KB a run


def campaign(scale: float, seed: int) -> list[Outcome]:
    """Half an hour of fuzzing at scale 1, in a process for each target."""
    outcomes = list[Outcome]()
    for name in TARGETS:
        outcome = Outcome(f"fuzzing `{name}`")
        seconds = max(2, round(60 * MINUTES * scale / len(TARGETS)))
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            found = _fuzz(name, folder, seconds, seed)
            outcome.runs = int((re.findall(r"executed_units: *(\d+)", found.stderr) or [0])[-1])
            outcome.notes["seconds"] = seconds
            for left in sorted(Path(folder).glob("finding-*")):
                outcome.wrong.append(f"{left.read_bytes()[:200]!r}: {found.stderr[-800:]}")
            if found.returncode and not outcome.wrong:
                outcome.wrong.append(f"the process ended with {found.returncode}: {found.stderr}")
        outcomes.append(outcome)
    return outcomes


def _fuzz(name: str, folder: str, seconds: int, seed: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torture.fuzz", name, f"{folder}/new", str(CORPUS / name)]
    Path(folder, "new").mkdir(exist_ok=True)
    limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={_PROCESS}", "-max_len=4096"]
    rest = [f"-max_total_time={seconds}", f"-seed={seed % (1 << 31) or 1}", "-print_final_stats=1"]
    return subprocess.run(
        [*command, *limits, *rest, f"-artifact_prefix={folder}/finding-"],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def replay(name: str, data: bytes) -> None:
    """Gives bytes to a target; what it raises, but for errors of this package, is a finding."""
    from flax_ckpt.errors import FlaxCkptError

    with contextlib.suppress(FlaxCkptError):
        TARGETS[name](data)


def mutations(data: bytes, count: int, rng: random.Random) -> Iterator[bytes]:
    """Variants of a file: bytes changed, cut out, doubled, or replaced by awkward ones."""
    awkward = (
        b"\0",
        b"\xff",
        b"\x80" * 10,
        b"[",
        b'"',
        b"-1",
        b"1e999",
        b"null",
        b"{}",
        b"\\ud800",
    )
    for _ in range(count):
        made = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(made) + 1)
            end = min(at + rng.randrange(12), len(made))
            choice = rng.randrange(4)
            if choice == 0 and at < len(made):
                made[at] ^= 1 << rng.randrange(8)
            elif choice == 1:
                made[at:end] = rng.choice(awkward)
            elif choice == 2:
                made[at:at] = made[at:end]
            else:
                del made[at:end]
        yield bytes(made)


def _manifest(data: bytes) -> None:
    from flax_ckpt.format import ocdbt, wire

    ocdbt.decode_manifest(wire.encode_frame(ocdbt.MANIFEST_MAGIC, data), what="file")


def _frame(data: bytes) -> None:
    from flax_ckpt.format import ocdbt, wire

    ocdbt.decode_manifest(wire.with_crc(data), what="file")


def _node(data: bytes) -> None:
    """A node, that is all children of itself as well."""
    from flax_ckpt.format import ocdbt, wire

    frame = wire.encode_frame(ocdbt.NODE_MAGIC, data)
    root = ocdbt.NodeRef(data[0] if data else 0, "d/0", 0, len(frame))
    _, _, keys, _ = ocdbt._open_node(frame, root)
    root = root._replace(counts=(len(keys), 0, 0))
    ocdbt.read_tree(root, lambda file, offset, length: frame)


def _table(data: bytes) -> None:
    from flax_ckpt.format import ocdbt, wire

    ocdbt.decode_table(wire.with_crc(data), [b"a", b"b"])


def _metadata(data: bytes) -> None:
    from flax_ckpt.format import tree

    found = tree.TreeMetadata.from_bytes(data, "file")
    leaves = [(entry.path, 0) for entry in found.entries]
    [tree.name_of(path).encode() for path, _ in leaves]
    tree.build(leaves, "file")


def _sharding(data: bytes) -> None:
    from flax_ckpt.format import tree
    from flax_ckpt.leaves import array

    for text in tree.decode_shardings(data, "file").values():
        array._saved_placement(text, (2, 3))


def _integrity(data: bytes) -> None:
    from flax_ckpt.format.checkpoint import Integrity

    Integrity.from_bytes(data + b"\n" + f'"{crc32c.crc32c(data):08x}"\n'.encode(), "file")


def _root(data: bytes) -> None:
    from flax_ckpt import _metadata
    from flax_ckpt.format.checkpoint import RootMetadata

    found = RootMetadata.from_bytes(data, "file")
    for nsecs in (found.init_timestamp_nsecs, found.commit_timestamp_nsecs):
        _metadata._datetime(nsecs)


def _zarr(data: bytes, *, zarr3: bool) -> None:
    from flax_ckpt.format import arrays

    found = arrays.parse(data, zarr3=zarr3)
    assert found.encoding is None or found.encoding.zarr3 == zarr3


def _array_metadatas(data: bytes) -> None:
    from flax_ckpt.format import tree

    tree.decode_key_impls(data, "file")
    tree.decode_array_metadatas(data, "file")


def _strings(data: bytes) -> None:
    from flax_ckpt.format import tree

    tree.decode_strings(data, ["name", "a/b"], "file")


def _deletion(data: bytes) -> None:
    from flax_ckpt.format.checkpoint import DeletionRecord

    DeletionRecord.from_bytes(data, "file")


def _position(data: bytes) -> None:
    from flax_ckpt.format import position

    position.decode(data, "file")


def _config(data: bytes) -> None:
    from flax_ckpt.adapters import config
    from flax_ckpt.format import protos

    message = protos.text_to_message(data.decode(errors="replace"))
    config.from_message(message)
    config.provenance_of(message)


TARGETS: dict[str, Callable[[bytes], None]] = {
    "manifest": _manifest,
    "frame": _frame,
    "node": _node,
    "table": _table,
    "metadata": _metadata,
    "sharding": _sharding,
    "integrity": _integrity,
    "root": _root,
    "zarr3": lambda data: _zarr(data, zarr3=True),
    "zarr2": lambda data: _zarr(data, zarr3=False),
    "array_metadatas": _array_metadatas,
    "strings": _strings,
    "deletion": _deletion,
    "position": _position,
    "config": _config,
}


def _main(name: str, *arguments: str) -> None:
    import atheris
    import jax
    import ml_collections  # noqa: F401 - before what is instrumented, which is ours alone

    jax.devices()
    with atheris.instrument_imports(include=["flax_ckpt"]):
        import flax_ckpt  # noqa: F401

    def one(data: bytes) -> None:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        replay(name, data)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
        if grown > MEGABYTES:
            raise MemoryError(f"{grown} MB for {len(data)} bytes")

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


if __name__ == "__main__":
    _main(*sys.argv[1:])
