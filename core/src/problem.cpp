// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cstddef>
#include <cstring>
#include <limits>
#include <locale>
#include <sstream>

#include "call.h"
#include "dtypes.h"
#include "hints.h"
#include "overlap.h"

namespace carafepp {
namespace {

constexpr int64_t kMaxBytes = int64_t{1} << 61;  // leaves room to add extents of two arrays

// ---- sentences ----

template <class... Parts>
[[noreturn]] void fail(carafepp_status status, carafepp_function function, const Parts&... parts) {
    std::ostringstream sentence;
    sentence.imbue(std::locale::classic());
    sentence << '[' << function_name(function) << "] ";
    (sentence << ... << parts);
    throw Error{status, sentence.str()};
}

template <class T>
std::string tuple_of(const T* items, int count) {
    std::ostringstream text;
    text.imbue(std::locale::classic());
    text << '(';
    for (int k = 0; k < count; k++) text << (k ? ", " : "") << items[k];
    text << (count == 1 ? ",)" : ")");
    return text.str();
}

std::string device_name(carafepp_device device, int32_t index) {
    return device == CARAFEPP_CPU ? "cpu" : "cuda:" + std::to_string(index);
}

// ---- the arguments of each function ----

enum class Role { kFeatures, kMasks, kLogits, kOutput, kGradOutput, kGradFeatures, kGradMasks, kGradLogits };

struct Argument {
    const char* name;
    Role role;
};

struct Signature {
    const char* name;
    int inputs, results;
    bool result_optional;
    Argument arguments[5];
};

constexpr Argument kFeatures{"features", Role::kFeatures}, kMasks{"masks", Role::kMasks},
    kLogits{"logits", Role::kLogits}, kOutput{"output", Role::kOutput}, kGradOutput{"grad_output", Role::kGradOutput},
    kGradFeatures{"grad_features", Role::kGradFeatures}, kGradMasks{"grad_masks", Role::kGradMasks},
    kGradLogits{"grad_logits", Role::kGradLogits};

constexpr Signature kSignatures[] = {
    {"output_size", 0, 0, false, {}},
    {"reassemble", 2, 1, false, {kFeatures, kMasks, kOutput}},
    {"reassemble_backward", 3, 2, true, {kGradOutput, kFeatures, kMasks, kGradFeatures, kGradMasks}},
    {"reassemble_with_logits", 2, 1, false, {kFeatures, kLogits, kOutput}},
    {"reassemble_with_logits_backward", 3, 2, true, {kGradOutput, kFeatures, kLogits, kGradFeatures, kGradLogits}},
    {"normalize_masks", 1, 1, false, {kLogits, kMasks}},
    {"normalize_masks_backward", 2, 1, false, {kGradMasks, kLogits, kGradLogits}},
};

bool known(carafepp_function function) {
    return function >= CARAFEPP_REASSEMBLE && function <= CARAFEPP_NORMALIZE_MASKS_BACKWARD;
}

// ---- checks of params ----

constexpr size_t kVersion1Size = offsetof(carafepp_params, reserved) + sizeof(carafepp_params::reserved);
constexpr size_t kLargestSize = 4096;  // beyond, struct_size was never set, and reading so far could fault

carafepp_params read_params(carafepp_function function, const carafepp_params* given) {
    if (given == nullptr) fail(CARAFEPP_VALUE_ERROR, function, "params must not be NULL.");
    if (given->struct_size < kVersion1Size || given->struct_size > kLargestSize) {
        fail(CARAFEPP_VALUE_ERROR, function, "params.struct_size must be from ", kVersion1Size, " to ", kLargestSize,
             "; got ", given->struct_size, ". Set it to sizeof(carafepp_params).");
    }
    carafepp_params params{};
    std::memcpy(&params, given, std::min(given->struct_size, sizeof params));
    const auto* bytes = reinterpret_cast<const unsigned char*>(given);
    for (size_t k = sizeof params; k < given->struct_size; k++) {
        if (bytes[k] != 0) {
            fail(CARAFEPP_VALUE_ERROR, function, "params must be 0 beyond the ", sizeof params,
                 " bytes that this version knows; byte ", k, " is not. The caller was built for a newer carafepp.");
        }
    }
    for (int64_t reserved : params.reserved) {
        if (reserved != 0) fail(CARAFEPP_VALUE_ERROR, function, "params.reserved must be 0; got ", reserved, ".");
    }
    if (params.flags & ~uint32_t{CARAFEPP_CHANNELS_LAST | CARAFEPP_SIZE | CARAFEPP_PADDING | CARAFEPP_FASTEST}) {
        fail(CARAFEPP_VALUE_ERROR, function,
             "params.flags must be a sum of CARAFEPP_CHANNELS_LAST, CARAFEPP_SIZE, CARAFEPP_PADDING and "
             "CARAFEPP_FASTEST; got ",
             params.flags, ".");
    }
    if ((params.flags & CARAFEPP_PADDING) && function >= CARAFEPP_NORMALIZE_MASKS) {
        fail(CARAFEPP_VALUE_ERROR, function, "params.flags must not have CARAFEPP_PADDING: there are no features.");
    }
    if (params.up < 1) fail(CARAFEPP_VALUE_ERROR, function, "up must be at least 1; got ", params.up, ".");
    if (params.down < 1) fail(CARAFEPP_VALUE_ERROR, function, "down must be at least 1; got ", params.down, ".");
    if (params.groups < 1) fail(CARAFEPP_VALUE_ERROR, function, "groups must be at least 1; got ", params.groups, ".");
    const bool inferred = function <= CARAFEPP_REASSEMBLE_BACKWARD && params.kernel_size == 0;
    if (!inferred && (params.kernel_size < 1 || params.kernel_size > kMaxKernelSize || params.kernel_size % 2 == 0)) {
        fail(CARAFEPP_VALUE_ERROR, function, "kernel_size must be odd, from 1 to ", kMaxKernelSize, "; got ",
             params.kernel_size, ".");
    }
    if (params.normalizer < CARAFEPP_SOFTMAX || params.normalizer > CARAFEPP_NONE) {
        fail(CARAFEPP_VALUE_ERROR, function, "normalizer must be a number from 0 to 3; got ", params.normalizer, ".");
    }
    return params;
}

// ---- checks of arrays ----

struct Shape {
    const char* symbols[4];
    int64_t numbers[4];
    const char* hint = "";
};

class Checker {
public:
    Checker(carafepp_function function, const carafepp_params& params) : function_(function), params_(params) {}

