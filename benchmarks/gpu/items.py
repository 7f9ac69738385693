"""Problems and items of the steps `time` and `counters`."""

from dataclasses import dataclass

from cases import Case
from cases.networks import LAYERS

from ..passes import Pass
from ..problems import PROBLEMS

CASES = {
    case.name: case
    for case in (
        *(LAYERS[name] for name in ("fpn2", "fpn1", "s2", "rois", "stem", "s3")),
        Case("fpn1_up4", "a factor of the generic kernels", 2, 256, 50, 76, up=4, kernel_size=5),
        PROBLEMS["tiny"],
    )
}


@dataclass(frozen=True)
class Item:
    """One measurement. Items of the same arrays follow each other within a tier."""

    case: str
    dtype: str
    layout: str
    weights: str
    pass_: str
    name: str  # carafepp (its own choice), an implementation, a composition of PyTorch, or mmcv

    def __str__(self) -> str:  # noqa: D105
        name = self.name.replace(" ", "_")
        return f"{self.case} {self.dtype} {self.layout} {self.weights} {self.pass_} {name}"

    def as_pass(self, case: Case) -> Pass:
        """Return the item's pass of a problem."""
        return Pass(case, self.weights, self.pass_)
