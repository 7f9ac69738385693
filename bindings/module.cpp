// SPDX-License-Identifier: Apache-2.0
// carafepp._core turns Python arrays into carafepp_tensor and statuses into exceptions, and releases the GIL in
// between. The core checks the arguments. This file checks only what the core cannot see: whether a Python object is
// an integer, an array, or read-only.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "carafepp/carafepp.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

[[noreturn]] void raise(PyObject* type, const std::string& sentence) {
    PyErr_SetString(type, sentence.c_str());
    throw nb::python_error();
}

void check(carafepp_status status) {
    if (status == CARAFEPP_OK) return;
    PyObject* const types[] = {
        nullptr, PyExc_TypeError, PyExc_ValueError, PyExc_NotImplementedError, PyExc_RuntimeError, PyExc_MemoryError};
    raise(types[status], carafepp_last_error());
}

std::string show(nb::handle object) {
    return std::string(nb::repr(object).c_str()) + " (" + nb::inst_name(object).c_str() + ")";
}

struct Params {
    std::string function;
    carafepp_function number;
    carafepp_params values{};
    std::optional<std::string> implementation;

    std::string sentence(const std::string& text) const { return "[" + function + "] " + text; }

    int64_t integer(const char* name, nb::handle object, int64_t limit) const {
        nb::object index = nb::steal(PyNumber_Index(object.ptr()));
        if (!index.is_valid()) {
            PyErr_Clear();
            raise(PyExc_TypeError, sentence(std::string(name) + " must be an integer; got " + show(object) + "."));
        }
        int overflow = 0;
        const long long value = PyLong_AsLongLongAndOverflow(index.ptr(), &overflow);
        if (overflow != 0 || value > limit || value < -limit) {
            raise(PyExc_ValueError, sentence(std::string(name) + " must be within " + std::to_string(limit) +
                                             " of 0; got " + show(index) + "."));
        }
        return value;
    }

    int32_t small_integer(const char* name, nb::handle object) const {
        return static_cast<int32_t>(integer(name, object, std::numeric_limits<int32_t>::max()));
    }

    void pair(const char* name, const char* names, nb::handle object, int64_t (&numbers)[2]) const {
        if (!PySequence_Check(object.ptr()) || PySequence_Size(object.ptr()) != 2) {
            PyErr_Clear();
            raise(PyExc_TypeError,
                  sentence(std::string(name) + " must be a pair " + names + " of integers; got " + show(object) + "."));
        }
        for (int k = 0; k < 2; k++) {
            numbers[k] = integer(name, nb::object(object[k]), std::numeric_limits<int64_t>::max());
        }
    }

    Params(const char* function, carafepp_function number, nb::handle up, nb::handle down, nb::handle kernel_size,
           nb::handle groups, int normalizer, nb::handle size, nb::handle padding, bool channels_last,
           std::optional<std::string> implementation)
        : function(function), number(number), implementation(std::move(implementation)) {
        values.struct_size = sizeof values;
        values.up = small_integer("up", up);
        values.down = small_integer("down", down);
        values.kernel_size = small_integer("kernel_size", kernel_size);
        values.groups = small_integer("groups", groups);
        values.normalizer = normalizer;
        if (channels_last) values.flags |= CARAFEPP_CHANNELS_LAST;
        if (this->implementation) values.implementation = this->implementation->c_str();
        if (!size.is_none()) {
            values.flags |= CARAFEPP_SIZE;
            pair("size", "(H', W')", size, values.size);
        }
        if (!padding.is_none()) {
            values.flags |= CARAFEPP_PADDING;
            pair("padding", "(rows, columns)", padding, values.padding);
        }
    }

    Params(const Params&) = delete;  // values points into implementation
};

// A stride in elements with its sign. CuPy up to 14.2 loses that of negative strides (cupy#10172). It divides bytes
// as numbers without a sign, so these strides are too large by 2**64 / itemsize.
int64_t with_sign(int64_t stride, int64_t itemsize) {
    if (itemsize < 2) return stride;
    const int64_t half = INT64_MAX / itemsize + 1;
    return stride >= half && stride - half < half ? stride - half - half : stride;
}

