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

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = {
    re.search(r"import (\w+)", block)[1]: block
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
}


def test_every_library_is_shown():
    assert set(BLOCKS) == {"numpy", "torch", "jax", "cupy"}


def test_numpy():
    names = {}
    exec(BLOCKS["numpy"], names)
    assert names["output"].shape == (2, 64, 100, 152)
    assert names["masks"].shape == (2, 25, 100, 152)
    assert names["smaller"].shape == (2, 64, 75, 114)
    fused = names["carafepp"].reassemble_with_logits(names["features"], names["logits"], up=2)
    np.testing.assert_allclose(names["output"], fused, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # the compiler's own code warns
def test_torch(torch):
    names = {}
    exec(BLOCKS["torch"], names)
    assert names["output"].shape == (2, 64, 55, 64)
    assert names["output"].requires_grad
    assert all(parameter.grad is not None for parameter in names["network"].parameters())
    output = names["network"](names["pictures"])
    assert output.shape == (2, 64, 56, 64)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_cupy():
    library = connected("cupy")
    names = {}
    exec(BLOCKS["cupy"], names)
    library.synchronize()
    assert type(names["output"]) is library.Array
    assert names["output"].shape == (2, 64, 100, 152)
    assert np.isfinite(library.read(names["output"])).all()


def test_the_link_line_gives_a_program_that_starts(tmp_path):
    if shutil.which("cc") is None or shutil.which("sh") is None:
        pytest.skip("there is no C compiler, or no shell")
    (lines,) = re.findall(r"(?:^    .*\n)*^    cc program\.c.*\n", README, re.MULTILINE)
    (tmp_path / "program.c").write_text(
        "#include <carafepp/carafepp.h>\n#include <stdio.h>\n"
        "int main(void) { puts(carafepp_version()); return 0; }\n"
    )
    script = f'set -e\npython() {{ {sys.executable!r} "$@"; }}\n{lines}./program\n'
    environment = {key: value for key, value in os.environ.items() if key != "LD_LIBRARY_PATH"}
    done = subprocess.run(
        ["sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == carafepp.__version__, done.stderr


def test_the_files_that_contributing_names_exist():
    root = Path(__file__).parent.parent
    text = (root / "CONTRIBUTING.md").read_text()
    named = re.findall(r"`((?:core|python|bindings|tests|cases|docs)/[\w./]+)`", text)
    assert named
    assert not [name for name in named if not (root / name).exists()]
