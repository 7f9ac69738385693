"""The module of carafepp.torch: what it computes, and that it behaves as PyTorch's modules do."""

import copy
import pickle
import warnings

import numpy as np
import pytest

import reference as ref
from skips import import_or_skip

torch = import_or_skip("torch")
nn = torch.nn

from carafepp.torch import CARAFE

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
def test_it_is_the_composition_of_the_paper(factor, options):
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


# padding and padding_mode


def reassembled(module, x, padding, mode, size, logits):
    """The definition, by PyTorch's functions: a padded map, its windows, masks from logits."""
    k, (rows, columns) = module.kernel_size, padding
    widths = (columns, columns, rows, rows)
    padded = nn.functional.pad(x, widths, mode="constant" if mode == "zeros" else mode)
    masks = ref.normalize(logits.detach().numpy(), up=module.up, groups=module.groups, size=size)
    masks = torch.from_numpy(masks).unflatten(1, (module.groups, 1, k, k))
    rows, columns = (torch.arange(n) * module.down // module.up for n in size)
    windows = padded.unfold(2, k, 1).unfold(3, k, 1)[:, :, rows][:, :, :, columns]
    windows = windows.unflatten(1, (module.groups, -1)).movedim((-2, -1), (3, 4))
    return (masks * windows).sum((3, 4)).flatten(1, 2)


def cropped_logits(module, x, padding):
    """The content encoder on the compressed features that are centres of windows."""
    top, left = (module.kernel_size // 2 - width for width in padding)
    h, w = x.shape[2:]
    compressed = module.channel_compressor(x)[:, :, top : h - top, left : w - left]
    return module.content_encoder(compressed)


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [None, 2, (0, 1)], ids=str)
@factors
def test_padding_is_that_of_a_convolution(factor, padding, mode):
    options = dict(padding=padding, padding_mode=mode, groups=2)
    module = vivid(CARAFE(6, **options, **factor).double())
    pair = (0, 1) if padding == (0, 1) else (2, 2)
    x = torch.randn(2, 6, 7, 10, dtype=torch.float64, requires_grad=True)
    h, w = 7 - 4 + 2 * pair[0], 10 - 4 + 2 * pair[1]
    size = ref.output_size(h, w, module.up, module.down)
    if not module.ceil_mode:
        size = h * module.up // module.down, w * module.up // module.down
    logits = cropped_logits(module, x, pair)
    expected = reassembled(module, x, pair, mode, size, logits)
    output = module(x)
    torch.testing.assert_close(output, expected)
    assert module.masks(x).shape[2:] == size
    cropped = module(x, size=(size[0] - 1, size[1]))
    torch.testing.assert_close(cropped, expected[:, :, :-1])


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [None, (1, 0)], ids=str)
def test_a_size_beyond_the_natural_one_continues_the_padding(padding, mode):
    module = vivid(CARAFE(4, up=3, down=2, padding=padding, padding_mode=mode).double())
    pair = padding or (2, 2)
    x = torch.randn(1, 4, 9, 8, dtype=torch.float64)
    natural = ref.output_size(5 + 2 * pair[0], 4 + 2 * pair[1], 3, 2)
    size = natural[0] + 2, natural[1] + 1
    logits = nn.functional.pad(module.logits(x), (0, 1, 0, 1), mode="replicate")
    widths = (pair[1], pair[1] + 2, pair[0], pair[0] + 2)
    padded = nn.functional.pad(x, widths, mode="constant" if mode == "zeros" else mode)
    expected = reassembled(module, padded, (0, 0), "zeros", size, logits)
    torch.testing.assert_close(module(x, size=size), expected)
    assert module.masks(x, size=size).shape[2:] == size
    with pytest.raises(ValueError, match=rf"the natural size \({natural[0]}, {natural[1]}\)"):
        module(x, size=(size[0] + 1, size[1]))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_has_gradients_and_keeps_the_memory_format_and_the_rank(mode):
    options = dict(up=2, kernel_size=3, padding=(1, 0), padding_mode=mode)
    module = vivid(CARAFE(2, **options).double())
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), check_forward_ad=True)
    output = module(x.detach().to(memory_format=torch.channels_last))
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, module(x))
    torch.testing.assert_close(module(x[0]), module(x)[0])
    for order in (torch.contiguous_format, torch.channels_last):
        outputs = torch.func.vmap(module)(x.detach().to(memory_format=order)[None])
        torch.testing.assert_close(outputs[0], module(x))


