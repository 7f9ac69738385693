"""Array in, same kind of array out: NumPy, PyTorch, the array API, bare DLPack."""

import subprocess
import sys
import types
from unittest import mock

import numpy as np
import pytest

import carafepp
import reference as ref
from cases import CASES, DTYPES, LAYOUTS, double, integer_arrays, numpy_dtype
from cases.calls import FUNCTIONS, RESULTS, arguments, call
from foreign import BFLOAT, CPU, CUDA, CUDA_HOST, ROCM, Foreign
from functions import each_function, each_input
from products import product
from skips import skip
from tolerances import assert_exact

F32 = DTYPES[0]
CASE = CASES["groups_2"]
SOME_CASES = [CASES[name] for name in ("groups_2", "down2", "ratio_3_2", "crop_up", "empty_batch")]


def problem(function, case=CASE, dtypes=F32):
    """Integers and the normaliser none: exact results."""
    return arguments(function, case, integer_arrays(case, dtypes), normalizer="none")


def assert_equal(results, expected):
    for result, exact in zip(results, expected, strict=True):
        np.testing.assert_array_equal(double(result), double(exact))


# NumPy


def test_read_only_numpy_inputs_are_read():
    inputs, params = problem("reassemble")
    assert not any(array.flags.writeable for array in inputs)
    writeable = tuple(array.copy() for array in inputs)
    assert_equal(call("reassemble", inputs, params), call("reassemble", writeable, params))


def test_numpy_memmaps_give_plain_arrays(tmp_path):
    inputs, params = problem("reassemble")
    mapped = np.memmap(tmp_path / "features", np.float32, "w+", shape=inputs[0].shape)
    mapped[:] = inputs[0]
    output = carafepp.reassemble(mapped, inputs[1], **params)
    assert type(output) is np.ndarray
    assert_equal([output], call("reassemble", inputs, params))


def test_numpy_masked_arrays_are_refused():
    """Their mask would be ignored."""
    inputs, params = problem("reassemble")
    with pytest.raises(TypeError, match="features"):
        carafepp.reassemble(np.ma.masked_array(inputs[0]), inputs[1], **params)


@each_input
def test_numpy_arrays_of_foreign_byte_order_are_refused(function, index):
    inputs, params = problem(function)
    inputs = list(inputs)
    inputs[index] = inputs[index].astype(inputs[index].dtype.newbyteorder())
    with pytest.raises(TypeError):
        call(function, inputs, params)


def unloaded(name):
    """A module that its first attribute imports, as a lazy loader makes it."""

    class Lazy(types.ModuleType):
        def __getattribute__(self, attribute):
            raise AssertionError(f"{name} would be imported for its {attribute}")

    return Lazy(name)


# Modules under the name of a library whose arrays nobody has made.
NOT_THERE = {
    "half imported": types.ModuleType,
    "mocked": lambda name: mock.MagicMock(name=name),
    "a mock with classes": lambda name: mock.MagicMock(Tensor=mock.Mock(), ndarray=mock.Mock()),
    "lazy": unloaded,
    "forbidden": lambda name: None,
}


@product(kind=NOT_THERE, library=["torch", "cupy"], turns={"function": FUNCTIONS})
def test_libraries_that_are_not_quite_there_do_not_matter(kind, library, function, monkeypatch):
    inputs, params = problem(function)
    expected = call(function, inputs, params)
    monkeypatch.setitem(sys.modules, library, kind(library))
    assert_equal(call(function, inputs, params), expected)
    out = expected if len(expected) > 1 else expected[0]
    call(function, inputs, {**params, "out": out})
    foreign = tuple(map(Foreign, inputs))
    call(
        function,
        foreign,
        {**params, "out": tuple(map(Foreign, expected)) if len(expected) > 1 else Foreign(out)},
    )
    with pytest.raises(TypeError, match="must be an array"):
        call(function, (object(), *inputs[1:]), params)


IMPORT_BESIDE_CALLS = """
import threading
import numpy, carafepp
x, logits = numpy.ones((1, 4, 4, 4), "f4"), numpy.ones((1, 100, 4, 4), "f4")
thread = threading.Thread(target=lambda: __import__("torch"))
thread.start()
while thread.is_alive():
    carafepp.reassemble_with_logits(x, logits, up=2)
"""


