"""Pictures for a page 800 pixels wide: speeds under the machine's ceiling; memory of a step."""

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
# Okabe and Ito's colours, which colour-blind readers tell apart.
LAYOUTS = {"NHWC": "#0072b2", "NCHW": "#56b4e9"}
PEERS, OPERATOR, CEILING = "#999999", "#d55e00", "black"
WIDTH, DPI = 8, 150  # inches; at 800 pixels a point is more than a pixel
BAR = 0.27  # of the room of a problem
LABELS = {
    "NHWC": "carafepp, NHWC",
    "NCHW": "carafepp, NCHW",
    "peers": "PyTorch's best composition",
    "ceiling": "ceiling of this machine (roofline)",
    "operator": "time of nearest or average pooling",
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG: float32, the fewest threads, from logits or else from masks.

    Raises
    ------
    ValueError
        No row of float32 was timed.
    """
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["dtype"] == "float32" and row["samples"]]
    if not rows:
        raise ValueError("[plot] rows must have one of float32 that was timed; got none.")
    threads = min(row["threads"] for row in rows)
    weights = "logits" if any(row["weights"] == "logits" for row in rows) else "masks"
    rows = [row for row in rows if (row["threads"], row["weights"]) == (threads, weights)]
    names = [name for name in PROBLEMS if any(row["case"] == name for row in rows)]
    names = names or list(dict.fromkeys(row["case"] for row in rows))
    figure = Figure(figsize=(WIDTH, 1.5 + 0.62 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(PASSES), sharey=True, sharex=True)
    ceilings = [row["ceiling_flops"] / 1e9 for row in rows if row["chosen"]]
    reach = 1.2 * max(ceilings, default=1)
    panels[0].set_xlim(0, reach)
    for panel, (pass_, title) in zip(panels, PASSES.items(), strict=True):
        _panel(panel, [row for row in rows if row["pass"] == pass_], names, reach)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("GFLOP/s", fontsize=9)
        panel.tick_params(labelsize=9, left=False)
        panel.spines[["top", "right", "left"]].set_visible(False)
    panels[0].set_yticks(range(len(names)), [PROBLEMS.get(name, name) for name in names])
    panels[0].set_ylim(len(names) - 0.45, -0.55)
    drawn = [panel.get_legend_handles_labels() for panel in panels]
    handles = {label: handle for found in drawn for handle, label in zip(*found, strict=True)}
    labels = [label for label in LABELS.values() if label in handles]
    title = f"float32, K=5, from {weights}, {threads} thread" + "s" * (threads > 1)
    figure.suptitle(
        f"{title}; the numbers: times as fast as PyTorch's best composition", fontsize=10
    )
    figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=3,
        fontsize=9,
        frameon=False,
    )
    figure.savefig(path, dpi=DPI, format="png")


def _panel(panel, rows: list[dict[str, Any]], names: list[str], reach: float) -> None:
    """Draw one pass; `reach` is the end of the axis."""
    for y, name in enumerate(names):
        mine = [row for row in rows if row["case"] == name]
        chosen = {row["layout"]: row for row in mine if row["chosen"]}
        for k, (layout, color) in enumerate(LAYOUTS.items()):
            if layout not in chosen:
                continue
            row, at = chosen[layout], y + (k - 1) * BAR
            speed = row["flops"] / 1e9
            panel.barh(at, speed, BAR * 0.92, color=color, label=LABELS[layout])
            if row["x_composition"]:
                panel.annotate(
                    f"{row['x_composition']:.1f}x",
                    (speed, at),
                    (3, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=8,
                    zorder=5,
                    bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5},
                )
            if row["x_operator"]:
                # The speed of carafepp if it took the other operator's time.
                as_fast, mark, size = speed / row["x_operator"], "|", 11
                if as_fast > reach:
                    as_fast, mark, size = reach, ">", 4
                style = {"ls": "none", "ms": size, "mew": 1.5, "clip_on": False}
                label = LABELS["operator"]
                panel.plot(as_fast, at, mark, color=OPERATOR, label=label, **style)
        best = max((row["flops"] for row in mine if row["kind"] == "composition"), default=None)
        if best:
            panel.barh(y + BAR, best / 1e9, BAR * 0.92, color=PEERS, label=LABELS["peers"])
        if chosen:
            ceiling = next(iter(chosen.values()))["ceiling_flops"] / 1e9
            ends = [y - 1.5 * BAR, y + 1.5 * BAR]
            panel.plot([ceiling] * 2, ends, color=CEILING, lw=2, label=LABELS["ceiling"])


def draw_memory(rows: list[dict[str, Any]], path: Path) -> None:
    """Write a PNG: a bar for each row of `benchmarks.memory`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 0.9 + 0.36 * len(rows)), layout="constrained")
    panel = figure.subplots()
    for y, row in enumerate(rows):
        color = LAYOUTS["NHWC"] if row["name"] == "carafepp" else PEERS
        hatch = None if row["how"] == "measured" else "///"
        megabytes = row["memory"] / 1e6
        panel.barh(y, megabytes, 0.7, color=color, hatch=hatch, edgecolor="white", lw=0)
        text = f" {megabytes:,.1f} MB" if megabytes < 10 else f" {megabytes:,.0f} MB"
        panel.text(megabytes, y, text + f", {row['how']}" * (row["how"] != "measured"), va="center")
    panel.set_yticks(range(len(rows)), [row["name"] for row in rows])
    panel.invert_yaxis()
    panel.margins(x=0.2)
    panel.tick_params(left=False)
    panel.set_xlabel("MB beyond inputs and results")
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.set_title(rows[0]["title"], fontsize=10)
    figure.savefig(path, dpi=DPI, format="png")
