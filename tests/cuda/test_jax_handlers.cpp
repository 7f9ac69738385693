// SPDX-License-Identifier: Apache-2.0
// The handlers for JAX in calls as XLA makes them, on emulated CUDA devices. JAX itself tests those for the CPU.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "carafepp/carafepp.h"

namespace {

// The last call that the core got.
carafepp_tensor seen_features;
void* seen_stream;

carafepp_status see_and_reassemble(const carafepp_params* params, const carafepp_tensor* features,
                                   const carafepp_tensor* masks, const carafepp_tensor* output, void* stream) {
    seen_features = *features;
    seen_stream = stream;
    return carafepp_reassemble(params, features, masks, output, stream);
}

}  // namespace

#define carafepp_reassemble see_and_reassemble
#include "../../bindings/jax_handlers.cpp"
#undef carafepp_reassemble

namespace {

struct Array {
    std::vector<int64_t> shape;
    std::vector<float> values;
};

Array array_of(std::vector<int64_t> shape, float first = 0) {
    int64_t count = 1;
    for (int64_t length : shape) count *= length;
    std::vector<float> values(static_cast<size_t>(count));
    for (size_t k = 0; k < values.size(); k++) values[k] = first + static_cast<float>(k % 7) - 3;
    return {shape, values};
}

// A stream and a device for the handlers; errors are strings.
constexpr uintptr_t kStream = 0x5eed;
constexpr int32_t kOrdinal = 3;

XLA_FFI_Api api() {
    XLA_FFI_Api api{};
    api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
    api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    api.XLA_FFI_Error_Create = [](XLA_FFI_Error_Create_Args* arguments) {
        return reinterpret_cast<XLA_FFI_Error*>(new std::string(arguments->message));
    };
    api.XLA_FFI_Stream_Get = [](XLA_FFI_Stream_Get_Args* arguments) -> XLA_FFI_Error* {
        arguments->stream = reinterpret_cast<void*>(kStream);
        return nullptr;
    };
    api.XLA_FFI_DeviceOrdinal_Get = [](XLA_FFI_DeviceOrdinal_Get_Args* arguments) -> XLA_FFI_Error* {
        arguments->device_ordinal = kOrdinal;
        return nullptr;
    };
    return api;
}

// Calls a handler for up x2. Returns the sentence of an error.
std::string call(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*), std::vector<Array*> inputs, std::vector<Array*> results,
                 int64_t needed) {
    const XLA_FFI_Api xla = api();
    std::vector<XLA_FFI_Buffer> buffers;
    for (auto* arrays : {&inputs, &results}) {
        for (Array* array : *arrays) {
            buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, XLA_FFI_DataType_F32, array->values.data(),
                               static_cast<int64_t>(array->shape.size()), array->shape.data()});
        }
    }
    std::vector<void*> pointers;
    for (XLA_FFI_Buffer& buffer : buffers) pointers.push_back(&buffer);
    std::vector<XLA_FFI_ArgType> input_types(inputs.size(), XLA_FFI_ArgType_BUFFER);
    std::vector<XLA_FFI_RetType> result_types(results.size(), XLA_FFI_RetType_BUFFER);

    int64_t one = 1, two = 2, zero = 0, none = CARAFEPP_NONE;
    XLA_FFI_Array empty{XLA_FFI_DataType_S64, 0, nullptr};
    XLA_FFI_ByteSpan best{"", 0};
    std::vector<std::pair<std::string, void*>> attributes = {
        // in the order of names
        {"down", &one},         {"flags", &zero},    {"groups", &one},      {"implementation", &best},
        {"kernel_size", &zero}, {"needed", &needed}, {"normalizer", &none}, {"padding", &empty},
        {"size", &empty},       {"up", &two}};
    std::vector<XLA_FFI_Scalar> scalars(attributes.size());
    std::vector<XLA_FFI_AttrType> types;
    std::vector<XLA_FFI_ByteSpan> names(attributes.size());
    std::vector<XLA_FFI_ByteSpan*> name_pointers;
    std::vector<void*> values;
    for (size_t k = 0; k < attributes.size(); k++) {
        auto& [name, value] = attributes[k];
        names[k] = {name.data(), name.size()};
        name_pointers.push_back(&names[k]);
        scalars[k] = {XLA_FFI_DataType_S64, value};
        const bool array = value == &empty, text = value == &best;
        types.push_back(array ? XLA_FFI_AttrType_ARRAY : text ? XLA_FFI_AttrType_STRING : XLA_FFI_AttrType_SCALAR);
        values.push_back(array || text ? value : &scalars[k]);
    }

    XLA_FFI_CallFrame frame{};
    frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
    frame.api = &xla;
    frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
    frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(inputs.size()), input_types.data(),
                  pointers.data()};
    frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(results.size()), result_types.data(),
                  pointers.data() + inputs.size()};
    frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE, nullptr,      static_cast<int64_t>(attributes.size()), types.data(),
                   name_pointers.data(),      values.data()};
    auto* error = reinterpret_cast<std::string*>(handler(&frame));
    const std::string sentence = error == nullptr ? "" : *error;
    delete error;
    return sentence;
}

}  // namespace

