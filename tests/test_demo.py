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

import tifffile
from PIL import Image

from carafepp import demo
from carafepp.guided import NO_HALO
from carafepp.pictures import colours, read_picture, shades_of

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
    scores, _ = sheets.upsampling_demo
    assert getattr(scores["carafepp"], measure) < getattr(scores[rival], measure)


def test_carafepp_beats_bicubic_by_far(sheets):
    scores, _ = sheets.upsampling_demo
    assert scores["carafepp"].mae <= 0.85 * scores["bicubic"].mae


def test_small_disparity_is_the_mean_of_known_pixels():
    disparity = np.full((8, 32), np.nan)
    disparity[0, 0], disparity[7, 7] = 1, 4
    disparity[3, 31] = 8
    # Two blocks without a known pixel: each takes the value of its neighbour.
    np.testing.assert_array_equal(demo.shrink_disparity(disparity), [[2.5, 2.5, 8, 8]])


def upsample(lowres, photo):
    return demo.upsample_with_logits(lowres, demo.logits_from_guide(photo, demo.UP))


def test_upsampling_keeps_a_constant_up_to_the_border():
    """No renormalisation in the operator: taps beyond the border must have weight 0."""
    photo = np.random.default_rng(0).random((24, 32, 3), np.float32)
    upsampled = upsample(np.full((3, 4), 7, np.float32), photo)
    np.testing.assert_allclose(upsampled, np.full((24, 32), 7), rtol=1e-5)


def test_upsampling_is_not_shifted():
    """Mirrored input, mirrored output."""
    rng = np.random.default_rng(0)
    photo, lowres = rng.random((24, 32, 3), np.float32), rng.random((3, 4), np.float32)
    mirrored = upsample(lowres[::-1, ::-1].copy(), photo[::-1, ::-1].copy())
    upsampled = upsample(lowres, photo)
    np.testing.assert_allclose(mirrored[::-1, ::-1], upsampled, rtol=1e-4)


def test_downsampling_a_flat_photo_is_area_averaging():
    """Noise far below what counts as detail is averaged, in odd-sized photographs too."""
    noise = np.random.default_rng(0).random((13, 22, 3), np.float32)
    photo = 0.5 + 1e-3 * noise
    average = np.nanmean(demo.split_into_blocks(photo, demo.DOWN), 2)
    assert average.shape == (4, 6, 3)
    np.testing.assert_allclose(demo.downsample_with_masks(photo, NO_HALO), average, atol=1e-5)


def test_downsampling_keeps_a_thin_line():
    photo = np.ones((32, 32, 3), np.float32)
    photo[:, 14] = 0  # a quarter of its block: averaging leaves a light grey, 0.75
    assert demo.downsample_with_masks(photo, NO_HALO)[:, 3].max() < 0.55


def test_tiles_give_what_one_piece_gives(monkeypatch):
    """45 x 58 pixels: the last blocks are not full, and the last tile has one block."""
    pixels = np.random.default_rng(0).integers(0, 256, (45, 58, 3), np.uint8)
    shades = demo.shades_of("pixels", pixels)
    whole = demo.shrink(pixels, shades)
    monkeypatch.setattr(demo, "TILE", 7)
    tiled = demo.shrink(pixels, shades)
    for name in whole:
        np.testing.assert_allclose(tiled[name], whole[name], atol=1e-5, err_msg=name)


def test_main_writes_all_pictures(sheets):
    written = sorted(sheets.out.iterdir())
    names = ["disparity", "photograph-shrunk", "photograph"]
    assert [path.name for path in written] == [f"carafepp-{name}.png" for name in names]
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


def test_the_logits_have_a_time_of_their_own(sheets):
    scores, seconds_of_logits = sheets.upsampling_demo
    assert scores["carafepp"].seconds < seconds_of_logits
    assert f"in {1000 * seconds_of_logits:.0f} ms" in sheets.printed


# A picture's grey values rise from 0 to 1; the last column is white.
GREY = np.tile(np.linspace(0, 1, 52), (37, 1))
COLOURS = np.stack([GREY, 1 - GREY, GREY**2], 2)


