"""CARAFE++ in the YAML of an Ultralytics YOLO, and in `YOLO.train`.

After `register`, ``[-1, 1, CARAFE, [256, 2]]`` is a row of a model's YAML. `trainer_for` is for
networks that `carafepp.torch.replace_resampling` has changed. Checkpoints of both load by
``YOLO("best.pt")`` wherever carafepp is installed, without an import of it.
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

    It keeps the number of channels, so that the row's is a check: that of the layer that it comes
    from, as it is or before the model's width scales it, as in a row of ``Conv``.

    ==========================  =============================================
    arguments                   become
    ==========================  =============================================
    ``[]``                      ``CARAFE(channels, up=2)``
    ``[256, 2]``                the same, after 256 channels
    ``[null, 3, 7]``            ``CARAFE(channels, up=3, kernel_size=7)``
    ``[256, 1, 5, {down: 2}]``  ``CARAFE(channels, down=2)``, after 256 channels
    ==========================  =============================================

    Forks of YOLO write other orders: ``[2]`` (up), ``[5, 2]`` or ``[256, 5, 2]`` (kernel size, up).

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
        A number that is not an integer, or options that are no mapping.
    ValueError
        `channels` is not the number of the input, or another one is out of its range.
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
        register()  # the network may be built again from the YAML in its checkpoint


def _channels(channels: int | None) -> Any:
    """Return the channels of a row's input, which the parser of the YAML knows alone."""
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

    A loaded checkpoint that has such a layer does it itself. Training on several GPUs starts other
    processes: there `trainer_for` does it.
    """
    tasks.CARAFE = CARAFE


def trainer_for(yolo: Any) -> type:
    """Return a trainer that keeps the layers of a YOLO's network as they are.

    `YOLO.train` builds the network again from its YAML, and has lost what `replace_resampling` put
    into it. This trainer, of the YOLO's task, puts it in again:
    ``yolo.train(trainer=trainer_for(yolo), ...)``.

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
        yolo has no network of PyTorch, but an exported one.
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
    """Give a network copies of those layers of an old one that are of other classes."""
    for name, child in old.named_children():
        present = getattr(new, name, None)
        if type(present) is type(child):
            _put_in(child, present)
        else:
            setattr(new, name, copy.deepcopy(child))
