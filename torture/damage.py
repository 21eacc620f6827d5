"""Bytes of a checkpoint that are not those that were saved: each change is noticed, or harmless.

    python -m torture damage --scale 0.01

A run changes something in a checkpoint with every kind of leaf, loads all of it, and puts it back.
It must give the saved values, or an error of this package that names the leaf, or the file if the
byte is no leaf's. Now and then `verify` is asked as well, and must not call whole what does not
load. The same is done to what Orbax writes by default, and Orbax loads it: how often other values
than were saved come out is in the last column.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import functools
import gc
import itertools
import logging
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from google.protobuf.duration_pb2 import Duration
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import flax_ckpt as fc
from flax_ckpt.errors import FlaxCkptError
from flax_ckpt.format import names
from flax_ckpt.format.ocdbt import ValueRef
from flax_ckpt.storage.database import Database
from flax_ckpt.storage.record import Record
from torture.outcome import Outcome

BLOCK = 4096
EVERY_LENGTH = 10_000  # of longer files, lengths to cut to are drawn
CUTS = 2_000
MIXTURES = 2_000
BITS = 10_000
ORBAX_FLIPS, ORBAX_CUTS, ORBAX_BITS = 2_000, 15, 300
TREES = ("state", "left", "right")
PARTS = (*TREES, "config")
VERIFIED = 25  # one run of so many


def tree_of(seed: int, devices: int) -> dict[str, Any]:
    """Every kind of leaf, about 90 KB; nothing but the values depends on the seed."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Any:
        return rng.normal(size=shape).astype(np.float32)

    def put(values: Any, *spec: str | None) -> Any:
        mesh = Mesh(np.array(jax.devices()[:devices]).reshape(-1, min(2, devices)), ("x", "y"))
        return jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))

    return {
        "jax": jnp.asarray(normal(64, 100)),
        "bf16": jnp.asarray(normal(30, 20), jnp.bfloat16),
        "rank0": jnp.asarray(seed, jnp.int32),
        "sharded": put(normal(64, 128), "x", "y"),
        "replicas": put(normal(16, 8), "x"),
        "numpy": rng.integers(0, 1 << 40, size=2000),
        "bool": rng.integers(0, 2, size=77).astype(bool),
        "key": jax.random.key(seed),
        "keys": jax.random.split(jax.random.key(seed), 3),
        "numbers": [seed, seed / 7, seed % 2 == 0],
        "text": {"string": f"number {seed}", "other": "ü" * 50},
        "empty": {"none": None, "dict": {}, "list": []},
    }


class Rows:
    """A data iterator: where it is."""

    def __init__(self, row: int = -1) -> None:
        self.row = row

    def get_state(self) -> Any:
        return {"row": self.row, "seed": b"seed"}

    def set_state(self, state: Any) -> None:
        self.row = state["row"]


def bits_of(tree: Any) -> Any:
    """Leaves as what they are made of, so that == compares bit for bit."""

    def bits(value: Any) -> Any:
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        if not hasattr(value, "dtype"):
            return type(value).__name__, str(value)
        array = np.asarray(value)
        return array.dtype.str, array.shape, array.tobytes()

    return jax.tree.map(bits, tree)


def save(path: Path, seed: int, devices: int) -> Path:
    parts = {"state": tree_of(seed, devices), "config": Duration(seconds=seed), "data": Rows(seed)}
    fc.save_checkpointables(path, parts | twins(seed), custom_metadata={"seed": seed})
    return path


def twins(seed: int) -> dict[str, Any]:
    """Two trees that differ in nothing but values: their files are of equal size."""
    return {name: {"w": np.arange(8.0) + seed + i} for i, name in enumerate(("left", "right"))}


def load(path: Path) -> Any:
    found = fc.load_checkpointables(path, dict.fromkeys(PARTS) | {"data": Rows()})
    trees = [bits_of(found[name]) for name in TREES]
    return trees, found["config"].seconds, found["data"].row


def expected(seed: int, devices: int) -> Any:
    trees = {"state": tree_of(seed, devices)} | twins(seed)
    return [bits_of(trees[name]) for name in TREES], seed, seed


def load_leaves(wanted: Mapping[str, Any], path: Path) -> Any:
    """Some leaves, with all that describes the tree."""
    context = fc.Context()
    context.pytree.loading.partial_load = True
    with context:
        return bits_of(fc.load(path, wanted))


