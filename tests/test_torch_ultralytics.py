"""CARAFE++ in Ultralytics' YOLO: rows of a YAML, a trainer that keeps layers, checkpoints."""

import copy
import importlib
import importlib.util
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path

import pytest

from skips import import_or_skip, skip

torch = import_or_skip("torch")
nn = torch.nn

from carafepp.torch import CARAFE, replace_resampling

# Without ultralytics


@pytest.fixture
def door(monkeypatch):
    """Our module beside stand-ins for the modules of ultralytics that it imports."""
    name = "carafepp.torch.ultralytics"
    for package in ("ultralytics", "ultralytics.nn", "ultralytics.nn.tasks"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    sys.modules["ultralytics.nn"].tasks = sys.modules["ultralytics.nn.tasks"]
    sys.modules.pop(name, None)
    door = importlib.import_module(name)
    door.register()
    yield door
    del sys.modules[name]


def parse_model(door, args, ch=(32, 64), f=-1, width=0.25, max_channels=512):
    """Make a layer of a row's arguments; the parameters are local variables of ultralytics' own."""
    return door.tasks.CARAFE(*args)


@pytest.mark.parametrize(
    ("args", "channels", "options"),
    [
        ([], 64, dict(up=2)),
        ([64], 64, dict(up=2)),
        ([256, 2], 64, dict(up=2)),
        ([250, 2], 64, dict(up=2)),  # Conv would round it to 64, too
        ([1024, 2], 128, dict(up=2)),  # beyond max_channels
        ([None, 3, 7], 64, dict(up=3, kernel_size=7)),
        ([64, 1, 5, {"down": 2, "groups": 4}], 64, dict(down=2, groups=4)),
    ],
)
def test_a_row_becomes_a_layer(door, args, channels, options):
    layer = parse_model(door, args, ch=(32, channels))
    assert isinstance(layer, CARAFE)
    assert str(layer) == str(CARAFE(channels, **options))


def test_the_row_may_come_from_another_layer(door):
    assert parse_model(door, [32, 2], f=0).channels == 32


def test_without_a_parser_channels_stay_the_same(door):
    assert door.CARAFE(24, 2).channels == 24
    with pytest.raises(TypeError, match=r"^\[CARAFE\] channels must be .*integer.* got None"):
        door.CARAFE()


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ([100, 2], ValueError, r"must be the 64 of the input, as .* width=0.25 .*; got 100\.$"),
        ([2], ValueError, r"channels must be the 64 of the input, .* got 2\.$"),
        ([5, 2], ValueError, r"channels must be the 64 of the input, .* got 5\.$"),
        (["nearest"], TypeError, r"channels must be .*integer.*'nearest'"),
        ([None, 2, "nearest"], TypeError, r"kernel_size must be .*'nearest'"),
        ([256, 5, 2], ValueError, r"kernel_size must be odd, .* got 2"),
    ],
)
def test_other_arguments_are_refused(door, args, error, message):
    with pytest.raises(error, match=r"^\[CARAFE\] .*" + message):
        parse_model(door, args)


def test_a_loaded_layer_registers_its_class(door):
    pickled = pickle.dumps(parse_model(door, []))
    del door.tasks.CARAFE
    layer = pickle.loads(pickled)
    assert type(layer) is door.tasks.CARAFE


class Network(nn.Module):
    """A stand-in for DetectionModel of ultralytics: it loads the parameters that have its names."""

    def __init__(self, classes):
        super().__init__()
        block = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 1))
        self.model = nn.Sequential(block, nn.Upsample(scale_factor=2), nn.Conv2d(8, classes, 1))

    def load(self, weights):
        old, new = weights.state_dict(), self.state_dict()
        fit = {
            name: old[name] for name in old if name in new and old[name].shape == new[name].shape
        }
        self.load_state_dict(fit, strict=False)


class BaseTrainer:
    def get_model(self, cfg=None, weights=None, verbose=True):
        network = Network(classes=1)
        if weights:
            network.load(weights)
        return network


@pytest.mark.parametrize("has_weights", [False, True])
def test_a_trainer_keeps_layers(door, has_weights):
    network = Network(classes=80)
    replace_resampling(network.model, torch.zeros(1, 3, 16, 16))
    yolo = types.SimpleNamespace(
        model=network, task="detect", task_map={"detect": {"trainer": BaseTrainer}}
    )
    trainer = door.trainer_for(yolo)
    assert issubclass(trainer, BaseTrainer)
    weights = copy.deepcopy(network)
    for parameter in weights.parameters():
        nn.init.ones_(parameter)
    model = trainer().get_model("yolo.yaml", weights if has_weights else None)
    assert str(model.model[:2]) == str(network.model[:2])
    assert model.model[2].out_channels == 1
    expected = (weights if has_weights else network).state_dict()
    for name, value in model.model[1].state_dict().items():
        assert torch.equal(value, expected[f"model.1.{name}"]), name
    assert not {id(p) for p in model.parameters()} & {id(p) for p in network.parameters()}


def test_a_trainer_needs_a_network(door):
    with pytest.raises(TypeError, match=r"^\[trainer_for\] yolo must have a network .*'a.onnx'\.$"):
        door.trainer_for(types.SimpleNamespace(model="a.onnx", task_map={}))
    with pytest.raises(TypeError, match=r"^\[trainer_for\] yolo must be a YOLO; got str\.$"):
        door.trainer_for("yolo11n.pt")


def test_options_are_a_mapping(door):
    with pytest.raises(TypeError, match=r"^\[CARAFE\] options must be a mapping; got 7\.$"):
        door.CARAFE(8, 2, 5, 7)


# With it


def train(folder, way):
    script = Path(__file__).with_name("yolo_training.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", script, folder, way],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.splitlines()[-1]


@pytest.mark.frameworks
@pytest.mark.parametrize("way", ["rows", "replaced"])
def test_yolo_trains_and_its_checkpoint_loads(way, tmp_path):
    for name in ("torchvision", "ultralytics"):
        if importlib.util.find_spec(name) is None:
            skip(name, "not installed")
    checkpoint = train(tmp_path, way)
    if way == "rows":  # another process, which has not imported carafepp, builds it again
        train(tmp_path, checkpoint)
