"""carafepp.torch.models.inpainting: partial layers, generators, discriminator, losses."""

import numpy as np
import pytest

import reference as ref
from skips import import_or_skip

torch = import_or_skip("torch")
nn = torch.nn

from carafepp.torch import CARAFE
from carafepp.torch.models.inpainting import (
    GlobalLocalGenerator,
    PartialCARAFE,
    PartialConv2d,
    PartialConvUNet,
    PatchDiscriminator,
    compose,
    discriminator_loss,
    generator_loss,
    reconstruction_loss,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def some_valid(*shape):
    """A valid map with a hole in the first picture and scattered ones in the others."""
    valid = torch.rand(shape) < 0.6
    valid[0, ..., 2:9, 3:] = False
    return valid


# Partial convolution


def partial_convolution(x, valid, weight, bias, stride, dilation):
    """Liu et al.'s equations 1 and 2, position by position, in float64."""
    (n, _, h, w), (o, _, k, _) = x.shape, weight.shape
    reach = dilation * (k // 2)
    pad = [(0, 0), (0, 0), (reach, reach), (reach, reach)]
    valid = np.pad(np.broadcast_to(valid, x.shape), pad)
    x = np.pad(x, pad)
    rows, cols = range(0, h, stride), range(0, w, stride)
    output, reached = np.zeros((n, o, len(rows), len(cols))), np.zeros((n, 1, len(rows), len(cols)))
    for i, b, j in np.ndindex(len(rows), n, len(cols)):
        window = np.s_[
            b,
            :,
            rows[i] : rows[i] + 2 * reach + 1 : dilation,
            cols[j] : cols[j] + 2 * reach + 1 : dilation,
        ]
        known = valid[window]
        if known.any():
            sums = (weight * np.where(known, x[window], 0)).sum((1, 2, 3))
            output[b, :, i, j] = sums * known.size / known.sum() + bias
            reached[b, 0, i, j] = 1
    return output, reached


@pytest.mark.parametrize("channels", [1, 3], ids=["one map", "a map per channel"])
@pytest.mark.parametrize(
    ("kernel_size", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (5, 2, 1), (3, 1, 2), (1, 1, 1)]
)
def test_partial_convolution_by_its_definition(kernel_size, stride, dilation, channels):
    """Small integers give exact sums; the division alone rounds."""
    layer = PartialConv2d(3, 4, kernel_size, stride=stride, dilation=dilation).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape))
    x = torch.randint(-8, 9, (2, 3, 11, 12)).double()
    valid = some_valid(2, channels, 11, 12)
    output, reached = layer(x, valid)
    expected, expected_reached = partial_convolution(
        x.numpy(),
        valid.numpy(),
        layer.weight.detach().numpy(),
        layer.bias.detach().numpy(),
        stride,
        dilation,
    )
    np.testing.assert_array_equal(output.detach().numpy(), expected)
    np.testing.assert_array_equal(reached.numpy(), expected_reached)
    assert kernel_size > 3 or not reached.all()


def test_partial_convolution_of_all_is_convolution_inside():
    """At the borders it is more: what is outside counts as missing."""
    layer = PartialConv2d(3, 4, 3, bias=False)
    x = torch.randn(1, 3, 6, 7)
    output, valid = layer(x, torch.ones(1, 1, 6, 7, dtype=torch.bool))
    expected = nn.functional.conv2d(x, layer.weight, padding=1)
    torch.testing.assert_close(output[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])
    torch.testing.assert_close(output[..., 0, 1:-1], expected[..., 0, 1:-1] * 9 / 6)
    torch.testing.assert_close(output[..., 0, 0], expected[..., 0, 0] * 9 / 4)
    assert valid.all()


# CARAFE++ with holes

FACTORS = [pytest.param(dict(up=2), id="up"), pytest.param(dict(down=2), id="down")]
factors = pytest.mark.parametrize("factor", FACTORS)


