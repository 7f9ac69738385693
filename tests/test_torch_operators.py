"""On PyTorch tensors the functions are operators of PyTorch: torch.ops.carafepp.*."""

import contextlib
import functools
import io
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import carafepp
import cases
from cases import CASES, DTYPES, Case, random_arrays
from cases.calls import FUNCTIONS, INPUTS, RESULTS, arguments, call
from cuda_libraries import connected
from functions import EACH_RESULT, each_function, each_result
from products import product
from reference import NORMALIZERS
from skips import import_or_skip
from test_frameworks import from_torch, problem, to_torch

import_or_skip("torch")

F32, F64 = DTYPES[:2]
CASE = CASES["groups_2"]
FORWARD = [function for function in FUNCTIONS if not function.endswith("backward")]
each_forward = pytest.mark.parametrize("function", FORWARD)
each_dtypes = pytest.mark.parametrize("dtypes", DTYPES, ids=str)

# Few elements: each takes a derivative.
TINY = [
    Case("up2", "upsampling", 1, 2, 2, 3, up=2),
    Case("down2", "downsampling, an odd size", 2, 1, 3, 4, down=2),
    Case("ratio_3_2", "a fraction", 1, 1, 2, 3, up=3, down=2),
    Case("groups", "groups", 1, 4, 2, 2, up=2, groups=2),
    Case("crop", "a crop", 1, 2, 2, 3, up=2, size=(3, 5)),
    Case("skips", "features that no tap reaches", 1, 2, 3, 3, down=2, kernel_size=1),
    Case("padding", "rows alone are padded", 1, 2, 2, 4, up=2, padding=(1, 0)),
]
each_tiny = pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)


def operator(function, index=0):
    """Return the operator for a result."""
    from carafepp.torch import operators

    if len(RESULTS[function]) > 1:
        function = function.replace("backward", f"grad_{RESULTS[function][index]}")
    return getattr(operators, function)


def tensors_of(torch, arrays):
    return [to_torch(torch, array) for array in arrays]


def that_require_grad(tensors):
    """Return leaves of the same memory and strides."""
    return [tensor.detach().requires_grad_() for tensor in tensors]


def random_problem(torch, function, case=CASE, dtypes=F32, normalizer="softmax"):
    inputs, params = arguments(function, case, random_arrays(case, dtypes), normalizer)
    return tensors_of(torch, inputs), params


def integer_problem(torch, function, case=CASE, dtypes=F32):
    """Sums of small integers are exact in any order."""
    inputs, params = problem(function, case, dtypes)
    return tensors_of(torch, inputs), params


def assert_same(actual, expected):
    """Both have the same bits, dtype and strides."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    assert actual.stride() == expected.stride() or actual.numel() == 0
    np.testing.assert_array_equal(from_torch(actual.detach()), from_torch(expected.detach()))


def assert_all_same(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        assert_same(one, other)


@contextlib.contextmanager
def recorded(torch):
    """Record the names of the operators that are called, below autograd."""
    from torch.utils._python_dispatch import TorchDispatchMode

    names = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "carafepp":
                names.append(function.__name__.removesuffix(".default"))
            return function(*args, **(kwargs or {}))

    with Record():
        yield names


# PyTorch's own checks: of the schema, of results without data, of derivatives, of what a compiler
# makes of the operator


def expanded(torch, tensors):
    return [tensor[:, :, :1, :1].expand(tensor.shape) for tensor in tensors]


def in_memory(layout):
    def place(torch, tensors):
        return [torch.from_numpy(cases.place(tensor.numpy(), layout)) for tensor in tensors]

    return place


def unbatched(torch, tensors):
    return [tensor[0] for tensor in tensors]


def in_nhwc_axes(torch, tensors):
    return [tensor.movedim(1, -1).contiguous() for tensor in tensors]


def as_they_are(torch, tensors):
    return tensors


# case, what becomes of its tensors, further parameters
OPCHECKS = {
    "contiguous": ("groups_2", as_they_are, {}),
    "crop": ("crop_up", as_they_are, {}),
    "channels_last crop": ("crop_ratio", in_memory("nhwc"), {}),
    "permuted": ("groups_2", in_memory("transposed_picture"), {}),
    "sliced": ("down2", in_memory("nhwc_channel_slice"), {}),
    "every other row": ("ratio_3_2", in_memory("every_other_row"), {}),
    "expanded": ("groups_2", expanded, {}),
    "unbatched": ("groups_2", unbatched, {}),
    "NHWC": ("crop_down", in_nhwc_axes, {"layout": "NHWC"}),
    "no images": ("empty_batch", as_they_are, {}),
    "no channels": ("zero_channels_groups", in_memory("nhwc"), {}),
    "no output": ("empty_crop", as_they_are, {}),
    "padding": ("padding_ratio", in_memory("nhwc"), {}),
    "no window": ("padding_of_too_few", as_they_are, {}),
}


# PyTorch 2.14's own opcheck looks at .grad of a view.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@product(
    kind=list(OPCHECKS),
    by_default={"kind": ["contiguous", "NHWC", "padding"]},
    which=EACH_RESULT,
)
def test_opcheck(kind, which, torch):
    function, index = which
    name, change, more = OPCHECKS[kind]
    tensors, params = random_problem(torch, function, CASES[name])
    tensors = that_require_grad(change(torch, tensors))
    utils = ["test_schema", "test_autograd_registration", "test_faketensor"]
    # The others would take a second each.
    if kind in ("channels_last crop", "no images", "padding"):
        utils.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(
        operator(function, index), tuple(tensors), {**params, **more}, test_utils=utils
    )


# Derivatives


def assert_derivatives_are_right(torch, function, tensors, params):
    """In both modes: two derivatives of a forward function, the first of a backward."""
    inputs = that_require_grad(tensors)
    backward = function.endswith("backward")

    def results(*tensors):
        return call(function, tensors, params)

    # fast: random projections instead of every element
    assert torch.autograd.gradcheck(
        results, inputs, fast_mode=backward, check_forward_ad=True, check_batched_forward_grad=True
    )
    if not backward:
        assert torch.autograd.gradgradcheck(
            results, inputs, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True
        )


@each_function
@each_tiny
def test_derivatives(case, function, torch):
    assert_derivatives_are_right(torch, function, *random_problem(torch, function, case, F64))


@pytest.mark.parametrize("normalizer", [n for n in NORMALIZERS if n != "softmax"])
@pytest.mark.parametrize("function", [f for f in FUNCTIONS if "logits" in INPUTS[f]])
def test_derivatives_of_every_normalizer(function, normalizer, torch):
    tensors, params = random_problem(torch, function, TINY[0], F64, normalizer)
    assert_derivatives_are_right(torch, function, tensors, params)


@pytest.mark.parametrize("change", [unbatched, in_nhwc_axes])
@each_function
def test_derivatives_of_other_axes(function, change, torch):
    tensors, params = random_problem(torch, function, TINY[0], F64)
    layout = {"layout": "NHWC"} if change is in_nhwc_axes else {}
    assert_derivatives_are_right(torch, function, change(torch, tensors), {**params, **layout})


@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f.endswith("backward")])
def test_third_derivatives(function, torch):
    tensors, params = random_problem(torch, function, TINY[2], F64)
    inputs = that_require_grad(tensors)
    assert torch.autograd.gradgradcheck(
        lambda *tensors: call(function, tensors, params), inputs, fast_mode=True
    )


def gradient_call(function, inputs, params, grad):
    """Return the gradients for all inputs of a forward function, by its backward function."""
    params = {key: value for key, value in params.items() if key != "size"}
    return call(f"{function}_backward", (grad, *inputs), params)


@product(
    function=FORWARD,
    name=["groups_2", "crop_ratio", "down2", "empty_crop", "padding_ratio"],
    turns={"dtypes": DTYPES},
)
def test_gradients_are_those_of_the_numpy_functions(function, name, dtypes, torch):
    """They have the same bits, in the dtype of the arrays that they are gradients of."""
    case = CASES[name]
    arrays = random_arrays(case, dtypes)
    inputs, params = arguments(function, case, arrays)
    grad = arrays.grad_masks if function == "normalize_masks" else arrays.grad_output
    tensors = that_require_grad(tensors_of(torch, inputs))
    (output,) = call(function, tensors, params)
    gradients = torch.autograd.grad(output, tensors, to_torch(torch, grad))
    expected = tensors_of(torch, gradient_call(function, inputs, params, grad))
    assert_all_same(gradients, expected)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("function", [f for f in FORWARD if len(INPUTS[f]) == 2])
def test_gradients_are_computed_only_where_needed(function, needed, torch):
    tensors, params = integer_problem(torch, function)
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(need)
    with recorded(torch) as names:
        (output,) = call(function, tensors, params)
        output.sum().backward()
    what = (f"{function}_grad_{name}" for name in INPUTS[function])
    assert names == [function, *itertools.compress(what, needed)]
    assert [tensor.grad is not None for tensor in tensors] == list(needed)


@each_function
def test_nothing_is_recorded_for_tensors_without_grad(function, torch):
    tensors, params = integer_problem(torch, function)
    assert all(result.grad_fn is None for result in call(function, tensors, params))
    with torch.no_grad():
        for result in call(function, that_require_grad(tensors), params):
            assert not result.requires_grad
    with torch.inference_mode():
        results = call(function, that_require_grad(tensors), params)
    assert all(result.is_inference() and not result.requires_grad for result in results)


def test_inference_tensors_cannot_be_saved_for_a_derivative(torch):
    """PyTorch's own operators refuse it, too. Without a gradient, `out` is a tensor like others."""
    (x, m), params = integer_problem(torch, "reassemble")
    with torch.inference_mode():
        inference = x.clone()
    assert_same(carafepp.reassemble(inference, m, **params), carafepp.reassemble(x, m, **params))
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        carafepp.reassemble(inference, m.requires_grad_(), **params)


