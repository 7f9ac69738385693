"""Pictures from packages for the inpainting experiments, and holes for them.

Pictures are float32, [H, W, 3] or [N, 3, size, size], within [-1, 1]. Holes are bool,
[N, 1, size, size], and true for missing pixels.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from skimage import data
from skimage.transform import downscale_local_mean
from sklearn.datasets import load_sample_images  # type: ignore[import-untyped,unused-ignore]

Array = NDArray[Any]


class Pictures(NamedTuple):
    """Photographs for training and for tests, which share no pixel."""

    train: list[Array]
    test: list[Array]


@cache
def load_pictures(size: int) -> Pictures:
    """Return seven photographs of scikit-image and scikit-learn; the right thirds are for tests.

    They are shrunk by 3, or less if crops of `size` would not fit. So a small crop shows more than
    a smooth patch.
    """
    photographs = [
        data.astronaut(),
        data.chelsea(),
        data.coffee(),
        data.rocket(),
        data.stereo_motorcycle()[0],
        *load_sample_images().images,  # china.jpg, flower.jpg
    ]
    for shrink in (3, 2, 1):
        pictures = Pictures([], [])
        for photograph in photographs:
            height, width = (length // shrink * shrink for length in photograph.shape[:2])
            small = downscale_local_mean(photograph[:height, :width], (shrink, shrink, 1))
            picture = (small / 127.5 - 1).astype(np.float32)
            border = 2 * picture.shape[1] // 3
            pictures.train.append(picture[:, :border])
            pictures.test.append(picture[:, border:])
        largest = min(min(picture.shape[:2]) for picture in pictures.test)
        if size <= largest:
            return pictures
    raise ValueError(f"[load_pictures] size must be at most {largest}; got {size}.")


def random_crops(pictures: list[Array], count: int, size: int, rng: np.random.Generator) -> Array:
    """Return squares from random pictures, half of them mirrored: [count, 3, size, size]."""
    crops = np.empty((count, 3, size, size), np.float32)
    for crop in crops:
        picture = pictures[rng.integers(len(pictures))]
        top, left = (rng.integers(length - size + 1) for length in picture.shape[:2])
        square = picture[top : top + size, left : left + size]
        crop[:] = (square[:, ::-1] if rng.random() < 0.5 else square).transpose(2, 0, 1)
    return crops


def free_form_holes(count: int, size: int, rng: np.random.Generator) -> Array:
    """Return holes of brush strokes, after Yu et al. 2019: [count, 1, size, size].

    There are one to three strokes. A stroke has 4 to 8 straight segments, each size/8 to size/3
    long, with sharp turns. The brush is round, size/10 to size/5 wide.
    """
    holes = np.zeros((count, 1, size, size), bool)
    for hole in holes:
        picture = Image.new("1", (size, size))
        for _ in range(rng.integers(1, 4)):
            pieces, brush = rng.integers(4, 9), rng.uniform(size / 10, size / 5)
            turns = np.pi * (np.arange(pieces) % 2) + rng.uniform(-np.pi / 5, np.pi / 5, pieces)
            angles, lengths = rng.uniform(0, 2 * np.pi) + turns, rng.uniform(1 / 8, 1 / 3, pieces)
            corners = [rng.uniform(0, size, 2)]
            for angle, length in zip(angles, lengths, strict=True):
                step = size * length * np.array([np.cos(angle), np.sin(angle)])
                corners.append(np.clip(corners[-1] + step, 0, size - 1))
            _draw_stroke(ImageDraw.Draw(picture), corners, brush)
        hole[0] = picture
    return holes


def rectangular_holes(count: int, size: int, rng: np.random.Generator) -> Array:
    """Return holes of one rectangle each, its sides size/4 to size/2: [count, 1, size, size]."""
    holes = np.zeros((count, 1, size, size), bool)
    for hole in holes[:, 0]:
        height, width = rng.integers(size // 4, size // 2 + 1, 2)
        top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
        hole[top : top + height, left : left + width] = True
    return holes


def psnr(pictures: Array, originals: Array) -> float:
    """Return ``10*log10(2**2 / mean squared error)`` in dB, with the error over all pictures.

    The smoothest pictures, with hardly any error, would dominate a mean of each picture's PSNR.
    """
    error = np.square(pictures - originals, dtype=np.float64).mean()
    return float(10 * np.log10(4 / error))


def _draw_stroke(draw: ImageDraw.ImageDraw, corners: list[Array], brush: float) -> None:
    """Draw lines from corner to corner with a round brush."""
    draw.line([tuple(corner) for corner in corners], fill=1, width=round(brush))
    for corner in corners:
        draw.ellipse([*(corner - brush / 2), *(corner + brush / 2)], fill=1)
