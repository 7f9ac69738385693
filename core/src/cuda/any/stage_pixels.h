// SPDX-License-Identifier: Apache-2.0
// Pixels of 16 bits in shared memory with adjacent channels, for tensor cores: eight channels are a vector, whatever
// their strides in memory are.
#pragma once

#include "cuda/mma.h"
#include "cuda/positions.h"

namespace carafepp::cuda {

// Stages eight channels of pixels from `first` on, of which `channels` exist; 0 for pixels that do not. Channels are
// adjacent. They arrive as copies of this thread do.
template <class T>
__device__ __forceinline__ void copy_pixels(const T* from, const int64_t* pixels, int count, int first, int step,
                                            int channels, T* to, int apart) {
#pragma unroll 4
    for (int pixel = first; pixel < count; pixel += step) {
        const int64_t place = pixels[pixel];
        const bool exists = place != kNowhere && channels > 0;
        copy_async<kWide * sizeof(T)>(to + pixel * apart, from + (exists ? place : 0), exists);
    }
}

// The upper halves of two words, or the lower ones.
__device__ __forceinline__ uint32_t halves_of(uint32_t one, uint32_t other, bool upper) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(one, other, upper ? 0x7632 : 0x5410);
#else
    return upper ? one >> 16 | (other & 0xffff0000) : (one & 0xffff) | other << 16;
#endif
}

// The same where channels are `stride` apart: `Columns` neighbouring pixels at once, by way of registers. Instead of
// channels that do not exist it stages the last one, or 0 if there is none.
template <int Columns, class T>
__device__ __forceinline__ void transpose_pixels(const T* from, int stride, const int64_t* pixels, int count, int first,
                                                 int step, int channels, T* to, int apart) {
    constexpr int kInFlight = 2;
    using Word = std::conditional_t<Columns == 2, uint32_t, uint16_t>;
    int numbers[kWide];
#pragma unroll
    for (int v = 0; v < kWide; v++) numbers[v] = min(v, channels - 1);
#pragma unroll 1
    for (int pixel = first * Columns; pixel < count; pixel += kInFlight * step * Columns) {
        uint32_t words[kInFlight][kWide];
        bool exists[kInFlight];
#pragma unroll
        for (int load = 0; load < kInFlight; load++) {
            const int64_t place = pixels[min(pixel + load * step * Columns, count - Columns)];
            exists[load] = place != kNowhere && channels > 0;
            const T* const of_pixel = from + (exists[load] ? place : 0);
#pragma unroll
            for (int v = 0; v < kWide; v++)
                words[load][v] = __ldg(reinterpret_cast<const Word*>(at_stride(of_pixel, stride, numbers[v])));
        }
#pragma unroll
        for (int load = 0; load < kInFlight; load++) {
            const int at = pixel + load * step * Columns;
            if (at >= count) break;
#pragma unroll
            for (int k = 0; k < Columns; k++) {
                // Eight neighbouring threads store to different banks if four of them begin with the second column.
                const int column = Columns == 2 ? (first / 4 + k) % 2 : 0;
                uint32_t of[kWide / 2];
#pragma unroll
                for (int v = 0; v < kWide; v += 2)
                    of[v / 2] = halves_of(words[load][v], words[load][v + 1], column == 1);
                *reinterpret_cast<uint4*>(to + (at + column) * apart) = exists[load]
                                                                            ? make_uint4(of[0], of[1], of[2], of[3])
                                                                            : make_uint4(0, 0, 0, 0);
            }
        }
    }
}

}  // namespace carafepp::cuda