def vivid(layer):
    """Set parameters for kernels that differ from an average."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    return layer


@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid_normalized"])
@factors
def test_partial_carafe_by_its_definition(factor, normalizer):
    """A weighted mean over the valid, by the core's definition in float64."""
    layer = vivid(PartialCARAFE(4, kernel_size=3, normalizer=normalizer, **factor)).double()
    x, valid = torch.randn(2, 4, 9, 10, dtype=torch.float64), some_valid(2, 1, 9, 10)
    output, reached = layer(x, valid)
    known = valid.double().numpy()
    masks = layer.carafe.masks(x * valid).detach().numpy()
    weight = ref.reassemble(known, masks, **factor)
    expected = ref.reassemble(x.numpy() * known, masks, **factor)
    expected /= np.where(weight > 0, weight, 1)
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(reached.numpy(), weight > 0)
    assert not reached.all()


@factors
def test_partial_carafe_keeps_a_constant_through_holes_and_borders(factor):
    layer = vivid(PartialCARAFE(4, **factor).double())
    valid = some_valid(2, 1, 13, 12)
    output, reached = layer(torch.full((2, 4, 13, 12), 7, dtype=torch.float64), valid)
    torch.testing.assert_close(output, reached.double().expand_as(output) * 7)


@factors
def test_partial_carafe_without_holes_is_carafe_inside(factor):
    layer = PartialCARAFE(4, **factor).double()
    x = torch.randn(1, 4, 12, 12, dtype=torch.float64)
    output, valid = layer(x, torch.ones(1, 1, 12, 12, dtype=torch.bool))
    assert valid.all()
    edge = 4 // factor.get("down", 1)  # 2 pixels of the input
    inside = np.s_[..., edge:-edge, edge:-edge]
    torch.testing.assert_close(output[inside], layer.carafe(x)[inside])
    assert (output - layer.carafe(x))[..., 0, 0].abs().min() > 1e-3


@factors
def test_holes_shrink(factor):
    """Up: of what was valid all four pixels are; down: a block with anything valid is."""
    valid = some_valid(2, 1, 12, 12)
    _, reached = PartialCARAFE(4, **factor)(torch.randn(2, 4, 12, 12), valid)
    if "up" in factor:
        least = valid.repeat_interleave(2, 2).repeat_interleave(2, 3)
    else:
        least = nn.functional.max_pool2d(valid.float(), 2) > 0
    assert reached[least].all()
    assert least.sum() < reached.sum() < reached.numel()


def test_a_kernel_without_weight_on_the_valid_reaches_nothing():
    """A valid window is not enough: the kernels decide, here with all weight on the left tap."""
    layer = PartialCARAFE(2, kernel_size=3)
    with torch.no_grad():
        layer.carafe.content_encoder.weight.zero_()
        layer.carafe.content_encoder.bias.fill_(-10)
        layer.carafe.content_encoder.bias[3] = 10  # the others' weight, exp(-20), is rounding error
    valid = torch.zeros(1, 1, 4, 6, dtype=torch.bool)
    valid[..., 1, 2] = True
    output, reached = layer(torch.ones(1, 2, 4, 6), valid)
    assert reached.nonzero().tolist() == [[0, 0, 1, 3]]
    assert torch.equal(output, reached.float().expand_as(output))