TEST_CASE("a CUDA handler takes XLA's stream and device, and folds leading axes") {
    Array features = array_of({2, 3, 4, 5, 6}), masks = array_of({2, 3, 9, 10, 12}, 1);
    Array output = array_of({2, 3, 4, 10, 12}), on_cpu = output;
    CHECK(call(carafepp_reassemble_on_cuda, {&features, &masks}, {&output}, 1) == "");
    CHECK(seen_stream == reinterpret_cast<void*>(kStream));
    CHECK(seen_features.device == CARAFEPP_CUDA);
    CHECK(seen_features.device_index == kOrdinal);
    CHECK(std::vector<int64_t>(seen_features.shape, seen_features.shape + 4) == std::vector<int64_t>{6, 4, 5, 6});
    CHECK(std::vector<int64_t>(seen_features.strides, seen_features.strides + 4) ==
          std::vector<int64_t>{120, 30, 6, 1});
    CHECK(call(carafepp_reassemble_on_cpu, {&features, &masks}, {&on_cpu}, 1) == "");
    CHECK(seen_features.device == CARAFEPP_CPU);
    CHECK(output.values == on_cpu.values);  // exact: the values are small integers
}

TEST_CASE("a single image, and a gradient that is needed alone") {
    Array grad_output = array_of({4, 10, 12}), features = array_of({4, 5, 6}), masks = array_of({9, 10, 12}, 1);
    Array both[2] = {features, masks}, alone = masks;
    CHECK(call(carafepp_reassemble_backward_on_cuda, {&grad_output, &features, &masks}, {&both[0], &both[1]}, 3) == "");
    CHECK(call(carafepp_reassemble_backward_on_cuda, {&grad_output, &features, &masks}, {&alone}, 2) == "");
    CHECK(alone.values == both[1].values);
    Array on_cpu[2] = {features, masks};
    call(carafepp_reassemble_backward_on_cpu, {&grad_output, &features, &masks}, {&on_cpu[0], &on_cpu[1]}, 3);
    CHECK(both[0].values == on_cpu[0].values);
    CHECK(both[1].values == on_cpu[1].values);
}

TEST_CASE("errors carry the core's sentence; too few arrays are an error") {
    Array features = array_of({1, 4, 5, 6}), masks = array_of({1, 9, 10, 11}), output = array_of({1, 4, 10, 12});
    CHECK(call(carafepp_reassemble_on_cuda, {&features, &masks}, {&output}, 1).find("[reassemble] masks must") == 0);
    CHECK(call(carafepp_reassemble_on_cuda, {&features, &masks}, {}, 1) != "");
    CHECK(call(carafepp_reassemble_on_cuda, {&features}, {&output}, 1) != "");
}
