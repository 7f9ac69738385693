// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels on the emulator, through the C ABI. Every implementation of the lists is forced on a table of cases.
// Small integers must give the exact result of definition.h, other numbers one within the bounds of
// tests/tolerances.py. Every order of threads must give the same bits.
//
//     test_kernels [cpu] [OPTION ...]    on CPU tensors instead; options of doctest
#define DOCTEST_CONFIG_IMPLEMENT
#define DOCTEST_CONFIG_NO_POSIX_SIGNALS  // main handles them
#include <doctest/doctest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../cpp/definition.h"
#include "carafepp/carafepp.h"
#include "cuda/platform.h"
#include "dtypes.h"
#include "emulation.h"

// A function of the sanitizer, if there is one.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace {

using namespace definition;
using carafepp::with_type;
using carafepp::emulation::Order;

carafepp_device device = CARAFEPP_CUDA;

struct Dtypes {
    carafepp_dtype features, masks;
};

const Dtypes kDtypes[] = {
    {CARAFEPP_FLOAT32, CARAFEPP_FLOAT32},   {CARAFEPP_FLOAT64, CARAFEPP_FLOAT64}, {CARAFEPP_FLOAT16, CARAFEPP_FLOAT16},
    {CARAFEPP_BFLOAT16, CARAFEPP_BFLOAT16}, {CARAFEPP_FLOAT16, CARAFEPP_FLOAT32}, {CARAFEPP_BFLOAT16, CARAFEPP_FLOAT32},
};

std::string name_of(carafepp_dtype dtype) {
    switch (dtype) {
        case CARAFEPP_FLOAT32: return "float32";
        case CARAFEPP_FLOAT64: return "float64";
        case CARAFEPP_FLOAT16: return "float16";
        default: return "bfloat16";
    }
}

// How an array of axes N, C, H, W lies in memory.
struct Layout {
    const char* name;
    int order[4];                // the axes from the outermost to the innermost
    int step[4] = {1, 1, 1, 1};  // this and what follows: of axes N, C, H, W
    int before[4] = {}, behind[4] = {};
    bool flipped[4] = {};
    int offset = 0;                // of elements, from an address that is aligned to 16 bytes
    bool any_unit_stride = false;  // axes of one element, along which no step is taken, have an absurd stride
};

const Layout kNchw = {"nchw", {0, 1, 2, 3}};
const Layout kNhwc = {"nhwc", {0, 2, 3, 1}};
// Less usual ones: with adjacent columns, with adjacent channels, and others.
const std::vector<Layout> kOddNchw = {
    {"one element further", {0, 1, 2, 3}, {1, 1, 1, 1}, {}, {}, {}, 1},
    {"a window of a picture", {0, 1, 2, 3}, {1, 1, 1, 1}, {0, 0, 1, 2}, {0, 0, 1, 1}},
    {"some channels", {0, 1, 2, 3}, {1, 1, 1, 1}, {0, 1, 0, 0}, {0, 2, 0, 0}},
    {"every other channel", {0, 1, 2, 3}, {1, 2, 1, 1}},
    {"every other row", {0, 1, 2, 3}, {1, 1, 2, 1}},
    {"flipped rows", {0, 1, 2, 3}, {1, 1, 1, 1}, {}, {}, {true, true, true, false}},
    {"rows of eight more", {0, 1, 2, 3}, {1, 1, 1, 1}, {}, {0, 0, 0, 8}},
    {"channels outermost", {1, 0, 2, 3}},
};
const std::vector<Layout> kOddNhwc = {
    {"one element further", {0, 2, 3, 1}, {1, 1, 1, 1}, {}, {}, {}, 1},
    {"some channels", {0, 2, 3, 1}, {1, 1, 1, 1}, {0, 2, 0, 0}, {0, 1, 0, 0}},
    {"one channel more", {0, 2, 3, 1}, {1, 1, 1, 1}, {}, {0, 1, 0, 0}},
    {"sixteen channels more", {0, 2, 3, 1}, {1, 1, 1, 1}, {}, {0, 16, 0, 0}},
    {"every other column", {0, 2, 3, 1}, {1, 1, 1, 2}},
    {"every other row", {0, 2, 3, 1}, {1, 1, 2, 1}},
    {"flipped pixels", {0, 2, 3, 1}, {1, 1, 1, 1}, {}, {}, {true, false, true, true}},
    {"transposed pictures", {0, 3, 2, 1}},
};
const std::vector<Layout> kOddOthers = {
    kNchw,
    kNhwc,
    {"every third column", {0, 1, 2, 3}, {1, 1, 1, 3}},
    {"every other channel of nhwc", {0, 2, 3, 1}, {1, 2, 1, 1}},
    {"transposed pictures", {0, 1, 3, 2}},
    {"all axes in reverse", {3, 2, 1, 0}},
    {"images innermost", {1, 2, 3, 0}},
    {"flipped", {0, 1, 2, 3}, {1, 1, 1, 1}, {}, {}, {true, true, true, true}},
    {"flipped columns", {0, 1, 2, 3}, {1, 1, 1, 1}, {}, {}, {false, false, false, true}},
    {"flipped nhwc", {0, 2, 3, 1}, {1, 1, 1, 1}, {}, {}, {false, true, true, true}},
    {"any unit strides", {0, 1, 2, 3}, {1, 1, 1, 1}, {}, {}, {}, 0, true},
};

