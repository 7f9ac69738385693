"""The drop-in for mmcv.ops: signatures, state_dict keys and outputs of what it replaces."""

import inspect

import numpy as np
import pytest

import reference as ref

torch = pytest.importorskip("torch")
nn = torch.nn

from carafepp.torch import mmcv  # noqa: E402

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
    with pytest.raises(ValueError, match=r"^\[reassemble\] masks must have shape"):
        mmcv.carafe(torch.zeros(1, 2, 3, 3), torch.zeros(1, 9, 5, 6), 3, 1, 2)


def composed(pack, x):
    """What mmcv's CARAFEPack does, of functions of PyTorch."""
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