    // One array by itself. The first array of a call decides its rank and device for all.
    Array read(const char* name, const carafepp_tensor* tensor) {
        if (tensor == nullptr) fail_value(name, " must not be NULL.");
        check_rank(name, *tensor);
        check_dtype(name, tensor->dtype);
        check_device(name, *tensor);
        Array array = logical(*tensor);
        array.data = tensor->data;
        array.dtype = tensor->dtype;
        check_extent(name, *tensor);
        if (array.empty()) {  // its pointer and its strides may be anything, also where kernels step over it
            array.data = nullptr;
            array.stride_n = array.stride_c = array.stride_h = array.stride_w = 0;
            return array;
        }
        if (array.data == nullptr) fail_value(name, ".data must not be NULL where there are elements.");
        if (reinterpret_cast<uintptr_t>(array.data) % itemsize(array.dtype) != 0) {
            fail_value(name, " must be aligned to its ", itemsize(array.dtype), " byte elements; got the address ",
                       array.data, ". Pass a copy.");
        }
        return array;
    }

    void check_rank(const char* name, const carafepp_tensor& tensor) {
        static const char* const three[] = {"C", "H", "W"};
        static const char* const three_last[] = {"H", "W", "C"};
        if (rank_ == 0) {
            if (tensor.ndim != 3 && tensor.ndim != 4) {
                const std::string axes = tuple_of(channels_last() ? three_last : three, 3);
                fail_value(name, " must have 4 axes (N, ", axes.substr(1), " or 3 ", axes, "; got ", tensor.ndim, ".");
            }
            rank_ = tensor.ndim;
            first_name_ = name;
        }
        if (tensor.ndim != rank_)
            fail_value(name, " must have as many axes as ", first_name_, ", ", rank_, "; got ", tensor.ndim, ".");
        for (int k = 0; k < rank_; k++) {
            if (tensor.shape[k] < 0)
                fail_value(name, ".shape must not be negative; got ", tuple_of(tensor.shape, rank_), ".");
        }
    }