// An array argument. It is an array, None for an optional result, or a pair of 16-bit integers and a dtype number.
// The pair is for bfloat16: NumPy cannot export the dtype of ml_dtypes.
class Tensor {
public:
    Tensor(const Params& params, const char* name, nb::handle object, bool result) {
        if (object.is_none()) return;
        nb::object array = nb::borrow(object);
        if (PyTuple_Check(object.ptr())) {
            tensor_.dtype = nb::cast<carafepp_dtype>(object[1]);
            array = object[0];
        }
        if (result) {
            nb::ndarray<> writable;
            if (nb::try_cast(array, writable, false)) view_ = nb::ndarray<nb::ro>(writable);
        } else {
            nb::try_cast(array, view_, false);
        }
        if (!view_.is_valid()) {
            if (result && nb::try_cast(array, view_, false)) {
                raise(PyExc_ValueError,
                      params.sentence(std::string(name) + " must be writable; got a read-only array."));
            }
            raise(PyExc_TypeError,
                  params.sentence(std::string(name) +
                                  " must be an array that DLPack can describe (a plain dtype in the byte "
                                  "order of this machine, strides of whole elements); got " +
                                  nb::inst_name(array).c_str() + "."));
        }
        const nb::dlpack::dtype dtype = view_.dtype();
        if (tensor_.dtype == 0) tensor_.dtype = dtype.lanes == 1 ? dtype.code << 8 | dtype.bits : dtype.code << 8;
        tensor_.data = const_cast<void*>(view_.data());
        tensor_.device = view_.device_type();
        tensor_.device_index = view_.device_id();
        tensor_.ndim = static_cast<int32_t>(view_.ndim());
        const size_t axes = std::min<size_t>(view_.ndim(), 5);
        std::copy_n(view_.shape_ptr(), axes, tensor_.shape);
        std::copy_n(view_.stride_ptr(), axes, tensor_.strides);
        if (view_.device_type() != nb::device::cpu::value) {
            for (size_t axis = 0; axis < axes; axis++)
                tensor_.strides[axis] = with_sign(tensor_.strides[axis], static_cast<int64_t>(view_.itemsize()));
        }
        given_ = true;
    }

    const carafepp_tensor* get() const { return given_ ? &tensor_ : nullptr; }

private:
    nb::ndarray<nb::ro> view_;  // keeps the array alive
    carafepp_tensor tensor_{};
    bool given_ = false;
};

