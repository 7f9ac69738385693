"""CARAFE++ in the place of the resampling layers of networks."""

import copy
import importlib.util
import itertools
import os
import subprocess
import sys

import pytest

from skips import import_or_skip, skip

torch = import_or_skip("torch")
nn = torch.nn

from torch.nn.utils import spectral_norm
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import weight_norm

from carafepp.torch import CARAFE, replace_resampling
from torchvision_import import import_torchvision

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


def shapes(network, sizes=((32, 32), (33, 35), (38, 47))):
    return [network(torch.zeros(1, 4, *size)).shape for size in sizes]


LAYERS = [
    (nn.Upsample(scale_factor=2), (2, 1)),
    (nn.Upsample(scale_factor=1.5, mode="bilinear"), (3, 2)),
    (nn.Upsample(scale_factor=0.5), (1, 2)),
    (nn.UpsamplingNearest2d(scale_factor=3), (3, 1)),
    (nn.Upsample(scale_factor=1 / 3), (1, 3)),
    (nn.Upsample(scale_factor=1.25, recompute_scale_factor=True), (5, 4)),
    (nn.MaxPool2d(2), (1, 2)),
    (nn.MaxPool2d(3, 2, 1), (1, 2)),
    (nn.MaxPool2d(2, ceil_mode=True), (1, 2)),
    (nn.MaxPool2d((3, 3), stride=(3, 3)), (1, 3)),
    (nn.AvgPool2d(2), (1, 2)),
    (nn.AvgPool2d(3, 2, 1), (1, 2)),
    (nn.Conv2d(4, 6, 3, 2, 1), (1, 2)),
    (nn.Conv2d(4, 6, 1, 2, bias=False), (1, 2)),
    (nn.Conv2d(4, 6, 2, 2), (1, 2)),
    (nn.Conv2d(4, 6, 7, 4, 3, groups=2), (1, 4)),
    (nn.Conv2d(4, 6, 3, 2, 2, dilation=2, padding_mode="reflect"), (1, 2)),
    (nn.ConvTranspose2d(4, 4, 2, 2), (2, 1)),
    (nn.ConvTranspose2d(4, 6, 4, 2, 1), (2, 1)),
    (nn.ConvTranspose2d(4, 4, 3, 2, 1, output_padding=1), (2, 1)),
]


@pytest.mark.parametrize(("layer", "factor"), LAYERS, ids=lambda value: str(value).split("\n")[0])
def test_sizes_stay_the_same(layer, factor):
    network = nn.Sequential(layer)
    before = shapes(network)
    (report,) = replace_resampling(network, torch.zeros(1, 4, 32, 32), kernel_size=3)
    assert shapes(network) == before
    assert report.name == "0"
    assert report.old is layer
    assert report.new is network[0]
    carafe = report.new if isinstance(report.new, CARAFE) else report.new[0]
    assert (carafe.up, carafe.down, carafe.kernel_size) == (*factor, 3)
    assert "-> " in str(report)


STAY = [
    (nn.Upsample(size=(9, 9)), "one size for every input"),
    (nn.Upsample(scale_factor=(2, 3)), "differ for rows and columns"),
    (nn.MaxPool2d(2, return_indices=True), "returns indices"),
    (nn.MaxPool2d((1, 2)), "differ for rows and columns"),
    (nn.MaxPool2d(3, 2), "rounded up or down"),
    (nn.Conv2d(4, 4, 3, 2), "rounded up or down"),
    (nn.Conv2d(4, 4, 3, (2, 1), 1), "differ for rows and columns"),
    (nn.ConvTranspose2d(4, 4, 3, 2), "rounded up or down"),
    (type("Gated", (nn.Conv2d,), {})(4, 4, 3, 2, 1), "what Gated adds"),
    (nn.Upsample(scale_factor=1.37), "rounded up or down"),
    (nn.Upsample(scale_factor=(2.0, 1.37)), "rounded up or down"),
    (spectral_norm(nn.Conv2d(4, 8, 4, 2, 1)), "weight is computed"),
    (weight_norm(nn.ConvTranspose2d(4, 4, 2, 2)), "what ParametrizedConvTranspose2d adds"),
    *[
        (type("Mine", (cls,), {"forward": lambda self, x: x[..., ::2, ::2]})(2), "what Mine adds")
        for cls in (nn.MaxPool2d, nn.AvgPool2d, nn.Upsample)
    ],
]


