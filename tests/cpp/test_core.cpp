// SPDX-License-Identifier: Apache-2.0
// The C ABI from outside. Values are compared with the formula in plain loops. Other tests are for C alone: NULL,
// struct_size, memory at the edge of a page, fork. Python tests the full table of cases, dtypes and layouts.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#if !defined(_WIN32)
#include <sys/wait.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "carafepp/carafepp.h"
#include "cpu/processor.h"
#include "definition.h"
#include "dtypes.h"
#include "overlap.h"
#include "pages.h"

extern "C" int header_is_c99(void);

namespace {

using namespace definition;
using doctest::Contains;

doctest::String last_error() { return carafepp_last_error(); }  // not a pointer in a failure's text

// ---- arrays and calls ----

carafepp_tensor tensor_of(void* data, const Shape& shape, carafepp_dtype dtype = CARAFEPP_FLOAT32) {
    carafepp_tensor tensor{};
    tensor.data = data;
    tensor.dtype = dtype;
    tensor.device = CARAFEPP_CPU;
    tensor.ndim = 4;
    int64_t stride = 1;
    for (int k = 3; k >= 0; k--) {
        tensor.shape[k] = shape[static_cast<size_t>(k)];
        tensor.strides[k] = stride;
        stride *= std::max<int64_t>(tensor.shape[k], 1);
    }
    return tensor;
}

// Cases that plain loops compute at once.
std::vector<Case> cases() {
    std::vector<Case> small;
    std::copy_if(std::begin(kCases), std::end(kCases), std::back_inserter(small),
                 [](const Case& p) { return !p.for_cuda && p.terms() <= 150000; });
    return small;
}

std::vector<float> integers(int64_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::vector<float> values(static_cast<size_t>(count));
    for (float& value : values) value = static_cast<float>(static_cast<int>(random() % 7) - 3);
    return values;
}

void check_equal(const std::string& what, const std::vector<float>& actual, const std::vector<float>& expected) {
    REQUIRE(actual.size() == expected.size());
    for (size_t k = 0; k < actual.size(); k++) {
        if (actual[k] == expected[k]) continue;
        INFO(what, ", element ", k, " of ", actual.size());
        CHECK(actual[k] == expected[k]);
        return;
    }
}

// ---- values ----

TEST_CASE("values follow the formula") {
    const auto floats = [](const Numbers& numbers) { return std::vector<float>(numbers.begin(), numbers.end()); };
    const auto numbers = [](const std::vector<float>& floats) { return Numbers(floats.begin(), floats.end()); };
    for (const Case& p : cases()) {
        INFO(p.name);
        std::vector<float> features = integers(count(p.features()), 1), logits = integers(count(p.logits()), 2);
        std::vector<float> grad_output = integers(count(p.output()), 3);
        const Numbers x_numbers = numbers(features), d_numbers = numbers(grad_output);
        const Sums masks_of_logits = normalize_masks(p, numbers(logits), CARAFEPP_NONE);
        const Sums grad_of_masks = definition::grad_masks(p, d_numbers, x_numbers);
        std::vector<float> masks = floats(masks_of_logits.value), grad_masks = floats(grad_of_masks.value);
        const std::vector<float> output = floats(reassemble(p, x_numbers, masks_of_logits.value).value);
        const std::vector<float> grad_features = floats(
            definition::grad_features(p, d_numbers, masks_of_logits.value).value);
        const std::vector<float> grad_logits = floats(
            normalize_masks_backward(p, grad_of_masks, numbers(logits), CARAFEPP_NONE).value);

        // Results start as NaN: an element that is not written shows.
        const auto unset = [](const std::vector<float>& like) { return std::vector<float>(like.size(), NAN); };
        const auto reset = [](std::vector<float>& values) { std::fill(values.begin(), values.end(), NAN); };
        const carafepp_params params = params_of(p);
        carafepp_tensor x = tensor_of(features.data(), p.features()), m = tensor_of(masks.data(), p.masks());
        carafepp_tensor l = tensor_of(logits.data(), p.logits()), d = tensor_of(grad_output.data(), p.output());

        std::vector<float> result = unset(output);
        carafepp_tensor y = tensor_of(result.data(), p.output());
        CHECK(carafepp_reassemble(&params, &x, &m, &y, nullptr) == CARAFEPP_OK);
        check_equal("output", result, output);
        reset(result);
        CHECK(carafepp_reassemble_with_logits(&params, &x, &l, &y, nullptr) == CARAFEPP_OK);
        check_equal("output", result, output);

        std::vector<float> result_x = unset(features), result_m = unset(masks), result_l = unset(logits);
        carafepp_tensor gx = tensor_of(result_x.data(), p.features()), gm = tensor_of(result_m.data(), p.masks());
        carafepp_tensor gl = tensor_of(result_l.data(), p.logits());
        CHECK(carafepp_reassemble_backward(&params, &d, &x, &m, &gx, &gm, nullptr) == CARAFEPP_OK);
        check_equal("grad_features", result_x, grad_features);
        check_equal("grad_masks", result_m, grad_masks);
        reset(result_x);
        CHECK(carafepp_reassemble_with_logits_backward(&params, &d, &x, &l, &gx, nullptr, nullptr) == CARAFEPP_OK);
        CHECK(carafepp_reassemble_with_logits_backward(&params, &d, &x, &l, nullptr, &gl, nullptr) == CARAFEPP_OK);
        check_equal("grad_features", result_x, grad_features);
        check_equal("grad_logits", result_l, grad_logits);

        reset(result_m);
        carafepp_params without_features = params;
        without_features.flags &= ~uint32_t{CARAFEPP_PADDING};
        CHECK(carafepp_normalize_masks(&without_features, &l, &gm, nullptr) == CARAFEPP_OK);
        check_equal("masks", result_m, masks);
        reset(result_l);
        carafepp_tensor dm = tensor_of(grad_masks.data(), p.masks());
        CHECK(carafepp_normalize_masks_backward(&without_features, &dm, &l, &gl, nullptr) == CARAFEPP_OK);
        check_equal("grad_logits", result_l, grad_logits);
    }
}

TEST_CASE("channels last describes the same arrays") {
    const Case p{"three groups", 2, 6, 7, 5, 2, 1, 3, 3};
    std::vector<float> features = integers(count(p.features()), 1), masks = integers(count(p.masks()), 2);
    std::vector<float> output(static_cast<size_t>(count(p.output()))), again(output.size());
    carafepp_tensor x = tensor_of(features.data(), p.features()), m = tensor_of(masks.data(), p.masks());
    carafepp_tensor y = tensor_of(output.data(), p.output());
    carafepp_params params = params_of(p);
    CHECK(carafepp_reassemble(&params, &x, &m, &y, nullptr) == CARAFEPP_OK);
    y.data = again.data();
    for (carafepp_tensor* tensor : {&x, &m, &y}) {
        std::rotate(tensor->shape + 1, tensor->shape + 2, tensor->shape + 4);
        std::rotate(tensor->strides + 1, tensor->strides + 2, tensor->strides + 4);
    }
    params.flags |= CARAFEPP_CHANNELS_LAST;
    CHECK(carafepp_reassemble(&params, &x, &m, &y, nullptr) == CARAFEPP_OK);
    check_equal("output", again, output);
}

TEST_CASE("softmax of equal logits is an average") {
    std::vector<float> features(64, 2.0f), logits(9 * 64, 1e30f), output(64);
    carafepp_params params = params_of(1, 1, 3, 1);
    carafepp_tensor x = tensor_of(features.data(), {1, 1, 8, 8}), l = tensor_of(logits.data(), {1, 9, 8, 8});
    carafepp_tensor y = tensor_of(output.data(), {1, 1, 8, 8});
    CHECK(carafepp_reassemble_with_logits(&params, &x, &l, &y, nullptr) == CARAFEPP_OK);
    CHECK(std::abs(output[9] - 2.0f) < 1e-6f);          // all nine taps inside
    CHECK(std::abs(output[0] - 2.0f * 4 / 9) < 1e-6f);  // four of them
}

// The implementations of carafepp_reassemble that accept a problem.
std::vector<std::string> accepting(const carafepp_params& params, std::vector<const carafepp_tensor*> tensors) {
    std::vector<std::string> names;
    const auto visit = [](void* user, const char* name, const char* declines) {
        if (!declines) static_cast<std::vector<std::string>*>(user)->push_back(name);
    };
    CHECK(carafepp_list_implementations(&params, CARAFEPP_REASSEMBLE, tensors.data(), visit, &names) == CARAFEPP_OK);
    return names;
}

// Small integers, in the bytes of a dtype.
std::vector<char> stored(const std::vector<float>& values, carafepp_dtype dtype) {
    std::vector<char> bytes;
    carafepp::with_type(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        for (float value : values) {
            const T element = carafepp::narrow<T>(carafepp::Accumulator<T>{value});
            bytes.insert(bytes.end(), reinterpret_cast<const char*>(&element),
                         reinterpret_cast<const char*>(&element + 1));
        }
    });
    return bytes;
}