def test_padding_changes_no_parameter_and_old_modules_load():
    module = vivid(CARAFE(4, up=2, padding=1, padding_mode="reflect"))
    assert "4, up=2, compressed_channels=64, padding=(1, 1), padding_mode='reflect'" in str(module)
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert str(copied) == str(module)
    plain = CARAFE(4, up=2)
    assert "padding" not in str(plain).partition("(channel_compressor)")[0]
    plain.load_state_dict(module.state_dict())
    x = torch.randn(1, 4, 5, 5)
    expected = plain(x)
    for name in ("padding", "padding_mode"):
        vars(plain).pop(name, None)  # as in a pickle of an earlier version
    assert torch.equal(pickle.loads(pickle.dumps(plain))(x), expected)
    same = CARAFE(4, up=2, padding=2)
    same.load_state_dict(plain.state_dict())
    assert torch.equal(same(x), expected)


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


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("factor", [dict(up=2), dict(up=4), dict(up=3, down=2)], ids=str)
def test_a_size_beyond_the_natural_one_repeats_the_last_logits(factor, batched):
    """Decoders whose encoder rounded down: 27 to 13, and back to 27."""
    module = vivid(CARAFE(4, **factor).double())
    x = torch.randn(1, 4, 7, 6, dtype=torch.float64)
    up, down = module.up, module.down
    natural = ref.output_size(7, 6, up, down)
    repeated = nn.functional.pad(module.logits(x), (0, 1, 0, 1), mode="replicate")
    for more in [(up - 1, up - 1), (1, 0), (0, 1)]:
        h, w = size = natural[0] + more[0], natural[1] + more[1]
        masks = ref.normalize(repeated.detach().numpy(), up=up)[..., :h, :w]
        zeros_behind = nn.functional.pad(x, (0, down, 0, down)).numpy()
        expected = ref.reassemble(zeros_behind, masks, up=up, down=down)
        x_ = x if batched else x[0]
        output = module(x_, size=size).detach().reshape(expected.shape)
        np.testing.assert_allclose(output.numpy(), expected, rtol=1e-9, atol=1e-11)
        found = module.masks(x_, size=size).detach().reshape(masks.shape)
        np.testing.assert_allclose(found.numpy(), masks, rtol=1e-9, atol=1e-12)
        whole = module(x)
        torch.testing.assert_close(output[..., : natural[0], : natural[1]], whole)


def test_a_size_beyond_the_natural_one_has_gradients_and_keeps_the_memory_format():
    module = vivid(CARAFE(2, up=2, kernel_size=3).double())
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, size=(7, 9)), (x,))
    last = x.detach().to(memory_format=torch.channels_last)
    assert module(last, size=(7, 9)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(8, 6), (6, 8), (-1, 6)], ids=str)
def test_sizes_out_of_range(size):
    for call in (CARAFE(4, up=2), CARAFE(4, up=2).masks):
        with pytest.raises(ValueError, match=r"^\[CARAFE\] size must be from \(0, 0\) to \(7, 7\)"):
            call(torch.zeros(1, 4, 3, 3), size=size)


def test_a_size_is_a_pair_of_integers_in_any_sequence():
    module, x = CARAFE(4, up=2), torch.zeros(1, 4, 3, 3)
    for size in (
        *([5, 6], np.array([5, 6]), torch.tensor([5, 6]), x.new_zeros(5, 6).shape),
        (np.int64(5), np.uint8(6)),
    ):
        assert module(x, size=size).shape == (1, 4, 5, 6)
        assert module.masks(x, size=size).shape == (1, 25, 5, 6)
    assert module(x, size=(0, 0)).shape == (1, 4, 0, 0)
    wrong = [0, 5, (), (5,), (5, 6, 7), False, (True, 6), (5.0, 6), "56", {5, 6}, {5: 6, 6: 5}]
    wrong += [np.array([5.0, 6.0]), np.zeros((2, 2), int), (torch.tensor(5), 6), iter((5, 6))]
    for size in wrong:
        for call in (module, module.masks):
            with pytest.raises(TypeError, match=r"^\[CARAFE\] size must be a pair \(H', W'\) of"):
                call(x, size=size)


@factors
def test_gradients(factor):
    module = vivid(CARAFE(2, kernel_size=3, compressed_channels=2, **factor).double())
    x = torch.randn(1, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*module.named_parameters(), strict=True)

    def function(x, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))

    inputs = x, *parameters
    assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True, fast_mode=True)


@pytest.mark.parametrize("name", ["up", "down", "channels", "compressed_channels"])
def test_numbers_beyond_31_bits_are_refused(name):
    numbers = {"channels": 8, name: 2**31}
    with pytest.raises(
        ValueError, match=rf"^\[CARAFE\] {name} must be below 2\*\*31; got 2147483648"
    ):
        CARAFE(**numbers)


