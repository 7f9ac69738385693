// SPDX-License-Identifier: Apache-2.0
#include "hints.h"

#include <algorithm>
#include <array>
#include <numeric>
#include <vector>

namespace carafepp {
namespace {

constexpr int kMostFactor = 32;        // up and down that are tried
constexpr int kMostOfRatio = 4;        // the same, if both change
constexpr int kUsualKernel = 5;        // kernel_size in Python, if it is not given
constexpr int64_t kLongest = 1 << 30;  // lengths and factors beyond it get no hints: products could overflow
constexpr size_t kMostInputs = 3;

// The order of the functions: a forward, its backward, then the same two of logits.
static_assert(CARAFEPP_REASSEMBLE == 1 && CARAFEPP_REASSEMBLE_BACKWARD == 2 && CARAFEPP_REASSEMBLE_WITH_LOGITS == 3 &&
              CARAFEPP_REASSEMBLE_WITH_LOGITS_BACKWARD == 4 && CARAFEPP_NORMALIZE_MASKS == 5 &&
              CARAFEPP_NORMALIZE_MASKS_BACKWARD == 6);

using Tensors = std::array<const carafepp_tensor*, 5>;  // inputs; results are not given

// Tells if the check accepts inputs. Results have the shapes and the dtypes that follow.
bool accepts(carafepp_function function, const carafepp_params& params, const Tensors& inputs) {
    try {
        check_arrays(function, params, inputs.data(), false);
        return true;
    } catch (const Error&) {
        return false;
    }
}

std::string joined(const std::vector<std::string>& parts, const char* between) {
    std::string text;
    for (const std::string& part : parts) text += (text.empty() ? "" : between) + part;
    return text;
}

struct Sizes {
    int64_t c, h, w;
};

class Hints {
public:
    Hints(carafepp_function function, const carafepp_params& params, const carafepp_tensor* const* tensors)
        : function_(function), params_(params), count_(inputs_of(function)) {
        std::copy_n(tensors, count_, inputs_.begin());
        backward_ = function % 2 == 0;
        has_features_ = function <= CARAFEPP_REASSEMBLE_WITH_LOGITS_BACKWARD;
        reads_masks_ = function <= CARAFEPP_REASSEMBLE_BACKWARD;
    }

    std::string first(carafepp_status status) const {
        for (int k = 0; k < count_; k++) {
            const carafepp_tensor* tensor = inputs_[k];
            if (tensor == nullptr || tensor->ndim < 3 || tensor->ndim > 4) return "";
            for (int axis = 0; axis < tensor->ndim; axis++) {
                if (tensor->shape[axis] < 0 || tensor->shape[axis] > kLongest) return "";
            }
        }
        for (int64_t number : {int64_t{params_.up}, int64_t{params_.down}, int64_t{params_.groups}, params_.size[0],
                               params_.size[1], params_.padding[0], params_.padding[1]}) {
            if (number < -kLongest || number > kLongest) return "";
        }
        if (accepts(function_, params_, inputs_)) return "";  // a result is wrong
        if (status == CARAFEPP_TYPE_ERROR) return cast();
        for (auto look : {&Hints::one_number, &Hints::padding, &Hints::two_numbers, &Hints::layout, &Hints::order,
                          &Hints::other_function}) {
            if (std::string text = (this->*look)(); !text.empty()) return text;
        }
        return "";
    }

private:
    // The inputs that are features, or else logits; that are masks or logits; and that have the size of the result.
    int features() const { return backward_ ? 1 : 0; }
    int kernels() const { return has_features_ ? features() + 1 : features(); }
    int sized() const { return reads_masks_ ? kernels() : 0; }

    Sizes sizes(int k) const {
        const carafepp_tensor& tensor = *inputs_[k];
        const int batch = tensor.ndim - 3;
        const bool last = params_.flags & CARAFEPP_CHANNELS_LAST;
        const int64_t* shape = tensor.shape + batch;
        return last ? Sizes{shape[2], shape[0], shape[1]} : Sizes{shape[0], shape[1], shape[2]};
    }

    // Another dtype of one input, or of all: a smaller one rather than float64.
    std::string cast() const {
        const carafepp_dtype usual = inputs_[features()]->dtype;
        constexpr int kAll = -1;
        for (carafepp_dtype dtype : {CARAFEPP_FLOAT32 + 0, usual, CARAFEPP_FLOAT16 + 0, CARAFEPP_FLOAT64 + 0}) {
            for (int which = 0; which <= count_; which++) {
                if (std::string text = cast_to(dtype, which < count_ ? which : kAll); !text.empty()) return text;
            }
        }
        return "";
    }

