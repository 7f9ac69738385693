"""The benchmarks: what they show and write, and that they find a wrong answer."""

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import carafepp
import reference as ref
from skips import import_or_skip

import_or_skip("torch")
import_or_skip("rich")

pytestmark = pytest.mark.xdist_group("benchmarks")  # fixtures take long

ROOT = Path(__file__).parent.parent

TINY = ["--cases", "tiny", "--threads", "1", "--dtype", "float32"]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files and printed text of one short run."""
    import_or_skip("matplotlib")
    folder = tmp_path_factory.mktemp("benchmarks")
    paths = {key: folder / key for key in ("json", "markdown", "plot")}
    options = [word for key, path in paths.items() for word in (f"--{key}", str(path))]
    peers = ["--peers", "bmm,nearest"]
    done = run("-m", "benchmarks", "--quick", *TINY, *peers, "--seconds", "0.05", *options)
    assert done.returncode == 0, done.stderr
    return {**paths, "printed": done.stdout}


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def data(files):
    return rows_of(files["json"])


def implementations(layout: str) -> set[str]:
    """Return the names that accept the tiny problem in this layout."""
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
    timed = [row for row in data if "kind" in row]
    rows = [row for row in timed if row["kind"] == "carafepp" and row["layout"] == layout]
    assert implementations(layout) <= {row["name"] for row in rows}
    assert all(row["seconds"] > 0 and row["samples"] > 0 for row in rows)
    assert all(row["share"] > 0 for row in rows)


def test_carafepp_is_compared_with_the_best_peers(data):
    """The ratios are those of the times in the rows."""
    labels = {"pass": "forward", "weights": "masks"}
    rows = [row for row in data if labels.items() <= row.items()]
    best = min(row["seconds"] for row in rows if row["kind"] == "composition")
    nearest = {row["layout"]: row["seconds"] for row in rows if row["name"] == "nearest"}
    for row in rows:
        assert row["x_composition"] == pytest.approx(best / row["seconds"])
        assert row["x_operator"] == pytest.approx(nearest[row["layout"]] / row["seconds"])


def test_the_tables_say_where_how_and_how_fast(files):
    tables = files["markdown"].read_text()
    for word in ("CPU", "commit", "torch", "date", "FMA", "copy", "### tiny", "### Speedup over"):
        assert word in tables


def test_a_quick_run_ends_with_one_sentence(files, data):
    """Behind it are a table of a few lines and files; the tables are in the file."""
    lines = files["printed"].strip().splitlines()
    assert len(lines) < 12
    assert "bar" not in files["printed"].lower()
    assert files["markdown"].read_text().startswith(lines[-1])
    factors = {}
    for row in data:
        if row.get("chosen") and row["x_composition"]:
            factors.setdefault(row["pass"], []).append(row["x_composition"])
    forward, both = (
        f"{min(factors[one]):.1f} to {max(factors[one]):.1f} times as fast in {words}"
        for one, words in [("forward", "the forward"), ("forward+backward", "forward and backward")]
    )
    assert lines[-1].startswith(f"carafepp is {forward} and {both} as the best eager composition")
    assert lines[-1].endswith("1 thread, float32); all answers are right.")


def test_a_file_of_rows_is_summed_up_and_drawn_again(files, tmp_path, capsys):
    from benchmarks.__main__ import main

    asked = ["--from-json", str(files["json"]), "--plot", str(tmp_path / "again.png")]
    assert main(asked) == 0
    printed = files["printed"].strip().splitlines()
    assert capsys.readouterr().out.strip().splitlines()[-1] == printed[-1]
    assert (tmp_path / "again.png").read_bytes() == files["plot"].read_bytes()


def test_rows_of_the_last_machine_are_summed_up_alone(files, tmp_path, capsys):
    from benchmarks.__main__ import main

    rows = rows_of(files["json"])
    others = [{**row, "run": {**row["run"], "CPU": "another"}} for row in rows]
    others = [{**row, "layout": "of another", "x_composition": 1e6} for row in others]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, others + rows)))
    assert main(["--from-json", str(tmp_path / "rows.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.strip().splitlines()[-1] == files["printed"].strip().splitlines()[-1]
    assert "of another" not in printed


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--from-json", "none.json"], "cannot be read: none.json: No such file or directory"),
        (["--from-json", "text.json"], "must have the rows of --json; got text.json"),
        (["--from-json", "no_run.json"], "must have the rows of --json; got no_run.json"),
        (["--from-json", "no_error.json"], "must have the rows of --json; got no_error.json"),
        (["--from-json", "rows.json", "--threads", "2"], "--threads must be left out with"),
        (["--from-json", "rows.json", "--pass", "forward"], "--pass must be left out with"),
        (["--from-json", "rows.json", "--from", "masks"], "--from must be left out with"),
        (["--from-json", "half.json", "--plot", "a.png"], "--plot draws float32, which must be"),
        (["--dtype", "bfloat16", "--plot", "a.png"], "--plot draws float32, which must be"),
        (["--plot", "none/a.png"], "must be a file in a folder that exists; got none/a.png"),
        (["--threads", "0"], "must be a number from 1; got '0'"),
        (["--threads", "x"], "must be a number from 1; got 'x'"),
        (["--seconds", "-1"], "must be a number from 0; got '-1'"),
    ],
)
def test_options_that_are_refused(files, monkeypatch, tmp_path, capsys, options, sentence):
    from benchmarks.__main__ import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.json").write_text("no rows")
    text = files["json"].read_text()
    (tmp_path / "rows.json").write_text(text)
    (tmp_path / "half.json").write_text(text.replace('"float32"', '"float16"'))
    for key in ("run", "error"):
        (tmp_path / f"no_{key}.json").write_text(text.replace(f'"{key}":', '"other":'))
    with pytest.raises(SystemExit, match="2"):
        main(options)
    assert sentence in capsys.readouterr().err


def test_a_call_is_told_as_a_ratio(data):
    rows = {(row["arrays"], row["name"]): row for row in data if "arrays" in row}
    ours, ufunc = rows["NumPy", "carafepp.reassemble"], rows["NumPy", "np.multiply"]
    assert ufunc["ratio"] == pytest.approx(ours["seconds"] / ufunc["seconds"])
    assert rows["PyTorch, with autograd", "carafepp.reassemble"]["ratio"] == 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_memory_is_measured_in_a_process_of_its_own(data):
    """carafepp's scratch on a tiny map is far below its limit of 2 MB."""
    chosen = [row for row in data if row.get("chosen")]
    assert chosen
    assert all(0 <= row["memory"] < 2e6 for row in chosen)