@factors
def test_partial_carafe_crops(factor):
    layer = vivid(PartialCARAFE(4, **factor))
    x, valid = torch.randn(2, 4, 9, 10), some_valid(2, 1, 9, 10)
    (whole, reached), size = layer(x, valid), (4, 5)
    output, cropped = layer(x, valid, size)
    torch.testing.assert_close(output, whole[..., :4, :5])
    assert torch.equal(cropped, reached[..., :4, :5])


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(lambda: PartialConv2d(2, 3, 3), id="convolution"),
        pytest.param(lambda: PartialCARAFE(2, up=2, kernel_size=3, compressed_channels=2), id="up"),
        pytest.param(lambda: PartialCARAFE(2, down=2, compressed_channels=2), id="down"),
    ],
)
def test_gradients(layer):
    layer = vivid(layer()).double()
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    valid = some_valid(2, 1, 5, 5)

    def function(x, *parameters):
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(layer, values, (x, valid))[0]

    assert torch.autograd.gradcheck(function, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "layer", [PartialConv2d(32, 8, 3), PartialCARAFE(32, down=2)], ids=["convolution", "down"]
)
def test_half_precision(layer, dtype):
    x, valid = torch.randn(2, 32, 10, 10), some_valid(2, 1, 10, 10)
    expected, expected_reached = layer.to(dtype)(x.to(dtype), valid)
    output, reached = layer.float()(x.to(dtype).float(), valid)
    assert expected.dtype == dtype
    assert torch.equal(reached, expected_reached)
    torch.testing.assert_close(expected.float(), output, rtol=0.05, atol=0.05)


def test_half_precision_counts_more_than_it_holds():
    """8192 channels of 3x3 have 73728 elements; float16 ends at 65504."""
    layer = PartialConv2d(8192, 1, 3, bias=False).half()
    with torch.no_grad():
        layer.weight.fill_(2**-10)
    output, _ = layer(torch.ones(1, 8192, 4, 4).half(), torch.ones(1, 1, 4, 4, dtype=torch.bool))
    assert (output == 72).all()


# The generators

GENERATORS = [
    pytest.param(GlobalLocalGenerator, {}, id="global_local"),
    pytest.param(PartialConvUNet, dict(skips=False), id="partial_conv"),
    pytest.param(PartialConvUNet, dict(skips=True), id="partial_conv_unet"),
]
generators = pytest.mark.parametrize(("network", "options"), GENERATORS)
CARAFES = dict(downsampler="carafe", upsampler="carafe")
resamplers = pytest.mark.parametrize("resamplers", [{}, CARAFES], ids=["baseline", "carafe"])


def pictures(height=32, width=32):
    image = torch.rand(2, 3, height, width) * 2 - 1
    hole = torch.zeros(2, 1, height, width, dtype=torch.bool)
    hole[..., height // 4 : height // 2, 4 : width - 4] = True
    return image, hole


@resamplers
@generators
@pytest.mark.parametrize("size", [(32, 32), (30, 33), (19, 21)], ids=str)
def test_a_picture_in_a_picture_out(network, options, resamplers, size):
    image, hole = pictures(*size)
    generator = network(width=4, **options, **resamplers)
    prediction = generator(image, hole)
    assert prediction.shape == image.shape
    assert prediction.abs().max() <= 1
    filled = compose(image, hole, prediction)
    assert torch.equal(filled.where(~hole, 0), image.where(~hole, 0))
    assert torch.equal(filled.where(hole, 0), prediction.where(hole, 0))


@resamplers
@generators
def test_the_content_of_the_hole_does_not_matter(network, options, resamplers):
    """Bit for bit, in training mode, and in the gradients too."""
    image, hole = pictures()
    torch.manual_seed(1)
    generator = network(width=4, **options, **resamplers)
    results = []
    for content in (0.5, -3e30, torch.nan, torch.inf):
        image = image.masked_fill(hole, content).requires_grad_()
        prediction = generator(image, hole)
        gradients = torch.autograd.grad(prediction.sum(), [image, *generator.parameters()])
        results.append([prediction, *gradients])
        image = image.detach()
    for others in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], others, strict=True))
    assert not results[0][1].where(hole, 0).any()


@resamplers
@generators
def test_gradients_reach_every_parameter(network, options, resamplers):
    generator = vivid(network(width=4, **options, **resamplers))
    image, hole = pictures()
    reconstruction_loss(generator(image, hole), image, hole).backward()
    unreached = [
        name
        for name, parameter in generator.named_parameters()
        if parameter.grad is None or not parameter.grad.any()
    ]
    assert not unreached


