"""Dask arrays: lazy results with the bits of NumPy's, whatever the chunks."""

import re
from pathlib import Path

import numpy as np
import pytest

from skips import import_or_skip

DASK = 'pip install ".[dask]"'
dask = import_or_skip("dask", DASK)
da = import_or_skip("dask.array", DASK)

import carafepp
from cases import CASES, DTYPES, FEW, random_arrays
from cases.calls import arguments, in_layout
from products import product

FORWARDS = ["reassemble", "reassemble_with_logits", "normalize_masks"]
MOST = 5  # chunks along an axis


@pytest.fixture(autouse=True)
def one_thread():
    with dask.config.set(scheduler="synchronous"):
        yield


def chunked(rng, array):
    """Return a Dask array with chunks of random lengths, one-pixel chunks among them."""
    chunks = []
    for length in array.shape:
        count = rng.integers(min(MOST, length)) if length else 0
        starts = np.sort(rng.choice(np.arange(1, max(length, 1)), count, replace=False))
        chunks.append(tuple(int(n) for n in np.diff([0, *starts, length])))
    return da.from_array(array, chunks=tuple(chunks))


def assert_same(lazy, expected):
    assert isinstance(lazy, da.Array)
    assert (lazy.shape, lazy.dtype) == (expected.shape, expected.dtype)
    computed = lazy.compute()
    assert type(computed) is np.ndarray
    assert computed.dtype == expected.dtype
    np.testing.assert_array_equal(computed.astype("f8"), expected.astype("f8"))


@pytest.mark.filterwarnings("ignore:.*are rechunked")
@pytest.mark.parametrize("function", FORWARDS)
@product(
    case=CASES,
    by_default={"case": FEW},
    turns={"dtypes": DTYPES, "layout": ["NCHW", "NHWC"], "normalizer": ["softmax", "none"]},
)
def test_bits_do_not_depend_on_chunks(function, case, dtypes, layout, normalizer, rng):
    """Normally distributed numbers: any other order of a sum would show."""
    arrays, params = arguments(function, case, random_arrays(case, dtypes), normalizer)
    arrays = in_layout(arrays, layout)
    expected = getattr(carafepp, function)(*arrays, **params, layout=layout)
    for _ in range(3):
        lazy = [chunked(rng, array) for array in arrays]
        assert_same(getattr(carafepp, function)(*lazy, **params, layout=layout), expected)


@pytest.mark.filterwarnings("ignore:.*are rechunked")
@pytest.mark.parametrize("padding", [None, 0, (0, 1)])
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (3, 2), (2, 3), (1, 4)])
def test_infinite_masks_meet_no_zeros_beyond_a_border(up, down, padding, rng):
    features = rng.standard_normal((1, 3, 27, 31), np.float32)
    size = carafepp.output_size((27, 31), up, down, kernel_size=5, padding=padding)
    masks = rng.standard_normal((1, 25, *size), np.float32)
    masks[rng.random(masks.shape) < 0.02] = np.inf
    params = {"up": up, "down": down, "padding": padding}
    expected = carafepp.reassemble(features, masks, **params)
    assert np.isfinite(expected).any()
    for _ in range(5):
        lazy = carafepp.reassemble(chunked(rng, features), chunked(rng, masks), **params)
        assert_same(lazy, expected)


@pytest.mark.filterwarnings("ignore:.*are rechunked")
@pytest.mark.parametrize("channels", [3, 16, 17, 40, 64])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_channels_in_chunks(layout, channels, rng):
    """In one group, in groups, in groups of one channel; without a batch."""
    features = rng.standard_normal((channels, 6, 9), np.float32)
    for groups in (1, 2, channels):
        if channels % groups:
            continue
        logits = rng.standard_normal((groups * 9, 6, 9), np.float32)
        arrays, params = (features, logits), {"kernel_size": 3, "groups": groups, "layout": layout}
        if layout == "NHWC":
            arrays = [np.ascontiguousarray(np.moveaxis(array, 0, -1)) for array in arrays]
        expected = carafepp.reassemble_with_logits(*arrays, **params)
        for _ in range(3):
            lazy = [chunked(rng, array) for array in arrays]
            assert_same(carafepp.reassemble_with_logits(*lazy, **params), expected)


