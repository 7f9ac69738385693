"""CARAFE++ in the YAML of an Ultralytics YOLO, and in `YOLO.train`.

After `register`, a model's YAML may have the row ``[-1, 1, CARAFE, [256, 2]]``. `trainer_for` is
for networks that `carafepp.torch.replace_resampling` has changed. ``YOLO("best.pt")`` loads the
checkpoints of both if carafepp is installed; it needs no import.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Mapping
from typing import Any

from torch import nn
from ultralytics.nn import tasks

from .. import _arguments
from . import modules


class CARAFE(modules.CARAFE):
    """`carafepp.torch.CARAFE`, by the arguments of a row: ``[channels, up, kernel_size, options]``.

    The layer keeps the number of channels, so the number in a row is only a check. It is the number
    of the input, scaled by the model's width or not, as in a row of ``Conv``.

    ==========================  =============================================
    arguments                   layer
    ==========================  =============================================
    ``[]``                      ``CARAFE(channels, up=2)``
    ``[256, 2]``                the same, after 256 channels
    ``[null, 3, 7]``            ``CARAFE(channels, up=3, kernel_size=7)``
    ``[256, 1, 5, {down: 2}]``  ``CARAFE(channels, down=2)``, after 256 channels
    ==========================  =============================================

    Forks of YOLO have other orders: ``[2]`` (up), ``[5, 2]`` or ``[256, 5, 2]`` (kernel size, up).

    Parameters
    ----------
    channels : int, optional
    up : int, default 2
    kernel_size : int, default 5
    options : mapping, optional
        Further arguments of `carafepp.torch.CARAFE`.

    Raises
    ------
    TypeError
        A number is not an integer, or options is no mapping.
    ValueError
        `channels` is not the number of the input, or another number is out of its range.
    """

    def __init__(
        self,
        channels: int | None = None,
        up: int = 2,
        kernel_size: int = 5,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(options, (Mapping, type(None))):
            raise TypeError(f"[CARAFE] options must be a mapping; got {options!r}.")
        super().__init__(_channels(channels), up=up, kernel_size=kernel_size, **(options or {}))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the state of a pickled layer."""
        super().__setstate__(state)
        register()  # ultralytics may rebuild the network from the YAML in its checkpoint


def _channels(channels: int | None) -> Any:
    """Return the channels of a row's input; only the parser of the YAML knows them."""
    if channels is not None:
        channels = _arguments.integer("CARAFE", "channels", channels)
    frame = sys._getframe()
    while frame is not None and not (
        frame.f_code.co_name == "parse_model" and {"ch", "f"} <= frame.f_locals.keys()
    ):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return channels
    parser = frame.f_locals
    expected, width = parser["ch"][parser["f"]], parser.get("width", 1)
    if channels is not None and channels != expected:
        scaled = min(channels, parser.get("max_channels", channels)) * width
        if math.ceil(scaled / 8) * 8 != expected:
            raise ValueError(
                f"[CARAFE] channels must be the {expected} of the input, as they are or before "
                f"the model's width={width} scales them; got {channels}."
            )
    return expected


def register() -> None:
    """Make ``CARAFE`` a name in the YAML of models, in this process.

    A loaded checkpoint with such a layer calls this itself. Training on several GPUs starts other
    processes; `trainer_for` calls it there.
    """
    tasks.CARAFE = CARAFE


def trainer_for(yolo: Any) -> type:
    """Return a trainer that keeps the layers of a YOLO's network as they are.

    `YOLO.train` rebuilds the network from its YAML and loses the layers of `replace_resampling`.
    This trainer puts them in again: ``yolo.train(trainer=trainer_for(yolo), ...)``.

    Parameters
    ----------
    yolo : ultralytics.YOLO

    Returns
    -------
    type
        For the argument `trainer` of `YOLO.train`.

    Raises
    ------
    TypeError
        The network of yolo is an exported one, not a PyTorch module.
    """
    if not hasattr(yolo, "task_map"):
        raise TypeError(f"[trainer_for] yolo must be a YOLO; got {type(yolo).__name__}.")
    network = yolo.model
    if not isinstance(network, nn.Module):
        raise TypeError(f"[trainer_for] yolo must have a network of PyTorch; got {network!r}.")

    class Trainer(yolo.task_map[yolo.task]["trainer"]):  # type: ignore[misc]
        def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
            register()
            model = super().get_model(cfg, weights, verbose)
            _put_in(network, model)
            if weights:
                model.load(weights)
            return model

    return Trainer


def _put_in(old: nn.Module, new: nn.Module) -> None:
    """Copy the layers of an old network whose classes differ into a network."""
    for name, child in old.named_children():
        present = getattr(new, name, None)
        if type(present) is type(child):
            _put_in(child, present)
        else:
            setattr(new, name, copy.deepcopy(child))
