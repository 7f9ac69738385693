"""The tables as data: the training for each row, and the paper's number.

Inner widths of operators are for the paper's networks; `segmentation` scales them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..torch.models import DOWNSAMPLERS, UPSAMPLERS


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes
    ----------
    label : str
    paper : float
        The paper's number, on the paper's data.
    arguments : dict
        Arguments of `train_segmentation` or `train_inpainting`, in addition to the preset.
    """

    label: str
    paper: float
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table of the paper in miniature.

    Attributes
    ----------
    name, question : str
    paper : str
        The table of the paper, and the meaning of its numbers.
    rows : sequence of Row
    task : {"segmentation", "inpainting"}
    """

    name: str
    question: str
    paper: str
    rows: Sequence[Row]
    task: str = "segmentation"


@dataclass(frozen=True)
class Measure:
    """The form in which tables show a number of a training."""

    key: str
    heading: str
    digits: int = 1
    more_is_better: bool = True


MEASURES = {  # by task, the main one first
    "segmentation": (
        Measure("miou", "mIoU (%)"),
        Measure("boundary_iou", "boundary IoU (%)"),
        Measure("pixel_accuracy", "pixel accuracy (%)"),
    ),
    "inpainting": (
        Measure("psnr", "PSNR (dB)", 2),
        Measure("l1", "L1 (%)", 2, more_is_better=False),
    ),
}

BASELINES: dict[str, dict[str, Any]] = {  # default arguments of a row, by task
    "segmentation": {"upsampler": "nearest", "downsampler": "strided_conv"},
    "inpainting": {},
}
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "small": {  # about 12 s of one core for a training of segmentation
        "segmentation": {"steps": 150, "size": 64, "width": 16, "channels": 32, "batch": 8},
        "inpainting": {"steps": 200, "size": 32, "width": 16, "batch": 16},
        "figures": {"steps": 1200, "size": 64, "width": 16, "channels": 32, "batch": 8},
    },
    "large": {  # for a GPU
        "segmentation": {"steps": 5000, "size": 128, "width": 64, "channels": 256, "batch": 16},
        "inpainting": {"steps": 10000, "size": 96, "width": 32, "batch": 32, "adversarial": True},
        "figures": {"steps": 5000, "size": 128, "width": 64, "channels": 256, "batch": 16},
    },
}


def _up(**options: Any) -> dict[str, Any]:
    return {"upsampler": "carafe", "up_options": options}


def _down(**options: Any) -> dict[str, Any]:
    return {"downsampler": "carafe", "down_options": options}


_CARAFE_UP, _CARAFE_DOWN = {"upsampler": "carafe"}, {"downsampler": "carafe"}
_AP = "box AP of Faster R-CNN, ResNet-50, on COCO"

_TABLES = [
    Table(
        "upsamplers",
        "Which upsampler is the best one?",
        f"Table 4, {_AP}",
        [
            Row(name, paper, {"upsampler": name})
            for name, paper in zip(
                UPSAMPLERS, (36.5, 36.7, 36.6, 36.6, 36.4, 36.5, 36.9, 36.9, 37.8), strict=True
            )
        ],
    ),
    Table(
        "downsamplers",
        "Which downsampler in the backbone is the best one?",
        f"Table 3, {_AP}",
        [
            Row(name, paper, {"downsampler": name})
            for name, paper in zip(DOWNSAMPLERS, (36.5, 37.8, 37.9, 37.7, 38.0, 38.8), strict=True)
        ],
    ),
    Table(
        "places",
        "Does CARAFE++ help in the backbone, in the FPN, and in both more than in one?",
        f"Table 5, {_AP}",
        [
            Row("neither", 36.5),
            Row("FPN", 37.8, _CARAFE_UP),
            Row("backbone", 38.8, _CARAFE_DOWN),
            Row("both", 39.6, _CARAFE_UP | _CARAFE_DOWN),
        ],
    ),
    Table(
        "normalizers",
        "Should kernels sum to 1?",
        f"Table 14, {_AP}",
        [
            Row("sigmoid", 37.4, _up(normalizer="sigmoid")),
            Row("sigmoid_normalized", 37.8, _up(normalizer="sigmoid_normalized")),
            Row("softmax", 37.8, _CARAFE_UP),
        ],
    ),
    Table(
        "kernels",
        "How large should k_encoder and k_reassembly be, for upsampling?",
        f"Table 13, {_AP}",
        [
            Row(
                f"{encoder}, {reassembly}",
                paper,
                _CARAFE_UP
                if (encoder, reassembly) == (3, 5)
                else _up(encoder_kernel_size=encoder, kernel_size=reassembly),
            )
            for encoder, reassembly, paper in (
                (1, 3, 37.3),
                (1, 5, 37.3),
                (3, 3, 37.3),
                (3, 5, 37.8),
                (3, 7, 37.7),
                (5, 5, 37.8),
                (5, 7, 38.1),
                (7, 7, 38.0),
            )
        ],
    ),
    Table(
        "compressed_channels_up",
        "How many channels does the compressor have to leave for upsampling, of 256?",
        f"Table 11, {_AP}",
        [
            Row(
                "no compressor" if channels is None else str(channels),
                paper,
                _CARAFE_UP if channels == 64 else _up(compressed_channels=channels),
            )
            for channels, paper in (
                (16, 37.6),
                (32, 37.7),
                (64, 37.8),
                (128, 37.8),
                (256, 37.8),
                (None, 37.8),
            )
        ],
    ),
    Table(
        "compressed_channels_down",
        "How many channels does the compressor have to leave for downsampling, of 64 to 512?",
        "Table 12, top-1 accuracy of ResNet-50 on ImageNet",
        [
            Row(
                str(channels),
                paper,
                _CARAFE_DOWN if channels == 16 else _down(compressed_channels=channels),
            )
            for channels, paper in ((4, 77.31), (8, 77.43), (16, 77.46), (32, 77.40), (64, 77.46))
        ],
    ),
    Table(
        "inpainting",
        "Does CARAFE++ in both directions fill holes better?",
        "Table 10, PSNR in dB on Places",
        [
            Row("Global&Local", 19.58, {"network": "global_local"}),
            Row(
                "Global&Local, CARAFE++",
                20.93,
                {"network": "global_local", "upsampler": "carafe", "downsampler": "carafe"},
            ),
            Row("Partial Conv", 20.78, {"network": "partial_conv"}),
            Row(
                "Partial Conv, CARAFE++",
                21.05,
                {"network": "partial_conv", "upsampler": "carafe", "downsampler": "carafe"},
            ),
        ],
        task="inpainting",
    ),
]
TABLES = {table.name: table for table in _TABLES}
