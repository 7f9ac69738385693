// SPDX-License-Identifier: Apache-2.0
// XLA calls these handlers in JAX programs: custom calls over the C ABI, without Python. The wrapper in
// python/carafepp/jax registers them. XLA gives dense arrays in row-major order, allocates the results, and has the
// stream. Arrays may have more axes than four (those of vmap): the leading ones are folded into N.
#include <algorithm>
#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "carafepp/carafepp.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

struct Place {
    carafepp_device device;
    int32_t index;
    void* stream;
};

carafepp_dtype dtype_of(ffi::DataType type) {
    switch (type) {
        case ffi::F16: return CARAFEPP_FLOAT16;
        case ffi::F32: return CARAFEPP_FLOAT32;
        case ffi::F64: return CARAFEPP_FLOAT64;
        case ffi::BF16: return CARAFEPP_BFLOAT16;
        default: return 0;  // the core refuses it
    }
}

carafepp_tensor tensor(const ffi::AnyBuffer& array, const Place& place) {
    carafepp_tensor t{};
    t.data = array.untyped_data();
    t.dtype = dtype_of(array.element_type());
    t.device = place.device;
    t.device_index = place.index;
    t.ndim = 4;
    t.shape[0] = 1;
    const auto shape = array.dimensions();
    int64_t stride = 1;
    for (size_t axis = shape.size(), k = 4; axis-- > 0;) {
        if (k > 1) {
            t.shape[--k] = shape[axis];
            t.strides[k] = stride;
            stride *= shape[axis];
        } else {
            t.shape[0] *= shape[axis];
        }
    }
    t.strides[0] = stride;
    return t;
}

ffi::ErrorOr<ffi::AnyBuffer> array_of(const ffi::RemainingRets& results, size_t index) {
    auto result = results.get<ffi::AnyBuffer>(index);
    if (!result.has_value()) return ffi::Unexpected(result.error());
    return **result;
}

ffi::Error error(carafepp_status status) {
    constexpr ffi::ErrorCode codes[] = {ffi::ErrorCode::kOk,
                                        ffi::ErrorCode::kInvalidArgument,
                                        ffi::ErrorCode::kInvalidArgument,
                                        ffi::ErrorCode::kUnimplemented,
                                        ffi::ErrorCode::kInternal,
                                        ffi::ErrorCode::kResourceExhausted};
    return status == CARAFEPP_OK ? ffi::Error::Success() : ffi::Error(codes[status], carafepp_last_error());
}

template <class... Arguments>
constexpr size_t count_tensors(carafepp_status (*)(Arguments...)) {
    return sizeof...(Arguments) - 2;  // the others are params and stream
}

template <auto function, size_t... k>
carafepp_status call(const carafepp_params& params, const carafepp_tensor* const* tensors, void* stream,
                     std::index_sequence<k...>) {
    return function(&params, tensors[k]..., stream);
}

// `needed` has a bit for each result of the function: XLA has no arrays for the others. `size` and `padding` have two
// numbers or none.
template <auto function>
ffi::Error run(const Place& place, int64_t up, int64_t down, int64_t kernel_size, int64_t groups, int64_t normalizer,
               int64_t flags, int64_t needed, ffi::Span<const int64_t> size, ffi::Span<const int64_t> padding,
               std::string_view implementation, ffi::RemainingArgs inputs, ffi::RemainingRets results) {
    constexpr size_t count = count_tensors(function);
    const std::string name(implementation);
    carafepp_params params{};
    params.struct_size = sizeof params;
    params.up = static_cast<int32_t>(up);
    params.down = static_cast<int32_t>(down);
    params.kernel_size = static_cast<int32_t>(kernel_size);
    params.groups = static_cast<int32_t>(groups);
    params.normalizer = static_cast<carafepp_normalizer>(normalizer);
    params.flags = static_cast<uint32_t>(flags);
    if (!name.empty()) params.implementation = name.c_str();
    if (size.size() == 2) {
        params.flags |= CARAFEPP_SIZE;
        std::copy_n(size.begin(), 2, params.size);
    }
    if (padding.size() == 2) {
        params.flags |= CARAFEPP_PADDING;
        std::copy_n(padding.begin(), 2, params.padding);
    }
    std::array<carafepp_tensor, count> tensors;
    std::array<const carafepp_tensor*, count> pointers{};
    size_t result = 0;
    for (size_t k = 0; k < count; k++) {
        if (k >= inputs.size() && (needed >> (k - inputs.size()) & 1) == 0) continue;
        auto array = k < inputs.size() ? inputs.get<ffi::AnyBuffer>(k) : array_of(results, result++);
        if (!array.has_value()) return array.error();
        tensors[k] = tensor(*array, place);
        pointers[k] = &tensors[k];
    }
    return error(call<function>(params, pointers.data(), place.stream, std::make_index_sequence<count>()));
}

template <class Binding>
auto with_arguments(Binding binding) {
    return std::move(binding)
        .template Attr<int64_t>("up")
        .template Attr<int64_t>("down")
        .template Attr<int64_t>("kernel_size")
        .template Attr<int64_t>("groups")
        .template Attr<int64_t>("normalizer")
        .template Attr<int64_t>("flags")
        .template Attr<int64_t>("needed")
        .template Attr<ffi::Span<const int64_t>>("size")
        .template Attr<ffi::Span<const int64_t>>("padding")
        .template Attr<std::string_view>("implementation")
        .RemainingArgs()
        .RemainingRets();
}

template <auto function>
constexpr auto run_on_cpu = [](auto... arguments) { return run<function>({CARAFEPP_CPU, 0, nullptr}, arguments...); };

template <auto function>
constexpr auto run_on_cuda = [](void* stream, int32_t device, auto... arguments) {
    return run<function>({CARAFEPP_CUDA, device, stream}, arguments...);
};

}  // namespace

// A call can be part of a CUDA graph, which XLA names a command buffer.
#define CARAFEPP_JAX_HANDLERS(function)                                                                       \
    extern "C" CARAFEPP_API XLA_FFI_Error* function##_on_cpu(XLA_FFI_CallFrame*);                             \
    extern "C" CARAFEPP_API XLA_FFI_Error* function##_on_cuda(XLA_FFI_CallFrame*);                            \
    XLA_FFI_DEFINE_HANDLER_SYMBOL(function##_on_cpu, run_on_cpu<function>, with_arguments(ffi::Ffi::Bind())); \
    XLA_FFI_DEFINE_HANDLER_SYMBOL(                                                                            \
        function##_on_cuda, run_on_cuda<function>,                                                            \
        with_arguments(ffi::Ffi::Bind().Ctx<ffi::PlatformStream<void*>>().Ctx<ffi::DeviceOrdinal>()),         \
        {ffi::Traits::kCmdBufferCompatible})

CARAFEPP_JAX_HANDLERS(carafepp_reassemble);
CARAFEPP_JAX_HANDLERS(carafepp_reassemble_backward);
CARAFEPP_JAX_HANDLERS(carafepp_reassemble_with_logits);
CARAFEPP_JAX_HANDLERS(carafepp_reassemble_with_logits_backward);
CARAFEPP_JAX_HANDLERS(carafepp_normalize_masks);
CARAFEPP_JAX_HANDLERS(carafepp_normalize_masks_backward);
