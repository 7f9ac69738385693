"""The README's programs and commands run as they stand."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import carafepp
from cuda_libraries import connected

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = {
    re.search(r"import (\w+)", block)[1]: block
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
}
# Blocks for a shell are fenced or indented; a paragraph of one is a unit.
SHELL = [
    paragraph.strip()
    for fenced, indented in re.findall(
        r"^```sh\n(.*?)^```|((?:^ {4}\S[^\n]*\n)+)", README, re.DOTALL | re.MULTILINE
    )
    for paragraph in re.split(
        r"\n\s*\n", fenced or re.sub("^    ", "", indented, flags=re.MULTILINE)
    )
]
COMPILES = [text for text in SHELL if re.search(r"^cc .*program\.c|^cmake ", text, re.MULTILINE)]


def run_python(library):
    """Run a block; its comments tell the shapes of what its lines assign. Return its names."""
    names = {}
    exec(PYTHON[library], names)
    shapes = re.findall(r"^ *(\w+) = .*# \((\d[\d, ]*)\)", PYTHON[library], re.MULTILINE)
    for name, shape in shapes:
        assert names[name].shape == tuple(int(n) for n in shape.split(",") if n.strip())
    assert names["output"].ndim == 4
    return names


def test_it_has_at_most_110_lines():
    assert len(README.splitlines()) <= 110


def test_the_first_libraries_are_shown():
    assert {"numpy", "torch", "cupy"} <= set(PYTHON)


def test_numpy():
    names = run_python("numpy")
    fused = carafepp.reassemble_with_logits(names["features"], names["logits"], up=2)
    np.testing.assert_allclose(names["output"], fused, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # the compiler's own code warns
def test_torch(torch):
    assert run_python("torch")["output"].requires_grad


def test_cupy():
    library = connected("cupy")
    output = run_python("cupy")["output"]
    library.synchronize()
    assert type(output) is library.Array
    assert np.isfinite(library.read(output)).all()


def _compiles_the_core(text):
    return pytest.mark.slow if "cmake --build" in text else ()


@pytest.mark.parametrize(
    "lines", [pytest.param(text, marks=_compiles_the_core(text)) for text in COMPILES]
)
def test_the_lines_for_c_give_a_program_that_starts(lines, tmp_path):
    """In a clone, with `program.c` in it."""
    if shutil.which("cc") is None or shutil.which("sh") is None:
        pytest.skip("there is no C compiler, or no shell")
    if re.search("^cmake ", lines, re.MULTILINE) and shutil.which("cmake") is None:
        pytest.skip("there is no CMake")
    for name in ("CMakeLists.txt", "bindings", "cmake", "core", "examples", "python"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copy(ROOT / "examples/rescale.c", tmp_path / "program.c")
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    script = f'set -e\npython() {{ {sys.executable!r} "$@"; }}\n{lines}\n'
    done = subprocess.run(
        ["sh", "-c", script],
        cwd=tmp_path,
        env=environment | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if "program.c" in lines:
        started = subprocess.run(
            [tmp_path / "program"], env=environment, capture_output=True, text=True
        )
        assert "usage" in started.stderr


def test_some_lines_are_for_c():
    assert any("program.c" in text for text in COMPILES)


def test_ci_runs_the_first_two_commands():
    if not (ROOT / ".ci").exists():
        pytest.skip("a source distribution has no CI")
    titles = re.findall(r"^step '(.*)'$", (ROOT / ".ci/run").read_text(), re.MULTILINE)
    assert SHELL[0].splitlines()[:2] == titles[:2]


def _anchors(page):
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_its_links_and_pictures_are_there(name):
    text = (ROOT / name).read_text()
    links = re.findall(r"\]\(([^)\s]+)|\b(?:src|href)=\"([^\"]+)", text)
    links = [link for pair in links for link in pair if link]
    for link in links:
        if not re.match("https?:|mailto:", link):
            path, _, anchor = link.partition("#")
            page = ROOT / path if path else ROOT / name
            assert page.exists(), link
            assert not anchor or anchor in _anchors(page), link
    assert links


def test_the_files_that_contributing_names_exist():
    root = Path(__file__).parent.parent
    text = (root / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:core|python|bindings|tests|cases|docs)/[\w./]+)`", text)
    assert named
    assert not [name for name in named if not (root / name).exists()]
