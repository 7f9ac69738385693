"""`import carafepp` brings in NumPy and nanobind's backend, and nothing else."""

import json
import subprocess
import sys

import pytest

import carafepp

FRAMEWORKS = (
    *("torch", "cupy", "jax", "tensorflow", "array_api_strict", "ml_dtypes"),
    *("scipy", "skimage", "matplotlib", "PIL", "onnx", "numba", "pandas", "dask", "zarr"),
)

# Modules by name, without those of the standard library and of the interpreter's own start.
PROGRAM = """
import json, sys
import numpy
before = set(sys.modules)
{body}
new = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(json.dumps(sorted(new - set(sys.stdlib_module_names))))
"""


def newly_imported(body):
    """Packages outside the standard library that the body imports after NumPy."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(body=body)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_brings_in_nothing_but_nanobind_backend():
    assert newly_imported("import carafepp") <= {"carafepp", "nanobind_backend"}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_import_brings_in_no_framework(framework):
    assert framework not in newly_imported("import carafepp")


def test_a_call_on_numpy_arrays_brings_in_nothing_more():
    body = """
import carafepp
x, m = numpy.ones((1, 2, 3, 3), "f2"), numpy.ones((1, 9, 3, 3), "f4")
y = carafepp.reassemble(x, m)
carafepp.reassemble_backward(y, x, m)
carafepp.reassemble_with_logits(x, m, kernel_size=3)
carafepp.show_config()
"""
    assert newly_imported(body) <= {"carafepp", "nanobind_backend"}


def test_a_failing_call_brings_in_nothing_more():
    body = """
import carafepp
for argument in ([1.0], None, "features", object(), numpy.ones((1, 2, 3, 3), int)):
    try:
        carafepp.reassemble(argument, argument)
    except TypeError:
        pass
    else:
        raise AssertionError(argument)
"""
    assert newly_imported(body) <= {"carafepp", "nanobind_backend"}


def test_import_works_where_no_framework_can_be_imported():
    body = f"""
for name in {FRAMEWORKS!r}:
    sys.modules[name] = None  # its import raises ImportError
import carafepp
y = carafepp.reassemble(numpy.ones((1, 1, 2, 2)), numpy.ones((1, 1, 2, 2)))
assert y.sum() == 4
"""
    allowed = {"carafepp", "nanobind_backend", *FRAMEWORKS}
    assert newly_imported(body) <= allowed


MODULES = ("experiments", "jax", "torch", "viz")


def test_modules_are_listed_before_they_are_imported():
    body = f"""
import carafepp
assert set(dir(carafepp)) >= {{*{MODULES!r}, *carafepp.__all__, "__version__"}}
assert not any("carafepp." + name in sys.modules for name in {MODULES!r})
"""
    assert newly_imported(body) <= {"carafepp", "nanobind_backend"}


def test_a_module_is_imported_when_it_is_used(torch):
    body = """
import carafepp
assert carafepp.torch.CARAFE(8, up=2).up == 2
assert carafepp.torch.mmcv.CARAFEPack(8, 2).scale_factor == 2
assert carafepp.torch.models.FPN
assert "mmcv" in dir(carafepp.torch)
"""
    assert "torch" in newly_imported(body)


@pytest.mark.parametrize(
    ("name", "package", "install"),
    [
        ("torch", "torch", "carafepp[torch]"),
        ("jax", "jax", "carafepp[jax]"),
        ("viz", "matplotlib", "carafepp[demo]"),
    ],
)
def test_a_module_without_its_package_says_what_to_install(name, package, install):
    body = f"""
sys.modules[{package!r}] = None  # its import raises ImportError
import importlib
import carafepp
try:
    importlib.import_module("carafepp.{name}")
except ModuleNotFoundError as error:
    assert str(error).endswith('Install it: pip install "{install}"'), error
else:
    raise AssertionError
try:
    carafepp.{name}
except AttributeError as error:
    assert str(error).startswith("carafepp.{name} cannot be imported: "), error
    assert str(error).endswith('Install it: pip install "{install}"'), error
assert not hasattr(carafepp, "{name}")
"""
    newly_imported(body)


def test_another_attribute_is_an_error():
    with pytest.raises(AttributeError, match=r"^module 'carafepp' has no attribute 'nonsense'$"):
        carafepp.nonsense  # noqa: B018


def test_import_is_quick():
    """Beside NumPy: under a second even on a busy machine."""
    body = """
import time
begin = time.perf_counter()
import carafepp
assert time.perf_counter() - begin < 1
"""
    newly_imported(body)
