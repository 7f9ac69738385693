// SPDX-License-Identifier: Apache-2.0
// Random calls of the C ABI. A call returns a status, and touches only the memory of its arguments. It changes no
// input, and writes nothing if it fails. Any number of threads gives the same bits.
//
// For libFuzzer, with AddressSanitizer and UndefinedBehaviorSanitizer: `LLVMFuzzerTestOneInput`. Use -len_control=0,
// because calls of short inputs are much the same. Without libFuzzer a driver draws the bytes: fuzz_abi SECONDS [SEED].
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "carafepp/carafepp.h"

namespace {

constexpr int64_t LARGEST = 1 << 16;  // bytes of a tensor that has memory

[[noreturn]] void fail(const std::string& what) {
    std::fprintf(stderr, "fuzz_abi: %s; the last error: %s\n", what.c_str(), carafepp_last_error());
    std::abort();
}

// Choices from bytes; once they are used up, every choice is the first one.
class Choices {
public:
    Choices(const uint8_t* data, size_t size) : data_(data), size_(size) {}

    uint64_t byte() {
        if (size_ == 0) return 0;
        --size_;
        return *data_++;
    }
    int64_t below(int64_t count) { return static_cast<int64_t>(byte() | byte() << 8) % count; }
    bool rarely() { return byte() >= 250; }  // never, once there is nothing left
    int64_t any() {                          // numbers at which arithmetic may break
        static const int64_t numbers[] = {
            0, -1, 1, 2, 3, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN, int64_t{1} << 31, 1000000, int64_t{3} << 61};
        return numbers[below(std::size(numbers))];
    }
    template <class T>
    T of(std::initializer_list<T> values) {
        return values.begin()[below(static_cast<int64_t>(values.size()))];
    }

private:
    const uint8_t* data_;
    size_t size_;
};

int64_t bytes_of(carafepp_dtype dtype) { return (dtype & 0xff) / 8; }

// The lowest and highest byte of a tensor's elements from its data pointer on; false where they cannot be held.
bool span(const carafepp_tensor& tensor, int64_t& low, int64_t& high) {
    const int64_t size = bytes_of(tensor.dtype);
    if (size < 1 || tensor.ndim < 0 || tensor.ndim > 5) return false;
    low = 0;
    high = size;
    for (int k = 0; k < tensor.ndim; k++) {
        if (tensor.shape[k] < 1) return false;
        int64_t reach = 0;
        if (__builtin_mul_overflow(tensor.shape[k] - 1, tensor.strides[k], &reach)) return false;
        if (std::abs(reach / 2) > LARGEST) return false;
        (reach < 0 ? low : high) += reach * size;
    }
    return high - low <= LARGEST;
}

struct Call {
    carafepp_params params{};
    int function = 0;
    carafepp_tensor tensors[5]{};
    bool present[5]{};
    int count = 0, inputs = 0;
    std::vector<std::unique_ptr<uint8_t[]>> blocks;  // exactly as large as the tensors in them
    std::vector<size_t> sizes;

    const carafepp_tensor* at(int k) const { return present[k] ? &tensors[k] : nullptr; }

    carafepp_status run() const {
        switch (function) {
            case 0: return carafepp_reassemble(&params, at(0), at(1), at(2), nullptr);
            case 1: return carafepp_reassemble_backward(&params, at(0), at(1), at(2), at(3), at(4), nullptr);
            case 2: return carafepp_reassemble_with_logits(&params, at(0), at(1), at(2), nullptr);
            case 3:
                return carafepp_reassemble_with_logits_backward(&params, at(0), at(1), at(2), at(3), at(4), nullptr);
            case 4: return carafepp_normalize_masks(&params, at(0), at(1), nullptr);
            default: return carafepp_normalize_masks_backward(&params, at(0), at(1), at(2), nullptr);
        }
    }
    std::vector<std::vector<uint8_t>> contents() const {
        std::vector<std::vector<uint8_t>> all;
        for (size_t k = 0; k < blocks.size(); k++) all.emplace_back(blocks[k].get(), blocks[k].get() + sizes[k]);
        return all;
    }
};

// A call that is right but for what rarely() changes.
class Builder {
public:
    explicit Builder(Choices choices) : choices_(choices) {}

