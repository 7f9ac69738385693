"""`python -m carafepp upsample`: values, files, errors."""

import subprocess
import sys

import numpy as np
import pytest

from skips import import_or_skip

import_or_skip("skimage")
DASK = 'pip install ".[dask]"'  # has Zarr, which reads TIFF too

import tifffile
from PIL import Image

from carafepp import upsample
from carafepp.guided import logits_from_guide


def run(folder, low, guide, *options, out="out.npy", factor=4):
    """Write arrays as .npy files, run the command, and return its exit status."""
    for name, array in (("low.npy", low), ("guide.npy", guide)):
        if isinstance(array, np.ndarray):
            np.save(folder / name, array)
    paths = [
        str(folder / name if isinstance(array, np.ndarray) else array)
        for name, array in (("low.npy", low), ("guide.npy", guide))
    ]
    return upsample.main(
        [*paths, "--factor", str(factor), "--out", str(folder / out), *map(str, options)]
    )


def guide_of(rng, rows, columns, factor=4):
    return rng.integers(0, 256, (rows * factor, columns * factor, 3), np.uint8)


@pytest.mark.parametrize("dtype", ["u1", "u2", "i4", "f4", "f8"])
def test_tiles_give_what_one_piece_gives(tmp_path, monkeypatch, rng, dtype):
    low, guide = (100 * rng.random((11, 14))).astype(dtype), guide_of(rng, 11, 14)
    assert run(tmp_path, low, guide, out="whole.npy") == 0
    monkeypatch.setattr(upsample, "TILE", 12)
    assert run(tmp_path, low, guide, out="tiles.npy") == 0
    whole, tiles = np.load(tmp_path / "whole.npy"), np.load(tmp_path / "tiles.npy")
    assert whole.dtype == low.dtype
    assert whole.shape == (44, 56)
    np.testing.assert_allclose(tiles, whole, rtol=1e-5)
    assert low.min() <= whole.min() <= whole.max() <= low.max()


def test_an_edge_of_the_guide_is_an_edge_of_the_result(tmp_path):
    """The edge is in the middle of a block, where no interpolation could put it."""
    guide = np.zeros((32, 32), np.uint8)
    guide[:, 18:] = 200
    low = np.repeat([[1, 1, 1, 1, 5, 9, 9, 9]], 8, 0).astype(np.float32)
    assert run(tmp_path, low, guide) == 0
    result = np.load(tmp_path / "out.npy")
    assert result[:, :18].max() < 2 < 8 < result[:, 18:].min()


def test_masks_stay_masks(tmp_path, rng):
    guide = guide_of(rng, 6, 8)
    for low in (rng.random((6, 8)) < 0.5, rng.choice([0, 255], (6, 8)).astype("u1")):
        assert run(tmp_path, low, guide) == 0
        result = np.load(tmp_path / "out.npy")
        assert result.dtype == low.dtype
        np.testing.assert_array_equal(np.unique(result), np.unique(low))
        (tmp_path / "out.npy").unlink()


def test_labels_are_not_mixed(tmp_path, rng):
    low, guide = rng.choice([3, 7, 200], (6, 8)).astype("u2"), guide_of(rng, 6, 8)
    assert run(tmp_path, low, guide, "--labels") == 0
    np.testing.assert_array_equal(np.unique(np.load(tmp_path / "out.npy")), [3, 7, 200])
    assert run(tmp_path, low, guide, out="mixed.npy") == 0
    assert len(np.unique(np.load(tmp_path / "mixed.npy"))) > 3


def test_labels_in_several_chunks_are_those_of_one(tmp_path, monkeypatch, rng):
    """Equal shares, as of a flat guide, have the smallest name."""
    low = rng.permutation(np.arange(40).repeat(3)).reshape(10, 12).astype("u2")
    for guide in (guide_of(rng, 10, 12), np.zeros((40, 48, 3), np.uint8)):
        results = []
        for names in (upsample.NAMES, 7, 100):
            monkeypatch.setattr(upsample, "NAMES", names)
            assert run(tmp_path, low, guide, "--labels") == 0
            results.append(np.load(tmp_path / "out.npy"))
            (tmp_path / "out.npy").unlink()
        np.testing.assert_array_equal(results[0], results[2])
        np.testing.assert_array_equal(results[1], results[2])


def test_a_name_as_long_as_a_file_may_have(tmp_path):
    assert run(tmp_path, LOW, GUIDE, out="f" * 251 + ".npy") == 0


def test_a_palette_is_kept(tmp_path, rng):
    picture = Image.fromarray(rng.integers(0, 3, (6, 8), np.uint8))
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    picture.save(tmp_path / "low.png")
    assert run(tmp_path, tmp_path / "low.png", guide_of(rng, 6, 8), out="out.png") == 0
    with Image.open(tmp_path / "out.png") as result:
        assert (result.mode, result.size) == ("P", (32, 24))
        assert result.getpalette()[:9] == picture.getpalette()[:9]


