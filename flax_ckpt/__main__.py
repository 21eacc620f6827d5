"""`python -m flax_ckpt`; see flax_ckpt/cli.py."""

import sys

from flax_ckpt.cli import run

if __name__ == "__main__":
    sys.exit(run())