def test_the_picture_is_a_png_that_fits_a_page(files):
    header = files["plot"].read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") <= 1200  # pixels wide


def test_a_wrong_answer_is_shown_and_not_timed(monkeypatch, tmp_path, capsys):
    from benchmarks import peers
    from benchmarks.__main__ import main

    right = peers.COMPOSITIONS["bmm"]
    monkeypatch.setitem(peers.COMPOSITIONS, "bmm", lambda *args: right(*args).mul_(1.001))
    path = tmp_path / "rows.json"
    asked = ["--peers", "bmm,taps", "--pass", "forward", "--from", "masks", "--json", str(path)]
    assert main([*TINY, *asked, "--seconds", "0"]) == 1
    assert "- tiny: bmm forward masks NCHW float32 1: wrong: " in capsys.readouterr().out
    rows = rows_of(path)
    assert {row["name"] for row in rows if row["error"]} == {"bmm"}
    assert {row["name"] for row in rows} > {"bmm", "taps", "carafepp"}
    assert not any(row["samples"] for row in rows)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_compositions_compute_the_definition(direction):
    import torch

    from benchmarks import peers
    from cases import CASES

    case = CASES[f"{direction}2"]
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-3, 4, s).astype("f8") for s in (case.features_shape, case.masks_shape)]
    expected = ref.reassemble(*arrays, **case.factors)
    for name in peers.compositions(case):
        result = peers.composed(name, case, "masks", *map(torch.from_numpy, arrays))
        np.testing.assert_array_equal(result.numpy(), expected, err_msg=name)


def test_an_unknown_case_is_refused(capsys):
    from benchmarks.__main__ import main

    with pytest.raises(SystemExit, match="2"):
        main(["--cases", "none"])
    assert "'none' is none of fpn1" in capsys.readouterr().err


def test_without_rich_there_is_a_sentence_and_the_run_on_a_gpu():
    program = "import sys; sys.modules['rich'] = None; import benchmarks.gpu.timing; print('gpu');"
    done = run("-c", program + "import benchmarks.__main__")
    assert done.stdout == "gpu\n", done.stderr
    assert done.stderr == '[benchmarks] run pip install ".[benchmarks]" first; got no rich.\n'


# The harness