    Call build() {
        call_.function = static_cast<int>(choices_.below(6));
        carafepp_params& p = call_.params;
        p.struct_size = choices_.rarely() ? static_cast<size_t>(choices_.any()) : sizeof p;
        p.up = number(1 + choices_.below(4));
        p.down = number(1 + choices_.below(4));
        p.kernel_size = number(choices_.of<int64_t>({3, 1, 5, 7, 0, 31}));
        p.groups = number(1 + choices_.below(3));
        p.normalizer = number(choices_.below(4));
        p.flags = choices_.rarely() ? static_cast<uint32_t>(choices_.any()) : 0;
        last_ = choices_.below(3) == 1;  // axes N, H, W, C
        if (last_) p.flags |= CARAFEPP_CHANNELS_LAST;
        batched_ = choices_.below(4) != 1;
        if (choices_.rarely()) p.implementation = choices_.of({"", "reassemble_any_ref", "grad_masks_any_ref", "none"});
        if (choices_.rarely()) p.reserved[choices_.below(2)] = choices_.any();
        shapes();
        if (choices_.rarely()) call_.present[choices_.below(5)] = !call_.present[choices_.below(5)];
        return std::move(call_);
    }

private:
    int32_t number(int64_t usual) { return static_cast<int32_t>(choices_.rarely() ? choices_.any() : usual); }

    // Shapes by the rules of the header, of small numbers; strange parameters count as 1.
    void shapes() {
        const carafepp_params& p = call_.params;
        const auto sane = [](int64_t value) { return value >= 1 && value <= 31 ? value : int64_t{1}; };
        const int64_t up = sane(p.up), down = sane(p.down), k = sane(p.kernel_size), groups = sane(p.groups);
        const int64_t n = batched_ ? choices_.below(3) : 1, c = groups * choices_.below(6);
        const int64_t h = choices_.below(9), w = choices_.below(20);
        int64_t centres[2] = {h, w};
        if (call_.function < 4 && choices_.below(3) == 1) {
            call_.params.flags |= CARAFEPP_PADDING;
            for (int axis = 0; axis < 2; axis++) {
                const int64_t padding = choices_.below(k / 2 + 1);
                call_.params.padding[axis] = choices_.rarely() ? choices_.any() : padding;
                centres[axis] = std::max<int64_t>(centres[axis] - 2 * (k / 2 - padding), 0);
            }
        }
        const int64_t cells_h = (centres[0] + down - 1) / down, cells_w = (centres[1] + down - 1) / down;
        int64_t out_h = (centres[0] * up + down - 1) / down, out_w = (centres[1] * up + down - 1) / down;
        if (call_.function >= 4) {
            out_h = cells_h * up;
            out_w = cells_w * up;
        }
        if (choices_.below(4) == 1) {
            out_h = choices_.below(out_h + 1);
            out_w = choices_.below(out_w + 1);
            call_.params.flags |= CARAFEPP_SIZE;
            call_.params.size[0] = choices_.rarely() ? choices_.any() : out_h;
            call_.params.size[1] = out_w;
        }
        const carafepp_dtype dtype = choices_.of(
            {CARAFEPP_FLOAT32, CARAFEPP_FLOAT64, CARAFEPP_FLOAT16, CARAFEPP_BFLOAT16});
        const carafepp_dtype half = bytes_of(dtype) == 2 && choices_.below(2) ? CARAFEPP_FLOAT32 : dtype;
        struct Shape {
            int64_t n, c, h, w;
            carafepp_dtype dtype;
        };
        const Shape features{n, c, h, w, dtype}, output{n, c, out_h, out_w, dtype};
        const Shape masks{n, groups * k * k, out_h, out_w, half};
        const Shape logits{n, groups * k * k * up * up, cells_h, cells_w, half};
        const auto add = [&](const Shape& s, bool result) { tensor({s.n, s.c, s.h, s.w}, s.dtype, result); };
        const Shape& weights = call_.function < 2 ? masks : logits;
        switch (call_.function) {
            case 0:
            case 2: add(features, false), add(weights, false), add(output, true); break;
            case 1:
            case 3:
                add(output, false), add(features, false), add(weights, false);
                add(features, true), add(weights, true);
                break;
            case 4: add(logits, false), add(masks, true); break;
            default: add(masks, false), add(logits, false), add(logits, true);
        }
    }

    void tensor(std::vector<int64_t> shape, carafepp_dtype dtype, bool result) {
        carafepp_tensor& t = call_.tensors[call_.count];
        if (!result) call_.inputs++;
        call_.present[call_.count++] = !(result && call_.inputs == 3 && choices_.below(8) == 1);
        if (last_) std::rotate(shape.begin() + 1, shape.begin() + 2, shape.end());
        if (!batched_) shape.erase(shape.begin());
        t.dtype = choices_.rarely() ? static_cast<carafepp_dtype>(choices_.any()) : dtype;
        t.device = choices_.rarely() ? number(2) : CARAFEPP_CPU;
        if (t.device != CARAFEPP_CPU && t.device != CARAFEPP_CUDA_HOST && bytes_of(t.dtype) == 0)
            t.device = CARAFEPP_CPU;
        t.device_index = number(0);
        t.ndim = number(static_cast<int64_t>(shape.size()));
        for (size_t k = 0; k < shape.size(); k++) t.shape[k] = choices_.rarely() ? choices_.any() : shape[k];
        strides(t, shape.size());
        memory(t, result);
    }