def load_with_orbax(path: Path) -> Any:
    return bits_of(ocp.load(path))


def files_in(path: Path) -> list[str]:
    return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def values(tree: Path) -> dict[bytes, ValueRef]:
    """Where the values of a database of ours are that lie in its data files."""
    with Database(Record(str(tree)), checked=False) as database:
        return {key: v for key, v in database.values.items() if isinstance(v, ValueRef)}


def leaf_of(key: bytes) -> str:
    return key.decode().split("/")[0].replace(".", "/")


@dataclasses.dataclass
class Subject:
    """A checkpoint to damage.

    Attributes:
        name: for the table.
        path: where it is.
        load: gives all of it, or what is wanted of it, comparable.
        right: what may come out.
        ours: whether errors must be of this package and name what is damaged.
    """

    name: str
    path: Path
    load: Callable[[Path], Any]
    right: list[Any]
    ours: bool = True
    spans: dict[str, list[tuple[int, int, str]]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        trees = [p for p in self.path.iterdir() if self.ours and (p / names.MANIFEST).exists()]
        for tree in trees:
            for key, ref in values(tree).items():
                span = ref.offset, ref.offset + ref.length, leaf_of(key)
                self.spans.setdefault(f"{tree.name}/{ref.file}", []).append(span)
        for spans in self.spans.values():
            spans.sort()

    @functools.cached_property
    def files(self) -> dict[str, bytes]:
        return {file: (self.path / file).read_bytes() for file in files_in(self.path)}

    @functools.cached_property
    def leaves(self) -> list[str]:
        """How errors about leaves begin that have bytes in data files."""
        return sorted({f"{leaf}: " for spans in self.spans.values() for *_, leaf in spans})

    def owner(self, file: str, position: int) -> str:
        """What an error must name: the leaf that has a byte, or else the file."""
        spans = self.spans.get(file, [])
        before = bisect.bisect(spans, (position, 1 << 62, "")) - 1
        if before >= 0 and position < spans[before][1]:
            return f"{spans[before][2]}: "
        return os.path.basename(file)

    def run(self, outcome: Outcome, what: str, clues: Collection[str]) -> None:
        """Loads it as it is now, and judges what comes out."""
        problem = ""
        try:
            verdict = "harmless" if self.load(self.path) in self.right else "silently wrong"
        except Exception as error:
            verdict = "noticed"
            if self.ours and not isinstance(error, FlaxCkptError):
                problem = f"{type(error).__name__}: {error}"
            elif self.ours and not any(clue in str(error) for clue in clues):
                problem = f"names none of {', '.join(clues)}: {error}"
            elif self.ours and outcome.runs % VERIFIED == 0 and self._called_whole():
                problem = f"verify calls it whole: {error}"
        if self.ours and verdict == "silently wrong":
            problem = verdict
        outcome.notes[verdict] = outcome.notes.get(verdict, 0) + 1  # type: ignore[operator]
        outcome.check(not problem, f"{what}: {problem}")

    def _called_whole(self) -> bool:
        try:
            return fc.verify(self.path).ok
        except FlaxCkptError:
            return False  # it is no checkpoint any more


@contextlib.contextmanager
def replaced(path: Path, data: bytes | None) -> Iterator[None]:
    """The file has other contents meanwhile, or is not there."""
    whole = path.read_bytes()
    if data is None:
        path.unlink()
    else:
        path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


def spliced(subject: Subject, file: str, start: int, data: bytes) -> Any:
    """The file has these bytes meanwhile, instead of as many of its own."""
    whole = subject.files[file]
    data = data[: len(whole) - start]
    return replaced(subject.path / file, whole[:start] + data + whole[start + len(data) :])


def some(items: Any, share: float, rng: random.Random, most: int = 1 << 62) -> list[Any]:
    """A share of them, or of as many as may be, but not none."""
    count = round(share * min(len(items), most))
    return rng.sample(items, min(len(items), max(1, count)))


Draw = Callable[..., list[Any]]


def flips(subject: Subject, rng: random.Random, draw: Draw, most: int) -> Outcome:
    found = Outcome(f"{subject.name}: a byte flipped, one at a time")
    places = [(file, i) for file, data in subject.files.items() for i in range(len(data))]
    for file, i in draw(places, most=most):
        other = subject.files[file][i] ^ rng.randrange(1, 256)
        with spliced(subject, file, i, bytes([other])):
            subject.run(found, f"{file} byte {i} made {other}", [subject.owner(file, i)])
    return found


def cuts(subject: Subject, draw: Draw, most: int) -> Outcome:
    found = Outcome(f"{subject.name}: a file cut off")
    for file, whole in subject.files.items():
        limit = min(most, CUTS) if len(whole) > EVERY_LENGTH else most
        for length in draw(range(len(whole)), most=limit):
            with replaced(subject.path / file, whole[:length]):
                clues = [os.path.basename(file), *subject.leaves]
                subject.run(found, f"{file} cut to {length}", clues)
    return found


def removals(subject: Subject) -> Outcome:
    found = Outcome(f"{subject.name}: a file removed")
    for file in subject.files:
        with replaced(subject.path / file, None):
            subject.run(found, file, [os.path.basename(file)])
    return found


def swaps(subject: Subject) -> Outcome:
    found = Outcome(f"{subject.name}: two files of equal size swapped")
    for (one, a), (other, b) in itertools.combinations(subject.files.items(), 2):
        if len(a) == len(b) and a != b:
            with replaced(subject.path / one, b), replaced(subject.path / other, a):
                clues = [os.path.basename(one), os.path.basename(other)]
                subject.run(found, f"{one} and {other}", clues)
    return found


def zeros(subject: Subject, draw: Draw) -> Outcome:
    found = Outcome(f"{subject.name}: a block of 4 KiB zeroed")
    for file, i in draw(blocks_of(subject)):
        with spliced(subject, file, i, bytes(BLOCK)):
            clues = [os.path.basename(file), *subject.leaves]
            subject.run(found, f"{file} from {i} on", clues)
    return found


def blocks_of(subject: Subject) -> list[tuple[str, int]]:
    files = subject.files.items()
    return [(file, i) for file, whole in files for i in range(0, len(whole), BLOCK)]


def counterparts(subject: Subject, older: Path) -> dict[str, str]:
    """The files that are the same part of both, whatever their names."""
    return dict(zip(sorted(subject.files), files_in(older), strict=True))


def stale(subject: Subject, older: Path, draw: Draw) -> list[Outcome]:
    """Parts of the step before, each with its own valid checksum, in the place of the new ones."""
    of = f"{subject.name}: of the step before"
    chunks, blocks, nodes, files = (
        Outcome(f"{of}, {kind}") for kind in ("a chunk", "a block of 4 KiB", "a node", "a file")
    )
    pairs = counterparts(subject, older)
    data = {file: (older / other).read_bytes() for file, other in pairs.items()}
    clues = [os.path.basename(file) for file in (*pairs, *pairs.values())] + subject.leaves
    old, new = values(older / "state"), values(subject.path / "state")
    for key in draw(sorted(new)):
        ref, file = new[key], f"state/{new[key].file}"
        chunk = data[file][old[key].offset :][: ref.length]
        with spliced(subject, file, ref.offset, chunk):
            subject.run(chunks, f"{key!r}", [f"{leaf_of(key)}: "])
    for file, spans in subject.spans.items():
        end = spans[-1][1]  # where the index begins
        with spliced(subject, file, end, data[file][end:]):
            subject.run(nodes, f"{file} from {end} on", clues)
    for file in subject.files:
        with replaced(subject.path / file, data[file]):
            subject.run(files, file, clues)
    for file, i in draw(blocks_of(subject)):
        with spliced(subject, file, i, data[file][i : i + BLOCK]):
            subject.run(blocks, f"{file} from {i} on", clues)
    return [chunks, blocks, nodes, files]


def mixtures(subject: Subject, older: Path, rng: random.Random, draw: Draw) -> Outcome:
    """Some files of each of two steps: all of the one, all of the other, or an error."""
    found = Outcome(f"{subject.name}: files of two steps mixed")
    for _ in draw(range(MIXTURES)):
        pairs = [pair for pair in counterparts(subject, older).items() if rng.random() < 0.5]
        with contextlib.ExitStack() as stack:
            for file, other in pairs:
                data, under_own_name = (older / other).read_bytes(), rng.random() < 0.5
                moves = under_own_name and file != other
                stack.enter_context(replaced(subject.path / file, None if moves else data))
                if moves:
                    (subject.path / other).write_bytes(data)
                    stack.callback((subject.path / other).unlink)
            clues = [os.path.basename(file) for file in [*subject.files, *files_in(older)]]
            what = ", ".join(f"{other} as {file}" for file, other in pairs)
            subject.run(found, f"of the step before: {what}", [*clues, *subject.leaves])
    return found


def bits(subject: Subject, whole: Any, rng: random.Random, runs: int) -> Outcome:
    """Random bits of a large checkpoint, one at a time.

    Of ours, the leaf that has the bit is loaded, with all that describes the tree; each twentieth
    time, and if the bit is no leaf's, all of it.
    """
    found = Outcome(f"{subject.name}: a random bit flipped")
    sizes = {file: (subject.path / file).stat().st_size for file in files_in(subject.path)}
    for run, file in enumerate(rng.choices(list(sizes), list(sizes.values()), k=runs)):
        place, bit = rng.randrange(sizes[file]), rng.randrange(8)
        owner = subject.owner(file, place)
        if subject.ours:
            leaf = owner.removesuffix(": ")
            wanted = dict.fromkeys([leaf] if leaf in whole and run % 20 else whole)
            subject.load = functools.partial(load_leaves, wanted)
            subject.right = [{name: whole[name] for name in wanted}]
        with open(subject.path / file, "r+b") as opened:
            byte = os.pread(opened.fileno(), 1, place)
            os.pwrite(opened.fileno(), bytes([byte[0] ^ 1 << bit]), place)
            subject.run(found, f"{file} byte {place} bit {bit}", [owner])
            os.pwrite(opened.fileno(), byte, place)
    return found


def large(folder: Path, rng: random.Random, scale: float) -> list[Outcome]:
    """Both on 100 MB; on less in a sample."""
    random_of = np.random.default_rng(rng.randrange(1 << 32))
    count = max(8, round(100 * min(1, 10 * scale)))
    tree = {f"w{i}": random_of.normal(size=(512, 512)).astype(np.float32) for i in range(count)}
    whole, size = bits_of(tree), f"{count * 1.05:.0f} MB"
    fc.save(folder / "ours", tree)
    ocp.save(folder / "orbax", tree)
    ours = Subject(f"ours, {size}", folder / "ours", load, [])
    orbax = Subject(f"Orbax, {size}", folder / "orbax", load_with_orbax, [whole], ours=False)
    return [
        bits(ours, whole, rng, max(1, round(scale * BITS))),
        bits(orbax, whole, rng, max(1, round(scale * ORBAX_BITS))),
    ]


def campaign(scale: float, seed: int) -> list[Outcome]:
    rng = random.Random(seed)
    draw = functools.partial(some, share=scale, rng=rng)
    found: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name, quiet():
        folder = Path(name)
        for devices in (1, 8):
            of = "8 devices" if devices > 1 else "1 device"
            older = save(folder / f"{devices}" / "1", 1, devices)
            path, right = save(folder / f"{devices}" / "2", 2, devices), expected(2, devices)
            ours = Subject(f"ours, {of}", path, load, [right])
            found += [flips(ours, rng, draw, 1 << 62), cuts(ours, draw, 1 << 62), removals(ours)]
            found += [swaps(ours), zeros(ours, draw), *stale(ours, older, draw)]
            ours.right.append(expected(1, devices))
            found.append(mixtures(ours, older, rng, draw))
            path = folder / f"{devices}" / "orbax"
            ocp.save(path, tree_of(2, devices))
            orbax = Subject(f"Orbax, {of}", path, load_with_orbax, [right[0][0]], ours=False)
            assert load_with_orbax(path) == right[0][0]
            found += [flips(orbax, rng, draw, ORBAX_FLIPS), cuts(orbax, draw, ORBAX_CUTS)]
            found.append(removals(orbax))
        found += large(folder, rng, scale)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Neither library says much meanwhile; of Orbax's loads that fail, tasks complain late."""
    level, hook = logging.root.manager.disable, sys.unraisablehook
    logging.disable(logging.CRITICAL)
    sys.unraisablehook = lambda unraisable: None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
            gc.collect()
    finally:
        sys.unraisablehook = hook
        logging.disable(level)