def save(path, mode="RGB", **options):
    picture = Image.fromarray(np.rint(255 * COLOURS).astype(np.uint8)).convert(mode)
    picture.save(path, **options)
    return np.asarray(picture.convert("RGB")) / np.float32(255)


def read(path):
    picture = read_picture("IMAGE", path)
    return colours(picture.pixels, shades_of("IMAGE", picture.pixels))


@pytest.mark.parametrize("mode", ["RGBA", "RGB", "LA", "L", "1", "P", "CMYK", "YCbCr"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pictures_of_every_mode_are_read(tmp_path, mode, suffix):
    if suffix == ".png" and mode in ("CMYK", "YCbCr"):
        suffix = ".jpg"
    expected = save(tmp_path / f"mine{suffix}", mode)
    picture = read(tmp_path / f"mine{suffix}")
    assert picture.dtype == np.float32
    np.testing.assert_allclose(picture, expected, atol=0.1 if suffix == ".jpg" else 1e-6)


RANGES = [
    *[(dtype, least, most) for dtype in ("f2", "f4", "f8") for least, most in [(0, 1), (0, 255)]],
    *[("f4", -3, 40), ("f8", 0, 3e9), ("f8", -1e308, 1e308), ("u1", 0, 255)],
    *[("u2", 0, 65535), ("u2", 0, 4095), ("i1", -100, 100), ("i2", 0, 32767), ("i2", -1000, 3000)],
    *[("i4", 0, 2**31 - 1), ("u4", 0, 2**32 - 1), ("u8", 0, 2**60), ("i4", 0, 255)],
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("dtype", "least", "most"), RANGES)
def test_values_of_every_dtype_and_range_are_shown(tmp_path, dtype, least, most, channels):
    shown = GREY if channels == 1 else COLOURS
    values = least * (1 - shown) + most * shown
    pixels = (values if dtype[0] == "f" else np.rint(values)).astype(dtype)
    kind = "rgb" if channels == 3 else "minisblack"
    tifffile.imwrite(tmp_path / "mine.tif", pixels, photometric=kind)
    tolerance = 1e-3 if dtype == "f2" else 1 / (most - least) if dtype[0] in "iu" else 1e-6
    expected = np.broadcast_to(shown if channels == 3 else shown[..., None], COLOURS.shape)
    np.testing.assert_allclose(read(tmp_path / "mine.tif"), expected, atol=tolerance + 1e-6)


def test_reading_pictures(tmp_path):
    """16 bits are scaled, not clipped; what is transparent is white, what is not finite black."""
    Image.fromarray(np.full((2, 3), 128 * 257, np.uint16)).save(tmp_path / "deep.png")
    np.testing.assert_allclose(read(tmp_path / "deep.png"), 128 / 255, rtol=1e-6)
    Image.new("RGBA", (3, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    np.testing.assert_array_equal(read(tmp_path / "clear.png"), np.ones((2, 3, 3)))
    tifffile.imwrite(tmp_path / "nan.tif", np.float32([[np.nan, np.inf, -np.inf, 1, 0.5]]))
    np.testing.assert_array_equal(read(tmp_path / "nan.tif")[0, :, 0], [0, 0, 0, 1, 0.5])
    tifffile.imwrite(tmp_path / "ink.tif", np.uint16([[0, 65535]]), photometric="miniswhite")
    np.testing.assert_array_equal(read(tmp_path / "ink.tif")[0, :, 0], [1, 0])


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, suffix, orientation):
    """Pillow turns the one, we the other, of float16."""
    path = tmp_path / f"turned{suffix}"
    if suffix == ".jpg":
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray((255 * GREY).astype(np.uint8)).save(path, exif=exif)
    else:
        tifffile.imwrite(path, GREY.astype("f2"), extratags=[(274, 3, 1, orientation, True)])
    white_side = {1: "right", 2: "left", 3: "left", 4: "right"}.get(
        orientation, "bottom" if orientation in (5, 6) else "top"
    )
    picture = read(path)[..., 0]
    sides = dict(left=picture[:, 0], right=picture[:, -1], top=picture[0], bottom=picture[-1])
    assert max(sides, key=lambda side: sides[side].mean()) == white_side


def test_own_picture(tmp_path, capsys):
    """37 x 52 pixels: no whole number of blocks. Files of other kinds get names of their own."""
    for name in ("mine.png", "mine.jpg"):
        save(tmp_path / name)
        assert demo.main([str(tmp_path / name), "--out", str(tmp_path / "out")]) == 0
        assert f"{name}: 52 x 37 pixels" in capsys.readouterr().out
    written = {path.name: open_png(path) for path in (tmp_path / "out").iterdir()}
    assert set(written) == {
        f"carafepp-mine.{kind}{what}.png" for kind in ("png", "jpg") for what in ("", "-shrunk")
    }
    assert written["carafepp-mine.png-shrunk.png"].shape == (10, 13, 3)
    assert all(picture.std() > 5 for picture in written.values())


def test_the_input_is_never_overwritten(tmp_path):
    save(tmp_path / "mine.png")
    before = (tmp_path / "mine.png").read_bytes()
    for name in ("carafepp-mine.png.png", "carafepp-mine.png-shrunk.png"):
        (tmp_path / name).symlink_to("mine.png")
    assert demo.main([str(tmp_path / "mine.png"), "--out", str(tmp_path)]) == 0
    assert (tmp_path / "mine.png").read_bytes() == before


def test_what_a_user_may_not_expect_is_told(tmp_path, capsys):
    pixels = np.stack([GREY.astype("f4") * 3000 - 7] * 2)
    tifffile.imwrite(tmp_path / "mine.tif", pixels, photometric="minisblack")
    assert demo.main([str(tmp_path / "mine.tif"), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "IMAGE has 2 frames: the first one is taken." in printed
    assert "IMAGE has float32 values: -7 is black, 2993 is white." in printed


def broken(path):
    path.write_bytes(b"no picture")


def truncated(path):
    save(path)
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("bad.png", lambda path: None, "No such file or directory"),
        ("bad.png", lambda path: path.mkdir(), "Is a directory"),
        ("bad.png", broken, "its content is no picture of a known kind"),
        ("bad.tif", broken, "its content is no picture of a known kind"),
        ("bad.png", truncated, "truncated"),
    ],
    ids=["missing", "folder", "no_picture", "no_tiff", "truncated"],
)
def test_unreadable_picture(tmp_path, capsys, name, make, reason):
    path = tmp_path / name
    make(path)
    assert demo.main([str(path), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    sentence = f"python -m carafepp demo: IMAGE must be a file that can be read; got {path}: "
    assert printed.err.startswith(sentence)
    assert reason in printed.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("pixels", "sentence"),
    [
        (np.zeros((3, 50), "u1"), "IMAGE must have 4 rows and columns or more"),
        (np.full((9, 9), np.nan, "f4"), "IMAGE must have a finite pixel; got none"),
        (np.zeros((9, 9), "c8"), "IMAGE must have real numbers; got complex64"),
    ],
    ids=["small", "nan", "complex"],
)
def test_pictures_that_are_refused(tmp_path, capsys, pixels, sentence):
    tifffile.imwrite(tmp_path / "mine.tif", pixels)
    assert demo.main([str(tmp_path / "mine.tif"), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert (printed.out, sentence in printed.err) == ("", True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("out", "reason"),
    [("mine.png", "a file"), ("mine.png/new", "Not a directory"), (300 * "n", "File name too")],
)
def test_wrong_folders(tmp_path, capsys, out, reason):
    save(tmp_path / "mine.png", "L")
    assert demo.main([str(tmp_path / "mine.png"), "--out", str(tmp_path / out)]) == 2
    sentence = f"--out must be a folder to write into; got {tmp_path / out}: {reason}"
    assert sentence in capsys.readouterr().err


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
