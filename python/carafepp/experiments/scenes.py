"""Drawn scenes for segmentation: overlapping shapes before a background, and the class of a pixel.

A class has a shape, a texture and a range of colours, which overlaps with other ranges. So a pixel
alone does not tell its class. Contours are sharp, also for thin and small shapes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

CLASSES = ("background", "disc", "polygon", "star", "ring", "stroke")
SHAPES = (6, 10)  # minimum and maximum in a scene
COLOURS = np.array(  # of the classes; anything may be behind them
    [
        [0.5, 0.5, 0.5],
        [0.8, 0.2, 0.2],
        [0.2, 0.7, 0.2],
        [0.2, 0.3, 0.8],
        [0.8, 0.7, 0.1],
        [0.7, 0.2, 0.8],
    ]
)
VARIETY = np.array([0.5, 0.2, 0.2, 0.2, 0.2, 0.2])  # the largest distance from these colours


class Scenes(NamedTuple):
    """Pictures and their labels.

    Attributes
    ----------
    images : array of float32, [N, 3, size, size]
        About 0 to 1; light and noise exceed this a little.
    classes : array of uint8, [N, size, size]
        Indices into `CLASSES`.
    instances : array of uint8, [N, size, size]
        0 for the background, else the number of the shape, from 1 for the hindmost.
    """

    images: Array
    classes: Array
    instances: Array


def make_scenes(count: int, size: int, seed: int) -> Scenes:
    """Return scenes of size*size pixels; the seed and its number determine a scene."""
    for name, value, least in (("count", count, 1), ("size", size, 16)):
        if value < least:
            raise ValueError(f"[make_scenes] {name} must be at least {least}; got {value}.")
    images = np.empty((count, 3, size, size), np.float32)
    classes, instances = np.zeros((2, count, size, size), np.uint8)
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        _draw(images[number], classes[number], instances[number], rng)
    return Scenes(images, classes, instances)


def _draw(image: Array, classes: Array, instances: Array, rng: np.random.Generator) -> None:
    size = image.shape[-1]
    y, x = np.mgrid[:size, :size] + 0.5
    image[:] = _blend(0, _texture(0, x, y, rng), rng)
    for instance in range(1, rng.integers(SHAPES[0], SHAPES[1] + 1) + 1):
        label = int(rng.integers(1, len(CLASSES)))
        inside = _shape(label, x, y, rng)
        image[:, inside] = _blend(label, _texture(label, x, y, rng)[inside], rng)
        classes[inside], instances[inside] = label, instance
    angle, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.6)
    towards_light = (x * np.cos(angle) + y * np.sin(angle)) / size
    image *= 1 + strength * (towards_light - towards_light.mean())
    image += rng.normal(0, rng.uniform(0.02, 0.08), image.shape)


def _shape(label: int, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Return the pixels of a shape: [size, size] of bool."""
    size = len(x)
    middle = rng.uniform(0.1, 0.9, 2) * size
    radius = rng.uniform(0.08, 0.28) * size
    turn = rng.uniform(0, 2 * np.pi)
    u = (x - middle[0]) * np.cos(turn) + (y - middle[1]) * np.sin(turn)
    v = (y - middle[1]) * np.cos(turn) - (x - middle[0]) * np.sin(turn)
    distance = np.hypot(u, v)
    inside: Array
    match CLASSES[label]:
        case "disc":
            inside = np.hypot(u, v * rng.uniform(1, 2)) < radius
        case "polygon":  # the pixels on the inner side of all edges
            corners = rng.integers(3, 6)
            normals = 2 * np.pi * (np.arange(corners) + rng.uniform(-0.2, 0.2, corners)) / corners
            edges = [u * np.cos(angle) + v * np.sin(angle) < 0.7 * radius for angle in normals]
            inside = np.logical_and.reduce(edges)
        case "star":
            arms = rng.integers(4, 7)
            inside = distance < radius * (0.75 + 0.55 * np.cos(arms * np.arctan2(v, u)))
        case "ring":
            inside = np.abs(np.hypot(u, v * rng.uniform(1, 1.6)) - radius) < 0.02 * size + 0.8
        case _:  # a thin wave
            wave = rng.uniform(0.02, 0.08) * size * np.sin(u / size * rng.uniform(8, 20))
            inside = (np.abs(v - wave) < rng.uniform(0.8, 1.8)) & (np.abs(u) < 2 * radius)
    return inside


def _texture(label: int, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Return the share of the second colour of a class: [size, size], 0 to 1."""
    period, turn = rng.uniform(4, 7), rng.uniform(0, np.pi)
    u = (x * np.cos(turn) + y * np.sin(turn)) * 2 * np.pi / period
    v = (y * np.cos(turn) - x * np.sin(turn)) * 2 * np.pi / period
    texture: Array
    match CLASSES[label]:
        case "background":  # clouds, and grain
            texture = 0.5 + 0.3 * np.sin(u / 7 + np.sin(v / 5)) + rng.uniform(-0.2, 0.2, x.shape)
        case "polygon":  # stripes
            texture = 0.5 + 0.5 * np.sin(u)
        case "star":  # checks
            texture = 0.5 + 0.5 * np.sin(u) * np.sin(v)
        case _:  # plain, or nearly so
            texture = np.full(x.shape, rng.uniform(0, 0.3))
    return texture


def _blend(label: int, texture: Array, rng: np.random.Generator) -> Array:
    """Return two colours, one of them the class's, mixed as the texture says: [3, *its shape]."""
    first = COLOURS[label] + rng.uniform(-1, 1, 3) * VARIETY[label]
    second = rng.uniform(0, 1, 3)
    blend: Array = np.multiply.outer(first, 1 - texture) + np.multiply.outer(second, texture)
    return blend