@pytest.mark.usefixtures("torch")
def test_numpy_calls_beside_a_thread_that_imports_torch():
    subprocess.run([sys.executable, "-c", IMPORT_BESIDE_CALLS], check=True, timeout=100)


@product(
    function=FUNCTIONS,
    turns={"case": SOME_CASES, "dtypes": [d for d in DTYPES if "bfloat16" in d.features]},
)
def test_ml_dtypes_bfloat16_arrays_give_the_same(function, case, dtypes):
    inputs, params = problem(function, case, dtypes)
    results = call(function, inputs, params)
    expected = call(function, *problem(function, case, F32))
    for result, exact, like in zip(results, expected, RESULTS[function], strict=True):
        name = dtypes.features if like in ("features", "output") else dtypes.masks
        assert result.dtype == numpy_dtype(name)
        assert_exact(result, double(exact), name)


# PyTorch


def to_torch(torch, array):
    """A tensor with a copy of the array, bfloat16 included."""
    array = np.ascontiguousarray(array)
    if array.dtype == numpy_dtype("bfloat16"):
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def from_torch(tensor):
    return tensor.double().numpy()


@product(function=FUNCTIONS, case=SOME_CASES, turns={"dtypes": DTYPES})
def test_torch_tensors_give_torch_tensors(function, case, dtypes, torch):
    inputs, params = problem(function, case, dtypes)
    tensors = [to_torch(torch, array) for array in inputs]
    expected = call(function, inputs, params)
    results = call(function, tensors, params)
    dtype_of = dict(zip(("features", "masks"), (dtypes.features, dtypes.masks), strict=True))
    dtype_of |= {"output": dtypes.features, "logits": dtypes.masks}
    for result, like in zip(results, RESULTS[function], strict=True):
        assert type(result) is torch.Tensor
        assert result.device.type == "cpu"
        assert result.dtype == getattr(torch, dtype_of[like])
        assert result.is_contiguous()
        assert not result.requires_grad
    assert_equal([from_torch(result) for result in results], expected)


@each_function
def test_torch_out_is_written_and_returned(function, torch):
    inputs, params = problem(function)
    expected = call(function, inputs, params)
    tensors = [to_torch(torch, array) for array in inputs]
    outs = tuple(torch.full(result.shape, torch.nan) for result in expected)
    results = call(function, tensors, {**params, "out": outs if len(outs) == 2 else outs[0]})
    assert all(result is out for result, out in zip(results, outs, strict=True))
    assert_equal([from_torch(out) for out in outs], expected)


@pytest.mark.parametrize("memory", ["channel_slice", "every_other_row", "transposed_picture"])
@each_function
def test_torch_strided_inputs_give_the_same(function, memory, torch):
    inputs, params = problem(function)
    tensors = []
    for array in inputs:
        buffer, view = LAYOUTS[memory](array.shape, array.dtype)
        buffer[...] = 0
        view[...] = array
        tensors.append(torch.from_numpy(view))
    results = call(function, tensors, params)
    assert_equal([from_torch(r) for r in results], call(function, inputs, params))


@each_function
def test_torch_channels_last_in_channels_last_out(function, torch):
    """Each result follows its argument: the output the features, each gradient its own."""
    inputs, params = problem(function)
    expected = call(function, inputs, params)
    tensors = [
        to_torch(torch, array).contiguous(memory_format=torch.channels_last) for array in inputs
    ]
    for result, exact in zip(call(function, tensors, params), expected, strict=True):
        assert result.is_contiguous(memory_format=torch.channels_last)
        assert not result.is_contiguous()
        np.testing.assert_array_equal(from_torch(result), exact)


@pytest.mark.parametrize("which", [0, 1])
def test_torch_gradients_follow_their_own_argument(which, torch):
    inputs, params = problem("reassemble_backward")
    tensors = [to_torch(torch, array) for array in inputs]
    tensors[1 + which] = tensors[1 + which].contiguous(memory_format=torch.channels_last)
    results = call("reassemble_backward", tensors, params)
    assert not results[which].is_contiguous()
    assert results[which].is_contiguous(memory_format=torch.channels_last)
    assert results[1 - which].is_contiguous()