// ---- arrays ----

// Rounded to a dtype.
double rounded(double number, carafepp_dtype dtype) {
    with_type(dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        number = carafepp::widen(carafepp::narrow<T>(static_cast<carafepp::Accumulator<T>>(number)));
    });
    return number;
}

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kUnderAsan = true;
constexpr int64_t kGuardBytes = 0;  // what lies beyond the heap block is watched
#else
constexpr bool kUnderAsan = false;
constexpr int64_t kGuardBytes = 64;
#endif
#if defined(__SANITIZE_THREAD__)
constexpr bool kUnderTsan = true;
#else
constexpr bool kUnderTsan = false;
#endif
constexpr char kUnset = -1;  // in every byte: NaN in all dtypes

// An array in a block of memory that begins and ends with it. All bytes that are not its elements are kUnset.
class Array {
public:
    Array(const Shape& shape, carafepp_dtype dtype, const Layout& layout) : shape_(shape), dtype_(dtype) {
        int64_t stride = 1, first = layout.offset;
        for (int k = 3; k >= 0; k--) {
            const int axis = layout.order[k];
            const int64_t size = shape[static_cast<size_t>(axis)];
            const bool unit = size == 1 && layout.any_unit_stride;
            first += layout.before[axis] * stride;
            strides_[axis] = unit ? 12345 : stride * layout.step[axis];
            stride *= layout.before[axis] + std::max<int64_t>(size, 1) * layout.step[axis] + layout.behind[axis];
            if (layout.flipped[axis] && size > 0) {
                first += (size - 1) * strides_[axis];
                strides_[axis] = -strides_[axis];
            }
        }
        if (count(shape) == 0) return;
        int64_t lowest = first, highest = first;
        for (int axis = 0; axis < 4; axis++) {
            const int64_t extent = (shape[static_cast<size_t>(axis)] - 1) * strides_[axis];
            (extent < 0 ? lowest : highest) += extent;
        }
        const int64_t skipped = lowest % (16 / carafepp::itemsize(dtype));  // where it would be in a vector
        const int64_t elements = skipped + highest - lowest + 1;
        bytes_.assign(static_cast<size_t>(2 * kGuardBytes + elements * carafepp::itemsize(dtype)), kUnset);
        bytes_.shrink_to_fit();
        data_ = bytes_.data() + kGuardBytes + (skipped + first - lowest) * carafepp::itemsize(dtype);
    }

    // In memory of somebody else, of which nothing is checked but the elements.
    Array(const Shape& shape, carafepp_dtype dtype, char* data, const int64_t (&strides)[4])
        : shape_(shape), dtype_(dtype), data_(data) {
        std::copy_n(strides, 4, strides_);
    }

    Array(const Array&) = delete;

    carafepp_tensor tensor(bool channels_last) const {
        carafepp_tensor tensor{};
        tensor.data = data_;
        tensor.dtype = dtype_;
        tensor.device = device;
        tensor.ndim = 4;
        for (int axis = 0; axis < 4; axis++) {
            const int place = !channels_last || axis == 0 ? axis : axis == 1 ? 3 : axis - 1;
            tensor.shape[place] = shape_[static_cast<size_t>(axis)];
            tensor.strides[place] = strides_[axis];
        }
        return tensor;
    }

    void write(const Numbers& numbers) {
        for_each([&](auto* element, size_t k) {
            using T = std::remove_reference_t<decltype(*element)>;
            *element = carafepp::narrow<T>(static_cast<carafepp::Accumulator<T>>(numbers[k]));
        });
    }

    Numbers read() const {
        Numbers numbers(static_cast<size_t>(count(shape_)));
        for_each([&](auto* element, size_t k) { numbers[k] = carafepp::widen(*element); });
        return numbers;
    }

    void unset() {
        for_each([&](auto* element, size_t) { std::memset(element, kUnset, sizeof *element); });
    }

    // True if no byte beside the elements has changed.
    bool is_alone() const {
        if (bytes_.empty()) return true;
        Array elements_unset(*this, bytes_);
        elements_unset.unset();
        const std::vector<char>& bytes = elements_unset.bytes_;
        return std::all_of(bytes.begin(), bytes.end(), [](char byte) { return byte == kUnset; });
    }