    // The axes of a tensor in logical order.
    Array logical(const carafepp_tensor& tensor) const {
        const int batch = rank_ == 4 ? 1 : 0;
        const int c = channels_last() ? batch + 2 : batch, h = channels_last() ? batch : batch + 1, w = h + 1;
        Array array;
        array.n = batch ? tensor.shape[0] : 1;
        array.c = tensor.shape[c];
        array.h = tensor.shape[h];
        array.w = tensor.shape[w];
        array.stride_n = batch ? tensor.strides[0] : 0;
        array.stride_c = tensor.strides[c];
        array.stride_h = tensor.strides[h];
        array.stride_w = tensor.strides[w];
        return array;
    }

    void check_shape(const char* name, const Array& array, const Shape& shape) const {
        const int64_t got[4] = {array.n, array.c, array.h, array.w};
        if (std::equal(got, got + 4, shape.numbers)) return;
        fail_value(name, " must have shape ", in_callers_axes(shape.symbols), " = ", in_callers_axes(shape.numbers),
                   "; got ", in_callers_axes(got), ".", shape.hint);
    }

    void check_groups(const Array& features) const {
        if (features.c % params_.groups == 0) return;
        fail_value("features must have a number of channels divisible by groups=", params_.groups, "; got ", features.c,
                   ".");
    }

    void check_reach(const char* name, const Array& array) const {
        const int64_t longest = std::max(array.h, array.w);
        const int64_t limit = std::numeric_limits<int64_t>::max() / params_.up - params_.down - kMaxKernelSize - 1;
        if (longest > limit) {
            fail_value(name, " is too large for up=", params_.up,
                       ": positions in the result must stay below 2**63; got ", array.h, " rows of ", array.w,
                       " columns.");
        }
    }

    int64_t kernel_size_of_masks(const Array& masks) const {
        if (params_.kernel_size != 0) return params_.kernel_size;
        for (int64_t k = 1; k <= kMaxKernelSize; k += 2) {
            if (masks.c == params_.groups * k * k) return k;
        }
        fail_value("masks must have groups*kernel_size**2 channels with an odd kernel_size from 1 to ", kMaxKernelSize,
                   "; got ", masks.c, " channels, groups=", params_.groups, ".");
    }

    // kernel_size/2 - padding of axis 0, rows, or 1, columns. Checks both.
    int64_t offset(int axis, int64_t kernel_size) const {
        if (!padded()) return 0;
        const int64_t radius = kernel_size / 2, *padding = params_.padding;
        if (std::min(padding[0], padding[1]) < 0 || std::max(padding[0], padding[1]) > radius) {
            fail_value("padding must be from 0 to kernel_size // 2 = ", radius, "; got ", tuple_of(padding, 2), ".");
        }
        return radius - padding[axis];
    }

    // In errors: the formula of the natural size, and the hint that explains its h and w.
    const char* natural_size() const {
        return padded() ? "(ceil(h*up/down), ceil(w*up/down))" : "(ceil(H*up/down), ceil(W*up/down))";
    }
    const char* padding_hint() const {
        return padded() ? " Here h = max(0, H + 2*padding - 2*(kernel_size//2)), and w likewise." : "";
    }

    // G*K*K, or G*K*K*up*up.
    int64_t channels(int64_t kernel_size, int64_t subpixels_per_axis) const {
        int64_t product = params_.groups * kernel_size * kernel_size;
        for (int k = 0; k < 2; k++) {
            if (product > std::numeric_limits<int64_t>::max() / subpixels_per_axis) {
                fail_value("groups*kernel_size**2*up**2 must be below 2**63; got groups=", params_.groups,
                           ", kernel_size=", kernel_size, ", up=", params_.up, ".");
            }
            product *= subpixels_per_axis;
        }
        return product;
    }

