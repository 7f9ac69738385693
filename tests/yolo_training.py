"""Trains Ultralytics' YOLO for an epoch, with CARAFE by one of two ways, and prints the checkpoint.

``python yolo_training.py FOLDER rows`` has it in the rows of a YAML,
``python yolo_training.py FOLDER replaced`` by replace_resampling.
``python yolo_training.py FOLDER CHECKPOINT`` trains a checkpoint as it comes.
"""

import os
import sys
from pathlib import Path

folder, way = Path(sys.argv[1]), sys.argv[2]
# It must not use the network.
os.environ |= {"YOLO_CONFIG_DIR": str(folder), "YOLO_OFFLINE": "1", "YOLO_AUTOINSTALL": "0"}

import numpy as np
import torch
from PIL import Image

from torchvision_import import import_torchvision

import_torchvision()

import ultralytics
from ultralytics import YOLO
from ultralytics.utils import YAML


def carafes(yolo):
    """Return the classes of CARAFE by the place, without an import of it."""
    return {
        name: (type(layer).__module__, layer.up, layer.down)
        for name, layer in yolo.model.named_modules()
        if type(layer).__name__ == "CARAFE"
    }


def make_pictures():
    """Write pictures of white squares on noise."""
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for kind in ("images", "labels"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        for number in range(4):
            picture = rng.integers(0, 99, (64, 64, 3), np.uint8)
            picture[16:48, 16:48] = 255
            Image.fromarray(picture).save(folder / "images" / part / f"{number}.png")
            label = folder / "labels" / part / f"{number}.txt"
            label.write_text("0 0.5 0.5 0.5 0.5\n")
    data = folder / "data.yaml"
    data.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [square]\n")
    return data


def from_rows():
    """YOLO11, of a width of 1/4; both upsamplers come after 512 and 1024 channels before it."""
    from carafepp.torch.ultralytics import register

    register()
    config = YAML.load(Path(ultralytics.__file__).parent / "cfg/models/11/yolo11.yaml")
    first, second = (row for row in config["head"] if row[2] == "nn.Upsample")
    first[2:] = ["CARAFE", [256, 2]]
    second[2:] = ["CARAFE", [512, 2, 3, {"groups": 4}]]
    YAML.save(folder / "yolo11n-carafe.yaml", config)
    yolo = YOLO(folder / "yolo11n-carafe.yaml")
    layers = [yolo.model.model[index] for index in (11, 14)]
    assert [layer.channels for layer in layers] == [256, 128]
    assert (layers[1].kernel_size, layers[1].groups) == (3, 4)
    return yolo, None


def replaced():
    from carafepp.torch import replace_resampling
    from carafepp.torch.ultralytics import trainer_for

    yolo = YOLO("yolo11n.yaml")
    report = replace_resampling(yolo.model, torch.zeros(1, 3, 64, 64))
    assert sum(entry.new is not None for entry in report) == 9
    return yolo, trainer_for(yolo)


def main():
    data = make_pictures()
    if way == "rows":
        yolo, trainer = from_rows()
    elif way == "replaced":
        yolo, trainer = replaced()
    else:
        yolo, trainer = YOLO(way), None
    before = carafes(yolo)
    assert before
    picture = np.zeros((64, 64, 3), np.uint8)
    yolo.predict(picture, verbose=False)
    yolo.model.eval()
    common = dict(data=data, imgsz=64, workers=0, device="cpu", plots=False, verbose=False)
    yolo.train(trainer=trainer, epochs=1, batch=4, amp=False, project=folder / "runs", **common)
    after = YOLO(yolo.trainer.best)
    assert carafes(after) == before
    after.val(**common)
    print(yolo.trainer.best)


main()