@pytest.mark.parametrize(
    "shape", [(2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1)], ids=["one channel", "one pixel", "one"]
)
def test_torch_ambiguous_formats_give_contiguous_results(shape, torch):
    """Both formats describe the same memory: the result is a plain contiguous tensor."""
    n, c, h, w = shape
    features = torch.ones(shape).contiguous(memory_format=torch.channels_last)
    assert features.is_contiguous()
    assert features.is_contiguous(memory_format=torch.channels_last)
    output = carafepp.reassemble(features, torch.ones(n, 9, 2 * h, 2 * w), up=2)
    assert output.shape == (n, c, 2 * h, 2 * w)
    assert output.stride() == torch.empty(output.shape).stride()


def test_torch_unbatched_tensors_give_unbatched_contiguous_results(torch):
    inputs, params = problem("reassemble")
    (expected,) = call("reassemble", inputs, params)
    output = carafepp.reassemble(*(to_torch(torch, array[0]) for array in inputs), **params)
    assert output.is_contiguous()
    np.testing.assert_array_equal(output.numpy(), expected[0])


def test_torch_layout_nhwc_gives_nhwc(torch):
    inputs, params = problem("reassemble")
    (expected,) = call("reassemble", inputs, params)
    tensors = [to_torch(torch, array.transpose(0, 2, 3, 1)) for array in inputs]
    output = carafepp.reassemble(*tensors, **params, layout="NHWC")
    assert output.is_contiguous()
    np.testing.assert_array_equal(output.numpy(), expected.transpose(0, 2, 3, 1))


def test_torch_inference_tensors_are_fine(torch):
    inputs, params = problem("reassemble")
    with torch.inference_mode():
        output = carafepp.reassemble(*(to_torch(torch, array) for array in inputs), **params)
        assert_equal([output.numpy()], call("reassemble", inputs, params))


@each_input
def test_torch_tensors_that_require_grad_are_read_under_no_grad(function, index, torch):
    inputs, params = problem(function)
    tensors = [to_torch(torch, array) for array in inputs]
    tensors[index].requires_grad_()
    with torch.no_grad():
        results = call(function, tensors, params)
    assert not any(result.requires_grad for result in results)
    assert_equal([from_torch(r) for r in results], call(function, inputs, params))


def test_torch_parameters_are_read_under_no_grad(torch):
    inputs, params = problem("reassemble")
    parameter = torch.nn.Parameter(to_torch(torch, inputs[0]))
    with torch.no_grad():
        output = carafepp.reassemble(parameter, to_torch(torch, inputs[1]), **params)
    assert type(output) is torch.Tensor
    assert_equal([output.numpy()], call("reassemble", inputs, params))


def test_torch_out_that_requires_grad_is_refused_while_grad_mode_is_on(torch):
    inputs, params = problem("reassemble")
    (expected,) = call("reassemble", inputs, params)
    out = torch.zeros(expected.shape, requires_grad=True)
    with pytest.raises(NotImplementedError, match="grad"):
        carafepp.reassemble(*(to_torch(torch, a) for a in inputs), **params, out=out)
    assert not out.any()


def test_torch_subclasses_with_data_are_read(torch):
    class Picture(torch.Tensor):
        pass

    inputs, params = problem("reassemble")
    picture = to_torch(torch, inputs[0]).as_subclass(Picture)
    output = carafepp.reassemble(picture, to_torch(torch, inputs[1]), **params)
    assert_equal([output.numpy()], call("reassemble", inputs, params))


def fake_tensor(torch, tensor):
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode().from_tensor(tensor)


def wrapper_subclass(torch, tensor):
    """A subclass whose own memory is empty: it keeps its data somewhere else."""

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        def __init__(self, inner):
            self.inner = inner

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            raise NotImplementedError("no function is known")

    return Wrapper(tensor)


def functional_tensor(torch, tensor):
    return torch._to_functional_tensor(tensor)


WITHOUT_DATA = {
    "meta": lambda torch, tensor: tensor.to("meta"),
    "fake": fake_tensor,
    "wrapper": wrapper_subclass,
    "functional": functional_tensor,
    "sparse": lambda torch, tensor: tensor.to_sparse(),
    "mkldnn": lambda torch, tensor: tensor.to_mkldnn(),
    "quantized": lambda torch, tensor: torch.quantize_per_tensor(tensor, 1.0, 0, torch.qint8),
    "nested": lambda torch, tensor: torch.nested.nested_tensor(list(tensor)),
    "complex": lambda torch, tensor: tensor.to(torch.complex64),
}
CLEAR_ERRORS = (TypeError, ValueError, NotImplementedError)


