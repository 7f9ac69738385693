"""Programs without Python: the header, the library and the examples of the package."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import carafepp
from skips import skip

EXAMPLES = Path(__file__).parent.parent / "examples"
HEADER = Path(carafepp.get_include()) / "carafepp" / "carafepp.h"


def run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=120, check=False
    )


def write_picture(path: Path, picture: np.ndarray) -> None:
    h, w, _ = picture.shape
    path.write_bytes(b"P6\n%d %d\n255\n" % (w, h) + picture.tobytes())


def read_picture(path: Path) -> np.ndarray:
    _, size, _, data = path.read_bytes().split(b"\n", 3)
    w, h = map(int, size.split())
    return np.frombuffer(data, np.uint8).reshape(h, w, 3)


@pytest.fixture(scope="module")
def rescale(tmp_path_factory):
    """The example in C99, built against nothing but the package."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    program = tmp_path_factory.mktemp("examples") / "rescale"
    library = Path(carafepp.get_library())
    done = run(
        *(compiler, "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-O2"),
        *("-I", carafepp.get_include(), EXAMPLES / "rescale.c", library),
        *(f"-Wl,-rpath,{library.parent}", "-o", program),
    )
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.parametrize(("up", "down"), [(2, 1), (1, 2), (3, 2)])
def test_the_c_example_rescales_a_picture(rescale, tmp_path, up, down):
    """Two halves of one colour each: every window near the edge takes the one that it begins in."""
    picture = np.zeros((21, 30, 3), np.uint8)
    picture[:, :15], picture[:, 15:] = (200, 10, 60), (20, 190, 255)
    write_picture(tmp_path / "in.ppm", picture)
    done = run(rescale, tmp_path / "in.ppm", tmp_path / "out.ppm", up, down)
    assert done.returncode == 0, done.stderr
    h, w = carafepp.output_size((21, 30), up, down)
    assert done.stdout == f"30x21 to {w}x{h} by carafepp {carafepp.__version__}\n"
    i, j = np.arange(h) * down // up, np.arange(w) * down // up
    np.testing.assert_allclose(read_picture(tmp_path / "out.ppm"), picture[i][:, j], atol=1)


def test_the_c_example_tells_the_librarys_sentence(rescale, tmp_path):
    write_picture(tmp_path / "in.ppm", np.zeros((4, 4, 3), np.uint8))
    done = run(rescale, tmp_path / "in.ppm", tmp_path / "out.ppm", 0, 1)
    assert done.returncode == 1
    assert done.stderr == "rescale: [reassemble_with_logits] up must be at least 1; got 0.\n"
    assert not (tmp_path / "out.ppm").exists()


@pytest.mark.parametrize("name", ["with_numpy", "with_cupy"])
def test_the_python_examples(name):
    done = run(sys.executable, EXAMPLES / f"{name}.py")
    if "not installed" in done.stderr or "nothing was run" in done.stdout:
        skip("cuda", done.stderr or done.stdout)
    assert done.returncode == 0, done.stderr
    assert "->" in done.stdout


def test_the_library_exports_the_functions_of_the_header():
    declared = set(re.findall(r"^CARAFEPP_API .*?(\w+)\(", HEADER.read_text(), re.MULTILINE))
    assert {"carafepp_reassemble", "carafepp_last_error"} < declared
    if shutil.which("nm") is None:
        pytest.skip("there is no nm")
    done = run("nm", "-D", "--defined-only", carafepp.get_library())
    exported = {line.split()[-1] for line in done.stdout.splitlines()}
    assert exported == declared


def test_the_library_needs_no_python():
    if shutil.which("ldd") is None:
        pytest.skip("there is no ldd")
    assert "python" not in run("ldd", carafepp.get_library()).stdout


def test_pkg_config_finds_the_package(tmp_path, monkeypatch):
    folder = Path(carafepp.get_library()).parent / "pkgconfig"
    assert f"Version: {carafepp.__version__}\n" in (folder / "carafepp.pc").read_text()
    if shutil.which("pkg-config") is None or shutil.which("cc") is None:
        pytest.skip("there is no pkg-config, or no C compiler")
    monkeypatch.setenv("PKG_CONFIG_PATH", str(folder))
    flags = run("pkg-config", "--cflags", "--libs", "carafepp").stdout.split()
    done = run("cc", EXAMPLES / "rescale.c", *flags, "-o", tmp_path / "rescale")
    assert done.returncode == 0, done.stderr
    assert "usage" in run(tmp_path / "rescale").stderr


def test_cmake_finds_the_package(tmp_path):
    assert (Path(carafepp.get_cmake_dir()) / "carafepp-config.cmake").exists()
    if shutil.which("cmake") is None:
        pytest.skip("there is no CMake")
    done = run(
        "cmake", "-S", EXAMPLES, "-B", tmp_path, f"-Dcarafepp_DIR={carafepp.get_cmake_dir()}"
    )
    assert done.returncode == 0, done.stderr
    done = run("cmake", "--build", tmp_path, "--target", "rescale")
    assert done.returncode == 0, done.stderr
    assert "usage" in run(tmp_path / "rescale").stderr