    // The hint to cast input `which`, or all if it is negative.
    std::string cast_to(carafepp_dtype dtype, int which) const {
        std::array<carafepp_tensor, kMostInputs> copies;
        Tensors inputs = inputs_;
        std::vector<std::string> names;
        for (int k = 0; k < count_; k++) {
            if (inputs_[k]->dtype == dtype || !is_real(inputs_[k]->dtype) || (which >= 0 && k != which)) continue;
            copies[k] = *inputs_[k];
            copies[k].dtype = dtype;
            copies[k].data = reinterpret_cast<void*>(alignof(double));  // a copy is aligned
            inputs[k] = &copies[k];
            names.push_back(argument_name(function_, k));
        }
        if (names.empty() || !accepts(function_, params_, inputs)) return "";
        return " Cast " + joined(names, " and ") + " to " + dtype_name(dtype) + ".";
    }

    // Tells if arrays of a DLPack dtype can be cast: integers, floats, bfloat16 and booleans.
    static bool is_real(carafepp_dtype dtype) {
        const int code = dtype >> 8;
        return (dtype & 0xff) != 0 && (code <= 2 || code == 4 || code == 6);
    }

    // Another up, down, kernel_size or groups. A parameter with its default changes first: it may have been forgotten.
    std::string one_number() const { return numbers(1); }
    std::string two_numbers() const { return numbers(2); }

    std::string numbers(int most_changes) const {
        const int64_t channels = sizes(kernels()).c;
        int lowest = kNever;
        carafepp_params best = params_;
        for (int kernel_size = kMaxKernelSize; kernel_size >= 1; kernel_size -= 2) {
            for (int up : factors(params_.up)) {
                const int64_t of_group = int64_t{kernel_size} * kernel_size * (reads_masks_ ? 1 : int64_t{up} * up);
                if (channels == 0 || channels % of_group != 0) continue;
                carafepp_params candidate = params_;
                candidate.up = up;
                candidate.groups = static_cast<int32_t>(channels / of_group);
                if (params_.kernel_size != 0) candidate.kernel_size = kernel_size;
                for (int down : has_features_ ? factors(params_.down) : std::vector<int>{params_.down}) {
                    candidate.down = down;
                    const int cost = cost_of(candidate, kernel_size, most_changes);
                    if (cost >= lowest || !has_size(candidate, kernel_size)) continue;
                    if (!accepts(function_, candidate, inputs_)) continue;
                    lowest = cost;
                    best = candidate;
                }
            }
        }
        return lowest == kNever ? "" : " Did you mean " + joined(changes(best), " and ") + "?";
    }

    static std::vector<int> factors(int given) {
        std::vector<int> all(kMostFactor);
        std::iota(all.begin(), all.end(), 1);
        if (given > kMostFactor && given < 1 << 15) all.push_back(given);
        return all;
    }

    static constexpr int kNever = 1000;

    // How unlikely it is that the caller meant a candidate.
    int cost_of(const carafepp_params& candidate, int kernel_size, int most_changes) const {
        const bool up = candidate.up != params_.up, down = candidate.down != params_.down;
        const bool groups = candidate.groups != params_.groups, kernel = candidate.kernel_size != params_.kernel_size;
        const bool exchanged = up && down && candidate.up == params_.down && candidate.down == params_.up;
        const bool chosen = (up && params_.up != 1) || (down && params_.down != 1) || (groups && params_.groups != 1) ||
                            (kernel && params_.kernel_size != kUsualKernel);
        const int count = up + down + groups + kernel;
        if (count == 0 || (kernel_size == 1 && (kernel || groups))) return kNever;
        if (count > most_changes || (count == 2 && (!up || (chosen && !exchanged)))) return kNever;
        if (up && down && !exchanged && std::max(candidate.up, candidate.down) > kMostOfRatio) return kNever;
        if ((up || down) && std::gcd(candidate.up, candidate.down) > 1) return kNever;
        return 10 * up + 11 * kernel + 12 * groups + 13 * down + 100 * chosen;
    }

