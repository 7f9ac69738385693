"""The guides' programs run as they stand, the blocks of a page in order."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cuda_libraries import connected
from skips import skip

DOCS = Path(__file__).parent.parent / "docs"
# test_torch_relatives.py runs the lines of relatives.md. A comment says why a block does not run.
GUIDES = sorted(path.name for path in (DOCS / "guides").glob("*.md") if path.stem != "relatives")
NOT_RUN = r"(<!-- not run: [^>]*-->\n\n?)?"


def blocks_of(page, language):
    text = (DOCS / "guides" / page).read_text()
    found = re.findall(NOT_RUN + rf"```{language}\n(.*?)```", text, re.DOTALL)
    return [block for comment, block in found if not comment]


@pytest.mark.filterwarnings("ignore")  # other libraries warn
@pytest.mark.parametrize("page", [page for page in GUIDES if blocks_of(page, "python")])
def test_the_programs_of_a_guide(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page == "cupy.md":
        connected("cupy")
    names = {"__name__": "__main__"}
    try:
        for block in blocks_of(page, "python"):
            exec(block, names)
    except ModuleNotFoundError as error:
        if error.name.startswith("carafepp"):
            raise
        skip(error.name, f"{error}; docs/guides/{page} tells what to install")
    except NotImplementedError as error:
        if "JAX arrays cannot be computed on" not in str(error):
            raise
        skip("jax", str(error))


def test_the_program_of_the_c_guide(tmp_path):
    if shutil.which("cc") is None or shutil.which("sh") is None:
        pytest.skip("there is no C compiler, or no shell")
    page = (DOCS / "guides" / "c.md").read_text()
    (program,) = blocks_of("c.md", "c")
    (tmp_path / "program.c").write_text(program)
    (lines,) = re.findall(r"(?:^    (?:library|include)=.*\n)+^    cc program\.c.*\n", page, re.M)
    script = f'set -e\npython() {{ {sys.executable!r} "$@"; }}\n{lines}./program\n'
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.startswith("3 in the middle"), done.stderr