    // The size of a forward's result: the one asked for, or the natural one.
    void forward_size(const char* formula, int64_t natural_h, int64_t natural_w, int64_t* h, int64_t* w) const {
        *h = natural_h;
        *w = natural_w;
        if ((params_.flags & CARAFEPP_SIZE) == 0) return;
        if (params_.size[0] < 0 || params_.size[1] < 0) {
            fail_value("size must not be negative; got ", tuple_of(params_.size, 2), ".");
        }
        check_size("size", formula, natural_h, natural_w, params_.size[0], params_.size[1]);
        *h = params_.size[0];
        *w = params_.size[1];
    }

    void check_size(const char* name, const char* formula, int64_t natural_h, int64_t natural_w, int64_t h,
                    int64_t w) const {
        if (h <= natural_h && w <= natural_w) return;
        const int64_t natural[2] = {natural_h, natural_w}, got[2] = {h, w};
        fail_value(name, " must be at most the natural size (H', W') = ", formula, " = ", tuple_of(natural, 2),
                   "; got ", tuple_of(got, 2), ".", padding_hint());
    }

    void check_same_dtype(const char* name, const Array& array, const char* other_name, const Array& other) const {
        if (array.dtype == other.dtype) return;
        fail(CARAFEPP_TYPE_ERROR, function_, name, " must have the dtype of ", other_name, ", ",
             dtype_name(other.dtype), "; got ", dtype_name(array.dtype), ".");
    }

    void check_masks_dtype(const char* name, const Array& masks, const Array& features) const {
        const bool half = itemsize(features.dtype) == 2;
        if (masks.dtype == features.dtype || (half && masks.dtype == CARAFEPP_FLOAT32)) return;
        fail(CARAFEPP_TYPE_ERROR, function_, name, " must have the dtype of features, ", dtype_name(features.dtype),
             half ? ", or float32" : "", "; got ", dtype_name(masks.dtype), ".");
    }

    void check_overlap(const char* name, const Array& result, const char* other_name, const Array& other) const {
        if (share_memory(result, other))
            fail_value(name, " must not share memory with ", other_name, "; it does. Pass another array.");
    }

    void check_one_place_each(const char* name, const Array& result) const {
        if (overlaps_itself(result)) {
            fail_value(name,
                       " must have one place in memory for each element; its strides make some share one. Pass another "
                       "array.");
        }
    }

    template <class... Parts>
    [[noreturn]] void fail_value(const Parts&... parts) const {
        fail(CARAFEPP_VALUE_ERROR, function_, parts...);
    }

    bool padded() const { return params_.flags & CARAFEPP_PADDING; }
    carafepp_device device() const { return device_; }
    int32_t device_index() const { return device_index_; }

private:
    bool channels_last() const { return params_.flags & CARAFEPP_CHANNELS_LAST; }

    void check_dtype(const char* name, carafepp_dtype dtype) const {
        for (carafepp_dtype supported : {CARAFEPP_FLOAT32, CARAFEPP_FLOAT64, CARAFEPP_FLOAT16, CARAFEPP_BFLOAT16}) {
            if (dtype == supported) return;
        }
        fail(CARAFEPP_TYPE_ERROR, function_, name, " must be float32, float64, float16 or bfloat16; got ",
             dtype_name(dtype), ".", unset(name, dtype, ".dtype to CARAFEPP_FLOAT32 or another one."));
    }

    void check_device(const char* name, const carafepp_tensor& tensor) {
        carafepp_device device = tensor.device;
        if (device == CARAFEPP_CUDA_HOST) device = CARAFEPP_CPU;
        if (device == CARAFEPP_CUDA_MANAGED) device = CARAFEPP_CUDA;
        if (device != CARAFEPP_CPU && device != CARAFEPP_CUDA) {
            fail_value(name, " must be on the CPU or on a CUDA device; got DLPack device type ", device, ".",
                       unset(name, device, ".device to CARAFEPP_CPU or CARAFEPP_CUDA."));
        }
        const int32_t index = device == CARAFEPP_CPU ? 0 : tensor.device_index;
        if (name == first_name_) {
            device_ = device;
            device_index_ = index;
        }
        if (device != device_ || index != device_index_) {
            fail_value(name, " must be on the device of ", first_name_, " (", device_name(device_, device_index_),
                       "); got ", device_name(device, index), ".");
        }
    }