def test_unknown_pixels_do_not_spread(tmp_path, rng):
    low = np.full((8, 8), 5, np.float32)
    low[2, 3], low[6, 6] = np.nan, np.inf
    assert run(tmp_path, low, np.full((32, 32), 100, np.uint8)) == 0
    result = np.load(tmp_path / "out.npy")
    unknown = np.isnan(result)
    assert 0 < unknown.sum() <= 2 * 64
    np.testing.assert_allclose(result[~unknown], 5, rtol=1e-6)
    assert run(tmp_path, low * np.nan, guide_of(rng, 8, 8), out="none.npy") == 0
    assert np.isnan(np.load(tmp_path / "none.npy")).all()


def read(path):
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".zarr":
        return import_or_skip("zarr", DASK).open_array(str(path), mode="r")[...]
    with Image.open(path) as picture:
        return np.asarray(picture)


def write(path, array):
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".zarr":
        zarr = import_or_skip("zarr", DASK)
        zarr.save_array(str(path), array)
    else:
        Image.fromarray(array).save(path)


@pytest.mark.parametrize("dtype", ["u1", "u2", "f4", "?"])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy", ".zarr"])
def test_files_of_every_kind(tmp_path, rng, suffix, dtype):
    if suffix == ".png" and dtype == "f4":
        pytest.skip("PNG has no floats: an error, below")
    if suffix == ".tif":
        import_or_skip("zarr", DASK)
    low, guide = (2 * rng.random((6, 8))).astype(dtype), guide_of(rng, 6, 8)
    if dtype == "?" and suffix == ".tif":
        low = low.astype("u1")
    assert run(tmp_path, low, guide, out="expected.npy") == 0
    write(tmp_path / f"low{suffix}", low)
    write(tmp_path / f"guide{suffix}", guide)
    paths = tmp_path / f"low{suffix}", tmp_path / f"guide{suffix}"
    assert run(tmp_path, *paths, out=f"out{suffix}") == 0
    result, expected = read(tmp_path / f"out{suffix}"), np.load(tmp_path / "expected.npy")
    assert result.dtype == expected.dtype
    np.testing.assert_array_equal(result, expected)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_channels_are_upsampled_each(tmp_path, rng):
    low, guide = rng.integers(0, 256, (6, 8, 3), np.uint8), guide_of(rng, 6, 8)
    assert run(tmp_path, low, guide) == 0
    assert run(tmp_path, low[..., 1].copy(), guide, out="one.npy") == 0
    result = np.load(tmp_path / "out.npy")
    np.testing.assert_array_equal(result[..., 1], np.load(tmp_path / "one.npy"))


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy"])
def test_channels_survive_in_files(tmp_path, rng, suffix, channels):
    """A TIFF file keeps them within one page."""
    low = rng.integers(0, 256, (6, 8, channels), np.uint8)
    guide = guide_of(rng, 6, 8)
    status = run(tmp_path, low, guide, out=f"out{suffix}")
    assert status == (2 if suffix == ".png" and channels == 5 else 0)
    if status == 0:
        assert run(tmp_path, low, guide, out="expected.npy") == 0
        expected = np.load(tmp_path / "expected.npy")
        tif = suffix == ".tif"
        result = (tifffile.imread if tif else read)(tmp_path / f"out{suffix}")
        np.testing.assert_array_equal(result.reshape(expected.shape), expected)
        if tif:
            with tifffile.TiffFile(tmp_path / "out.tif") as file:
                assert len(file.pages) == 1


def test_the_first_page_is_taken(tmp_path, rng, capsys):
    import_or_skip("zarr", DASK)
    pages, guide = rng.random((3, 6, 8), np.float32), guide_of(rng, 6, 8)
    tifffile.imwrite(tmp_path / "low.tif", pages, photometric="minisblack")
    assert run(tmp_path, tmp_path / "low.tif", guide) == 0
    assert "LOW has 3 frames: the first one is taken." in capsys.readouterr().out
    assert run(tmp_path, pages[0], guide, out="expected.npy") == 0
    results = [np.load(tmp_path / name) for name in ("out.npy", "expected.npy")]
    np.testing.assert_array_equal(*results)


@pytest.mark.parametrize("channels", [None, 1, 2, 3, 4])
@pytest.mark.parametrize(
    ("dtype", "white"), [("?", 1), ("u1", 255), ("u2", 65535), ("u2", 4095), ("f4", 1), ("f8", 255)]
)
def test_guides_of_every_kind(tmp_path, rng, dtype, white, channels):
    """Each gives what its colours in 0..1 give."""
    shape = (24, 32, *([channels] if channels else []))
    guide = np.rint(rng.random(shape) * white) if dtype != "f4" else rng.random(shape)
    if channels in (2, 4):
        guide[0, 0, -1] = guide[..., -1].max()
    guide.flat[0] = white
    low = rng.random((6, 8), np.float32)
    assert run(tmp_path, low, guide.astype(dtype)) == 0
    assert run(tmp_path, low, (guide / white).astype("f4"), out="expected.npy") == 0
    result, expected = np.load(tmp_path / "out.npy"), np.load(tmp_path / "expected.npy")
    np.testing.assert_allclose(result, expected, rtol=1e-4)