def test_other_processes_give_the_same_bits(rng):
    features = rng.standard_normal((1, 8, 20, 30), np.float32)
    logits = rng.standard_normal((1, 9, 10, 15), np.float32)
    lazy = carafepp.reassemble_with_logits(
        da.from_array(features, (1, 8, 10, 10)), da.from_array(logits), down=2, kernel_size=3
    )
    with dask.config.set(scheduler="processes", num_workers=1):
        computed = lazy.compute()
    expected = carafepp.reassemble_with_logits(features, logits, down=2, kernel_size=3)
    np.testing.assert_array_equal(computed, expected)


def unaligned(block):
    """Return the block one byte after an aligned address, as messages between workers have it."""
    copy = np.empty(block.nbytes + 1, np.uint8)[1:].view(block.dtype).reshape(block.shape)
    copy[...] = block
    return copy


def test_chunks_in_any_memory(rng):
    """Not aligned, or transposed. One chunk along an axis has no halo, which would copy it."""
    features = rng.standard_normal((1, 16, 24, 20), np.float32)
    logits = rng.standard_normal((1, 36, 24, 20), np.float32)
    params = {"up": 2, "kernel_size": 3}
    expected = carafepp.reassemble_with_logits(features, logits, **params)
    lazy = [
        da.from_array(array, (1, -1, 24, 20)).map_blocks(unaligned) for array in (features, logits)
    ]
    assert_same(carafepp.reassemble_with_logits(*lazy, **params), expected)
    params["layout"] = "NHWC"
    lazy = [
        da.from_array(array, (1, -1, 12, 20)).transpose(0, 2, 3, 1) for array in (features, logits)
    ]
    expected = carafepp.reassemble_with_logits(*in_layout((features, logits), "NHWC"), **params)
    assert_same(carafepp.reassemble_with_logits(*lazy, **params), expected)


def ones(shape, chunks=-1, dtype="f4"):
    return da.ones(shape, chunks=chunks, dtype=dtype)


def test_nothing_is_computed_before_compute():
    def fail(block):
        raise AssertionError("computed")

    features = ones((1, 2, 40, 40), 20).map_blocks(fail, dtype="f4", meta=np.empty((), "f4"))
    masks = ones((1, 9, 40, 40), 30).map_blocks(fail, dtype="f4", meta=np.empty((), "f4"))
    lazy = carafepp.reassemble(features, masks)
    assert lazy.chunks == ((1,), (2,), (20, 20), (20, 20))
    with pytest.raises(AssertionError, match="computed"):
        lazy.compute()


def test_chunks_of_the_result_are_those_of_features():
    features, logits = (
        ones((2, 6, 50, 60), (1, 2, 20, 24)),
        ones((2, 3 * 9 * 9, 25, 30), (2, -1, 7, 7)),
    )
    params = {"up": 3, "down": 2, "groups": 3, "kernel_size": 3}
    lazy = carafepp.reassemble_with_logits(features, logits, **params)
    assert lazy.chunks == ((1, 1), (2, 2, 2), (30, 30, 15), (36, 36, 18))
    cropped = carafepp.reassemble_with_logits(features, logits, **params, size=(70, 37))
    assert cropped.chunks == ((1, 1), (2, 2, 2), (30, 30, 10), (37,))
    masks = carafepp.normalize_masks(logits[:, :, :, :16], up=3, groups=3, kernel_size=3)
    assert masks.chunks[2] == (21, 21, 21, 12)


