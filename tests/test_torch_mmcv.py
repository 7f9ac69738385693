"""The drop-in for mmcv.ops: signatures, state_dict keys and outputs of what it replaces."""

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest

import reference as ref
from skips import import_or_skip, skip

torch = import_or_skip("torch")
nn = torch.nn

from carafepp.torch import CARAFE, mmcv

# As mmcv 2.2's documentation has them.
SIGNATURES = {
    "carafe": ("features", "masks", "kernel_size", "group_size", "scale_factor"),
    "carafe_naive": ("features", "masks", "kernel_size", "group_size", "scale_factor"),
    "CARAFE": ("kernel_size", "group_size", "scale_factor"),
    "CARAFENaive": ("kernel_size", "group_size", "scale_factor"),
    "CARAFEPack": (
        *("channels", "scale_factor", "up_kernel=5", "up_group=1"),
        *("encoder_kernel=3", "encoder_dilation=1", "compressed_channels=64"),
    ),
    "normal_init": ("module", "mean=0", "std=1", "bias=0"),
    "xavier_init": ("module", "gain=1", "bias=0", "distribution=normal"),
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    found = []
    for parameter in inspect.signature(getattr(mmcv, name)).parameters.values():
        assert parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        default = "" if parameter.default is parameter.empty else f"={parameter.default}"
        found.append(parameter.name + default)
    assert tuple(found) == SIGNATURES[name]


@pytest.mark.parametrize("scale_factor", [1, 2, 3])
@pytest.mark.parametrize("group_size", [1, 2])
def test_the_operators(scale_factor, group_size):
    features = torch.randint(-4, 5, (2, 4, 5, 6)).double()
    size = (5 * scale_factor, 6 * scale_factor)
    masks = torch.randint(-4, 5, (2, group_size * 9, *size)).double()
    expected = ref.reassemble(features.numpy(), masks.numpy(), up=scale_factor, groups=group_size)
    sizes = (3, group_size, scale_factor)
    for output in (
        mmcv.carafe(features, masks, *sizes),
        mmcv.carafe_naive(features, masks, *sizes),
        mmcv.CARAFE(*sizes)(features, masks),
        mmcv.CARAFENaive(*sizes)(features, masks),
    ):
        np.testing.assert_array_equal(output.numpy(), expected)


def test_the_operators_have_gradients():
    features = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    masks = torch.randn(1, 18, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, m: mmcv.carafe(x, m, 3, 2, 2), (features, masks))


def test_a_wrong_kernel_size():
    with pytest.raises(ValueError, match=r"^\[carafe\] masks must have .* = 1\*5\*\*2 = 25 chann"):
        mmcv.carafe(torch.zeros(1, 2, 3, 3), torch.zeros(1, 9, 6, 6), 5, 1, 2)
    with pytest.raises(ValueError, match=r"^\[carafe\] masks must have the size of features"):
        mmcv.carafe(torch.zeros(1, 2, 3, 3), torch.zeros(1, 9, 5, 6), 3, 1, 2)


def composed(pack, x):
    """Compute mmcv's CARAFEPack by functions of PyTorch."""
    s, k, g = pack.scale_factor, pack.up_kernel, pack.up_group
    logits = nn.functional.pixel_shuffle(pack.content_encoder(pack.channel_compressor(x)), s)
    n, c, h, w = x.shape
    masks = logits.view(n, g, 1, k * k, h * s, w * s).softmax(3)
    windows = nn.functional.unfold(x, k, padding=k // 2).view(n, c * k * k, h, w)
    windows = windows.repeat_interleave(s, 2).repeat_interleave(s, 3)
    windows = windows.view(n, g, c // g, k * k, h * s, w * s)
    return (masks * windows).sum(3).view(n, c, h * s, w * s)


@pytest.mark.parametrize(
    "arguments",
    [(8, 2), (8, 1), (8, 3, 3, 2), (8, 2, 5, 4, 5, 2, 6)],
    ids=str,
)
def test_a_checkpoint_loads_and_gives_the_same(arguments):
    pack = mmcv.CARAFEPack(*arguments).double()
    shapes = {name: tuple(value.shape) for name, value in pack.state_dict().items()}
    channels, scale, kernel, group, encoder, _, compressed = (
        *arguments,
        *(5, 1, 3, 1, 64)[len(arguments) - 2 :],
    )
    logits = kernel**2 * group * scale**2
    assert shapes == {
        "channel_compressor.weight": (compressed, channels, 1, 1),
        "channel_compressor.bias": (compressed,),
        "content_encoder.weight": (logits, compressed, encoder, encoder),
        "content_encoder.bias": (logits,),
    }
    checkpoint = {name: torch.randn(shape).double() * 0.3 for name, shape in shapes.items()}
    pack.load_state_dict(checkpoint, strict=True)
    x = torch.randn(2, channels, 6, 7, dtype=torch.float64)
    torch.testing.assert_close(pack(x), composed(pack, x))
    masks = pack.kernel_normalizer(pack.content_encoder(pack.channel_compressor(x)))
    torch.testing.assert_close(pack.feature_reassemble(x, masks), composed(pack, x))


def test_weights_begin_as_mmcvs():
    pack = mmcv.CARAFEPack(64, 2)
    assert pack.content_encoder.weight.std().item() == pytest.approx(1e-3, rel=0.02)
    limit = (6 / (64 + 64)) ** 0.5
    assert 0.95 * limit < pack.channel_compressor.weight.abs().max() <= limit
    assert not pack.channel_compressor.bias.any()
    assert not pack.content_encoder.bias.any()


def test_a_live_model_is_swapped():
    """Modules that only look like mmcv's: same attributes and parameters, another forward."""

    class CARAFEPack(mmcv.CARAFEPack):
        def forward(self, x):
            raise AssertionError("mmcv needs CUDA")

    CARAFEPack.__module__ = "mmcv.ops.carafe"
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ModuleDict({"up": CARAFEPack(8, 2)}))
    parameters = list(model.parameters())
    assert mmcv.swap_mmcv(model) == ["1.up"]
    assert type(model[1]["up"]) is mmcv.CARAFEPack
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert model[1]["up"](model[0](torch.randn(1, 3, 4, 4))).shape == (1, 8, 8, 8)
    assert mmcv.swap_mmcv(model) == []


def test_layers_are_set_as_freqfusion_sets_them():
    layer = nn.Conv2d(32, 32, 3)
    mmcv.normal_init(layer, std=0.001)
    assert layer.weight.std().item() == pytest.approx(1e-3, rel=0.05)
    assert not layer.bias.any()
    mmcv.xavier_init(layer, gain=2, bias=1, distribution="uniform")
    limit = 2 * (6 / (2 * 9 * 32)) ** 0.5
    assert 0.95 * limit < layer.weight.abs().max() <= limit
    assert (layer.bias == 1).all()
    mmcv.xavier_init(layer)
    assert layer.weight.std().item() == pytest.approx((2 / (2 * 9 * 32)) ** 0.5, rel=0.05)
    mmcv.normal_init(nn.Conv2d(2, 2, 1, bias=False))
    mmcv.xavier_init(nn.BatchNorm2d(2, affine=False))
    with pytest.raises(ValueError, match=r"^\[xavier_init\] distribution must be .*; got 'x'"):
        mmcv.xavier_init(layer, distribution="x")


@pytest.mark.parametrize(
    ("make", "error", "sentence"),
    [
        (lambda: mmcv.CARAFEPack(8, 0), ValueError, "scale_factor must be at least 1; got 0."),
        (
            lambda: mmcv.CARAFEPack(8, 2.0),
            TypeError,
            "scale_factor must be a positive integer; got",
        ),
        (lambda: mmcv.CARAFEPack(0, 2), ValueError, "channels must be at least 1; got 0."),
        (
            lambda: mmcv.CARAFEPack(8, 2, 4),
            ValueError,
            "up_kernel must be odd, from 1 to 31; got 4.",
        ),
        (
            lambda: mmcv.CARAFEPack(8, 2, up_group=3),
            ValueError,
            "channels must be divisible by up_g",
        ),
        (lambda: mmcv.CARAFEPack(8, 2, 5, 1, 4), ValueError, "encoder_kernel must be odd with an"),
        (
            lambda: mmcv.CARAFEPack(8, 2, encoder_dilation="1"),
            TypeError,
            "encoder_dilation must be",
        ),
        (
            lambda: mmcv.CARAFEPack(8, 2, compressed_channels=None),
            TypeError,
            "compressed_channels ",
        ),
        (lambda: mmcv.CARAFE(4, 1, 2), ValueError, "kernel_size must be odd, from 1 to 31; got 4."),
        (
            lambda: mmcv.CARAFE((5, 5), 1, 2),
            TypeError,
            "kernel_size must be an odd integer, from 1",
        ),
        (
            lambda: mmcv.CARAFE(5, 1.0, 2),
            TypeError,
            "group_size must be a positive integer; got 1.0",
        ),
        (lambda: mmcv.CARAFENaive(5, 1, 0), ValueError, "scale_factor must be at least 1; got 0."),
        (lambda: call(5, 1, 0), ValueError, "scale_factor must be at least 1; got 0."),
        (lambda: call(5, 1, 2.0), TypeError, "scale_factor must be a positive integer; got 2.0"),
        (lambda: call(5, True, 2), TypeError, "group_size must be a positive integer; got True"),
        (lambda: call(5, 3, 2), ValueError, "features must be divisible by group_size=3; got 4."),
        (
            lambda: call(5, 1, 4),
            ValueError,
            "masks must have the size of features, (3, 3), times scale_factor=4; got (6, 6). "
            "Did you mean scale_factor=2?",
        ),
        (
            lambda: mmcv.CARAFE(5, 1, 3)(torch.zeros(1, 4, 3, 2), torch.zeros(1, 25, 6, 6)),
            ValueError,
            "masks must have the size of features, (3, 2), times scale_factor=3; got (6, 6).",
        ),
    ],
    ids=range(18),
)
def test_wrong_numbers(make, error, sentence):
    with pytest.raises(error, match=r"^\[(carafe|CARAFE\w*)\] ") as caught:
        make()
    assert sentence in str(caught.value)


def call(*sizes):
    return mmcv.carafe(torch.zeros(1, 4, 3, 3), torch.zeros(1, 25, 6, 6), *sizes)


def test_an_even_encoder_kernel_with_an_even_dilation_keeps_sizes():
    assert mmcv.CARAFEPack(8, 2, 5, 1, 2, 2)(torch.zeros(1, 8, 4, 5)).shape == (1, 8, 8, 10)


def test_fx_traces_through():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.pack, self.upsample = mmcv.CARAFEPack(4, 2), mmcv.CARAFE(3, 1, 2)

        def forward(self, x, masks):
            return self.pack(self.upsample(x, masks)) + mmcv.carafe(x, masks, 3, 1, 2).mean()

    network = Network()
    x, masks = torch.randn(1, 4, 3, 4), torch.rand(1, 9, 6, 8)
    graph = torch.fx.symbolic_trace(network)
    torch.testing.assert_close(graph(x, masks), network(x, masks))


# swap_mmcv


def foreign(package, name="CARAFEPack", bases=(nn.Module,), **methods):
    """Return a class of another package that fails where it is called."""

    def forward(self, *_):
        raise AssertionError("needs CUDA")

    return type(name, bases, {"__module__": package, "forward": forward, **methods})


def with_attributes(cls, like):
    """Return a module of a class with the attributes and layers of another module."""
    module = cls()
    module.__dict__.update(vars(like))
    return module


@pytest.mark.parametrize(
    "package", ["mmcv.ops.carafe", "mmdet.ops.carafe.carafe", "carafe.carafe", "mine.vendored"]
)
def test_copies_of_other_packages_are_swapped(package):
    model = nn.Sequential(
        with_attributes(foreign(package), mmcv.CARAFEPack(4, 2)),
        with_attributes(foreign(package, "CARAFE"), mmcv.CARAFE(3, 1, 2)),
        with_attributes(foreign(package, "CARAFENaive"), mmcv.CARAFENaive(3, 1, 2)),
        with_attributes(foreign(package, "Renamed"), mmcv.CARAFEPack(4, 2)),
        with_attributes(foreign(package, "CARAFE"), mmcv.CARAFEPack(4, 2)),
    )
    assert mmcv.swap_mmcv(model) == ["0", "1", "2", "3", "4"]
    pack = mmcv.CARAFEPack
    expected = [pack, mmcv.CARAFE, mmcv.CARAFENaive, pack, pack]
    assert [type(module) for module in model] == expected
    assert model[0](torch.zeros(1, 4, 3, 3)).shape == (1, 4, 6, 6)


def test_subclasses_are_swapped_unless_they_override():
    base = foreign("mmcv.ops.carafe")
    plain = type("Plain", (base,), {"__init__": lambda self: base.__init__(self), "extra": 1})
    gated = type("Gated", (base,), {"forward": lambda self, x: x})
    model = nn.ModuleDict(
        {"plain": with_attributes(plain, mmcv.CARAFEPack(4, 2))}
        | {"gated": with_attributes(gated, mmcv.CARAFEPack(4, 2))}
    )
    with pytest.warns(
        UserWarning, match=r"\[swap_mmcv\] gated \(Gated\) stays: Gated overrides for"
    ):
        assert mmcv.swap_mmcv(model) == ["plain"]
    assert type(model["plain"]) is mmcv.CARAFEPack
    assert type(model["gated"]) is gated


def test_other_modules_of_the_same_name_stay():
    more = with_attributes(foreign("mine"), mmcv.CARAFEPack(4, 2))
    more.gate = nn.Conv2d(4, 1, 1)
    patched = with_attributes(foreign("mine"), mmcv.CARAFEPack(4, 2))
    patched.forward = lambda x: x
    other = foreign("mine", "CARAFE")()
    down = with_attributes(foreign("mine"), mmcv.CARAFEPack(4, 2))
    down.content_encoder.stride = (2, 2)
    with pytest.warns(UserWarning, match="swap_mmcv") as caught:
        assert mmcv.swap_mmcv(nn.Sequential(more, patched, other, down)) == []
    (warning,) = caught
    for sentence in (
        "0 (CARAFEPack) stays: its parameters are channel_compressor.bias, ",
        "1 (CARAFEPack) stays: it has a forward of its own.",
        "2 (CARAFE) stays: it has no kernel_size, group_size, scale_factor.",
        "3 (CARAFEPack) stays: its content_encoder has not 100 channels and a stride of 1.",
    ):
        assert sentence in str(warning.message)


def test_our_own_modules_are_no_business_of_it():
    class CARAFEPack(mmcv.CARAFEPack):
        pass

    assert mmcv.swap_mmcv(nn.Sequential(CARAFEPack(4, 2), CARAFE(4, up=2))) == []


# carafepp.torch.mmcv.install


NAMES = ("CARAFE", "CARAFENaive", "CARAFEPack", "carafe", "carafe_naive")


@pytest.fixture
def packages(monkeypatch):
    """Modules with the names and entries that mmcv, mmengine and a user of them have."""
    modules = {
        name: types.ModuleType(name)
        for name in ("mmcv", "mmcv.cnn", "mmcv.ops", "mmcv.ops.carafe", "user", "mmengine")
    }
    modules["mmengine.registry"] = types.ModuleType("mmengine.registry")
    for name in NAMES:
        theirs = type(name, (), {})
        for module in ("mmcv.ops.carafe", "mmcv.ops", "user"):
            setattr(modules[module], name, theirs)
    modules["user"].other = other = object()

    class Registry(dict):
        def register_module(self, name, module, force):
            assert force
            self[name] = module

    modules["mmengine.registry"].MODELS = Registry()
    modules["mmcv.cnn"].UPSAMPLE_LAYERS = Registry()
    for name, module in modules.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "carafepp.torch.mmcv.install", raising=False)
    yield modules
    sys.modules.pop("carafepp.torch.mmcv.install", None)
    assert modules["user"].other is other


def test_an_import_installs_it(packages):
    install = importlib.import_module("carafepp.torch.mmcv.install")
    for _ in range(2):
        for name in NAMES:
            for module in ("mmcv.ops.carafe", "mmcv.ops", "user"):
                assert getattr(packages[module], name) is getattr(mmcv, name)
        assert dict(packages["mmengine.registry"].MODELS) == {"carafe": mmcv.CARAFEPack}
        importlib.reload(install)


def test_it_installs_beside_mmcv_lite_and_mmcv_1(packages, monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv.ops", None)  # its import raises ImportError
    monkeypatch.setitem(sys.modules, "mmengine.registry", None)
    importlib.import_module("carafepp.torch.mmcv.install")
    assert dict(packages["mmcv.cnn"].UPSAMPLE_LAYERS) == {"carafe": mmcv.CARAFEPack}


@pytest.mark.frameworks
def test_mmdetections_own_config_gives_the_same_loss_both_ways():
    for name in ("mmdet", "mmcv", "torchvision"):
        if importlib.util.find_spec(name) is None:
            skip("mmdet", f"{name} is not installed")
    script = Path(__file__).with_name("mmdet_loss.py")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    losses = set()
    for way in ("install", "swap"):
        command = [sys.executable, "-W", "ignore", script, way]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        losses.add(run.stdout.splitlines()[-1])
    assert len(losses) == 1
    assert losses.pop().startswith("loss ")