LOW, GUIDE = np.ones((6, 8), np.float32), np.zeros((24, 32, 3), np.uint8)


@pytest.mark.parametrize(
    ("low", "guide", "out", "options", "sentence"),
    [
        ("missing.png", GUIDE, "out.npy", [],
         "LOW must be a file that can be read; got missing.png: No such file or directory"),
        ("low.xyz", GUIDE, "out.npy", [], "LOW must end in one of .png .jpg"),
        (LOW, GUIDE[:-1], "out.npy", [],
         "GUIDE must be 4 times LOW of 8 x 6 pixels: 32 x 24 pixels; it has 32 x 23 pixels"),
        (LOW, GUIDE[:12, :16], "out.npy", [], "it has 16 x 12 pixels; --factor 2 fits"),
        (LOW[0], GUIDE, "out.npy", [], "LOW must have rows, columns and perhaps channels; got the"),
        (LOW[:0], GUIDE[:0], "out.npy", [], "got the shape (0, 8)"),
        (LOW.astype("c8"), GUIDE, "out.npy", [], "LOW must have real numbers; got complex64"),
        (2**53 + np.arange(48).reshape(6, 8), GUIDE, "out.npy", [], "LOW must have integers"),
        (LOW, GUIDE * np.float32("nan"), "out.npy", [], "GUIDE must have a finite pixel; got none"),
        (LOW, np.zeros((24, 32, 5), "u1"), "out.npy", [],
         "GUIDE must have rows, columns and 1 to 4 channels; got the shape (24, 32, 5)"),
        (np.ones((6, 8, 3)), GUIDE, "out.npy", ["--labels"], "LOW must have rows and columns"),
        (LOW, GUIDE, "out.jpg", [], "--out must end in one of .png .tif .tiff .npy .zarr; got"),
        (LOW, GUIDE, "out.png", [], "a PNG file has no float32 of 1 channels"),
        (LOW, GUIDE, "low.npy", [], "low.npy, which exists"),
        (LOW, GUIDE, "no/folder/out.npy", [], "--out must be in a folder that can be written to;"),
        (LOW, GUIDE, "low.npy/out.npy", [], "--out must be in a folder that can be written to;"),
        (LOW, GUIDE, 200 * "long" + ".npy", [], "--out must have a shorter name; got "),
        (LOW, GUIDE, "f" * 252 + ".npy", [], ".npy: File name too long"),
    ],
)  # fmt: skip
def test_errors(tmp_path, monkeypatch, capsys, low, guide, out, options, sentence):
    monkeypatch.chdir(tmp_path)
    assert run(tmp_path, low, guide, *options, out=out) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("python -m carafepp upsample: ")
    assert sentence in printed.err
    assert not {path.name for path in tmp_path.iterdir()} - {"low.npy", "guide.npy"}


@pytest.mark.parametrize("factor", ["0", "-2", "2.5", "x", "65"])
def test_wrong_factors(tmp_path, capsys, factor):
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, LOW, GUIDE, factor=factor)
    assert ended.value.code == 2
    assert "--factor" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".png", ".tif", ".npy", ".zarr"])
def test_broken_files(tmp_path, capsys, suffix):
    if suffix in (".tif", ".zarr"):
        import_or_skip("zarr", DASK)
    (tmp_path / f"low{suffix}").write_bytes(b"nothing of the kind")
    assert run(tmp_path, tmp_path / f"low{suffix}", GUIDE) == 2
    sentence = f"LOW must be a file that can be read; got {tmp_path / f'low{suffix}'}: "
    assert sentence in capsys.readouterr().err


def test_logits_of_a_tile_are_those_of_the_whole(rng):
    guide = rng.random((40, 48, 3), np.float32)
    whole = logits_from_guide(guide, 4)
    tile = logits_from_guide(guide[:24, 8:44], 4, ((0, 2), (2, 2)))
    np.testing.assert_allclose(tile, whole[:, :, :4, 4:9], rtol=1e-4, atol=1e-3)


def test_a_bar_shows_on_a_terminal_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    assert run(tmp_path, LOW, GUIDE) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert run(tmp_path, LOW, GUIDE, out="again.npy") == 0
    assert "1 tiles" in capsys.readouterr().err


def test_command_line(tmp_path):
    np.save(tmp_path / "low.npy", LOW)
    np.save(tmp_path / "guide.npy", GUIDE)
    command = [sys.executable, "-m", "carafepp", "upsample", "low.npy", "guide.npy"]
    command += ["--factor", "4", "--out", "out.tif"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "out.tif: 32 x 24 pixels, float32\n"


@pytest.mark.parametrize(("package", "out"), [("skimage", "out.npy"), ("zarr", "out.zarr")])
def test_a_missing_package_is_named(tmp_path, package, out):
    np.save(tmp_path / "low.npy", LOW)
    np.save(tmp_path / "guide.npy", GUIDE)
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from carafepp import upsample\n"
        f"sys.exit(upsample.main(['low.npy', 'guide.npy', '--factor', '4', '--out', {out!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 2
    assert package in done.stderr
    assert 'pip install "carafepp[demo]"' in done.stderr
    assert "Traceback" not in done.stderr