TEST_CASE("every implementation gives the result of the reference") {
    std::set<std::string> tested;
    const std::tuple<int, int, std::pair<int, int>> variants[] = {
        {1, 1, {-1, -1}}, {2, 1, {-1, -1}}, {1, 2, {-1, -1}}, {3, 2, {-1, -1}}, {3, 1, {-1, -1}},
        {1, 1, {0, 0}},   {2, 1, {0, 1}},   {1, 2, {0, 0}},   {3, 2, {1, 0}},   {2, 3, {0, 0}}};
    for (const auto& [up, down, padding] : variants) {
        Case p{"a column less", 2, 18, 5, 37, up, down, up == 3 ? 5 : 3, 2};
        std::tie(p.padding_h, p.padding_w) = padding;
        p.crop_w = p.out_w() - 1;
        p.crop_h = p.out_h();
        for (carafepp_dtype dtype : {CARAFEPP_FLOAT32, CARAFEPP_FLOAT64, CARAFEPP_FLOAT16, CARAFEPP_BFLOAT16}) {
            for (bool channels_last : {false, true}) {
                const auto shape = [&](const Shape& s) { return channels_last ? Shape{s[0], s[2], s[3], s[1]} : s; };
                std::vector<char> features = stored(integers(count(p.features()), 1), dtype);
                std::vector<char> masks = stored(integers(count(p.masks()), 2), dtype);
                std::vector<char> output = stored(integers(count(p.output()), 3), dtype);
                const carafepp_tensor x = tensor_of(features.data(), shape(p.features()), dtype);
                const carafepp_tensor m = tensor_of(masks.data(), shape(p.masks()), dtype);
                const carafepp_tensor y = tensor_of(output.data(), shape(p.output()), dtype);
                carafepp_params params = params_of(p);
                if (channels_last) params.flags |= CARAFEPP_CHANNELS_LAST;
                params.implementation = "reassemble_any_ref";
                CHECK(carafepp_reassemble(&params, &x, &m, &y, nullptr) == CARAFEPP_OK);
                const std::vector<char> expected = output;
                for (const std::string& name : accepting(params, {&x, &m, &y})) {
                    params.implementation = name.c_str();
                    std::fill(output.begin(), output.end(), 77);
                    CHECK(carafepp_reassemble(&params, &x, &m, &y, nullptr) == CARAFEPP_OK);
                    CAPTURE(name);
                    CHECK(std::equal(output.begin(), output.end(), expected.begin(), expected.end()));
                    tested.insert(name);
                }
            }
        }
    }
    CHECK(tested.size() >= 3);  // one kernel of each layout, and the reference
}