def test_rivals_get_the_same_time_and_a_slow_one_a_single_sample(monkeypatch):
    """The calls themselves set the clock."""
    from benchmarks import timing

    now = 0.0

    def takes(seconds: float):
        def call() -> None:
            nonlocal now
            now += seconds

        return call

    for clock in ("perf_counter", "process_time"):
        monkeypatch.setattr(timing.time, clock, lambda: now)
    candidates = [
        timing.Candidate(str(seconds), takes(seconds)) for seconds in (1.5e-3, 1.1e-2, 60)
    ]
    for candidate in candidates:
        timing.warm_up(candidate)
    timing.measure(candidates, budget=10)
    fast, slow, once = (len(candidate.samples) for candidate in candidates)
    assert once == 1
    assert fast * 12e-3 / 5 == pytest.approx(slow * 3.3e-2 / 2, rel=0.1)  # with the untimed calls
    assert [candidate.row()["seconds"] for candidate in candidates] == pytest.approx(
        [1.5e-3, 1.1e-2, 60]
    )


def test_a_processor_time_of_zero_divides_nothing(monkeypatch):
    from benchmarks import timing

    monkeypatch.setattr(timing.time, "process_time", lambda: 1.0)
    candidate = timing.Candidate("sleep", lambda: timing.time.sleep(1e-3))
    timing.measure([candidate], 0.01)
    assert candidate.row()["seconds"] > 0


def test_a_call_is_made_with_the_settings_of_its_rival():
    import torch

    from benchmarks import timing

    before = torch.get_num_threads()
    candidate = timing.Candidate("", torch.get_num_threads, threads=before + 1)
    assert timing.warm_up(candidate) == before + 1
    assert torch.get_num_threads() == before


# Modules


@pytest.mark.exhaustive
def test_modules_are_compared(tmp_path):
    files = {"--json": tmp_path / "modules.json", "--markdown": tmp_path / "modules.md"}
    options = [word for option, path in files.items() for word in (option, str(path))]
    options += ["--cases", "tiny", "--seconds", "0.05", "--eager", "--layout", "NHWC"]
    done = run("-m", "benchmarks.modules", *options)
    assert done.returncode == 0, done.stderr
    title = "### tiny: up x2, (1, 16, 8, 8), NHWC, float32, forward+backward, threads: 1"
    assert title in done.stdout
    assert files["--markdown"].read_text().strip() == done.stdout.strip()
    rows = rows_of(files["--json"])
    assert {row["name"] for row in rows} >= {"carafepp", "composed: bmm", "nearest", "bilinear"}
    assert {row["pass"] for row in rows} == {"forward", "forward+backward"}
    ours = next(row for row in rows if row["name"] == "carafepp")
    assert ours["parameters"] == (16 + 1) * 64 + (9 * 64 + 1) * 100
    assert ours["FLOPs a position"] == 2 * (16 * 64 + 64 * 900 + 16 * 25 * 4)