def test_masks_can_be_learnt_from():
    module = vivid(CARAFE(2, up=2, kernel_size=3).double())
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module.masks, (x,), check_forward_ad=True)


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
        (dict(padding=3), "padding must be from 0 to kernel_size // 2 = 2; got (3, 3)."),
        (dict(padding=(0, -1)), "padding must be from 0 to kernel_size // 2 = 2; got (0, -1)."),
        (
            dict(padding_mode="symmetric"),
            "padding_mode must be one of 'zeros', 'reflect', 'replicate', 'circular'; "
            "got 'symmetric'.",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_wrong_arguments(options, sentence):
    with pytest.raises(ValueError, match=r"^\[CARAFE\] ") as caught:
        CARAFE(**{"channels": 8, **options})
    assert sentence in str(caught.value)


@pytest.mark.parametrize("value", [2.0, 1.5, (2, 1), "2", True, None, torch.tensor(2)], ids=repr)
def test_numbers_that_are_no_integers(value):
    arguments = ["channels", "up", "down", "groups", "encoder_dilation"]
    arguments += ["compressed_channels"] * (value is not None)
    for name in arguments:
        with pytest.raises(TypeError) as caught:
            CARAFE(**{"channels": 8, name: value})
        expected = f"[CARAFE] {name} must be a positive integer; got {value!r} "
        assert str(caught.value) == f"{expected}({type(value).__name__})."
    for name in ("kernel_size", "encoder_kernel_size"):
        with pytest.raises(TypeError, match=rf"^\[CARAFE\] {name} must be an odd integer, from 1"):
            CARAFE(8, **{name: value})


def test_integers_of_other_libraries():
    module = CARAFE(np.int64(8), up=np.uint8(2), kernel_size=np.array(3))
    assert str(module) == str(CARAFE(8, up=2, kernel_size=3))
    assert module(torch.zeros(1, 8, 3, 3)).shape == (1, 8, 6, 6)


def test_parameters_of_a_synchronised_batch_norm_are_reset():
    module = nn.SyncBatchNorm.convert_sync_batchnorm(CARAFE(4, up=2, batch_norm=True))
    norm = vivid(module).channel_compressor[1]
    norm.running_mean += 1
    module.reset_parameters()
    assert isinstance(norm, nn.SyncBatchNorm)
    assert (norm.weight == 1).all()
    assert not norm.bias.any()
    assert not norm.running_mean.any()


# Graphs


class Decoder(nn.Module):
    """A module that goes down, and up to a size that a shape alone tells."""

    def __init__(self, up, method="__call__", **down):
        super().__init__()
        self.down, self.up, self.method = CARAFE(4, **down), up, method

    def forward(self, x):
        return getattr(self.up, self.method)(self.down(x), size=x.shape[-2:])


DECODERS = [
    pytest.param(lambda: Decoder(CARAFE(4, up=2), down=2), id="crop"),
    pytest.param(lambda: Decoder(CARAFE(4, up=2), down=2, ceil_mode=False), id="beyond"),
    pytest.param(lambda: Decoder(CARAFE(4, up=2), "masks", down=2, ceil_mode=False), id="masks"),
    pytest.param(lambda: CARAFE(4, up=2, down=3, ceil_mode=False), id="floor"),
    pytest.param(lambda: CARAFE(4, up=2, padding=(1, 0)), id="padding"),
    pytest.param(
        lambda: Decoder(CARAFE(4, up=2, padding_mode="reflect"), down=2, ceil_mode=False),
        id="reflect",
    ),
    pytest.param(
        lambda: CARAFE(4, down=2, padding=1, padding_mode="circular", ceil_mode=False),
        id="circular",
    ),
]
decoders = pytest.mark.parametrize("make", DECODERS)


def check_other_sizes(graph, module):
    for size in [(12, 12), (13, 15), (8, 9)]:
        x = torch.randn(2, 4, *size)
        torch.testing.assert_close(graph(x), module(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.parametrize("size", [(12, 12), (11, 15)], ids=str)
@decoders
def test_a_traced_module_goes_on_with_other_sizes(make, size):
    module = make()
    check_other_sizes(torch.jit.trace(module, torch.randn(1, 4, *size)), module)


@decoders
def test_an_exported_module_goes_on_with_other_sizes(make):
    module, dim = make(), torch.export.Dim
    shapes = {2: dim("h", min=8, max=99), 3: dim("w", min=8, max=99)}
    x = torch.randn(2, 4, 11, 15)
    exported = torch.export.export(module, (x,), dynamic_shapes=(shapes,))
    check_other_sizes(exported.module(), module)


@decoders
def test_fx_traces_through_the_module(make):
    module = make()
    check_other_sizes(torch.fx.symbolic_trace(module), module)


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
        warnings.simplefilter("ignore")  # the compiler's own code warns
        compiled = losses(lambda network: torch.compile(network, fullgraph=True))
    np.testing.assert_allclose(compiled, eager, rtol=1e-5)
    np.testing.assert_allclose(losses(dtype=torch.bfloat16), eager, rtol=0.02)