@each_forward
def test_backward_twice(function, torch):
    tensors, params = integer_problem(torch, function)
    tensors = that_require_grad(tensors)
    (output,) = call(function, tensors, params)
    output.sum().backward(retain_graph=True)
    once = [tensor.grad.clone() for tensor in tensors]
    output.sum().backward()
    assert_all_same([tensor.grad for tensor in tensors], [2 * gradient for gradient in once])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        output.sum().backward()


@pytest.mark.parametrize("index", [0, 1])
def test_a_tensor_that_was_changed_since_has_no_gradients(index, torch):
    tensors, params = integer_problem(torch, "reassemble")
    copies = [tensor.requires_grad_().clone() for tensor in tensors]
    output = carafepp.reassemble(*copies, **params)
    copies[index].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_hooks_see_the_gradients(torch):
    tensors, params = integer_problem(torch, "reassemble")
    inner = [2 * tensor.requires_grad_() for tensor in tensors]
    for tensor in inner:
        tensor.retain_grad()
    output = carafepp.reassemble(*inner, **params)
    output.register_hook(lambda gradient: 3 * gradient)
    output.sum().backward()
    threes = np.full(output.shape, 3, np.float32)
    arrays = [tensor.detach().numpy() for tensor in inner]
    expected = tensors_of(torch, gradient_call("reassemble", arrays, params, threes))
    assert_all_same([tensor.grad for tensor in inner], expected)
    assert_all_same([tensor.grad for tensor in tensors], [2 * gradient for gradient in expected])


# Results in `out` have no gradient, but autograd has to know of them


def empty_results(torch, function, tensors, params):
    return [torch.empty_like(result) for result in call(function, tensors, params)]


def write(function, tensors, params, results):
    out = tuple(results) if function.startswith("reassemble") and len(results) > 1 else results[0]
    return call(function, tensors, {**params, "out": out})


@pytest.mark.parametrize("view", [lambda out: out, lambda out: out.detach()], ids=["out", "view"])
@each_result
def test_a_result_that_was_written_to_since_has_no_gradients(function, index, view, torch):
    """PyTorch's own in-place functions do the same."""
    tensors, params = integer_problem(torch, function)
    results = empty_results(torch, function, tensors, params)
    weight = torch.ones_like(results[index], requires_grad=True)
    product = weight * results[index]
    write(function, tensors, params, [view(result) for result in results])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@each_function
def test_a_call_that_fails_has_changed_nothing(function, torch):
    tensors, params = integer_problem(torch, function)
    results = empty_results(torch, function, tensors, params)
    with pytest.raises(ValueError, match="up must be at least 1"):
        write(function, tensors, {**params, "up": 0}, results)
    assert [result._version for result in results] == [0] * len(results)


@each_result
def test_inference_tensors_are_written_to_only_in_inference_mode(function, index, torch):
    tensors, params = integer_problem(torch, function)
    results = empty_results(torch, function, tensors, params)
    with torch.inference_mode():
        results[index] = torch.zeros_like(results[index])
    name = f"out[{index}]" if len(results) > 1 else "out"
    sentence = f"[{function}] {name} must not be an inference tensor outside of"
    with pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}"):
        write(function, tensors, params, results)
    assert not results[index].any()
    with torch.inference_mode():
        write(function, tensors, params, results)
    assert_all_same(results, call(function, tensors, params))


# Kinds of tensors


def test_parameters_get_gradients(torch):
    tensors, params = integer_problem(torch, "reassemble")
    parameters = [torch.nn.Parameter(tensor) for tensor in tensors]
    output = carafepp.reassemble(*parameters, **params)
    assert type(output) is torch.Tensor
    output.sum().backward()
    assert all(parameter.grad.any() for parameter in parameters)


def test_subclasses_are_kept(torch):
    """PyTorch's own operators do the same, also for gradients."""

    class Picture(torch.Tensor):
        pass

    (x, m), params = integer_problem(torch, "reassemble")
    picture = x.as_subclass(Picture).requires_grad_()
    output = carafepp.reassemble(picture, m, **params)
    assert type(output) is Picture
    assert_same(output.as_subclass(torch.Tensor), carafepp.reassemble(x, m, **params))
    output.sum().backward()
    assert picture.grad.as_subclass(torch.Tensor).any()


def test_wrappers_that_unwrap_themselves_work(torch):
    """A subclass without memory of its own whose __torch_dispatch__ calls on what it wraps."""
    from torch.utils._pytree import tree_map_only

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            wrapper = torch.Tensor._make_wrapper_subclass(
                cls, inner.shape, strides=inner.stride(), dtype=inner.dtype
            )
            wrapper.inner = inner
            return wrapper

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            args, kwargs = tree_map_only(cls, lambda tensor: tensor.inner, (args, kwargs or {}))
            return tree_map_only(torch.Tensor, cls, function(*args, **kwargs))

    (x, m), params = integer_problem(torch, "reassemble")
    wrapper, m = Wrapper(x).requires_grad_(), m.requires_grad_()
    output = carafepp.reassemble(wrapper, m, **params)
    assert type(output) is Wrapper
    expected = carafepp.reassemble(x, m, **params)
    assert_same(output.inner, expected)
    (gradient,) = torch.autograd.grad(output.sum(), m)
    assert_same(gradient.inner, torch.autograd.grad(expected.sum(), m)[0])


