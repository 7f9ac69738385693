"""The benchmarks' tool: what it shows and writes, and that it finds a wrong answer."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import carafepp

ROOT = Path(__file__).parent.parent

TINY = ["--cases", "tiny", "--threads", "1", "--dtype", "float32"]

# What `python -m benchmarks` does, with a composition whose answer is wrong by a thousandth.
SEEDED = """
import sys
from benchmarks import peers
from benchmarks.__main__ import main
right = peers.COMPOSITIONS["bmm"]
peers.COMPOSITIONS["bmm"] = lambda *args: right(*args).mul_(1.001)
sys.exit(main(sys.argv[1:]))
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def files(torch, tmp_path_factory):
    """What one short run writes, and what it prints."""
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("benchmarks")
    paths = {key: folder / name for key, name in [("json", "a"), ("markdown", "b"), ("plot", "c")]}
    options = [word for key, path in paths.items() for word in (f"--{key}", str(path))]
    peers = ["--peers", "bmm,nearest"]
    done = run("-m", "benchmarks", "--quick", *TINY, *peers, "--seconds", "0.05", *options)
    assert done.returncode == 0, done.stderr
    return {**paths, "printed": done.stdout}


@pytest.fixture(scope="module")
def data(files):
    return json.loads(files["json"].read_text())


def implementations(layout: str) -> set[str]:
    """Those that accept the tiny problem in this layout."""
    features, output = (1, 16, 8, 8), (1, 16, 16, 16)
    masks, logits = (1, 25, 16, 16), (1, 100, 8, 8)
    found = set()
    for function, shapes, params in [
        ("reassemble", (features, masks), {}),
        ("reassemble_backward", (output, features, masks), {}),
        ("reassemble_with_logits", (features, logits), {"kernel_size": 5}),
    ]:
        order = (0, 1, 2, 3) if layout == "NCHW" else (0, 2, 3, 1)
        arrays = [np.zeros([shape[axis] for axis in order], np.float32) for shape in shapes]
        listed = carafepp.list_implementations(function, *arrays, up=2, layout=layout, **params)
        found |= {name for name, reason in listed if reason is None}
    return found


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_every_implementation_is_timed(data, layout):
    rows = [row for row in data["rows"] if row["kind"] == "carafepp" and row["layout"] == layout]
    assert implementations(layout) <= {row["implementation"] for row in rows}
    assert all(row["seconds"] > 0 and row["samples"] > 0 for row in rows)
    assert all(row["share"] > 0 for row in rows)


def test_carafepp_is_compared_with_the_best_peers(data):
    """As the rows themselves tell it."""
    of = {"pass": "forward", "source": "masks"}
    rows = [row for row in data["rows"] if all(row[key] == of[key] for key in of)]
    best = min(row["seconds"] for row in rows if row["kind"] == "composition")
    nearest = {row["layout"]: row["seconds"] for row in rows if row["implementation"] == "nearest"}
    for row in rows:
        assert row["x_composition"] == pytest.approx(best / row["seconds"])
        assert row["x_operator"] == pytest.approx(nearest[row["layout"]] / row["seconds"])


def test_the_tables_say_where_and_how_and_what_the_bars_are(files, data):
    printed = files["printed"]
    assert files["markdown"].read_text().strip() == printed.strip()
    for word in ("CPU", "commit", "torch", "date", "FMA", "copy", "### tiny", "### The bars"):
        assert word in printed
    reached = {bar["what"]: bar["reached"] for bar in data["bars"]}
    assert "not measured" in reached.values()
    assert any("(1, 16, 8, 8)" in what and reached[what] != "not measured" for what in reached)


