"""Table 10 in miniature: inpainting with CARAFE++ on the way down, on the way up, and on both.

A generator of `carafepp.torch.models.inpainting` learns to fill free-form holes in crops of seven
photographs. The test crops are from the right thirds, which it has not seen. The paper's own
numbers are for Places at 256x256 (section 4.3 replaces both ways, section 5.2 mentions up only):

============  ===============  ===============
L1, PSNR      baseline         with CARAFE++
============  ===============  ===============
Global&Local  6.69%, 19.58 dB  5.82%, 20.93 dB
Partial Conv  5.96%, 20.78 dB  5.60%, 21.05 dB
============  ===============  ===============
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _arguments
from ..torch.models.inpainting import (
    GlobalLocalGenerator,
    PartialConvUNet,
    PatchDiscriminator,
    compose,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)
from .pictures import free_form_holes, load_pictures, psnr, random_crops

TEST_CROPS = 128
ADVERSARIAL_WEIGHT = 0.01  # the reconstruction loss has weight 1


def make_generator(network: str, *, width: int, **resamplers: str | None) -> nn.Module:
    """Return the generator "global_local" or "partial_conv".

    By default, the network has the downsampler and the upsampler of its baseline.
    """
    given: dict[str, Any] = {key: name for key, name in resamplers.items() if name is not None}
    if network == "global_local":
        return GlobalLocalGenerator(width=width, **given)
    if network == "partial_conv":
        return PartialConvUNet(width=width, skips=False, **given)
    raise ValueError(
        f"[train_inpainting] network must be 'global_local' or 'partial_conv'; got {network!r}."
    )


def train_inpainting(
    network: str,
    *,
    downsampler: str | None = None,
    upsampler: str | None = None,
    steps: int = 300,
    seed: int = 0,
    size: int = 32,
    width: int = 16,
    batch: int = 16,
    adversarial: bool = False,
    device: str = "cpu",
    progress: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Train a generator, and measure it on the test set, the same in every call.

    Parameters
    ----------
    network : {"global_local", "partial_conv"}
    downsampler, upsampler : str, optional
        Names that the network takes; by default the names of the paper's baseline.
    steps, seed, size, width, batch : int
        The number of steps; the seed of weights, crops and holes; the side of the crops; the width
        of generator and discriminator; the number of crops in a step.
    adversarial : bool, default False
        True trains a discriminator too.
    device : str, default "cpu"
        An argument of `torch.device`. On the CPU, the seed and the number of threads determine the
        results.
    progress : function of (step, reconstruction loss), optional
        Called after each step.

    Returns
    -------
    dict
        ``psnr`` (dB) and ``l1`` (% of the range of values) of the filled pictures, as in Table 10;
        ``psnr_mean``, the PSNR if each hole has the mean colour around it; ``parameters`` of the
        generator; ``seconds`` of the training; ``generator``, trained.

    Raises
    ------
    TypeError
        A number is not an integer.
    ValueError
        A name is unknown, a number is below 1, or the pictures are smaller than size.
    """
    _arguments.positive("train_inpainting", steps=steps, size=size, batch=batch)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        names = {"downsampler": downsampler, "upsampler": upsampler}
        generator = make_generator(network, width=width, **names).to(device)
        discriminator = PatchDiscriminator(width=width, depth=2).to(device)
    fill, tell = _Descent(generator, steps), _Descent(discriminator, steps)
    pictures, rng = load_pictures(size).train, np.random.default_rng(seed)
    start = time.perf_counter()
    for step in range(steps):
        image = torch.from_numpy(random_crops(pictures, batch, size, rng)).to(device)
        hole = torch.from_numpy(free_form_holes(batch, size, rng)).to(device)
        prediction = generator(image, hole)
        filled = compose(image, hole, prediction)
        loss = reconstruction = reconstruction_loss(prediction, image, hole)
        if adversarial:
            patches = discriminator.patches(hole)
            scores = discriminator(image, hole), discriminator(filled.detach(), hole)
            tell(discriminator_loss(*scores, patches))
            deceived = generator_loss(discriminator(filled, hole), patches)
            loss = reconstruction + ADVERSARIAL_WEIGHT * deceived
        fill(loss)
        if progress is not None:
            progress(step, reconstruction.item())
    seconds = time.perf_counter() - start
    return {
        **evaluate(generator, size, device),
        "parameters": sum(parameter.numel() for parameter in generator.parameters()),
        "seconds": seconds,
        "generator": generator,
    }


def evaluate(generator: nn.Module, size: int, device: str = "cpu") -> dict[str, float]:
    """Return a generator's psnr and l1 on the test set, and the psnr of filling by the mean."""
    rng = np.random.default_rng(2021)
    crops = random_crops(load_pictures(size).test, TEST_CROPS, size, rng)
    image, hole = torch.from_numpy(crops), torch.from_numpy(free_form_holes(TEST_CROPS, size, rng))
    generator.eval()
    with torch.no_grad():
        prediction = generator(image.to(device), hole.to(device)).cpu()
    filled = compose(image, hole, prediction)
    around = image.where(~hole, torch.nan).flatten(2).nanmean(2)[:, :, None, None]
    return {
        "psnr": psnr(filled.numpy(), crops),
        "l1": 50 * (filled - image).abs().mean().item(),
        "psnr_mean": psnr(compose(image, hole, around).numpy(), crops),
    }


class _Descent:
    """The paper's optimiser, with ten times its learning rate, which decays to 0."""

    def __init__(self, network: nn.Module, steps: int) -> None:
        self.optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.5, 0.9))
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)

    def __call__(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
