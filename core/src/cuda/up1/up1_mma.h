// SPDX-License-Identifier: Apache-2.0
// Shared by the kernels for up = down = 1 on tensor cores. A run is eight neighbouring pixels of a row. Their windows
// are in the 16 pixels of two runs: of those that begin four columns before the first pixel. So a product is 16 pixels
// by a run, in the 16 channels of a slice.
#pragma once

#include "cuda/mma.h"
#include "cuda/up1/up1.h"

namespace carafepp::cuda {

constexpr int kRun = 8;        // pixels
constexpr int kBeforeRun = 4;  // columns
constexpr int kMostRuns = 4;   // of a tile's row
constexpr int kOfSlice = 16;   // channels
constexpr int kWarpsOfUp1 = kThreads / 32;
constexpr int64_t kMostBytesOfUp1 = 104 * 1024;  // of a block: a multiprocessor of sm_90 has two

// A slice is staged as [row][pixel][channel] or, with adjacent columns, as [row][channel][pixel], with room for the
// most runs and the one behind them.
constexpr int kRowOfSlice = kPitch * kOfSlice;
static_assert(kPitch == (kMostRuns + 1) * kRun && kPitch / kRun % 2 == 1, "rows of a matrix are in different banks");

// Places of windows: tap 0 of pixel r of a run is pixel r + kShift of 16.
template <int K>
constexpr int kShift = kBeforeRun - K / 2;

// Taps of the 16 pixels that a warp has at once, where they are adjacent in memory: a copy of the vectors that have
// them.
template <int K>
struct TapsOfWarp {
    static constexpr int kPixels = TapsOfPixel<K, false>::kOfWarp;
    static constexpr int kVectors = (K * K + 2 * (kWide - 1)) / kWide;  // of a pixel
    static constexpr int kLanes = kVectors > 4 ? 8 : 4;                 // that copy them
    static constexpr int kPixel = kVectors * kWide, kElements = kPixels * kPixel;
    static_assert(TapsOfPixel<K, false>::kParts == 2 && kVectors <= kLanes, "lanes have half a pixel, and a vector");
};

struct Up1MmaPlan {
    int kernel_size;
    int run_bits;  // of a row of a tile
    int rows;      // of a tile
    Tiles tiles;
    int columns_at_once;             // that are copied
    int of_row, of_warp;             // elements of 16 bits beside a slice: of a tile's row, and of a warp
    uint64_t first_vector, vectors;  // of 16 bytes, in the memory of masks or logits

    // Tiles are those of the result.
    Up1MmaPlan(const Problem& p, const Array& result, const Array& sliced, int most_rows, int elements_of_row,
               bool vectors_of_channels)
        : kernel_size(static_cast<int>(p.kernel_size)),
          run_bits(result.w <= kRun       ? 0
                   : result.w <= 2 * kRun ? 1
                                          : 2),
          rows(even_part(result.h, rows_that_fit(most_rows, elements_of_row, vectors_of_channels))),
          tiles(p, result.h, result.w, rows, kRun << run_bits, kOfSlice, 0),
          columns_at_once(columns_of(p, sliced)) {
        const Array& taps = p.from_logits ? p.logits : p.masks;
        int64_t first = 0, last = 0;
        for (int64_t extent : {(taps.n - 1) * taps.stride_n, (taps.c - 1) * taps.stride_c, (taps.h - 1) * taps.stride_h,
                               (taps.w - 1) * taps.stride_w})
            (extent < 0 ? first : last) += extent;
        const uint64_t data = reinterpret_cast<uintptr_t>(taps.data);
        first_vector = (data + static_cast<uint64_t>(2 * first) + 15) / 16;
        vectors = std::max((data + static_cast<uint64_t>(2 * last + 2)) / 16, first_vector) - first_vector;
    }

    CARAFEPP_HOST_DEVICE int runs() const { return 1 << run_bits; }
    CARAFEPP_HOST_DEVICE int halo_rows() const { return rows + kernel_size - 1; }
    CARAFEPP_HOST_DEVICE int slice() const { return halo_rows() * kRowOfSlice; }
    int64_t bytes() const { return (slice() + rows * of_row + kWarpsOfUp1 * of_warp) * int64_t{sizeof(uint16_t)}; }