def test_one_warning_tells_what_is_rechunked():
    features, masks = ones((1, 3, 40, 41), (1, 3, 5, 15)), ones((1, 25, 20, 21))
    with pytest.warns(UserWarning, match="features are rechunked") as caught:
        lazy = carafepp.reassemble(features, masks, down=2)
    (warning,) = caught
    assert warning.filename == __file__
    assert str(warning.message) == (
        "[reassemble] features are rechunked: axis 2 from (5, 5, ..., 5) to (10, 10, 10, 10), "
        "axis 3 from (15, 15, 11) to (14, 16, 11). To avoid this, pass chunks that begin at "
        "multiples of 2 rows and columns and of 16 channels, and have at least 8 rows and 8 "
        "columns."
    )
    assert lazy.chunks == ((1,), (3,), (5, 5, 5, 5), (7, 8, 6))
    aligned = features.rechunk({2: 8, 3: 20})  # no warning, though the last column has no halo
    assert carafepp.reassemble(aligned, masks, down=2).chunks[2:] == ((4, 4, 4, 4, 4), (10, 11))


def test_the_graph_grows_with_the_number_of_chunks():
    def tasks(side):
        features, masks = ones((1, 1, side, side), 10), ones((1, 9, 2 * side, 2 * side), 20)
        return len(dict(carafepp.reassemble(features, masks, up=2).__dask_graph__()))

    assert tasks(160) < 4.5 * tasks(80)


FEATURES, MASKS, LOGITS = (1, 4, 8, 8), (1, 9, 16, 16), (1, 36, 8, 8)


