"""The module of carafepp.torch: what it computes, and that it behaves as PyTorch's modules do."""

import copy
import pickle
import warnings

import numpy as np
import pytest

import reference as ref

torch = pytest.importorskip("torch")
nn = torch.nn

from carafepp.torch import CARAFE  # noqa: E402

FACTORS = [
    pytest.param(dict(up=2), id="up2"),
    pytest.param(dict(down=2), id="down2"),
    pytest.param(dict(up=3, down=2), id="3:2"),
    pytest.param(dict(), id="filter"),
    pytest.param(dict(up=2, down=3, ceil_mode=False), id="2:3 floor"),
]
factors = pytest.mark.parametrize("factor", FACTORS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def vivid(module):
    """Set parameters for masks that differ from an average."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)
    return module


def composed_masks(module, x, size):
    """The masks by the definition in float64, of convolutions by PyTorch."""
    compressed = module.channel_compressor(x)
    logits = nn.functional.conv2d(
        compressed,
        module.content_encoder.weight,
        module.content_encoder.bias,
        stride=module.down,
        padding=module.encoder_dilation * (module.encoder_kernel_size - 1) // 2,
        dilation=module.encoder_dilation,
    )
    return ref.normalize(
        logits.detach().numpy(),
        up=module.up,
        groups=module.groups,
        normalizer=module.normalizer,
        size=size,
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(kernel_size=3, groups=2, encoder_kernel_size=5),
        dict(compressed_channels=None, encoder_dilation=2),
        dict(batch_norm=True, normalizer="sigmoid_normalized", compressed_channels=3),
        dict(normalizer="sigmoid", encoder_kernel_size=1),
        dict(normalizer="none"),
    ],
    ids=str,
)
@factors
def test_it_is_what_the_paper_composes(factor, options):
    module = vivid(CARAFE(6, **factor, **options).double())
    x = torch.randn(2, 6, 7, 10, dtype=torch.float64)
    output = module(x)
    h, w = ref.output_size(7, 10, module.up, module.down)
    if not module.ceil_mode:
        h, w = 7 * module.up // module.down, 10 * module.up // module.down
    assert output.shape == (2, 6, h, w)
    masks = composed_masks(module, x, (h, w))
    np.testing.assert_allclose(module.masks(x).detach().numpy(), masks, rtol=1e-9, atol=1e-12)
    expected = ref.reassemble(
        x.numpy(), masks, up=module.up, down=module.down, groups=module.groups
    )
    np.testing.assert_allclose(output.detach().numpy(), expected, rtol=1e-9, atol=1e-11)


@factors
def test_a_size_is_a_crop(factor):
    module = vivid(CARAFE(4, **factor).double())
    x = torch.randn(1, 4, 9, 8, dtype=torch.float64)
    whole, masks = module(x), module.masks(x)
    h, w = whole.shape[2] - 1, whole.shape[3] - 1
    torch.testing.assert_close(module(x, size=(h, w)), whole[:, :, :h, :w])
    torch.testing.assert_close(module.masks(x, size=(h, w)), masks[:, :, :h, :w])
    with pytest.raises(ValueError, match="size"):
        module(x, size=(h + 20, w))


@factors
def test_gradients(factor):
    module = vivid(CARAFE(2, kernel_size=3, compressed_channels=2, **factor).double())
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(function, (x, *parameters))


def test_masks_can_be_learnt_from():
    module = vivid(CARAFE(2, up=2, kernel_size=3).double())
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module.masks, (x,))


def test_it_begins_as_an_average():
    """The official code's initialisation: an encoder of standard deviation 0.001, biases 0."""
    module = CARAFE(64, up=2)
    masks = module.masks(torch.randn(1, 64, 16, 16))
    assert (masks - 1 / 25).abs().max() < 5e-3
    assert module.content_encoder.weight.std().item() == pytest.approx(1e-3, rel=0.02)
    limit = (6 / (64 + 64)) ** 0.5
    assert 0.95 * limit < module.channel_compressor.weight.abs().max() <= limit
    assert not module.channel_compressor.bias.any()
    assert not module.content_encoder.bias.any()


def test_parameters_are_those_of_the_paper():
    """74k for C=256 and up x2 (CARAFE, section 3.3); C_m is 64 up, 16 down."""
    assert sum(p.numel() for p in CARAFE(256, up=2).parameters()) == 256 * 64 + 64 + 64 * 900 + 100
    assert CARAFE(256, up=2).compressed_channels == 64
    assert CARAFE(256, up=3, down=2).compressed_channels == 64
    assert CARAFE(256, down=2).compressed_channels == 16
    assert CARAFE(8, compressed_channels=None).content_encoder.in_channels == 8
    assert set(CARAFE(8, up=2).state_dict()) == {
        f"{module}.{name}"
        for module in ("channel_compressor", "content_encoder")
        for name in ("weight", "bias")
    }


def test_batch_norm_and_relu_follow_the_compressor():
    module = CARAFE(4, down=2, batch_norm=True)
    x = torch.randn(8, 4, 6, 6) * 3 + 1
    module(x)
    compressor = module.channel_compressor
    assert compressor[1].num_batches_tracked == 1
    assert (compressor(x) >= 0).all()
    module.eval()
    torch.testing.assert_close(module(x[:3]), module(x)[:3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_any_dtype(dtype):
    module = CARAFE(8, up=2)
    x = torch.randn(1, 8, 6, 7)
    output = copy.deepcopy(module).to(dtype)(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), module(x), rtol=0, atol=0.02)
    assert CARAFE(8, up=2, dtype=dtype)(x.to(dtype)).dtype == dtype


def test_unbatched():
    module = vivid(CARAFE(4, up=2).double())
    x = torch.randn(1, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(module(x[0]), module(x)[0])


def test_channels_last_in_channels_last_out():
    module = CARAFE(8, up=2).to(memory_format=torch.channels_last)
    x = torch.randn(2, 8, 6, 7)
    output = module(x.contiguous(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, module(x))


@factors
def test_without_data_it_tells_shapes(factor):
    x = torch.empty(2, 6, 7, 10)
    module = CARAFE(6, device="meta", **factor)
    output = module(x.to("meta"))
    assert output.is_meta
    made = module.to_empty(device="cpu")
    made.reset_parameters()
    assert output.shape == made(x).shape


def test_it_is_copied_pickled_and_printed(tmp_path):
    module = vivid(CARAFE(4, up=2, normalizer="sigmoid"))
    x = torch.randn(1, 4, 5, 5)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied(x), module(x))
    torch.save(module.state_dict(), tmp_path / "state")
    loaded = CARAFE(4, up=2, normalizer="sigmoid")
    loaded.load_state_dict(torch.load(tmp_path / "state"))
    assert torch.equal(loaded(x), module(x))
    assert "4, up=2, compressed_channels=64, normalizer='sigmoid'\n" in str(module)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (dict(channels=0), "channels must be at least 1; got 0."),
        (dict(up=0), "up must be at least 1; got 0."),
        (dict(down=-1), "down must be at least 1; got -1."),
        (dict(groups=0), "groups must be at least 1; got 0."),
        (dict(compressed_channels=0), "compressed_channels must be at least 1; got 0."),
        (dict(encoder_dilation=0), "encoder_dilation must be at least 1; got 0."),
        (dict(kernel_size=4), "kernel_size must be odd, from 1 to 31; got 4."),
        (dict(kernel_size=33), "kernel_size must be odd, from 1 to 31; got 33."),
        (dict(encoder_kernel_size=2), "encoder_kernel_size must be odd, from 1 to 31; got 2."),
        (dict(groups=3), "channels must be divisible by groups=3; got 8."),
        (
            dict(batch_norm=True, compressed_channels=None),
            "batch_norm must be False without a compressor; got True.",
        ),
        (dict(normalizer="relu"), "normalizer must be one of 'softmax', 'sigmoid', "),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_wrong_arguments(options, sentence):
    with pytest.raises(ValueError, match=r"^\[CARAFE\] ") as caught:
        CARAFE(**{"channels": 8, **options})
    assert sentence in str(caught.value)


# A network that learns


class Network(nn.Module):
    """Down and up by CARAFE++, with a skip connection of an odd size."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = CARAFE(16, down=2, batch_norm=True)
        self.middle = nn.Conv2d(16, 16, 3, padding=1)
        self.up = CARAFE(16, up=2)
        self.head = nn.Conv2d(16, 3, 1)

    def forward(self, x):
        skip = torch.relu(self.stem(x))
        x = torch.relu(self.middle(self.down(skip)))
        return self.head(self.up(x, size=skip.shape[2:]) + skip)


def losses(wrap=lambda network: network, dtype=None, steps=10):
    """The losses of a few steps of training, always from the same start."""
    torch.manual_seed(0)
    x, target = torch.randn(2, 3, 15, 17), torch.randn(2, 3, 15, 17)
    network = Network()
    run = wrap(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    found = []
    for _ in range(steps):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = nn.functional.mse_loss(run(x).float(), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_a_network_learns_the_same_eager_compiled_and_under_autocast():
    eager = losses()
    assert eager[-1] < 0.9 * eager[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own code
        compiled = losses(lambda network: torch.compile(network, fullgraph=True))
    np.testing.assert_allclose(compiled, eager, rtol=1e-5)
    np.testing.assert_allclose(losses(dtype=torch.bfloat16), eager, rtol=0.02)