@pytest.mark.parametrize("kind", ["meta", "fake"])
@pytest.mark.parametrize("change", [as_they_are, in_memory("nhwc"), unbatched, in_nhwc_axes])
@each_function
def test_tensors_without_data_give_tensors_without_data(function, change, kind, torch):
    """Results and gradients have the shape, strides and dtype of those with data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    mode = FakeTensorMode() if kind == "fake" else contextlib.nullcontext()
    tensors, params = integer_problem(torch, function, dtypes=DTYPES[4])
    tensors = change(torch, tensors)
    if change is in_nhwc_axes:
        params["layout"] = "NHWC"
    expected = call(function, tensors, params)
    empty = [t.to("meta") if kind == "meta" else mode.from_tensor(t) for t in tensors]
    with mode:
        inputs = that_require_grad(empty)
        results = call(function, inputs, params)
        sum(result.sum() for result in results).backward()
    for result, exact in zip(results, expected, strict=True):
        assert result.device.type == ("meta" if kind == "meta" else "cpu")
        assert (result.shape, result.stride()) == (exact.shape, exact.stride())
        assert result.dtype == exact.dtype
    for tensor in inputs:
        assert tensor.grad is None or tensor.grad.stride() == tensor.stride()


@pytest.mark.parametrize("index", range(3), ids=INPUTS["reassemble_backward"])
def test_tensors_of_two_devices_are_refused_where_one_holds_no_data(index, torch):
    """Else the result would be memory that nobody has written."""
    tensors, params = integer_problem(torch, "reassemble_backward")
    tensors[index] = tensors[index].to("meta")
    blamed = INPUTS["reassemble_backward"][index or 1]
    devices = "(cpu); got meta" if index else "(meta); got cpu"
    sentence = (
        f"[reassemble_grad_features] {blamed} must be on the device of grad_output {devices}."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        carafepp.reassemble_backward(*tensors, **params)


# Wrong arguments: the sentences of test_errors.py, though PyTorch's dispatcher refuses them first


WRONG = {
    "float": {"up": 1.5},
    "whole float": {"up": 2.0},
    "float of numpy": {"up": np.float32(2.7)},
    "bool": {"up": True},
    "bool of numpy": {"groups": np.bool_(True)},
    "array of one integer": {"up": np.array([2])},
    "text": {"groups": "2"},
    "none": {"groups": None},
    "unknown": {"scale": 2},
    "number for a size": {"size": 3},
    "float in a size": {"size": (3, 4.5)},
    "float of numpy in a size": {"size": (np.float32(7.9), 8)},
    "bool in a size": {"size": (True, 4)},
    "array of floats for a size": {"size": np.array([3.0, 4.0])},
    "set for a size": {"size": {3, 4}},
    "dict for a size": {"size": {0: 3, 1: 4}},
    "text for a size": {"size": "34"},
    "bytes for a size": {"size": b"\3\4"},
    "generator for a size": {"size": (k for k in (3, 4))},
    "triple for a size": {"size": (3, 4, 5)},
    "values of a dict for a size": {"size": {0: 3, 1: 4}.values()},
    "type for a size": {"size": list},
    "float for a padding": {"padding": 1.0},
    "bool in a padding": {"padding": (0, True)},
    "triple for a padding": {"padding": (0, 1, 0)},
    "text for a padding": {"padding": "01"},
    "dict for a padding": {"padding": {0: 1}},
    "too large a padding": {"padding": (0, 2)},
    "far too large a padding": {"padding": 2**63},
    "number for a layout": {"layout": 0},
    "list for a layout": {"layout": ["NCHW"]},
    "range": {"up": 0},
}


@pytest.mark.parametrize(
    ("function", "name"),
    [(f, name) for f in FUNCTIONS for name in WRONG if f in FORWARD or "size" not in WRONG[name]],
)
def test_wrong_arguments_are_refused_as_those_of_numpy_arrays(function, name, torch):
    inputs, params = problem(function)
    params = {**params, **WRONG[name]}
    with pytest.raises((TypeError, ValueError)) as expected:
        call(function, inputs, params)
    for tensors in (tensors_of(torch, inputs), that_require_grad(tensors_of(torch, inputs))):
        with pytest.raises(expected.type) as error:
            call(function, tensors, params)
        assert str(error.value) == str(expected.value)


# Integers of every kind, each for an `up` of 2, a `size` of (8, 10) and a `padding` of (1, 1).
RIGHT = {
    "integer of numpy": (np.int32(2), (np.int64(8), np.uint8(10)), (np.int8(1), 1)),
    "array without axes": (np.array(2), (np.array(8), 10), np.array(1)),
    "array of two integers": (2, np.array([8, 10]), np.array([1, 1])),
    "list": (2, [8, 10], [1, 1]),
    "range": (2, range(8, 11, 2), np.uint8(1)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_integers_of_every_kind_are_taken(name, torch):
    up, size, padding = RIGHT[name]
    params = {"up": up, "size": size, "padding": padding}
    arrays = np.ones((1, 3, 4, 5), np.float32), np.ones((1, 9, 8, 10), np.float32)
    expected = carafepp.reassemble(*arrays, up=2)
    np.testing.assert_array_equal(carafepp.reassemble(*arrays, **params), expected)
    for tensors in (tensors_of(torch, arrays), that_require_grad(tensors_of(torch, arrays))):
        result = carafepp.reassemble(*tensors, **params)
        np.testing.assert_array_equal(result.detach(), expected)


def test_an_empty_size_is_a_size(torch):
    x, m = torch.ones(1, 3, 4, 5), torch.ones(1, 9, 0, 0)
    assert carafepp.reassemble(x, m, up=2, size=(0, 0)).shape == (1, 3, 0, 0)
    logits = torch.ones(1, 36, 4, 5)
    params = {"up": 2, "kernel_size": 3, "size": (0, 0)}
    assert carafepp.reassemble_with_logits(x, logits, **params).shape == (1, 3, 0, 0)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_tensors_are_no_integers(requires_grad, torch):
    """A size takes none either, unless PyTorch traces; a tensor of two integers is a size."""
    x, m = torch.ones(1, 3, 4, 5, requires_grad=requires_grad), torch.ones(1, 9, 8, 10)
    with pytest.raises(TypeError, match=r"^\[reassemble\] up must be an integer; got tensor\(2\)"):
        carafepp.reassemble(x, m, up=torch.tensor(2))
    wrong = [(torch.tensor(8), 10), torch.tensor([8.0, 10.0]), torch.tensor([[8, 10]])]
    for size in wrong:
        with pytest.raises(TypeError, match=r"^\[reassemble\] size must be a pair \(H', W'\)"):
            carafepp.reassemble(x, m, up=2, size=size)
    size = torch.tensor([8, 10])
    assert carafepp.reassemble(x, m, up=2, size=size).shape == (1, 3, 8, 10)
    assert carafepp.reassemble(x.detach().numpy(), m.numpy(), up=2, size=size).shape[2:] == (8, 10)


def test_parameters_have_to_be_named(torch):
    tensors, _ = integer_problem(torch, "reassemble")
    with pytest.raises(TypeError, match="positional"):
        carafepp.reassemble(*tensors, 2)


# torch.func


def bilinear(params):
    """Return a scalar of features and masks, nonlinear enough for second derivatives."""

    def loss(x, m):
        return (carafepp.reassemble(x, m, **params) ** 2).sum()

    return loss


def gradient(function, *inputs, argument=0):
    """Return them by plain autograd."""
    import torch

    inputs = that_require_grad(inputs)
    return torch.autograd.grad(function(*inputs), inputs[argument])[0]


# in_dims of every input in turn, shape of the samples
IN_DIMS = {
    "first axis": lambda k: 0,
    "another axis": lambda k: (2, 4, 1)[k],
    "only the first input": lambda k: None if k else 1,
    "all but the first input": lambda k: 0 if k else None,
}


@product(
    function=FUNCTIONS,
    dims=list(IN_DIMS),
    turns={"batched": {"batches": True, "single images": False}},
)
def test_vmap(function, dims, batched, torch):
    samples = 3
    tensors, params = integer_problem(torch, function)
    if not batched:
        tensors = unbatched(torch, tensors)
    in_dims = tuple(
        dim if dim is None or batched else min(dim, 3)
        for dim in map(IN_DIMS[dims], range(len(tensors)))
    )
    if all(dim is None for dim in in_dims):
        in_dims = (0,)
    stacks = [
        tensor if dim is None else torch.stack([tensor + k for k in range(samples)], dim)
        for tensor, dim in zip(tensors, in_dims, strict=True)
    ]

    def run(*inputs):
        return call(function, inputs, params)

    results = torch.vmap(run, in_dims, out_dims=1)(*stacks)
    for k in range(samples):
        inputs = [
            stack if dim is None else stack.select(dim, k)
            for stack, dim in zip(stacks, in_dims, strict=True)
        ]
        for result, expected in zip(results, run(*inputs), strict=True):
            np.testing.assert_array_equal(result.select(1, k), expected)


@each_function
def test_nested_vmap(function, torch):
    tensors, params = integer_problem(torch, function)
    # of single images, of batches of them: three levels
    stacks = [torch.stack([torch.stack([t, t + 1]), torch.stack([t + 2, -t])]) for t in tensors]

    def run(*inputs):
        return call(function, inputs, params)

    results = torch.vmap(torch.vmap(torch.vmap(run), in_dims=1), in_dims=1)(
        *(stack.movedim(2, 1) for stack in stacks)
    )
    for i, j, image in itertools.product(range(2), range(2), range(CASE.n)):
        expected = run(*(stack[i, j, image] for stack in stacks))
        for result, one in zip(results, expected, strict=True):
            np.testing.assert_array_equal(result[image, j, i], one)


@pytest.mark.parametrize("argument", [0, 1])
def test_func_grad_and_vjp(argument, torch):
    (x, m), params = integer_problem(torch, "reassemble")
    loss = bilinear(params)
    expected = gradient(loss, x, m, argument=argument)
    assert_same(torch.func.grad(loss, argument)(x, m), expected)
    value, vjp = torch.func.vjp(loss, x, m)
    assert_same(value, loss(x, m))
    assert_same(vjp(torch.ones(()))[argument], expected)


@pytest.mark.parametrize("function", FORWARD)
def test_func_jacrev(function, torch):
    tensors, params = random_problem(torch, function, TINY[0], F64)

    def run(*inputs):
        return call(function, inputs, params)[0]

    jacobians = torch.func.jacrev(run, tuple(range(len(tensors))))(*tensors)
    expected = torch.autograd.functional.jacobian(run, tuple(tensors))
    for jacobian, rows in zip(jacobians, expected, strict=True):
        np.testing.assert_array_equal(jacobian, rows)


def test_func_grad_of_grad(torch):
    """Two levels of torch.func agree with autograd twice, and with one level of each."""
    (x, m), params = integer_problem(torch, "reassemble", dtypes=F64)
    loss = bilinear(params)

    def penalty(x):
        return (torch.func.grad(loss)(x, m) ** 2).sum()

    inner = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(inner, m), inner, create_graph=True)
    (expected,) = torch.autograd.grad((first**2).sum(), inner)
    assert expected.any()
    assert_same(torch.func.grad(penalty)(x), expected)
    assert_same(gradient(penalty, x), expected)


@each_forward
def test_func_vmap_of_grad_and_grad_of_vmap(function, torch):
    tensors, params = integer_problem(torch, function, dtypes=F64)

    def loss(*inputs):
        return (call(function, inputs, params)[0] ** 2).sum()

    arguments = tuple(range(len(tensors)))
    separate = torch.vmap(torch.func.grad(loss, arguments))(*tensors)
    together = torch.func.grad(lambda *inputs: torch.vmap(loss)(*inputs).sum(), arguments)(*tensors)
    for k in arguments:
        expected = gradient(loss, *tensors, argument=k)
        assert_same(separate[k], expected)
        assert_same(together[k], expected)


def test_per_sample_gradients_of_shared_masks(torch):
    """Arrays that vmap does not batch are the same for all samples."""
    (x, m), params = integer_problem(torch, "reassemble")
    gradients = torch.vmap(torch.func.grad(bilinear(params), 1), (0, None))(x, m[0])
    for k in range(len(x)):
        assert_same(gradients[k], gradient(bilinear(params), x[k], m[0], argument=1))


def test_func_respects_no_grad(torch):
    """Around grad it stops the outer level; inside, all levels."""
    (x, m), params = integer_problem(torch, "reassemble")
    loss = bilinear(params)
    expected = gradient(loss, x, m)
    x.requires_grad_()
    recorded_outside = torch.func.grad(loss)(x, m)
    assert recorded_outside.requires_grad
    with torch.no_grad():
        outside = torch.func.grad(loss)(x, m)
    assert not outside.requires_grad
    assert_same(outside, expected)

    def constant(x):
        with torch.no_grad():
            return loss(x, m)

    assert not torch.func.grad(constant)(x).any()
    twice = torch.func.grad(lambda x: torch.func.grad(lambda y: constant(x) * y)(x[0, 0, 0, 0]))
    assert not twice(x).any()


@each_dtypes
def test_forward_mode(dtypes, torch):
    """Exactly the product rule: as a function, as an operator, under no_grad, beside a gradient."""
    from torch.autograd import forward_ad

    (x, m), params = integer_problem(torch, "reassemble", dtypes=dtypes)
    run = functools.partial(carafepp.reassemble, **params)
    dx, dm = x.roll(1, -1), m.roll(1, -1)
    expected = run(dx, m) + run(x, dm)
    output, tangent = torch.func.jvp(run, (x, m), (dx, dm))
    assert_same(output, run(x, m))
    assert_same(tangent, expected)
    called = functools.partial(torch.ops.carafepp.reassemble, **params)
    with torch.no_grad():
        assert_same(torch.func.jvp(called, (x, m), (dx, dm))[1], expected)
    assert_same(torch.func.jvp(lambda m: run(x, m), (m,), (dm,))[1], run(x, dm))
    with forward_ad.dual_level():
        (x,) = that_require_grad([x])
        dual = run(forward_ad.make_dual(x, dx), forward_ad.make_dual(m, dm))
        assert_same(forward_ad.unpack_dual(dual).tangent, expected)
        (gradient,) = torch.autograd.grad(dual.sum(), x)
        changed = gradient_call("reassemble", (x.detach(), dm), params, torch.ones_like(dual))[0]
        assert_same(forward_ad.unpack_dual(gradient).tangent, changed)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("function", [f for f in FORWARD if "logits" in INPUTS[f]])
def test_forward_and_reverse_mode_have_the_same_derivatives(function, normalizer, torch):
    """Third derivatives too, in any order of nesting."""
    case = Case("one", "one picture", 1, 1, 1, 2, down=2, kernel_size=3)
    tensors, params = random_problem(torch, function, case, F64, normalizer)

    def loss(logits):
        return (call(function, (*tensors[:-1], logits), params)[0] ** 3).sum()

    def derivative(*modes):
        return functools.reduce(lambda inner, mode: mode(inner), modes, loss)(tensors[-1])

    jacrev, jacfwd = torch.func.jacrev, torch.func.jacfwd
    for order in 1, 2, 3:
        expected = derivative(*[jacrev] * order)
        assert expected.any()
        for modes in itertools.product([jacrev, jacfwd], repeat=order):
            np.testing.assert_allclose(derivative(*modes), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # linearize
@each_function
def test_forward_mode_inside_and_outside_of_vmap(function, torch):
    tensors, params = random_problem(torch, function, dtypes=F64)
    inputs = [torch.stack([tensor, tensor + 1]) for tensor in tensors]
    tangents = [tensor.flip(0) for tensor in inputs]

    def run(*inputs):
        return call(function, inputs, params)

    def push(inputs, tangents):
        return torch.func.jvp(run, tuple(inputs), tuple(tangents))[1]

    samples = [push([x[k] for x in inputs], [t[k] for t in tangents]) for k in range(2)]
    expected = [torch.stack(results) for results in zip(*samples, strict=True)]
    inside = torch.vmap(push)(inputs, tangents)
    _, outside = torch.func.jvp(torch.vmap(run), tuple(inputs), tuple(tangents))
    output, linear = torch.func.linearize(torch.vmap(run), *inputs)
    assert_all_same(output, torch.vmap(run)(*inputs))
    for result in (inside, outside, linear(*tangents)):
        for one, other in zip(result, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_forward_mode_respects_no_grad(torch):
    (x, m), params = integer_problem(torch, "reassemble", dtypes=F64)

    def constant(x):
        with torch.no_grad():
            return bilinear(params)(x, m)

    _, tangent = torch.func.jvp(torch.func.grad(lambda x: constant(x) * x.sum()), (x,), (x,))
    _, expected = torch.func.jvp(bilinear(params), (x, m), (x, torch.zeros_like(m)))
    assert torch.equal(tangent, expected.expand_as(x))


# Autocast

# dtypes of features and of masks or logits, that of autocast, and what the kernels then get
AUTOCAST = {
    "float32": (("float32", "float32"), "bfloat16", ("bfloat16", "float32")),
    "float32 beside bfloat16": (("float32", "bfloat16"), "bfloat16", ("bfloat16", "bfloat16")),
    "float32 beside float16": (("float32", "float16"), "float16", ("float16", "float16")),
    "bfloat16 beside float32": (("bfloat16", "float32"), "bfloat16", ("bfloat16", "float32")),
    "float16 beside bfloat16": (("float16", "bfloat16"), "bfloat16", ("bfloat16", "bfloat16")),
    "float16 in bfloat16": (("float16", "float16"), "bfloat16", ("bfloat16", "bfloat16")),
    "float32 beside float64": (("float32", "float64"), "bfloat16", ("bfloat16", "bfloat16")),
    "float64": (("float64", "float64"), "bfloat16", ("float64", "float64")),
}


def assert_autocast_casts(torch, function, name, device):
    given, autocast, computed = AUTOCAST[name]
    tensors, params = random_problem(torch, function)
    inputs = [
        tensor.to(device, getattr(torch, dtype)).requires_grad_()
        for tensor, dtype in zip(tensors, given, strict=True)
    ]
    with torch.autocast(device, getattr(torch, autocast)):
        (output,) = call(function, inputs, params)
    output.float().sum().backward()
    cast = [
        tensor.detach().to(getattr(torch, dtype))
        for tensor, dtype in zip(inputs, computed, strict=True)
    ]
    cast = that_require_grad(cast)
    (expected,) = call(function, cast, params)
    expected.float().sum().backward()
    assert output.dtype == getattr(torch, computed[0])
    assert torch.equal(output, expected)
    for tensor, other in zip(inputs, cast, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        assert torch.equal(tensor.grad, other.grad.to(tensor.dtype))


each_autocast = pytest.mark.parametrize("name", AUTOCAST)
each_that_casts = pytest.mark.parametrize("function", ["reassemble", "reassemble_with_logits"])


@each_autocast
@each_that_casts
def test_autocast(function, name, torch):
    assert_autocast_casts(torch, function, name, "cpu")


@each_autocast
@each_that_casts
def test_autocast_on_a_gpu(function, name, torch):
    connected("torch")
    assert_autocast_casts(torch, function, name, "cuda")


@each_autocast
@each_that_casts
def test_autocast_for_gpus_where_there_is_none(function, name, torch):
    """The tensors say that they are on a GPU, and hold no data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    given, autocast, computed = AUTOCAST[name]
    tensors, params = random_problem(torch, function)
    try:
        # torch.autocast itself would look for a GPU.
        torch.set_autocast_dtype("cuda", getattr(torch, autocast))
        torch.set_autocast_enabled("cuda", True)
        with FakeTensorMode():
            inputs = [
                torch.empty(tensor.shape, dtype=getattr(torch, dtype), device="cuda")
                for tensor, dtype in zip(tensors, given, strict=True)
            ]
            with recorded(torch) as names:
                (output,) = call(function, inputs, params)
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", torch.float16)
    assert names == [function]
    assert (output.device.type, output.dtype) == ("cuda", getattr(torch, computed[0]))