// ---- memory ----

// Bytes that end, or begin, right at a page that must not be touched.
class GuardedBytes {
public:
    GuardedBytes(const void* from, size_t bytes, bool at_end) {
        const size_t page = pages::size(), inside = (bytes + page - 1) / page * page;
        length_ = inside + 2 * page;
        base_ = static_cast<char*>(pages::allocate(length_));
        data = base_ + page + (at_end ? inside - bytes : 0);
        if (bytes) std::memcpy(data, from, bytes);
        pages::forbid(base_, page);
        pages::forbid(base_ + page + inside, page);
    }
    ~GuardedBytes() { pages::release(base_, length_); }
    GuardedBytes(const GuardedBytes&) = delete;

    char* data;

private:
    char* base_;
    size_t length_;
};

TEST_CASE("nothing beyond the arrays is touched") {
    const auto check_case = [](const Case& p, bool at_end, bool channels_last, carafepp_dtype dtype) {
        INFO(p.name);
        std::vector<std::unique_ptr<GuardedBytes>> memory;
        const auto guarded = [&](const Shape& s) {
            const std::vector<float> zeros(static_cast<size_t>(count(s)));
            const size_t bytes = zeros.size() * (dtype == CARAFEPP_FLOAT32 ? 4 : 2);
            memory.push_back(std::make_unique<GuardedBytes>(zeros.data(), bytes, at_end));
            return tensor_of(memory.back()->data, channels_last ? Shape{s[0], s[2], s[3], s[1]} : s, dtype);
        };
        const carafepp_tensor x = guarded(p.features()), m = guarded(p.masks()), l = guarded(p.logits());
        const carafepp_tensor y = guarded(p.output()), d = guarded(p.output());
        const carafepp_tensor gx = guarded(p.features()), gm = guarded(p.masks()), gl = guarded(p.logits());
        carafepp_params params = params_of(p, CARAFEPP_SOFTMAX);
        if (channels_last) params.flags |= CARAFEPP_CHANNELS_LAST;
        for (const std::string& name : accepting(params, {&x, &m, &y})) {
            params.implementation = name.c_str();
            CHECK(carafepp_reassemble(&params, &x, &m, &y, nullptr) == CARAFEPP_OK);
        }
        params.implementation = nullptr;
        CHECK(carafepp_reassemble_with_logits(&params, &x, &l, &y, nullptr) == CARAFEPP_OK);
        CHECK(carafepp_reassemble_backward(&params, &d, &x, &m, &gx, &gm, nullptr) == CARAFEPP_OK);
        CHECK(carafepp_reassemble_with_logits_backward(&params, &d, &x, &l, &gx, &gl, nullptr) == CARAFEPP_OK);
        params.flags &= ~uint32_t{CARAFEPP_PADDING};  // there are no features
        CHECK(carafepp_normalize_masks(&params, &l, &m, nullptr) == CARAFEPP_OK);
        CHECK(carafepp_normalize_masks_backward(&params, &gm, &l, &gl, nullptr) == CARAFEPP_OK);
    };
    for (const Case& p : cases()) {
        for (bool at_end : {false, true}) {
            for (bool channels_last : {false, true}) {
                for (carafepp_dtype dtype : {CARAFEPP_FLOAT32, CARAFEPP_FLOAT16}) {
                    check_case(p, at_end, channels_last, dtype);
                }
            }
        }
    }
}

