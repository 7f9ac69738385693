"""carafepp.experiments: scenes, measures, what is trained and what is not again, reports."""

import json
import re
import subprocess

import numpy as np
import pytest

from skips import import_or_skip

torch = import_or_skip("torch")
for name in ("skimage", "sklearn", "matplotlib", "rich"):
    import_or_skip(name)

from PIL import Image
from scipy import ndimage

import carafepp
from carafepp.experiments import __main__ as command_line
from carafepp.experiments import figures, inpainting, report, segmentation, tables, trainings
from carafepp.experiments.scenes import CLASSES, SHAPES, make_scenes
from carafepp.experiments.segmentation import SegmentationNet, contour, measure
from carafepp.experiments.tables import TABLES, Row, Table
from carafepp.experiments.trainings import Line, Trainings, choose_rows, train_table
from carafepp.torch import CARAFE
from carafepp.torch.models import DOWNSAMPLERS, UPSAMPLERS

TINY = {
    "segmentation": {"steps": 2, "size": 32, "width": 8, "channels": 8, "batch": 2},
    "inpainting": {"steps": 2, "size": 32, "width": 8, "batch": 2},
    "figures": {"steps": 1, "size": 32, "width": 8, "channels": 8, "batch": 2},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(tables.PRESETS, "small", TINY)
    monkeypatch.setattr(segmentation, "TRAINING_SCENES", 4)
    monkeypatch.setattr(segmentation, "TEST_SCENES", 2)
    monkeypatch.setattr(inpainting, "TEST_CROPS", 4)
    threads = torch.get_num_threads(), carafepp.get_num_threads()
    yield
    torch.set_num_threads(threads[0])
    carafepp.set_num_threads(threads[1])


def run(*arguments):
    """Return the exit status, also that of an error in the arguments."""
    try:
        return command_line.main([str(argument) for argument in arguments])
    except SystemExit as end:
        return end.code


# Scenes


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(24, 48, seed=5)


def test_scenes_depend_on_the_seed_alone(scenes):
    for ours, again in zip(scenes, make_scenes(24, 48, seed=5), strict=True):
        np.testing.assert_array_equal(ours, again)
    assert (make_scenes(24, 48, seed=6).classes != scenes.classes).any()


def test_a_scene_does_not_depend_on_how_many_there_are(scenes):
    for ours, few in zip(scenes, make_scenes(3, 48, seed=5), strict=True):
        np.testing.assert_array_equal(ours[:3], few)


def test_every_pixel_of_a_scene_is_labelled(scenes):
    assert scenes.images.shape == (24, 3, 48, 48)
    assert scenes.classes.shape == scenes.instances.shape == (24, 48, 48)
    assert scenes.images.dtype == np.float32
    assert np.isfinite(scenes.images).all()
    assert set(np.unique(scenes.classes)) == set(range(len(CLASSES)))
    assert scenes.instances.max() <= SHAPES[1]
    np.testing.assert_array_equal(scenes.classes == 0, scenes.instances == 0)


def test_an_instance_has_one_class(scenes):
    for classes, instances in zip(scenes.classes, scenes.instances, strict=True):
        for instance in np.unique(instances):
            assert len(np.unique(classes[instances == instance])) == 1


def test_scenes_have_thin_things_and_things_behind_others(scenes):
    """Half of a stroke is within a pixel of its contour; some instances are in pieces."""
    strokes = scenes.classes == CLASSES.index("stroke")
    assert contour(strokes).sum() > 0.5 * strokes.sum()
    pieces = [
        ndimage.label(instances == instance)[1]
        for instances in scenes.instances
        for instance in np.unique(instances)[1:]
    ]
    assert max(pieces) > 1


def test_colours_alone_do_not_tell_the_class(scenes):
    """The nearest of the classes' mean colours is wrong for a quarter of the pixels."""
    pixels, labels = np.moveaxis(scenes.images, 1, -1).reshape(-1, 3), scenes.classes.ravel()
    means = np.stack([pixels[labels == label].mean(0) for label in range(len(CLASSES))])
    guess = ((pixels[:, None] - means) ** 2).sum(2).argmin(1)
    assert (guess != labels).mean() > 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 32, 0), "[make_scenes] count must be at least 1; got 0."),
        ((1, 15, 0), "[make_scenes] size must be at least 16; got 15."),
    ],
)
def test_errors_of_scenes(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make_scenes(*arguments)


# Measures


def test_measures_of_a_picture_by_hand():
    """Two classes; one of 16 pixels of the second is taken for the first."""
    true = np.zeros((1, 8, 8), int)
    true[0, 2:6, 2:6] = 1
    predicted = true.copy()
    predicted[0, 2, 2] = 0
    inside, outside = 15 / 16, 48 / 49
    # Contours: 12 pixels of the square; without its corner, (3,3) is one, too. The ground has the
    # 20 pixels around the square; with the corner, the corner is one, and (1,1) is none.
    inner, outer = 11 / 13, 19 / 21
    measures = measure(predicted, true)
    assert measures["pixel_accuracy"] == pytest.approx(100 * 63 / 64)
    assert measures["miou"] == pytest.approx(50 * (inside + outside))
    assert measures["boundary_iou"] == pytest.approx(50 * (inner + outer))


def definition(predicted, true):
    """Measures, pixel by pixel."""

    def on_contour(labels, n, i, j):
        around = labels[n, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        return (around != labels[n, i, j]).any()

    regions, contours = [], []
    for label in sorted({*predicted.flat, *true.flat}):
        a, b = ({p for p, x in np.ndenumerate(y) if x == label} for y in (predicted, true))
        regions.append(len(a & b) / len(a | b))
        a = {p for p in a if on_contour(predicted, *p)}
        b = {p for p in b if on_contour(true, *p)}
        contours.append(len(a & b) / len(a | b) if a | b else 1)
    return {
        "miou": 100 * np.mean(regions),
        "boundary_iou": 100 * np.mean(contours),
        "pixel_accuracy": 100 * np.mean(predicted == true),
    }


@pytest.mark.parametrize("classes", [1, 2, 5])
def test_measures_by_definition(rng, classes):
    coarse = rng.integers(classes, size=(3, 4, 5))
    true = coarse.repeat(4, 1).repeat(3, 2)
    predicted = np.where(rng.random(true.shape) < 0.1, rng.integers(classes, size=true.shape), true)
    assert measure(predicted, true) == pytest.approx(definition(predicted, true))


def test_measures_of_right_predictions_are_100(scenes):
    assert measure(scenes.classes, scenes.classes) == pytest.approx(
        dict.fromkeys(("miou", "boundary_iou", "pixel_accuracy"), 100)
    )


def test_measures_of_different_shapes():
    message = "[measure] predicted and true must have one shape; got (1, 2, 2) and (1, 2, 3)."
    with pytest.raises(ValueError, match=re.escape(message)):
        measure(np.zeros((1, 2, 2)), np.zeros((1, 2, 3)))


# Networks and training


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_the_network_has_five_of_an_upsampler(name):
    network = SegmentationNet(name, width=8, channels=8)
    assert sum(type(m) is UPSAMPLERS[name] for m in network.modules()) == 5
    assert network(torch.zeros(2, 3, 32, 36)).shape == (2, len(CLASSES), 32, 36)


@pytest.mark.parametrize("name", sorted(set(DOWNSAMPLERS) - {"strided_conv"}))
def test_the_network_has_seven_of_a_downsampler(name):
    network = SegmentationNet("nearest", name, width=8, channels=8)
    assert sum(type(m) is DOWNSAMPLERS[name] for m in network.modules()) == 7
    assert network(torch.zeros(2, 3, 32, 36)).shape == (2, len(CLASSES), 32, 36)


def test_inner_widths_are_those_of_the_paper_for_networks_of_its_size():
    carafes = [m for m in SegmentationNet("carafe", "carafe", width=64, channels=256).modules()]
    inner = {(m.up, m.down, m.compressed_channels) for m in carafes if isinstance(m, CARAFE)}
    assert inner == {(2, 1, 64), (1, 2, 16)}


def test_inner_widths_are_scaled_with_the_network():
    options = {"compressed_channels": 64, "kernel_size": 5}
    assert segmentation.scaled(options, 32, 256) == {"compressed_channels": 8, "kernel_size": 5}
    assert segmentation.scaled({"compressed_channels": 4}, 8, 64) == {"compressed_channels": 1}
    assert segmentation.scaled({"hidden": 64, "compressed_channels": None}, 8, 64) == {
        "hidden": 8,
        "compressed_channels": None,
    }


def test_training_depends_on_the_seed_alone():
    weights = []
    for seed in (0, 0, 1):
        torch.rand(1)  # the state of the generator of everybody else
        results = segmentation.train_segmentation("carafe", seed=seed, **TINY["segmentation"])
        weights.append(torch.cat([p.flatten() for p in results["network"].parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_training_lowers_the_loss():
    losses = []
    segmentation.train_segmentation(
        **{**TINY["segmentation"], "steps": 40, "batch": 4},
        progress=lambda step, loss: losses.append(loss),
    )
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "[train_segmentation] steps must be at least 1; got 0."),
        ({"batch": 0}, "[train_segmentation] batch must be at least 1; got 0."),
        ({"size": 28}, "[train_segmentation] size must be at least 32 and divisible by 4; got 28."),
        ({"size": 50}, "[train_segmentation] size must be at least 32 and divisible by 4; got 50."),
    ],
)
def test_errors_of_training(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        segmentation.train_segmentation(**arguments)


# Tables


@pytest.mark.parametrize("name", TABLES)
def test_every_table_trains_and_reports(name, tmp_path, capsys):
    assert run(name, "--seeds", 1, "--out", tmp_path) == 0
    words = (tmp_path / f"{name}.md").read_text()
    assert words in capsys.readouterr().out
    for row in TABLES[name].rows:
        assert re.search(rf"^\| {re.escape(row.label)} \|.*\| {row.paper:g} \|$", words, re.M)
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 5
    lines = (tmp_path / "trainings.jsonl").read_text().splitlines()
    assert len(lines) == len(TABLES[name].rows)


def test_tables_name_all_operators():
    assert [row.arguments["upsampler"] for row in TABLES["upsamplers"].rows] == list(UPSAMPLERS)
    assert [row.arguments["downsampler"] for row in TABLES["downsamplers"].rows] == [*DOWNSAMPLERS]


def test_tables_share_their_common_rows():
    """CARAFE++ in the FPN is a row of five tables, and is trained once."""
    arguments = [
        {**tables.BASELINES["segmentation"], **row.arguments}
        for table in TABLES.values()
        if table.task == "segmentation"
        for row in table.rows
    ]
    shared = {"upsampler": "carafe", "downsampler": "strided_conv"}
    assert arguments.count(shared) == 5
    assert len({json.dumps(a, sort_keys=True) for a in arguments}) == len(arguments) - 4 - 2 - 2


def test_a_second_run_trains_nothing(tmp_path, monkeypatch):
    assert run("places", "--seeds", 2, "--out", tmp_path) == 0
    file = tmp_path / "trainings.jsonl"
    before, words = file.read_text(), (tmp_path / "places.md").read_text()
    assert before.count("\n") == 8

    def train(**_):
        raise AssertionError("trained again")

    monkeypatch.setitem(trainings.TASKS, "segmentation", train)
    assert run("places", "--seeds", 2, "--out", tmp_path) == 0
    assert run("upsamplers", "--upsampler", "nearest,carafe", "--seeds", 2, "--out", tmp_path) == 0
    assert file.read_text() == before
    assert (tmp_path / "places.md").read_text() == words


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch, capsys):
    train, calls = trainings.TASKS["segmentation"], []

    def interrupted(**arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train(**arguments)

    monkeypatch.setitem(trainings.TASKS, "segmentation", interrupted)
    assert run("places", "--seeds", 1, "--out", tmp_path) == 130
    assert "goes on from the last finished training" in capsys.readouterr().out
    assert run("places", "--seeds", 1, "--out", tmp_path) == 0
    assert len(calls) == 5
    assert (tmp_path / "trainings.jsonl").read_text().count("\n") == 4


def test_other_arguments_are_another_training(tmp_path):
    kept = Trainings(tmp_path / "trainings.jsonl")
    kept.add({"seed": 0, "steps": 2}, {"miou": 1.5, "network": object()})
    again = Trainings(kept.path)
    assert {"steps": 2, "seed": 0} in again
    assert {"steps": 2, "seed": 1} not in again
    assert {"steps": 2} not in again
    entry = again[{"steps": 2, "seed": 0}]
    assert entry["results"] == {"miou": 1.5}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"])
    assert entry["machine"] == trainings.machine()
    assert entry["commit"] == trainings.commit()


def test_a_line_that_was_cut_short_is_removed(tmp_path):
    path = tmp_path / "trainings.jsonl"
    kept = Trainings(path)
    kept.add({"seed": 0}, {"miou": 1})
    whole = path.read_text()
    path.write_text(whole + whole[:20])
    assert {"seed": 0} in Trainings(path)
    assert path.read_text() == whole


@pytest.mark.parametrize("line", ["nonsense", "{}", "[1]", "3"])
def test_other_lines_are_refused(tmp_path, capsys, line):
    (tmp_path / "trainings.jsonl").write_text(f"{line}\n")
    assert run("places", "--out", tmp_path) == 1
    error = capsys.readouterr().err
    assert f"must be one training a line; line 1 is {line + chr(10)!r}." in error


@pytest.mark.parametrize("folder", ["python", ".venv/lib/python3/site-packages"])
def test_the_commit_is_that_of_the_source_tree_alone(monkeypatch, tmp_path, folder):
    """An installed package within another repository has a version."""
    package = tmp_path / folder / "carafepp" / "experiments"
    package.mkdir(parents=True)
    monkeypatch.setattr(trainings, "__file__", str(package / "trainings.py"))
    assert trainings.commit() == f"of version {carafepp.__version__}"
    name = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    for command in (["init", "-q"], [*name, "commit", "-q", "--allow-empty", "-m", "first"]):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    told = ["git", "-C", tmp_path, "rev-parse", "HEAD"]
    head = subprocess.run(told, capture_output=True, text=True, check=True).stdout
    of_tree = trainings.commit()
    if folder == "python":
        assert head.startswith(of_tree)
    else:
        assert of_tree == f"of version {carafepp.__version__}"


# --upsampler and --downsampler


def test_rows_are_chosen_by_operator():
    table = choose_rows(TABLES["upsamplers"], upsampler=["gum", "carafe"])
    assert [row.label for row in table.rows] == ["gum", "carafe"]
    assert [row.paper for row in table.rows] == [36.9, 37.8]


def test_rows_are_repeated_with_other_operators():
    table = choose_rows(TABLES["kernels"], downsampler=["max", "carafe"])
    assert len(table.rows) == 16
    assert table.rows[1].label == "1, 3, carafe"
    assert table.rows[1].arguments == {
        **TABLES["kernels"].rows[0].arguments,
        "downsampler": "carafe",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "invalid choice"),
        (["places", "--seeds", "0"], "must be a number from 1; got '0'."),
        (["places", "--seeds", "x"], "must be a number from 1; got 'x'."),
        (["places", "--preset", "medium"], "invalid choice"),
        (["upsamplers", "--upsampler", "gum,bicubic"], "carafe; got 'bicubic'."),
        (["downsamplers", "--downsampler", "bilinear"], "carafe; got 'bilinear'."),
        (["all", "--upsampler", "gum"], "--upsampler must be left out for all"),
        (["figures", "--seeds", "1"], "--seeds must be left out for figures"),
        (["figures", "--steps", "3"], "--steps must be left out for figures"),
        (["places", "--steps", "0"], "must be a number from 1; got '0'."),
        *[
            (["places", "--device", device], f"compute on here; got {device!r}: ")
            for device in ("cuda:99", "mps", "meta", "nonsense", "")
        ],
    ],
)
def test_arguments_that_the_command_line_refuses(arguments, message, capsys):
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["places", "--upsampler", "gum"], "--upsampler must be left out for places, which"),
        (["inpainting", "--downsampler", "max"], "--downsampler must be left out for inpainting"),
        (["kernels", "--upsampler", "gum"], "must be that of some row of kernels; got gum."),
    ],
)
def test_operators_that_do_not_fit_a_table(arguments, message, capsys, tmp_path):
    assert run(*arguments, "--out", tmp_path) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert run("places", "--out", tmp_path / "file") == 1
    sentence = f"--out must be a folder to write into; got {tmp_path / 'file'}: a file"
    assert sentence in capsys.readouterr().err


