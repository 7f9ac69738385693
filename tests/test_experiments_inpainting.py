"""carafepp.experiments: the pictures and their holes, and training on them."""

import numpy as np
import pytest

from skips import import_or_skip

torch = import_or_skip("torch")
import_or_skip("skimage")
import_or_skip("sklearn")

from PIL import Image, ImageDraw

from carafepp.experiments import inpainting
from carafepp.experiments import pictures as pics
from carafepp.experiments.inpainting import make_generator, train_inpainting
from carafepp.torch import CARAFE


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(inpainting, "TEST_CROPS", 8)


@pytest.fixture(scope="module")
def pictures():
    return pics.load_pictures(32)


def test_pictures(pictures):
    """Seven in two parts each, within [-1, 1] and with something on them."""
    assert len(pictures.train) == len(pictures.test) == 7
    for train, test in zip(pictures.train, pictures.test, strict=True):
        assert train.dtype == test.dtype == np.float32
        assert train.shape[0] == test.shape[0] >= 100
        assert train.shape[1] == pytest.approx(2 * test.shape[1], abs=2)
        for part in (train, test):
            assert part.shape[2] == 3
            assert -1 <= part.min() < -0.5
            assert 0 < part.max() <= 1


def test_the_parts_of_a_picture_are_its_columns(pictures):
    """The astronaut, 512 x 512: shrunk by 3 to 170 columns, of which 113 are trained on."""
    from skimage import data

    blocks = data.astronaut()[:510, :510].reshape(170, 3, 170, 3, 3).mean((1, 3)) / 127.5 - 1
    np.testing.assert_allclose(pictures.train[0], blocks[:, :113], atol=1e-6)
    np.testing.assert_allclose(pictures.test[0], blocks[:, 113:], atol=1e-6)


@pytest.mark.parametrize(("size", "rows"), [(50, 100), (51, 150), (75, 150), (76, 300), (151, 300)])
def test_larger_crops_are_of_larger_pictures(size, rows):
    """The smallest photograph has 300 rows, and a right third of 151 columns."""
    train, test = pics.load_pictures(size)
    assert min(picture.shape[0] for picture in test) == rows
    assert min(min(picture.shape[:2]) for picture in train + test) >= size


def test_crops_are_squares_of_the_pictures_half_of_them_mirrored():
    """Each pixel of this picture tells where it is from."""
    rows, cols = np.mgrid[:20, :30]
    picture = np.stack([rows, cols, rows * 0], -1).astype(np.float32)
    crops = pics.random_crops([picture], 200, 16, np.random.default_rng(0))
    assert crops.shape == (200, 3, 16, 16)
    tops, steps = crops[:, 0, 0, 0], crops[:, 1, 0, 1] - crops[:, 1, 0, 0]
    assert set(tops) == set(range(5))
    assert 70 < (steps == 1).sum() < 130
    np.testing.assert_array_equal(crops[:, 0] - tops[:, None, None], np.mgrid[:200, :16, :16][1])
    lefts = crops[:, 1].min((1, 2))
    assert set(lefts) == set(range(15))
    ahead = np.where(steps[:, None] == 1, np.arange(16), np.arange(16)[::-1])
    np.testing.assert_array_equal(crops[:, 1, 7], lefts[:, None] + ahead)


@pytest.mark.parametrize("make", [pics.free_form_holes, pics.rectangular_holes])
@pytest.mark.parametrize("size", [32, 96])
def test_holes(make, size):
    """Some in each picture, never all of it, about a fifth on average; by the seed alone."""
    holes = make(64, size, np.random.default_rng(3))
    assert holes.shape == (64, 1, size, size)
    assert holes.dtype == bool
    shares = holes.mean((1, 2, 3))
    assert 0.01 < shares.min() < shares.max() < 0.7
    assert 0.1 < shares.mean() < 0.3
    np.testing.assert_array_equal(holes, make(64, size, np.random.default_rng(3)))
    assert (holes != make(64, size, np.random.default_rng(4))).any()


def test_rectangles_are_rectangles():
    for hole in pics.rectangular_holes(20, 32, np.random.default_rng(0))[:, 0]:
        rows, cols = hole.any(1), hole.any(0)
        np.testing.assert_array_equal(hole, rows[:, None] & cols)
        assert 8 <= rows.sum() <= 16
        assert 8 <= cols.sum() <= 16


def test_strokes_are_drawn_with_a_round_brush():
    picture = Image.new("1", (32, 32))
    pics._draw_stroke(ImageDraw.Draw(picture), [np.array([8, 16]), np.array([24, 16])], 6)
    rows, cols = np.nonzero(np.asarray(picture))
    away = np.hypot(rows - 16, cols - np.clip(cols, 8, 24))
    assert away.max() <= 3.5  # pixels are squares
    assert np.asarray(picture)[14:18, 6:26].all()