TEST_CASE("offsets beyond 32 bits") {
    // 2^33 elements of address space, of which some pages are touched.
    const int64_t side = int64_t{1} << 16, elements = side * side * 2;
    void* memory = pages::allocate(static_cast<size_t>(elements) * 4);
    if (memory == nullptr) {
        MESSAGE("skipped: no address space of ", elements * 4, " bytes");
        return;
    }
    float* features = static_cast<float*>(memory);
    features[elements - side * (side / 4) + side / 4 * 3] = 7;  // the last pixel that an output is centred on
    std::vector<float> mask(1, 3.0f), output(2 * 4 * 4);
    carafepp_params params = params_of(1, static_cast<int>(side / 4), 1, 1);
    carafepp_tensor x = tensor_of(features, {1, 2, side, side}), m = tensor_of(mask.data(), {1, 1, 4, 4});
    for (int64_t& stride : m.strides) stride = 0;
    carafepp_tensor y = tensor_of(output.data(), {1, 2, 4, 4});
    CHECK(carafepp_reassemble(&params, &x, &m, &y, nullptr) == CARAFEPP_OK);
    CHECK(output[31] == 21);
    CHECK(std::count(output.begin(), output.end(), 0.0f) == 31);

    // The same place as a result: one row of the gradient, the last.
    std::vector<float> grad(2, 5.0f);
    carafepp_params identity = params_of(1, 1, 1, 1);
    carafepp_tensor d = tensor_of(grad.data(), {1, 2, 1, 1}), one = tensor_of(mask.data(), {1, 1, 1, 1});
    carafepp_tensor gx = tensor_of(features + side * side - 1, {1, 2, 1, 1}),
                    small = tensor_of(output.data(), {1, 2, 1, 1});
    gx.strides[1] = side * side;
    CHECK(carafepp_reassemble_backward(&identity, &d, &small, &one, &gx, nullptr, nullptr) == CARAFEPP_OK);
    CHECK(features[side * side - 1] == 15);
    CHECK(features[elements - 1] == 15);
    pages::release(memory, static_cast<size_t>(elements) * 4);
}

TEST_CASE("overlap agrees with counting every byte") {
    std::mt19937 random(1);
    const auto pick = [&](int low, int high) {
        return low + static_cast<int>(random() % static_cast<unsigned>(high - low + 1));
    };
    static char buffer[1 << 12];
    const auto array = [&] {
        carafepp::Array a;
        a.dtype = pick(0, 1) ? CARAFEPP_FLOAT32 : CARAFEPP_FLOAT16;
        a.data = buffer + 1024 + 4 * pick(0, 20);
        a.n = pick(1, 3), a.c = pick(0, 8) ? pick(1, 4) : 0, a.h = pick(1, 3), a.w = pick(1, 4);
        a.stride_n = pick(-16, 16), a.stride_c = pick(-9, 9), a.stride_h = pick(-12, 12), a.stride_w = pick(-4, 4);
        return a;
    };
    // The bytes of an array, and whether two of its elements are the same.
    const auto bytes = [](const carafepp::Array& a, bool* repeats) {
        std::set<const char*> all;
        const int64_t size = a.dtype == CARAFEPP_FLOAT32 ? 4 : 2;
        *repeats = false;
        for (int64_t n = 0; n < a.n; n++)
            for (int64_t c = 0; c < a.c; c++)
                for (int64_t h = 0; h < a.h; h++)
                    for (int64_t w = 0; w < a.w; w++) {
                        const char* at = static_cast<char*>(a.data) +
                                         size * (n * a.stride_n + c * a.stride_c + h * a.stride_h + w * a.stride_w);
                        for (int64_t k = 0; k < size; k++) *repeats |= !all.insert(at + k).second;
                    }
        return all;
    };
    int shared = 0, repeated = 0;
    for (int k = 0; k < 20000; k++) {
        const carafepp::Array a = array(), b = array();
        bool a_repeats, b_repeats;
        const std::set<const char*> of_a = bytes(a, &a_repeats), of_b = bytes(b, &b_repeats);
        const bool share = std::any_of(of_a.begin(), of_a.end(), [&](const char* at) { return of_b.count(at) > 0; });
        CHECK(carafepp::share_memory(a, b) == share);
        CHECK(carafepp::overlaps_itself(a) == a_repeats);
        shared += share;
        repeated += a_repeats;
    }
    CHECK(shared > 1000);
    CHECK(shared < 19000);
    CHECK(repeated > 1000);
    CHECK(repeated < 19000);
}

// ---- refusals that only C can provoke ----

struct Small {
    std::vector<float> features = integers(2 * 4 * 4, 1), masks = integers(9 * 8 * 8, 2),
                       output = std::vector<float>(2 * 8 * 8, -1.0f);
    carafepp_params params = params_of(2, 1, 3, 1);
    carafepp_tensor x = tensor_of(features.data(), {1, 2, 4, 4}), m = tensor_of(masks.data(), {1, 9, 8, 8});
    carafepp_tensor y = tensor_of(output.data(), {1, 2, 8, 8});