def test_a_broken_file_of_networks_is_named(capsys, tmp_path):
    (tmp_path / "figures.pt").write_bytes(b"nothing of the kind")
    assert run("figures", "--out", tmp_path) == 1
    sentence = f"{tmp_path / 'figures.pt'} must be what an earlier run wrote; delete it"
    assert sentence in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch, capsys):
    monkeypatch.setattr(command_line, "MISSING", ImportError("No module named 'rich'"))
    assert run("all") == 1
    assert 'pip install "carafepp[experiments]"' in capsys.readouterr().err


@pytest.mark.exhaustive
def test_threads(tmp_path):
    assert run("places", "--seeds", 1, "--threads", 2, "--out", tmp_path) == 0
    assert (torch.get_num_threads(), carafepp.get_num_threads()) == (2, 2)


# Reports


def line(label, paper, *psnrs):
    entries = [
        {
            "results": {"psnr": psnr, "l1": 30 - psnr, "parameters": 1234, "seconds": i},
            "arguments": {"steps": 7},
            "machine": "M",
            "date": "2021-12-07",
            "commit": f"c{i}",
        }
        for i, psnr in enumerate(psnrs)
    ]
    return Line(Row(label, paper), entries)


TABLE = Table("name", "Why?", "Table 0, something", [], task="inpainting")


