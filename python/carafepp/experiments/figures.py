"""The paper's Figures 1 and 9, masks and feature maps, from networks trained on drawn scenes."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.progress import Progress

from .. import viz
from ..viz import Reassembly
from .scenes import CLASSES, COLOURS, Scenes, make_scenes
from .segmentation import SegmentationNet, contour, predict, train_segmentation
from .tables import PRESETS

Array = NDArray[Any]

# Modules of `SegmentationNet` with the strides of their inputs: first from the output back to the
# coarsest level, then from that level to the stem.
UP_CHAIN = ("head.3", "head.2", "fpn.upsamplers.0", "fpn.upsamplers.1", "fpn.upsamplers.2")
UP_STRIDES = (2, 4, 8, 16, 32)
DOWN_CHAIN = (
    *(f"backbone.layer{stage}.0.shortcut_down" for stage in (4, 3, 2)),
    "backbone.maxpool",
)
DOWN_STRIDES = (16, 8, 4, 2)

COLOURS_OF_A_FILE = 128  # noise makes files large

# Locations (row, column) by the number of a scene, in pixels; COARSE in units of stride 32
SIZE, SCENES = 128, 12
LOCATIONS = ((3, (45, 88)), (3, (45, 97)), (10, (66, 50)), (6, (95, 60)))
COARSE_LOCATIONS = ((5, (1, 2)), (6, (3, 3)), (3, (1, 3)), (10, (2, 2)))


class Drawn:
    """A scene, and the reassemblies of the network with CARAFE++ in it."""

    def __init__(self, network: SegmentationNet, scenes: Scenes, number: int) -> None:
        self.image, self.classes = scenes.images[number], scenes.classes[number]
        with viz.record_reassemblies(network) as self.reassemblies:
            self.predicted = predict(network, self.image[None])[0]

    def chain(self, names: tuple[str, ...]) -> list[Reassembly]:
        """Return the reassemblies of some modules."""
        return [self.reassemblies[name] for name in names]


def draw_figures(
    out: Path, *, preset: str = "small", device: str = "cpu", progress: Progress | None = None
) -> list[Path]:
    """Write PNGs into a folder, and return their paths.

    The networks (with CARAFE++ and without) are trained, unless OUT/figures.pt has them.
    """
    networks = load_networks(out / "figures.pt", preset, device, progress or Progress(disable=True))
    scenes = make_scenes(SCENES, SIZE, seed=3)
    of_trained_size = make_scenes(2 * SCENES, PRESETS[preset]["figures"]["size"], seed=3)
    share = share_of_own_class(networks["carafe"], of_trained_size)
    figures = {
        "figure1": draw_figure_1(networks["carafe"], scenes),
        "figure9": draw_figure_9(networks["carafe"], scenes, share),
        "masks": draw_masks(networks["carafe"], scenes),
        "features": draw_features(networks, scenes),
    }
    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        with io.BytesIO() as file:
            figure.savefig(file, dpi=72)
            with Image.open(file) as picture:
                picture.convert("RGB").quantize(COLOURS_OF_A_FILE).save(paths[-1], optimize=True)
    return paths


def load_networks(
    path: Path, preset: str, device: str, progress: Progress
) -> dict[str, SegmentationNet]:
    """Return two networks: "carafe" with CARAFE++ everywhere, and "nearest" without it."""
    given = {**PRESETS[preset]["figures"], "learning_rate": 0.002, "seed": 0}
    operators = {"carafe": ("carafe", "carafe"), "nearest": ("nearest", "strided_conv")}
    try:
        saved = torch.load(path, map_location="cpu") if path.exists() else {}
        same = saved.get("arguments") == given
    except Exception as error:  # PyTorch raises many kinds of errors for a broken file
        raise ValueError(
            f"[experiments] {path} must be what an earlier run wrote; delete it to train again."
        ) from error
    if not same:
        states = {}
        for name, (up, down) in operators.items():
            bar = progress.add_task(f"figures: {name}", total=given["steps"])
            trained = train_segmentation(
                up, down, **given, device=device, progress=lambda *_, bar=bar: progress.advance(bar)
            )
            states[name] = trained["network"].cpu().state_dict()
        saved = {"arguments": given, "states": states}
        torch.save(saved, path)
    widths = {name: given[name] for name in ("width", "channels")}
    networks = {name: SegmentationNet(*names, **widths) for name, names in operators.items()}
    for name, network in networks.items():
        network.load_state_dict(saved["states"][name])
        network.eval()
    return networks


def draw_figure_1(network: SegmentationNet, scenes: Scenes) -> Figure:
    """Draw the regions behind a pixel through the top-down path, back to the coarsest level.

    Nearest-neighbour interpolation would use the unit in the white frame alone.
    """
    figure = Figure(figsize=(11.5, 2.25 * len(LOCATIONS)), layout="constrained")
    grid = figure.subplots(len(LOCATIONS), 1 + len(UP_CHAIN))
    for axes, (number, location) in zip(grid, LOCATIONS, strict=True):
        drawn = Drawn(network, scenes, number)
        viz.draw_picture(axes[0], COLOURS[drawn.predicted].transpose(2, 0, 1), "prediction")
        regions = viz.trace(drawn.chain(UP_CHAIN), location)
        for panel, region, stride in zip(axes[1:], regions, UP_STRIDES, strict=True):
            viz.draw_picture(panel, drawn.image, f"stride {stride}")
            viz.draw_region(panel, region, stride)
            viz.draw_unit(panel, (location[0] // stride, location[1] // stride), stride)
            if stride < 8:
                zoom(panel, location, 8 * stride)
        for panel in axes:
            viz.draw_location(panel, location)
    return figure


def draw_figure_9(network: SegmentationNet, scenes: Scenes, share: dict[str, float]) -> Figure:
    """Draw the units behind a location, all the way up and all the way down."""
    figure = Figure(figsize=(2.4 * len(LOCATIONS), 5.6), layout="constrained")
    grid = figure.subplots(2, len(LOCATIONS))
    for axes, (number, location) in zip(grid[0], LOCATIONS, strict=True):
        drawn = Drawn(network, scenes, number)
        units = viz.trace(drawn.chain(UP_CHAIN[:2]), location)[-1]
        viz.draw_picture(axes, drawn.image, "up, stride 4 to 1")
        viz.draw_units(axes, units, UP_STRIDES[1])
        viz.draw_location(axes, location)
        zoom(axes, location, 20)
    for axes, (number, location) in zip(grid[1], COARSE_LOCATIONS, strict=True):
        drawn = Drawn(network, scenes, number)
        units = viz.trace(drawn.chain(DOWN_CHAIN), location)[-1]
        viz.draw_picture(axes, drawn.image, "down, stride 2 to 32")
        viz.draw_units(axes, units, DOWN_STRIDES[-1], share=0.5)
        viz.draw_location(axes, location, 32)
    figure.suptitle(
        "Weight on units of a location's class, on contours, stride 4 to 1: "
        f"CARAFE++ {share['carafe']:.0%}, nearest {share['nearest']:.0%}, "
        f"5x5 average {share['average']:.0%}",
        fontsize=9,
    )
    return figure


def zoom(axes: Any, location: viz.Location, reach: int) -> None:
    """Show only the pixels within a distance of a location."""
    axes.set_xlim(location[1] - reach - 0.5, location[1] + reach + 0.5)
    axes.set_ylim(location[0] + reach + 0.5, location[0] - reach - 0.5)


def share_of_own_class(network: SegmentationNet, scenes: Scenes) -> dict[str, float]:
    """Return the share of the weight on units with the class of the location.

    Locations are pixels on the true contours, with their true class. Units are the inputs of the
    head's upsamplers, with stride 4 and the predicted class. The nearest unit and the average of
    the 5x5 units around it are for comparison.
    """
    shares: dict[str, list[float]] = {"carafe": [], "nearest": [], "average": []}
    for number, image in enumerate(scenes.images):
        drawn = Drawn(network, scenes, number)
        with torch.no_grad():
            levels = network.fpn(network.backbone.features(torch.from_numpy(image[None])))
            units = network.head[-1](network.head[:2](levels[0])).argmax(1)[0].numpy()
        around = np.lib.stride_tricks.sliding_window_view(
            np.pad(units, 2, constant_values=255), (5, 5)
        )
        contours = [contour((drawn.classes == label)[None])[0] for label in range(len(CLASSES))]
        locations = np.argwhere(np.logical_or.reduce(contours))[::40]
        for row, column in locations:
            label = drawn.classes[row, column]
            weights = viz.trace(drawn.chain(UP_CHAIN[:2]), (row, column))[-1]
            own, window = units == label, around[row // 4, column // 4]
            shares["carafe"].append(float(weights[own].sum() / weights.sum()))
            shares["nearest"].append(float(own[row // 4, column // 4]))
            shares["average"].append(float((window == label).sum() / (window != 255).sum()))
    return {name: float(np.mean(values)) for name, values in shares.items()}


def draw_masks(network: SegmentationNet, scenes: Scenes) -> Figure:
    """Draw reassembly kernels of single modules."""
    figure = Figure(figsize=(2.4 * len(LOCATIONS), 5.2), layout="constrained")
    grid = figure.subplots(2, len(LOCATIONS))
    for axes, (number, location) in zip(grid.T, LOCATIONS, strict=True):
        drawn = Drawn(network, scenes, number)
        for panel, name, stride in ((axes[0], "head.3", 2), (axes[1], "fpn.upsamplers.0", 8)):
            reassembly = drawn.reassemblies[name]
            out = stride // 2
            viz.draw_picture(panel, drawn.image, f"from stride {stride} to {out}")
            viz.draw_mask(panel, reassembly, (location[0] // out, location[1] // out), stride)
            zoom(panel, location, 5 * stride)
    return figure


def draw_features(networks: dict[str, SegmentationNet], scenes: Scenes) -> Figure:
    """Draw upsampled feature maps, without CARAFE++ and with it."""
    names = ("fpn.upsamplers.0", "head.2", "head.3")
    numbers = sorted({number for number, _ in LOCATIONS})
    size = (1.9 * (1 + 2 * len(names)), 2.1 * len(numbers))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(numbers), 1 + 2 * len(names), squeeze=False)
    for axes, number in zip(grid, numbers, strict=True):
        viz.draw_picture(axes[0], scenes.images[number], "picture")
        for i, (operator, network) in enumerate(networks.items()):
            outputs = record_outputs(network, names, scenes.images[number])
            for j, output in enumerate(outputs.values()):
                stride = (4, 2, 1)[j]
                panel = axes[1 + 2 * j + (1 - i)]
                panel.imshow(viz.principal_colours(output), interpolation="nearest")
                panel.set_title(f"{operator}, to stride {stride}", fontsize=9)
                panel.set_axis_off()
    return figure


def record_outputs(
    network: SegmentationNet, names: tuple[str, ...], image: Array
) -> dict[str, Array]:
    """Return the outputs of some modules of a network for a picture: [C, H, W] each."""
    outputs: dict[str, Array] = {}
    handles = [
        network.get_submodule(name).register_forward_hook(
            lambda _, __, output, name=name: outputs.update({name: output[0].numpy()})
        )
        for name in names
    ]
    predict(network, image[None])
    for handle in handles:
        handle.remove()
    return outputs