MEMORY_OF_MODULES = """
import dataclasses, json, torch
from benchmarks import modules, timing
case = dataclasses.replace(modules.PROBLEMS["fpn1"], n=1)
x = torch.randn(case.features_shape, requires_grad=True)
made = modules.modules(case)
peaks = {}
for name in ("carafepp", "composed: taps per phase", "composed: bmm"):
    candidate = modules.candidate(name, made[name](), x, "forward+backward", threads=1)
    timing.warm_up(candidate)
    peaks[name] = candidate.memory
print(json.dumps(peaks))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_module_takes_less_memory_than_composed_ones():
    """A process of its own holds no memory that a rival could take again.

    The leanest rival takes 1.6 to 2 times as much, as its allocator finds free memory or not.
    """
    done = run("-c", MEMORY_OF_MODULES)
    assert done.returncode == 0, done.stderr
    peaks = json.loads(done.stdout)
    ours = peaks.pop("carafepp")
    assert ours <= 0.7 * peaks["composed: taps per phase"]
    assert ours <= 0.3 * peaks["composed: bmm"]


def test_buffers_of_mmcv_are_counted():
    """Two outputs, two feature maps and three masks."""
    from benchmarks.memory import counted
    from benchmarks.problems import PROBLEMS

    features, output, masks = 2 * 256 * 100 * 152, 2 * 256 * 200 * 304, 2 * 25 * 200 * 304
    buffers = counted(PROBLEMS["fpn2"])
    assert sum(buffers.values()) == 4 * (2 * output + 2 * features + 3 * masks)


@pytest.mark.exhaustive
def test_memory_of_a_step_is_measured_and_drawn(tmp_path):
    import_or_skip("matplotlib")
    files = {"--json": tmp_path / "memory.json", "--plot": tmp_path / "memory.png"}
    options = [word for option, path in files.items() for word in (option, str(path))]
    done = run("-m", "benchmarks.memory", "--case", "tiny", *options)
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in rows_of(files["--json"])}
    assert rows["mmcv's CARAFE"]["how"] == "counted in its source"
    assert rows["carafepp"]["memory"] < 2e6
    assert files["--plot"].read_bytes().startswith(b"\x89PNG")


# Networks


@pytest.mark.exhaustive
def test_networks_are_compared(tmp_path):
    files = {"--json": tmp_path / "networks.json", "--markdown": tmp_path / "networks.md"}
    options = [word for option, path in files.items() for word in (option, str(path))]
    options += ["--networks", "resnet50,mask_rcnn", "--scale", "0.1", "--width", "2"]
    done = run("-m", "benchmarks.networks", *options, "--seconds", "0.1")
    assert done.returncode == 0, done.stderr
    assert "### mask_rcnn: (1, 3, 80, 133), forward, float32, threads: 1" in done.stdout
    assert files["--markdown"].read_text().strip() == done.stdout.strip()
    rows = rows_of(files["--json"])
    variants = ["nothing", "down", "nothing", "up", "down", "both"]
    assert [row["name"] for row in rows] == variants
    assert all(row["samples"] > 0 and row["seconds"] > 0 for row in rows)
    for quantity in ("parameters", "FLOPs"):
        nothing, up, down, both = (row[quantity] for row in rows[2:])
        assert min(up, down) > nothing
        assert both - nothing == (up - nothing) + (down - nothing)


def test_operations_of_networks_are_those_of_their_convolutions():
    """ResNet-50 is known for 4.09 G multiplications; CARAFE++ adds its own in 7 places."""
    import torch

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
def test_unknown_networks_and_passes_are_refused(capsys, option, known):
    from benchmarks import networks

    with pytest.raises(SystemExit, match="2"):
        networks.main([option, "none"])
    assert f"{option}: 'none' is none of {known}" in capsys.readouterr().err


# Relatives


def small(case):
    """Return the problem on a map of 8 x 9 centres and few channels."""
    h, w = (8 + length - n for length, n in zip((case.h, case.w), case.centres, strict=True))
    groups = min(case.groups, 2)
    channels = {1: min(case.c, 3), 2: 4}[groups]
    return dataclasses.replace(case, c=channels, h=h, w=w + 1, groups=groups)


@pytest.fixture
def relatives(monkeypatch):
    """The command, on small maps."""
    from benchmarks import problems, relatives

    for table in (problems.CONVEX, problems.ROOFLINE, problems.FACTORS):
        for name, case in table.items():
            monkeypatch.setitem(table, name, small(case))
    return relatives


def test_relatives_are_right(relatives):
    cases = "convex_disparity,involution_s2,adaptive_conv,depthwise_up2,down3,large_ratio_3_2"
    assert relatives.main(["--cases", cases, "--layout", "NHWC", "--seconds", "0"]) == 0


def test_bars_of_relatives_compare_the_times_of_their_table(relatives, tmp_path, capsys):
    path = tmp_path / "rows.json"
    cases = "convex_flow,adaptive_conv,depthwise,ratio_3_2"
    asked = ["--cases", cases, "--layout", "NCHW", "--seconds", "0.05", "--json", str(path)]
    assert relatives.main(asked) == 0
    listed = rows_of(path)
    rows = {(row["case"], row["name"], row["pass"], row["weights"]): row for row in listed}
    barred = {key: row["bars"][0] | row for key, row in rows.items() if row["bars"]}
    assert {key[0] for key in barred} == set(cases.split(","))

    copied = rows["convex_flow", "logits and output", "copy", "logits"]["seconds"]
    for pass_, limit in [("forward", 2), ("forward+backward", 5)]:
        row = barred["convex_flow", "carafepp", pass_, "logits"]
        copies = row["seconds"] / copied
        assert (row["reached"], row["met"]) == ([f"{copies:.2f} copies"], copies <= limit)
    for name in ("adaptive_conv", "depthwise"):
        row = barred[name, "carafepp", "forward", "masks"]
        assert row["met"] == (row["share"] >= 0.6)
    for weights in ("masks", "logits"):
        base = rows["up2", "carafepp", "forward", weights]
        row = barred["ratio_3_2", "carafepp", "forward", weights]
        times = base["share"] / row["share"]
        assert (row["reached"], row["met"]) == ([f"{times:.2f} times below up2"], times <= 1.5)

    logits = 9 * 8 * 8 * 8 * 9
    row = barred["convex_flow", "carafepp", "forward", "logits"]
    peak = row["limits"]["exponentials"]
    assert row["exp"] == pytest.approx(logits / row["seconds"] / peak)
    assert f"### Bars: {sum(row['met'] for row in barred.values())} of 6 are met" in (
        capsys.readouterr().out
    )


def test_masks_of_adaptive_conv_have_featups_memory(relatives):
    from benchmarks import problems
    from benchmarks.passes import MIXED
    from benchmarks.problems import Arrays

    arrays = Arrays(problems.ROOFLINE["adaptive_conv"], "float32")
    features, masks = (arrays(name, MIXED) for name in ("features", "masks"))
    assert features.flags.c_contiguous
    assert masks.transpose(0, 2, 3, 1).flags.c_contiguous


@pytest.mark.parametrize("name", ["ratio_3_2", "padding_ratio", "groups_down", "valid_down2"])
def test_a_gathered_composition_computes_the_definition(name):
    import torch

    from benchmarks import peers
    from cases import CASES

    case = CASES[name]
    rng = np.random.default_rng(0)
    arrays = [rng.integers(-3, 4, s).astype("f8") for s in (case.features_shape, case.masks_shape)]
    expected = ref.reassemble(*arrays, **case.factors)
    for composition in {"gathered", *peers.compositions(case)}:
        result = peers.composed(composition, case, "masks", *map(torch.from_numpy, arrays))
        np.testing.assert_array_equal(result.numpy(), expected, err_msg=composition)


def test_convex_upsampling_is_rafts():
    import torch

    from benchmarks import peers
    from cases import CASES

    case = CASES["k3"]
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(s) for s in (case.features_shape, case.logits_shape)]
    result = peers.composed("convex", case, "logits", *map(torch.from_numpy, arrays))
    expected = ref.reassemble_with_logits(*arrays, up=2)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_a_wrong_relative_has_no_bar(relatives, monkeypatch, capsys):
    from benchmarks import peers

    right = peers.convex
    monkeypatch.setattr(peers, "convex", lambda *args: right(*args) * 1.001)
    assert relatives.main(["--cases", "convex_small", "--seconds", "0.01"]) == 1
    printed = capsys.readouterr().out
    assert "wrong: " in printed
    assert "Bars" not in printed


# The operator of the paper


@pytest.fixture(scope="module")
def bars(tmp_path_factory):
    """Rows and printed text of the command, on small maps."""
    from benchmarks import carafe

    path = tmp_path_factory.mktemp("bars") / "rows.json"
    with pytest.MonkeyPatch.context() as patch:
        for known in carafe.PARTS.values():
            for name, case in known.items():
                patch.setitem(known, name, dataclasses.replace(case, n=1, c=16, h=12, w=12))
        patch.setattr(carafe, "LARGE", 1)
        cases = "cached_up,fpn1,s2,tiny_call"
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert carafe.main(["--cases", cases, "--seconds", "0.2", "--json", str(path)]) == 0
    return rows_of(path), printed.getvalue()


def barred(bars, **labels) -> list[dict]:
    """Return what the rows with these labels reach of their bars."""
    return [bar for row in bars[0] if labels.items() <= row.items() for bar in row["bars"]]


def one(bars, **labels) -> dict:
    labels = {"kind": "carafepp", "dtype": "float32", "threads": 1, **labels}
    (row,) = [row for row in bars[0] if labels.items() <= row.items()]
    return row


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize(("case", "direction"), [("cached_up", "up"), ("s2", "down")])
def test_every_pass_has_its_share_of_the_roofline(bars, case, direction, layout):
    where = f"{direction} x2, {'in' if case == 'cached_up' else 'beyond'} the caches"
    limits = {"up": [0.85, 0.65, 0.65, 0.65, 0.6], "down": [0.75, 0.55, 0.55, 0.55]}[direction]
    lower = {0.85: 0.75, 0.75: 0.65, 0.65: 0.55, 0.6: 0.5, 0.55: 0.45}
    passes = ["forward", "grad_features", "grad_logits", "grad_masks", "forward+backward"]
    for pass_, limit in zip(passes, limits, strict=False):
        row = one(bars, case=case, layout=layout, **{"pass": pass_})
        share = next(bar for bar in row["bars"] if bar["unit"] == "of the roofline")
        assert share["work"] == f"{pass_}, {where}"
        assert share["reached"] == row["share"]
        assert share["limit"] == (limit if layout == "NHWC" else lower[limit])
        assert share["met"] == (row["share"] >= share["limit"])


def test_bars_beside_pytorch_divide_times_of_the_table(bars):
    def seconds(**labels) -> list[float]:
        labels = {"case": "fpn1", **labels}
        return [row["seconds"] for row in bars[0] if labels.items() <= row.items()]

    for layout, nearest, composition in [("NCHW", 1, 12), ("NHWC", 2, 15)]:
        how = {"case": "fpn1", "layout": layout}
        forward, both = (one(bars, **how, **{"pass": p}) for p in ("forward", "forward+backward"))
        (rival,) = seconds(name="nearest", layout=layout)
        found = {bar["unit"]: bar for row in (forward, both) for bar in row["bars"]}
        assert ("times nearest" in found) != ("of the FMA's peak" in found)
        if bar := found.get("times nearest"):
            assert bar["limit"] == nearest
            assert bar["reached"] == pytest.approx(forward["seconds"] / rival)
        best = min(seconds(kind="composition"))
        bar = found["times as fast as PyTorch"]
        assert bar["limit"] == composition
        assert bar["reached"] == pytest.approx(best / both["seconds"])


def test_other_dtypes_and_threads_are_compared_with_the_row_of_float32_on_one_thread(bars):
    for layout in ("NCHW", "NHWC"):
        how = {"case": "fpn1", "layout": layout, "pass": "forward"}
        base = one(bars, **how)
        for dtype in ("float16", "bfloat16"):
            row = one(bars, **how, dtype=dtype)
            (bar,) = row["bars"]
            assert bar["limit"] == {"memory": 0.8, "FMA": 1.1}[base["limited_by"]]
            assert bar["reached"] == pytest.approx(row["seconds"] / base["seconds"])
        for pass_ in ("forward", "forward+backward"):
            alone, row = (one(bars, **how | {"pass": pass_}, threads=t) for t in (1, 2))
            (bar,) = row["bars"]
            assert (bar["limit"], bar["least"]) == (1.7, True)
            assert bar["reached"] == pytest.approx(alone["seconds_passed"] / row["seconds"])


def test_a_tiny_call_is_compared_with_numpys_and_pytorchs(bars):
    found = {bar["unit"]: bar["limit"] for bar in barred(bars, case="tiny_call")}
    assert found.pop("us more than x + 1", 12) == 12  # where JAX is installed
    assert found == {"times np.empty, np.multiply": 6, "times torch.mul": 4}


def test_rows_of_several_runs_share_a_file(tmp_path):
    """Each tells its machine, its commit, and the quartiles of its time."""
    from benchmarks import carafe

    path = tmp_path / "rows.json"
    for _ in range(2):
        carafe.main(["--cases", "tiny_call", "--seconds", "0.01", "--json", str(path)])
    rows = rows_of(path)
    names = [row["name"] for row in rows]
    assert names[: len(rows) // 2] == names[len(rows) // 2 :]
    for row in rows:
        assert {"CPU", "commit of this repository", "date"} <= row["run"].keys()
        assert row["seconds"] <= row["seconds_median"] <= row["seconds_q3"]


def test_the_summary_counts_every_bar(bars):
    rows, printed = bars
    every = [bar for row in rows for bar in row["bars"]]
    met = sum(bar["met"] for bar in every)
    summary = printed[printed.index(f"### Bars: {met} of {len(every)} are met") :]
    counts = re.findall(r": (\d+) of (\d+)(?= *\|)", summary)
    assert [sum(map(int, column)) for column in zip(*counts, strict=True)] == [met, len(every)]


def test_rows_with_bars_are_summed_up_too(bars, tmp_path, capsys):
    """They have no ratios: those come from the times."""
    from benchmarks.__main__ import main

    path = tmp_path / "rows.json"
    path.write_text("\n".join(map(json.dumps, bars[0])))
    assert main(["--from-json", str(path)]) == 0
    found = {bar["reached"] for bar in barred(bars) if bar["unit"] == "times as fast as PyTorch"}
    factors = f"{min(found):.1f} to {max(found):.1f} times as fast in forward and backward"
    assert factors in capsys.readouterr().out