def test_psnr():
    originals = np.zeros((2, 3, 4, 4), np.float32)
    assert pics.psnr(originals + 0.2, originals) == pytest.approx(20)
    half = originals.copy()
    half[0] = 0.2
    assert pics.psnr(half, originals) == pytest.approx(20 + 10 * np.log10(2))


SMALL = dict(steps=6, size=16, width=8, batch=4)
networks = pytest.mark.parametrize("network", ["global_local", "partial_conv"])


def weights(result):
    return torch.cat([p.flatten() for p in result["generator"].state_dict().values()])


@networks
@pytest.mark.parametrize("adversarial", [False, True], ids=["reconstruction", "adversarial"])
def test_the_same_seed_the_same_result(network, adversarial):
    """Whatever the global generators' state, which stays as it is."""
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again, other = (
        train_inpainting(network, seed=seed, adversarial=adversarial, **SMALL) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))
    numbers = ("psnr", "l1", "psnr_mean", "parameters")
    assert [first[name] for name in numbers] == [again[name] for name in numbers]
    assert first["psnr"] != other["psnr"]
    assert first["psnr_mean"] == other["psnr_mean"]


@networks
def test_the_discriminator_changes_the_training(network):
    with_, without = (train_inpainting(network, adversarial=a, **SMALL) for a in (True, False))
    assert not torch.equal(weights(with_), weights(without))


@pytest.mark.exhaustive
@networks
@pytest.mark.parametrize("names", [{}, dict(downsampler="carafe", upsampler="carafe")], ids=str)
def test_training_lowers_the_loss(network, names, monkeypatch):
    """On one batch, always the same."""
    crops = pics.random_crops(pics.load_pictures(16).train, 4, 16, np.random.default_rng(0))
    monkeypatch.setattr(inpainting, "random_crops", lambda *_: crops.copy())
    holes = pics.rectangular_holes(4, 16, np.random.default_rng(0))
    monkeypatch.setattr(inpainting, "free_form_holes", lambda *_: holes)
    losses = []

    def progress(step, loss):
        assert step == len(losses)
        losses.append(loss)

    train_inpainting(network, progress=progress, **{**SMALL, **names, "steps": 40})
    assert len(losses) == 40
    assert losses[-1] < 0.7 * losses[0]


@networks
def test_names_are_the_networks_resamplers(network):
    plain = make_generator(network, width=4)
    both = make_generator(network, width=4, downsampler="carafe", upsampler="carafe")
    for generator, found in ((plain, 0), (both, 4)):
        assert sum(isinstance(m, CARAFE) for m in generator.modules()) == found
    up = make_generator(network, width=4, upsampler="carafe")
    assert [m.up for m in up.modules() if isinstance(m, CARAFE)] == [2, 2]


def test_partial_conv_is_the_papers_without_skip_connections():
    assert not make_generator("partial_conv", width=4).skips


def test_evaluation_is_of_the_filled_pictures():
    """A generator that knows nothing, and its numbers from the definitions."""

    class Grey(torch.nn.Module):
        def forward(self, image, hole):
            assert not self.training
            seen.append((image, hole))
            return torch.zeros_like(image)

    seen = []
    numbers = inpainting.evaluate(Grey(), 32)
    ((image, hole),) = seen
    error = (image * hole).double().numpy()
    assert numbers["psnr"] == pytest.approx(10 * np.log10(4 / (error**2).mean()))
    assert numbers["l1"] == pytest.approx(100 * np.abs(error).mean() / 2, rel=1e-5)
    around = image.where(~hole, torch.nan).nanmean((2, 3), keepdim=True)
    error = ((image - around) * hole).double().numpy()
    assert numbers["psnr_mean"] == pytest.approx(10 * np.log10(4 / (error**2).mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            dict(network="unet"),
            "[train_inpainting] network must be 'global_local' or 'partial_conv'; got 'unet'.",
        ),
        (
            dict(network="partial_conv", upsampler="gum"),
            "[PartialConvUNet] upsampler must be one of 'nearest', 'carafe'; got 'gum'.",
        ),
        (
            dict(network="global_local", steps=0),
            "[train_inpainting] steps must be at least 1; got 0.",
        ),
        (
            dict(network="global_local", size=152),
            "[load_pictures] size must be at most 151; got 152.",
        ),
    ],
    ids=["network", "upsampler", "steps", "size"],
)
def test_wrong_arguments(options, sentence):
    with pytest.raises(ValueError, match=r"^\[") as caught:
        train_inpainting(**{**SMALL, **options})
    assert str(caught.value) == sentence
