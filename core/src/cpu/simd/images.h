// SPDX-License-Identifier: Apache-2.0
// Small images of any strides, one group or some of its channels at a time: staged with their channels adjacent, they
// are computed by the kernels made for that, whose vectors are full however few columns a row has.
#pragma once

#include <algorithm>

#include "cpu/simd/columns.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/masks.h"
#include "cpu/simd/vector.h"
#include "problem.h"

namespace carafepp {
namespace {

// Calls f(row, columns) for each row of an array, or once for all where they are adjacent.
template <class F>
CARAFEPP_INLINE void for_each_row(const Array& array, F f) {
    if (array.stride_h == array.w * array.stride_w) {
        f(0, array.h * array.w);
    } else {
        for (int64_t row = 0; row < array.h; row++) f(row, array.w);
    }
}

// As many channels as a vector has lanes, of adjacent columns, to pixels that lie `pitch` apart. The same columns of
// the channels behind them, which are read next, are fetched meanwhile: each is a page further, beyond the processor's
// own prefetching.
template <class T>
CARAFEPP_INLINE void load_planes(const T* from, int64_t stride_c, int64_t columns, Accumulator<T>* to, int64_t pitch) {
    constexpr int L = kLanes<Accumulator<T>>;
    for_each_block<L>(static_cast<int>(columns), [&](int begin, int) __attribute__((always_inline)) {
        for (int64_t c = L; c < 2 * L; c++) __builtin_prefetch(from + c * stride_c + begin, 0, 2);
        transpose_block(from + begin, stride_c, to + begin * pitch, pitch);
    });
}

// Channels from `channel` on, to those of `image`.
template <class T>
void load_image(const Array& array, int64_t n, int64_t channel, const Array& image) {
    using A = Accumulator<T>;
    constexpr int64_t L = kLanes<A>;
    for_each_row(array, [&](int64_t row, int64_t columns) {
        const T* from = element<const T>(array, n, channel, row, 0);
        A* const to = element<A>(image, 0, 0, row, 0);
        if (array.stride_w == 1) {
            for (int64_t c = 0; c < image.c; c += L, from += L * array.stride_c) {
                if (image.c - c >= L && columns >= L) {
                    load_planes(from, array.stride_c, columns, to + c, image.stride_w);
                } else {
                    load_channels<T>(from, array.stride_c, static_cast<int>(std::min(L, image.c - c)),
                                     static_cast<int>(columns), adjacent_places(to + c, image.stride_w));
                }
            }
            return;
        }
        for (int64_t j = 0; j < columns; j++, from += array.stride_w) {
            for (int64_t c = 0; c < image.c; c++) to[j * image.stride_w + c] = widen(from[c * array.stride_c]);
        }
    });
}

// The inverse. `planes` is room for as many channels as a vector has lanes, by way of which they are written past the
// caches if `streams`.
template <class T>
void store_image(const Array& image, const Array& array, int64_t n, int64_t channel, bool streams,
                 Accumulator<T>* planes) {
    using A = Accumulator<T>;
    constexpr int64_t L = kLanes<A>;
    for_each_row(array, [&](int64_t row, int64_t columns) {
        const A* const from = element<const A>(image, 0, 0, row, 0);
        T* to = element<T>(array, n, channel, row, 0);
        if constexpr (std::is_same_v<T, A>) {
            if (streams) {
                for (int64_t c = 0; c < image.c; c += L, to += L * columns) {
                    const int64_t count = std::min(L, image.c - c);
                    store_channels<T>(adjacent_places(from + c, image.stride_w), static_cast<int>(count),
                                      static_cast<int>(columns), planes, columns);
                    stream_lines(planes, count * columns, to);
                }
                finish_streams();
                return;
            }
        }
        if (array.stride_w == 1) {
            for (int64_t c = 0; c < image.c; c += L, to += L * array.stride_c) {
                store_channels<T>(adjacent_places(from + c, image.stride_w), static_cast<int>(std::min(L, image.c - c)),
                                  static_cast<int>(columns), to, array.stride_c);
            }
            return;
        }
        for (int64_t j = 0; j < columns; j++, to += array.stride_w) {
            for (int64_t c = 0; c < image.c; c++) to[c * array.stride_c] = narrow<T>(from[j * image.stride_w + c]);
        }
    });
}

enum class Result { kOutput, kGradFeatures, kGradMasks };

// A kernel for adjacent channels, of one image after the other. Masks, and their gradient, stay where they are.
template <template <class, class> class Kernel, class T, class M>
struct Images {
    using A = Accumulator<T>;
    static constexpr int64_t L = kLanes<A>;

