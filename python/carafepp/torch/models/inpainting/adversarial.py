"""Losses to train the generators by, and a discriminator for the patches of a hole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .... import _arguments


class PatchDiscriminator(nn.Module):
    """A PatchGAN that tells for each patch whether it is real or inpainted.

    There are `depth` convolutions 4x4 of stride 2. The first one has `width` channels, and each
    next one twice as many, up to 8*width. Two 3x3 convolutions follow, the last one to one score.
    All have spectral normalisation, with leaky ReLU between them. The input is the picture and its
    hole.

    Parameters
    ----------
    width : int, default 64
    depth : int, default 3

    Raises
    ------
    TypeError
        A number is not an integer.
    ValueError
        width or depth is below 1.

    Notes
    -----
    The paper replaces Global&Local's two discriminators by "only one PatchGAN-style discriminator
    on the inpainted region" (section 5.1). Here the losses count the patches that `patches` finds.
    The paper does not mention normalisation and loss; they are from Yu et al., whose free-form
    masks it uses. The last two layers are 3x3 (4x4 in PatchGAN), so that a score lies in the centre
    of its patch.

    References
    ----------
    P. Isola et al., "Image-to-Image Translation with Conditional Adversarial Networks", 2017.
    J. Yu et al., "Free-Form Image Inpainting with Gated Convolution", 2019.
    """

    def __init__(self, *, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        width, depth = _arguments.positive("PatchDiscriminator", width=width, depth=depth)
        self.depth = depth
        widths = [4, *(width * min(2**level, 8) for level in range(depth + 1))]
        layers: list[nn.Module] = []
        for level in range(depth):
            layers += [
                spectral_norm(nn.Conv2d(*widths[level : level + 2], 4, stride=2, padding=1)),
                nn.LeakyReLU(0.2),
            ]
        layers += [
            spectral_norm(nn.Conv2d(*widths[depth:], 3, padding=1)),
            nn.LeakyReLU(0.2),
            spectral_norm(nn.Conv2d(widths[-1], 1, 3, padding=1)),
        ]
        self.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor, hole: Tensor) -> Tensor:
        """Return scores, (N, 1, H // 2**depth, W // 2**depth), high for pictures."""
        scores: Tensor = self.layers(torch.cat([image, hole.to(image.dtype)], 1))
        return scores

    def patches(self, hole: Tensor) -> Tensor:
        """Return the map of the scores whose blocks of 2**depth pixels have a missing pixel."""
        return F.max_pool2d(hole.float(), 2**self.depth) > 0


def discriminator_loss(real: Tensor, inpainted: Tensor, patches: Tensor) -> Tensor:
    """Return the hinge loss: the mean of ``max(0, 1-real) + max(0, 1+inpainted)`` over patches."""
    return _mean(F.relu(1 - real) + F.relu(1 + inpainted), patches)


def generator_loss(inpainted: Tensor, patches: Tensor) -> Tensor:
    """Return the mean of ``-inpainted`` over `patches`."""
    return _mean(-inpainted, patches)


def reconstruction_loss(
    prediction: Tensor, image: Tensor, hole: Tensor, *, hole_weight: float = 1
) -> Tensor:
    """Return the mean of ``|prediction - image|``.

    Yu et al. give holes the weight of the rest, Liu et al. a weight of 6.
    """
    weight = 1 + (hole_weight - 1) * hole.to(image.dtype)
    return (weight * (prediction - image).abs()).mean()


def _mean(values: Tensor, patches: Tensor) -> Tensor:
    """Return the mean over some patches; 0 if there are none."""
    return (values * patches).sum() / patches.sum().clamp(min=1)
