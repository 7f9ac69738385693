"""What only a machine with a GPU can show, in steps that can be run alone; no network is needed.

    python -m benchmarks.gpu [build] [tests] [sanitize] [time] [--out FOLDER] [--mmcv TREE]

build      compiles carafepp for this machine's GPU and installs it into FOLDER/site
tests      all tests of CUDA arrays, on CuPy and PyTorch, and of the operators on CUDA tensors;
           what cannot run is a failure
sanitize   compute-sanitizer's memcheck and racecheck on a short list of them
time       benchmarks.gpu_timing: FOLDER/times.json and FOLDER/times.md

All of them, in this order, by default. It needs nvcc, the build requirements of pyproject.toml,
NumPy, ml_dtypes, pytest, PyTorch with CUDA and CuPy. FOLDER/STEP.log has what a step printed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from . import ROOT

# A short list: each kernel once or more, with crops, groups and odd sizes.
SANITIZED = "test_every_implementation_is_right_for_every_dtype and torch"
SANITIZED_CASES = ("up2", "crop_up", "groups_2", "down2", "ratio_3_2")


def commands(step: str, out: Path, timing: list[str]) -> list[list[str]]:
    """Return what a step runs."""
    python = sys.executable
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    if step == "build":
        install = [python, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
        settings = [
            "-Ccmake.define.CARAFEPP_CUDA=ON",
            "-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native",
        ]
        return [[*install, "--upgrade", "--target", str(out / "site"), *settings, str(ROOT)]]
    if step == "tests":
        arrays = ["tests/test_cuda.py", "tests/test_streams.py", "-m", "slow or not slow"]
        operators = ["tests/test_torch_operators.py", "-k", "on_a_gpu"]
        return [[*pytest, *arrays], [*pytest, *operators]]
    if step == "sanitize":
        cases = " or ".join(f"-{case}-" for case in SANITIZED_CASES)
        tests = [*pytest, "tests/test_cuda.py", "-k", f"{SANITIZED} and ({cases})"]
        sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all"]
        return [[*sanitizer, "--tool", tool, *tests] for tool in ("memcheck", "racecheck")]
    files = ["--json", str(out / "times.json"), "--markdown", str(out / "times.md")]
    return [[python, "-m", "benchmarks.gpu_timing", *files, *timing]]


def environment(step: str, out: Path) -> dict[str, str]:
    """Return the environment of a step."""
    found = dict(os.environ)
    if step != "build" and (out / "site").exists():
        paths = [str(out / "site"), found.get("PYTHONPATH", "")]
        found["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if step in ("tests", "sanitize"):
        found["CARAFEPP_REQUIRE"] = "cuda"
    if step == "sanitize":  # each tensor is an allocation of its own, whose ends are watched
        found["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    return found


def run(step: str, out: Path, timing: list[str]) -> bool:
    """Run a step, its output in a file; print a line; return whether it went well."""
    begin, status = time.monotonic(), 0
    log = out / f"{step}.log"
    with log.open("w") as file:
        for command in commands(step, out, timing):
            print("$", *command, file=file, flush=True)
            if shutil.which(command[0]) is None:
                print(f"{command[0]} was not found", file=file)
                status = 127
                break
            status = subprocess.run(
                command, cwd=ROOT, env=environment(step, out), stdout=file, stderr=file
            ).returncode
            if status:
                break
    last = log.read_text().rstrip().rpartition("\n")[2]
    verdict = f"exit status {status}" if status else "ok"
    print(f"{step:9} {verdict}, {time.monotonic() - begin:.0f} s: {last}", flush=True)
    return status == 0


def main() -> None:
    """Run the steps that are asked for; exit with 1 unless all went well."""
    steps = ["build", "tests", "sanitize", "time"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", help="of build, tests, sanitize, time; default all")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu")
    parser.add_argument("--mmcv", type=Path, help="a source tree of mmcv, to be timed beside")
    parser.add_argument("--timing", default="", help="further options of gpu_timing, in one string")
    asked = parser.parse_args()
    if wrong := set(asked.steps) - set(steps):
        parser.error(f"steps must be of {', '.join(steps)}; got {', '.join(sorted(wrong))}")
    out = asked.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    timing = asked.timing.split()
    if asked.mmcv:
        timing += ["--mmcv", str(asked.mmcv.resolve())]
    passed = [run(step, out, timing) for step in asked.steps or steps]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