@pytest.mark.filterwarnings("ignore")  # of prototypes that PyTorch may change
@pytest.mark.parametrize("make", WITHOUT_DATA.values(), ids=WITHOUT_DATA)
@pytest.mark.parametrize("index", [0, 1], ids=["features", "masks"])
def test_torch_tensors_without_dense_data_are_refused(make, index, torch):
    inputs, params = problem("reassemble")
    tensors = [to_torch(torch, array) for array in inputs]
    try:
        tensors[index] = make(torch, tensors[index])
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        skip("torch", f"this PyTorch makes no such tensor: {error}")
    out = torch.zeros(CASE.output_shape)
    with pytest.raises(CLEAR_ERRORS, match=r"^\[reassemble\] .*" + ("features", "masks")[index]):
        carafepp.reassemble(*tensors, **params, out=out)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["meta", "fake", "wrapper", "functional", "sparse"])
def test_torch_out_without_data_is_refused(kind, torch):
    inputs, params = problem("reassemble")
    (expected,) = call("reassemble", inputs, params)
    out = WITHOUT_DATA[kind](torch, torch.zeros(expected.shape))
    with pytest.raises(CLEAR_ERRORS, match=r"^\[reassemble\] "):
        carafepp.reassemble(*(to_torch(torch, a) for a in inputs), **params, out=out)


def test_torch_vmapped_tensors_are_refused_with_out(torch):
    inputs, params = problem("reassemble")
    tensors = [to_torch(torch, array)[None] for array in inputs]
    out = torch.zeros(CASE.output_shape)
    with pytest.raises(CLEAR_ERRORS, match=r"^\[reassemble\] "):
        torch.vmap(lambda x, m: carafepp.reassemble(x, m, **params, out=out))(*tensors)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_torch_tangents_are_refused_with_out(torch):
    from torch.autograd import forward_ad

    inputs, params = problem("reassemble")
    x, m = (to_torch(torch, array) for array in inputs)
    out = torch.zeros(CASE.output_shape)
    with forward_ad.dual_level():
        calls = {
            "features": (forward_ad.make_dual(x, x), m, out),
            "masks": (x, forward_ad.make_dual(m, m), out),
            "out": (x, m, forward_ad.make_dual(out, out)),
        }
        for name, (features, masks, result) in calls.items():
            with pytest.raises(NotImplementedError, match=rf"\[reassemble\] {name} .* tangent"):
                carafepp.reassemble(features, masks=masks, **params, out=result)


def test_torch_lazily_negated_tensors_are_never_read_with_the_wrong_sign(torch):
    """The imaginary part of a conjugate is a view with a sign bit that only PyTorch applies."""
    inputs, params = problem("reassemble")
    x, m = (to_torch(torch, array) for array in inputs)
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    output = carafepp.reassemble(negated, m, **params)
    assert_equal([output.numpy()], [-call("reassemble", inputs, params)[0]])
    with pytest.raises(CLEAR_ERRORS, match="features"):
        carafepp.reassemble(negated, m, **params, out=torch.zeros_like(output))


def test_torch_expanded_tensors_are_read(torch):
    inputs, params = problem("reassemble")
    masks = to_torch(torch, inputs[1])[:, :, :1, :1].expand(inputs[1].shape)
    output = carafepp.reassemble(to_torch(torch, inputs[0]), masks, **params)
    expected = ref.reassemble(inputs[0], masks.numpy(), **CASE.factors)
    np.testing.assert_array_equal(output.numpy(), expected)


def test_torch_expanded_out_is_refused(torch):
    inputs, params = problem("reassemble")
    (expected,) = call("reassemble", inputs, params)
    out = torch.zeros(1, 1, 1, 1).expand(expected.shape)
    with pytest.raises(ValueError, match=r"\[reassemble\] out"):
        carafepp.reassemble(*(to_torch(torch, a) for a in inputs), **params, out=out)


# The array API: any library whose arrays name their namespace


