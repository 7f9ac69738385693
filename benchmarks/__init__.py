"""Benchmarks of carafepp: `python -m benchmarks --help`, from the root of the repository.

| file | holds |
|---|---|
| timing.py | the harness of every command: warm-up, turns of the candidates, peak memory |
| problems.py, passes.py | the problems; a pass of a problem, its cost and carafepp's call |
| implementations.py, peers.py | carafepp's candidates; PyTorch's candidates |
| compare.py | one comparison: checks, times, ratios |
| truth.py, check.py | the right results on three blocks; the tolerance |
| machine.py | the machine's peaks: arithmetic, copies, exponentials |
| report.py, plot.py | tables, progress and files; the pictures |
| carafe.py | the operator of the paper beside its bars |
| relatives.py | operators of other papers, other factors and kernel sizes, beside theirs |
| bars.py | what these two share: bars, tables, the command |
| overhead.py, modules.py, networks.py | the cost of one call; whole modules; whole networks |
| memory.py | the memory of a training step |
| gpu/ | everything that needs a GPU: `python -m benchmarks.gpu` |
"""

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# PyTorch's idle threads otherwise spin on the cores of the next candidate.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def commit() -> str:
    """Return the commit of the tree, and whether files differ from it."""

    def git(*command: str) -> str:
        done = subprocess.run(["git", "-C", ROOT, *command], capture_output=True, check=True)
        return done.stdout.decode().strip()

    try:
        # An unpacked archive may lie within another repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() == ROOT:
            return git(
                "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty= with changes"
            )
    except (OSError, subprocess.CalledProcessError):
        pass
    return "unknown"
