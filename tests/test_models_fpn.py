"""FPN and mask head: formulas, odd sizes, where CARAFE++ sits, costs, torchvision, errors."""

import doctest

import pytest

from skips import import_or_skip, skip

torch = import_or_skip("torch")
nn, F = torch.nn, torch.nn.functional

from carafepp.torch import CARAFE
from carafepp.torch.models import FPN, UPSAMPLERS, MaskHead, ResNet, ResNetFPN, fpn
from torchvision_import import import_torchvision

upsamplers = pytest.mark.parametrize("name", UPSAMPLERS)
CHANNELS = (8, 16, 32, 64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def levels(height, width, n=2):
    """Return random levels of a picture, at strides of 4, 8, 16, 32."""
    return [
        torch.randn(n, c, -(-height // s), -(-width // s))
        for c, s in zip(CHANNELS, (4, 8, 16, 32), strict=True)
    ]


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def vivid(module):
    """Set parameters that begin as zeros to something, too."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return module


# FPN


@pytest.mark.parametrize("size", [(128, 96), (97, 131), (65, 33)], ids=str)
@upsamplers
def test_the_pyramid_has_the_sizes_of_the_levels(name, size):
    inputs = levels(*size)
    pyramid = FPN(CHANNELS, 12, upsampler=name)(inputs)
    assert [p.shape for p in pyramid] == [(2, 12, *x.shape[2:]) for x in inputs]


@upsamplers
def test_levels_may_be_rounded_down(name):
    sizes = [(27, 50), (13, 25), (6, 12), (3, 6)]
    inputs = [torch.randn(2, c, *size) for c, size in zip(CHANNELS, sizes, strict=True)]
    pyramid = FPN(CHANNELS, 12, upsampler=name)(inputs)
    assert [p.shape for p in pyramid] == [(2, 12, *x.shape[2:]) for x in inputs]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Encountering a list at the output of the tracer")
@pytest.mark.parametrize("name", [n for n in UPSAMPLERS if n != "gum"])  # whose grid is constant
def test_a_traced_pyramid_goes_on_with_other_sizes(name):
    pyramid = FPN(CHANNELS, 12, upsampler=name, extra_levels=1)
    traced = torch.jit.trace(pyramid, [levels(128, 96)], strict=False)
    for size in [(97, 131), (64, 64)]:
        inputs = levels(*size)
        torch.testing.assert_close(list(traced(inputs)), pyramid(inputs))


def test_levels_add_up_from_the_top():
    """With nearest interpolation, against the formula of the FPN paper."""
    pyramid = vivid(FPN(CHANNELS, 12, upsampler="nearest"))
    inputs = levels(64, 96)
    merged = None
    outputs = pyramid(inputs)
    for i in (3, 2, 1, 0):
        lateral = pyramid.laterals[i](inputs[i])
        if merged is not None:
            lateral = lateral + merged.repeat_interleave(2, 2).repeat_interleave(2, 3)
        merged = lateral
        torch.testing.assert_close(outputs[i], pyramid.outputs[i](merged))


def test_one_carafe_for_each_level_but_the_coarsest():
    pyramid = FPN((256, 512, 1024, 2048))
    found = {name: m for name, m in pyramid.named_modules() if isinstance(m, CARAFE)}
    assert list(found) == ["upsamplers.0", "upsamplers.1", "upsamplers.2"]
    assert {(m.up, m.down, m.channels, m.kernel_size) for m in found.values()} == {(2, 1, 256, 5)}
    original = FPN((256, 512, 1024, 2048), upsampler="nearest")
    laterals = sum(c * 256 + 256 for c in (256, 512, 1024, 2048))
    assert count(original) == laterals + 4 * (9 * 256 * 256 + 256)
    assert count(pyramid) == count(original) + 3 * 74_148


def test_each_carafe_upsamples_the_level_above_to_the_size_of_its_lateral():
    pyramid, inputs = FPN(CHANNELS, 12), levels(97, 131)
    seen = {}
    for i, module in enumerate(pyramid.upsamplers):
        module.register_forward_hook(
            lambda _, args, output, i=i: seen.update({i: (args[0].shape[2:], output.shape[2:])})
        )
    pyramid(inputs)
    assert seen == {i: (inputs[i + 1].shape[2:], inputs[i].shape[2:]) for i in range(3)}


def test_options_go_to_the_upsamplers():
    pyramid = FPN(CHANNELS, 12, kernel_size=3, groups=3)
    assert {(m.kernel_size, m.groups) for m in pyramid.upsamplers} == {(3, 3)}


def test_extra_levels_take_every_second_pixel():
    pyramid = FPN(CHANNELS, 12, extra_levels=2)(levels(130, 96))
    assert len(pyramid) == 6
    torch.testing.assert_close(pyramid[4], pyramid[3][..., ::2, ::2])
    torch.testing.assert_close(pyramid[5], pyramid[4][..., ::2, ::2])


@upsamplers
def test_gradients_reach_every_parameter(name):
    pyramid = vivid(FPN(CHANNELS, 12, upsampler=name))
    sum((p * torch.randn_like(p)).sum() for p in pyramid(levels(97, 64))).backward()
    for parameter_name, parameter in pyramid.named_parameters():
        assert parameter.grad.count_nonzero() > 0, parameter_name


def test_channels_last_gives_the_same():
    pyramid, inputs = vivid(FPN(CHANNELS, 12)), levels(97, 64)
    last = [x.to(memory_format=torch.channels_last) for x in inputs]
    outputs = pyramid.to(memory_format=torch.channels_last)(last)
    torch.testing.assert_close(outputs, pyramid(inputs), rtol=1e-4, atol=1e-4)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in outputs)


def test_batch_norm_and_relu_follow_every_convolution():
    pyramid = FPN(CHANNELS, 12, batch_norm=True)
    for layer in (*pyramid.laterals, *pyramid.outputs):
        assert [type(part) for part in layer] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
        assert layer[0].bias is None


# Mask head


@upsamplers
def test_the_mask_head_predicts_28_by_28_and_learns(name):
    head = MaskHead(6, 8, 2, convs=2, upsampler=name)
    x = torch.randn(4, 6, 14, 14)
    target = (F.interpolate(x[:, :2], scale_factor=2) > 0).float()
    optimizer = torch.optim.Adam(head.parameters(), 0.02)
    losses = []
    for _ in range(15):
        logits = head(x)
        assert logits.shape == (4, 2, 28, 28)
        loss = F.binary_cross_entropy_with_logits(logits, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    for parameter_name, parameter in head.named_parameters():
        assert parameter.grad.count_nonzero() > 0, parameter_name


def test_carafe_costs_less_than_the_deconvolution():
    """Section 4.1: even less computational cost; 2x2 is Mask R-CNN's deconvolution."""
    heads = {name: MaskHead(upsampler=name) for name in ("deconv", "carafe")}
    assert heads["deconv"].upsampler.conv.kernel_size == (2, 2)
    assert isinstance(heads["carafe"].upsampler, CARAFE)
    rest = 4 * (9 * 256 * 256 + 256) + (256 * 80 + 80)
    assert count(heads["deconv"]) == rest + 4 * 256 * 256 + 256
    assert count(heads["carafe"]) == rest + 74_148
    pixel = {"deconv": 4 * 256 * 256, "carafe": 256 * 64 + 9 * 64 * 100 + 4 * 25 * 256}
    assert pixel["carafe"] < 0.4 * pixel["deconv"]  # multiplications for a position of the 14x14


# torchvision


def small(**options):
    backbone = ResNet((1, 1, 1, 1), width=8, num_classes=None, downsampler="carafe")
    return ResNetFPN(backbone, FPN(backbone.channels, 16, extra_levels=1, **options))


def test_a_backbone_as_torchvision_wants_it():
    backbone = small()
    pyramid = backbone(torch.randn(1, 3, 128, 96))
    assert list(pyramid) == ["0", "1", "2", "3", "pool"]
    assert {p.shape[1] for p in pyramid.values()} == {backbone.out_channels}
    assert [tuple(p.shape[2:]) for p in pyramid.values()] == [
        (32, 24),
        (16, 12),
        (8, 6),
        (4, 3),
        (2, 2),
    ]
    assert sum(isinstance(m, CARAFE) for m in backbone.modules()) == 7 + 3


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # in its imports
@pytest.mark.parametrize("kind", ["FasterRCNN", "MaskRCNN"])
def test_detectors_of_torchvision_train_on_it(kind):
    try:
        import_torchvision()
    except ImportError as error:
        skip("torchvision", str(error))
    from torchvision.models import detection

    sizes = dict(min_size=128, max_size=160)
    few = dict(rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20)  # where Python pools them
    detector = getattr(detection, kind)(small(), 3, **sizes, **few)
    if kind == "MaskRCNN":
        detector.roi_heads.mask_head = MaskHead(16, 16, 3)
        detector.roi_heads.mask_predictor = nn.Identity()
    target = {"boxes": torch.tensor([[10.0, 20, 90, 100]]), "labels": torch.tensor([1])}
    target["masks"] = torch.zeros(1, 128, 130, dtype=torch.uint8)
    target["masks"][:, 20:100, 10:90] = 1
    x = torch.rand(3, 128, 130)
    sum(detector([x], [target]).values()).backward()
    for name, parameter in detector.named_parameters():
        assert parameter.grad is not None, name
    with torch.no_grad():
        (found,) = detector.eval()([x])
    if kind == "MaskRCNN":
        assert found["masks"].shape[1:] == (1, 128, 130)


# Errors


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FPN([8]), ValueError, r"\[FPN\] in_channels must be two .*; got \(8,\)"),
        (lambda: FPN([8, 0]), ValueError, r"\[FPN\] in_channels must be two .*; got \(8, 0\)"),
        (lambda: FPN([8, 8], extra_levels=-1), ValueError, r"extra_levels must .* 0; got -1"),
        (lambda: FPN([8, 8], upsampler="x"), ValueError, "name must be one of nearest, .*'x'"),
        (lambda: FPN([8, 8], upsampler="gum", up=3), TypeError, "must be of hidden; got up"),
        (lambda: MaskHead(convs=0), ValueError, r"\[MaskHead\] convs must be at least 1; got 0"),
        (lambda: FPN([8, 8.0]), TypeError, r"\[FPN\] in_channels must be two .*8.0\] \(list\)"),
        (lambda: FPN(8), TypeError, r"\[FPN\] in_channels must be two .*; got 8 \(int\)"),
        (lambda: FPN([8, 8], 16.0), TypeError, r"\[FPN\] channels must be .*; got 16.0 \(float\)"),
        (lambda: FPN([8, 8], extra_levels=1.0), TypeError, "must be an integer from 0; got 1.0"),
        (
            lambda: MaskHead(convs=True),
            TypeError,
            r"convs must be a .*; got True \(bool\)",
        ),
        (lambda: MaskHead(8, 8.0), TypeError, r"\[MaskHead\] channels must be a positive integer;"),
        (lambda: MaskHead(upsampler="x"), ValueError, "name must be one of nearest"),
        (lambda: FPN(CHANNELS)(levels(64, 64)[:3]), ValueError, r"levels must be 4; got 3"),
    ],
    ids=range(14),
)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_the_examples():
    assert doctest.testmod(fpn).failed == 0
