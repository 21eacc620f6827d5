"""What fuzzing kept, and mutations of it, through every parser: see `torture/fuzz.py`.

Files whose names begin with `found-` are inputs that once ended in an error of another kind.
"""

import random
from pathlib import Path

import pytest

from torture.fuzz import CORPUS, TARGETS, mutations, replay

FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


def test_every_target_has_a_corpus() -> None:
    assert {path.parent.name for path in FILES} == set(TARGETS)
    assert sum(path.stat().st_size for path in FILES) < 1 << 20


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_corpus_and_mutations_end_in_errors_of_this_package(path: Path) -> None:
    seed = random.randrange(1 << 32)
    data = path.read_bytes()
    for made in (data, *mutations(data, 25, random.Random(seed))):
        try:
            replay(path.parent.name, made)
        except Exception as error:
            error.add_note(f"{path} with seed {seed}: {made!r}")
            raise


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_reaches_what_is_valid(name: str) -> None:
    """Else a target would only ever see garbage."""
    accepted = 0
    for path in (CORPUS / name).iterdir():
        try:
            TARGETS[name](path.read_bytes())
        except ValueError:
            continue
        accepted += 1
    assert accepted