    static constexpr Result kResult = Kernel<A, M>::kResult;

    const Problem& p;
    const int64_t channels = p.features.c / p.groups;
    const int64_t at_once = channels_of_image(p), parts = ceil_div(channels, at_once);
    const int64_t last = channels - (parts - 1) * at_once;
    // Of pixels: a vector more than needed, so that they do not compete for a few sets of the cache.
    const int64_t pitch = at_once + L;
    const int64_t features_size = p.features.h * p.features.w * pitch, outputs_size = p.out_h * p.out_w * pitch;
    const int64_t planes_size = L * p.result.h * p.result.w;
    const int64_t scratch_size = features_size + outputs_size +
                                 std::max({scratch_of_kernel(at_once), scratch_of_kernel(last), planes_size});
    const int64_t items = p.result.n * p.groups * parts;
    const bool streams = p.result.stride_w == 1 && p.result.stride_h == p.result.w &&
                         p.result.stride_c == p.result.h * p.result.w && leaves_caches<T>(p.result);

    int64_t scratch_of_kernel(int64_t count) const {
        const Problem one = image(0, 0, count, static_cast<A*>(p.result.data));
        const int64_t size = Kernel<A, M>{one}.scratch_size;  // in a name: clang 14 takes it for the address of `one`
        return size;
    }

    void run_item(int64_t item, A* scratch) const {
        const int64_t n = item / parts / p.groups, group = item / parts % p.groups, first = item % parts * at_once;
        const int64_t channel = group * channels + first;
        A* const rest = scratch + features_size + outputs_size;
        const Problem one = image(n, group, std::min(at_once, channels - first), scratch);
        if (kResult != Result::kGradFeatures) load_image<T>(p.features, n, channel, one.features);
        if (kResult != Result::kOutput) load_image<T>(p.grad_output, n, channel, one.grad_output);
        const Kernel<A, M> kernel{one};
        for (int64_t k = 0; k < kernel.items; k++) kernel.run_item(k, rest);
        if (kResult != Result::kGradMasks) store_image<T>(one.result, p.result, n, channel, streams, rest);
    }

    // The problem of one image.
    Problem image(int64_t n, int64_t group, int64_t count, A* scratch) const {
        Problem one = p;
        one.groups = 1;
        one.features = pixels(count, p.features.h, p.features.w, scratch);
        one.grad_output = pixels(count, p.out_h, p.out_w, scratch + features_size);
        const auto of_group = [&](const Array& array) {
            Array view = array;
            view.n = 1;
            view.c /= p.groups;
            view.data = element<M>(array, n, group * view.c, 0, 0);
            return view;
        };
        one.masks = of_group(p.masks);
        one.logits = of_group(p.logits);
        one.result = kResult == Result::kOutput         ? one.grad_output
                     : kResult == Result::kGradFeatures ? one.features
                                                        : of_group(p.result);
        return one;
    }

    Array pixels(int64_t count, int64_t height, int64_t width, A* data) const {
        return {data,
                sizeof(A) == 8 ? CARAFEPP_FLOAT64 : CARAFEPP_FLOAT32,
                1,
                count,
                height,
                width,
                height * width * pitch,
                1,
                width * pitch,
                pitch};
    }
};

}  // namespace
}  // namespace carafepp