// Takes the GIL again. When an interpreter before 3.14 ends, it stops daemon threads that ask for the GIL by
// pthread_exit. The unwinding would terminate the process at the first noexcept frame. Such a thread is caught here
// and sleeps until the process ends.
void take_gil(PyThreadState* state) {
    try {
        PyEval_RestoreThread(state);
    } catch (...) {
        for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
}

// Calls the core without the GIL. `stream` is a cudaStream_t as a number; 0 is the legacy default stream. CPU arrays
// ignore it.
template <class F>
void call(std::uintptr_t stream, F f) {
    PyThreadState* const state = PyEval_SaveThread();
    const carafepp_status status = f(reinterpret_cast<void*>(stream));
    take_gil(state);
    check(status);
}

void reassemble(const Params& params, nb::handle features, nb::handle masks, nb::handle output, std::uintptr_t stream) {
    const Tensor x(params, "features", features, false), m(params, "masks", masks, false),
        y(params, "output", output, true);
    call(stream, [&](void* handle) { return carafepp_reassemble(&params.values, x.get(), m.get(), y.get(), handle); });
}

void reassemble_backward(const Params& params, nb::handle grad_output, nb::handle features, nb::handle masks,
                         nb::handle grad_features, nb::handle grad_masks, std::uintptr_t stream) {
    const Tensor d(params, "grad_output", grad_output, false), x(params, "features", features, false),
        m(params, "masks", masks, false);
    const Tensor gx(params, "grad_features", grad_features, true), gm(params, "grad_masks", grad_masks, true);
    call(stream, [&](void* handle) {
        return carafepp_reassemble_backward(&params.values, d.get(), x.get(), m.get(), gx.get(), gm.get(), handle);
    });
}

void reassemble_with_logits(const Params& params, nb::handle features, nb::handle logits, nb::handle output,
                            std::uintptr_t stream) {
    const Tensor x(params, "features", features, false), l(params, "logits", logits, false),
        y(params, "output", output, true);
    call(stream, [&](void* handle) {
        return carafepp_reassemble_with_logits(&params.values, x.get(), l.get(), y.get(), handle);
    });
}

void reassemble_with_logits_backward(const Params& params, nb::handle grad_output, nb::handle features,
                                     nb::handle logits, nb::handle grad_features, nb::handle grad_logits,
                                     std::uintptr_t stream) {
    const Tensor d(params, "grad_output", grad_output, false), x(params, "features", features, false),
        l(params, "logits", logits, false);
    const Tensor gx(params, "grad_features", grad_features, true), gl(params, "grad_logits", grad_logits, true);
    call(stream, [&](void* handle) {
        return carafepp_reassemble_with_logits_backward(&params.values, d.get(), x.get(), l.get(), gx.get(), gl.get(),
                                                        handle);
    });
}

void normalize_masks(const Params& params, nb::handle logits, nb::handle masks, std::uintptr_t stream) {
    const Tensor l(params, "logits", logits, false), m(params, "masks", masks, true);
    call(stream, [&](void* handle) { return carafepp_normalize_masks(&params.values, l.get(), m.get(), handle); });
}

void normalize_masks_backward(const Params& params, nb::handle grad_masks, nb::handle logits, nb::handle grad_logits,
                              std::uintptr_t stream) {
    const Tensor gm(params, "grad_masks", grad_masks, false), l(params, "logits", logits, false);
    const Tensor gl(params, "grad_logits", grad_logits, true);
    call(stream, [&](void* handle) {
        return carafepp_normalize_masks_backward(&params.values, gm.get(), l.get(), gl.get(), handle);
    });
}

nb::tuple output_shape(const Params& params, nb::handle shape) {
    carafepp_tensor input{};
    input.ndim = static_cast<int32_t>(nb::len(shape));
    for (int k = 0; k < std::min(input.ndim, 5); k++) {
        input.shape[k] = params.integer("shape", nb::object(shape[k]), std::numeric_limits<int64_t>::max());
    }
    int64_t result[5];
    check(carafepp_output_shape(&params.values, params.number, &input, result));
    if (input.ndim == 3) return nb::make_tuple(result[0], result[1], result[2]);
    return nb::make_tuple(result[0], result[1], result[2], result[3]);
}

using Entry = std::tuple<std::string, std::optional<std::string>>;

std::vector<Entry> list_implementations(const Params& params, nb::sequence inputs, nb::sequence results, bool fastest) {
    std::vector<Tensor> tensors;
    std::vector<const carafepp_tensor*> pointers;
    tensors.reserve(nb::len(inputs) + nb::len(results));
    const size_t expected[][2] = {{0, 0}, {2, 1}, {3, 2}, {2, 1}, {3, 2}, {1, 1}, {2, 1}};
    if (nb::len(inputs) != expected[params.number][0] || nb::len(results) != expected[params.number][1]) {
        raise(PyExc_TypeError,
              params.sentence("the implementations depend on " + std::to_string(expected[params.number][0]) +
                              " arrays, those that the function reads; got " + std::to_string(nb::len(inputs)) + "."));
    }
    const char* const names[][5] = {{},
                                    {"features", "masks", "output"},
                                    {"grad_output", "features", "masks", "grad_features", "grad_masks"},
                                    {"features", "logits", "output"},
                                    {"grad_output", "features", "logits", "grad_features", "grad_logits"},
                                    {"logits", "masks"},
                                    {"grad_masks", "logits", "grad_logits"}};
    for (nb::sequence arrays : {inputs, results}) {
        for (nb::handle array : arrays) {
            tensors.emplace_back(params, names[params.number][tensors.size()], array, false);
            pointers.push_back(tensors.back().get());
        }
    }
    std::vector<Entry> entries;
    const auto visit = [](void* user, const char* name, const char* declines) {
        std::optional<std::string> reason;
        if (declines != nullptr) reason = declines;
        static_cast<std::vector<Entry>*>(user)->emplace_back(name, reason);
    };
    carafepp_params values = params.values;
    if (fastest) values.flags |= CARAFEPP_FASTEST;
    check(carafepp_list_implementations(&values, params.number, pointers.data(), visit, &entries));
    return entries;
}

}  // namespace

