"""carafepp.viz: contributions traced through masks, exactly, and what is drawn of them."""

import doctest
import re

import numpy as np
import pytest

from skips import import_or_skip

import_or_skip("matplotlib")

from matplotlib.figure import Figure
from PIL import Image

import carafepp
from carafepp import viz
from carafepp.viz import Reassembly, most_weighted, nearest, principal_colours, trace


def small_integers(rng, size, *, up=1, down=1, groups=1, k=3, padding=None):
    """Return masks of small integers: sums of their products are exact."""
    shape = carafepp.output_size(size, up, down, k, padding)
    masks = rng.integers(-3, 4, (groups * k * k, *shape)).astype(np.float32)
    return Reassembly(masks, size, up, down, groups, padding)


# Tracing


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("up", "down", "k", "padding"),
    [(2, 1, 5, None), (1, 2, 3, None), (3, 2, 5, (2, 1)), (1, 1, 1, None), (2, 1, 3, (0, 1))],
)
def test_contributions_by_definition(rng, up, down, k, padding, groups):
    """A unit's contribution is its weight in Eqn. 3, the mean over groups; else 0."""
    r = small_integers(rng, (5, 7), up=up, down=down, groups=groups, k=k, padding=padding)
    rows, columns = padding or (k // 2, k // 2)
    height, width = r.masks.shape[1:]
    for i, j in [(0, 0), (height - 1, width - 1), (height // 2, 1)]:
        expected = np.zeros((5, 7))
        for g, a, b in np.ndindex(groups, k, k):
            row, column = i * down // up + a - rows, j * down // up + b - columns
            if 0 <= row < 5 and 0 <= column < 7:
                expected[row, column] += r.masks[g * k * k + a * k + b, i, j] / groups
        np.testing.assert_array_equal(trace([r], (i, j))[0], expected)


def test_a_chain_reassembles_the_content_of_its_last_source(rng):
    """The contributions are the weights of the last source's units: exact on small integers."""
    coarse = small_integers(rng, (3, 4), up=2)
    fine = small_integers(rng, (6, 8), up=2)
    source = rng.integers(-3, 4, (1, 1, 3, 4)).astype(np.float32)
    middle = carafepp.reassemble(source, coarse.masks[None], up=2)
    output = carafepp.reassemble(middle, fine.masks[None], up=2)
    for location in [(0, 0), (5, 9), (11, 15)]:
        in_middle, in_source = trace([fine, coarse], location)
        assert (in_middle * middle[0, 0]).sum() == output[0, 0][location]
        assert (in_source * source[0, 0]).sum() == output[0, 0][location]


def test_contributions_are_the_gradient_by_autograd(torch, rng):
    """A chain down and up agrees with PyTorch's own operations."""
    down, up = small_integers(rng, (8, 6), down=2), small_integers(rng, (4, 3), up=2)
    x = torch.zeros(1, 1, 8, 6, requires_grad=True)

    def unfold(x, r):
        taps = torch.nn.functional.unfold(x, 3, padding=1).reshape(1, 9, *r.size)
        rows, columns = (
            torch.arange(n) * r.down // r.up for n in r.masks.shape[1:]
        )  # the middles of the windows
        return (taps[:, :, rows][..., columns] * torch.from_numpy(r.masks)).sum(1, keepdim=True)

    unfold(unfold(x, down), up)[0, 0, 5, 2].backward()
    np.testing.assert_array_equal(trace([up, down], (5, 2))[1], x.grad[0, 0].numpy())


def test_softmax_masks_contribute_1_within_the_borders(rng):
    def softmax(size, up):
        logits = rng.normal(size=(1, 25 * up * up, *size)).astype(np.float32)
        masks = carafepp.normalize_masks(logits, up=up, kernel_size=5, normalizer="softmax")
        return Reassembly(masks[0], size, up)

    chain = [softmax((32, 32), 2), softmax((16, 16), 2)]
    for weights in trace(chain, (31, 33)):
        assert weights.min() >= 0
        assert weights.sum() == pytest.approx(1, abs=1e-6)
    assert trace(chain, (0, 0))[1].sum() < 0.9  # a part lies beyond the border


def test_nearest_is_one_unit_all_the_way():
    for stride, weights in zip(
        (2, 4, 8), trace([nearest((8, 8)), nearest((4, 4)), nearest((2, 2))], (13, 6)), strict=True
    ):
        expected = np.zeros_like(weights)
        expected[13 // stride, 6 // stride] = 1
        np.testing.assert_array_equal(weights, expected)


@pytest.mark.parametrize(
    ("chain", "location", "message"),
    [
        ([], (0, 0), "[trace] chain must have one reassembly or more; got none."),
        ([nearest((2, 3))], (4, 0), "[trace] location must be within (4, 6); got (4, 0)."),
        ([nearest((2, 3))], (0, -1), "[trace] location must be within (4, 6); got (0, -1)."),
        (
            [nearest((4, 4)), nearest((2, 3))],
            (0, 0),
            "[trace] chain[1] must make what chain[0] reassembles, of size (4, 4); got (4, 6).",
        ),
    ],
)
def test_errors_of_trace(chain, location, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        trace(chain, location)


# Recording


def test_recorded_masks_make_the_output(torch):
    """Also of a crop, of keyword arguments and of a batch, of which the first picture is kept."""
    from carafepp.torch import CARAFE

    torch.manual_seed(0)
    up, down = CARAFE(8, up=2, groups=2, kernel_size=3), CARAFE(8, down=2, ceil_mode=False)
    valid = CARAFE(8, padding=(0, 1))
    network = torch.nn.ModuleDict({"up": up, "down": down, "valid": valid})
    x = torch.randn(2, 8, 5, 7)
    with viz.record_reassemblies(network) as reassemblies:
        outputs = {"up": up(x=x, size=(9, 13)), "down": down(x), "valid": valid(x)}
    assert list(reassemblies) == ["up", "down", "valid"]
    for name, r in reassemblies.items():
        assert r.size == (5, 7)
        factors = dict(up=r.up, down=r.down, groups=r.groups, padding=r.padding)
        size = r.masks.shape[1:]
        again = carafepp.reassemble(x[0].numpy(), r.masks, size=size, **factors)
        expected = outputs[name][0].detach().numpy()
        np.testing.assert_allclose(again, expected, rtol=1e-5, atol=1e-6)


def test_nothing_is_recorded_after_the_context(torch):
    from carafepp.torch import CARAFE

    network = CARAFE(4, up=2)
    with viz.record_reassemblies(network) as reassemblies:
        pass
    network(torch.randn(1, 4, 3, 3))
    assert reassemblies == {}


@pytest.mark.usefixtures("torch")
def test_examples():
    assert doctest.testmod(viz).failed == 0


# Pictures


def test_most_weighted():
    weights = np.array([[0.5, 0.1], [0.0, 0.4]])
    assert most_weighted(weights, 0.4).tolist() == [[True, False], [False, False]]
    assert most_weighted(weights, 0.6).tolist() == [[True, False], [False, True]]
    assert most_weighted(weights, 1).tolist() == [[True, True], [False, True]]


@pytest.mark.parametrize("share", [0, 1.1])
def test_errors_of_most_weighted(share):
    message = f"[most_weighted] share must be above 0, at most 1; got {share}."
    with pytest.raises(ValueError, match=re.escape(message)):
        most_weighted(np.ones((2, 2)), share)


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_principal_colours(rng, channels):
    """The first component, red, tells the halves of a picture apart, which differ most."""
    features = rng.normal(size=(channels, 6, 10))
    features[:, :, 5:] += 20
    colours = principal_colours(features)
    assert colours.shape == (6, 10, 3)
    assert colours.min() >= 0
    assert colours.max() <= 1
    assert (colours[:, 5:, 0] > 0.7).all()
    assert (colours[:, :5, 0] < 0.3).all()


def pixels(draw, tmp_path, size=16):
    """Return what a function draws on axes that show a black picture, 10 dots for each pixel."""
    figure = Figure(figsize=(size / 10, size / 10), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    viz.draw_picture(axes, np.zeros((3, size, size)))
    draw(axes)
    figure.savefig(tmp_path / "drawn.png")
    with Image.open(tmp_path / "drawn.png") as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB")).astype(int)


def middles(picture):
    """The dots in the middles of the pixels: [H, W, 3]."""
    return picture[5::10, 5::10]


def test_a_region_is_drawn_in_its_place(tmp_path):
    weights = np.zeros((4, 4))
    weights[1, 2], weights[3, 0] = 1, 0.25
    red = middles(pixels(lambda axes: viz.draw_region(axes, weights, 4), tmp_path))[..., 0]
    assert (red[4:8, 8:12] == red[4, 8]).all()
    assert red[4, 8] == pytest.approx(0.85 * 255, abs=2)
    assert red[12, 0] == pytest.approx(0.425 * 255, abs=2)
    assert (red > 0).sum() == 32


def test_units_are_drawn_in_the_middles_of_their_cells(tmp_path):
    weights = np.zeros((2, 2))
    weights[0, 1], weights[1, 0] = 0.9, 0.1
    picture = pixels(lambda axes: viz.draw_units(axes, weights, 8, share=0.5), tmp_path)
    rows, columns = np.nonzero(picture[..., 0] > 200)
    assert (rows.mean(), columns.mean()) == pytest.approx((40, 120), abs=1.5)


def test_a_unit_is_framed(tmp_path):
    picture = pixels(lambda axes: viz.draw_unit(axes, (1, 0), 8), tmp_path)
    rows, columns = np.nonzero(picture[..., 0] > 100)
    assert (rows.min(), columns.max()) == pytest.approx((80, 80), abs=2)
    assert picture[120, 40].sum() == 0


def test_a_location_is_drawn_around_the_middle_of_its_unit(tmp_path):
    picture = pixels(lambda axes: viz.draw_location(axes, (1, 0), 8), tmp_path)
    rows, columns = np.nonzero(picture[..., 1] > 200)
    assert (rows.mean(), columns.mean()) == pytest.approx((120, 40), abs=1.5)
    assert picture[120, 40].sum() == 0


def test_a_mask_is_drawn_over_its_window(tmp_path):
    """A kernel of one tap, up and left of the middle, of the second group."""
    masks = np.zeros((18, 8, 8))
    masks[9, 5, 4] = 1
    r = Reassembly(masks, (4, 4), up=2, groups=2)
    red = middles(pixels(lambda axes: viz.draw_mask(axes, r, (5, 4), 4, group=1), tmp_path))[..., 0]
    assert (red[5:7, 5:7] > 200).all()
    assert (red[9:, 9:] < 50).all()
    valid = Reassembly(masks[:, 2:-2, 2:-2], (4, 4), up=2, groups=2, padding=(0, 0))
    again = pixels(lambda axes: viz.draw_mask(axes, valid, (3, 2), 4, group=1), tmp_path)
    np.testing.assert_array_equal(middles(again)[..., 0], red)