def test_autocast_does_not_hide_wrong_arguments(torch):
    (x, m), params = integer_problem(torch, "reassemble")
    with torch.autocast("cpu", torch.bfloat16):
        for inputs in ((x.int(), m), (x, m.int()), (x.double(), m)):
            with pytest.raises(TypeError, match=r"^\[reassemble\] "):
                carafepp.reassemble(*inputs, **params)


def test_autocast_leaves_the_normalizer_alone(torch):
    (logits,), params = random_problem(torch, "normalize_masks")
    expected = carafepp.normalize_masks(logits, **params)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(carafepp.normalize_masks(logits, **params), expected)


# torch.compile


@pytest.fixture
def compiled(torch):
    """torch.compile without a graph break, from a clean slate."""
    torch.compiler.reset()
    yield functools.partial(torch.compile, fullgraph=True)
    torch.compiler.reset()


def all_three(features, logits):
    params = {"kernel_size": CASE.kernel_size, "up": 2, "groups": 2, "size": (7, 9)}
    masks = carafepp.normalize_masks(logits + 1, **params)
    direct = carafepp.reassemble(2 * features, masks.relu(), up=2, groups=2, size=(7, 9))
    return direct, carafepp.reassemble_with_logits(features + 1, 2 * logits, **params) / 2


