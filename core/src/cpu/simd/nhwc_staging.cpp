// SPDX-License-Identifier: Apache-2.0
#include "cpu/simd/nhwc_staging.h"

#include "cpu/simd/row_deinterleave.h"
#include "cpu/simd/tile_transpose.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

// Calls f(row, columns) for each row of an array and an image. Rows that are adjacent in both are one row.
template <class F>
CARAFEPP_INLINE void for_each_row(const Array& array, const Array& image, F f) {
    if (array.stride_h == array.w * array.stride_w && image.stride_h == image.w * image.stride_w) {
        f(0, array.h * array.w);
    } else {
        for (int64_t row = 0; row < array.h; row++) f(row, array.w);
    }
}

constexpr int64_t kChunk = 1024;  // columns whose pixels are staged together: in the level 2 cache

// As many channels as a vector has lanes, of adjacent columns, to pixels that lie `pitch` apart. Prefetches the same
// columns of the next channels. Each is a page further, which the processor's own prefetching does not cross.
template <class T>
CARAFEPP_INLINE void load_planes(const T* from, int64_t stride_c, int64_t columns, Accumulator<T>* to, int64_t pitch) {
    constexpr int L = kLanes<Accumulator<T>>;
    for_each_block<L>(static_cast<int>(columns), [&](int begin, int) __attribute__((always_inline)) {
        for (int64_t c = L; c < 2 * L; c++) __builtin_prefetch(from + c * stride_c + begin, 0, 2);
        transpose_block(from + begin, stride_c, to + begin * pitch, pitch);
    });
}

// Pixels with adjacent channels, in whole vectors. Prefetches the channels that are staged next.
CARAFEPP_INLINE void copy_pixels(const float* from, int64_t stride, int64_t columns, int64_t channels, float* to,
                                 int64_t pitch) {
    for (int64_t j = 0; j < columns; j++, from += stride, to += pitch) {
        __builtin_prefetch(from + channels, 0, 2);
#pragma GCC unroll 2
        for (int64_t c = 0; c < channels; c += kLanes<float>) store(load(from + c), to + c);
    }
}

// Channels of two vectors, which are a cache line. Both halves of it are written one after the other.
CARAFEPP_INLINE void load_pairs_of_planes(const float* from, int64_t stride_c, int64_t columns, float* to,
                                          int64_t pitch) {
    constexpr int L = kLanes<float>;
    for_each_block<L>(static_cast<int>(columns), [&](int begin, int) __attribute__((always_inline)) {
        for (int64_t c = 0; c < 2 * L; c += L)
            transpose_block(from + c * stride_c + begin, stride_c, to + begin * pitch + c, pitch);
    });
}

template <class T>
void load_elements(const Array& array, int64_t n, int64_t channel, const Array& image) {
    using A = Accumulator<T>;
    constexpr int64_t L = kLanes<A>;
    for_each_row(array, image, [&](int64_t row, int64_t columns) {
        const T* from = element<const T>(array, n, channel, row, 0);
        A* const to = element<A>(image, 0, 0, row, 0);
        if constexpr (std::is_same_v<T, float>) {  // others do without this code, for its size
            if (array.stride_c == 1 && image.c % L == 0) {
                if (image.c == kRunChannels) {  // known to the compiler
                    copy_pixels(from, array.stride_w, columns, kRunChannels, to, image.stride_w);
                } else {
                    copy_pixels(from, array.stride_w, columns, image.c, to, image.stride_w);
                }
                return;
            }
            if (array.stride_w == 1 && image.c == 2 * L && columns >= L) {
                load_pairs_of_planes(from, array.stride_c, columns, to, image.stride_w);
                return;
            }
        }
        if (array.stride_w == 1) {
            for (int64_t j = 0; j < columns; j += kChunk) {
                const int64_t begin = std::max<int64_t>(std::min(j, columns - L), 0);
                const int64_t count = std::min(kChunk, columns - begin);
                const T* chunk = from + begin;
                A* const pixels = to + begin * image.stride_w;
                for (int64_t c = 0; c < image.c; c += L, chunk += L * array.stride_c) {
                    if (image.c - c >= L && count >= L) {
                        load_planes(chunk, array.stride_c, count, pixels + c, image.stride_w);
                    } else {
                        load_channels<T>(chunk, array.stride_c, static_cast<int>(std::min(L, image.c - c)),
                                         static_cast<int>(count), adjacent_channels(pixels + c, image.stride_w));
                    }
                }
            }
            return;
        }
        for (int64_t j = 0; j < columns; j++, from += array.stride_w) {
            for (int64_t c = 0; c < image.c; c++) to[j * image.stride_w + c] = widen(from[c * array.stride_c]);
        }
    });
}

template <class T>
void store_elements(const Array& image, const Array& array, int64_t n, int64_t channel, bool non_temporal,
                    Accumulator<T>* planes) {
    using A = Accumulator<T>;
    constexpr int64_t L = kLanes<A>;
    for_each_row(array, image, [&](int64_t row, int64_t columns) {
        const A* const from = element<const A>(image, 0, 0, row, 0);
        T* to = element<T>(array, n, channel, row, 0);
        if constexpr (std::is_same_v<T, A>) {
            if (non_temporal) {
                for (int64_t c = 0; c < image.c; c += L, to += L * array.stride_c) {
                    const int64_t count = std::min(L, image.c - c);
                    store_channels<T>(adjacent_channels(from + c, image.stride_w), static_cast<int>(count),
                                      static_cast<int>(columns), planes, columns);
                    const int64_t copies = array.stride_c == columns ? 1 : count;
                    for (int64_t q = 0; q < copies; q++)
                        copy_non_temporal(planes + q * columns, count * columns / copies, to + q * array.stride_c);
                }
                finish_non_temporal_stores();
                return;
            }
        }
        if (array.stride_w == 1) {
            for (int64_t c = 0; c < image.c; c += L, to += L * array.stride_c) {
                store_channels<T>(adjacent_channels(from + c, image.stride_w),
                                  static_cast<int>(std::min(L, image.c - c)), static_cast<int>(columns), to,
                                  array.stride_c);
            }
            return;
        }
        for (int64_t j = 0; j < columns; j++, to += array.stride_w) {
            for (int64_t c = 0; c < image.c; c++) to[c * array.stride_c] = narrow<T>(from[j * image.stride_w + c]);
        }
    });
}

}  // namespace

void load_image(const Array& array, int64_t n, int64_t channel, const Array& image) {
    with_type(array.dtype, [&](auto type) { load_elements<typename decltype(type)::type>(array, n, channel, image); });
}

void store_image(const Array& image, const Array& array, int64_t n, int64_t channel, bool non_temporal, void* planes) {
    with_type(array.dtype, [&](auto type) {
        using T = typename decltype(type)::type;
        store_elements<T>(image, array, n, channel, non_temporal, static_cast<Accumulator<T>*>(planes));
    });
}

}  // namespace carafepp::CARAFEPP_ISA