    const std::vector<char>& bytes() const { return bytes_; }
    carafepp_dtype dtype() const { return dtype_; }

private:
    Array(const Array& other, const std::vector<char>& bytes)
        : shape_(other.shape_), dtype_(other.dtype_), bytes_(bytes) {
        std::copy_n(other.strides_, 4, strides_);
        data_ = bytes_.data() + (other.data_ - other.bytes_.data());
    }

    template <class F>
    void for_each(F f) const {
        with_type(dtype_, [&](auto type) {
            using T = typename decltype(type)::type;
            size_t k = 0;
            for (int64_t n = 0; n < shape_[0]; n++)
                for (int64_t c = 0; c < shape_[1]; c++)
                    for (int64_t h = 0; h < shape_[2]; h++)
                        for (int64_t w = 0; w < shape_[3]; w++)
                            f(reinterpret_cast<T*>(data_) + n * strides_[0] + c * strides_[1] + h * strides_[2] +
                                  w * strides_[3],
                              k++);
        });
    }

    Shape shape_;
    carafepp_dtype dtype_;
    int64_t strides_[4] = {};
    std::vector<char> bytes_;
    char* data_ = nullptr;
};

// ---- bounds: tests/tolerances.py ----

enum class Bound { kExact, kPlain, kFromLogits, kNormalized };

bool within(double actual, double expected, double magnitude, Bound bound, carafepp_dtype dtype, int kernel_size) {
    if (std::isnan(expected) || std::isinf(expected) || bound == Bound::kExact) {
        expected = rounded(expected, dtype);
        return actual == expected || (std::isnan(actual) && std::isnan(expected));
    }
    const bool half = dtype == CARAFEPP_FLOAT16 || dtype == CARAFEPP_BFLOAT16;
    const double eps = std::ldexp(1, dtype == CARAFEPP_FLOAT64   ? -52
                                     : dtype == CARAFEPP_FLOAT32 ? -23
                                     : dtype == CARAFEPP_FLOAT16 ? -10
                                                                 : -7);
    const double smallest = std::ldexp(1, dtype == CARAFEPP_FLOAT64   ? -1074
                                          : dtype == CARAFEPP_FLOAT32 ? -149
                                          : dtype == CARAFEPP_FLOAT16 ? -24
                                                                      : -133);
    const double c = half ? (bound == Bound::kNormalized ? 0.5 : 2) : bound == Bound::kPlain ? 6 : 8 + 2 * kernel_size;
    return std::abs(actual - expected) <= eps * (c * magnitude + std::abs(expected) / 2) + smallest;
}

// ---- calls ----

// Print the case and the kernel when the process dies: doctest then has no chance to.
void print_context() {
    for (int k = 0; k < doctest::IReporter::get_num_active_contexts(); k++) {
        doctest::IReporter::get_active_contexts()[k]->stringify(&std::cout);
        std::cout << '\n';
    }
    std::cout.flush();
}

std::map<std::string, int> runs;  // of each implementation that a list has named

struct Result {
    Array* array;
    Bound bound;
    carafepp_dtype bound_dtype;  // of the bound, that may be wider than that of the array
    Sums expected;
    bool wanted = true;
};

struct Setting {
    std::string name;
    carafepp::emulation::Settings settings;
};

// In half of them copies are deferred, and few blocks have all the work.
const Setting kSettings[] = {{"forward", {Order::kForward, 0, false}},
                             {"reverse", {Order::kReverse, 0, true, 3}},
                             {"random (1)", {Order::kRandom, 1, false}},
                             {"random (2)", {Order::kRandom, 2, true, 2}}};

carafepp_status invoke(carafepp_function function, const carafepp_params& params,
                       const std::vector<const carafepp_tensor*>& t) {
    switch (function) {
        case CARAFEPP_REASSEMBLE: return carafepp_reassemble(&params, t[0], t[1], t[2], nullptr);
        case CARAFEPP_REASSEMBLE_BACKWARD:
            return carafepp_reassemble_backward(&params, t[0], t[1], t[2], t[3], t[4], nullptr);
        case CARAFEPP_REASSEMBLE_WITH_LOGITS:
            return carafepp_reassemble_with_logits(&params, t[0], t[1], t[2], nullptr);
        case CARAFEPP_REASSEMBLE_WITH_LOGITS_BACKWARD:
            return carafepp_reassemble_with_logits_backward(&params, t[0], t[1], t[2], t[3], t[4], nullptr);
        case CARAFEPP_NORMALIZE_MASKS: return carafepp_normalize_masks(&params, t[0], t[1], nullptr);
        default: return carafepp_normalize_masks_backward(&params, t[0], t[1], t[2], nullptr);
    }
}

// The names in the lists of a function, of those that accept the problem.
std::vector<std::string> accepting(carafepp_function function, const carafepp_params& params,
                                   const std::vector<const carafepp_tensor*>& tensors) {
    std::vector<std::string> names;
    const auto visit = [](void* user, const char* name, const char* declines) {
        runs[name] += 0;
        if (!declines) static_cast<std::vector<std::string>*>(user)->push_back(name);
    };
    CHECK_MESSAGE(carafepp_list_implementations(&params, function, tensors.data(), visit, &names) == CARAFEPP_OK,
                  std::string(carafepp_last_error()));
    return names;
}