    carafepp_status run() { return carafepp_reassemble(&params, &x, &m, &y, nullptr); }
    bool untouched() const {
        return std::all_of(output.begin(), output.end(), [](float value) { return value == -1.0f; });
    }
    void refused(carafepp_status status, const char* sentence) {
        CHECK(run() == status);
        CHECK(last_error() == Contains(sentence));
        CHECK(untouched());
    }
};

TEST_CASE("null arguments") {
    Small s;
    CHECK(s.run() == CARAFEPP_OK);
    CHECK(carafepp_reassemble(nullptr, &s.x, &s.m, &s.y, nullptr) == CARAFEPP_VALUE_ERROR);
    CHECK(last_error() == Contains("[reassemble] params must not be NULL."));
    CHECK(carafepp_reassemble(&s.params, nullptr, &s.m, &s.y, nullptr) == CARAFEPP_VALUE_ERROR);
    CHECK(last_error() == Contains("[reassemble] features must not be NULL."));
    CHECK(carafepp_reassemble(&s.params, &s.x, &s.m, nullptr, nullptr) == CARAFEPP_VALUE_ERROR);
    CHECK(last_error() == Contains("[reassemble] output must not be NULL."));
    CHECK(carafepp_reassemble_backward(&s.params, &s.y, &s.x, &s.m, nullptr, nullptr, nullptr) == CARAFEPP_OK);
    Small t;
    t.m.data = nullptr;
    t.refused(CARAFEPP_VALUE_ERROR, "[reassemble] masks.data must not be NULL where there are elements.");
    int64_t shape[4];
    CHECK(carafepp_output_shape(&s.params, CARAFEPP_REASSEMBLE, nullptr, shape) == CARAFEPP_VALUE_ERROR);
    CHECK(carafepp_output_shape(&s.params, CARAFEPP_REASSEMBLE, &s.x, nullptr) == CARAFEPP_VALUE_ERROR);
    CHECK(carafepp_output_shape(&s.params, 2, &s.x, shape) == CARAFEPP_VALUE_ERROR);
    CHECK(last_error() == Contains("function must be one of the forward ones"));
    CHECK(carafepp_output_shape(&s.params, CARAFEPP_REASSEMBLE, &s.x, shape) == CARAFEPP_OK);
    CHECK(Shape(shape, shape + 4) == Shape{1, 2, 8, 8});
    const carafepp_tensor* inputs[] = {&s.x, &s.m, nullptr};
    CHECK(carafepp_list_implementations(&s.params, 99, inputs, [](void*, const char*, const char*) {}, nullptr) ==
          CARAFEPP_VALUE_ERROR);
    CHECK(last_error() == Contains("function must be a number from 1 to 6; got 99."));
    CHECK(carafepp_list_implementations(&s.params, CARAFEPP_REASSEMBLE, nullptr, nullptr, nullptr) ==
          CARAFEPP_VALUE_ERROR);
}

TEST_CASE("struct size rules") {
    Small s;
    s.params.struct_size = 8;
    s.refused(CARAFEPP_VALUE_ERROR, "params.struct_size must be from 88 to 4096; got 8.");
    s.params.struct_size = SIZE_MAX;
    s.refused(CARAFEPP_VALUE_ERROR, "params.struct_size must be from 88 to 4096; got 18446744073709551615.");

    struct {
        carafepp_params known;
        int64_t newer;
    } larger{params_of(2, 1, 3, 1), 0};
    larger.known.struct_size = sizeof larger;
    Small t;
    CHECK(carafepp_reassemble(&larger.known, &t.x, &t.m, &t.y, nullptr) == CARAFEPP_OK);
    larger.newer = 1;
    CHECK(carafepp_reassemble(&larger.known, &t.x, &t.m, &t.y, nullptr) == CARAFEPP_VALUE_ERROR);
    CHECK(last_error() == Contains("params must be 0 beyond the 88 bytes that this version knows; byte 88 is not."));

    Small u;
    u.params.reserved[1] = 5;
    u.refused(CARAFEPP_VALUE_ERROR, "params.reserved must be 0; got 5.");
    Small v;
    v.params.flags = 16;
    v.refused(
        CARAFEPP_VALUE_ERROR,
        "params.flags must be a sum of CARAFEPP_CHANNELS_LAST, CARAFEPP_SIZE, CARAFEPP_PADDING and CARAFEPP_FASTEST; "
        "got 16.");
    Small w;
    w.params.normalizer = 4;
    w.refused(CARAFEPP_VALUE_ERROR, "normalizer must be a number from 0 to 3; got 4.");
}

