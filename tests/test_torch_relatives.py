"""Operators of other papers: the lines of docs/guides/relatives.md against their definitions."""

import doctest
import functools
import importlib
import itertools
import pickle
import re
import sys
import types
from math import isqrt
from pathlib import Path
from textwrap import indent

import pytest

from skips import import_or_skip, skip

torch = import_or_skip("torch")
nn, F = torch.nn, torch.nn.functional

import carafepp
from carafepp.torch import AdaptiveConv, Involution2d, adaptive_conv, convex_upsample, relatives
from torchvision_import import import_torchvision

PAGE = Path(__file__).parent.parent / "docs" / "guides" / "relatives.md"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Definitions, by functions of PyTorch


def taps(x, k, rows, columns, stride=1):
    """Each tap's features, for windows that begin at the corner of a padded map."""
    for a in range(k):
        for b in range(k):
            yield x[..., a : a + stride * rows : stride, b : b + stride * columns : stride]


def convex(flow, mask, factor, scale):
    """RAFT, appendix B: a softmax over the nine taps for each of factor x factor sub-pixels."""
    n, c, h, w = flow.shape
    weights = mask.view(n, 1, 9, factor, factor, h, w).softmax(2)
    neighbours = torch.stack(list(taps(F.pad(scale * flow, [1] * 4), 3, h, w)), 2)
    output = (weights * neighbours.view(n, c, 9, 1, 1, h, w)).sum(2)
    return output.permute(0, 1, 4, 2, 5, 3).reshape(n, c, factor * h, factor * w)


def context(disparity, weights):
    """IGEV-Stereo: the same with weights at full size, and no axis of channels in the result."""
    h, w = disparity.shape[2:]
    neighbours = torch.cat(list(taps(F.pad(disparity, [1] * 4), 3, h, w)), 1)
    return (F.interpolate(neighbours, scale_factor=4, mode="nearest") * weights).sum(1)


def adaptive(input, filters):
    """FeatUp: the caller has padded."""
    _, h, w, k, _ = filters.shape
    weights = filters.flatten(3).unbind(3)
    return sum(f[:, None] * x for f, x in zip(weights, taps(input, k, h, w), strict=True))


