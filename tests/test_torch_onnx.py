"""Exports to ONNX: standard operators, and the numbers of carafepp in ONNX Runtime and OpenVINO."""

import io
import warnings

import numpy as np
import pytest

import carafepp
from skips import import_or_skip

INSTALL = "pip install onnx onnxscript onnxruntime"
torch = import_or_skip("torch")
onnx = import_or_skip("onnx", INSTALL)
import_or_skip("onnxscript", INSTALL)
onnxruntime = import_or_skip("onnxruntime", INSTALL)

from carafepp.torch import CARAFE, convex_upsample, operators
from carafepp.torch.mmcv import CARAFEPack
from carafepp.torch.models import ResNet, UperNet

if operators._SingleLevelFunction is None:
    pytest.skip("this PyTorch lacks private names", allow_module_level=True)

DYNAMIC = torch.export.Dim.DYNAMIC
pytestmark = [
    # The exporter and ONNX use what Python and PyTorch have deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class OfFunctions(torch.nn.Module):
    """The functions, and no module of carafepp."""

    def forward(self, features):
        logits = features.repeat(1, 9, 1, 1)
        masks = carafepp.normalize_masks(logits, up=2, groups=2, kernel_size=3)
        output = carafepp.reassemble(features, masks, up=2, groups=2)
        return carafepp.reassemble(output, masks[:, :, 2:], groups=2, padding=(0, 1))


class Flow(torch.nn.Module):
    """RAFT's upsampling of a flow, with the masks that a network predicts."""

    def __init__(self):
        super().__init__()
        self.masks = torch.nn.Conv2d(8, 9 * 8 * 8, 1)

    def forward(self, x):
        return convex_upsample(x[:, :2], self.masks(x))


def exported(module, x, sizes=None, **options):
    """Return the file that PyTorch's exporter makes."""
    shapes = None if sizes is None else (sizes,)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module, (x,), dynamo=True, dynamic_shapes=shapes, verbose=False, **options
        )
    file = io.BytesIO()
    program.save(file)
    return file.getvalue()


def in_onnxruntime(file, x):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]


def in_openvino(file, x):
    openvino = import_or_skip("openvino", "pip install openvino")
    core = openvino.Core()
    precise = {"INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(core.read_model(io.BytesIO(file)), "CPU", precise)([x.numpy()])[0]


def check(module, x, sizes=None, other=None, runtime=in_onnxruntime, tolerance=1e-5, **options):
    """Export, and compare with PyTorch for x and for the other size."""
    file = exported(module, x, sizes, **options)
    graph = onnx.load_from_string(file)
    assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    for given in (x, other):
        if given is not None:
            with torch.no_grad():
                expected = module(given).numpy()
            result = runtime(file, given)
            assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
            np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)
    return graph


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


SMALL = {"compressed_channels": 4}
MODULES = {
    "up2": {"up": 2},
    "down2": {"down": 2},
    "ratio": {"up": 3, "down": 2, "kernel_size": 3},
    "groups": {"up": 2, "groups": 4, "normalizer": "sigmoid_normalized", "kernel_size": 3},
    "sigmoid": {"up": 4, "normalizer": "sigmoid", "kernel_size": 3},
    "none": {"normalizer": "none", "kernel_size": 7},
    "reflect": {"up": 2, "padding_mode": "reflect"},
}


def test_a_module_becomes_standard_operators():
    module = CARAFE(8, up=2, **SMALL).eval()
    check(module, torch.randn(1, 8, 6, 7), {2: DYNAMIC, 3: DYNAMIC}, torch.randn(1, 8, 9, 4))


def test_so_do_functions():
    check(OfFunctions(), torch.randn(2, 8, 6, 7))


def test_an_exported_program_is_exported():
    module, x = CARAFE(8, down=2, **SMALL).eval(), torch.randn(1, 8, 6, 7)
    file = exported(torch.export.export(module, (x,)), None)
    np.testing.assert_allclose(in_onnxruntime(file, x), module(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", [in_onnxruntime, in_openvino])
@pytest.mark.parametrize("sizes", [None, {2: DYNAMIC, 3: DYNAMIC}], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", MODULES)
def test_modules(name, sizes, runtime):
    module = CARAFE(8, **SMALL, **MODULES[name]).eval()
    other = None if sizes is None else torch.randn(1, 8, 9, 13)
    check(module, torch.randn(1, 8, 10, 12), sizes, other, runtime)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", [in_onnxruntime, in_openvino])
def test_a_segmentation_network(runtime):
    backbone = ResNet((1, 1, 1, 1), width=8, num_classes=None, downsampler="carafe")
    network = UperNet(backbone, num_classes=5, channels=16).eval()
    check(network, torch.randn(1, 3, 64, 96), runtime=runtime)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", [in_onnxruntime, in_openvino])
def test_rafts_upsampling(runtime):
    other = torch.randn(1, 8, 9, 5)
    check(Flow().eval(), torch.randn(1, 8, 6, 7), {2: DYNAMIC, 3: DYNAMIC}, other, runtime)


@pytest.mark.slow
@pytest.mark.parametrize("runtime", [in_onnxruntime, in_openvino])
def test_mmcvs_pack(runtime):
    check(CARAFEPack(8, 2).eval(), torch.randn(1, 8, 6, 7), runtime=runtime)


@pytest.mark.slow
def test_float16():
    module = CARAFE(8, up=2, **SMALL).eval().half()
    check(module, torch.randn(1, 8, 6, 7).half(), tolerance=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 21, 23])
def test_opsets(opset):
    graph = check(CARAFE(8, up=2, **SMALL).eval(), torch.randn(1, 8, 6, 7), opset_version=opset)
    assert graph.opset_import[0].version == opset
