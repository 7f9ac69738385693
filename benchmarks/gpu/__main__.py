"""The command line: `bundle` makes a bundle; without it the run begins, or goes on."""

import argparse
import fcntl
import sys
from pathlib import Path

from .. import ROOT
from . import bundle
from .run import STEPS, Options, Run, default_site


def main() -> int:
    """Run; return the exit status: 0 if nothing failed, and every step ended that must."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=(sys.modules["benchmarks.gpu"].__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("steps", nargs="*", help=f"of {', '.join(STEPS)}; default all")
    parser.add_argument(
        "--deadline", type=float, default=540, metavar="SECONDS", help="of all steps; default 540"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "build/gpu", help="for results; default build/gpu"
    )
    parser.add_argument("--bundle", type=Path, default=bundle.DEFAULT, help="default build/bundle")
    parser.add_argument(
        "--site",
        type=Path,
        default=default_site(),
        help=f"to install into; default {default_site()}",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run without a GPU, with emulated kernels"
    )
    parser.add_argument("--quick", action="store_true", help="a few items of each step")
    asked = parser.parse_args()
    if wrong := set(asked.steps) - set(STEPS):
        parser.error(f"steps must be of {', '.join(STEPS)}; got {', '.join(sorted(wrong))}")
    if not asked.deadline > 0:
        parser.error(f"--deadline must be positive; got {asked.deadline:g}")
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
        asked.site.mkdir(parents=True, exist_ok=True)
        lock = (asked.site / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        parser.error(f"--site: another run installs into {asked.site}")
    except OSError as error:
        parser.error(f"--out and --site must be folders to write to: {error}")
    steps = tuple(name for name in STEPS if name in asked.steps) or tuple(STEPS)
    options = Options(
        asked.out.resolve(),
        asked.bundle.resolve(),
        asked.site.resolve(),
        asked.deadline,
        asked.rehearse,
        asked.quick,
        steps,
    )
    return Run(options).go()


if __name__ == "__main__":
    sys.exit(bundle.main(sys.argv[2:]) if sys.argv[1:2] == ["bundle"] else main())
