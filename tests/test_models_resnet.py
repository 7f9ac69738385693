"""ResNet: torchvision's layout, the places of the seven downsamplers, deformable layers, errors."""

import doctest
import sys
import types

import pytest

from skips import import_or_skip, skip

torch = import_or_skip("torch")
nn, F = torch.nn, torch.nn.functional

from carafepp.torch import CARAFE
from carafepp.torch.models import DOWNSAMPLERS, ResNet, resnet, resnet50, resnet101
from carafepp.torch.models.resnet import DeformConv
from torchvision_import import import_torchvision


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def small(**options):
    return ResNet((1, 1, 1, 1), width=8, num_classes=3, **options)


def meta(make, **options):
    with torch.device("meta"):
        return make(**options)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# The layout of torchvision's ResNet, written down by hand: names and shapes of all parameters


def norm(name, channels):
    shapes = {f"{name}.{key}": (channels,) for key in ("weight", "bias", "running_mean")}
    return {**shapes, f"{name}.running_var": (channels,), f"{name}.num_batches_tracked": ()}


def torchvision_layout(layers):
    shapes = {"conv1.weight": (64, 3, 7, 7), **norm("bn1", 64)}
    channels = 64
    for stage, blocks in enumerate(layers, 1):
        width = 64 * 2 ** (stage - 1)
        for block in range(blocks):
            name = f"layer{stage}.{block}"
            for i, shape in enumerate(
                [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)], 1
            ):
                shapes[f"{name}.conv{i}.weight"] = shape
                shapes |= norm(f"{name}.bn{i}", shape[0])
            if block == 0:
                shapes[f"{name}.downsample.0.weight"] = (4 * width, channels, 1, 1)
                shapes |= norm(f"{name}.downsample.1", 4 * width)
            channels = 4 * width
    return {**shapes, "fc.weight": (1000, 2048), "fc.bias": (1000,)}


NETWORKS = [(resnet50, (3, 4, 6, 3), 25_557_032), (resnet101, (3, 4, 23, 3), 44_549_160)]
networks = pytest.mark.parametrize(("make", "layers", "parameters"), NETWORKS)


@networks
def test_the_plain_network_has_the_layout_of_torchvision(make, layers, parameters):
    network = meta(make)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes == torchvision_layout(layers)
    assert count(network) == parameters


@pytest.mark.frameworks
def test_weights_of_torchvision_load_and_give_the_same():
    try:
        torchvision = import_torchvision()
    except ImportError as error:
        skip("torchvision", str(error))
    theirs, ours = torchvision.models.resnet50().eval(), resnet50().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(1, 3, 65, 70)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_weights_load_beside_downsamplers_too():
    weights = meta(resnet50).state_dict()
    with_carafe = meta(resnet50, downsampler="carafe")
    missing, unexpected = with_carafe.load_state_dict(weights, strict=False, assign=True)
    assert unexpected == []
    carafes = [name for name, m in with_carafe.named_modules() if isinstance(m, CARAFE)]
    assert all(any(name.startswith(carafe) for carafe in carafes) for name in missing)


# Places of downsamplers


def down(width):
    """The seven places and their channels."""
    return {
        "maxpool": width,
        "layer2.0.down": 2 * width,
        "layer2.0.shortcut_down": 4 * width,
        "layer3.0.down": 4 * width,
        "layer3.0.shortcut_down": 8 * width,
        "layer4.0.down": 8 * width,
        "layer4.0.shortcut_down": 16 * width,
    }


def strides(network):
    return {
        name: layer.stride
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1) and "content_encoder" not in name
    }


@networks
def test_seven_carafes_replace_all_strides_but_the_first(make, layers, parameters):
    network = meta(make, downsampler="carafe")
    carafes = {name: m for name, m in network.named_modules() if isinstance(m, CARAFE)}
    assert {name: carafe.channels for name, carafe in carafes.items()} == down(64)
    for carafe in carafes.values():
        assert (carafe.up, carafe.down, carafe.kernel_size) == (1, 2, 5)
        assert (carafe.encoder_kernel_size, carafe.compressed_channels) == (3, 16)
        assert isinstance(carafe.channel_compressor[1], nn.BatchNorm2d)
        assert isinstance(carafe.channel_compressor[2], nn.ReLU)
    assert strides(network) == {"conv1": (2, 2)}
    assert network.layer2[0].conv2.kernel_size == (3, 3)
    assert network.layer2[0].downsample[0].kernel_size == (1, 1)
    added = sum(16 * c + 2 * 16 + (9 * 16 * 25 + 25) for c in down(64).values())
    assert count(network) == parameters + added