def test_markdown():
    words = report.markdown(TABLE, [line("a", 1.5, 20, 22), line("b", 2, 23, 24)], "small")
    assert words == (
        "## name\n\nWhy?\n\n"
        "|  | PSNR (dB) | L1 (%) | parameters | training (s) | the paper's: Table 0, something |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| a | 21.00 ± 1.41 | 9.00 ± 1.41 | 1,234 | 0.5 | 1.5 |\n"
        "| b | **23.50** ± 0.71 | **6.50** ± 0.71 | 1,234 | 0.5 | 2 |\n\n"
        "Mean ± standard deviation of 2 seeds; preset small, 7 steps; "
        "M; 2021-12-07; commit c0, c1.\n"
    )


def test_markdown_of_one_seed_has_no_deviation():
    words = report.markdown(TABLE, [line("a", 1.5, 20)], "large")
    assert "| a | **20.00** | **10.00** | 1,234 | 0.0 | 1.5 |" in words
    assert "One seed; preset large, 7 steps;" in words


def test_steps(tmp_path):
    out = ("--seeds", 1, "--out", tmp_path)
    assert run("places", *out) == 0
    assert run("places", "--steps", 1, *out) == 0
    assert "preset small, 1 steps;" in (tmp_path / "places.md").read_text()
    lines = (tmp_path / "trainings.jsonl").read_text().splitlines()
    assert [json.loads(line)["arguments"]["steps"] for line in lines] == [2] * 4 + [1] * 4