std::string function_name(carafepp_function function) {
    const char* const names[] = {"",
                                 "reassemble",
                                 "reassemble_backward",
                                 "reassemble_with_logits",
                                 "reassemble_with_logits_backward",
                                 "normalize_masks",
                                 "normalize_masks_backward"};
    return names[function];
}

void check_values(const Result& result, int kernel_size) {
    const Numbers actual = result.array->read();
    for (size_t k = 0; k < actual.size(); k++) {
        const double expected = result.expected.value[k], magnitude = result.expected.magnitude[k];
        if (within(actual[k], expected, magnitude, result.bound, result.bound_dtype, kernel_size)) continue;
        INFO("element ", k, " of ", actual.size(), " differs by ", actual[k] - expected,
             "; the magnitudes of its products sum up to ", magnitude);
        CHECK(actual[k] == expected);
        return;
    }
}

struct Options {
    bool channels_last = false;
    int alone = 0;  // 1, 2: only the first, the second gradient is wanted
    bool reassemble_only = false;
    size_t first_setting = 0, end_setting = 1;
};

// Runs every implementation that accepts the problem, in some settings, and checks what it writes.
void check_call(const Case& p, carafepp_function function, carafepp_normalizer normalizer,
                const std::vector<const Array*>& inputs, const std::vector<Result*>& results, const Options& options,
                const int64_t (*size)[2] = nullptr) {
    const std::string normalizers[] = {"softmax", "sigmoid", "sigmoid_normalized", "none"};
    INFO(function_name(function), ", normalizer ", normalizers[normalizer]);
    carafepp_params params = params_of(p.up, p.down, p.kernel_size, p.groups);
    params.normalizer = normalizer;
    if (options.channels_last) params.flags |= CARAFEPP_CHANNELS_LAST;
    if (size != nullptr) {
        params.flags |= CARAFEPP_SIZE;
        params.size[0] = (*size)[0];
        params.size[1] = (*size)[1];
    }
    if (p.padded() && function < CARAFEPP_NORMALIZE_MASKS) {
        params.flags |= CARAFEPP_PADDING;
        params.padding[0] = p.padding_h;
        params.padding[1] = p.padding_w;
    }
    std::vector<carafepp_tensor> tensors;
    for (const Array* array : inputs) tensors.push_back(array->tensor(options.channels_last));
    for (const Result* result : results) tensors.push_back(result->array->tensor(options.channels_last));
    std::vector<const carafepp_tensor*> pointers;
    for (size_t k = 0; k < tensors.size(); k++) {
        const bool wanted = k < inputs.size() || results[k - inputs.size()]->wanted;
        pointers.push_back(wanted ? &tensors[k] : nullptr);
    }
    std::vector<std::vector<char>> bytes_before;
    for (const Array* array : inputs) bytes_before.push_back(array->bytes());

    for (const std::string& name : accepting(function, params, pointers)) {
        INFO(name);
        params.implementation = name.c_str();
        runs[name]++;
        std::vector<std::vector<char>> first_bytes;
        const bool once = device == CARAFEPP_CPU;
        for (size_t s = options.first_setting; s < (once ? options.first_setting + 1 : options.end_setting); s++) {
            const bool first = s == options.first_setting;
            INFO("threads ", kSettings[s].name);
            carafepp::emulation::settings() = kSettings[s].settings;
            for (Result* result : results) result->array->unset();
            REQUIRE_MESSAGE(invoke(function, params, pointers) == CARAFEPP_OK, std::string(carafepp_last_error()));
            for (size_t k = 0; k < inputs.size(); k++) {
                CHECK_MESSAGE(inputs[k]->bytes() == bytes_before[k], "an input has changed");
            }
            std::vector<std::vector<char>> bytes;
            for (const Result* result : results) {
                bytes.push_back(result->array->bytes());
                if (first) CHECK_MESSAGE(result->array->is_alone(), "bytes beside the result have changed");
                if (first && result->wanted) check_values(*result, p.kernel_size);
            }
            if (first) first_bytes = bytes;
            CHECK_MESSAGE(bytes == first_bytes, "another order of threads gives other bits");
        }
    }
}

// ---- values ----

enum class Values { kIntegers, kReals, kSpecialIntegers, kExtremeLogits };
const std::string kValueNames[] = {"integers", "reals", "integers with NaN and Inf", "extreme logits"};

struct Inputs {
    Numbers features, masks, logits, grad_output, grad_masks;
};

class Generator {
public:
    explicit Generator(unsigned seed) : random_(seed) {}

    int64_t below(int64_t limit) { return static_cast<int64_t>(random_() % static_cast<uint64_t>(limit)); }

