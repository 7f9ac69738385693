"""Padding, without the definition of reference.py: by NumPy's windows, pads, crops and tiles.

The table of cases has padding too, so every other test of results covers it.
"""

import itertools

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view

import carafepp
from cases import CASES, DTYPES, FEW, Case, double, integer_arrays, integers
from cases.calls import FUNCTIONS, arguments, call
from functions import each_function
from products import product

F32 = DTYPES[0]
UNPADDED = {name: case for name, case in CASES.items() if case.padding is None}


def padded(features, rows, columns, mode="constant"):
    return np.pad(features, ((0, 0), (0, 0), (rows, rows), (columns, columns)), mode)


def part(first, size):
    """Return the index of some rows and columns of arrays in NCHW."""
    return (..., *(slice(f, f + n) for f, n in zip(first, size, strict=True)))


def by_windows(features, masks, kernel_size, up, down):
    """Return sums over the windows that fit into the map: up/down for each."""
    windows = sliding_window_view(double(features), (kernel_size, kernel_size), (2, 3))
    h, w = (np.arange(extent) * down // up for extent in masks.shape[2:])
    n, _, *size = masks.shape
    weights = double(masks).reshape(n, kernel_size, kernel_size, *size)
    return np.einsum("nchwab,nabhw->nchw", windows[:, :, h[:, None], w], weights)


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric", "wrap"])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("kernel_size", [3, 5])
def test_the_caller_may_pad_in_any_way(kernel_size, up, down, mode, rng):
    """`numpy.pad` and padding=0: the size is that of the map before it was padded."""
    features, radius = integers(rng, (2, 9, 7, 21), 4), kernel_size // 2
    size = carafepp.output_size(features.shape[2:], up, down)
    masks = integers(rng, (2, kernel_size**2, *size), 2)
    padded_features = padded(features, radius, radius, mode)
    output = carafepp.reassemble(padded_features, masks, up=up, down=down, padding=0)
    expected = by_windows(padded_features, masks, kernel_size, up, down)
    np.testing.assert_array_equal(output, expected)
    if mode == "constant":
        np.testing.assert_array_equal(
            output, carafepp.reassemble(features, masks, up=up, down=down)
        )


@product(
    case=UNPADDED,
    by_default={"case": [case for case in FEW if case.padding is None]},
    function=[f for f in FUNCTIONS if f.startswith("reassemble")],
)
def test_the_default_is_half_of_the_kernel(case, function):
    inputs, params = arguments(function, case, integer_arrays(case, F32))
    results = call(function, inputs, {**params, "padding": case.kernel_size // 2})
    for result, expected in zip(results, call(function, inputs, params), strict=True):
        np.testing.assert_array_equal(result.view(np.uint32), expected.view(np.uint32))


# Factors and offsets for which a source lies on an output: up * offset is divisible by down.
CROPS = [
    Case("same_size", "", 2, 9, 8, 21, kernel_size=5, padding=(0, 1)),
    Case("up2", "", 2, 9, 8, 21, up=2, kernel_size=5, padding=(1, 0)),
    Case("down2", "", 2, 9, 12, 38, down=2, kernel_size=5, padding=(0, 0)),
    Case("ratio_4_2", "", 1, 9, 8, 21, up=4, down=2, padding=(1, 0)),
    Case("ratio_3_2", "", 1, 9, 9, 37, up=3, down=2, kernel_size=5, padding=(0, 2)),
    Case("groups", "", 1, 8, 8, 21, up=3, kernel_size=7, groups=4, padding=(3, 1)),
]


@pytest.mark.parametrize("case", CROPS, ids=lambda case: case.name)
def test_less_padding_is_a_crop_on_all_sides(case, rng):
    """Forward and gradients: of a default result whose other gradients are 0."""
    a, k = integer_arrays(case, F32), case.kernel_size
    params = {"up": case.up, "down": case.down, "groups": case.groups}
    whole = carafepp.output_size((case.h, case.w), case.up, case.down)
    first = [(k // 2 - pad) * case.up // case.down for pad in case.padding]
    inside = part(first, case.output_size)
    masks = integers(rng, (*case.masks_shape[:2], *whole), 2)
    masks[inside] = a.masks
    grad_output = np.zeros((*case.output_shape[:2], *whole), np.float32)
    grad_output[inside] = a.grad_output

    output = carafepp.reassemble(a.features, a.masks, **case.factors)
    np.testing.assert_array_equal(output, carafepp.reassemble(a.features, masks, **params)[inside])
    gx, gm = carafepp.reassemble_backward(a.grad_output, a.features, a.masks, **case.factors)
    expected = carafepp.reassemble_backward(grad_output, a.features, masks, **params)
    np.testing.assert_array_equal(gx, expected[0])
    np.testing.assert_array_equal(gm, expected[1][inside])


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (3, 2)])
def test_tiles_with_a_halo_are_parts_of_the_whole(up, down, rng):
    radius, tile = 2, 8
    features = integers(rng, (1, 9, 16, 24), 4)
    logits = integers(rng, (1, 25 * up**2, 16 // down, 24 // down), 2)
    params = {"up": up, "down": down, "normalizer": "none"}
    whole = carafepp.reassemble_with_logits(features, logits, **params)
    for i, j in itertools.product(range(0, 16, tile), range(0, 24, tile)):
        halo = padded(features, radius, radius)[part((i, j), 2 * [tile + 2 * radius])]
        cells = logits[part((i // down, j // down), 2 * [tile // down])]
        output = carafepp.reassemble_with_logits(halo, cells, **params, padding=0)
        expected = whole[part((i * up // down, j * up // down), output.shape[2:])]
        assert output.shape[2:] == 2 * (tile * up // down,)
        np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("batched", [True, False])
def test_one_number_is_for_rows_and_columns(layout, batched, rng):
    """In every layout, and for one image."""
    features, masks = integers(rng, (1, 4, 8, 9), 4), integers(rng, (1, 25, 6, 7), 2)
    expected = carafepp.reassemble(features, masks, padding=(1, 1))
    arrays = [features, masks, expected]
    if layout == "NHWC":
        arrays = [np.moveaxis(array, 1, -1) for array in arrays]
    features, masks, expected = arrays if batched else [array[0] for array in arrays]
    output = carafepp.reassemble(features, masks, padding=1, layout=layout)
    np.testing.assert_array_equal(output, expected)


@pytest.mark.parametrize("name", ["padding_of_too_few", "padding_of_far_too_few"])
@each_function
def test_without_a_window_results_are_empty_and_gradients_0(function, name):
    case = CASES[name]
    inputs, params = arguments(function, case, integer_arrays(case, F32))
    results = call(function, inputs, params)
    assert case.output_size[0] == 0
    for result in results:
        assert not result.any()
    if function == "reassemble":
        assert results[0].shape == case.output_shape


def test_list_implementations_takes_padding():
    features, masks = np.ones((1, 4, 8, 9), np.float32), np.ones((1, 25, 4, 5), np.float32)
    listed = carafepp.list_implementations("reassemble", features, masks, padding=0)
    assert listed[-1] == ("reassemble_any_ref", None)
    with pytest.raises(ValueError, match="masks must have shape"):
        carafepp.list_implementations("reassemble", features, masks)