NB_MODULE(_core, m) {
    m.doc() = "The C ABI of carafepp (carafepp.h) on arrays that speak DLPack. Private: use the functions of carafepp.";

    m.attr("OUTPUT_SIZE") = CARAFEPP_OUTPUT_SIZE + 0;
    m.attr("REASSEMBLE") = CARAFEPP_REASSEMBLE + 0;
    m.attr("REASSEMBLE_BACKWARD") = CARAFEPP_REASSEMBLE_BACKWARD + 0;
    m.attr("REASSEMBLE_WITH_LOGITS") = CARAFEPP_REASSEMBLE_WITH_LOGITS + 0;
    m.attr("REASSEMBLE_WITH_LOGITS_BACKWARD") = CARAFEPP_REASSEMBLE_WITH_LOGITS_BACKWARD + 0;
    m.attr("NORMALIZE_MASKS") = CARAFEPP_NORMALIZE_MASKS + 0;
    m.attr("NORMALIZE_MASKS_BACKWARD") = CARAFEPP_NORMALIZE_MASKS_BACKWARD + 0;
    m.attr("SOFTMAX") = CARAFEPP_SOFTMAX + 0;
    m.attr("SIGMOID") = CARAFEPP_SIGMOID + 0;
    m.attr("SIGMOID_NORMALIZED") = CARAFEPP_SIGMOID_NORMALIZED + 0;
    m.attr("NONE") = CARAFEPP_NONE + 0;
    m.attr("CHANNELS_LAST") = CARAFEPP_CHANNELS_LAST + 0;
    m.attr("BFLOAT16") = CARAFEPP_BFLOAT16 + 0;
    m.attr("CUDA") = CARAFEPP_CUDA + 0;
    m.attr("CUDA_MANAGED") = CARAFEPP_CUDA_MANAGED + 0;

    nb::class_<Params>(m, "Params", "The carafepp_params of one function.")
        .def(nb::init<const char*, int, nb::handle, nb::handle, nb::handle, nb::handle, int, nb::handle, nb::handle,
                      bool, std::optional<std::string>>(),
             "function"_a, "number"_a, "up"_a.none(), "down"_a.none(), "kernel_size"_a.none(), "groups"_a.none(),
             "normalizer"_a, "size"_a.none(), "padding"_a.none(), "channels_last"_a, "implementation"_a.none());

    m.def("reassemble", reassemble, "params"_a, "features"_a, "masks"_a, "output"_a, "stream"_a);
    m.def("reassemble_backward", reassemble_backward, "params"_a, "grad_output"_a, "features"_a, "masks"_a,
          "grad_features"_a.none(), "grad_masks"_a.none(), "stream"_a);
    m.def("reassemble_with_logits", reassemble_with_logits, "params"_a, "features"_a, "logits"_a, "output"_a,
          "stream"_a);
    m.def("reassemble_with_logits_backward", reassemble_with_logits_backward, "params"_a, "grad_output"_a, "features"_a,
          "logits"_a, "grad_features"_a.none(), "grad_logits"_a.none(), "stream"_a);
    m.def("normalize_masks", normalize_masks, "params"_a, "logits"_a, "masks"_a, "stream"_a);
    m.def("normalize_masks_backward", normalize_masks_backward, "params"_a, "grad_masks"_a, "logits"_a, "grad_logits"_a,
          "stream"_a);
    m.def("output_shape", output_shape, "params"_a, "shape"_a,
          nb::sig("def output_shape(params: Params, shape: object) -> tuple[int, ...]"));
    m.def("list_implementations", list_implementations, "params"_a, "inputs"_a, "results"_a, "fastest"_a = false,
          nb::sig("def list_implementations(params: Params, inputs: list[object], results: list[object], "
                  "fastest: bool = False) -> list[tuple[str, str | None]]"));

    nb::set_leak_warnings(false);  // a daemon thread may hold objects when the program ends

    m.def("version", carafepp_version);
    m.def("config", carafepp_config);
    m.def("devices", carafepp_devices);
    m.def("set_num_threads", carafepp_set_num_threads, "threads"_a);
    m.def("get_num_threads", carafepp_get_num_threads);
}