def with_forward(layer):
    """Return a layer whose forward a framework has put its own in the place of."""
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


def with_child(layer):
    layer.observer = nn.Identity()
    return layer


STAY += [
    (with_forward(nn.MaxPool2d(2)), "a forward of its own"),
    (with_forward(nn.Conv2d(4, 4, 3, 2, 1)), "a forward of its own"),
    (with_child(nn.Conv2d(4, 4, 3, 2, 1)), "what it contains, observer (Identity), would be lost"),
]


@pytest.mark.parametrize(("layer", "reason"), STAY, ids=lambda value: str(value).split("\n")[0])
def test_layers_that_cannot_be_replaced_stay(layer, reason):
    network = nn.Sequential(layer)
    (report,) = replace_resampling(network, torch.zeros(1, 4, 32, 32))
    assert network[0] is layer
    assert report.new is None
    assert reason in report.reason
    assert str(report) == f"0: {layer} stays: {report.reason}"


def test_layers_that_do_not_resample_are_not_reported():
    network = nn.Sequential(nn.Conv2d(4, 4, 3), nn.MaxPool2d(3, 1, 1), nn.ConvTranspose2d(4, 4, 3))
    assert replace_resampling(network, torch.zeros(1, 4, 8, 8)) == []


def test_without_an_example():
    """Convolutions know their channels; pooling layers do not."""
    network = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.MaxPool2d(2))
    first, second = replace_resampling(network)
    assert first.new is not None
    assert second.reason == "its channels are unknown without an example"


def test_layers_that_serve_several_places():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool = nn.MaxPool2d(2)
            self.same = nn.ModuleList([self.pool])
            self.unused = nn.MaxPool2d(2)
            self.up = nn.Upsample(scale_factor=2)

        def forward(self, x):
            x = self.same[0](self.pool(x))
            return self.up(torch.cat((self.up(x), self.up(x)), 1))

    network = Network()
    report = {entry.name: entry for entry in replace_resampling(network, torch.zeros(1, 4, 16, 16))}
    assert set(report) == {"pool", "same.0", "unused", "up"}
    assert isinstance(network.pool, CARAFE)
    assert network.same[0] is network.pool
    assert report["unused"].reason == "the example does not reach it"
    assert report["up"].reason == "it serves several numbers of channels, [4, 8]"


def test_a_convolution_keeps_its_weights():
    convolution = nn.Conv2d(4, 6, 3, 2, 1, groups=2)
    network = nn.Sequential(convolution)
    replace_resampling(network, torch.zeros(1, 4, 8, 8))
    carafe, kept = network[0]
    assert kept.weight is convolution.weight
    assert kept.bias is convolution.bias
    assert kept.stride == (1, 1)
    x = torch.randn(1, 4, 9, 9)
    expected = nn.functional.conv2d(carafe(x), kept.weight, kept.bias, padding=1, groups=2)
    torch.testing.assert_close(network(x), expected)


def test_options_mode_and_dtype_are_followed():
    network = nn.Sequential(nn.BatchNorm2d(4), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, 2, 1)).double()
    network[1].eval()
    replace_resampling(
        network,
        torch.randn(1, 4, 16, 16).double(),
        batch_norm=True,
        compressed_channels=3,
        padding_mode="circular",
    )
    assert all(parameter.dtype == torch.float64 for parameter in network.parameters())
    assert not network[1].training
    assert network[2].training
    assert network[1].compressed_channels == 3
    assert network[1].padding_mode == network[2][0].padding_mode == "circular"
    assert network[2][0].batch_norm
    assert network[0].num_batches_tracked == 0  # the example leaves no trace
    assert network.training
    assert network[0].training


