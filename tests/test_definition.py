"""The two definitions agree: reference.py, and tests/cpp/definition.h for the tests in C++."""

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import reference as ref
from cases import CASES, CUDA_CASES, DTYPES, random_arrays

ROOT = Path(__file__).parent.parent
NAMES = ("features", "masks", "logits", "grad_output", "grad_masks")


@pytest.fixture(scope="module")
def in_cpp(tmp_path_factory):
    """definition.h in a shared library, with the table of cases as CMake has it."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    folder = tmp_path_factory.mktemp("definition")
    with (folder / "cases.inc").open("w") as rows:
        subprocess.run([sys.executable, ROOT / "cases/table.py"], stdout=rows, check=True)
    includes = [f"-I{path}" for path in (folder, ROOT / "core/include")]
    options = [*["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"], *includes]
    library = folder / "definition.so"
    source = ROOT / "tests/cpp/definition.cpp"
    subprocess.run([compiler, *options, source, "-o", library], check=True)
    loaded = ctypes.CDLL(library)
    loaded.name_of_case.restype = ctypes.c_char_p
    return loaded


def pointers(arrays):
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))


def test_cases(in_cpp):
    names = [in_cpp.name_of_case(k).decode() for k in range(in_cpp.number_of_cases())]
    assert names == [*CASES, *CUDA_CASES]


def results(case, a, normalizer):
    """Return (result, sums of magnitudes) for each array that compute of definition.cpp writes."""
    size, k = (case.h, case.w), case.kernel_size
    masks = ref.normalize(
        a.logits, up=case.up, groups=case.groups, normalizer=normalizer, size=case.output_size
    )
    for name, *inputs in (
        ("reassemble", a.features, a.masks),
        ("grad_features", a.grad_output, a.masks, size),
        ("grad_masks", a.grad_output, a.features, k),
    ):
        magnitude = getattr(ref, f"{name}_magnitude")
        yield getattr(ref, name)(*inputs, **case.factors), magnitude(*inputs, **case.factors)
    yield masks, np.abs(masks)
    options = {"up": case.up, "groups": case.groups, "normalizer": normalizer}
    yield (
        ref.normalize_backward(a.grad_masks, a.logits, **options),
        ref.normalize_backward_magnitude(a.grad_masks, a.logits, **options),
    )


@pytest.mark.parametrize("normalizer", ref.NORMALIZERS)
def test_results(in_cpp, normalizer):
    for number, case in enumerate([*CASES.values(), *CUDA_CASES.values()]):
        if case.terms > 5_000:
            continue
        arrays = random_arrays(case, DTYPES[1])
        expected = list(results(case, arrays, normalizer))
        actual = [(np.full_like(a, np.nan), np.full_like(a, np.nan)) for a, _ in expected]
        in_cpp.compute(
            number,
            ref.NORMALIZERS.index(normalizer),
            pointers([getattr(arrays, name) for name in NAMES]),
            *map(pointers, zip(*actual, strict=True)),
        )
        for pair, exact in zip(actual, expected, strict=True):
            for numbers, right in zip(pair, exact, strict=True):
                np.testing.assert_allclose(numbers, right, 1e-12, 1e-12, err_msg=case.name)
