// SPDX-License-Identifier: Apache-2.0
// Windows with adjacent channels, pixel by pixel: what the kernels for NHWC read or write.
#pragma once

#include <algorithm>
#include <type_traits>

#include "cpu/simd/vector.h"
#include "dtypes.h"
#include "problem.h"

namespace carafepp {
namespace {

// The window around one source pixel: where it begins (perhaps outside), and which taps of it are inside the borders.
template <class T>
struct PixelWindow {
    T* corner;
    int64_t row_stride, pixel_stride;
    int a_begin, a_end, b_begin, b_end;

    T* pixel(int64_t a, int64_t b) const { return corner + a * row_stride + b * pixel_stride; }
};

template <class T>
static inline PixelWindow<T> window_of(const Problem& p, const Array& features, int64_t n, int64_t c, int64_t i,
                                       int64_t j) {
    const int64_t top = i - p.radius(), left = j - p.radius();
    return {element<T>(features, n, c, top, left),
            features.stride_h,
            features.stride_w,
            static_cast<int>(std::max<int64_t>(-top, 0)),
            static_cast<int>(std::min(p.kernel_size, features.h - top)),
            static_cast<int>(std::max<int64_t>(-left, 0)),
            static_cast<int>(std::min(p.kernel_size, features.w - left))};
}

// How a block of channels is written: by plain stores, past the caches, or the first lanes of a vector only.
enum class Store { kPlain, kStream, kTail };

// 16-bit results fill half a vector, which cannot be written past the caches.
template <class T>
constexpr Store kStreamed = sizeof(T) == sizeof(Accumulator<T>) ? Store::kStream : Store::kPlain;

// Results from here on leave the caches before anybody reads them: they are written past the caches.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

// Whether pixels of a result, with so many channels in a group, are whole aligned vectors, and the result is large.
template <class T>
bool streams(const Array& result, int64_t channels) {
    if (kStreamed<T> != Store::kStream) return false;
    if (result.n * result.c * result.h * result.w * int64_t{sizeof(T)} < kStreamBytes) return false;
    uint64_t offsets = reinterpret_cast<uintptr_t>(result.data);
    for (int64_t stride : {result.stride_n, result.stride_h, result.stride_w, channels})
        offsets |= static_cast<uint64_t>(stride) * sizeof(T);
    return offsets % kVectorBytes == 0;
}

// A vector of a result; with Store::kTail its first `tail` lanes.
template <Store store_as, class T>
CARAFEPP_INLINE void write_channels(Vector<Accumulator<T>> value, T* to, int tail) {
    if constexpr (store_as == Store::kTail) {
        store_first(value, to, tail);
    } else if constexpr (store_as == Store::kStream) {
        stream(value, to);
    } else {
        store(value, to);
    }
}

// Calls f(n) with n in [1, Most] known to the compiler.
template <int Most, class F>
static inline __attribute__((always_inline)) void with_count(int n, F f) {
    if constexpr (Most > 1) {
        if (n < Most) {
            with_count<Most - 1>(n, f);
            return;
        }
    }
    f(std::integral_constant<int, Most>());
}

}  // namespace
}  // namespace carafepp
