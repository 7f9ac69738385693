// SPDX-License-Identifier: Apache-2.0
// Small images of any strides, one group or some of its channels at a time: staged with their channels adjacent, they
// are computed by the kernels made for that, whose vectors are full however few columns a row has.
#pragma once

#include <algorithm>

#include "cpu/simd/kernels.h"
#include "cpu/simd/vector.h"
#include "cpu/simd/work_items.h"
#include "problem.h"

namespace carafepp::CARAFEPP_ISA {

// Channels from `channel` on, to those of `image`, whose dtype is the one that sums are kept in.
void load_image(const Array& array, int64_t n, int64_t channel, const Array& image);

// The inverse. `planes` is room for as many channels as a vector has lanes, by way of which they are written past the
// caches if `streams`.
void store_image(const Array& image, const Array& array, int64_t n, int64_t channel, bool streams, void* planes);

enum class Result { kOutput, kGradFeatures, kGradMasks };

// One image as a problem of its own.
struct Image {
    Problem problem;
    Array result;
};

// A kernel for adjacent channels, of one image after the other. Masks, and their gradient, stay where they are.
template <template <class> class Kernel, class Sum>
struct Images {
    using A = Sum;
    static constexpr int64_t L = kLanes<A>;

    static constexpr Result kResult = Kernel<A>::kResult;

    const Problem& p;
    const Array& result;
    const int64_t channels = p.features.c / p.groups;
    const int64_t at_once = channels_of_image(p), parts = ceil_div(channels, at_once);
    const int64_t last = channels - (parts - 1) * at_once;
    // Of pixels: a vector more than needed, so that they do not compete for a few sets of the cache.
    const int64_t pitch = at_once + L;
    const int64_t features_size = p.features.h * p.features.w * pitch, outputs_size = p.out_h * p.out_w * pitch;
    const int64_t planes_size = L * result.h * result.w;
    const int64_t scratch_size = features_size + outputs_size +
                                 std::max({scratch_of_kernel(at_once), scratch_of_kernel(last), planes_size});
    const int64_t items = result.n * p.groups * parts;
    const bool streams = result.stride_w == 1 && result.stride_h == result.w &&
                         result.stride_c == result.h * result.w && leaves_caches(result);

    int64_t scratch_of_kernel(int64_t count) const {
        const Image one = image(0, 0, count, static_cast<A*>(result.data));
        const int64_t size = Kernel<A>{one.problem, one.result}.scratch_size;  // clang 14 needs the name
        return size;
    }

    void run_item(int64_t item, A* scratch) const {
        const int64_t n = item / parts / p.groups, group = item / parts % p.groups, first = item % parts * at_once;
        const int64_t channel = group * channels + first;
        A* const rest = scratch + features_size + outputs_size;
        const Image one = image(n, group, std::min(at_once, channels - first), scratch);
        if (kResult != Result::kGradFeatures) load_image(p.features, n, channel, one.problem.features);
        if (kResult != Result::kOutput) load_image(p.grad_output, n, channel, one.problem.grad_output);
        const Kernel<A> kernel{one.problem, one.result};
        for (int64_t k = 0; k < kernel.items; k++) kernel.run_item(k, rest);
        if (kResult != Result::kGradMasks) store_image(one.result, result, n, channel, streams, rest);
    }

    // Features lie at the begin of scratch, the output or its gradient behind them.
    Image image(int64_t n, int64_t group, int64_t count, A* scratch) const {
        Problem one = p;
        one.groups = 1;
        one.features = pixels(count, p.features.h, p.features.w, scratch);
        const Array outputs = pixels(count, p.out_h, p.out_w, scratch + features_size);
        if (kResult != Result::kOutput) one.grad_output = outputs;
        const auto of_group = [&](const Array& array) {
            Array view = array;
            view.n = 1;
            view.c /= p.groups;
            view.data = static_cast<char*>(array.data) +
                        (n * array.stride_n + group * view.c * array.stride_c) * itemsize(array.dtype);
            return view;
        };
        one.masks = of_group(p.masks);
        one.logits = of_group(p.logits);
        switch (kResult) {
            case Result::kOutput: return {one, outputs};
            case Result::kGradFeatures: return {one, one.features};
            default: return {one, of_group(result)};
        }
    }

    Array pixels(int64_t count, int64_t height, int64_t width, A* data) const {
        return {data, kDtypeOf<A>, 1, count, height, width, height * width * pitch, 1, width * pitch, pitch};
    }
};

// A kernel for adjacent channels on images, whose features have the type that sums are kept in.
template <template <class> class Kernel>
void run_on_images(const Problem& problem, const Array& result) {
    with_accumulator(problem.features.dtype,
                     [&](auto sums) { run_items(Images<Kernel, typename decltype(sums)::type>{problem, result}); });
}

}  // namespace carafepp::CARAFEPP_ISA