@resamplers
@generators
def test_a_step_lowers_the_loss(network, options, resamplers):
    generator = network(width=4, **options, **resamplers)
    image, hole = pictures()
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.01)
    losses = []
    for _ in range(2):
        loss = reconstruction_loss(generator(image, hole), image, hole)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("depth", [1, 3])
@generators
def test_carafe_sits_in_the_place_of_resamplers(network, options, depth):
    """One in each step down and up; all other layers as without, but for the strides."""
    generator = network(width=4, depth=depth, **options, **CARAFES)
    found = {
        name: (module.channels, module.up, module.down)
        for name, module in generator.named_modules()
        if isinstance(module, CARAFE)
    }
    widths = [4 * 2**level for level in range(depth + 1)]
    inner = "0" if network is GlobalLocalGenerator else "0.resampler.carafe"
    expected = {f"down.{level}.{inner}": (widths[level], 1, 2) for level in range(depth)}
    expected |= {f"up.{level}.{inner}": (widths[depth - level], 2, 1) for level in range(depth)}
    assert found == expected
    convolutions = (nn.Conv2d, nn.ConvTranspose2d)
    assert all(m.stride == (1, 1) for m in generator.up.modules() if isinstance(m, convolutions))
    inside = {id(m) for carafe in generator.modules() if isinstance(carafe, CARAFE)
              for m in carafe.modules()}  # fmt: skip
    strides = [
        m.stride for m in generator.modules() if isinstance(m, convolutions) and id(m) not in inside
    ]
    assert set(strides) == {(1, 1)}
    assert not any(isinstance(module, CARAFE) for module in network(**options).modules())


def convolution(i, o, k=3):
    """Parameters of a convolution without bias and the BatchNorm after it."""
    return i * o * k**2 + 2 * o


def carafe(c, compressed, logits):
    """Parameters of CARAFE++: compressor and encoder 3x3, with biases."""
    return c * compressed + compressed + compressed * logits * 9 + logits


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_of_global_local():
    """Table 1 of Iizuka et al.: 4-64, 64-128-128, 128-256-256, 7 of 256, 256-128-128-64-32, 3."""
    rest = (
        convolution(4, 64, 5)
        + convolution(64, 128) + convolution(128, 128)
        + convolution(128, 256) + convolution(256, 256)
        + 7 * convolution(256, 256)
        + convolution(128, 128) + convolution(64, 32)
        + 32 * 3 * 9 + 3
    )  # fmt: skip
    deconvolutions = convolution(256, 128, 4) + convolution(128, 64, 4)
    assert count(GlobalLocalGenerator()) == rest + deconvolutions
    assert count(GlobalLocalGenerator(**CARAFES)) == (
        rest
        + carafe(64, 16, 25) + carafe(128, 16, 25)
        + carafe(256, 64, 100) + carafe(128, 64, 100)
        + convolution(256, 128) + convolution(128, 64)
    )  # fmt: skip


@pytest.mark.parametrize("skips", [False, True])
def test_parameters_of_partial_conv(skips):
    """The sum of Global&Local's, without the hole as a channel, with 3x3 for the deconvolutions."""
    beside = (128, 64) if skips else (0, 0)
    without = (
        count(GlobalLocalGenerator(upsampler="nearest"))
        - 1 * 64 * 25
        + beside[0] * 128 * 9 + beside[1] * 64 * 9
    )  # fmt: skip
    assert count(PartialConvUNet(skips=skips)) == without
    carafes = carafe(64, 16, 25) + carafe(128, 16, 25) + carafe(256, 64, 100) + carafe(128, 64, 100)
    assert count(PartialConvUNet(skips=skips, **CARAFES)) == without + carafes