    static int columns_of(const Problem& p, const Array& sliced) {
        for (int columns : {4, 2}) {
            if (p.offset_w % columns == 0 && not_for_columns(sliced, columns) == nullptr) return columns;
        }
        return 1;
    }

private:
    int rows_that_fit(int most, int elements_of_row, bool vectors_of_channels) {
        of_row = elements_of_row;
        of_warp = !vectors_of_channels ? 0 : kernel_size == 5 ? TapsOfWarp<5>::kElements : TapsOfWarp<7>::kElements;
        const int64_t most_bytes = std::min<int64_t>(most_shared_bytes(), kMostBytesOfUp1);
        for (rows = most; rows > 1 && bytes() > most_bytes;) rows--;
        return rows;
    }
};

// Stages 16 channels of `rows` rows from (top, left) on, of which `channels` exist; 0 elsewhere. Rows have
// `runs` runs. They arrive as copies of this thread do.
template <bool Vectors, class T>
__device__ __forceinline__ void copy_slice(const Up1MmaPlan& plan, const Array& array, int64_t n, int64_t c,
                                           int channels, int top, int left, int rows, int runs, T* slice) {
    const int thread = thread_computed_late(), lane = thread % 32, warp = thread / 32;
    const int height = static_cast<int>(array.h), width = static_cast<int>(array.w);
    if constexpr (Vectors) {
        const int half = lane % 2, first = lane / 2, stride_w = static_cast<int>(array.stride_w);
        const int columns = runs * kRun;
#pragma unroll 1
        for (int row = warp; row < rows; row += kWarpsOfUp1) {
            const int i = top + row;
            const bool exists = i >= 0 && i < height && half * kWide < channels;
            const T* const from = element<const T>(array, n, c + half * kWide, exists ? i : 0, 0);
            T* const to = slice + row * kRowOfSlice;
#pragma unroll 3
            for (int column = first; column < columns; column += 16) {
                const bool has = exists && static_cast<unsigned>(left + column) < static_cast<unsigned>(width);
                copy_async<kWide * sizeof(T)>(to + column * kOfSlice + (half ^ column / 4 % 2) * kWide,
                                              at_stride(from, stride_w, has ? left + column : 0), has);
            }
        }
    } else {
        const int quads = runs * (kRun / kQuad), at_once = 32 / quads;
        const int number = lane / quads, column = lane % quads * kQuad, j = left + column;
        if (number >= at_once) return;
#pragma unroll 1
        for (int item = warp * at_once + number; item < rows * kOfSlice; item += kWarpsOfUp1 * at_once) {
            const int channel = item % kOfSlice, i = top + item / kOfSlice;
            const bool exists = i >= 0 && i < height && channel < channels;
            const T* const from = element<const T>(array, n, c + (exists ? channel : 0), exists ? i : 0, 0);
            T* const to = slice + item * kPitch + column;
            with_columns(plan.columns_at_once, [&](auto at_once) __attribute__((always_inline)) {
                constexpr int kColumns = decltype(at_once)::value;
#pragma unroll
                for (int k = 0; k < kQuad; k += kColumns) {
                    const bool has = exists && j + k >= 0 && j + k < width;
                    const T* const own = from + (has ? j + k : 0);
                    if constexpr (kColumns == 1) {
                        to[k].bits = has ? load_input(own).bits : 0;
                    } else {
                        copy_async<kColumns * sizeof(T)>(to + k, own, has);
                    }
                }
            });
        }
    }
}

// Loads the taps of this thread's pixel and normalises them if they are logits. `first` points to tap (0, 0) of a pixel
// that exists. A tap that does not exist is -INFINITY, and in a pixel that does not exist anything. All lanes of a warp
// call it, with memory of the warp.
template <int K, bool Vectors, class T>
__device__ __forceinline__ void load_taps(const Problem& p, const Up1MmaPlan& plan, const TapsOfPixel<K, false>& own,
                                          const T* first, bool exists, T* of_warp,
                                          typename TapsOfPixel<K, false>::Taps& taps) {
    if constexpr (Vectors) {
        using Copies = TapsOfWarp<K>;
        constexpr unsigned kBytes = K * K * sizeof(T);
        const uint64_t address = reinterpret_cast<uintptr_t>(first);
        // A bit that no address has: all vectors of the pixel are in the array.
        const bool inside = address / 16 - plan.first_vector < plan.vectors &&
                            (address + kBytes - 1) / 16 - plan.first_vector < plan.vectors;
        const uint64_t own_pixel = exists ? address + inside : 0;
        const int lane = thread_computed_late() % 32, number = lane % Copies::kLanes;
        __syncwarp();  // what was there has been read
#pragma unroll
        for (int before = 0; before < Copies::kPixels; before += 32 / Copies::kLanes) {
            const int pixel = before + lane / Copies::kLanes;
            const uint64_t of_pixel = __shfl_sync(0xffffffffu, own_pixel, pixel);
            const unsigned skipped = static_cast<unsigned>(of_pixel) & 14;
            if (of_pixel == 0 || static_cast<unsigned>(number) * 16 >= skipped + kBytes) continue;
            T* const to = of_warp + pixel * Copies::kPixel + number * kWide;
            const T* const vector = reinterpret_cast<const T*>(of_pixel & ~uint64_t{15}) + number * kWide;
            if (of_pixel % 2 != 0) {
                copy_async<16>(to, vector, true);
            } else {
#pragma unroll 1
                for (int k = 0; k < kWide; k++) {
                    const unsigned tap = static_cast<unsigned>(number * kWide + k) * sizeof(T) - skipped;
                    if (tap < kBytes) to[k] = load_input(vector + k);
                }
            }
        }
        wait_for_copies();
        __syncwarp();
        const T* const from = of_warp + lane % Copies::kPixels * Copies::kPixel + address % 16 / sizeof(T) +
                              own.first_row * K;
        own.each_tap([&](int k, int, int, bool has) { taps[k] = has ? widen(from[k]) : -INFINITY; });
    } else {
        own.each_in_memory(first, (p.from_logits ? p.logits : p.masks).stride_c,
                           [&](const T* tap, int k, bool has) __attribute__((always_inline)) {
            taps[k] = exists && has ? widen(load_input(tap)) : -INFINITY;
        });
    }
    if (p.from_logits) own.normalize(p.normalizer, taps);
}

// Turns eight elements around by `count` places, towards higher ones.
__device__ __forceinline__ uint4 turned(const uint32_t (&words)[4], int count) {
    const bool odd = count % 2 != 0, one = count / 2 % 2 != 0, two = count / 4 % 2 != 0;
    uint32_t by_one[4], by_two[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
#if defined(__CUDA_ARCH__)
        by_one[k] = __byte_perm(words[(k + 3) % 4], words[k], odd ? 0x5432 : 0x7654);
#else
        by_one[k] = odd ? words[(k + 3) % 4] >> 16 | words[k] << 16 : words[k];
#endif
    }
#pragma unroll
    for (int k = 0; k < 4; k++) by_two[k] = one ? by_one[(k + 3) % 4] : by_one[k];
    return two ? make_uint4(by_two[2], by_two[3], by_two[0], by_two[1])
               : make_uint4(by_two[0], by_two[1], by_two[2], by_two[3]);
}

// Why these kernels do not take a problem.
inline const char* not_for_up1_mma(const Problem& p) {
    if (const char* reason = not_of_16_bits(p)) return reason;
    if (const char* reason = not_for_up1(p)) return reason;
    if (p.kernel_size == 3) return "kernel_size is not 5 or 7";
    if (p.features.c / p.groups > kMostChannels) return "channels of a group are many";
    return nullptr;
}

// The same for masks, logits or their gradient.
inline const char* not_for_taps_of_mma(const Problem& p, const Array& array, bool adjacent) {
    if (array.dtype != p.features.dtype) return "masks are of 32 bits";
    return not_for_taps(array, adjacent);
}

// The same for an array that is staged or stored.
inline const char* not_for_pixels_of_mma(const Problem& p, const Array& array, bool vectors) {
    if (!vectors) return array.stride_w != 1 ? "columns are not adjacent" : nullptr;
    if (const char* reason = not_for_vectors(p, array, kWide)) return reason;
    return not_for_slice(array);
}

// Calls f(K, T()) for the kernel size and dtype of a problem.
template <class F>
void with_kernel_of_up1_mma(const Problem& p, F f) {
    const auto with_size = [&](auto type) {
        if (p.kernel_size == 5) return f(std::integral_constant<int, 5>(), type);
        return f(std::integral_constant<int, 7>(), type);
    };
    if (p.features.dtype == CARAFEPP_FLOAT16) return with_size(Float16());
    return with_size(BFloat16());
}

}  // namespace carafepp::cuda
