"""The bundle: one folder for a machine without a network.

    python -m benchmarks.gpu bundle [--out FOLDER] [--wheel FILE] [--emulated] [--mmcv TREE]
                                    [--python 3.12]

It holds a wheel of carafepp for sm_90 and, as PTX, for newer GPUs. It also holds the wheels that a
build on the machine needs. Options add a wheel with emulated kernels, for a rehearsal, and the
files of mmcv's CARAFE. FOLDER/bundle.json tells the sources of the wheels.
"""

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import ROOT, commit

DEFAULT = ROOT / "build/bundle"
ARCHITECTURES = "90-real;90-virtual"
RUN_TIME = ["nanobind-backend>=1.0"]
# A build needs these beside CMake and ninja; scikit-build-core needs the last three.
BUILD = ["nanobind>=3.1,<4", "scikit-build-core>=1.1,<2"]
BUILD += ["hatch-fancy-pypi-readme>=23.2", "pathspec", "packaging"]
MMCV_FILES = [
    "pytorch/cuda/carafe_cuda.cu",
    "common/cuda/carafe_cuda_kernel.cuh",
    "common/cuda/common_cuda_helper.hpp",
    "common/pytorch_cuda_helper.hpp",
]
MMCV_SOURCES = Path("mmcv/ops/csrc")
_MOST_BYTES = 60 << 20  # a bundle travels with a working tree
_COMPILED = ("CMakeLists.txt", "bindings", "cmake", "core")
_PYTHON = "python/carafepp"


def fingerprint(*names: str) -> str:
    """Return a hash of files and folders; by default of all sources of the library."""
    digest = hashlib.sha256()
    for name in names or _COMPILED:
        path = ROOT / name
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in files:
            if file.is_file() and "__pycache__" not in file.parts:
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def read(folder: Path) -> dict[str, Any]:
    """Return the facts of bundle.json, or nothing if the bundle is missing or damaged."""
    try:
        facts = json.loads((folder / "bundle.json").read_text())
    except (OSError, ValueError):
        return {}
    whole = isinstance(facts, dict) and {"commit", "sources"} <= facts.keys()
    return facts if whole and any((folder / "run").glob("carafepp*.whl")) else {}


def update_python(site: Path) -> None:
    """Copy this tree's Python files into an installed carafepp: they need no compiler."""
    shutil.copytree(
        ROOT / _PYTHON,
        site / "carafepp",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("__pycache__", "*.so", "lib", "include"),
    )


def main(arguments: list[str]) -> int:
    """Make a bundle; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu bundle",
        description="Collect all files that a machine with a GPU and no network needs.",
    )
    parser.add_argument("--out", type=Path, default=DEFAULT, help="default build/bundle")
    parser.add_argument("--wheel", type=Path, help="of carafepp, instead of building one")
    parser.add_argument(
        "--emulated",
        action="store_true",
        help="add a wheel for rehearsals; they build it otherwise",
    )
    parser.add_argument(
        "--mmcv", type=Path, metavar="TREE", help="source tree of mmcv, for its CARAFE"
    )
    parser.add_argument("--python", default="3.12", help="of the other machine; default 3.12")
    asked = parser.parse_args(arguments)
    folder = asked.out.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "run").mkdir(parents=True)
    (folder / "build").mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", str(ROOT), "-w"]
    if asked.wheel:
        shutil.copy(asked.wheel, folder / "run")
    else:
        settings = [
            "-Ccmake.define.CARAFEPP_CUDA=ON",
            f"-Ccmake.define.CMAKE_CUDA_ARCHITECTURES={ARCHITECTURES}",
        ]
        subprocess.run([*build, str(folder / "run"), *settings], check=True)
    if asked.emulated:
        settings = ["-Ccmake.define.CARAFEPP_CUDA=EMULATED"]
        subprocess.run([*build, str(folder / "emulated"), *settings], check=True)
    target = ["--python-version", asked.python, "--implementation", "cp"]
    target += ["--only-binary=:all:", "--no-deps"]
    for minor in (28, 27, 17):
        target += ["--platform", f"manylinux_2_{minor}_x86_64"]
    target += ["--platform", "manylinux2014_x86_64"]
    for name, packages in (("run", RUN_TIME), ("build", BUILD)):
        subprocess.run(
            [*pip, "download", "-q", "-d", str(folder / name), *target, *packages], check=True
        )
    if asked.mmcv:
        for name in MMCV_FILES:
            to = folder / "mmcv" / MMCV_SOURCES / name
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(asked.mmcv / MMCV_SOURCES / name, to)
    facts = {
        "commit": commit(),
        "sources": fingerprint(),
        "date": time.strftime("%Y-%m-%d"),
        "python": asked.python,
        "files": sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()),
    }
    (folder / "bundle.json").write_text(json.dumps(facts, indent=1) + "\n")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB, commit {facts['commit']}", flush=True)
    if size > _MOST_BYTES:
        print(f"the bundle must have at most {_MOST_BYTES >> 20} MiB", file=sys.stderr)
        return 1
    return 0


_INSTALL = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile"]
_INSTALL += ["--upgrade", "--disable-pip-version-check"]


def installation(wheels: Iterable[Path], site: Path) -> list[str]:
    """Return the command that installs some wheels, without network or compiler."""
    return [*_INSTALL, "--target", str(site), *map(str, wheels)]


def build(site: Path, cuda: str) -> list[str]:
    """Return the command that builds carafepp on this machine: `cuda` is ON or EMULATED."""
    settings = [f"-Ccmake.define.CARAFEPP_CUDA={cuda}"]
    if cuda == "ON":
        settings.append("-Ccmake.define.CMAKE_CUDA_ARCHITECTURES=native")
    return [*_INSTALL, "--no-build-isolation", "--target", str(site), *settings, str(ROOT)]


def why_not(facts: dict[str, Any]) -> str:
    """Return why the bundle's wheel does not fit this machine and tree; nothing if it fits."""
    if not facts:
        return "there is no whole bundle"
    if facts["sources"] != fingerprint():
        return f"the bundle was made from other sources, at commit {facts['commit']}"
    if platform.machine() != "x86_64":
        return f"the bundle's wheel is for x86_64; this is {platform.machine()}"
    return ""