@product(function=FUNCTIONS, turns={"case": SOME_CASES, "dtype": ["float32", "float64"]})
def test_array_api_arrays_give_arrays_of_their_library(function, case, dtype, array_api_strict):
    dtypes = next(d for d in DTYPES if (d.features, d.masks) == (dtype, dtype))
    inputs, params = problem(function, case, dtypes)
    arrays = [array_api_strict.asarray(array.copy()) for array in inputs]
    expected = call(function, inputs, params)
    results = call(function, arrays, params)
    for result, array in zip(results, expected, strict=True):
        assert type(result) is type(arrays[0])
        assert result.dtype == getattr(array_api_strict, dtype)
        np.testing.assert_array_equal(np.from_dlpack(result), array)


@each_function
def test_array_api_out_is_written_and_returned(function, array_api_strict):
    inputs, params = problem(function)
    expected = call(function, inputs, params)
    arrays = [array_api_strict.asarray(array.copy()) for array in inputs]
    outs = tuple(
        array_api_strict.zeros(result.shape, dtype=array_api_strict.float32) for result in expected
    )
    results = call(function, arrays, {**params, "out": outs if len(outs) == 2 else outs[0]})
    assert all(result is out for result, out in zip(results, outs, strict=True))
    assert_equal([np.from_dlpack(out) for out in outs], expected)


# Bare DLPack


class Bare:
    """An array that speaks DLPack and nothing else; `versioned` tells whether 1.0 of it."""

    def __init__(self, array, versioned=True):
        self.array = array
        self.versioned = versioned
        self.exports = 0

    @property
    def shape(self):
        return self.array.shape

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()

    def __dlpack__(self, *, stream=None, **keywords):
        self.exports += 1
        if keywords and not self.versioned:
            raise TypeError(f"unexpected keywords {sorted(keywords)}")
        assert stream is None, "a CPU array knows no streams"
        return self.array.__dlpack__(**keywords)


class WithoutShape(Bare):
    """DLPack itself requires two methods and no attribute."""

    shape = property(lambda self: (_ for _ in ()).throw(AttributeError("shape")))


@pytest.mark.parametrize("kind", [Bare, WithoutShape])
@pytest.mark.parametrize("versioned", [True, False], ids=["dlpack 1", "dlpack 0"])
@each_function
def test_bare_dlpack_arrays_are_read_and_written(function, versioned, kind):
    inputs, params = problem(function)
    expected = call(function, inputs, params)
    arrays = [kind(array.copy(), versioned) for array in inputs]
    outs = tuple(kind(np.full_like(result, np.nan), versioned) for result in expected)
    results = call(function, arrays, {**params, "out": outs if len(outs) == 2 else outs[0]})
    assert all(result is out for result, out in zip(results, outs, strict=True))
    assert_equal([out.array for out in outs], expected)


@each_function
def test_bare_dlpack_arrays_without_out_are_refused(function):
    inputs, params = problem(function)
    with pytest.raises(TypeError, match="out"):
        call(function, [Bare(array.copy()) for array in inputs], params)


def test_bare_dlpack_read_only_inputs_are_read():
    inputs, params = problem("reassemble")
    assert not inputs[0].flags.writeable
    (expected,) = call("reassemble", inputs, params)
    out = np.full_like(expected, np.nan)
    carafepp.reassemble(*(Bare(array) for array in inputs), **params, out=Bare(out))
    np.testing.assert_array_equal(out, expected)


def test_bare_dlpack_read_only_out_is_refused():
    inputs, params = problem("reassemble")
    (expected,) = call("reassemble", inputs, params)
    out = np.zeros_like(expected)
    out.flags.writeable = False
    with pytest.raises((ValueError, TypeError), match="out"):
        carafepp.reassemble(*(Bare(a.copy()) for a in inputs), **params, out=Bare(out))
    assert not out.any()


def test_an_error_of_a_foreign_export_reaches_the_caller():
    class Broken(Bare):
        def __dlpack__(self, **keywords):
            raise BufferError("exported elsewhere")

    inputs, params = problem("reassemble")
    (expected,) = call("reassemble", inputs, params)
    with pytest.raises((BufferError, TypeError, ValueError)):
        carafepp.reassemble(
            Broken(inputs[0]), Bare(inputs[1].copy()), **params, out=Bare(np.empty_like(expected))
        )


