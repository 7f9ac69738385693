"""Compositions compute what the operators do, with operators of PyTorch alone."""

import warnings

import numpy as np
import pytest

import carafepp
from cases import FEW, Dtypes, random_arrays
from cases.calls import FUNCTIONS, arguments, call
from skips import import_or_skip

torch = import_or_skip("torch")

from carafepp.torch import CARAFE, decompositions, operators

if operators._SingleLevelFunction is None:
    pytest.skip("this PyTorch lacks private names", allow_module_level=True)

FLOAT64 = Dtypes("float64", "float64")


@pytest.fixture
def elsewhere(monkeypatch):
    """CPU tensors count as tensors of a device that has no kernels."""
    monkeypatch.setattr(operators, "_DEVICES", ("meta",))
    monkeypatch.setattr(operators, "_knows_plain", False)
    operators._warn_of_device.cache_clear()


@pytest.fixture
def composed(elsewhere):
    """The same, without the warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        operators._warn_of_device("cpu")


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("normalizer", ["softmax", "sigmoid", "sigmoid_normalized", "none"])
@pytest.mark.parametrize("case", FEW, ids=lambda case: case.name)
def test_they_compute_the_definition(composed, case, normalizer, function):
    arrays, params = arguments(function, case, random_arrays(case, FLOAT64), normalizer)
    expected = call(function, arrays, params)
    results = call(function, [torch.tensor(array) for array in arrays], params)
    for result, exact in zip(results, expected, strict=True):
        np.testing.assert_allclose(result.numpy(), exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", [(6, 5, 7), (0, 6, 5, 7), (2, 6, 1, 1)])
@pytest.mark.parametrize(
    "factor", [{"up": 2}, {"down": 2}, {"up": 3, "down": 2}, {"up": 2, "down": 2}]
)
def test_shapes_and_layouts(elsewhere, monkeypatch, factor, shape, layout):
    """One image, no images, one pixel."""
    rows, columns = (-(-n // factor.get("down", 1)) for n in shape[-2:])
    features = torch.randn(shape)
    logits = torch.randn(*shape[:-3], 2 * 9 * factor.get("up", 1) ** 2, rows, columns)
    if layout == "NHWC":
        features, logits = features.movedim(-3, -1), logits.movedim(-3, -1)
    params = {**factor, "kernel_size": 3, "groups": 2, "layout": layout}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        composed = carafepp.reassemble_with_logits(features, logits, **params)
    monkeypatch.undo()
    exact = carafepp.reassemble_with_logits(features, logits, **params)
    torch.testing.assert_close(composed, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("bfloat16", "float32")])
def test_halves_are_summed_in_float32(composed, dtypes):
    dtype, of_masks = (getattr(torch, name) for name in dtypes)
    features = torch.full((1, 1, 9, 9), 1, dtype=dtype)
    masks = torch.full((1, 81, 9, 9), 1, dtype=of_masks)
    masks[:, 0] = 2048  # a half that 1 is too small to change
    output = carafepp.reassemble(features, masks)
    assert output.dtype == dtype
    assert output[0, 0, 4, 4] == torch.tensor(2048 + 80, dtype=dtype)


def test_gradients_of_any_order(composed):
    torch.manual_seed(0)
    module = CARAFE(4, up=2, kernel_size=3, compressed_channels=4).double()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(module, x)


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (1, 0, 3, 3), (1, 2, 0, 3)])
def test_an_empty_map_has_a_gradient(composed, shape):
    features = torch.ones(shape, requires_grad=True)
    logits = torch.ones(shape[0], 4 * 9, *shape[2:], requires_grad=True)
    carafepp.reassemble_with_logits(features, logits, up=2, kernel_size=3).sum().backward()
    assert (features.grad.shape, logits.grad.shape) == (features.shape, logits.shape)


def test_inference_mode_and_torch_func(composed, monkeypatch):
    features, masks = torch.randn(1, 2, 4, 4), torch.randn(1, 9, 8, 8)
    grad = torch.randn(1, 2, 8, 8)

    def results():
        with torch.inference_mode():
            output = carafepp.reassemble(features.clone(), masks.clone(), up=2)

        def of_gradient(features):
            return carafepp.reassemble_backward(grad, features, masks, up=2)[1].sum()

        return output, torch.func.grad(of_gradient)(features)

    composed_results = results()
    monkeypatch.undo()
    torch.testing.assert_close(composed_results, results(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "params", "sentence"),
    [
        ((2, 9, 8, 8), {"up": 2}, "masks must have"),
        ((1, 26, 8, 8), {"up": 2}, "masks must have"),
        ((1, 9, 8, 8), {"up": 2, "padding": 9}, "padding must be"),
        ((1, 9, 8, 8), {"up": 2, "layout": "NWHC"}, "layout must be"),
        ((1, 9, 8, 8), {"up": 0}, "up must be"),
    ],
)
def test_wrong_arguments_are_told_as_ever(composed, shape, params, sentence):
    with pytest.raises(ValueError, match=rf"^\[reassemble\] {sentence}"):
        carafepp.reassemble(torch.ones(1, 2, 4, 4), torch.ones(shape), **params)
    with pytest.raises(TypeError, match=r"^\[reassemble\] masks must have the dtype"):
        carafepp.reassemble(torch.ones(1, 2, 4, 4), torch.ones(1, 9, 8, 8).double(), up=2)


def test_it_is_told_once(elsewhere):
    features, masks = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 8, 8)
    with pytest.warns(
        UserWarning, match="^carafepp has no kernels for cpu: PyTorch's own operators"
    ):
        carafepp.reassemble(features, masks, up=2)
    carafepp.reassemble(features, masks, up=2)  # a warning would be an error


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # PyTorch's own
@pytest.mark.parametrize("factor", [{"up": 2}, {"down": 2}])
def test_a_decomposed_program_has_no_operator_of_carafepp(factor):
    torch.manual_seed(0)
    module = CARAFE(4, **factor).eval()
    sizes = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, (torch.randn(1, 4, 8, 10),), dynamic_shapes=(sizes,))
    assert "carafepp" in str(program.graph)
    program = program.run_decompositions(decompositions())
    assert "carafepp" not in str(program.graph)
    x = torch.randn(1, 4, 13, 6)
    torch.testing.assert_close(program.module()(x), module(x), rtol=1e-5, atol=1e-5)


def test_every_operator_has_a_decomposition():
    names = {
        name.partition("::")[2]
        for name in map(str, torch._C._dispatch_get_all_op_names())
        if name.startswith("carafepp::")
    }
    assert {operator.name().partition("::")[2] for operator in decompositions()} == names