@pytest.mark.parametrize("names", [("strided_conv", "nearest"), ("carafe", "carafe")], ids=str)
def test_pixels_without_valid_inputs_stay_empty(names):
    """A hole that is larger than the network sees: 0 before the tanh, in its middle."""
    generator = PartialConvUNet(
        width=4, depth=1, dilations=(), downsampler=names[0], upsampler=names[1]
    )
    image, hole = torch.ones(1, 3, 64, 64), torch.ones(1, 1, 64, 64, dtype=torch.bool)
    hole[..., :4] = False
    prediction = generator(image, hole)
    assert not prediction[..., 40:].any()
    assert prediction[..., :8].all()


def test_other_resamplers_by_name():
    generator = GlobalLocalGenerator(width=4, downsampler="average", upsampler="bilinear")
    assert generator(*pictures(19, 21)).shape == (2, 3, 19, 21)


# The discriminator and the losses


@pytest.mark.parametrize(("depth", "size"), [(1, (8, 6)), (2, (16, 20)), (3, (35, 33))])
def test_discriminator_scores_patches(depth, size):
    discriminator = PatchDiscriminator(width=4, depth=depth)
    image, hole = pictures(*size)
    hole[:] = False
    hole[0, 0, 2**depth, 0] = True
    scores, patches = discriminator(image, hole), discriminator.patches(hole)
    assert scores.shape == patches.shape == (2, 1, size[0] >> depth, size[1] >> depth)
    assert patches.nonzero().tolist() == [[0, 0, 1, 0]]


def test_discriminator_is_one_patchgan_with_spectral_norm():
    discriminator = PatchDiscriminator(width=8, depth=3)
    layers = [module for module in discriminator.modules() if isinstance(module, nn.Conv2d)]
    shapes = [tuple(layer.weight.shape) for layer in layers]
    assert shapes == [(8, 4, 4, 4), (16, 8, 4, 4), (32, 16, 4, 4), (64, 32, 3, 3), (1, 64, 3, 3)]
    image, hole = pictures()
    for _ in range(30):  # each call in training mode is an iteration of the power method
        discriminator(image, hole)
    for layer in layers:
        norm = torch.linalg.matrix_norm(layer.weight.flatten(1), 2)
        assert norm.item() == pytest.approx(1, rel=0.05)


def test_losses():
    real, inpainted = torch.tensor([3.0, 0.5, 9.0]), torch.tensor([-2.0, 0.0, 9.0])
    patches = torch.tensor([True, True, False])
    assert discriminator_loss(real, inpainted, patches).item() == (0.5 + 1) / 2
    assert generator_loss(inpainted, patches).item() == 1
    nothing = torch.zeros(3, dtype=torch.bool)
    assert generator_loss(inpainted, nothing).item() == 0
    prediction, image = torch.tensor([1.0, 1.0]), torch.tensor([0.5, 0.0])
    hole = torch.tensor([True, False])
    assert reconstruction_loss(prediction, image, hole).item() == 0.75
    assert reconstruction_loss(prediction, image, hole, hole_weight=6).item() == (6 * 0.5 + 1) / 2


def test_discriminator_learns_to_tell_and_generator_to_deceive():
    image, hole = pictures()
    discriminator = PatchDiscriminator(width=4, depth=2)
    patches = discriminator.patches(hole)
    inpainted = image.where(~hole, 0.9).requires_grad_()
    optimizer = torch.optim.Adam(discriminator.parameters(), 1e-2)
    found = []
    for _ in range(20):
        scores = discriminator(image, hole), discriminator(inpainted.detach(), hole)
        loss = discriminator_loss(*scores, patches)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.7 * found[0]
    generator_loss(discriminator(inpainted, hole), patches).backward()
    assert inpainted.grad.where(hole, 0).any()