def test_select():
    def network():
        return nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.MaxPool2d(2), nn.Upsample(scale_factor=2))

    example = torch.zeros(1, 4, 16, 16)
    named = replace_resampling(network(), example, select=["1"])
    assert [entry.name for entry in named] == ["1"]
    by_type = replace_resampling(
        network(), example, select=lambda name, layer: not isinstance(layer, nn.Conv2d)
    )
    assert [entry.name for entry in by_type] == ["1", "2"]
    with pytest.raises(ValueError, match=r"^\[replace_resampling\] select must name .* got 'pool'"):
        replace_resampling(network(), example, select=["pool"])
    by_names = replace_resampling(network(), example, select=(str(i) for i in (1, 2)))
    assert [entry.name for entry in by_names] == ["1", "2"]
    with pytest.raises(
        TypeError, match=r"select must be a function, a name or names; got 1 \(int\)"
    ):
        replace_resampling(network(), example, select=1)


def test_a_word_selects_the_layer_of_that_name():
    network = nn.Sequential(*(nn.Conv2d(4, 4, 1, 2) for _ in range(11)))
    (report,) = replace_resampling(network, select="10")
    assert report.name == "10"
    assert all(type(layer) is nn.Conv2d for layer in network[:10])


def test_a_normalisation_folds_into_the_replacement_of_a_convolution():
    network = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6)).double()
    network[1].running_var[:] = torch.arange(1, 7)
    replace_resampling(network)
    network.eval()
    x = torch.randn(1, 4, 9, 8, dtype=torch.double)
    expected = network(x)
    folded = fuse_conv_bn_eval(network[0], network[1])
    torch.testing.assert_close(folded(x), expected)
    assert [name for name, _ in folded.named_parameters()][-2:] == ["1.weight", "1.bias"]
    assert folded.out_channels == 6


def test_a_layer_itself_is_refused():
    with pytest.raises(ValueError, match=r"^\[replace_resampling\] model must be a network"):
        replace_resampling(nn.MaxPool2d(2))


# All or nothing, and nothing is lost


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        ([nn.Conv2d(3, 8, 3, 2, 1), nn.MaxPool2d(2)], dict(groups=3)),  # of 3 and of 8 channels
        ([nn.MaxPool2d(2)], dict(kernel_size=4)),
        ([nn.MaxPool2d(2)], dict(unknown=1)),
        ([nn.MaxPool2d(2)], dict(down=3)),
        ([nn.MaxPool2d(2)], dict(padding=2)),
        ([nn.MaxPool2d(2), nn.Linear(1, 1)], {}),  # here the example fails
    ],
    ids=["groups", "kernel_size", "unknown", "down", "padding", "example"],
)
def test_an_error_leaves_the_network_as_it_was(layers, options):
    network = nn.Sequential(*layers)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        replace_resampling(network, torch.zeros(1, 3, 32, 32), **options)
    assert list(network) == layers
    assert not any(layer._forward_pre_hooks for layer in layers)
    assert network.training


def test_a_normalised_convolution_is_no_error():
    convolution = spectral_norm(nn.Conv2d(3, 8, 4, 2, 1))
    network = nn.Sequential(nn.MaxPool2d(2), convolution)
    first, second = replace_resampling(network, torch.zeros(1, 3, 16, 16))
    assert isinstance(network[0], CARAFE)
    assert network[1] is convolution
    assert (first.reason, second.new) == ("", None)


@pytest.mark.parametrize("channels", [4, 6])
def test_a_transposed_convolution_keeps_its_output_size(channels):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(4, channels, 4, 2, 1)

        def forward(self, x, size):
            return self.up(self.up(x)[:, :4], output_size=size) if size else self.up(input=x)

    network, x = Network(), torch.randn(1, 4, 5, 6)
    sizes = (None, (20, 24), (21, 25), torch.Size((1, channels, 21, 24)))
    before = [network(x, size).shape for size in sizes]
    (report,) = replace_resampling(network)
    assert report.new is network.up
    assert [network(x, size).shape for size in sizes] == before