    Numbers integers(const Shape& shape, int64_t limit) {
        Numbers numbers(static_cast<size_t>(count(shape)));
        for (double& number : numbers) number = static_cast<double>(below(2 * limit + 1) - limit);
        return numbers;
    }

    Numbers reals(const Shape& shape) {
        Numbers numbers(static_cast<size_t>(count(shape)));
        std::normal_distribution<double> normal;
        for (double& number : numbers) number = normal(random_);
        return numbers;
    }

    double special() {
        const double infinity = std::numeric_limits<double>::infinity();
        const double all[] = {infinity, -infinity, std::numeric_limits<double>::quiet_NaN()};
        return all[below(3)];
    }

    void sprinkle(Numbers& numbers) {
        for (int k = 0; k < 3 && !numbers.empty(); k++) {
            numbers[static_cast<size_t>(below(static_cast<int64_t>(numbers.size())))] = special();
        }
    }

private:
    std::mt19937 random_;
};

// Fill with NaN and Inf the elements that no output reads: they must not matter.
void spoil_what_is_not_read(const Case& p, Generator& random, Values values, Inputs& inputs) {
    if (values == Values::kSpecialIntegers) {
        std::vector<bool> read(inputs.masks.size());
        for_each_term(p, [&](size_t, size_t m, size_t) { read[m] = true; });
        for (size_t m = 0; m < read.size(); m++) {
            if (!read[m]) inputs.masks[m] = random.special();
        }
    }
    std::vector<bool> read(inputs.logits.size());
    for_each_window(p, [&](const std::vector<size_t>&, const std::vector<size_t>& logits) {
        for (size_t at : logits) read[at] = true;
    });
    for (size_t at = 0; at < read.size(); at++) {
        if (!read[at]) inputs.logits[at] = std::numeric_limits<double>::quiet_NaN();
    }
}

Inputs draw(const Case& p, Values values) {
    unsigned seed = static_cast<unsigned>(values);
    for (const char letter : p.name) seed = seed * 31 + static_cast<unsigned char>(letter);
    Generator random(seed);
    Inputs inputs;
    if (values == Values::kIntegers || values == Values::kSpecialIntegers) {
        inputs = {random.integers(p.features(), 4), random.integers(p.masks(), 2), random.integers(p.logits(), 2),
                  random.integers(p.output(), 4), random.integers(p.masks(), 4)};
    } else {
        inputs = {random.reals(p.features()), random.reals(p.masks()), random.reals(p.logits()),
                  random.reals(p.output()), random.reals(p.masks())};
    }
    if (values == Values::kSpecialIntegers) {
        for (Numbers* numbers : {&inputs.features, &inputs.masks, &inputs.grad_output, &inputs.grad_masks}) {
            random.sprinkle(*numbers);
        }
    }
    if (values == Values::kExtremeLogits) {
        const double infinity = std::numeric_limits<double>::infinity();
        for_each_window(p, [&](const std::vector<size_t>&, const std::vector<size_t>& logits) {
            const size_t one = logits[static_cast<size_t>(random.below(p.taps()))];
            switch (random.below(12)) {
                case 0: inputs.logits[one] = infinity; break;
                case 1: inputs.logits[one] = -infinity; break;
                case 2: inputs.logits[one] = 10000; break;
                case 3: inputs.logits[one] = -10000; break;
                case 4: inputs.logits[one] = std::numeric_limits<double>::quiet_NaN(); break;
                case 5:
                    for (size_t at : logits) inputs.logits[at] = -infinity;
                    break;
                case 6:
                    for (size_t at : logits) inputs.logits[at] = -10000;
                    break;
                case 7: inputs.logits[one] = 1e30; break;
                case 8:  // as those who mask out a window set them
                    for (size_t at : logits) inputs.logits[at] = -1e30;
                    break;
            }
        });
    }
    if (values == Values::kSpecialIntegers || values == Values::kExtremeLogits) {
        spoil_what_is_not_read(p, random, values, inputs);
    }
    return inputs;
}

// ---- every function on one case ----

// Makes the k-th array of a problem, in some layout.
using Make = std::function<std::unique_ptr<Array>(size_t, const Shape&, carafepp_dtype)>;

