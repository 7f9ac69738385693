# SPDX-License-Identifier: Apache-2.0
"""Logits from a picture: joint bilateral upsampling (Kopf et al. 2007) as CARAFE.

A pixel of the guide takes its value from blocks that are similar in colour and near. The weight is
the exp of a logit, normalised by the softmax.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage import color

Array = NDArray[Any]

# The scores of the demo change little if one of these constants changes by a quarter.
KERNEL_SIZE = 5  # the position term is nearly 0 beyond two blocks
RADIUS = KERNEL_SIZE // 2
LIGHTNESS = 0.5  # weight; light and shadow change lightness more than hue
COLOUR_SCALE = 2.0  # CIELAB units; the eye notices differences from about 2
MIXED_PENALTY = 0.5  # for a block of many colours, which spans an edge
POSITION_SCALE = 0.4  # blocks; wide enough for a slope, narrow enough to stay local

NO_HALO = ((0, 0), (0, 0))


def split_into_blocks(image: Array, size: int) -> Array:
    """[H, W, C] -> [ceil(H/size), ceil(W/size), size*size, C], NaN outside the image."""
    pad = [(0, -image.shape[0] % size), (0, -image.shape[1] % size), (0, 0)]
    padded = np.pad(image, pad, constant_values=np.nan) if np.any(pad) else image
    rows, cols = padded.shape[0] // size, padded.shape[1] // size
    blocks: Array = padded.reshape(rows, size, cols, size, -1).transpose(0, 2, 1, 3, 4)
    return blocks.reshape(rows, cols, size * size, -1)


def logits_from_guide(guide: Array, up: int, halo: Any = NO_HALO) -> Array:
    """[H, W, 3] -> [1, K*K*up*up, H/up, W/up]: the similarity of pixels and blocks.

    A tile of a larger guide has blocks of the guide around it: `halo` of them at ((top, bottom),
    (left, right)), 0 to 2. They get no logits. Similar pixels have a similar colour and position.
    """
    k, r = KERNEL_SIZE, RADIUS
    lab = color.rgb2lab(guide).astype(np.float32) * np.array([LIGHTNESS, 1, 1], np.float32)
    pixels = np.ascontiguousarray(split_into_blocks(lab, up).transpose(3, 2, 0, 1))
    colour = pixels.mean(1, keepdims=True)  # of a block, [3, 1, H/up, W/up]
    spread = np.sqrt(((pixels - colour) ** 2).sum(0).mean(0))
    (top, bottom), (left, right) = halo
    pixels = pixels[..., top : pixels.shape[2] - bottom, left : pixels.shape[3] - right]
    rows, cols = pixels.shape[2:]

    # Blocks beyond the border have an infinite colour difference, so their weight is exactly 0.
    border = [(r - top, r - bottom), (r - left, r - right)]
    colour = np.pad(colour, [(0, 0), (0, 0), *border], constant_values=np.inf)
    spread = np.pad(spread, border)
    position = (np.arange(up) + 0.5) / up - 0.5  # a pixel's centre from its block's, in blocks

    logits = np.empty((k, k, up * up, rows, cols), np.float32)
    difference = np.empty_like(pixels)  # fresh memory for each step costs more than the step
    for a, b in np.ndindex(k, k):
        tap, logit = np.s_[..., a : a + rows, b : b + cols], logits[a, b]
        np.square(np.subtract(pixels, colour[tap], out=difference), out=difference)
        np.sqrt(np.sum(difference, 0, out=logit), out=logit)
        logit += MIXED_PENALTY * spread[tap]
        logit /= -COLOUR_SCALE
        away2 = (position[:, None] - (a - r)) ** 2 + (position - (b - r)) ** 2  # [up, up]
        logit -= away2.reshape(-1, 1, 1) / (2 * POSITION_SCALE**2)
    return logits.reshape(1, k * k * up * up, rows, cols)