class Caller(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(self.layer, x)


CALLS = [
    (lambda layer, x: layer(input=x), torch.float32, "it is called with input="),
    (lambda layer, x: layer(x), torch.uint8, "its input is of torch.uint8"),
    (lambda layer, x: layer(x[0]), torch.float32, "its input has 3 axes, not (N, C, H, W)"),
]


@pytest.mark.parametrize(("call", "dtype", "reason"), CALLS, ids=["named", "uint8", "axes"])
def test_calls_that_carafe_does_not_take_stay(call, dtype, reason):
    network = Caller(nn.Upsample(scale_factor=2), call)
    (report,) = replace_resampling(network, torch.ones(1, 4, 8, 8).to(dtype))
    assert report.reason == reason
    assert type(network.layer) is nn.Upsample


@pytest.mark.parametrize("inside", [True, False])
def test_parameters_under_autocast_have_the_dtype_of_the_network(inside):
    class Network(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=inside):
                return super().forward(x)

    network = Network(nn.Conv2d(3, 4, 1), nn.MaxPool2d(2), nn.ConvTranspose2d(4, 4, 2, 2))
    with torch.autocast("cpu", torch.bfloat16):
        replace_resampling(network, torch.zeros(1, 3, 8, 8))
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert network(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 8, 8)


@pytest.mark.parametrize("layer", [layer for layer, _ in LAYERS[::3]], ids=lambda layer: str(layer))
def test_attributes_hooks_and_buffers_move_to_the_new_layer(layer):
    """The old layer has attributes as ultralytics adds them, a hook with its handle, a buffer."""
    network, seen = nn.Sequential(copy.deepcopy(layer)), []
    old = network[0]
    old.f, old.i, old.type, old.np = -1, 7, "torch.nn.Layer", 0
    old.register_buffer("mark", torch.ones(2), persistent=False)
    handle = old.register_forward_hook(lambda module, args, output: seen.append(module))
    old.register_forward_pre_hook(lambda module, args, kwargs: None, with_kwargs=True)
    (report,) = replace_resampling(network, torch.zeros(1, 4, 32, 32))
    new = network[0]
    seen.clear()
    network(torch.zeros(1, 4, 32, 32))
    assert seen == [new]
    handle.remove()
    network(torch.zeros(1, 4, 32, 32))
    assert seen == [new]
    assert (new.f, new.i, new.type, new.np) == (-1, 7, "torch.nn.Layer", 0)
    assert new.mark is old.mark
    assert "0.mark" not in network.state_dict()
    assert report.new is new


# Functions


class Decoder(nn.Module):
    """The blocks of segmentation_models_pytorch's Unet and the loop of torchvision's FPN."""

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        y = self.pool(x)
        y = nn.functional.interpolate(y, size=x.shape[-2:], mode="nearest")
        for _ in range(2):
            x = nn.functional.interpolate(x, scale_factor=2.0)
        x = nn.functional.avg_pool2d(nn.functional.max_pool2d(x, 2), 3, 1, 1)
        return nn.functional.interpolate(x, x.shape[-2:]).mean() + y


def test_calls_of_functions_are_told():
    network = nn.Sequential(nn.Upsample(scale_factor=2), nn.Sequential(Decoder()))
    upsample, pool, *calls = replace_resampling(network, torch.zeros(1, 4, 9, 8))
    assert upsample.new is network[0]
    assert pool.new is network[1][0].pool
    assert {call.name for call in calls} == {"1.0"}
    assert {call.old for call in calls} == {network[1][0]}
    assert all(call.new is None for call in calls)
    assert str(calls[0]).startswith("1.0: Decoder stays: it calls F.interpolate (test_torch_repl")
    assert [call.reason[call.reason.index("here ") :] for call in calls] == [
        "here from (9, 8) to (18, 16); write CARAFE(4, up=2), and call it with size=(H', W')",
        "here from (18, 16) to (36, 32); write CARAFE(4, up=2), and call it with size=(H', W')",
        "here from (36, 32) to (72, 64); write CARAFE(4, up=2), and call it with size=(H', W')",
        "here from (72, 64) to (36, 32); write CARAFE(4, down=2)",
    ]
    named = replace_resampling(nn.Sequential(Decoder()), torch.zeros(1, 4, 8, 8), select="0.pool")
    assert [entry.name for entry in named] == ["0.pool"]


class Bottleneck(nn.Module):
    """The building block of a ResNet, with the names of torchvision's."""

    def __init__(self, channels, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.downsample = nn.Sequential(
            nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
        )

    def forward(self, x):
        main = self.conv3(torch.relu(self.conv2(torch.relu(self.conv1(x)))))
        return torch.relu(main + self.downsample(x))


class ResNet(nn.Sequential):
    """The downsampling places of a ResNet: two in the stem, three among four layers."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 8
        for number, stride in zip(itertools.count(1), (1, 2, 2, 2)):
            setattr(self, f"layer{number}", Bottleneck(channels, 4 * number, stride))
            channels = 16 * number


def check_resnet(network):
    """Figure 4 and section 4.1: seven CARAFE++, one in Res-1, two in each of Res-3 to Res-5."""
    x = torch.randn(2, 3, 97, 130)
    before = network(x).shape
    report = replace_resampling(
        network, x, select=lambda name, layer: name != "conv1", batch_norm=True
    )
    assert [entry.name for entry in report if entry.new] == [
        "maxpool",
        *(
            f"layer{layer}.0{place}" if hasattr(network.layer1, "0") else f"layer{layer}{place}"
            for layer in (2, 3, 4)
            for place in (".conv2", ".downsample.0")
        ),
    ]
    assert sum(isinstance(module, CARAFE) for module in network.modules()) == 7
    output = network(x)
    assert output.shape == before
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_a_resnet_gets_the_seven_of_the_paper():
    check_resnet(ResNet())


TORCHVISION = """
import torch
from torchvision_import import import_torchvision
import_torchvision()
from carafepp.torch import CARAFE, replace_resampling
from torchvision.models import resnet50
"""


@pytest.mark.frameworks
@pytest.mark.parametrize(
    "script",
    [
        """
from test_torch_replacement import check_resnet
check_resnet(resnet50())
""",
        """
from torchvision.models.feature_extraction import create_feature_extractor
network = resnet50().eval()
replace_resampling(network, torch.zeros(1, 3, 64, 64))
extract = create_feature_extractor(network, {"maxpool": "carafe", "layer4": "last"})
for size in (64, 97):
    x = torch.randn(1, 3, size, size)
    features = extract(x)
    stem = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    torch.testing.assert_close(features["carafe"], stem)
    assert torch.equal(network.fc(network.avgpool(features["last"]).flatten(1)), network(x))
""",
        """
from torchvision.ops import FeaturePyramidNetwork
pyramid = torch.nn.Sequential(FeaturePyramidNetwork([8, 16], 32))
levels = {"a": torch.zeros(1, 8, 27, 27), "b": torch.zeros(1, 16, 13, 13)}
(call,) = replace_resampling(pyramid, levels)
assert (call.name, call.new) == ("0", None)
assert "F.interpolate (feature_pyramid_network.py:" in call.reason
assert "write CARAFE(32, up=2), and call it with size=(H', W')" in call.reason
""",
    ],
    ids=["resnet50", "create_feature_extractor", "FPN"],
)
def test_torchvision(script):
    if importlib.util.find_spec("torchvision") is None:
        skip("torchvision", "not installed")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    subprocess.run([sys.executable, "-c", TORCHVISION + script], env=environment, check=True)


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # in its imports
def test_torchvisions_mask_r_cnn_too():
    try:
        import_torchvision()
    except ImportError as error:
        skip("torchvision", str(error))
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    network = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=64, rpn_post_nms_top_n_test=20
    )
    report = replace_resampling(
        network.roi_heads.mask_predictor, torch.zeros(1, 256, 14, 14), select=["conv5_mask"]
    )
    assert report[0].new.up == 2
    network.eval()
    assert len(network([torch.zeros(3, 64, 64)])) == 1