    void strides(carafepp_tensor& t, size_t axes) {
        std::vector<size_t> order(axes);
        for (size_t k = 0; k < axes; k++) order[k] = k;
        if (choices_.below(3) == 1)
            std::rotate(order.begin(), order.begin() + choices_.below(static_cast<int64_t>(axes)), order.end());
        int64_t stride = choices_.below(5) == 1 ? 2 : 1;
        for (size_t k = axes; k-- > 0;) {
            const size_t axis = order[k];
            t.strides[axis] = choices_.below(12) == 1 ? -stride : stride;
            if (__builtin_mul_overflow(stride, std::max<int64_t>(t.shape[axis], 1), &stride)) stride = INT64_MAX / 2;
            if (choices_.below(8) == 1 && stride < LARGEST) stride += choices_.below(4);
            if (choices_.rarely()) t.strides[axis] = choices_.any();
        }
    }

    // Memory of just the tensor's span; another's, now and then; none where it cannot be had.
    void memory(carafepp_tensor& t, bool result) {
        int64_t low = 0, high = 0;
        if (!span(t, low, high)) return;  // NULL, which only an empty tensor may be
        const auto size = static_cast<size_t>(high - low);
        if (result && !call_.blocks.empty() && choices_.below(16) == 1) {
            const auto other = static_cast<size_t>(choices_.below(static_cast<int64_t>(call_.blocks.size())));
            if (call_.sizes[other] >= size) {
                const int64_t room = static_cast<int64_t>(call_.sizes[other] - size) + 1;
                t.data = call_.blocks[other].get() + choices_.below(std::min<int64_t>(room, 64)) - low;
                return;
            }
        }
        const size_t off = choices_.rarely() ? 1 : 0;  // not aligned
        call_.blocks.emplace_back(new uint8_t[size + off]);
        call_.sizes.push_back(size + off);
        for (size_t k = 0; k < size + off; k++) call_.blocks.back()[k] = static_cast<uint8_t>(choices_.byte());
        t.data = call_.blocks.back().get() + off - low;
        if (choices_.rarely()) t.data = nullptr;
    }

    Choices choices_;
    Call call_;
    bool last_ = false, batched_ = true;
};

// Makes the call that the bytes stand for, and aborts if it breaks a promise. True if it has computed something.
bool try_one(const uint8_t* data, size_t size) {
    Call call = Builder(Choices(data, size)).build();
    for (int k = 0; k < call.count; k++) {  // a pointer that says it is on a GPU is never followed here
        if (call.tensors[k].device == CARAFEPP_CUDA || call.tensors[k].device == CARAFEPP_CUDA_MANAGED) return false;
    }
    const auto before = call.contents();
    carafepp_set_num_threads(1);
    const carafepp_status status = call.run();
    const auto after = call.contents();
    if (status < CARAFEPP_OK || status > CARAFEPP_MEMORY_ERROR) fail("status " + std::to_string(status));
    if (status != CARAFEPP_OK) {
        if (after != before) fail("a call that failed has written");
        if (carafepp_last_error()[0] != '[') fail("a sentence that names no function");
        return false;
    }
    for (size_t k = 0; k < static_cast<size_t>(call.inputs) && k < before.size(); k++) {
        if (after[k] != before[k] && call.blocks.size() == static_cast<size_t>(call.count))
            fail("an input has changed");
    }
    carafepp_set_num_threads(3);
    if (call.run() != CARAFEPP_OK || call.contents() != after) fail("another result on three threads");
    return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    try_one(data, size);
    return 0;
}

#ifndef CARAFEPP_LIBFUZZER
int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 1;
    std::mt19937_64 random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : std::random_device{}());
    const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
    std::vector<uint8_t> bytes;
    int64_t calls = 0, computed = 0;
    for (; std::chrono::steady_clock::now() < end; calls++) {
        bytes.resize(random() % 2000);
        for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
        // Most calls are right but for one thing at most.
        if (calls % 4) {
            for (uint8_t& byte : bytes) byte = byte >= 250 && random() % 16 ? 7 : byte;
        }
        computed += try_one(bytes.data(), bytes.size());
    }
    std::printf("%lld calls, of which %lld computed\n", static_cast<long long>(calls),
                static_cast<long long>(computed));
    return 0;
}
#endif
