"""`import carafepp` brings in NumPy and nanobind's backend, and nothing else."""

import json
import subprocess
import sys

import pytest

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


def test_import_is_quick():
    """Beside NumPy: under a second even on a busy machine."""
    body = """
import time
begin = time.perf_counter()
import carafepp
assert time.perf_counter() - begin < 1
"""
    newly_imported(body)