void check_functions(const Case& p, Dtypes dtypes, Values values, carafepp_normalizer normalizer,
                     const std::string& layout, const Make& make, const Options& options) {
    INFO(p.name, ", ", name_of(dtypes.features), " with ", name_of(dtypes.masks), " masks, ",
         kValueNames[static_cast<int>(values)], ", ", layout);
    const bool exact = values == Values::kIntegers || values == Values::kSpecialIntegers;
    const auto bound = [&](Bound inexact) { return exact ? Bound::kExact : inexact; };
    Inputs inputs = draw(p, values);
    const auto input = [&](size_t k, const Shape& shape, carafepp_dtype dtype, Numbers& numbers) {
        std::unique_ptr<Array> array = make(k, shape, dtype);
        array->write(numbers);
        numbers = array->read();  // rounded, and the same where elements share memory
        return array;
    };
    const auto features = input(0, p.features(), dtypes.features, inputs.features);
    const auto masks = input(1, p.masks(), dtypes.masks, inputs.masks);
    const auto logits = input(2, p.logits(), dtypes.masks, inputs.logits);
    const auto grad_output = input(3, p.output(), dtypes.features, inputs.grad_output);
    const auto grad_of_masks = input(4, p.masks(), dtypes.masks, inputs.grad_masks);
    const auto output = make(5, p.output(), dtypes.features), result_x = make(6, p.features(), dtypes.features);
    const auto result_m = make(7, p.masks(), dtypes.masks), result_l = make(8, p.logits(), dtypes.masks);
    const bool wants_x = options.alone != 2, wants_m = options.alone != 1;
    const int64_t size[2] = {p.out_h(), p.out_w()};
    const bool cropped = p.crop_h >= 0;

    // Masks
    {
        Result y{output.get(), bound(Bound::kPlain), dtypes.features, reassemble(p, inputs.features, inputs.masks)};
        check_call(p, CARAFEPP_REASSEMBLE, CARAFEPP_NONE, {features.get(), masks.get()}, {&y}, options,
                   cropped ? &size : nullptr);
    }
    if (options.reassemble_only) return;
    {
        Result x{result_x.get(), bound(Bound::kPlain), dtypes.features,
                 grad_features(p, inputs.grad_output, inputs.masks), wants_x};
        Result m{result_m.get(), bound(Bound::kPlain), dtypes.masks, grad_masks(p, inputs.grad_output, inputs.features),
                 wants_m};
        check_call(p, CARAFEPP_REASSEMBLE_BACKWARD, CARAFEPP_NONE, {grad_output.get(), features.get(), masks.get()},
                   {&x, &m}, options);
    }
    // Logits
    {
        const Sums normal = normalize_masks(p, inputs.logits, normalizer);
        Result y{output.get(), bound(Bound::kFromLogits), dtypes.features,
                 reassemble(p, inputs.features, normal.value)};
        check_call(p, CARAFEPP_REASSEMBLE_WITH_LOGITS, normalizer, {features.get(), logits.get()}, {&y}, options,
                   cropped ? &size : nullptr);
        Result x{result_x.get(), bound(Bound::kFromLogits), dtypes.features,
                 grad_features(p, inputs.grad_output, normal.value), wants_x};
        Result l{
            result_l.get(), bound(Bound::kFromLogits), dtypes.features,
            normalize_masks_backward(p, grad_masks(p, inputs.grad_output, inputs.features), inputs.logits, normalizer),
            wants_m};
        if (bound(Bound::kPlain) == Bound::kExact) l.bound_dtype = dtypes.masks;
        check_call(p, CARAFEPP_REASSEMBLE_WITH_LOGITS_BACKWARD, normalizer,
                   {grad_output.get(), features.get(), logits.get()}, {&x, &l}, options);
    }
    // The normaliser by itself, which knows one dtype
    if (dtypes.masks == dtypes.features) {
        Result m{result_m.get(), bound(Bound::kNormalized), dtypes.masks,
                 normalize_masks(p, inputs.logits, normalizer)};
        const bool natural = !cropped && p.down == 1;
        check_call(p, CARAFEPP_NORMALIZE_MASKS, normalizer, {logits.get()}, {&m}, options, natural ? nullptr : &size);
        Sums grad(p.masks());
        for (size_t k = 0; k < grad.value.size(); k++) grad.add(k, inputs.grad_masks[k], 1);
        Result l{result_l.get(), bound(Bound::kNormalized), dtypes.masks,
                 normalize_masks_backward(p, grad, inputs.logits, normalizer)};
        check_call(p, CARAFEPP_NORMALIZE_MASKS_BACKWARD, normalizer, {grad_of_masks.get(), logits.get()}, {&l},
                   options);
    }
}

Make in_layout(const Layout& layout) {
    return
        [&](size_t, const Shape& shape, carafepp_dtype dtype) { return std::make_unique<Array>(shape, dtype, layout); };
}

// Each array in another one of the layouts.
Make in_layouts(const std::vector<Layout>& layouts, size_t turn) {
    return [&layouts, turn](size_t k, const Shape& shape, carafepp_dtype dtype) {
        return std::make_unique<Array>(shape, dtype, layouts[(turn + 3 * k) % layouts.size()]);
    };
}

// Cases that the emulation runs in a second or two.
std::vector<Case> cases() {
    std::vector<Case> small;
    std::copy_if(std::begin(kCases), std::end(kCases), std::back_inserter(small),
                 [](const Case& p) { return p.for_cuda || p.terms() <= 12000; });
    return small;
}