def with_gradients(function, inputs):
    """Return the results and the gradients of the inputs."""
    inputs = that_require_grad(inputs)
    results = function(*inputs)
    sum(((k + result.float()) ** 2).sum() for k, result in enumerate(results)).backward()
    return [*results, *(tensor.grad for tensor in inputs)]


@each_dtypes
def test_compiled_functions_give_the_same(dtypes, torch, compiled):
    """Bits and strides are the same: features are channels_last, logits are not."""
    (x, logits), _ = random_problem(torch, "reassemble_with_logits", dtypes=dtypes)
    inputs = [x.contiguous(memory_format=torch.channels_last), logits]
    results = with_gradients(compiled(all_three, backend="aot_eager"), inputs)
    assert_all_same(results, with_gradients(all_three, inputs))
    assert results[0].is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def read(torch, monkeypatch):
    """Return the address and strides of each array that reached the core, by function and name."""
    from carafepp._doors.torch import PyTorch

    given, view = {}, PyTorch.view

    def spy(door, function, name, array):
        given[function, name] = array.data_ptr(), array.stride()
        return view(door, function, name, array)

    monkeypatch.setattr(PyTorch, "view", spy)
    return given


def without_headers():
    """Inductor's option to compile no header beforehand, where it has one: that takes a minute."""
    import torch._inductor.config as config

    name = "cpp_cache_precompile_headers"
    return {name: False} if hasattr(config, name) else {}


@pytest.mark.parametrize("memory", ["contiguous", "nhwc"])
def test_inductor_keeps_strides(memory, torch, compiled, read):
    """Inductor likes to choose the strides of its results, above all of a convolution."""
    import torch._inductor.config as config

    (x, logits), params = integer_problem(torch, "reassemble_with_logits")
    weight = torch.ones(CASE.c, CASE.c, 3, 3)
    inputs = [*in_memory(memory)(torch, [x, logits]), weight]

    def function(x, logits, weight):
        features = torch.nn.functional.conv2d(x, weight, padding=1)
        return (2 * carafepp.reassemble_with_logits(features, logits, **params),)

    def strides_and_results(function):
        results = with_gradients(function, inputs)
        return [read["reassemble_with_logits", name][1] for name in ("features", "out")], results

    # Graphs that were compiled before must not count, nor what a C++ compiler has to do for loops.
    with config.patch({"fx_graph_cache": False, "cpp.simdlen": 1, **without_headers()}):
        strides, results = strides_and_results(compiled(function))
    expected_strides, expected = strides_and_results(function)
    assert strides == expected_strides
    assert_all_same(results, expected)


@pytest.mark.parametrize("dtypes", DTYPES[3:], ids=str)
def test_inductor_runs_half_tensors(dtypes, torch, compiled):
    tensors, params = random_problem(torch, "reassemble_with_logits", dtypes=dtypes)

    def function(x, logits):
        return (carafepp.reassemble_with_logits(x, logits, **params),)

    assert_all_same(with_gradients(compiled(function), tensors), with_gradients(function, tensors))


