"""Count the instructions of the CPU kernels and hold them to the recorded counts.

Times on a shared machine spread by half; a count of instructions does not move. valgrind runs the
kernels for AVX2 on some small problems. The counts of each compiler version stand in
instructions.json. A kernel that executes over 5% more instructions than recorded is an error.

    python tests/instructions.py --program BUILD/tests/cpp/warm_calls [--record]

With --record the counts replace the recorded ones.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

RECORD = Path(__file__).with_suffix(".json")
MOST_GROWTH = 1.05
FUNCTIONS = [
    f"carafepp_reassemble{kind}{pass_}"
    for kind in ("", "_with_logits")
    for pass_ in ("", "_backward")
]


def count(program: Path) -> tuple[str, dict[str, float]]:
    """Return the compiler, and for each problem, layout and result the instructions an output."""
    with tempfile.TemporaryDirectory() as folder:
        options = [
            f"--{when}={name}" for name in FUNCTIONS for when in ("zero-before", "dump-after")
        ]
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/dump", *options]
        done = subprocess.run(
            [*command, str(program.resolve())],
            env={**os.environ, "CARAFEPP_ISA": "avx2"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            sys.exit(f"{done.stdout}{done.stderr}[instructions] the program failed.")
        totals = {}  # of calls, by their number
        for dump in Path(folder).glob("dump.*"):
            total = re.search(r"(?m)^totals: (\d+)", dump.read_text())
            totals[int(dump.suffix[1:])] = int(total[1]) if total else 0
    compiler = re.search(r"(?m)^compiler: (.*)", done.stdout)
    lines = re.findall(r"(?m)^(\w+ N\w+ \w+) (\d+)$", done.stdout)
    if not (compiler and lines and len(totals) == 2 * len(lines)):
        sys.exit(f"{done.stdout}[instructions] got {len(totals)} counts of {2 * len(lines)} calls.")
    return compiler[1], {
        name: round(totals[2 * k] / int(outputs), 2) for k, (name, outputs) in enumerate(lines, 1)
    }


def main() -> None:
    """Print a line for each count; exit with 1 if one is too large."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--program", type=Path, required=True)
    parser.add_argument("--record", action="store_true")
    asked = parser.parse_args()
    compiler, counts = count(asked.program)
    recorded = json.loads(RECORD.read_text())
    if asked.record:
        recorded[compiler] = counts
        RECORD.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
        return
    if compiler not in recorded:
        print(f"SKIPPED: no counts of instructions are recorded for {compiler}.")
        return
    of_compiler = recorded[compiler]
    if counts.keys() != of_compiler.keys():
        sys.exit("[instructions] other problems are recorded; run with --record.")
    grown = 0
    for name, now in counts.items():
        growth = now / of_compiler[name]
        grown += growth > MOST_GROWTH
        mark = (
            "  GREW" if growth > MOST_GROWTH else "  record it" if growth < 1 / MOST_GROWTH else ""
        )
        print(f"{name:45} {now:8.2f} instructions an output, {growth:.3f} of the recorded{mark}")
    print(f"{len(counts)} counts, {grown} grew by over {MOST_GROWTH - 1:.0%}")
    sys.exit(bool(grown))


if __name__ == "__main__":
    main()