def test_the_picture_is_a_png(files):
    assert files["plot"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.exhaustive
def test_a_wrong_answer_is_shown_and_not_timed(torch, tmp_path):
    path = tmp_path / "rows.json"
    peers = ["--peers", "bmm,unfold", "--pass", "forward", "--from", "masks"]
    done = run("-c", SEEDED, *TINY, *peers, "--check-only", "--json", str(path))
    assert done.returncode == 1, done.stderr
    assert "WRONG: tiny: bmm forward" in done.stdout
    rows = json.loads(path.read_text())["rows"]
    wrong = {row["implementation"] for row in rows if row["error"]}
    assert wrong == {"bmm"}
    assert {row["implementation"] for row in rows} > {"bmm", "unfold"}


def test_an_unknown_case_is_refused():
    done = run("-m", "benchmarks", "--cases", "none")
    assert done.returncode == 2
    assert "'none' is none of fpn1" in done.stderr


# Modules


@pytest.mark.exhaustive
def test_modules_are_compared(torch, tmp_path):
    files = {"--json": tmp_path / "modules.json", "--markdown": tmp_path / "modules.md"}
    options = [word for option, path in files.items() for word in (option, str(path))]
    options += ["--cases", "tiny", "--seconds", "0.05", "--eager", "--layout", "NHWC"]
    done = run("-m", "benchmarks.modules", *options)
    assert done.returncode == 0, done.stderr
    assert "### tiny: up x2, (1, 16, 8, 8), NHWC, float32, 1 thread" in done.stdout
    assert "of the leanest composed module's" in files["--markdown"].read_text()
    rows = json.loads(files["--json"].read_text())["rows"]
    assert {row["name"] for row in rows} >= {"carafepp", "composed: bmm", "nearest", "bilinear"}
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    ours = next(row for row in rows if row["name"] == "carafepp")
    assert ours["parameters"] == (16 + 1) * 64 + (9 * 64 + 1) * 100
    assert ours["FLOPs a position"] == 2 * (16 * 64 + 64 * 900 + 16 * 25 * 4)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_module_takes_half_the_memory_of_a_composed_one(torch):
    from benchmarks import memory, modules

    case = dataclasses.replace(modules.PROBLEMS["fpn1"], n=1)
    x = torch.randn(case.features_shape, requires_grad=True)
    grad_output = torch.randn(case.output_shape)
    compared = {"carafepp": modules.CARAFE(case.c, up=2)}
    for name in ("taps per phase", "bmm"):
        compared[name] = modules.Composed(name, case, up=2)
    peaks = {}
    for name, module in compared.items():
        call = partial(modules.call, module, x, grad_output, "forward+backward")
        call()  # what a first call makes for later ones does not count
        peaks[name] = memory.peak(call)[1]
    assert peaks["carafepp"] <= 0.5 * min(peaks["taps per phase"], peaks["bmm"])


# Networks


@pytest.mark.exhaustive
def test_networks_are_compared(torch, tmp_path):
    files = {"--json": tmp_path / "networks.json", "--markdown": tmp_path / "networks.md"}
    options = [word for option, path in files.items() for word in (option, str(path))]
    options += ["--networks", "resnet50,mask_rcnn", "--scale", "0.1", "--width", "2"]
    done = run("-m", "benchmarks.networks", *options, "--seconds", "0.1")
    assert done.returncode == 0, done.stderr
    assert "### mask_rcnn: (1, 3, 80, 133), forward, float32, 1 thread" in done.stdout
    assert files["--markdown"].read_text().strip() == done.stdout.strip()
    rows = json.loads(files["--json"].read_text())["rows"]
    variants = ["nothing", "down", "nothing", "up", "down", "both"]
    assert [row["variant"] for row in rows] == variants
    assert all(row["samples"] > 0 and row["seconds"][1] > 0 for row in rows)
    for quantity in ("parameters", "FLOPs"):
        nothing, up, down, both = (row[quantity] for row in rows[2:])
        assert min(up, down) > nothing
        assert both - nothing == (up - nothing) + (down - nothing)


def test_operations_of_networks_are_those_of_their_convolutions(torch):
    """4.09 G multiplications are what is known of ResNet-50; CARAFE++ adds its own in 7 places."""
    from benchmarks import modules, networks

    with torch.device("meta"):
        x = torch.empty(1, 3, 224, 224)
        plain, down = (
            modules.flops(networks.resnet50(None, name, 64).eval(), x) for name in (None, "carafe")
        )
    assert plain == 2 * 4_089_184_256
    added = 0
    channels = [64, 128, 256, 256, 512, 512, 1024]
    for c, size in zip(channels, [112, 56, 56, 28, 28, 14, 14], strict=True):
        positions = (size // 2) ** 2
        added += size**2 * c * 16 + positions * (9 * 16 * 25 + 25 * c)
    # The 1x1 convolution before the stride of a block works at the same size as before.
    assert down - plain == 2 * added


@pytest.mark.parametrize(
    ("option", "known"), [("--networks", "resnet50, faster_rcnn"), ("--pass", "forward, ")]
)
def test_unknown_networks_and_passes_are_refused(torch, capsys, option, known):
    from benchmarks import networks

    with pytest.raises(SystemExit, match="2"):
        networks.main([option, "none"])
    assert f"{option}: 'none' is none of {known}" in capsys.readouterr().err