# The first sizes have no number in common: PyTorch takes equal ones to be equal for ever.
SIZES = [(3, 8, 10), (2, 8, 10), (3, 5, 7), (5, 13, 4), (1, 2, 3), (2, 1, 1), (1, 1, 9)]


@pytest.mark.parametrize(
    "factors",
    [{"up": 2}, {"down": 2}, {"up": 3, "down": 2}, {"up": 2, "padding": (0, 1)}],
    ids=str,
)
def test_one_graph_is_for_many_sizes(factors, torch, compiled):
    """A length of 1 is an exception: PyTorch takes it for a constant."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")

    def function(x, logits):
        return (carafepp.reassemble_with_logits(x, logits, **factors, kernel_size=3),)

    dynamic = compiled(function, backend=counter, dynamic=True)
    for n, h, w in SIZES:
        case = Case("", "", n, 11, h, w, **factors)
        tensors, _ = random_problem(torch, "reassemble_with_logits", case)
        assert_all_same(with_gradients(dynamic, tensors), with_gradients(function, tensors))
        if (n, h, w) == (5, 13, 4):
            assert counter.frame_count == 1


def test_a_factor_may_be_an_argument_of_a_compiled_function(torch, compiled):
    x, masks = torch.ones(1, 2, 3, 4), torch.ones(1, 9, 12, 16)

    def function(x, masks, up, size):
        return carafepp.reassemble(x, masks, up=up, size=size)

    dynamic = compiled(function, backend="aot_eager", dynamic=True)
    for up, h, w in ((4, 12, 16), (3, 8, 11), (4, 11, 16)):
        m = masks[:, :, :h, :w]
        assert_same(dynamic(x, m, up, (h, w)), function(x, m, up, (h, w)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor", None], ids=str)
@each_forward
def test_channels_last_tensors_are_not_copied(function, backend, torch, compiled, read):
    """The core reads the very memory that the caller has given, and so do the gradients."""
    tensors, params = integer_problem(torch, function)
    tensors = that_require_grad(in_memory("nhwc")(torch, tensors))

    def run(*inputs):
        return call(function, inputs, params)[0]

    output = (compiled(run, backend=backend) if backend else run)(*tensors)
    output.backward(torch.ones_like(output))
    for name, tensor in zip(INPUTS[function], tensors, strict=True):
        for reader in (function, f"{function}_backward"):
            assert read[reader, name] == (tensor.data_ptr(), tensor.stride())
        assert tensor.grad.stride() == tensor.stride()
    assert output.is_contiguous(memory_format=torch.channels_last)


def test_transforms_are_compiled(torch, compiled):
    (x, m), params = integer_problem(torch, "reassemble")
    loss = bilinear(params)
    per_sample = torch.vmap(torch.func.grad(loss, (0, 1)))
    assert_all_same(compiled(per_sample, backend="aot_eager")(x, m), per_sample(x, m))


def test_forward_mode_is_compiled(torch, compiled):
    """In a graph PyTorch opens the level without Python's knowledge."""
    from torch.autograd import forward_ad

    (x, m), params = integer_problem(torch, "reassemble")

    def by_func(x):
        return torch.func.jvp(lambda x: carafepp.reassemble(x, m, **params), (x,), (x,))

    def by_level(x):
        with forward_ad.dual_level():
            dual = carafepp.reassemble(forward_ad.make_dual(x, x), m, **params)
            return tuple(forward_ad.unpack_dual(dual))

    expected = carafepp.reassemble(x, m, **params)
    for function in by_func, by_level:
        assert_all_same(compiled(function)(x), [expected, expected])


def test_autocast_is_compiled(torch, compiled):
    tensors, params = random_problem(torch, "reassemble_with_logits")

    def function(x, logits):
        with torch.autocast("cpu", torch.bfloat16):
            return (carafepp.reassemble_with_logits(x, logits, **params),)

    results = with_gradients(compiled(function, backend="aot_eager"), tensors)
    assert results[0].dtype == torch.bfloat16
    assert_all_same(results, with_gradients(function, tensors))


FIRST_CALL = """
import torch, carafepp
function = lambda x, m: carafepp.reassemble(x, m, up=2)
output = torch.compile(function, fullgraph=True, backend="aot_eager")(
    torch.ones(1, 1, 2, 2), torch.ones(1, 1, 4, 4)
)
assert (output == 1).all()
"""


@pytest.mark.exhaustive
def test_the_first_call_may_be_compiled(torch):
    """Nothing has imported the operators yet."""
    subprocess.run([sys.executable, "-c", FIRST_CALL], check=True, timeout=100)


# torch.export


def module(torch, function, **params):
    """A module that calls a function of carafepp by its name."""

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return getattr(carafepp, function)(*inputs, **params)

    return Module()


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@each_function
def test_export(function, strict, torch):
    tensors, params = random_problem(torch, function, CASES["crop_up"])
    tensors = in_memory("nhwc")(torch, tensors)
    exported = torch.export.export(module(torch, function, **params), tuple(tensors), strict=strict)
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert set(map(operator, [function] * 2, range(len(RESULTS[function])))) <= set(targets)
    stored = io.BytesIO()
    torch.export.save(exported, stored)
    stored.seek(0)
    results = torch.export.load(stored).module()(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    assert_all_same(results, call(function, tensors, params))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("factors", [{"up": 2}, {"down": 2}, {"padding": 0}], ids=str)
def test_export_of_any_batch_height_and_width(factors, strict, torch):
    def inputs(n, h, w):
        more = {"padding": (0, 0)} if "padding" in factors else {}
        case = Case("", "", n, 5, h, w, **{**factors, **more})
        return tuple(random_problem(torch, "reassemble_with_logits", case)[0])

    n, h, w = (torch.export.Dim(name, min=2, max=64) for name in "nhw")
    down = factors.get("down", 1)
    shapes = {0: n, 2: h * down, 3: w * down}, {0: n, 2: h, 3: w}
    if "padding" in factors:
        shapes = {0: n, 2: h + 2, 3: w + 2}, {0: n, 2: h, 3: w}
    reassembly = module(torch, "reassemble_with_logits", **factors, kernel_size=3)
    exported = torch.export.export(
        reassembly, inputs(3, 8, 6), dynamic_shapes=(shapes,), strict=strict
    )
    for n, h, w in ((2, 4, 10), (7, 12, 8)):
        tensors = inputs(n, h, w)
        assert_same(exported.module()(*tensors), reassembly(*tensors))


class EveryOperator:
    """A module calls this to have all operators in it."""

    def __call__(self, x, logits):
        how = {"up": 2, "kernel_size": 3, "groups": 2}
        factors = {"up": 2, "groups": 2}
        masks = carafepp.normalize_masks(logits, normalizer="sigmoid", size=(7, 9), **how)
        y = carafepp.reassemble(x, masks, size=(7, 9), **factors)
        z = carafepp.reassemble_with_logits(x, logits, **how)
        gradients = carafepp.reassemble_backward(y, x, masks, **factors)
        more = carafepp.reassemble_with_logits_backward(z, x, logits, **how)
        last = carafepp.normalize_masks_backward(masks, logits, normalizer="none", **how)
        return masks, y, z, *gradients, *more, last


def every_operator(torch):
    """A module, its inputs and its results."""

    class Module(torch.nn.Module):
        def forward(self, x, logits):
            return EveryOperator()(x, logits)

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator) for shape in ((1, 4, 4, 5), (1, 72, 4, 5))]
    return Module(), tuple(inputs), EveryOperator()(*inputs)


AHEAD_OF_TIME = """
import sys, carafepp, torch, torch._inductor
from test_torch_operators import assert_all_same, every_operator, without_headers
every, inputs, _ = every_operator(torch)

class Module(torch.nn.Module):
    def forward(self, x, logits):
        without_padding = carafepp.reassemble(x, logits[:, :9, :2, :3], padding=0)
        return *every(x, logits), without_padding

exported = torch.export.export(Module(), inputs)
with torch._inductor.config.patch(without_headers()):
    path = torch._inductor.aoti_compile_and_package(exported, package_path=sys.argv[1])
assert_all_same(torch._inductor.aoti_load_package(path)(*inputs), Module()(*inputs))
"""