    // Tells if another factor gives just the size of the result, or one that less than a cell of outputs is cut from.
    bool has_size(const carafepp_params& candidate, int kernel_size) const {
        const int64_t up = candidate.up, down = candidate.down;
        if (up == params_.up && down == params_.down) return true;
        const Sizes from = sizes(features()), logits = sizes(kernels());
        int64_t height = from.h * up, width = from.w * up;
        if (has_features_) {
            const bool padded = params_.flags & CARAFEPP_PADDING;
            const int64_t radius = kernel_size / 2;
            if (padded && std::max(params_.padding[0], params_.padding[1]) > radius) return false;
            const Axis rows{{up, down}, padded ? radius - params_.padding[0] : 0};
            const Axis columns{{up, down}, padded ? radius - params_.padding[1] : 0};
            height = rows.natural_size(from.h);
            width = columns.natural_size(from.w);
            if (!reads_masks_ && (ceil_div(rows.centres(from.h), down) != logits.h ||
                                  ceil_div(columns.centres(from.w), down) != logits.w))
                return false;
        }
        int64_t cut_h = 0, cut_w = 0;
        if (reads_masks_ || backward_) {
            const Sizes result = sizes(sized());
            cut_h = height - result.h, cut_w = width - result.w;
        } else if (params_.flags & CARAFEPP_SIZE) {
            cut_h = height - params_.size[0], cut_w = width - params_.size[1];
        }
        return std::min(cut_h, cut_w) >= 0 && std::max(cut_h, cut_w) < up;
    }

    std::vector<std::string> changes(const carafepp_params& candidate) const {
        std::vector<std::string> changed;
        const auto compare = [&](const char* name, int32_t now, int32_t before) {
            if (now != before) changed.push_back(name + std::to_string(now));
        };
        compare("up=", candidate.up, params_.up);
        compare("down=", candidate.down, params_.down);
        compare("kernel_size=", candidate.kernel_size, params_.kernel_size);
        compare("groups=", candidate.groups, params_.groups);
        return changed;
    }

    std::string padding() const {
        if (!has_features_) return "";
        for (int padding = 0; padding <= kMaxKernelSize / 2; padding++) {
            carafepp_params candidate = params_;
            candidate.flags |= CARAFEPP_PADDING;
            candidate.padding[0] = candidate.padding[1] = padding;
            if (accepts(function_, candidate, inputs_)) return " Did you mean padding=" + std::to_string(padding) + "?";
        }
        return "";
    }

    std::string layout() const {
        carafepp_params candidate = params_;
        candidate.flags ^= CARAFEPP_CHANNELS_LAST;
        if (!accepts(function_, candidate, inputs_)) return "";
        return candidate.flags & CARAFEPP_CHANNELS_LAST
                   ? " Did you mean layout='NHWC'? In C, set the flag CARAFEPP_CHANNELS_LAST."
                   : " Did you mean layout='NCHW'? In C, leave out the flag CARAFEPP_CHANNELS_LAST.";
    }

    std::string order() const {
        std::array<int, kMostInputs> order{0, 1, 2};
        while (std::next_permutation(order.begin(), order.begin() + count_)) {
            Tensors inputs{};
            std::vector<std::string> moved;
            for (int k = 0; k < count_; k++) {
                inputs[k] = inputs_[order[k]];
                if (order[k] != k) moved.push_back(argument_name(function_, k));
            }
            if (accepts(function_, params_, inputs)) {
                return " " + joined(moved, moved.size() == 2 ? " and " : ", ") + " seem to be exchanged.";
            }
        }
        return "";
    }

    // Logits where masks belong, or masks where logits belong.
    std::string other_function() const {
        if (!has_features_) return "";
        const carafepp_function other = reads_masks_ ? function_ + 2 : function_ - 2;
        const int64_t channels = sizes(kernels()).c;
        for (int up : {params_.up, 2, 3, 4, 8, 16}) {
            if (up > kMostFactor || (up != params_.up && params_.up != 1)) continue;
            for (int kernel_size = 3; kernel_size <= kMaxKernelSize; kernel_size += 2) {
                const int64_t subpixels = reads_masks_ ? int64_t{up} * up : 1;
                if (channels != params_.groups * int64_t{kernel_size} * kernel_size * subpixels) continue;
                carafepp_params candidate = params_;
                candidate.up = up;
                candidate.kernel_size = reads_masks_ ? kernel_size : 0;
                if (!accepts(other, candidate, inputs_)) continue;
                if (!reads_masks_) candidate.kernel_size = params_.kernel_size;  // reassemble reads it off the masks
                const std::string with = joined(changes(candidate), " and ");
                return std::string(reads_masks_ ? " Logits" : " Masks") + " of that shape go to " +
                       function_name(other) + (with.empty() ? "." : ", with " + with + ".");
            }
        }
        return "";
    }

    carafepp_function function_;
    carafepp_params params_;
    int count_;
    Tensors inputs_{};
    bool backward_, has_features_, reads_masks_;
};

}  // namespace

std::string hint(carafepp_status status, carafepp_function function, const carafepp_params& params,
                 const carafepp_tensor* const* tensors) {
    return Hints(function, params, tensors).first(status);
}

}  // namespace carafepp