def test_rows_come_seed_by_seed(tmp_path, monkeypatch):
    order = []

    def train(seed, upsampler, **_):
        order.append((seed, upsampler))
        return {"miou": 10 * seed + len(upsampler)}

    monkeypatch.setitem(trainings.TASKS, "segmentation", train)
    rows = [Row(name, 0, {"upsampler": name}) for name in ("a", "bb")]
    lines = train_table(
        Table("t", "", "", rows), Trainings(tmp_path / "trainings.jsonl"), preset="small", seeds=2
    )
    assert order == [(0, "a"), (0, "bb"), (1, "a"), (1, "bb")]
    assert [entry.values("miou") for entry in lines] == [[1, 11], [2, 12]]


# Figures


@pytest.mark.exhaustive
def test_figures_are_drawn_from_networks_that_are_trained_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(figures, "LOCATIONS", figures.LOCATIONS[:2])
    monkeypatch.setattr(figures, "COARSE_LOCATIONS", figures.COARSE_LOCATIONS[2:3] * 2)
    monkeypatch.setattr(figures, "SCENES", 4)
    assert run("figures", "--out", tmp_path) == 0
    names = ("figure1.png", "figure9.png", "masks.png", "features.png")
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in names]
    first = {}
    for name in names:
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG"
            first[name] = np.asarray(picture.convert("RGB"))
        assert first[name].std() > 10

    def train(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(figures, "train_segmentation", train)
    assert run("figures", "--out", tmp_path) == 0
    for name in names:
        with Image.open(tmp_path / name) as picture:
            np.testing.assert_array_equal(np.asarray(picture.convert("RGB")), first[name])


def test_share_of_own_class():
    """Masks that copy the nearest unit have its share; all units being of one class, all have one.

    Here that class is the background, whose share is that of the locations which are background.
    """
    torch.manual_seed(0)
    network = SegmentationNet("carafe", "strided_conv", width=8, channels=8).eval()
    for module in network.modules():
        if isinstance(module, CARAFE):
            torch.nn.init.zeros_(module.content_encoder.weight)
            bias = module.content_encoder.bias.data.zero_().reshape(25, 4)
            bias[12] = 100  # the middle of the window
    scenes = make_scenes(2, 64, seed=0)
    share = figures.share_of_own_class(network, scenes)
    assert share["carafe"] == pytest.approx(share["nearest"], abs=1e-6)
    assert 0 < share["average"] < 1
    network.head[-1].bias.data[0] = 1e6
    share = figures.share_of_own_class(network, scenes)
    assert share["carafe"] == share["nearest"] == share["average"]
    assert 0 < share["nearest"] < 0.6
