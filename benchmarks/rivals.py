"""What is compared: one way to compute one pass of one problem, ready to be called."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Rival:
    """One way to compute one pass, and what has been measured of it.

    `kind` is "carafepp", "composition" (PyTorch, the same computation) or "operator" (PyTorch,
    what users would take instead).
    """

    name: str
    kind: str
    pass_: str  # forward, grad_features, grad_masks, grad_logits, backward, forward+backward
    source: str  # masks or logits, which operators do not read
    layout: str  # NCHW or NHWC; of PyTorch's tensors contiguous or channels_last
    dtype: str
    threads: int
    outputs: str  # recycled or fresh
    call: Callable[[], Any] | None  # returns the result or a tuple of them
    settings: Callable[[], AbstractContextManager] | None  # threads, implementation: around calls
    results: tuple[str, ...] = ()  # the names of the results; none where there is no truth
    outs: tuple = ()  # the recycled ones
    chosen: bool = False  # carafepp's own choice, not a forced one
    twin: bool = False  # the same as a recycled one, but into fresh memory
    slack: float = 1  # how many times the rounding bound of the tests its answer may be off

    error: str | None = None  # a wrong answer or an exception
    samples: list[float] = field(default_factory=list)  # seconds a call
    memory: int | None = None  # bytes: peak during a call beyond what was resident before

    def __str__(self) -> str:  # noqa: D105
        words = [self.name, self.pass_, "from", self.source, self.layout, self.dtype]
        return " ".join([*words, "1 thread" if self.threads == 1 else f"{self.threads} threads"])
