"""Benchmarks of carafepp: `python -m benchmarks --help`, from the root of the repository.

problems -> implementations, peers (the rivals) -> compare (check, then time) -> bars, report, plot.
Shapes come from `cases/`. The definition (`reference.py`) and the rounding bounds
(`tolerances.py`) are those of the tests.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

sys.path.insert(0, str(ROOT / "tests"))

# Between two calls PyTorch's threads spin, on the cores where the next rival is timed.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
