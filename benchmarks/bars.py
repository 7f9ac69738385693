"""The bars: what speed and memory are meant to be, as ratios within one run."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .problems import STUDIED, output_bytes
from .report import Row

LARGE = 4 << 20  # bytes of output
SCRATCH = 2 << 20  # bytes a thread
TINY = 10e-6  # seconds


@dataclass
class Bar:
    """One bar, and what the rows reach that it is for: the worst of them counts."""

    what: str
    wanted: str
    reached: str
    met: bool | None  # None: not measured
    best: str = "-"  # what the best row reaches
    same_layout: str = "-"  # what is reached against the compositions on tensors of its layout
    worst: str = "-"  # which row the worst one is


def evaluate(rows: list[Row]) -> list[Bar]:
    """Return all bars, measured or not."""
    return list(_bars([row for row in rows if not row.rival.error]))


def _bars(rows: list[Row]) -> Iterator[Bar]:
    chosen = [row for row in rows if row.rival.chosen and row.rival.outputs == "recycled"]
    main = [row for row in chosen if row.rival.dtype == "float32" and row.rival.threads == 1]
    studied = [row for row in main if row.case.name in STUDIED]

    for factor, pass_, source, layout, wanted in [
        ("up", "forward", "logits", "NHWC", 28),
        ("up", "forward", "logits", "NCHW", 22),
        ("up", "forward", "masks", "NHWC", 28),
        ("up", "forward", "masks", "NCHW", 20),
        ("down", "forward", "", "NHWC", 28),
        ("down", "forward", "", "NCHW", 22),
        ("up", "forward+backward", "", "NHWC", 22),
        ("up", "forward+backward", "", "NCHW", 16),
        ("down", "forward+backward", "", "", 15),
    ]:
        what = [f"{factor} x2", pass_, source and f"from {source}", layout, "x best composition"]
        found = _of(studied, factor, pass_, layout, source)
        bar = _at_least(" ".join(filter(None, what)), wanted, found, lambda row: row.x_composition)
        bar.same_layout = _at_least("", wanted, found, lambda row: row.x_same_layout).reached
        yield bar

    large = [row for row in main if output_bytes(row.case, "float32") >= LARGE]
    for factor, layout, operator, wanted in [
        ("up", "NCHW", "nearest", 1),
        ("down", "NCHW", "avg_pool", 1),
        ("up", "NHWC", "nearest", 2),
        ("down", "NHWC", "avg_pool", 1.2),
    ]:
        what = f"forward {layout}, time of {operator} = 1, outputs of 4 MB and more"
        found = _of(large, factor, "forward", layout)
        yield _at_most(what, wanted, found, lambda row: row.x_operator and 1 / row.x_operator)

    yield _at_most(
        "scratch, MB a thread",
        SCRATCH / 1e6,
        chosen,
        lambda row: row.rival.memory and row.rival.memory / row.rival.threads / 1e6,
    )
    yield _at_most(
        "time in bfloat16, time in float32 = 1",
        1,
        [
            row
            for row in chosen
            if (row.rival.dtype, row.rival.threads) == ("bfloat16", 1) and row.case.name != "tiny"
        ],
        lambda row: _ratio(row, chosen, dtype="float32"),
    )
    yield _at_most(
        "a call on (1, 16, 8, 8), us, any number of threads",
        TINY * 1e6,
        [
            row
            for row in chosen
            if (row.case.name, row.rival.pass_, row.rival.dtype) == ("tiny", "forward", "float32")
        ],
        lambda row: row.median * 1e6,
    )
    yield _at_least(
        "two threads, one thread = 1, outputs of 4 MB and more",
        1.6,
        [
            row
            for row in chosen
            if row.rival.threads == 2 and output_bytes(row.case, row.rival.dtype) >= LARGE
        ],
        lambda row: _ratio(row, chosen, threads=1, inverse=True),
    )
    yield _at_least(
        "AVX2, share of its roofline, that of AVX-512 = 1",
        0.85,
        [
            row
            for row in rows
            if row.case.name in STUDIED
            and row.rival.name.endswith("_avx2")
            and (row.rival.dtype, row.rival.threads) == ("float32", 1)
        ],
        lambda row: _share_of_avx512(row, rows),
    )


def _of(rows: list[Row], factor: str, pass_: str, layout: str, source: str = "") -> list[Row]:
    """Return the rows of such problems; no layout or source stands for both."""
    return [
        row
        for row in rows
        if getattr(row.case, factor) == 2
        and row.rival.pass_ == pass_
        and row.rival.layout.startswith(layout)
        and row.rival.source.startswith(source)
    ]


def _ratio(row: Row, rows: list[Row], inverse: bool = False, **other) -> float | None:
    """Return the time of this row by that of the one that differs in this alone, or the inverse."""
    twin = _twin(row, rows, **other)
    if twin is None:
        return None
    return twin.median / row.median if inverse else row.median / twin.median


def _share_of_avx512(row: Row, rows: list[Row]) -> float | None:
    twin = _twin(row, rows, name=row.rival.name.replace("avx2", "avx512"))
    return twin and row.share / twin.share


def _twin(row: Row, rows: list[Row], **other) -> Row | None:
    keys = ("pass_", "source", "layout", "dtype", "threads", "outputs")
    wanted = {**{key: getattr(row.rival, key) for key in keys}, **other}
    for twin in rows:
        if twin.case is row.case and all(
            getattr(twin.rival, key) == value for key, value in wanted.items()
        ):
            return twin
    return None


def _at_least(what: str, wanted: float, rows: list[Row], value: Callable) -> Bar:
    return _bar(what, f"{wanted:g} or more", rows, value, lambda x: x >= wanted)


def _at_most(what: str, wanted: float, rows: list[Row], value: Callable) -> Bar:
    return _bar(what, f"{wanted:.3g} or less", rows, value, lambda x: x <= wanted, best=0)


def _bar(what: str, wanted: str, rows: list[Row], value: Callable, met, best: int = -1) -> Bar:
    """`best` is where the best of the values in ascending order stands: -1 last, 0 first."""
    measured = [(value(row), row) for row in rows]
    measured = sorted((pair for pair in measured if pair[0]), key=lambda pair: pair[0])
    if not measured:
        return Bar(what, wanted, "not measured", None)
    x, row = measured[-1 - best]
    by = f"{row.case.name}: {row.rival}"
    return Bar(what, wanted, f"{x:.3g}", met(x), f"{measured[best][0]:.3g}", worst=by)
