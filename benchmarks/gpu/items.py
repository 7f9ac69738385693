"""Problems and items of the steps `time` and `counters`."""

from dataclasses import dataclass

from cases import Case

from ..passes import Pass
from ..problems import PROBLEMS

CASES = {
    case.name: case
    for case in (
        PROBLEMS["fpn2"],
        PROBLEMS["fpn1"],
        Case("s2", "a stride-2 stage of a ResNet", 64, 256, 56, 56, down=2, kernel_size=5),
        Case("rois", "the mask head on 1000 RoIs", 1000, 256, 14, 14, up=2, kernel_size=5),
        Case("stem", "the pooling of a ResNet stem", 64, 64, 112, 112, down=2, kernel_size=5),
        Case("s3", "a deep stage", 64, 512, 28, 28, down=2, kernel_size=5),
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
