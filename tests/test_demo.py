"""`python -m carafepp demo`: the figures it promises, the files it writes, its errors."""

import io
import subprocess
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest

from skips import import_or_skip

import_or_skip("skimage")
import_or_skip("matplotlib")

from PIL import Image

from carafepp import demo

pytestmark = pytest.mark.xdist_group("demo")  # a fixture takes long


def open_png(path):
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("RGB"))


@pytest.fixture(scope="module")
def sheets(tmp_path_factory):
    """One run of the demo: the folder it makes, what it prints, and what each sheet measures."""
    out, measured = tmp_path_factory.mktemp("demo") / "new" / "folder", {}
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:

        def keep(name, draw):
            patch.setattr(demo, name, lambda *a: measured.setdefault(name, draw(*a)))

        keep("upsampling_demo", demo.upsampling_demo)
        keep("downsampling_demo", demo.downsampling_demo)
        assert demo.main(["--out", str(out)]) == 0
    return SimpleNamespace(out=out, printed=printed.getvalue(), **measured)


@pytest.mark.parametrize("rival", ["nearest", "bilinear", "bicubic"])
@pytest.mark.parametrize("measure", ["rmse", "mae", "bad"])
def test_carafepp_beats_every_rival_on_every_measure(sheets, rival, measure):
    scores = sheets.upsampling_demo
    assert getattr(scores["carafepp"], measure) < getattr(scores[rival], measure)


def test_carafepp_beats_bicubic_by_far(sheets):
    scores = sheets.upsampling_demo
    assert scores["carafepp"].mae <= 0.85 * scores["bicubic"].mae


def test_small_disparity_is_the_mean_of_known_pixels():
    disparity = np.full((8, 32), np.nan)
    disparity[0, 0], disparity[7, 7] = 1, 4
    disparity[3, 31] = 8
    # Two blocks without a known pixel: each takes the value of its neighbour.
    np.testing.assert_array_equal(demo.shrink_disparity(disparity), [[2.5, 2.5, 8, 8]])


def test_upsampling_keeps_a_constant_up_to_the_border():
    """No renormalisation in the operator: taps beyond the border must have weight 0."""
    photo = np.random.default_rng(0).random((24, 32, 3), np.float32)
    upsampled = demo.upsample_with_photo(np.full((3, 4), 7, np.float32), photo)
    np.testing.assert_allclose(upsampled, np.full((24, 32), 7), rtol=1e-5)


def test_upsampling_is_not_shifted():
    """Mirrored input, mirrored output."""
    rng = np.random.default_rng(0)
    photo, lowres = rng.random((24, 32, 3), np.float32), rng.random((3, 4), np.float32)
    mirrored = demo.upsample_with_photo(lowres[::-1, ::-1].copy(), photo[::-1, ::-1].copy())
    upsampled = demo.upsample_with_photo(lowres, photo)
    np.testing.assert_allclose(mirrored[::-1, ::-1], upsampled, rtol=1e-4)


def test_downsampling_a_flat_photo_is_area_averaging():
    """Noise far below what counts as detail is averaged, in odd-sized photographs too."""
    noise = np.random.default_rng(0).random((13, 22, 3), np.float32)
    photo = 0.5 + 1e-3 * noise
    average = np.nanmean(demo.split_into_blocks(photo, demo.DOWN), 2)
    assert average.shape == (4, 6, 3)
    np.testing.assert_allclose(demo.downsample_with_masks(photo), average, atol=1e-5)


def test_downsampling_keeps_a_thin_line():
    photo = np.ones((32, 32, 3), np.float32)
    photo[:, 14] = 0  # a quarter of its block: averaging leaves a light grey, 0.75
    assert demo.downsample_with_masks(photo)[:, 3].max() < 0.55


def test_main_writes_both_sheets(sheets):
    written = sorted(sheets.out.iterdir())
    assert [path.name for path in written] == ["carafepp-disparity.png", "carafepp-photograph.png"]
    for path in written:
        assert open_png(path).std() > 20
        assert path.stat().st_size < 2_000_000
        assert str(path) in sheets.printed
    for name in ("nearest", "bilinear", "bicubic", "carafepp", "area averaging", "max pooling"):
        assert f"  {name} " in sheets.printed


def test_photo_keeps_brightness_and_gains_contrast(sheets):
    looks = sheets.downsampling_demo
    average, maximum, ours = looks["area averaging"], looks["max pooling"], looks["carafepp"]
    assert ours.contrast > 1.2 * average.contrast
    assert abs(ours.brightness - average.brightness) < 2 < maximum.brightness - average.brightness


def save(path, mode):
    rng = np.random.default_rng(0)
    if mode == "I;16":
        Image.fromarray(rng.integers(0, 2**16, (37, 51), np.uint16)).save(path)
    else:
        Image.fromarray(rng.integers(0, 256, (37, 51, 4), np.uint8)).convert(mode).save(path)


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "LA", "L", "1", "P", "I;16"])
def test_pictures_of_every_mode_are_read(tmp_path, mode):
    save(tmp_path / "mine.png", mode)
    picture = demo.read_picture(tmp_path / "mine.png")
    assert (picture.shape, picture.dtype) == ((37, 51, 3), np.float32)
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert picture.std() > 0.1


def test_own_picture(tmp_path):
    """37 x 51 pixels: no whole number of blocks."""
    save(tmp_path / "mine.png", "RGB")
    assert demo.main([str(tmp_path / "mine.png"), "--out", str(tmp_path / "out")]) == 0
    (written,) = (tmp_path / "out").iterdir()
    assert written.name == "carafepp-mine.png"
    assert open_png(written).std() > 5


def test_own_picture_of_one_pixel(tmp_path):
    Image.new("L", (1, 1), 100).save(tmp_path / "dot.png")
    assert demo.main([str(tmp_path / "dot.png"), "--out", str(tmp_path)]) == 0


def test_reading_pictures(tmp_path):
    """16 bits are scaled, not clipped; what is transparent is white."""
    Image.fromarray(np.full((2, 3), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_allclose(demo.read_picture(tmp_path / "deep.png"), 128 / 255, rtol=1e-6)
    Image.new("RGBA", (3, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(demo.read_picture(tmp_path / "clear.png"), np.ones((2, 3, 3)))


def broken(path):
    path.write_bytes(b"no picture")


def truncated(path):
    save(path, "RGB")
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (broken, "cannot identify image file"),
        (truncated, "truncated"),
    ],
    ids=["missing", "folder", "no_picture", "truncated"],
)
def test_unreadable_picture(tmp_path, capsys, make, reason):
    path = tmp_path / "bad.png"
    make(path)
    assert demo.main([str(path), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"python -m carafepp demo: cannot read {path}: ")
    assert reason in printed.err
    assert not (tmp_path / "out").exists()


def test_out_is_a_file(tmp_path, capsys):
    save(tmp_path / "mine.png", "L")
    assert demo.main([str(tmp_path / "mine.png"), "--out", str(tmp_path / "mine.png")]) == 2
    assert "File exists" in capsys.readouterr().err


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "carafepp", "demo", str(tmp_path / "missing.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "missing.png: No such file or directory" in done.stderr
    assert "Traceback" not in done.stderr


def test_missing_package_is_named():
    """A fresh interpreter in which matplotlib cannot be imported."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from carafepp import demo; sys.exit(demo.main([]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert 'pip install "carafepp[demo]"' in done.stderr
    assert "matplotlib" in done.stderr
    assert "Traceback" not in done.stderr
