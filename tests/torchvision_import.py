"""Imports torchvision, also one whose compiled operators do not load into the PyTorch at hand."""

import sys

import torch

library = None  # its definitions end with it


def import_torchvision():
    """Return torchvision, with nms and roi_align in Python where it has no operators.

    Raise an ImportError where it is not installed.
    """
    global library
    try:
        import torchvision
    except RuntimeError:  # the operator torchvision::nms does not exist
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.impl("nms", nms, "CPU")
        import torchvision

        torchvision.extension._has_ops = lambda: True  # the answer before a call of nms
        roi_align = sys.modules["torchvision.ops.roi_align"]
        roi_align._roi_align = (
            roi_align._roi_align.__wrapped__
        )  # without compilation, which takes long
    return torchvision


def nms(boxes, scores, iou_threshold):
    from torchvision.ops import box_iou

    overlap = box_iou(boxes, boxes) > iou_threshold
    gone, kept = torch.zeros(len(boxes), dtype=torch.bool), []
    for box in scores.argsort(descending=True).tolist():
        if not gone[box]:
            kept.append(box)
            gone |= overlap[box]
    return torch.tensor(kept, dtype=torch.long)