// All settings take turns, and most cases and dtypes have one layout that runs in all of them. Sanitizers see races and
// wrong addresses in any order and with any values, and are slow.
void check_every_fourth_case(size_t first) {
    const std::vector<Case> all = cases();
    for (size_t number = first; number < all.size(); number += 4) {
        const Case& p = all[number];
        size_t turn = number * (std::size(kDtypes) + 1) + 1;  // odd steps: what follows is not bound to a dtype
        for (const Dtypes& dtypes : kDtypes) {
            turn++;
            size_t round = 0;
            const bool skipped_by_asan = dtypes.features != CARAFEPP_FLOAT32 && turn % 2;
            const auto check = [&](Values values, const char* layout, const Make& make) {
                if (kUnderAsan && (values == Values::kReals || skipped_by_asan)) return;
                const bool for_tsan = dtypes.features == CARAFEPP_FLOAT32 || turn % 6 == 0;
                const bool normalised = values == Values::kReals;  // the others have no normaliser
                if (kUnderTsan && ((values != Values::kIntegers && !normalised) || !for_tsan)) return;
                Options options;
                options.channels_last = (turn + round) % 2 == 1;
                options.alone = static_cast<int>((turn + round) % 3);
                if (round == turn % 8 && !kUnderTsan && !kUnderAsan) {
                    options.end_setting = std::size(kSettings);
                } else {
                    options.first_setting = (turn / 4 + round) % std::size(kSettings);
                    options.end_setting = options.first_setting + 1;
                }
                const bool integers = values == Values::kIntegers || values == Values::kSpecialIntegers;
                const auto normalizer = integers ? carafepp_normalizer{CARAFEPP_NONE}
                                                 : static_cast<carafepp_normalizer>(turn % 3);
                check_functions(p, dtypes, values, normalizer, layout, make, options);
                round++;
            };
            check(Values::kIntegers, "nchw", in_layout(kNchw));
            check(Values::kIntegers, "nhwc", in_layout(kNhwc));
            check(Values::kIntegers, "odd nhwc", in_layouts(kOddNhwc, turn));
            if (turn % 2) check(Values::kIntegers, "odd nchw", in_layouts(kOddNchw, turn));
            if (turn % 2 == 0) check(Values::kIntegers, "odd layouts", in_layouts(kOddOthers, turn));
            const bool last = turn / 2 % 2 == 1;
            check(Values::kReals, last ? "nhwc" : "nchw", in_layout(last ? kNhwc : kNchw));
            const Values special = turn % 2 ? Values::kSpecialIntegers : Values::kExtremeLogits;
            if (turn % 5 == 0) {
                check(special, "odd layouts", in_layouts(kOddOthers, turn));
            } else {
                check(special, last ? "nchw" : "nhwc", in_layout(last ? kNchw : kNhwc));
            }
            if (p.crop_h < 0) continue;  // what a crop leaves out meets none of them
            check(Values::kSpecialIntegers, "nchw", in_layout(kNchw));
            check(Values::kSpecialIntegers, "nhwc", in_layout(kNhwc));
        }
    }
}

// Quarters, for as many processes.
TEST_CASE("quarter 0 of the table") { check_every_fourth_case(0); }
TEST_CASE("quarter 1 of the table") { check_every_fourth_case(1); }
TEST_CASE("quarter 2 of the table") { check_every_fourth_case(2); }
TEST_CASE("quarter 3 of the table") { check_every_fourth_case(3); }

TEST_CASE("a kernel of both gradients runs only where both are wanted") {
    if (device != CARAFEPP_CUDA) return;
    const Case p = {"both gradients", 1, 8, 3, 4, 2, 1, 5, 1};
    const auto zeros = [](const Shape& shape) {
        auto array = std::make_unique<Array>(shape, CARAFEPP_FLOAT16, kNhwc);
        array->write(Numbers(static_cast<size_t>(count(shape))));
        return array;
    };
    const auto grad_output = zeros(p.output()), features = zeros(p.features()), masks = zeros(p.masks()),
               grad_features = zeros(p.features()), grad_masks = zeros(p.masks());
    std::vector<carafepp_tensor> tensors;
    for (const auto* array : {&grad_output, &features, &masks, &grad_features, &grad_masks})
        tensors.push_back((*array)->tensor(false));
    carafepp_params params = params_of(p.up, p.down, p.kernel_size, p.groups);
    params.implementation = "backward_up2_nhwc_mma_cuda";
    const auto backward = [&](const carafepp_tensor* to_features, const carafepp_tensor* to_masks) {
        return carafepp_reassemble_backward(&params, &tensors[0], &tensors[1], &tensors[2], to_features, to_masks,
                                            nullptr);
    };
    CHECK(backward(&tensors[3], &tensors[4]) == CARAFEPP_OK);
    CHECK(backward(&tensors[3], nullptr) == CARAFEPP_NOT_IMPLEMENTED);
    CHECK(backward(nullptr, &tensors[4]) == CARAFEPP_NOT_IMPLEMENTED);
    CHECK(std::string(carafepp_last_error()) ==
          "[reassemble_backward] implementation backward_up2_nhwc_mma_cuda declines: it computes both gradients, and "
          "one is not wanted.");
}

