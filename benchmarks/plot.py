"""The roofline picture: each kernel under its own ceiling."""

from pathlib import Path

from .machine import WIDTHS
from .report import Row

_PASSES = ("forward", "grad_features", "grad_masks", "grad_logits", "backward", "forward+backward")


def draw(rows: list[Row], path: Path) -> None:
    """Write a PNG: a panel for each pass, a column for each problem, GFLOP/s upwards.

    Shown are float32, recycled outputs and the fewest threads.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.rival.samples and row.rival.kind == "carafepp"]
    rows = [row for row in rows if (row.rival.dtype, row.rival.outputs) == ("float32", "recycled")]
    fewest = min((row.rival.threads for row in rows), default=1)
    rows = [row for row in rows if row.rival.threads == fewest]
    passes = [pass_ for pass_ in _PASSES if any(row.rival.pass_ == pass_ for row in rows)] or [""]
    colors = {name: f"C{k}" for k, name in enumerate(sorted({_name(row) for row in rows}))}
    width = max(8, max(len(_columns(rows, pass_)) for pass_ in passes) * 0.8)
    figure = Figure(figsize=(width, 3.6 * len(passes)), layout="constrained")
    panels = figure.subplots(len(passes), 1, squeeze=False)[:, 0]
    for panel, pass_ in zip(panels, passes, strict=True):
        _panel(panel, [row for row in rows if row.rival.pass_ == pass_], colors)
        panel.set_title(pass_, fontsize=10)
    handles: dict[str, object] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.suptitle(f"float32, threads: {fewest}", fontsize=10)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    figure.savefig(path, dpi=120, format="png")


def _columns(rows: list[Row], pass_: str) -> list[tuple]:
    """Return (FLOP/byte, problem, source, layout) of each column, memory-bound ones first."""
    mine = [row for row in rows if row.rival.pass_ == pass_]
    keys = {(r.intensity, r.case.name, r.rival.source, r.rival.layout) for r in mine}
    return sorted(keys)


def _panel(panel, rows: list[Row], colors: dict[str, str]) -> None:
    columns = _columns(rows, rows[0].rival.pass_) if rows else []
    for row in rows:
        name, color = _name(row), colors[_name(row)]
        key = row.intensity, row.case.name, row.rival.source, row.rival.layout
        x = columns.index(key)
        if row.rival.chosen or name in WIDTHS:
            line = {"color": "black", "lw": 2} if row.rival.chosen else {"color": color, "lw": 1}
            line["label"] = "roofline" if row.rival.chosen else f"roofline of {name}"
            panel.plot([x - 0.35, x + 0.35], [row.ceiling / 1e9] * 2, **line)
        filled = color if row.rival.chosen else "none"
        panel.plot(x, row.flops / 1e9, "o", mec=color, mfc=filled, label=name)
        if row.rival.chosen and row.x_composition:
            best = row.flops / row.x_composition / 1e9
            panel.plot(x, best, "x", color="gray", label="best PyTorch composition")
    labels: dict[float, str] = {}  # by peak; one for those that would stand on each other
    for width, peak in rows[0].limits.peak.items() if rows else []:
        panel.axhline(peak / 1e9, color="gray", lw=0.8, ls=":")
        near = next((other for other in labels if abs(peak / other - 1) < 0.1), peak)
        where = f"{8 * width}-bit FMA" if width else "matmul peak"
        labels[near] = f"{labels[near]},\n {where}" if near in labels else f" {where}"
    for peak, label in labels.items():
        at = {"xycoords": ("axes fraction", "data"), "va": "center"}
        panel.annotate(label, (1, peak / 1e9), fontsize=7, **at)
    names = [f"{case}\n{s} {layout}\n{ratio:.1f} FLOP/B" for ratio, case, s, layout in columns]
    panel.set_xticks(range(len(columns)), names, fontsize=6)
    panel.set_yscale("log")
    panel.set_ylabel("GFLOP/s")


def _name(row: Row) -> str:
    """Return the instruction set of an implementation: the end of its name."""
    return row.rival.name.rpartition("_")[2]
