"""Prints the loss of mmdetection's own Mask R-CNN with CARAFE, by one of two ways to the drop-in.

``python mmdet_loss.py install`` names carafepp.torch.mmcv.install in the config,
``python mmdet_loss.py swap`` calls swap_mmcv on the model.

mmcv-lite serves: it lacks compiled operators only. Here are enough of them for one loss: regions
come without suppression, and pooled without interpolation.
"""

import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from torchvision_import import import_torchvision


class Extension(types.ModuleType):
    """Stands for mmcv's compiled operators."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: sys.exit(f"{name} is not to be called")

    def nms(self, boxes, scores, iou_threshold, offset):
        return scores.argsort(descending=True)[:10]

    def roi_align_forward(self, x, rois, output, *_, aligned_height, aligned_width, **__):
        output.copy_(pooled(x, rois, (aligned_height, aligned_width)))

    def roi_align_backward(self, grad, rois, y, x, grad_x, *, aligned_height, aligned_width, **_):
        size = aligned_height, aligned_width
        _, vjp = torch.func.vjp(lambda x: pooled(x, rois, size), torch.zeros_like(grad_x))
        grad_x.copy_(vjp(grad)[0])


def pooled(x, rois, size):
    return torch.stack([F.adaptive_avg_pool2d(x[int(roi[0])], size) for roi in rois])


def main(way):
    import_torchvision()
    sys.modules["mmcv._ext"] = Extension("mmcv._ext")
    import mmcv

    mmcv.__version__ = "2.1.0"  # the newest that mmdet 3.3 allows
    import mmdet
    from mmdet.registry import MODELS
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmdet.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.structures import InstanceData

    configs = Path(mmdet.__file__).parent / ".mim/configs"
    config = f"_base_ = {str(configs / 'carafe/mask-rcnn_r50_fpn-carafe_1x_coco.py')!r}\n"
    if way == "install":
        config += 'custom_imports = dict(imports=["carafepp.torch.mmcv.install"])\n'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.py"
        path.write_text(config)
        config = Config.fromfile(path)
    config.model.backbone.init_cfg = None
    register_all_modules(init_default_scope=True)
    torch.manual_seed(0)
    np.random.seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    if way == "swap":
        from carafepp.torch.mmcv import swap_mmcv

        assert len(swap_mmcv(model)) == 5
    from carafepp.torch.mmcv import CARAFEPack

    assert sum(type(module) is CARAFEPack for module in model.modules()) == 5

    shapes = {f"{kind}_shape": (128, 128) for kind in ("img", "ori", "pad", "batch_input")}
    sample = DetDataSample(metainfo={**shapes, "scale_factor": (1.0, 1.0)})
    masks = np.zeros((1, 128, 128), np.uint8)
    masks[0, 20:90, 30:100] = 1
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[30.0, 20, 100, 90]]),
        labels=torch.tensor([1]),
        masks=BitmapMasks(masks, 128, 128),
    )
    none = torch.zeros(0, dtype=torch.long)
    sample.ignored_instances = InstanceData(bboxes=torch.zeros(0, 4), labels=none)
    losses = model.loss(torch.randn(1, 3, 128, 128), [sample])
    total = sum(sum(v) if isinstance(v, list) else v for k, v in losses.items() if "loss" in k)
    total.backward()
    assert all(m.content_encoder.weight.grad.any() for m in model.neck.upsample_modules)
    print("loss", total.item())


if __name__ == "__main__":
    main(sys.argv[1])
