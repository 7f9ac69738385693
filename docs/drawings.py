"""Draw the pictures of docs/concepts: python docs/drawings.py. It needs carafepp[demo].

The library tells what to draw: an output's window are the features that get a gradient from it, and
its source is the one under the tap in the middle.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import ConnectionPatch, Rectangle

import carafepp
from carafepp.demo import UP, load_scene
from carafepp.guided import KERNEL_SIZE, logits_from_guide
from carafepp.viz import LOCATION, SOURCE, Reassembly, draw_mask

CONCEPTS = Path(__file__).parent / "concepts"
WINDOW, PALE, EDGE = "#ffb3b3", "#f6f6f6", "0.6"  # colours

K = 3
EVERY_TAP, MIDDLE_TAP = np.ones(K * K, np.float32), np.float32(np.arange(K * K) == K * K // 2)
FACTORS = [  # title, up, down, rows of features, the output to explain
    ("up x2", 2, 1, 6, (6, 5)),
    ("down x2", 1, 2, 12, (3, 2)),
    ("x 3/2", 3, 2, 8, (7, 4)),
]

# Pixels of the demo's scene, (row, column): one on a thing, and one beside its edge.
PAIRS = [
    ("tyre", (321, 128), (321, 117)),
    ("can", (75, 409), (75, 396)),
    ("door", (55, 186), (55, 170)),
]
AROUND = 36  # pixels of the photograph on each side of such a pixel


def reads(length, output, up, down, taps):
    """Return which features, [H, W], an output reads with these taps of its mask."""
    rows, columns = carafepp.output_size((length, length), up, down)
    grad_output = np.zeros((1, rows, columns), np.float32)
    grad_output[0][output] = 1
    masks = np.repeat(taps, rows * columns).reshape(-1, rows, columns)
    features = np.zeros((1, length, length), np.float32)
    gradient, _ = carafepp.reassemble_backward(grad_output, features, masks, up=up, down=down)
    return gradient[0] != 0


def draw_map(axes, colours, title):
    """Draw a map [H, W] of colours, all maps in the same size."""
    count = len(colours)
    axes.add_patch(Rectangle((0, 0), 1, 1, fc=PALE))
    for row, column in np.argwhere(colours != PALE):
        cell = (column / count, row / count), 1 / count, 1 / count
        axes.add_patch(Rectangle(*cell, fc=colours[row, column]))
    lines = np.arange(count + 1) / count
    axes.hlines(lines, 0, 1, EDGE, lw=0.7)
    axes.vlines(lines, 0, 1, EDGE, lw=0.7)
    axes.set(xlim=(-0.02, 1.02), ylim=(1.02, -0.02), aspect="equal")
    axes.set_title(title, fontsize=11)
    axes.set_axis_off()


def draw_rows(axes, left, right, sources, chosen):
    """Draw two columns of cells, with a line from each cell at the right to its source."""
    width = 0.12
    for x, colours in ((0, left), (1 - width, right)):
        for row, colour in enumerate(colours):
            corner, side = (x, row / len(colours)), 1 / len(colours)
            axes.add_patch(Rectangle(corner, width, side, fc=colour, ec=EDGE, lw=0.7))
            axes.text(
                x + width / 2, (row + 0.5) * side, row, fontsize=7.5, ha="center", va="center"
            )
    for row, source in enumerate(sources):
        ends = (source + 0.5) / len(left), (row + 0.5) / len(right)
        style = {"color": "black", "lw": 1.8} if row == chosen else {"color": EDGE, "lw": 0.9}
        axes.plot((width, 1 - width), ends, **style)
    axes.set(xlim=(-0.02, 1.02), ylim=(1.02, -0.02), aspect="equal")
    axes.set_title("rows: src(i') to i'", fontsize=11)
    axes.set_axis_off()


def draw_operator():
    """Draw the window of an output, and the source of every row, for each factor."""
    figure, grid = plt.subplots(3, 3, figsize=(8, 8.6), layout="constrained")
    for (title, up, down, length, output), (left, middle, right) in zip(FACTORS, grid, strict=True):
        rows = carafepp.output_size((length, length), up, down)[0]
        window = reads(length, output, up, down, EVERY_TAP)
        source = reads(length, output, up, down, MIDDLE_TAP)
        features = np.where(source, SOURCE, np.where(window, WINDOW, PALE))
        outputs = np.full((rows, rows), PALE, object)
        outputs[output] = LOCATION
        draw_map(left, features, f"features {length} x {length}")
        draw_map(middle, outputs, f"output {rows} x {rows}")
        target = [(number + 0.5) / rows for number in output[::-1]]
        top, beside = np.argwhere(window)[0]
        for row, column in (0, 0), (0, K), (K, 0), (K, K):
            corner = (beside + column) / length, (top + row) / length
            line = ConnectionPatch(corner, target, "data", axesA=left, axesB=middle)
            figure.add_artist(line).set(color=SOURCE, alpha=0.6, lw=0.8)
        row, column = output
        sources = [
            np.argwhere(reads(length, (row, column), up, down, MIDDLE_TAP))[0][0]
            for row in range(rows)
        ]
        draw_rows(right, features[:, sources[column]], outputs[:, column], sources, row)
        left.text(-0.1, 0.5, title, fontsize=13, rotation=90, ha="center", va="center")
    figure.savefig(CONCEPTS / "operator.svg", metadata={"Date": None})


def draw_masks():
    """Draw masks of the demo over its photograph."""
    photo, _ = load_scene()
    masks = carafepp.normalize_masks(logits_from_guide(photo, UP), up=UP, kernel_size=KERNEL_SIZE)
    reassembly = Reassembly(masks[0], (photo.shape[0] // UP, photo.shape[1] // UP), up=UP)
    figure = plt.figure(figsize=(10, 3.6), layout="constrained", facecolor="white")
    whole, details = figure.subfigures(1, 2, width_ratios=(10, 11))
    scene = whole.subplots()
    scene.imshow(photo)
    scene.set_axis_off()
    columns = details.subplots(2, len(PAIRS)).T
    for (thing, on, beside), (upper, lower) in zip(PAIRS, columns, strict=True):
        corner = on[1] - AROUND, on[0] - AROUND
        frame = Rectangle(corner, 2 * AROUND, 2 * AROUND, fc="none", ec="white", lw=1.5)
        scene.add_patch(frame)
        for axes, words, (row, column) in (upper, "on", on), (lower, "beside", beside):
            axes.imshow(photo, interpolation="nearest")
            draw_mask(axes, reassembly, (row, column), UP)
            axes.set(xlim=(column - AROUND, column + AROUND), ylim=(row + AROUND, row - AROUND))
            axes.set_title(f"{words} the {thing}", fontsize=11)
            axes.set_axis_off()
    figure.savefig(CONCEPTS / "masks.jpg", dpi=130, pil_kwargs={"quality": 92})


if __name__ == "__main__":
    plt.rcParams |= {"svg.hashsalt": "carafepp", "svg.fonttype": "none"}  # the same file each time
    draw_operator()
    draw_masks()
