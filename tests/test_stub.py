"""The committed type stub is what the compiled module says of itself."""

import subprocess
import sys
from pathlib import Path

import carafepp


def test_stub_is_that_of_the_module(tmp_path):
    stub = tmp_path / "_core.pyi"
    command = [sys.executable, "-m", "nanobind.stubgen", "-q", "-m", "carafepp._core", "-o", stub]
    subprocess.run(command, check=True)
    committed = Path(carafepp.__file__).with_name("_core.pyi")
    assert committed.read_text() == stub.read_text()


def test_the_package_is_typed():
    assert Path(carafepp.__file__).with_name("py.typed").exists()