@pytest.mark.parametrize(
    ("function", "shapes", "params", "dtypes"),
    [
        ("reassemble", (FEATURES, MASKS), {"up": 2}, "fd"),
        ("reassemble", (FEATURES, MASKS), {"up": 2}, "ii"),
        ("reassemble", (FEATURES, MASKS), {"up": 2}, "FF"),
        ("reassemble", (FEATURES, MASKS), {"up": 3}, "ff"),
        ("reassemble", (FEATURES, MASKS), {"up": 0}, "ff"),
        ("reassemble", (FEATURES, MASKS), {"up": 2.0}, "ff"),
        ("reassemble", (FEATURES, MASKS), {"up": 2, "groups": 3}, "ff"),
        ("reassemble", (FEATURES, MASKS), {"up": 2, "padding": 2}, "ff"),
        ("reassemble", (FEATURES, MASKS), {"up": 2, "size": (17, 16)}, "ff"),
        ("reassemble", (FEATURES, MASKS), {"up": 2, "layout": "NCWH"}, "ff"),
        ("reassemble", (FEATURES, MASKS[1:]), {"up": 2}, "ff"),
        ("reassemble", (FEATURES[2:], MASKS[2:]), {"up": 2}, "ff"),
        ("reassemble_with_logits", (FEATURES, LOGITS), {"up": 2}, "ff"),
        ("reassemble_with_logits", (FEATURES, LOGITS), {"up": 2, "kernel_size": 4}, "ff"),
        ("reassemble_with_logits", (FEATURES, LOGITS), {"normalizer": "max"}, "ff"),
        ("normalize_masks", (LOGITS,), {"up": 3, "kernel_size": 3}, "d"),
        ("normalize_masks", (LOGITS,), {"up": 2, "kernel_size": 3}, "i"),
    ],
)
def test_a_call_raises_what_it_raises_on_numpy_arrays(function, shapes, params, dtypes):
    arrays = [np.ones(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises((TypeError, ValueError)) as expected:
        getattr(carafepp, function)(*arrays, **params)
    with pytest.raises(expected.type) as raised:
        getattr(carafepp, function)(*map(da.from_array, arrays), **params)
    assert str(raised.value) == str(expected.value)


def test_what_dask_arrays_cannot():
    features, masks = ones(FEATURES), ones(MASKS)
    with pytest.raises(NotImplementedError, match="there are no gradients of Dask arrays"):
        carafepp.reassemble_backward(ones((1, 4, 16, 16)), features, masks, up=2)
    with pytest.raises(TypeError, match="out must be None: the result is lazy"):
        carafepp.reassemble(features, masks, up=2, out=ones((1, 4, 16, 16)))
    with pytest.raises(TypeError, match="masks must be an array of the library of features, dask"):
        carafepp.reassemble(features, np.ones(MASKS, "f4"), up=2)
    with pytest.raises(TypeError, match="features, numpy; got one of dask"):
        carafepp.reassemble(np.ones(FEATURES, "f4"), masks, up=2)
    unknown = features[features[:, 0, 0, 0] > 0]
    with pytest.raises(ValueError, match=r"features must have chunks of known sizes; .*\(nan, 4"):
        carafepp.reassemble(unknown, masks, up=2)
    with pytest.raises(TypeError, match="masks must not be a masked array"):
        carafepp.reassemble(features, da.ma.masked_less(masks, 0), up=2)
    with (
        carafepp.force_implementation("reassemble_nonsense"),
        pytest.raises(ValueError, match="implementation must be a name"),
    ):
        carafepp.reassemble(features, masks, up=2)


def test_a_forced_implementation_computes_every_tile(rng):
    features, masks = rng.standard_normal((1, 4, 30, 30)), rng.standard_normal((1, 25, 30, 30))
    with carafepp.force_implementation("reassemble_any_ref"):
        lazy = carafepp.reassemble(da.from_array(features, 15), da.from_array(masks))
        expected = carafepp.reassemble(features, masks)
    assert_same(lazy, expected)
    declining = next(
        name
        for name, reason in carafepp.list_implementations("reassemble", features, masks)
        if reason is not None
    )
    with (
        carafepp.force_implementation(declining),
        pytest.raises(NotImplementedError, match=f"implementation {declining} declines: "),
    ):
        carafepp.reassemble(da.from_array(features, 15), da.from_array(masks))


def recipe(name):
    """Return a function that docs/guides/dask.md defines."""
    page = Path(__file__).parent.parent / "docs" / "guides" / "dask.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names = {}
    exec(next(block for block in blocks if f"def {name}(" in block), names)
    return names[name]


@pytest.mark.parametrize("times", [None, 3])
@pytest.mark.parametrize("lazy", [False, True])
def test_the_recipe_for_xarray(times, lazy, rng):
    xr = import_or_skip("xarray", "pip install xarray")
    batch, dims = ([times], ["time"]) if times else ([], [])
    features = xr.DataArray(
        rng.standard_normal((*batch, 4, 12, 20), np.float32),
        dims=[*dims, "channel", "y", "x"],
        coords={"y": np.arange(12.0), "x": 10 * np.arange(20.0)},
    )
    logits = xr.DataArray(
        rng.standard_normal((*batch, 100, 12, 20), np.float32), dims=[*dims, "tap", "y", "x"]
    )
    expected = carafepp.reassemble_with_logits(features.values, logits.values, up=2)
    if lazy:
        features, logits = features.chunk({"y": 6, "x": 10}), logits.chunk({"tap": 20})
    result = recipe("upsample")(features, logits, 2)
    assert isinstance(result.data, da.Array) == lazy
    assert result.dims == (*dims, "channel", "y", "x")
    np.testing.assert_array_equal(result.values, expected)
    assert result.y.values[:4].tolist() == [0, 0.25, 0.75, 1.25]
    assert result.x.values[1] == 2.5


def test_a_wrong_byte_order_is_told_as_of_numpy_arrays():
    arrays = np.ones((1, 1, 4, 4), ">f4"), np.ones((1, 1, 4, 4), np.float32)
    with pytest.raises(TypeError) as told:
        carafepp.reassemble(*arrays)
    with pytest.raises(TypeError, match=f"^{re.escape(str(told.value))}$"):
        carafepp.reassemble(*map(da.from_array, arrays))