// Inputs of which many elements are one in memory: strides of 0.
TEST_CASE("inputs may repeat elements") {
    const Case p = {"repeated elements", 3, 8, 4, 5, 2, 1, 3, 1};
    for (const Dtypes& dtypes : kDtypes) {
        std::vector<std::vector<char>> memory;
        const Make make = [&](size_t k, const Shape& shape, carafepp_dtype dtype) {
            if (k > 4) return std::make_unique<Array>(shape, dtype, k % 2 ? kNchw : kNhwc);
            memory.emplace_back(static_cast<size_t>(count(shape) * carafepp::itemsize(dtype)));
            const int64_t strides[][4] = {{0, shape[2] * shape[3], shape[3], 1},
                                          {shape[1], 1, 0, 0},
                                          {0, shape[2] * shape[3], shape[3], 1},
                                          {shape[2] * shape[3], 0, shape[3], 1},
                                          {0, 0, 0, 1}};
            return std::make_unique<Array>(shape, dtype, memory.back().data(), strides[k]);
        };
        check_functions(p, dtypes, Values::kIntegers, CARAFEPP_NONE, "strides of 0", make, {});
        check_functions(p, dtypes, Values::kReals, CARAFEPP_SOFTMAX, "strides of 0", make, {});
    }
}

// All arrays interleaved in 2^36 elements of address space, of which few pages are touched.
TEST_CASE("offsets beyond 32 bits") {
    const size_t bytes = size_t{1} << 38;
    void* const memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1,
                              0);
    if (memory == MAP_FAILED) {
        MESSAGE("skipped: no address space of ", bytes, " bytes");
        return;
    }
    const Case p = {"far elements", 1, 4, 3, 5, 2, 1, 3, 1};
    for (const bool channels_adjacent : {false, true}) {
        const Make make = [&](size_t k, const Shape& shape, carafepp_dtype dtype) {
            const int64_t far = int64_t{1} << 32;
            const int64_t nchw[] = {16 * far, far / 4, 16, 1}, nhwc[] = {16 * far, 1, far, 64};
            return std::make_unique<Array>(shape, dtype, static_cast<char*>(memory) + 4096 * k,
                                           channels_adjacent ? nhwc : nchw);
        };
        check_functions(p, kDtypes[0], Values::kIntegers, CARAFEPP_NONE, "far elements", make, {});
    }
    munmap(memory, bytes);
}

// More of everything than a grid has blocks along y and z.
TEST_CASE("sizes beyond 65535" * doctest::skip(kUnderTsan)) {
    Options options;
    options.reassemble_only = true;  // or it would take long
    const int64_t many = 65537;
    for (const Case& p : {Case{"images", many, 1, 1, 1, 1, 1, 1, 1}, Case{"channels", 1, many, 1, 1, 1, 1, 1, 1},
                          Case{"rows", 1, 1, many, 1, 1, 1, 1, 1}, Case{"columns", 1, 1, 1, many, 1, 1, 1, 1}}) {
        check_functions(p, kDtypes[0], Values::kIntegers, CARAFEPP_NONE, "nchw", in_layout(kNchw), options);
    }
}

TEST_CASE("quotients of 32 and 64 bits") {
    const int64_t two_to_32 = int64_t{1} << 32;
    const int64_t numbers[] = {0, 1, 3, 65537, two_to_32 - 1, two_to_32, two_to_32 + 1, 3 * two_to_32 + 5, INT64_MAX};
    for (const int64_t a : numbers) {
        for (const int64_t b : numbers) {
            if (b == 0) continue;
            const carafepp::cuda::Quotient q = carafepp::cuda::divide(a, b);
            CHECK(q.quotient * b + q.remainder == a);
            CHECK(q.remainder >= 0);
            CHECK(q.remainder < b);
        }
    }
}

TEST_CASE("every implementation that is listed has run") {
    if (device != CARAFEPP_CUDA) return;
    for (const auto& name_and_count : runs) {
        CAPTURE(name_and_count.first);
        CHECK(name_and_count.second > 0);
    }
}

}  // namespace

int main(int argument_count, char** arguments) {
    if (argument_count > 1 && std::strcmp(arguments[1], "cpu") == 0) device = CARAFEPP_CPU;
    if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(print_context);
    for (const int signal : {SIGABRT, SIGSEGV, SIGBUS, SIGFPE}) {
        std::signal(signal, [](int number) {
            print_context();
            std::signal(number, SIG_DFL);
            std::raise(number);
        });
    }
    doctest::Context context;
    context.setOption("abort-after", 20);
    context.applyCommandLine(argument_count, arguments);
    return context.run();
}