TEST_CASE("padding") {
    Small unread;
    unread.params.padding[0] = 7;  // without the flag
    CHECK(unread.run() == CARAFEPP_OK);
    Small s;
    s.params.flags = CARAFEPP_PADDING;
    s.params.padding[1] = 2;
    s.refused(CARAFEPP_VALUE_ERROR, "padding must be from 0 to kernel_size // 2 = 1; got (0, 2).");
    s.params.padding[1] = -1;
    s.refused(CARAFEPP_VALUE_ERROR, "padding must be from 0 to kernel_size // 2 = 1; got (0, -1).");
    s.params.padding[1] = 1;
    int64_t shape[4];
    CHECK(carafepp_output_shape(&s.params, CARAFEPP_REASSEMBLE, &s.x, shape) == CARAFEPP_OK);
    CHECK(Shape(shape, shape + 4) == Shape{1, 2, 4, 8});  // two of four rows are centres
    s.refused(CARAFEPP_VALUE_ERROR, "masks must have shape");
    s.params.kernel_size = 0;
    CHECK(carafepp_output_shape(&s.params, CARAFEPP_REASSEMBLE, &s.x, shape) == CARAFEPP_VALUE_ERROR);
    CHECK(last_error() == Contains("kernel_size must be given with padding"));
    s.params.kernel_size = 3;
    CHECK(carafepp_normalize_masks(&s.params, &s.m, &s.m, nullptr) == CARAFEPP_VALUE_ERROR);
    CHECK(last_error() == Contains("params.flags must not have CARAFEPP_PADDING: there are no features."));
}

// carafepp_params as version 1 of the ABI has it: this copy does not grow with the header's.
struct ParamsOfVersion1 {
    size_t struct_size;
    int32_t up, down, kernel_size, groups, normalizer;
    uint32_t flags;
    const char* implementation;
    int64_t size[2];
    int64_t reserved[4];
};

TEST_CASE("a caller built for version 1 goes on working") {
    const ParamsOfVersion1 old{sizeof(ParamsOfVersion1), 2, 1, 3, 1, CARAFEPP_SOFTMAX, 0, nullptr, {0, 0}, {}};
    static_assert(sizeof old <= sizeof(carafepp_params), "structs only grow");
    GuardedBytes memory(&old, sizeof old, true);  // a read beyond them faults
    const auto* const params = reinterpret_cast<const carafepp_params*>(memory.data);
    Small s, t;
    CHECK(s.run() == CARAFEPP_OK);
    CHECK(carafepp_reassemble(params, &t.x, &t.m, &t.y, nullptr) == CARAFEPP_OK);
    CHECK(t.output == s.output);
    int64_t shape[4];
    CHECK(carafepp_output_shape(params, CARAFEPP_REASSEMBLE, &t.x, shape) == CARAFEPP_OK);
    CHECK(Shape(shape, shape + 4) == Shape{1, 2, 8, 8});

    ParamsOfVersion1 cut = old;
    cut.struct_size--;
    const auto* const smaller = reinterpret_cast<const carafepp_params*>(&cut);
    CHECK(carafepp_reassemble(smaller, &t.x, &t.m, &t.y, nullptr) == CARAFEPP_VALUE_ERROR);
    CHECK(last_error() == Contains("params.struct_size must be from 88 to 4096; got 87."));
}

TEST_CASE("tensors that no array library would make") {
    Small s;
    s.x.ndim = 7;
    s.refused(CARAFEPP_VALUE_ERROR, "features must have 4 axes (N, C, H, W) or 3 (C, H, W); got 7.");
    Small t;
    t.x.shape[2] = -4;
    t.refused(CARAFEPP_VALUE_ERROR, "features.shape must not be negative; got (1, 2, -4, 4).");
    Small u;
    u.x.device = 7;
    u.refused(CARAFEPP_VALUE_ERROR, "features must be on the CPU or on a CUDA device; got DLPack device type 7.");
    Small v;
    v.m.device = CARAFEPP_CUDA;
    v.refused(CARAFEPP_VALUE_ERROR, "masks must be on the device of features (cpu); got cuda:0.");
    Small w;
    w.x.dtype = 0x0f20;
    w.refused(CARAFEPP_TYPE_ERROR,
              "features must be float32, float64, float16 or bfloat16; got DLPack type code 15 of 32 bits.");
    Small p;
    p.x.device = p.m.device = p.y.device = CARAFEPP_CUDA_HOST;  // pinned: CPU
    CHECK(p.run() == CARAFEPP_OK);
    Small q;
    q.x.device = q.m.device = q.y.device = CARAFEPP_CUDA_MANAGED;
    q.x.shape[0] = q.m.shape[0] = q.y.shape[0] = 0;  // nothing to compute where it can be
    const std::string config = carafepp_config();
    if (config.find("CUDA: not built") != std::string::npos) {
        q.refused(CARAFEPP_NOT_IMPLEMENTED,
                  "[reassemble] CUDA arrays cannot be computed on: carafepp was built without CUDA");
    } else if (q.run() != CARAFEPP_OK) {
        q.refused(CARAFEPP_RUNTIME_ERROR, "[reassemble] CUDA arrays cannot be computed on: ");
    }
}