def filtered(x, kernels, groups=1, stride=1):
    """Kernels for every pixel and group, of a map with zeros beyond its borders."""
    kernels = kernels.unflatten(1, (groups, -1)).repeat_interleave(x.shape[1] // groups, 1)
    k = isqrt(kernels.shape[2])
    windows = taps(F.pad(x, [k // 2] * 4), k, *kernels.shape[3:], stride)
    return sum(f * x for f, x in zip(kernels.unbind(2), windows, strict=True))


def involution(module, x):
    """The layer of d-li14, by its parameters."""
    state = module.state_dict(keep_vars=True)
    names = ("running_mean", "running_var", "weight", "bias")
    norm = [state[f"conv1.bn.{name}"] for name in names]
    hidden = F.conv2d(F.avg_pool2d(x, module.stride), state["conv1.conv.weight"])
    hidden = F.batch_norm(hidden, *norm, training=module.training).relu()
    kernels = F.conv2d(hidden, state["conv2.conv.weight"], state["conv2.conv.bias"])
    return filtered(x, kernels, x.shape[1] // 16, module.stride)


# The page's lines: for each project what its code calls afterwards, the definition, and shapes


def lines_of(heading):
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (lines,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    return lines.replace('"cuda"', '"cpu"')


def run(heading):
    """Run the lines under a heading of the page, and return the names that they leave."""
    names = {}
    exec(lines_of(heading), names)
    return names


def function(heading, arguments, result):
    """Return the lines under a heading as a function."""
    lines = f"def function({arguments}):\n{indent(lines_of(heading), '    ')}    return {result}\n"
    names = {"carafepp": carafepp, "convex_upsample": convex_upsample}
    exec(lines, names)
    return names["function"]


def stand_in(monkeypatch, *names, **classes):
    """Put modules where a project has its own; the last one has the classes."""
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    vars(sys.modules[names[-1]]).update(classes)


def raft(monkeypatch):
    stand_in(monkeypatch, "raft", RAFT=type("RAFT", (), {}))
    upsample_flow = run("RAFT")["RAFT"]().upsample_flow
    return upsample_flow, lambda f, m: convex(f, m, 8, 8), [(2, 2, 3, 4), (2, 576, 3, 4)]


def raft_stereo(monkeypatch):
    model = type("RAFTStereo", (), {"args": types.SimpleNamespace(n_downsample=2)})
    stand_in(monkeypatch, "core", "core.raft_stereo", RAFTStereo=model)
    upsample_flow = run("RAFT-Stereo")["RAFTStereo"]().upsample_flow
    return upsample_flow, lambda f, m: convex(f, m, 4, 4), [(2, 2, 3, 4), (2, 144, 3, 4)]


def gmflow(_):
    lines = function("GMFlow", "self, flow, mask", "up_flow")
    upsample_flow = functools.partial(lines, types.SimpleNamespace(upsample_factor=8))
    return upsample_flow, lambda f, m: convex(f, m, 8, 8), [(1, 2, 3, 4), (1, 576, 3, 4)]


def sea_raft(monkeypatch):
    stand_in(monkeypatch, "raft", RAFT=type("RAFT", (), {}))
    upsample_data = run("SEA-RAFT")["RAFT"]().upsample_data

    def definition(flow, info, mask):
        return convex(flow, mask, 8, 8), convex(info, mask, 8, 1)

    return upsample_data, definition, [(1, 2, 3, 4), (1, 4, 3, 4), (1, 576, 3, 4)]


def droid_slam(_):
    def definition(data, mask):
        return convex(data.permute(0, 3, 1, 2), mask[0], 8, 1).permute(0, 2, 3, 1)

    return run("DROID-SLAM")["cvx_upsample"], definition, [(3, 4, 5, 1), (1, 3, 576, 4, 5)]


def igev_stereo(monkeypatch):
    stand_in(monkeypatch, "core", "core.igev_stereo")
    run("IGEV-Stereo")
    upsample = sys.modules["core.igev_stereo"].context_upsample
    return upsample, context, [(2, 1, 3, 4), (2, 9, 12, 16)]


def featup(monkeypatch):
    name = "featup.adaptive_conv_cuda.adaptive_conv"
    stand_in(monkeypatch, "featup", "featup.adaptive_conv_cuda", name)
    run("FeatUp")
    apply = importlib.import_module(name).AdaptiveConv.apply
    return apply, adaptive, [(2, 3, 8, 9), (2, 4, 5, 5, 5)]


def kpn(_):
    def definition(frames, kernels):
        return filtered(frames, kernels, groups=3).mean(1)

    lines = function("KPN", "frames, kernels", "denoised")
    return lines, definition, [(2, 3, 4, 5), (2, 3 * 25, 4, 5)]


def monte_carlo(_):
    def definition(image, logits):
        return filtered(image, logits.softmax(1))

    lines = function("Monte Carlo denoising", "image, logits", "denoised")
    return lines, definition, [(1, 3, 4, 5), (1, 21 * 21, 4, 5)]


def dynamic_filters(_):
    lines = function("Dynamic filter networks", "features, filters", "output")
    return lines, filtered, [(2, 3, 4, 5), (2, 49, 4, 5)]


def spatially_varying(_):
    lines = function("Spatially varying convolution", "features, filters", "output")
    return lines, functools.partial(filtered, groups=3), [(2, 3, 4, 5), (2, 27, 4, 5)]


PROJECTS = [
    *(raft, raft_stereo, gmflow, sea_raft, droid_slam, igev_stereo, featup),
    *(kpn, monte_carlo, dynamic_filters, spatially_varying),
]


class Called(nn.Module):
    """A function as a module, for an export."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *tensors):
        return self.function(*tensors)


def results(function, tensors):
    """Return the outputs of a function, and the gradients of a sum that weights each element."""
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    total = sum((y * torch.arange(y.numel()).view_as(y).cos()).sum() for y in outputs)
    return *outputs, *torch.autograd.grad(total, tensors)


@pytest.mark.parametrize("project", PROJECTS, ids=lambda project: project.__name__)
def test_each_line_computes_what_the_original_computes(project, monkeypatch):
    torch.compiler.reset()  # the limit of compilations is for all projects
    ours, definition, shapes = project(monkeypatch)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    expected = results(definition, tensors)
    torch.testing.assert_close(results(ours, tensors), expected, rtol=1e-11, atol=1e-11)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, tensors), expected, rtol=1e-11, atol=1e-11)
    exported = torch.export.export(Called(ours), tuple(tensors)).module()
    torch.testing.assert_close(results(exported, tensors), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.frameworks
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # in its imports
def test_raft_of_torchvision_gives_the_same():
    try:
        import_torchvision()
    except ImportError as error:
        skip("torchvision", str(error))
    from torchvision.models.optical_flow import raft, raft_large

    model = raft_large()
    images = torch.rand(2, 1, 3, 128, 136) * 2 - 1

    def train():
        model.zero_grad()
        flows = model(*images, num_flow_updates=3)
        sum(flow.square().mean() for flow in flows).backward()
        learned = [*model.mask_predictor.parameters(), *model.update_block.parameters()]
        return torch.stack(flows), [parameter.grad for parameter in learned]

    original = raft.upsample_flow
    expected = train()
    try:
        run("torchvision")
        assert raft.upsample_flow is not original
        found = train()
    finally:
        raft.upsample_flow = original
    assert expected[0].std() > 0.1
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    for f, e in zip(found[1], expected[1], strict=True):
        assert (f - e).abs().max() <= 1e-3 * e.abs().max()


# convex_upsample


def test_convex_upsampling_in_every_layout_and_without_a_batch():
    flow, mask = torch.randn(2, 3, 4, 5), torch.randn(2, 9 * 4, 4, 5)
    expected = convex(flow, mask, 2, 1.5)
    layouts = {"NCHW": flow, "NHWC": flow.movedim(1, -1).contiguous()}
    for layout, given in layouts.items():
        output = convex_upsample(given, mask, 2, 1.5, layout=layout)
        assert output.is_contiguous()
        output = output if layout == "NCHW" else output.movedim(-1, 1)
        torch.testing.assert_close(output, expected)
        one = convex_upsample(given[1], mask[1], factor=2, scale=1.5, layout=layout)
        one = one if layout == "NCHW" else one.movedim(-1, 0)
        torch.testing.assert_close(one, expected[1])
    output = convex_upsample(flow.to(memory_format=torch.channels_last), mask, 2, 1.5)
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_convex_upsampling_multiplies_the_small_map_or_nothing():
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append((function.name(), args[0].shape))
            return function(*args, **(kwargs or {}))

    flow, mask = torch.randn(1, 2, 3, 4), torch.randn(1, 576, 3, 4)
    with Seen():
        convex_upsample(flow, mask, scale=1)
        convex_upsample(flow, mask)
    assert seen == [
        ("carafepp::reassemble_with_logits", flow.shape),
        ("aten::mul.Tensor", flow.shape),
        ("carafepp::reassemble_with_logits", flow.shape),
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flow_keeps_its_precision_beside_masks_of_16_bits(dtype):
    """Networks of 16 bits and autocast: a displacement of 200.3 is not a number of 16 bits."""
    flow, mask = torch.full((1, 2, 5, 6), 200.3), torch.zeros(1, 9 * 16, 5, 6, dtype=dtype)
    for kernels in (mask, mask.float()):
        for enabled in (False, True):
            with torch.autocast("cpu", dtype, enabled=enabled):
                output = convex_upsample(flow, kernels, 4)
            assert output.dtype == torch.float32
            torch.testing.assert_close(output[0, 0, 10, 12], torch.tensor(801.2))
    assert convex_upsample(flow.to(dtype), mask, 4).dtype == dtype


def test_igevs_line_keeps_the_precision_of_disparities_under_autocast(monkeypatch):
    upsample, _, (shape, weights) = igev_stereo(monkeypatch)
    with torch.autocast("cpu", torch.bfloat16):
        output = upsample(torch.full(shape, 200.3), torch.full(weights, 1 / 9))
    torch.testing.assert_close(output[0, 5, 6], torch.tensor(200.3))


def test_an_export_keeps_flow_out_of_autocast():
    class Network(nn.Module):
        def forward(self, flow, mask):
            with torch.autocast("cpu", torch.bfloat16):
                return convex_upsample(flow, mask.bfloat16(), 2)

    flow, mask = torch.randn(1, 2, 3, 4), torch.randn(1, 36, 3, 4)
    for strict in (True, False):
        exported = torch.export.export(Network(), (flow, mask), strict=strict).module()
        assert exported(flow, mask).dtype == torch.float32


def test_without_data_they_tell_shapes():
    flow, mask = torch.empty(2, 3, 4, 5, device="meta"), torch.empty(2, 36, 4, 5, device="meta")
    assert convex_upsample(flow, mask, 2).shape == (2, 3, 8, 10)
    filters = torch.empty(2, 2, 3, 3, 3, device="meta")
    assert adaptive_conv(flow, filters).shape == (2, 3, 2, 3)


# adaptive_conv


def test_filters_are_read_where_they_are(monkeypatch):
    input, taps_first = torch.randn(2, 3, 6, 7), torch.randn(2, 9, 4, 5)
    layouts = {
        "contiguous": torch.randn(2, 4, 5, 3, 3),
        "FeatUp's": taps_first.permute(0, 2, 3, 1).reshape(2, 4, 5, 3, 3),
        "every other": torch.randn(2, 8, 5, 3, 3)[:, ::2],
    }
    received = []
    original = relatives.ops.reassemble

    def reassemble(features, masks, **options):
        received.append(masks)
        return original(features, masks, **options)

    monkeypatch.setattr(relatives.ops, "reassemble", reassemble)
    for filters in layouts.values():
        output = adaptive_conv(input, filters)
        assert received[-1].data_ptr() == filters.data_ptr()
        torch.testing.assert_close(output, adaptive(input, filters))
        torch.testing.assert_close(adaptive_conv(input[1], filters[1]), output[1])
    transposed = layouts["contiguous"].transpose(3, 4)
    torch.testing.assert_close(adaptive_conv(input, transposed), adaptive(input, transposed))


def test_featup_upsamples_by_it():
    """The joint bilateral upsampler: reflected borders, filters with the taps as channels."""
    source, kernels = torch.randn(1, 6, 8, 10), torch.randn(1, 49, 8, 10).softmax(1)
    padded = F.pad(source, [3] * 4, mode="reflect")
    output = AdaptiveConv.apply(padded, kernels.permute(0, 2, 3, 1).reshape(1, 8, 10, 7, 7))
    windows = F.unfold(padded, 7).view(1, 6, 49, 8, 10)
    torch.testing.assert_close(output, (windows * kernels[:, None]).sum(2))


# Involution2d


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(("kernel_size", "stride"), [(7, 1), (7, 2), (3, 3)])
def test_involution_is_the_authors_layer(kernel_size, stride, training):
    module = Involution2d(32, kernel_size, stride).double()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.rand(tensor.shape) + 0.5)
    keys = {
        "conv1.conv.weight": (8, 32, 1, 1),
        **dict.fromkeys(("conv1.bn.weight", "conv1.bn.bias"), (8,)),
        **dict.fromkeys(("conv1.bn.running_mean", "conv1.bn.running_var"), (8,)),
        "conv1.bn.num_batches_tracked": (),
        "conv2.conv.weight": (2 * kernel_size**2, 8, 1, 1),
        "conv2.conv.bias": (2 * kernel_size**2,),
    }
    assert {name: tuple(value.shape) for name, value in module.state_dict().items()} == keys
    assert isinstance(pickle.loads(pickle.dumps(module)), Involution2d)
    module.train(training)
    x = torch.randn(2, 32, 7, 9, dtype=torch.float64, requires_grad=True)
    tensors = [x, *module.parameters()]
    expected = results(lambda x, *_: involution(module, x), tensors)
    assert expected[0].shape == (2, 32, 7 // stride, 9 // stride)
    functions = [module, torch.compile(module, fullgraph=True, backend="aot_eager")]
    for function in functions:
        found = results(lambda x, *_, call=function: call(x), tensors)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_the_line_of_involution_imports_the_layer():
    assert run("involution")["involution"] is Involution2d


def test_involution_is_recorded_for_other_sizes():
    module = Involution2d(16, 3, 2).eval()
    x, dim = torch.randn(1, 16, 8, 12), torch.export.Dim
    shapes = {2: dim("h", min=4, max=99), 3: dim("w", min=4, max=99)}
    graphs = [
        torch.export.export(module, (x,), dynamic_shapes=(shapes,)).module(),
        torch.jit.trace(module, x),
        torch.fx.symbolic_trace(module),
    ]
    x = torch.randn(1, 16, 11, 9)
    for graph in graphs:
        torch.testing.assert_close(graph(x), module(x))


def test_involution_begins_as_the_authors():
    """mmcv's ConvModule: He's numbers for the outputs of a layer with ReLU, biases 0."""
    module = Involution2d(512, 7)
    for layer, outputs in ((module.conv1.conv, 128), (module.conv2.conv, 32 * 49)):
        assert layer.weight.std().item() == pytest.approx((2 / outputs) ** 0.5, rel=0.02)
    assert module.conv1.conv.bias is None
    assert not module.conv2.conv.bias.any()


# Graphs, and wrong arguments


def test_graphs_go_on_with_other_sizes():
    class Network(nn.Module):
        def forward(self, flow, mask, filters):
            padded = F.pad(flow, [2] * 4, mode="replicate")
            return adaptive_conv(padded, filters), convex_upsample(flow, mask, 2)

    def inputs(n, h, w):
        shapes = (n, 2, h, w), (n, 36, h, w), (n, h, w, 5, 5)
        return tuple(torch.randn(shape) for shape in shapes)

    network, dim = Network(), torch.export.Dim
    h, w = dim("h", min=4, max=99), dim("w", min=4, max=99)
    shapes = {2: h, 3: w}, {2: h, 3: w}, {1: h, 2: w}
    graphs = [
        torch.export.export(network, inputs(1, 5, 6), dynamic_shapes=shapes).module(),
        torch.jit.trace(network, inputs(1, 5, 6)),
        torch.fx.symbolic_trace(network),
    ]
    given = inputs(1, 7, 9)
    for graph in graphs:
        torch.testing.assert_close(tuple(graph(*given)), network(*given))


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (lambda flow, mask: convex_upsample(flow, mask, 2), [(1, 2, 3, 4), (1, 36, 3, 4)]),
        (adaptive_conv, [(1, 2, 5, 6), (1, 3, 4, 3, 3)]),
    ],
    ids=["convex_upsample", "adaptive_conv"],
)
def test_derivatives_in_both_modes_and_vmap(function, shapes):
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(function, tensors, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)
    several = [torch.randn(3, *shape) for shape in shapes]
    expected = torch.stack([function(*each) for each in zip(*several, strict=True)])
    torch.testing.assert_close(torch.vmap(function)(*several), expected)


FLOW, MASK = torch.zeros(1, 2, 3, 4), torch.zeros(1, 576, 3, 4)
INPUT, FILTERS = torch.zeros(1, 2, 5, 6), torch.zeros(1, 3, 4, 3, 3)


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda: convex_upsample(FLOW.numpy(), MASK),
            TypeError,
            "[convex_upsample] flow must be a PyTorch tensor; got ndarray.",
        ),
        (
            lambda: convex_upsample(FLOW, None),
            TypeError,
            "[convex_upsample] mask must be a PyTorch tensor; got NoneType.",
        ),
        (
            lambda: convex_upsample(FLOW.int(), MASK),
            TypeError,
            "[convex_upsample] flow must be float32, float64, float16 or bfloat16; "
            "got torch.int32.",
        ),
        (
            lambda: convex_upsample(FLOW, MASK.to("meta")),
            ValueError,
            "[convex_upsample] mask must be on the device of flow (cpu); got meta.",
        ),
        (
            lambda: convex_upsample(FLOW[0, 0], MASK),
            ValueError,
            "[convex_upsample] flow must have shape (N, C, H, W) or (C, H, W); got (3, 4).",
        ),
        (
            lambda: convex_upsample(FLOW[None], MASK, layout="NHWC"),
            ValueError,
            "[convex_upsample] flow must have shape (N, H, W, C) or (H, W, C); "
            "got (1, 1, 2, 3, 4).",
        ),
        (
            lambda: convex_upsample(FLOW, MASK, 4),
            ValueError,
            "[convex_upsample] mask must have shape (N, 9*factor**2, H, W) = (1, 144, 3, 4); "
            "got (1, 576, 3, 4).",
        ),
        (
            lambda: convex_upsample(FLOW, MASK, layout="NHWC"),
            ValueError,
            "[convex_upsample] mask must have shape (N, 9*factor**2, H, W) = (1, 576, 2, 3); "
            "got (1, 576, 3, 4).",
        ),
        (
            lambda: convex_upsample(FLOW[0], MASK),
            ValueError,
            "[convex_upsample] mask must have shape (9*factor**2, H, W) = (576, 3, 4); "
            "got (1, 576, 3, 4).",
        ),
        (
            lambda: convex_upsample(FLOW, MASK, 8.0),
            TypeError,
            "[convex_upsample] factor must be a positive integer; got 8.0 (float).",
        ),
        (
            lambda: convex_upsample(FLOW, MASK, 0),
            ValueError,
            "[convex_upsample] factor must be at least 1; got 0.",
        ),
        (
            lambda: convex_upsample(FLOW, MASK, scale="8"),
            TypeError,
            "[convex_upsample] scale must be a number; got '8' (str).",
        ),
        (
            lambda: convex_upsample(FLOW, MASK, scale=True),
            TypeError,
            "[convex_upsample] scale must be a number; got True (bool).",
        ),
        (
            lambda: convex_upsample(FLOW, MASK, layout="nhwc"),
            ValueError,
            "[convex_upsample] layout must be 'NCHW' or 'NHWC'; got 'nhwc'.",
        ),
        (
            lambda: adaptive_conv([1.0], FILTERS),
            TypeError,
            "[adaptive_conv] input must be a PyTorch tensor; got list.",
        ),
        (
            lambda: adaptive_conv(INPUT[0, 0], FILTERS),
            ValueError,
            "[adaptive_conv] input must have shape (N, C, H+K-1, W+K-1) or (C, H+K-1, W+K-1); "
            "got (5, 6).",
        ),
        (
            lambda: adaptive_conv(INPUT, FILTERS.flatten(3)),
            ValueError,
            "[adaptive_conv] filters must have shape (N, H, W, K, K) with an odd K, from 1 to 31, "
            "for an input of shape (N, C, H+K-1, W+K-1); got (1, 3, 4, 9).",
        ),
        (
            lambda: adaptive_conv(INPUT, torch.zeros(1, 4, 5, 2, 2)),
            ValueError,
            "[adaptive_conv] filters must have shape (N, H, W, K, K) with an odd K, from 1 to 31, "
            "for an input of shape (N, C, H+K-1, W+K-1); got (1, 4, 5, 2, 2).",
        ),
        (
            lambda: torch.compile(adaptive_conv, backend="eager")(
                INPUT, FILTERS.reshape(1, 3, 4, 1, 9)
            ),
            ValueError,
            "[adaptive_conv] filters must have shape (N, H, W, K, K) with an odd K, from 1 to 31, "
            "for an input of shape (N, C, H+K-1, W+K-1); got (1, 3, 4, 1, 9).",
        ),
        (
            lambda: adaptive_conv(INPUT[..., 1:-1, 1:-1], FILTERS),
            ValueError,
            "[adaptive_conv] input must have shape (N, C, H+K-1, W+K-1) = (1, C, 5, 6) for filters "
            "of shape (N, H, W, K, K) = (1, 3, 4, 3, 3); got (1, 2, 3, 4).",
        ),
        (
            lambda: adaptive_conv(INPUT[0, :, 1:], FILTERS[0]),
            ValueError,
            "[adaptive_conv] input must have shape (C, H+K-1, W+K-1) = (C, 5, 6) for filters of "
            "shape (H, W, K, K) = (3, 4, 3, 3); got (2, 4, 6).",
        ),
        (
            lambda: adaptive_conv(INPUT, FILTERS.double()),
            TypeError,
            "[adaptive_conv] filters must have the dtype of input, torch.float32; "
            "got torch.float64.",
        ),
        (
            lambda: adaptive_conv(INPUT.half(), FILTERS.bfloat16()),
            TypeError,
            "[adaptive_conv] filters must have the dtype of input, torch.float16, or "
            "torch.float32; got torch.bfloat16.",
        ),
        (
            lambda: torch.autocast("cpu")(adaptive_conv)(INPUT.double(), FILTERS),
            TypeError,
            "[adaptive_conv] filters must have the dtype of input, torch.float64; "
            "got torch.float32.",
        ),
        (
            lambda: Involution2d(24, 7),
            ValueError,
            "[Involution2d] channels must be divisible by group_channels=16; got 24.",
        ),
        (
            lambda: Involution2d(32, 4),
            ValueError,
            "[Involution2d] kernel_size must be odd, from 1 to 31; got 4.",
        ),
        (
            lambda: Involution2d(32, 7, 2.0),
            TypeError,
            "[Involution2d] stride must be a positive integer; got 2.0 (float).",
        ),
    ],
    ids=itertools.count(),
)
def test_wrong_arguments(call, error, sentence):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == sentence


def test_the_examples():
    assert doctest.testmod(relatives).failed == 0
