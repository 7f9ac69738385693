// SPDX-License-Identifier: Apache-2.0
// Small images of any strides, for the kernels for adjacent channels: those fill vectors even if rows are short. Takes
// one image and some channels of a group at a time. Stages its features and outputs, runs the kernel on a problem of
// that one image, and writes its result.
#pragma once

#include <algorithm>

#include "cpu/simd/kernels.h"
#include "cpu/simd/vector.h"
#include "cpu/simd/work_items.h"
#include "kernel.h"
#include "problem.h"

namespace carafepp::CARAFEPP_ISA {

// Stages channels from `channel` on, as many as `image` has. The dtype of `image` is the one that sums are kept in.
void load_image(const Array& array, int64_t n, int64_t channel, const Array& image);

// The inverse. `planes` is room for as many channels as a vector has lanes, for non-temporal stores.
void store_image(const Array& image, const Array& array, int64_t n, int64_t channel, bool non_temporal, void* planes);

// A kernel of one image after the other.
template <template <class> class Kernel, class Sum>
struct OnImages {
    using A = Sum;
    static constexpr int64_t L = kLanes<A>;
    static constexpr Result kResult = Kernel<A>::kResult;

    const Problem& p;
    const Array& result;
    int64_t channels;                     // of a group
    int64_t at_once, parts;               // channels staged at once; number of such parts
    int64_t pitch;                        // of pixels
    int64_t features_size, outputs_size;  // [row][column][channel]
    int64_t items, scratch_size;
    bool non_temporal;

    OnImages(const Problem& problem, const Array& result) : p(problem), result(result) {
        channels = p.features.c / p.groups;
        at_once = channels_of_image(p);
        parts = ceil_div(channels, at_once);
        pitch = at_once + L;  // a vector more than needed, so that pixels do not compete for a few sets of the cache
        features_size = p.features.h * p.features.w * pitch;
        outputs_size = p.out_h * p.out_w * pitch;
        items = result.n * p.groups * parts;
        const int64_t last = channels - (parts - 1) * at_once, planes_size = L * result.h * result.w;
        scratch_size = features_size + outputs_size +
                       std::max({scratch_of_kernel(at_once), scratch_of_kernel(last), planes_size});
        non_temporal = result.stride_w == 1 && result.stride_h == result.w && result.stride_c == result.h * result.w &&
                       wants_non_temporal_stores(result);
    }

    void run_item(int64_t item, A* scratch) const {
        const int64_t n = item / parts / p.groups, group = item / parts % p.groups, first = item % parts * at_once;
        const int64_t channel = group * channels + first, count = std::min(at_once, channels - first);
        A *const features = scratch, *const outputs = features + features_size, *const rest = outputs + outputs_size;
        const Problem one = problem_of_image(n, group, count, features, outputs);
        const Array written = result_of_image(one, n, group, count, outputs);
        if (kResult != kGradFeatures) load_image(p.features, n, channel, one.features);
        if (kResult != kReassemble) load_image(p.grad_output, n, channel, one.grad_output);
        const Kernel<A> kernel(one, written, kImageScratchBytes);
        for (int64_t k = 0; k < kernel.items; k++) kernel.run_item(k, rest);
        if (kResult != kGradMasks) store_image(written, result, n, channel, non_temporal, rest);
    }

private:
    int64_t scratch_of_kernel(int64_t count) const {
        const Problem one = problem_of_image(0, 0, count, nullptr, nullptr);
        const Array written = result_of_image(one, 0, 0, count, nullptr);
        return Kernel<A>(one, written, kImageScratchBytes).scratch_size;
    }

    // The problem of `count` channels of a group of one image, with one group. Features and outputs are staged; masks
    // and logits stay where they are.
    Problem problem_of_image(int64_t n, int64_t group, int64_t count, A* features, A* outputs) const {
        Problem one = p;
        one.groups = 1;
        one.features = staged(count, p.features.h, p.features.w, features);
        if (kResult != kReassemble) one.grad_output = staged(count, p.out_h, p.out_w, outputs);
        one.masks = of_group(p.masks, n, group);
        one.logits = of_group(p.logits, n, group);
        return one;
    }

    // The result of that problem: staged like its outputs or its features, or gradients of masks where they belong.
    Array result_of_image(const Problem& one, int64_t n, int64_t group, int64_t count, A* outputs) const {
        if (kResult == kReassemble) return staged(count, p.out_h, p.out_w, outputs);
        return kResult == kGradFeatures ? one.features : of_group(result, n, group);
    }

    Array staged(int64_t count, int64_t height, int64_t width, A* data) const {
        return {data, kDtypeOf<A>, 1, count, height, width, height * width * pitch, 1, width * pitch, pitch};
    }

    // A group of one image of masks or logits.
    Array of_group(const Array& array, int64_t n, int64_t group) const {
        Array view = array;
        view.n = 1;
        view.c /= p.groups;
        view.data = static_cast<char*>(array.data) +
                    (n * array.stride_n + group * view.c * array.stride_c) * itemsize(array.dtype);
        return view;
    }
};

// Runs a kernel for adjacent channels on images, with the type that sums are kept in as that of features.
template <template <class> class Kernel>
void run_on_images(const Problem& problem, const Array& result) {
    with_accumulator(problem.features.dtype,
                     [&](auto sums) { run_items(OnImages<Kernel, typename decltype(sums)::type>(problem, result)); });
}

}  // namespace carafepp::CARAFEPP_ISA
