"""Which leaves a restore reads and where each of them goes: decided by path, before any is read.

    chosen = Selection(only="params/encoder", rename={"params/backbone": "params/encoder"})
    chosen.picks(["params/encoder/kernel", "params/head/kernel"])    # [True, False]

No I/O: what is here knows paths alone.
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn, TypeAlias

from flax_ckpt.errors import StateError
from flax_ckpt.format import tree
from flax_ckpt.storage.record import OnDamage, notes

Test: TypeAlias = Callable[[str], bool]
Selector: TypeAlias = str | Test | Sequence[str | Test]
Rename: TypeAlias = Mapping[str, str] | Sequence[tuple[str, str]]
Missing: TypeAlias = Literal["error", "keep", "init"]
Unexpected: TypeAlias = Literal["error", "ignore"]

SHOWN = 8  # leaves in a message


@dataclasses.dataclass(frozen=True)
class Selection:
    """What is to be restored, and what becomes of the rest.

    A name, such as `params` or `params/encoder`, is a glob without stars. A glob stands for the
    nodes it fits and for all that is beneath them; in it `*` is any text within one part of a
    path, and `**` any number of parts. A predicate is asked about each leaf.

    Attributes:
        only: what to read: a glob, a predicate, or a sequence of them; None: everything.
        exclude: what of that not to read.
        rename: the wanted path for saved ones: prefixes, of which the longest that fits counts,
            or pairs of a regular expression and a replacement, for `re.sub`, one after the other.
        missing: what to do about wanted leaves that are not saved.
        unexpected: what to do about saved leaves that are not wanted.
        init: makes a whole state, for leaves that are not read.
        on_damage: "skip": leaves that are damaged count as missing, and are kept.

    Raises:
        StateError: `missing="init"` without `init`.

    >>> chosen = Selection(only=["params/encoder", "**/bias"], exclude="params/*/Dense_1")
    >>> chosen.picks(["params/encoder/Dense_0/kernel", "params/head/bias", "params/head/kernel"])
    [True, True, False]
    >>> chosen.picks(["params/encoder/Dense_1/kernel"])
    [False]
    """

    only: Selector | None = None
    exclude: Selector | None = None
    rename: Rename | None = None
    missing: Missing = "error"
    unexpected: Unexpected = "error"
    init: Callable[[], Any] | None = None
    on_damage: OnDamage = "raise"

    def __post_init__(self) -> None:
        for name in ("only", "exclude"):
            given = getattr(self, name)
            if not (given is None or isinstance(given, str) or callable(given)):
                object.__setattr__(self, name, tuple(given))  # it is gone through several times
        notes(self.on_damage)  # checks it
        known = self.missing in ("error", "keep", "init")
        if not known or self.unexpected not in ("error", "ignore"):
            what = "missing must be 'error', 'keep' or 'init' and unexpected 'error' or 'ignore'"
            raise ValueError(f"{what}, got {self.missing!r} and {self.unexpected!r}")
        if self.missing == "init" and self.init is None:
            raise StateError("missing='init' needs init=, a function that makes a whole state")

    @property
    def is_partial(self) -> bool:
        """Whether anything may not be selected."""
        return self.only is not None or self.exclude is not None

    def picks(self, paths: Sequence[str]) -> list[bool]:
        """For each path of a leaf whether it is selected."""
        only, exclude = _test(self.only, True), _test(self.exclude, False)
        return [only(path) and not exclude(path) for path in paths]

    def check(self, paths: Collection[str], unopened: Collection[str], where: str) -> None:
        """Checks that every name and glob fits one of these paths.

        Args:
            paths: of leaves, and of parts.
            unopened: parts that were not looked into; what is in them is not known.
            where: they are.

        Raises:
            StateError: says which paths are nearest.
        """
        for option, selector in (("only", self.only), ("exclude", self.exclude)):
            for glob in _parts(selector):
                if not isinstance(glob, str) or glob.strip("/").split("/")[0] in unopened:
                    continue
                if not any(map(_glob(glob), paths)):
                    _no_such(f"{option}={glob!r}", glob, paths, where)

    def destinations(
        self, saved: Sequence[tree.KeyPath], wanted: Mapping[str, tree.KeyPath], where: str
    ) -> list[tree.KeyPath]:
        """Where each saved leaf goes: its path in the wanted state, or where it would be there.

        Args:
            saved: key path of each saved leaf.
            wanted: key path of each wanted leaf, by its text.
            where: the saved ones are.

        Raises:
            StateError: a rule of `rename` fits no leaf, or two leaves go to one place.
        """
        if not self.rename:
            return list(saved)
        texts = [tree.show(path) for path in saved]
        found: dict[tree.KeyPath, str] = {}
        clashes: list[str] = []
        for path, old, new in zip(saved, texts, self._renamed(texts, where), strict=True):
            if new != old:
                made = (tree.Key(part, tree.DICT) for part in new.split("/"))
                path = wanted.get(new) or tuple(made)
            if (other := found.setdefault(path, old)) is not old:
                clashes.append(f"{other} and {old} would both be {new}")
        if clashes:
            what = f"rename={self.rename!r} puts two saved leaves into one place"
            how = "Rename the other, too, to a name that is not wanted"
            raise StateError(f"{what}: {shortened(clashes)}. {how}")
        return list(found)

    def _renamed(self, paths: Sequence[str], where: str) -> list[str]:
        """The paths after renaming."""
        if not isinstance(self.rename, Mapping):
            result = list(paths)
            for pattern, replacement in self.rename or ():
                found = [re.subn(pattern, replacement, path) for path in result]
                if not any(count for _, count in found):
                    _no_such(f"the pattern {pattern!r} of rename=", pattern, paths, where)
                result = [path for path, _ in found]
            return result
        new = {old.strip("/"): new.strip("/") for old, new in self.rename.items()}
        longest_first = sorted(new, key=len, reverse=True)
        prefix = re.compile(f"({'|'.join(map(re.escape, longest_first))})(?=/|$)")
        found = [prefix.match(path) for path in paths]
        for old in new.keys() - {match[1] for match in found if match}:
            _no_such(f"the prefix {old!r} of rename=", old, paths, where)
        pairs = zip(found, paths, strict=True)
        return [(new[m[1]] + path[m.end() :]).strip("/") if m else path for m, path in pairs]


def shortened(items: Sequence[str]) -> str:
    """The first of several, as messages list them."""
    more = f", … and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def _parts(selector: Selector | None) -> Iterator[str | Test]:
    if isinstance(selector, str) or callable(selector):
        yield selector
    elif selector is not None:
        yield from selector


def _test(selector: Selector | None, default: bool) -> Test:
    if selector is None:
        return lambda path: default
    tests = [_glob(part) if isinstance(part, str) else part for part in _parts(selector)]
    return tests[0] if len(tests) == 1 else lambda path: any(test(path) for test in tests)


def _glob(glob: str) -> Test:
    """A predicate: whether a path is one of a glob's nodes, or beneath one."""
    parts = glob.strip("/").split("/")
    fits = [re.escape(part).replace(r"\*", "[^/]*") + "/" for part in parts]
    fits = ["(?:[^/]*/)*" if p == "**" else fit for p, fit in zip(parts, fits, strict=True)]
    match = re.compile("".join(fits)).match
    return lambda path: match(f"{path}/") is not None


def _no_such(what: str, path: str, paths: Collection[str], where: str) -> NoReturn:
    """Raises the error for a path that fits nothing: it names those that are nearest."""
    wish = path.strip("/").removesuffix("/**")
    nodes = {"/".join(other.split("/")[: wish.count("/") + 1]) for other in paths}
    near = difflib.get_close_matches(wish, sorted(nodes), 3) or sorted(nodes)[:SHOWN]
    raise StateError(f"{what} fits no leaf of {where}; nearest: {', '.join(near) or 'nothing'}")
