"""The operators that CARAFE++ is compared with: sizes, formulas, parameters, gradients, errors."""

import doctest
import math

import pytest

from skips import import_or_skip

torch = import_or_skip("torch")
nn, F = torch.nn, torch.nn.functional

from carafepp.torch import CARAFE
from carafepp.torch.models import (
    DOWNSAMPLERS,
    UPSAMPLERS,
    downsampler,
    resampling,
    upsampler,
)

upsamplers = pytest.mark.parametrize("name", UPSAMPLERS)
downsamplers = pytest.mark.parametrize("name", DOWNSAMPLERS)
both = pytest.mark.parametrize(
    ("make", "name"),
    [(upsampler, name) for name in UPSAMPLERS] + [(downsampler, name) for name in DOWNSAMPLERS],
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def vivid(module):
    """Set parameters that begin as zeros to something, too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


# Sizes


@pytest.mark.parametrize("factor", [2, 3, 4])
@upsamplers
def test_upsamplers_multiply_sizes(name, factor):
    module = upsampler(name, 4, factor=factor)
    assert module(torch.randn(2, 4, 5, 6)).shape == (2, 4, 5 * factor, 6 * factor)


@upsamplers
def test_upsamplers_take_the_size_of_an_odd_skip_connection(name):
    module, x = vivid(upsampler(name, 4)), torch.randn(1, 4, 5, 6)
    size = (9, 11)
    output = module(x, size=size)
    assert output.shape == (1, 4, *size)
    if any(word in name for word in ("nearest", "bilinear", "attention")):
        mode = "nearest" if "nearest" in name else "bilinear"
        expected = F.interpolate(x, size, mode=mode)
        if "conv" in name:
            expected = module.conv(expected)
        elif name == "spatial_attention":
            expected = expected * module.attention(expected).sigmoid()
    else:
        expected = module(x)[..., :9, :11]
    torch.testing.assert_close(output, expected)


@upsamplers
def test_upsamplers_take_a_size_less_than_the_factor_beyond_theirs(name):
    """The skip connection of an encoder that rounded down."""
    module, x = vivid(upsampler(name, 4, factor=3)), torch.randn(1, 4, 5, 6)
    output = module(x, size=(17, 19))
    assert output.shape == (1, 4, 17, 19)
    if name in ("nearest", "bilinear"):
        torch.testing.assert_close(output, F.interpolate(x, (17, 19), mode=name))
    elif "conv" in name.partition("_")[2] or name in ("spatial_attention", "carafe"):
        pass  # as their interpolation; the module's own test has it
    else:
        last = F.pad(module(x), (0, 1, 0, 2), mode="replicate")
        torch.testing.assert_close(output, last)


@pytest.mark.parametrize("factor", [2, 3, 4])
@downsamplers
def test_downsamplers_divide_sizes_and_round_up(name, factor):
    module = downsampler(name, 4, factor=factor)
    for size in [(12, 12), (13, 14), (15, 5), (9, 7)]:
        expected = [math.ceil(n / factor) for n in size]
        assert module(torch.randn(2, 4, *size)).shape == (2, 4, *expected)


# Formulas


def test_nearest_and_bilinear_know_their_pixels():
    x = torch.tensor([0.0, 4.0]).reshape(1, 1, 1, 2)
    assert upsampler("nearest", 1)(x)[0, 0, 0].tolist() == [0, 0, 4, 4]
    assert upsampler("bilinear", 1)(x)[0, 0, 0].tolist() == [0, 1, 3, 4]


def test_nearest_conv_convolves_the_interpolation():
    module, x = upsampler("nearest_conv", 3), torch.randn(1, 3, 4, 4)
    expected = F.conv2d(
        x.repeat_interleave(2, 2).repeat_interleave(2, 3),
        module.conv.weight,
        module.conv.bias,
        padding=1,
    )
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(("factor", "kernel_size"), [(2, 2), (2, 3), (2, 4), (3, 3), (3, 6)])
def test_deconv_adds_a_kernel_for_each_pixel(factor, kernel_size):
    module = upsampler("deconv", 1, factor=factor, kernel_size=kernel_size)
    x = torch.zeros(1, 1, 5, 5)
    x[..., 2, 2] = 1
    added = (module(x) - module.conv.bias.view(1, 1, 1, 1)).detach()
    first = 2 * factor - (kernel_size - factor + 1) // 2
    expected = torch.zeros(1, 1, 5 * factor, 5 * factor)
    block = slice(first, first + kernel_size)
    expected[..., block, block] = module.conv.weight.detach()
    torch.testing.assert_close(added, expected)


def test_pixel_shuffle_makes_blocks_of_channels():
    module, x = upsampler("pixel_shuffle", 2, factor=3), torch.randn(1, 2, 4, 5)
    blocks = module.conv(x).reshape(1, 2, 3, 3, 4, 5)
    output = module(x)
    for i, j in [(0, 0), (1, 2), (2, 1)]:
        torch.testing.assert_close(output[..., i::3, j::3], blocks[:, :, i, j])


@pytest.mark.parametrize("factor", [2, 3])
def test_gum_begins_as_bilinear_and_samples_where_offsets_point(factor):
    module, x = upsampler("gum", 3, factor=factor), torch.randn(1, 3, 6, 7)
    bilinear = upsampler("bilinear", 3, factor=factor)(x)
    torch.testing.assert_close(module(x), bilinear)
    with torch.no_grad():  # a pixel to the right and two down
        module.guidance[-1].bias.copy_(torch.tensor([1.0, 2.0]))
    moved = bilinear[..., 2 * factor :, factor:]
    torch.testing.assert_close(module(x)[..., : -2 * factor, :-factor], moved)


def test_spatial_attention_scales_positions():
    module, x = vivid(upsampler("spatial_attention", 3)), torch.randn(1, 3, 4, 4)
    scale = module(x) / upsampler("bilinear", 3)(x)
    torch.testing.assert_close(scale[:, :1].expand_as(scale), scale)
    assert scale.min() > 0
    assert scale.max() < 1


def test_max_and_average_see_three_by_three():
    x = torch.arange(25.0).reshape(1, 1, 5, 5)
    assert downsampler("max", 1)(x)[0, 0].tolist() == [[6, 8, 9], [16, 18, 19], [21, 23, 24]]
    assert downsampler("average", 1)(x)[0, 0].tolist() == [
        [3, 4.5, 6],
        [10.5, 12, 13.5],
        [18, 19.5, 21],
    ]


@pytest.mark.parametrize("symmetric", [True, False])
def test_dpp_is_the_formula(symmetric):
    module = vivid(downsampler("dpp", 2, symmetric=symmetric)).double()
    x = torch.randn(1, 2, 5, 4, dtype=torch.float64)
    output = module(x)
    alpha, power = module.log_alpha.exp().flatten(), module.log_lambda.exp().flatten()
    for c, i, j in [(0, 0, 0), (1, 1, 1), (0, 2, 1)]:  # the last block is half outside
        block = x[0, c, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        difference = block - block.mean()
        if not symmetric:
            difference = difference.clamp(min=0)
        weight = alpha[c] + (difference**2 + 1e-6).sqrt() ** power[c]
        torch.testing.assert_close(output[0, c, i, j], (weight * block).sum() / weight.sum())


@pytest.mark.parametrize("bottleneck", [None, 8])
def test_lip_is_the_formula(bottleneck):
    module = vivid(downsampler("lip", 3, bottleneck=bottleneck)).double()
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64)
    importance = (12 * module.logits(x).sigmoid()).exp()
    output = module(x)
    for i, j in [(0, 0), (1, 2), (3, 1)]:
        rows, columns = slice(max(0, 2 * i - 1), 2 * i + 2), slice(max(0, 2 * j - 1), 2 * j + 2)
        weight, window = importance[..., rows, columns], x[..., rows, columns]
        expected = (weight * window).sum((2, 3)) / weight.sum((2, 3))
        torch.testing.assert_close(output[..., i, j], expected)


def test_lip_begins_as_an_average():
    x = torch.randn(1, 4, 7, 6)
    average = downsampler("average", 4)(x)
    torch.testing.assert_close(downsampler("lip", 4)(x), average)


@pytest.mark.parametrize("make", [upsampler, downsampler])
def test_carafe_is_the_module_with_its_options(make):
    module = make("carafe", 8, factor=3, kernel_size=3, groups=2)
    assert isinstance(module, CARAFE)
    assert (module.up, module.down) == ((3, 1) if make is upsampler else (1, 3))
    assert (module.kernel_size, module.groups) == (3, 2)


# Parameters: of a conventional size, C=256 and a factor of 2

C = 256
PARAMETERS = {
    "nearest": 0,
    "bilinear": 0,
    "nearest_conv": 9 * C * C + C,
    "bilinear_conv": 9 * C * C + C,
    "deconv": 9 * C * C + C,
    "pixel_shuffle": 9 * C * 4 * C + 4 * C,
    "gum": (4 * C * 64 + 64) + (9 * 64 * 2 + 2),
    "spatial_attention": 9 * C + 1,
    "carafe": 74_148,
    "strided_conv": 9 * C * C + C,
    "max": 0,
    "average": 0,
    "dpp": 2 * C,
    "lip": (C * 128 + 2 * 128) + (9 * 128 * 128 + 2 * 128) + (128 * C + 2 * C),
}


@both
def test_parameters(make, name):
    expected = PARAMETERS[name]
    if (make, name) == (downsampler, "carafe"):
        expected = (C * 16 + 16) + (9 * 16 * 25 + 25)
    assert count(make(name, C)) == expected


# As modules


@both
def test_gradients_reach_input_and_parameters(make, name):
    module = vivid(make(name, 4))
    x = torch.randn(2, 4, 6, 7, requires_grad=True)
    (module(x) * torch.randn_like(module(x))).sum().backward()
    for leaf in (x, *module.parameters()):
        assert leaf.grad.isfinite().all()
        assert leaf.grad.count_nonzero() > 0


@both
def test_channels_last_gives_the_same(make, name):
    module, x = vivid(make(name, 4)), torch.randn(2, 4, 6, 7)
    output = module(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(output, module(x), rtol=1e-4, atol=1e-5)


@both
def test_double_and_repr(make, name):
    module = make(name, 4).double()
    assert module(torch.randn(1, 4, 6, 6, dtype=torch.float64)).dtype == torch.float64
    assert repr(module).startswith(type(module).__name__)


@both
def test_a_network_with_it_learns(make, name):
    """To tell which of two kinds of noise a picture has."""
    x = torch.randn(8, 4, 8, 8) * torch.tensor([0.5, 2.0]).repeat(4).view(8, 1, 1, 1)
    kind = torch.tensor([0, 1] * 4)
    head = [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)]
    network = nn.Sequential(nn.Conv2d(4, 4, 3), make(name, 4), *head)
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    losses = []
    for _ in range(30):
        loss = F.cross_entropy(network(x), kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# Errors


@pytest.mark.parametrize("make", [upsampler, downsampler])
def test_unknown_names_and_numbers_out_of_range(make):
    with pytest.raises(ValueError, match=rf"\[{make.__name__}\] name must be one of .*; got 'x'"):
        make("x", 4)
    with pytest.raises(ValueError, match="factor must be at least 2; got 1"):
        make("carafe", 4, factor=1)
    with pytest.raises(ValueError, match="channels must be at least 1; got 0"):
        make("carafe", 0)
    with pytest.raises(TypeError, match=r"channels must be a positive integer; got 4.0 \(float\)"):
        make("carafe", 4.0)
    with pytest.raises(TypeError, match=r"factor must be an integer from 2; got 2.0 \(float\)"):
        make("carafe", 4, factor=2.0)


@pytest.mark.parametrize(
    ("make", "name", "option", "message"),
    [
        (upsampler, "nearest", "kernel_size", "options of 'nearest' must be of none"),
        (upsampler, "deconv", "mode", "options of 'deconv' must be of kernel_size; got mode"),
        (upsampler, "carafe", "up", "got up"),
        (downsampler, "carafe", "down", "got down"),
        (downsampler, "lip", "kernel_size", "must be of bottleneck; got kernel_size"),
        (downsampler, "dpp", "full", "must be of symmetric; got full"),
    ],
)
def test_options_that_an_operator_does_not_have(make, name, option, message):
    with pytest.raises(TypeError, match=rf"\[{make.__name__}\] .*{message}"):
        make(name, 4, **{option: 3})


@upsamplers
def test_sizes_out_of_range(name):
    module, x = upsampler(name, 4), torch.zeros(1, 4, 3, 3)
    for size in [(8, 6), (6, 8)] + [(0, 6)] * (name != "carafe"):  # which takes it as empty
        with pytest.raises(ValueError, match="size must be from"):
            module(x, size=size)
    with pytest.raises(TypeError, match=r"size must be a pair .* of integers; got \(6.0, 6\)"):
        module(x, size=(6.0, 6))


@pytest.mark.parametrize(
    ("make", "name", "option"),
    [
        *((upsampler, name, "kernel_size") for name in UPSAMPLERS if "conv" in name),
        *((upsampler, name, "kernel_size") for name in ("pixel_shuffle", "spatial_attention")),
        (upsampler, "gum", "hidden"),
        *((downsampler, name, "kernel_size") for name in ("strided_conv", "max", "average")),
        (downsampler, "lip", "bottleneck"),
    ],
)
def test_options_that_are_no_integers(make, name, option):
    with pytest.raises(TypeError, match=rf"^\[\w+\] {option} must be .*; got 3.0 \(float\)\.$"):
        make(name, 4, **{option: 3.0})


def test_kernel_sizes():
    with pytest.raises(
        ValueError, match=r"\[Deconv\] kernel_size must be at least factor=4; got 3"
    ):
        upsampler("deconv", 4, factor=4, kernel_size=3)
    for name, module in [
        ("strided_conv", "StridedConv"),
        ("max", "MaxPool"),
        ("average", "AveragePool"),
    ]:
        with pytest.raises(ValueError, match=rf"\[{module}\] kernel_size must be odd.*; got 2"):
            downsampler(name, 4, kernel_size=2)


def test_the_examples():
    assert doctest.testmod(resampling).failed == 0