TEST_CASE("hints for C") {
    Small s;
    s.x.device = 0;
    s.refused(CARAFEPP_VALUE_ERROR,
              "features must be on the CPU or on a CUDA device; got DLPack device type 0. Set features.device to "
              "CARAFEPP_CPU or CARAFEPP_CUDA.");
    Small t;
    t.m.dtype = 0;
    t.refused(CARAFEPP_TYPE_ERROR, "got int0. Set masks.dtype to CARAFEPP_FLOAT32 or another one.");
    Small u;
    u.params.up = 1;
    u.refused(CARAFEPP_VALUE_ERROR, "got (1, 9, 8, 8). Did you mean up=2?");
    u.params.up = 2;
    CHECK(u.run() == CARAFEPP_OK);
    Small v;
    v.x = tensor_of(v.features.data(), {1, 4, 4, 2});
    v.m = tensor_of(v.masks.data(), {1, 8, 8, 9});
    v.y = tensor_of(v.output.data(), {1, 8, 8, 2});
    v.refused(CARAFEPP_VALUE_ERROR, "Did you mean layout='NHWC'? In C, set the flag CARAFEPP_CHANNELS_LAST.");
    v.params.flags = CARAFEPP_CHANNELS_LAST;
    CHECK(v.run() == CARAFEPP_OK);
    Small w;
    w.params.kernel_size = 5;
    w.refused(CARAFEPP_VALUE_ERROR, "got (1, 9, 8, 8). Did you mean kernel_size=3?");
}

TEST_CASE("hints do not overflow") {
    const int64_t smallest = std::numeric_limits<int64_t>::min();
    Small s;
    s.params.flags = CARAFEPP_SIZE | CARAFEPP_PADDING;
    s.params.size[0] = s.params.padding[1] = smallest;
    s.refused(CARAFEPP_VALUE_ERROR, "[reassemble] ");
    Small t;
    t.params.up = t.params.down = t.params.groups = std::numeric_limits<int32_t>::max();
    t.refused(CARAFEPP_VALUE_ERROR, "[reassemble] ");
}

TEST_CASE("sizes that overflow") {
    const int64_t huge = int64_t{1} << 40;
    Small s;
    for (carafepp_tensor* tensor : {&s.x, &s.m, &s.y}) {
        for (int64_t& stride : tensor->strides) stride = 0;
    }
    s.x.shape[2] = s.x.shape[3] = huge;
    s.refused(CARAFEPP_VALUE_ERROR, "features must have fewer than 2**61 bytes");
    Small t;
    t.x.strides[2] = INT64_MAX / 2;
    t.refused(CARAFEPP_VALUE_ERROR, "features must have fewer than 2**61 bytes");
    Small t2;
    t2.x.strides[2] = INT64_MIN;
    t2.refused(CARAFEPP_VALUE_ERROR, "features must have fewer than 2**61 bytes");
    Small u;
    for (int64_t& stride : u.x.strides) stride = 0;
    u.x.shape[3] = int64_t{1} << 50;
    u.params.up = INT32_MAX;
    u.refused(CARAFEPP_VALUE_ERROR, "features is too large for up=2147483647");
    Small v;
    v.params = params_of(INT32_MAX, 1, 31, INT32_MAX);
    carafepp_tensor no_pixels = tensor_of(nullptr, {1, INT32_MAX, 0, 0}), no_logits = tensor_of(nullptr, {1, 1, 0, 0});
    CHECK(carafepp_reassemble_with_logits(&v.params, &no_pixels, &no_logits, &no_pixels, nullptr) ==
          CARAFEPP_VALUE_ERROR);
    CHECK(
        carafepp_last_error() ==
        Contains(
            "groups*kernel_size**2*up**2 must be below 2**63; got groups=2147483647, kernel_size=31, up=2147483647."));
}

TEST_CASE("implementations are listed and forced") {
    Small s;
    const std::vector<std::string> names = accepting(s.params, {&s.x, &s.m, nullptr});
    REQUIRE(!names.empty());
    CHECK(names.back() == "reassemble_any_ref");
    s.params.implementation = "reassemble_any_ref";
    CHECK(s.run() == CARAFEPP_OK);
    s.params.implementation = "grad_masks_any_ref";  // stands in another list
    CHECK(s.run() == CARAFEPP_OK);
    Small t;
    t.params.implementation = "nonsense";
    t.refused(CARAFEPP_VALUE_ERROR, "implementation must be a name of the list of implementations; got nonsense.");
}

// ---- threads ----

struct Large {
    const Case p{"work for several threads", 2, 16, 40, 48, 2, 1, 5, 2};
    std::vector<float> features, logits, grad_output;

    Large() {
        std::mt19937 random(1);
        std::normal_distribution<float> normal;
        for (auto [array, shape] :
             {std::pair(&features, p.features()), {&logits, p.logits()}, {&grad_output, p.output()}}) {
            array->resize(static_cast<size_t>(count(shape)));
            for (float& value : *array) value = normal(random);
        }
    }

