"""The command line: `bundle` makes a bundle; other words begin or continue the run."""

import argparse
import fcntl
import sys
from pathlib import Path

from .. import ROOT
from . import bundle
from .run import STEPS, Options, Run, default_site


def main() -> int:
    """Run; return 0 if nothing failed and every step that must end has ended."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=(sys.modules["benchmarks.gpu"].__doc__ or "").partition("\n")[0],
    )

    def folder(name: str, default: Path, text: str) -> None:
        text += f"default {default}"
        parser.add_argument(name, type=lambda p: Path(p).resolve(), default=default, help=text)

    parser.add_argument("steps", nargs="*", help=f"any of {', '.join(STEPS)}; default all")
    parser.add_argument(
        "--deadline", type=float, default=540, metavar="SECONDS", help="for all steps; default 540"
    )
    folder("--out", ROOT / "build/gpu", "folder of results; ")
    folder("--bundle", bundle.DEFAULT, "folder of the bundle; ")
    folder("--site", default_site(), "folder of the installation; ")
    parser.add_argument(
        "--rehearse", action="store_true", help="run without a GPU, with emulated kernels"
    )
    parser.add_argument("--quick", action="store_true", help="a few items of each slow step")
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
    asked.steps = tuple(name for name in STEPS if name in asked.steps) or tuple(STEPS)
    return Run(Options(**vars(asked))).go()


if __name__ == "__main__":
    sys.exit(bundle.main(sys.argv[2:]) if sys.argv[1:2] == ["bundle"] else main())