    // The hint for a field of a zeroed carafepp_tensor.
    static std::string unset(const char* name, int32_t field, const char* rest) {
        return field == 0 ? std::string(" Set ") + name + rest : "";
    }

    void check_extent(const char* name, const carafepp_tensor& tensor) const {
        const int64_t limit = kMaxBytes / itemsize(tensor.dtype);
        int64_t elements = 1, extent = 0;
        for (int k = 0; k < rank_; k++) {
            const int64_t size = std::max<int64_t>(tensor.shape[k], 1);
            const int64_t stride = tensor.strides[k];
            const bool too_long = stride < -limit || stride > limit ||
                                  (size > 1 && stride != 0 &&
                                   (size - 1) > (limit - extent) / (stride < 0 ? -stride : stride));
            if (elements > limit / size || too_long) {
                fail_value(name, " must have fewer than 2**61 bytes, and strides that stay within as many; got shape ",
                           tuple_of(tensor.shape, rank_), ", strides ", tuple_of(tensor.strides, rank_), ".");
            }
            elements *= size;
            extent += (size - 1) * (stride < 0 ? -stride : stride);
        }
    }

    // Something for each of N, C, H, W as the caller knows the axes.
    template <class T>
    std::string in_callers_axes(const T (&items)[4]) const {
        const T ordered[4] = {items[0], channels_last() ? items[2] : items[1], channels_last() ? items[3] : items[2],
                              channels_last() ? items[1] : items[3]};
        return tuple_of(ordered + (rank_ == 3), rank_);
    }

