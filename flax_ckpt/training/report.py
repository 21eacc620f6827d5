"""What a restore did, to print and to assert on.

out = fc.restore(path, state, only="params/encoder")
print(out.report)
assert out.report.kept == ("params/head/bias", "params/head/kernel")
"""

import dataclasses

from flax_ckpt.training import progress

Damaged = tuple[tuple[int | str, str], ...]  # steps by number, the rest by name, with the reason

_SHOWN = 3  # names in a row of the table; all of them are in the attributes


@dataclasses.dataclass(frozen=True)
class Report:
    """What a restore did; two are equal if they differ in nothing but time.

    Attributes:
        loaded: names of the leaves that were read, such as `params/dense/kernel`.
        nbytes: size of what was loaded, in bytes.
        seconds: how long it took.
        damaged: what was damaged, each with the reason: steps that were passed over, by number,
            and with `on_damage="skip"` leaves, parts and files, by name.
        kept: leaves that stayed as they were in the wanted state.
        kept_nbytes: their size.
        initialised: leaves that `init` made.
        initialised_nbytes: their size.
        ignored: saved leaves that were not read, of the parts that something was read of.
        ignored_nbytes: their size.
        renamed: the saved and the wanted name of leaves that were read under another one.

    >>> print(Report(("params/w",), 8, 0.002, kept=("params/head/w",), kept_nbytes=4000))
    restored 8 B in 2 ms
                 leaves    bytes
    loaded            1      8 B  params/w
    kept              1   4.0 kB  params/head/w
    initialised       0      0 B
    ignored           0      0 B
    renamed           0
    """

    loaded: tuple[str, ...]
    nbytes: int
    seconds: float = dataclasses.field(compare=False)
    damaged: Damaged = ()
    kept: tuple[str, ...] = ()
    kept_nbytes: int = 0
    initialised: tuple[str, ...] = ()
    initialised_nbytes: int = 0
    ignored: tuple[str, ...] = ()
    ignored_nbytes: int = 0
    renamed: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        renamed = tuple([f"{old} → {new}" for old, new in self.renamed])
        others = ("kept", "initialised", "ignored")
        rows = [(what, getattr(self, what), getattr(self, f"{what}_nbytes")) for what in others]
        rows = [("loaded", self.loaded, self.nbytes), *rows, ("renamed", renamed, None)]
        lines = [f"restored {progress.size(self.nbytes)} in {progress.duration(self.seconds)}"]
        lines += [f"{'':11} {'leaves':>7} {'bytes':>8}"]
        for what, names, nbytes in rows:
            more = (f"… {len(names) - _SHOWN} more",) * (len(names) > _SHOWN)
            size = "" if nbytes is None else progress.size(nbytes)
            shown = ", ".join(names[:_SHOWN] + more)
            lines.append(f"{what:11} {len(names):7} {size:>8}  {shown}".rstrip())
        for what, reason in self.damaged:
            shown = f"step {what} was passed over" if isinstance(what, int) else f"damaged: {what}"
            lines.append(f"{shown}: {reason}")
        return "\n".join(lines)
