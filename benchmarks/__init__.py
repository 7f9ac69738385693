"""Benchmarks of carafepp: `python -m benchmarks --help`, from the root of the repository.

| file | holds |
|---|---|
| timing.py | the harness of every command here: warm-up, rounds of all rivals, peak memory |
| problems.py, rivals.py, peers.py | the problems, carafepp's calls, PyTorch's |
| truth.py, windows.py | the right results, in three windows of a problem |
| machine.py | the machine's peaks: arithmetic and copies |
| report.py, plot.py | tables, progress and files; the picture |
| calls.py, modules.py, networks.py | the cost of one call; whole modules; whole networks |
| gpu/ | what a machine with a GPU has to show: `python -m benchmarks.gpu` |
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# PyTorch's threads otherwise spin between two calls, on the cores where the next rival is timed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