# Errors


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: PartialConv2d(3, 4, 2), "[PartialConv2d] kernel_size must be odd; got 2."),
        (
            lambda: PartialConv2d(3, 4, 3)(torch.ones(2, 3, 5, 6), torch.ones(2, 1, 5, 6)),
            "[PartialConv2d] valid must be a tensor of bool of shape (2, 1, 5, 6) or "
            "(2, 3, 5, 6); got torch.float32, (2, 1, 5, 6).",
        ),
        (
            lambda: PartialCARAFE(3, up=2)(
                torch.ones(2, 3, 5, 6), torch.ones(2, 3, 5, 6, dtype=torch.bool)
            ),
            "[PartialCARAFE] valid must be a tensor of bool of shape (2, 1, 5, 6); "
            "got torch.bool, (2, 3, 5, 6).",
        ),
        (
            lambda: PartialCARAFE(4, normalizer="sigmoid"),
            "[PartialCARAFE] normalizer must make kernels that sum to 1, 'softmax' or "
            "'sigmoid_normalized'; got 'sigmoid'.",
        ),
        (lambda: PartialCARAFE(4, groups=2), "[PartialCARAFE] groups must be 1; got 2."),
        (
            lambda: PartialCARAFE(4, padding=0),
            "[PartialCARAFE] padding must be None: the outside of the picture is a hole; "
            "got (0, 0).",
        ),
        (
            lambda: PartialCARAFE(4, padding_mode="reflect"),
            "[PartialCARAFE] padding_mode must be 'zeros': the outside of the picture is a hole; "
            "got 'reflect'.",
        ),
        (
            lambda: GlobalLocalGenerator(width=0),
            "[GlobalLocalGenerator] width must be at least 1; got 0.",
        ),
        (lambda: PartialConvUNet(depth=0), "[PartialConvUNet] depth must be at least 1; got 0."),
        (
            lambda: PartialConvUNet(downsampler="max"),
            "[PartialConvUNet] downsampler must be one of 'strided_conv', 'carafe'; got 'max'.",
        ),
        (
            lambda: PartialConvUNet(upsampler="deconv"),
            "[PartialConvUNet] upsampler must be one of 'nearest', 'carafe'; got 'deconv'.",
        ),
        (
            lambda: PatchDiscriminator(depth=0),
            "[PatchDiscriminator] depth must be at least 1; got 0.",
        ),
    ],
    ids=lambda value: value[:45] if isinstance(value, str) else "",
)
def test_wrong_arguments(call, sentence):
    with pytest.raises(ValueError, match=r"^\[") as caught:
        call()
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: PartialConv2d(4, 4, 3.0), "PartialConv2d] kernel_size must be a positive integer"),
        (lambda: GlobalLocalGenerator(width=8.0), "GlobalLocalGenerator] width must be a positive"),
        (lambda: PartialConvUNet(dilations=(1, 2.0)), "PartialConvUNet] dilations must be numbers"),
        (lambda: PatchDiscriminator(depth="3"), "PatchDiscriminator] depth must be a positive int"),
    ],
    ids=range(4),
)
def test_numbers_that_are_no_integers(call, argument):
    with pytest.raises(TypeError) as caught:
        call()
    assert str(caught.value).startswith(f"[{argument}")


def test_a_size_beyond_the_natural_one():
    """Only valid pixels count: equal features stay equal beyond the border."""
    x, valid = torch.ones(1, 4, 5, 6), torch.ones(1, 1, 5, 6, dtype=torch.bool)
    output, valid = PartialCARAFE(4, up=2)(x, valid, size=(11, 13))
    assert valid.shape == (1, 1, 11, 13)
    assert valid.all()
    torch.testing.assert_close(output, torch.ones(1, 4, 11, 13))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_a_traced_network_goes_on_with_other_sizes():
    network = PartialConvUNet(width=4, downsampler="carafe", upsampler="carafe").eval()

    def picture(h, w):
        return torch.rand(1, 3, h, w), torch.rand(1, 1, h, w) < 0.3

    traced = torch.jit.trace(network, picture(32, 32))
    for size in [(29, 35), (32, 40)]:
        image, hole = picture(*size)
        torch.testing.assert_close(traced(image, hole), network(image, hole))