    // Everything that the functions write, one after the other.
    std::vector<float> results() const {
        const carafepp_params params = params_of(p, CARAFEPP_SOFTMAX);
        std::vector<float> output(grad_output.size()), grad_features(features.size()), grad_logits(logits.size());
        const auto dense = [](const std::vector<float>& values, const Shape& shape) {
            return tensor_of(const_cast<float*>(values.data()), shape);
        };
        const carafepp_tensor x = dense(features, p.features()), l = dense(logits, p.logits()),
                              d = dense(grad_output, p.output());
        const carafepp_tensor y = dense(output, p.output()), gx = dense(grad_features, p.features()),
                              gl = dense(grad_logits, p.logits());
        CHECK(carafepp_reassemble_with_logits(&params, &x, &l, &y, nullptr) == CARAFEPP_OK);
        CHECK(carafepp_reassemble_with_logits_backward(&params, &d, &x, &l, &gx, &gl, nullptr) == CARAFEPP_OK);
        output.insert(output.end(), grad_features.begin(), grad_features.end());
        output.insert(output.end(), grad_logits.begin(), grad_logits.end());
        return output;
    }
};

TEST_CASE("the same bits at every thread count") {
    const Large problem;
    carafepp_set_num_threads(1);
    const std::vector<float> expected = problem.results();
    for (int threads : {2, 3, 7}) {
        carafepp_set_num_threads(threads);
        CHECK(carafepp_get_num_threads() == threads);
        CHECK(std::memcmp(problem.results().data(), expected.data(), expected.size() * sizeof(float)) == 0);
    }
    carafepp_set_num_threads(0);
}

TEST_CASE("concurrent callers") {
    const Large problem;
    carafepp_set_num_threads(2);
    const std::vector<float> expected = problem.results();
    std::vector<std::thread> callers;
    std::vector<int> equal(4, 0);
    for (size_t k = 0; k < equal.size(); k++) {
        callers.emplace_back([&, k] {
            for (int repeat = 0; repeat < 5; repeat++) equal[k] += problem.results() == expected;
        });
    }
    for (std::thread& caller : callers) caller.join();
    for (int times : equal) CHECK(times == 5);
    carafepp_set_num_threads(0);
}

#if !defined(_WIN32)  // which has no fork
TEST_CASE("a forked child goes on calling") {
    const Large problem;
    carafepp_set_num_threads(3);
    const std::vector<float> expected = problem.results();
    for (int repeat = 0; repeat < 3; repeat++) {
        const pid_t child = fork();
        if (child == 0) {
            alarm(60);
            const bool right = problem.results() == expected;
            _exit(right && carafepp_get_num_threads() == 3 ? 0 : 1);
        }
        int status = -1;
        CHECK(waitpid(child, &status, 0) == child);
        CHECK(WIFEXITED(status));
        CHECK(WEXITSTATUS(status) == 0);
    }
    CHECK(problem.results() == expected);
    carafepp_set_num_threads(0);
}
#endif

#if defined(__x86_64__)
TEST_CASE("the processor has the extensions that Linux tells") {
    std::ifstream file("/proc/cpuinfo");  // Wine shows it too
    std::string line;
    while (std::getline(file, line) && line.compare(0, 5, "flags") != 0) continue;
    if (!file) {
        MESSAGE("skipped: there is no /proc/cpuinfo");
        return;
    }
    std::istringstream words(line);
    const std::set<std::string> flags{std::istream_iterator<std::string>(words), {}};
    const carafepp::Processor& has = carafepp::processor();
    const std::pair<std::string, bool> extensions[] = {
        {"avx2", has.avx2},         {"fma", has.fma},           {"f16c", has.f16c},        {"avx512f", has.avx512f},
        {"avx512bw", has.avx512bw}, {"avx512dq", has.avx512dq}, {"avx512vl", has.avx512vl}};
    for (const auto& extension : extensions) {
        INFO(extension.first);
        if (flags.count(extension.first) == 1) CHECK(extension.second);  // Linux may be told to hide others
    }
}

TEST_CASE("the processor's extensions include those that they need") {
    const carafepp::Processor& has = carafepp::processor();
    if (has.avx512bw || has.avx512dq || has.avx512vl) CHECK(has.avx512f);
    if (has.avx512f) CHECK(has.runs_avx2());  // kernels for AVX-512 have instructions of FMA and F16C too
}
#endif

TEST_CASE("versions") {
    CHECK(carafepp_abi_version() == 1);
    CHECK(header_is_c99() == 1);
    CHECK(std::string(carafepp_version()).size() >= 5);
    CHECK(doctest::String(carafepp_config()) == Contains(carafepp_version()));
    const bool built = std::string(carafepp_config()).find("CUDA: not built") == std::string::npos;
    CHECK(std::string(carafepp_devices()).rfind(built ? "CUDA devices: " : "", 0) == 0);
    CHECK(std::string(carafepp_devices()).empty() == !built);
}

}  // namespace
