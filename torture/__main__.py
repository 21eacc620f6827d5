"""Runs campaigns and writes their tables into docs/reliability.md.

    python -m torture                       # `make torture`: all of them, hours
    python -m torture damage crashes        # some
    python -m torture --scale 0.02          # a sample; nothing is written

Each runs with the seed that is printed; exit code 1 if anything ended as it must not.
"""

from __future__ import annotations

import os

# Before anything imports jax: it reads both when its first device is asked for.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import argparse
import gc
import importlib
import logging
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.report import replace_section
from torture.outcome import Outcome, as_markdown

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reliability.md"
CAMPAIGNS = (
    "damage",
    "crashes",
    "failpoints",
    "faults",
    "power",
    "hostile",
    "fuzz",
    "races",
    "resume",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m torture")
    parser.add_argument("campaigns", nargs="*", metavar="campaign", help=", ".join(CAMPAIGNS))
    parser.add_argument("--scale", type=float, default=1.0, help="share of the whole campaign")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    options = parser.parse_args(argv)
    if unknown := set(options.campaigns) - set(CAMPAIGNS):
        parser.error(f"no such campaign: {', '.join(sorted(unknown))}")
    logging.getLogger("flax_ckpt").addHandler(logging.NullHandler())
    wrong = 0
    for name in options.campaigns or CAMPAIGNS:
        began = time.monotonic()
        print(f"{name}: seed {options.seed}", flush=True)
        module = importlib.import_module(f"torture.{name}")
        gc.freeze()  # a campaign that asks for a collection after each run does not look at it
        found: list[Outcome] = module.campaign(options.scale, options.seed)
        table = as_markdown(found)
        minutes = (time.monotonic() - began) / 60
        print(f"{table}\n{minutes:.1f} minutes\n", flush=True)
        if options.scale == 1:
            said = f"Seed {options.seed}, {minutes:.0f} minutes."
            replace_section(PAGE, f"`make torture`, {name}", f"{said}\n\n{table}")
        wrong += sum(len(outcome.wrong) for outcome in found)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
