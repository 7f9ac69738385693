"""Calls where CARAFEPP_CUDA_KERNELS is wrong. No call works there, so `functions` has no place."""

import re

import numpy as np
import pytest

import carafepp
from cases import CASES, DTYPES, integer_arrays
from cases.calls import RESULTS, arguments

CASE = CASES["groups_2"]


def call_in_vain(library):
    """Call each function where CARAFEPP_CUDA_KERNELS is `some`: nothing is written."""
    arrays = integer_arrays(CASE, DTYPES[0])
    for function, names in RESULTS.items():
        inputs, params = arguments(function, CASE, arrays)
        on_device = [library.place(array, "contiguous") for array in inputs]
        shapes = ["grad_output" if name == "output" else name for name in names]
        nans = [np.full_like(getattr(arrays, name), np.nan) for name in shapes]
        outs = tuple(library.place(array, "contiguous") for array in nans)
        end = "the environment variable CARAFEPP_CUDA_KERNELS must be all or generic; got some."
        sentence = "^" + re.escape(f"[{function}] {end}") + "$"
        with pytest.raises(ValueError, match=sentence):
            getattr(carafepp, function)(*on_device, **params, out=outs if outs[1:] else outs[0])
        with pytest.raises(ValueError, match=sentence):
            carafepp.list_implementations(function, *on_device, **params)
        assert all(np.isnan(library.read(out)).all() for out in outs)
