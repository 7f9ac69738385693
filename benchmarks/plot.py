"""The picture: carafepp on a few problems, under the machine's ceiling, beside PyTorch's best."""

from pathlib import Path
from typing import Any

PROBLEMS = {  # the problems of the picture and their labels
    "fpn1": "up x2\n2x256x50x76",
    "fpn2": "up x2\n2x256x100x152",
    "roi": "up x2\n64x256x14x14",
    "stem": "down x2\n8x64x112x112",
    "s2": "down x2\n8x256x56x56",
    "s3": "down x2\n1x512x28x28",
}
PASSES = {"forward": "forward", "forward+backward": "forward and backward"}
LAYOUTS = {"NHWC": "#1b7837", "NCHW": "#7fbf7b"}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG: float32, the fewest threads, from logits or else from masks."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["dtype"] == "float32" and "flops" in row]
    threads = min((row["threads"] for row in rows), default=1)
    weights = "logits" if any(row["weights"] == "logits" for row in rows) else "masks"
    rows = [row for row in rows if (row["threads"], row["weights"]) == (threads, weights)]
    names = [name for name in PROBLEMS if any(row["case"] == name for row in rows)]
    names = names or list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(9, 1.2 + 0.75 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(PASSES), sharey=True, sharex=True)
    for panel, (pass_, title) in zip(panels, PASSES.items(), strict=True):
        _panel(panel, [row for row in rows if row["pass"] == pass_], names)
        panel.set_title(title, fontsize=11)
        panel.set_xlabel("GFLOP/s")
    panels[0].set_yticks(range(len(names)), [PROBLEMS.get(name, name) for name in names])
    panels[0].invert_yaxis()
    handles = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    title = f"float32, K=5, from {weights}, {threads} thread" + "s" * (threads > 1)
    figure.suptitle(title, fontsize=11)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=110, format="png")


def _panel(panel, rows: list[dict[str, Any]], names: list[str]) -> None:
    height = 0.26
    for y, name in enumerate(names):
        mine = [row for row in rows if row["case"] == name]
        chosen = [row for row in mine if row["chosen"]]
        for k, (layout, color) in enumerate(LAYOUTS.items()):
            for row in chosen:
                if row["layout"] == layout:
                    at = y + (k - 1) * height
                    label = f"carafepp, {layout}"
                    panel.barh(at, row["flops"] / 1e9, height * 0.9, color=color, label=label)
                    if row["x_composition"]:
                        text = f" x{row['x_composition']:.1f}"
                        panel.text(row["flops"] / 1e9, at, text, va="center", fontsize=8)
        best = max((row["flops"] for row in mine if row["kind"] == "composition"), default=None)
        if best:
            label = "best composition of PyTorch"
            panel.barh(y + height, best / 1e9, height * 0.9, color="#999999", label=label)
        if chosen:
            ceiling = chosen[0]["ceiling_flops"] / 1e9
            ends = [y - 1.6 * height, y + 1.6 * height]
            panel.plot([ceiling] * 2, ends, color="black", lw=2, label="ceiling (roofline)")
    panel.spines[["top", "right"]].set_visible(False)