def test_a_foreign_export_that_is_no_capsule_is_a_type_error():
    class Nonsense(Bare):
        def __dlpack__(self, **keywords):
            return "no capsule"

    inputs, params = problem("reassemble")
    (expected,) = call("reassemble", inputs, params)
    with pytest.raises(TypeError):
        carafepp.reassemble(
            Nonsense(inputs[0]), Bare(inputs[1].copy()), **params, out=Bare(np.empty_like(expected))
        )


def foreign_call(make):
    """reassemble of foreign arrays into a foreign out; (what was written, what was expected)."""
    (features, masks), params = problem("reassemble")
    (expected,) = call("reassemble", (features, masks), params)
    out = np.zeros_like(expected)
    carafepp.reassemble(make(features.copy()), make(masks.copy()), **params, out=make(out))
    return out, expected


def test_arrays_built_by_hand_are_read_and_written():
    """The control of the tests below."""
    out, expected = foreign_call(Foreign)
    np.testing.assert_array_equal(out, expected)


def test_dlpack_without_strides_is_c_order():
    out, expected = foreign_call(lambda array: Foreign(array, strides=False))
    np.testing.assert_array_equal(out, expected)


def test_dlpack_byte_offset_is_added():
    out, expected = foreign_call(lambda array: Foreign(array, byte_offset=64))
    np.testing.assert_array_equal(out, expected)


def test_dlpack_pinned_memory_counts_as_cpu():
    out, expected = foreign_call(lambda array: Foreign(array, device=(CUDA_HOST, 0)))
    np.testing.assert_array_equal(out, expected)


def test_dlpack_bfloat16_is_read_and_written():
    dtypes = DTYPES[3]
    (features, masks), params = problem("reassemble", CASE, dtypes)
    (expected,) = call("reassemble", (features, masks), params)
    bits = [array.view(np.int16).copy() for array in (features, masks, np.zeros_like(expected))]
    x, m, out = (Foreign(array, code=BFLOAT) for array in bits)
    assert carafepp.reassemble(x, m, **params, out=out) is out
    np.testing.assert_array_equal(bits[2].view(expected.dtype), expected)


def test_dlpack_vector_dtypes_are_refused():
    with pytest.raises(TypeError):
        foreign_call(lambda array: Foreign(array, lanes=2))


@pytest.mark.usefixtures("without_cuda")
def test_cuda_arrays_are_refused_by_a_build_without_cuda():
    with pytest.raises(NotImplementedError, match="CUDA"):
        foreign_call(lambda array: Foreign(array, device=(CUDA, 0)))


@pytest.mark.usefixtures("without_cuda")
def test_cuda_arrays_without_a_namespace_are_refused_before_anything_is_allocated():
    (features, masks), params = problem("reassemble")
    x, m = (Foreign(array.copy(), device=(CUDA, 0)) for array in (features, masks))
    with pytest.raises((NotImplementedError, TypeError), match=r"CUDA|out"):
        carafepp.reassemble(x, m, **params)


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("index", range(3), ids=["features", "masks", "out"])
def test_one_cuda_array_among_cpu_arrays_is_refused(index):
    (features, masks), params = problem("reassemble")
    (expected,) = call("reassemble", (features, masks), params)
    arrays = [features.copy(), masks.copy(), np.zeros_like(expected)]
    devices = [(CUDA, 0) if k == index else (CPU, 0) for k in range(3)]
    x, m, out = (Foreign(a, device=d) for a, d in zip(arrays, devices, strict=True))
    with pytest.raises((ValueError, NotImplementedError), match=r"(?i)cuda"):
        carafepp.reassemble(x, m, **params, out=out)
    assert not arrays[2].any()


def test_arrays_on_a_device_that_nobody_supports_are_refused():
    with pytest.raises((ValueError, NotImplementedError)):
        foreign_call(lambda array: Foreign(array, device=(ROCM, 0)))


# Immutable arrays


def test_arrays_of_an_immutable_library_need_another_result():
    """A stand-in: DLPack, a namespace, and a package named tensorflow."""

    class Array(Bare):
        def __array_namespace__(self, api_version=None):
            return np

        device = "cpu"
        dtype = np.dtype(np.float32)

    Array.__module__ = "tensorflow.python"
    inputs, params = problem("reassemble")
    with pytest.raises(TypeError, match="immutable"):
        carafepp.reassemble(*(Array(array.copy()) for array in inputs), **params)