@pytest.mark.exhaustive
def test_ahead_of_time_inductor(torch, tmp_path):
    """It runs in its own process, because other tests must not fork the threads that it starts."""
    if not hasattr(torch._inductor, "aoti_load_package"):
        pytest.skip(f"PyTorch {torch.__version__} has no packages of AOTInductor")
    command = [sys.executable, "-c", AHEAD_OF_TIME, str(tmp_path / "module.pt2")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(command, check=True, timeout=300, env=environment)


def test_a_program_exported_before_parameters_were_positional(torch):
    """The file comes from version 0.1 and PyTorch 2.13, whose format others may not know."""
    path = Path(__file__).with_name("exported.pt2")
    try:
        program = torch.export.load(path)
    except Exception as error:
        if torch.__version__.startswith("2.13."):
            raise
        pytest.skip(f"PyTorch {torch.__version__} does not load what 2.13 has saved: {error}")
    _, inputs, expected = every_operator(torch)
    assert_all_same(program.module()(*inputs), expected)


# Other traces


def test_torch_jit_traces_go_on_with_other_sizes(torch):
    """They do, though they record sizes."""

    def crop(x, logits, skip):
        size, how = skip.shape[-2:], {"up": 2, "kernel_size": 3}
        masks = carafepp.normalize_masks(logits, size=size, **how)
        direct = carafepp.reassemble_with_logits(x, logits, size=size, **how)
        whole = carafepp.reassemble(x, masks, up=2, size=size)
        h, w = size[0] - 4, size[1] - 4
        valid = carafepp.reassemble(x, masks[..., :h, :w], up=2, size=(h, w), padding=0)
        return masks, whole, direct, valid

    def inputs(n, h, w, height, width):
        return torch.randn(n, 3, h, w), torch.randn(n, 36, h, w), torch.ones(n, 1, height, width)

    traced = torch.jit.trace(crop, inputs(1, 4, 5, 7, 9))
    for sizes in ((1, 4, 5, 7, 9), (2, 6, 3, 12, 5), (1, 3, 3, 6, 6)):
        arguments = inputs(*sizes)
        for result, expected in zip(traced(*arguments), crop(*arguments), strict=True):
            torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("record", ["trace", "export", "compile", "fx"])
def test_graphs_have_output_sizes_of_symbols(record, torch):
    class Module(torch.nn.Module):
        def forward(self, x):
            size = x.shape[-2:]
            return x.new_ones(
                *carafepp.output_size(size, up=2, down=3),
                *carafepp.output_size(size, kernel_size=5, padding=(1, 2)),
            )

    module, x = Module(), torch.randn(1, 3, 8, 9)
    if record == "trace":
        graph = torch.jit.trace(module, x)
    elif record == "export":
        h, w = torch.export.Dim("h", min=4, max=99), torch.export.Dim("w", min=4, max=99)
        graph = torch.export.export(module, (x,), dynamic_shapes=({2: h, 3: w},)).module()
    elif record == "fx":
        graph = torch.fx.symbolic_trace(module)
    else:
        graph = torch.compile(module, backend="eager", fullgraph=True, dynamic=True)
    too_small = [] if record == "export" else [(1, 4)]  # no window fits
    for size in [(8, 9), (5, 7), (12, 6), *too_small]:
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(graph(x), module(x))


@pytest.mark.parametrize("record", ["compile", "fx"])
def test_padding_may_be_an_argument_of_a_graph(record, torch):
    def function(x, m, padding, rows):
        whole = carafepp.reassemble(x, m, padding=padding)
        return whole, carafepp.reassemble(x, m, padding=(rows, 1))

    if record == "fx":
        graph = torch.fx.symbolic_trace(function)
    else:
        graph = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    x = torch.randn(1, 2, 5, 6)
    for padding, rows, height in ((1, 1, 5), ((0, 1), 0, 3), ([1, 1], 1, 5)):
        m = torch.randn(1, 9, height, 6)
        assert_all_same(graph(x, m, padding, rows), function(x, m, padding, rows))


@each_function
def test_torch_fx_traces_the_functions(function, torch):
    """Each trace calls its operators."""
    tensors, params = integer_problem(torch, function, CASES["crop_up"])
    expected = call(function, tensors, params)
    names = INPUTS[function]

    class Module(torch.nn.Module):
        def forward(self, tensors, like):
            arguments = {name: tensors[k] for k, name in enumerate(names)}
            more = {"size": like.shape[-2:]} if "size" in params else {}
            return getattr(carafepp, function)(**arguments, **{**params, **more})

    traced = torch.fx.symbolic_trace(Module())
    targets = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    for index in range(len(expected)):
        assert operator(function, index) in targets
    results = traced(tensors, expected[0])
    assert_all_same(results if isinstance(results, tuple) else (results,), expected)


def test_objects_with_a_torch_function_are_asked(torch):
    """It is no tensor, but has the method."""

    class Logged:
        def __init__(self, tensor):
            self.tensor = tensor

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            tensors = [getattr(arg, "tensor", arg) for arg in args]
            return function, function(*tensors, **kwargs)

    (x, m), params = integer_problem(torch, "reassemble")
    expected = carafepp.reassemble(x, m, **params)
    for inputs in ((Logged(x), m), (x, Logged(m)), (Logged(x), Logged(m))):
        function, result = carafepp.reassemble(*inputs, **params)
        assert function is operator("reassemble")
        assert_same(result, expected)
    with pytest.raises(TypeError, match=r"\[reassemble\] features must be an array.*got Logged"):
        carafepp.reassemble(Logged(x), m, out=expected, **params)


# FLOPs: a multiply-add is two of them. A counter copies the formulas that carafepp.torch registers.


@pytest.fixture
def flop_counter(torch):
    from torch.utils.flop_counter import FlopCounterMode

    import carafepp.torch  # noqa: F401

    return FlopCounterMode(display=False)


def test_flop_counters_know_the_operators(torch, flop_counter):
    inputs = torch.ones(2, 4, 4, 5), torch.ones(2, 72, 4, 5)
    names = [
        "normalize_masks",
        "reassemble",
        "reassemble_with_logits",
        *("reassemble_grad_features", "reassemble_grad_masks"),
        *("reassemble_with_logits_grad_features", "reassemble_with_logits_grad_logits"),
        "normalize_masks_backward",
    ]
    cropped, whole, weights = 2 * (2 * 4 * 7 * 9) * 9, 2 * (2 * 4 * 8 * 10) * 9, 4 * 2 * 18 * 7 * 9
    counts = [weights, cropped, whole, cropped, cropped, whole, whole, 0]
    with flop_counter:
        EveryOperator()(*inputs)
    counted = flop_counter.get_flop_counts()["Global"]
    assert {str(key).removeprefix("carafepp."): n for key, n in counted.items()} == dict(
        zip(names, counts, strict=True)
    )


def test_flop_counters_follow_gradients_and_axes(torch, flop_counter):
    x, m = torch.ones(2, 4, 5, 4, requires_grad=True), torch.ones(2, 8, 10, 18, requires_grad=True)
    with flop_counter:
        carafepp.reassemble(x, m, up=2, groups=2, layout="NHWC").sum().backward()
    assert flop_counter.get_total_flops() == 3 * 2 * (2 * 4 * 8 * 10) * 9


def test_flop_counters_follow_padding(torch, flop_counter):
    """Without padding, K=3 leaves 3 x 4 centres of 5 x 6, and each has four outputs."""
    x, logits = torch.ones(1, 4, 5, 6, requires_grad=True), torch.ones(1, 36, 3, 4)
    with flop_counter:
        y = carafepp.reassemble_with_logits(x, logits, up=2, kernel_size=3, padding=0)
        y.sum().backward()
    assert flop_counter.get_total_flops() == 2 * 2 * (4 * 6 * 8) * 9


def test_fvcore_counts_with_handles(torch):
    """fvcore calls them with values of a trace, and counts a multiply-add as one."""
    from carafepp.torch.flops import fvcore_handles

    module, inputs, _ = every_operator(torch)
    graph = torch.jit.trace(module, inputs).inlined_graph
    handles = fvcore_handles()
    counts = {
        node.kind(): handles[node.kind()](list(node.inputs()), list(node.outputs()))
        for node in graph.nodes()
        if node.kind() in handles
    }
    assert counts["carafepp::reassemble"] == (4 * 7 * 9) * 9
    assert counts["carafepp::reassemble_with_logits_grad_logits"] == (4 * 8 * 10) * 9
    assert set(counts) == set(handles)


# Around the operators


@pytest.mark.exhaustive
def test_modules_may_be_loaded_again(torch):
    """Notebooks do so, with all modules or after an import is forgotten. Results stay the same."""
    subprocess.run([sys.executable, "-c", RELOAD], check=True, timeout=100)


RELOAD = """
import importlib, sys
import torch, carafepp, carafepp.torch
x, m = torch.ones(1, 2, 2, 2, requires_grad=True), torch.ones(1, 1, 4, 4)

def check():
    import carafepp
    from torch.utils.flop_counter import FlopCounterMode
    with FlopCounterMode(display=False) as counter:
        carafepp.reassemble(x, m, up=2).sum().backward()
    assert (x.grad == 4).all() and counter.get_total_flops() == 128
    x.grad = None

check()
names = [name for name in sys.modules if name.partition(".")[0] == "carafepp"]
for name in [*names, *reversed(names)]:
    importlib.reload(sys.modules[name])
    check()
for name in names:
    del sys.modules[name]
check()
"""

# Names of PyTorch that are not public, all that are used.
PRIVATE = [
    "torch._C._are_functorch_transforms_active",
    "torch._C._AutoDispatchBelowAutograd",
    "torch._functorch.autograd_function.enable_single_level_autograd_function",
    "torch.autograd.forward_ad._set_fwd_grad_enabled",
    "torch.autograd.function._SingleLevelFunction",
    "torch.autograd.forward_ad._current_level",
]

WITHOUT_A_PRIVATE_NAME = """
import operator, sys
import torch, torch._functorch.autograd_function
import carafepp, numpy
module, _, name = sys.argv[1].rpartition(".")
kept, kind = sys.modules[module], type(sys.modules[module])

class Without(kind):
    def __getattribute__(self, attribute):
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if attribute == name and caller.startswith("carafepp"):
            raise AttributeError(attribute)
        return super().__getattribute__(attribute)

kept.__class__ = Without
x, m = torch.ones(1, 2, 2, 2, requires_grad=True), torch.ones(1, 1, 4, 4, requires_grad=True)
y = carafepp.reassemble(x, m, up=2)
(g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
g.sum().backward()
assert (y == 1).all() and (g == 4).all() and (m.grad == 2).all()
with torch.autocast("cpu"):
    assert carafepp.reassemble(x, m, up=2).dtype == torch.bfloat16
assert torch.vmap(lambda x, m: carafepp.reassemble(x, m, up=2))(x, m).shape == (1, 2, 4, 4)

def forward_mode():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), x.detach())
        return torch.autograd.forward_ad.unpack_dual(carafepp.reassemble(dual, m, up=2)).tangent

jvp = lambda: torch.func.jvp(lambda x: carafepp.reassemble(x, m, up=2), (x,), (x,))[1]
for function in forward_mode, jvp:  # no tangent is lost
    try:
        assert (function() == 1).all()
    except NotImplementedError as error:
        assert name != "_current_level" and "jvp" in str(error)
compiled = torch.compile(lambda x: (carafepp.reassemble(x, m, up=2),), backend="aot_eager")
assert (compiled(x)[0] == 1).all()
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PRIVATE)
def test_nothing_but_torch_func_needs_private_names(name, torch):
    """A later PyTorch may lack them."""
    command = [sys.executable, "-c", WITHOUT_A_PRIVATE_NAME, name]
    subprocess.run(command, check=True, timeout=100)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointing_computes_again(reentrant, torch):
    from torch.utils.checkpoint import checkpoint

    tensors, params = integer_problem(torch, "reassemble_with_logits")

    def direct(x, logits):
        return (carafepp.reassemble_with_logits(2 * x, logits, **params),)

    def checkpointed(x, logits):
        return (checkpoint(lambda *inputs: direct(*inputs)[0], x, logits, use_reentrant=reentrant),)

    with recorded(torch) as names:
        results = with_gradients(checkpointed, tensors)
    assert names.count("reassemble_with_logits") == 2
    assert_all_same(results, with_gradients(direct, tensors))


class Upsampled:
    """A data set whose samples are computed by the workers, gradients included."""

    def __init__(self, torch):
        self.torch = torch

    def __len__(self):
        return 6

    def __getitem__(self, k):
        x = self.torch.full((64, 24, 24), float(k), requires_grad=True)
        y = carafepp.reassemble(x, self.torch.ones(1, 48, 48), up=2)
        y.sum().backward()
        return y.detach(), x.grad


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_data_loader_workers(torch):
    """The workers are forked after the parent has used threads, which they do not have."""
    data = Upsampled(torch)
    carafepp.set_num_threads(2)
    try:
        expected = [data[k] for k in range(len(data))]
        loader = torch.utils.data.DataLoader(
            data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60
        )
        for sample, values in zip(loader, expected, strict=True):
            assert_all_same(sample, values)
    finally:
        carafepp.set_num_threads(0)


def network(torch):
    """A content encoder and the reassembly, in small integers."""

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.Conv2d(3, 36, 1, bias=False)
            with torch.no_grad():
                self.encoder.weight.copy_(torch.arange(108).reshape(36, 3, 1, 1) % 5 - 2)

        def forward(self, x):
            return carafepp.reassemble_with_logits(
                x, self.encoder(x), up=2, kernel_size=3, normalizer="none"
            )

    return Network()


def images(torch):
    return (torch.arange(4 * 3 * 4 * 5) % 7 - 3.0).reshape(4, 3, 4, 5)


def train_step(rank, folder):
    """Run one of two processes, with half of the batch."""
    import torch
    import torch.distributed as distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    parallel = torch.nn.parallel.DistributedDataParallel(network(torch))
    parallel(images(torch)[2 * rank : 2 * rank + 2]).square().sum().backward()
    np.save(f"{folder}/{rank}.npy", parallel.module.encoder.weight.grad.numpy())
    os._exit(0)  # PyTorch's own teardown of gloo sometimes aborts, with plain layers too


@pytest.mark.exhaustive
def test_data_parallel_training(torch, tmp_path):
    """The mean of two processes' gradients is half of one with the whole batch."""
    if not torch.distributed.is_available():
        pytest.skip("this PyTorch was built without torch.distributed")
    alone = network(torch)
    alone(images(torch)).square().sum().backward()
    expected = alone.encoder.weight.grad.numpy() / 2
    assert expected.any()
    torch.multiprocessing.spawn(train_step, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        np.testing.assert_array_equal(np.load(tmp_path / f"{rank}.npy"), expected)


# On a GPU: the same code


@each_forward
def test_on_a_gpu(function, torch, compiled):
    """Integers give the results and gradients of the CPU, eager and compiled."""
    connected("torch")
    tensors, params = integer_problem(torch, function)
    tensors = in_memory("nhwc")(torch, tensors)
    on_device = [tensor.cuda() for tensor in tensors]

    def run(*inputs):
        return call(function, inputs, params)

    expected = with_gradients(run, tensors)
    for compute in (run, compiled(run, backend="aot_eager")):
        results = with_gradients(compute, on_device)
        assert_all_same([result.cpu() for result in results], expected)
    torch.library.opcheck(operator(function), tuple(that_require_grad(on_device)), params)
