"""The command line: `python -m flax_ckpt`, or `flax-ckpt`.

python -m flax_ckpt verify /runs/7/checkpoints          # exit code 0: whole, 1: damaged
python -m flax_ckpt verify /runs/7/checkpoints --json
"""

import argparse
import contextlib
import dataclasses
import json
import signal
import sys
from collections.abc import Sequence
from typing import Any

from flax_ckpt.errors import InvalidLayoutError
from flax_ckpt.inspection import verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: those after the program's name; None: of this process.

    Returns:
        The exit code: 0: all is whole, 1: something is damaged, 2: there is no checkpoint. A wrong
        use of the command ends the process with 2, too.
    """
    parser = argparse.ArgumentParser("flax_ckpt", description="What is in checkpoints.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    about = "reads all of a checkpoint, or of all in a run, and lists damaged leaves and files"
    command = commands.add_parser("verify", help=about, description=about)
    command.add_argument("paths", nargs="+", metavar="PATH", help="a checkpoint or a run's root")
    command.add_argument("--json", action="store_true", help="print a list of JSON objects")
    options = parser.parse_args(arguments)
    code = 0
    results: list[dict[str, Any]] = []
    for path in options.paths:
        try:
            found = verify(path)
        except (InvalidLayoutError, OSError) as error:
            print(error, file=sys.stderr)
            results.append({"path": path, "ok": False, "error": str(error)})
            code = 2
            continue
        code = max(code, 0 if found.ok else 1)
        results.append(dataclasses.asdict(found) | {"ok": found.ok})
        if not options.json:
            print(found, flush=True)
    if options.json:
        print(json.dumps(results, indent=2))
    return code


def run() -> int:
    """Runs the command of this process; who closes the pipe that it prints to has seen enough."""
    try:
        return main()
    except BrokenPipeError:
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.close()
        return 128 + signal.SIGPIPE