def test_carafe_is_before_the_convolutions():
    """On the main path before the 3x3, on the shortcut before the 1x1, as in Figure 4."""
    network = small(downsampler="carafe")
    inputs = {}
    for name, layer in network.named_modules():
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, tuple(args[0].shape[1:]))
        )
    network(torch.randn(2, 3, 64, 64))
    block = "layer2.0."
    assert inputs[block + "conv1"] == (32, 16, 16)
    assert inputs[block + "down"] == (16, 16, 16)
    assert inputs[block + "conv2"] == (16, 8, 8)
    assert inputs[block + "shortcut_down"] == (32, 16, 16)
    assert inputs[block + "downsample.0"] == (32, 8, 8)


def test_options_go_to_the_downsampler():
    network = small(downsampler="carafe", batch_norm=False, kernel_size=3)
    assert isinstance(network.maxpool.channel_compressor, nn.Conv2d)
    assert network.maxpool.kernel_size == 3


@pytest.mark.parametrize("name", DOWNSAMPLERS)
def test_every_downsampler_sits_there_and_keeps_sizes(name):
    network = small(downsampler=name)
    kinds = {place: type(network.get_submodule(place)) for place in down(8)}
    if name == "strided_conv":  # the baseline
        assert set(kinds.values()) == {nn.MaxPool2d, nn.Identity}
        assert len(strides(network)) == 7
    else:
        assert set(kinds.values()) == {DOWNSAMPLERS[name]}
        assert strides(network) == {"conv1": (2, 2)}
    for size in [(64, 96), (67, 81)]:
        x = torch.randn(2, 3, *size)
        shapes = [level.shape for level in network.features(x)]
        assert shapes == [level.shape for level in small().features(x)]
        sizes = [(-(-size[0] // s), -(-size[1] // s)) for s in (4, 8, 16, 32)]
        assert shapes == [(2, c, *hw) for c, hw in zip((32, 64, 128, 256), sizes, strict=True)]


# As a network


@pytest.mark.parametrize("name", DOWNSAMPLERS)
def test_it_learns_and_gradients_reach_every_parameter(name):
    network = small(downsampler=name)
    x, kind = torch.randn(6, 3, 64, 64), torch.tensor([0, 1, 2] * 2)
    x += kind.view(6, 1, 1, 1)
    optimizer = torch.optim.SGD(network.parameters(), 0.02, momentum=0.9)
    losses = []
    for _ in range(5):
        loss = F.cross_entropy(network(x), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    for parameter_name, parameter in network.named_parameters():
        assert parameter.grad.count_nonzero() > 0, parameter_name


def test_channels_last_gives_the_same():
    network = small(downsampler="carafe").eval()
    x = torch.randn(2, 3, 65, 64)
    expected = network.features(x)
    network.to(memory_format=torch.channels_last)
    levels = network.features(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(levels, expected, rtol=1e-3, atol=1e-4)
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in levels)


def test_without_a_classifier():
    network = ResNet((1, 1, 1, 1), width=8, num_classes=None)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(network(x), network.features(x)[-1].mean((2, 3)))
    assert not [name for name in network.state_dict() if name.startswith("fc")]


# Deformable layers


def deform_conv2d(x, offset, weight, *, stride, padding, mask):
    """Compute torchvision's operator, for one group, by grid_sample."""
    height, width = x.shape[2:]
    k, h, w = weight.shape[-1], offset.shape[-2], offset.shape[-1]
    rows = torch.arange(h).view(h, 1) * stride[0] - padding[0]
    columns = torch.arange(w).view(1, w) * stride[1] - padding[1]
    samples = []
    for tap in range(k * k):
        y = rows + tap // k + offset[:, 2 * tap]
        z = columns + tap % k + offset[:, 2 * tap + 1]
        grid = torch.stack([(2 * z + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
        samples.append(F.grid_sample(x, grid, align_corners=False) * mask[:, tap : tap + 1])
    return torch.einsum("tnchw,oct->nohw", torch.stack(samples), weight.flatten(2))


@pytest.fixture
def torchvision(monkeypatch):
    """Its operator, or one that computes the same where that does not load."""
    try:
        import_torchvision()
        torch.ops.torchvision.deform_conv2d  # noqa: B018
    except (ImportError, AttributeError):
        ops = types.ModuleType("torchvision.ops")
        ops.deform_conv2d = deform_conv2d
        monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.ops", ops)


def test_a_deformable_layer_samples_where_offsets_point(torchvision):
    layer, x = DeformConv(2, 3, 3, stride=2), torch.randn(1, 2, 9, 11)
    plain = F.conv2d(x, layer.weight, stride=2, padding=1)
    torch.testing.assert_close(layer(x), plain / 2, rtol=1e-4, atol=1e-5)
    with torch.no_grad():  # every tap two rows down and a column to the left, mask nearly 1
        layer.conv_offset.bias[:18] = torch.tensor([2.0, -1.0]).repeat(9)
        layer.conv_offset.bias[18:] = 20
    moved = F.pad(x, (1, -1, -2, 2))
    expected = F.conv2d(moved, layer.weight, stride=2, padding=1)
    inside = (..., slice(1, -1), slice(1, -1))
    torch.testing.assert_close(layer(x)[inside], expected[inside], rtol=1e-4, atol=1e-5)


def test_deformable_layers_sit_in_their_stages_and_carafe_replaces_their_strides(torchvision):
    def places(network):
        return [name for name, m in network.named_modules() if isinstance(m, DeformConv)]

    layers = {"layers": (2, 2, 1, 1), "width": 8, "deformable": (2, 3, 4)}
    of_stages = ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0"]
    plain = ResNet(**layers)
    assert places(plain) == [f"{block}.conv2" for block in of_stages]
    assert plain.layer2[0].conv2.stride == (2, 2)
    replaced = ResNet(**layers, downsampler="carafe")
    assert places(replaced) == [f"{block}.conv2" for block in ("layer1.0", "layer1.1", "layer2.1")]
    assert type(replaced.layer2[0].conv2) is nn.Conv2d
    assert isinstance(replaced.layer2[0].down, CARAFE)
    x = torch.randn(2, 3, 64, 64)
    for network in (plain, replaced):
        network(x).sum().backward()
        assert all(parameter.grad is not None for parameter in network.parameters())


def test_without_torchvision_deformable_layers_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.ops", None)
    with pytest.raises(ImportError, match=r"\[ResNet\] deformable needs .* torchvision"):
        small(deformable=(2,))


# Errors


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"layers": (1, 1, 1)}, ValueError, r"layers must be four numbers from 1; got \(1, 1, 1\)"),
        ({"layers": (1, 0, 1, 1)}, ValueError, "layers must be four numbers from 1"),
        ({"width": 0}, ValueError, "width must be at least 1; got 0"),
        ({"layers": (1, 1, 1, 1.0)}, TypeError, "layers must be four numbers from 1; got .*tuple"),
        ({"width": 8.0}, TypeError, r"width must be a positive integer; got 8.0 \(float\)"),
        ({"num_classes": "10"}, TypeError, r"num_classes must be a positive .*; got '10' \(str\)"),
        ({"deformable": (1, 2)}, ValueError, r"deformable must be of 2, 3, 4, 5; got \(1, 2\)"),
        ({"downsampler": "x"}, ValueError, r"name must be one of strided_conv, .*; got 'x'"),
        ({"downsampler": "max", "groups": 2}, TypeError, "options of 'max' must be of kernel_size"),
        ({"kernel_size": 3}, TypeError, "options must be none without a downsampler; got kernel"),
    ],
    ids=str,
)
def test_errors(arguments, error, message):
    with pytest.raises(error, match=message):
        ResNet(**arguments)


def test_the_examples():
    assert doctest.testmod(resnet).failed == 0