    carafepp_function function_;
    const carafepp_params& params_;
    int rank_ = 0;
    const char* first_name_ = nullptr;
    carafepp_device device_ = CARAFEPP_CPU;
    int32_t device_index_ = 0;
};

// True if an argument has the channels and the dtype of features; else it has those of masks or logits.
constexpr bool is_pixels(Role role) {
    return role == Role::kFeatures || role == Role::kOutput || role == Role::kGradOutput || role == Role::kGradFeatures;
}

constexpr const char* kNaturalMasksSize = "(Hl*up, Wl*up)";

// The array of the problem that an input is.
Array& input_of(Problem& problem, Role role) {
    switch (role) {
        case Role::kFeatures: return problem.features;
        case Role::kMasks: return problem.masks;
        case Role::kLogits: return problem.logits;
        case Role::kGradOutput: return problem.grad_output;
        default: return problem.grad_masks;
    }
}

}  // namespace

std::string dtype_name(carafepp_dtype dtype) {
    static const char* const kinds[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
    const int code = dtype >> 8, bits = dtype & 0xff;
    if (code == 6) return "bool";
    if (code >= 0 && code < 6) return kinds[code] + std::to_string(bits);
    return "DLPack type code " + std::to_string(code) + " of " + std::to_string(bits) + " bits";
}

int inputs_of(carafepp_function function) { return kSignatures[function].inputs; }
const char* argument_name(carafepp_function function, int k) { return kSignatures[function].arguments[k].name; }

const char* function_name(carafepp_function function) {
    return known(function) || function == CARAFEPP_OUTPUT_SIZE ? kSignatures[function].name : "carafepp";
}

void output_shape(carafepp_function function, const carafepp_params* given, const carafepp_tensor* input,
                  int64_t* shape) {
    const bool normalizes = function == CARAFEPP_NORMALIZE_MASKS;
    if (!normalizes && function != CARAFEPP_OUTPUT_SIZE && function != CARAFEPP_REASSEMBLE &&
        function != CARAFEPP_REASSEMBLE_WITH_LOGITS) {
        fail(CARAFEPP_VALUE_ERROR, function, "function must be one of the forward ones (0, 1, 3, 5); got ", function,
             ".");
    }
    const carafepp_params params = read_params(function, given);
    Checker check(function, params);
    if (check.padded() && params.kernel_size == 0)
        check.fail_value("kernel_size must be given with padding: the output size depends on it; got 0.");
    const char* name = normalizes ? "logits" : "features";
    if (input == nullptr || shape == nullptr) check.fail_value(input == nullptr ? name : "shape", " must not be NULL.");
    check.check_rank(name, *input);
    const Array array = check.logical(*input);
    check.check_reach(name, array);

    int64_t h = 0, w = 0, c = array.c;
    if (normalizes) {
        check.forward_size(kNaturalMasksSize, array.h * params.up, array.w * params.up, &h, &w);
        c = check.channels(params.kernel_size, 1);
    } else {
        const Axis rows{{params.up, params.down}, check.offset(0, params.kernel_size)};
        const Axis columns{{params.up, params.down}, check.offset(1, params.kernel_size)};
        check.forward_size(check.natural_size(), rows.natural_size(array.h), columns.natural_size(array.w), &h, &w);
    }
    const bool last = params.flags & CARAFEPP_CHANNELS_LAST;
    const int64_t axes[4] = {array.n, last ? h : c, last ? w : h, last ? c : w};
    std::copy_n(axes + (input->ndim == 3), input->ndim, shape);
}

// A result that is not known yet counts as contiguous, with adjacent channels if they are the last axis, or where those
// of `like` are.
static Array unknown(const Shape& shape, const Array& like, bool channels_last) {
    const auto [n, c, h, w] = shape.numbers;
    Array result{nullptr, like.dtype, n, c, h, w, 0, 0, w, 1};
    if (result.empty() || __builtin_mul_overflow(h, w, &result.stride_c) ||
        __builtin_mul_overflow(c, result.stride_c, &result.stride_n))
        return {};
    if (channels_last || (like.stride_c == 1 && like.c > 1 && like.h * like.w > 1))
        result.stride_c = 1, result.stride_h = w * c, result.stride_w = c;
    return result;
}

Call check_call(carafepp_function function, const carafepp_params* given, const carafepp_tensor* const* tensors,
                bool results_required) {
    if (!known(function))
        fail(CARAFEPP_VALUE_ERROR, function, "function must be a number from 1 to 6; got ", function, ".");
    const carafepp_params params = read_params(function, given);
    try {
        return check_arrays(function, params, tensors, results_required);
    } catch (Error& error) {
        error.message += hint(error.status, function, params, tensors);
        throw;
    }
}

Call check_arrays(carafepp_function function, const carafepp_params& params, const carafepp_tensor* const* tensors,
                  bool results_required) {
    Call call{params, {}, {}, {}};
    const Signature& signature = kSignatures[function];
    Checker check(function, call.params);

    // Each array by itself.
    Problem& problem = call.problem;
    const Array* arrays[5] = {};
    for (int k = 0; k < signature.inputs; k++) {
        const Argument& argument = signature.arguments[k];
        Array& input = input_of(problem, argument.role);
        input = check.read(argument.name, tensors[k]);
        arrays[k] = &input;
    }
    const int arguments = signature.inputs + signature.results;
    for (int k = signature.inputs; k < arguments; k++) {
        if (tensors[k] == nullptr && (signature.result_optional || !results_required)) continue;
        const int r = k - signature.inputs;
        call.wanted[r] = true;
        call.results[r] = check.read(signature.arguments[k].name, tensors[k]);
        arrays[k] = &call.results[r];
    }

    // The problem that the inputs make together.
    const bool has_features = function <= CARAFEPP_REASSEMBLE_WITH_LOGITS_BACKWARD;
    const bool reads_masks = function <= CARAFEPP_REASSEMBLE_BACKWARD;
    const bool backward = function % 2 == 0;
    const Argument& anchor = has_features ? kFeatures : kLogits;
    const Argument& kernels = reads_masks ? kMasks : kLogits;
    const Array& first = has_features ? problem.features : problem.logits;
    const Array& masks = reads_masks ? problem.masks : problem.logits;
    problem.factor = {call.params.up, call.params.down};
    problem.groups = call.params.groups;
    problem.normalizer = call.params.normalizer;
    problem.from_logits = !reads_masks;
    problem.device = check.device();
    problem.device_index = check.device_index();
    if (has_features) {
        check.check_masks_dtype(kernels.name, masks, problem.features);
        check.check_groups(problem.features);
    }
    check.check_reach(anchor.name, first);
    problem.kernel_size = reads_masks ? check.kernel_size_of_masks(masks) : call.params.kernel_size;
    problem.offset_h = check.offset(0, problem.kernel_size);
    problem.offset_w = check.offset(1, problem.kernel_size);

    const int64_t up = problem.factor.up, down = problem.factor.down;
    const Axis rows = problem.rows(), columns = problem.columns();
    const char* formula = has_features ? check.natural_size() : kNaturalMasksSize;
    const int64_t natural_h = has_features ? rows.natural_size(first.h) : first.h * up;
    const int64_t natural_w = has_features ? columns.natural_size(first.w) : first.w * up;
    if (backward) {
        const Argument& sized_argument = reads_masks ? kMasks : has_features ? kGradOutput : kGradMasks;
        const Array& sized = input_of(problem, sized_argument.role);
        check.check_size(sized_argument.name, formula, natural_h, natural_w, sized.h, sized.w);
        problem.out_h = sized.h;
        problem.out_w = sized.w;
    } else {
        check.forward_size(formula, natural_h, natural_w, &problem.out_h, &problem.out_w);
    }

    // Every array beside the others.
    const Shape of_features{{"N", "C", "H", "W"}, {first.n, first.c, first.h, first.w}};
    const Shape of_output{{"N", "C", "H'", "W'"}, {first.n, first.c, problem.out_h, problem.out_w}};
    const Shape of_masks{{"N", "groups*kernel_size**2", "H'", "W'"},
                         {first.n, check.channels(problem.kernel_size, 1), problem.out_h, problem.out_w}};
    // A call without logits has none: its factor may be larger than logits could have channels for.
    const bool padded = check.padded();
    const Shape of_logits{{"N", "groups*kernel_size**2*up**2",
                           !has_features ? "Hl"
                           : padded      ? "ceil(h/down)"
                                         : "ceil(H/down)",
                           !has_features ? "Wl"
                           : padded      ? "ceil(w/down)"
                                         : "ceil(W/down)"},
                          {first.n, reads_masks ? 0 : check.channels(problem.kernel_size, up),
                           has_features ? ceil_div(rows.centres(first.h), down) : first.h,
                           has_features ? ceil_div(columns.centres(first.w), down) : first.w},
                          check.padding_hint()};
    const auto shape_of = [&](Role role) {
        switch (role) {
            case Role::kFeatures:
            case Role::kGradFeatures: return of_features;
            case Role::kOutput:
            case Role::kGradOutput: return of_output;
            case Role::kMasks:
            case Role::kGradMasks: return of_masks;
            default: return of_logits;
        }
    };
    const bool last_axis = call.params.flags & CARAFEPP_CHANNELS_LAST;
    for (int k = 0; k < arguments; k++) {
        const Argument& argument = signature.arguments[k];
        const bool has_pixels = is_pixels(argument.role);
        const Array& like = has_pixels ? problem.features : masks;
        if (arrays[k] == nullptr) {
            if (!results_required)
                call.results[k - signature.inputs] = unknown(shape_of(argument.role), like, last_axis);
            continue;
        }
        if (arrays[k] != &masks)
            check.check_same_dtype(argument.name, *arrays[k], has_pixels ? "features" : kernels.name, like);
        check.check_shape(argument.name, *arrays[k], shape_of(argument.role));
    }

    // Results beside everything else.
    for (int k = signature.inputs; k < arguments; k++) {
        if (arrays[k] == nullptr) continue;
        check.check_one_place_each(signature.arguments[k].name, *arrays[k]);
        for (int j = 0; j < k; j++) {
            if (arrays[j] == nullptr) continue;
            check.check_overlap(signature.arguments[k].name, *arrays[k], signature.arguments[j].name, *arrays[j]);
        }
    }
    return call;
}

}  // namespace carafepp
