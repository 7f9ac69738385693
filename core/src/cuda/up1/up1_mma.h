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

// Taps of the pixels that a warp has at once, where they are adjacent in memory: a copy of the vectors that have them.
template <int K>
struct TapsOfWarp {
    static constexpr int kVectors = (K * K + 2 * (kWide - 1)) / kWide;  // of a pixel
    static constexpr int kLanes = kVectors > 4 ? 8 : 4;                 // that copy them
    static constexpr int kPixel = kVectors * kWide, kElements = 32 * kPixel;
    static_assert(kVectors <= kLanes, "a lane has a vector");
};

struct Up1MmaPlan {
    int kernel_size;
    int run_bits;  // of a row of a tile
    int rows;      // of a tile
    Tiles tiles;
    int columns_at_once;  // that are copied
    // Elements of 16 bits in shared memory: of a tile's row beside a slice, of results on their way, and of taps in the
    // place of the slice.
    int of_row, of_results, taps;
    uint64_t first_vector, vectors;  // of 16 bytes, in the memory of masks or logits

    // Tiles are those of the result.
    Up1MmaPlan(const Problem& p, const Array& result, const Array& sliced, int most_rows, int elements_of_row,
               bool stages_taps)
        : kernel_size(static_cast<int>(p.kernel_size)),
          run_bits(result.w <= kRun       ? 0
                   : result.w <= 2 * kRun ? 1
                                          : 2),
          rows(even_part(result.h, rows_that_fit(most_rows, elements_of_row, stages_taps))),
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
    int64_t bytes() const { return (rows * of_row + of_results + std::max(slice(), taps)) * int64_t{sizeof(uint16_t)}; }

    static int columns_of(const Problem& p, const Array& sliced) {
        for (int columns : {4, 2}) {
            if (p.offset_w % columns == 0 && not_for_columns(sliced, columns) == nullptr) return columns;
        }
        return 1;
    }

private:
    int rows_that_fit(int most, int elements_of_row, bool stages_taps) {
        of_row = elements_of_row;
        of_results = stages_taps ? kThreads * kQuad : 0;
        taps = !stages_taps       ? 0
               : kernel_size == 5 ? kWarpsOfUp1 * TapsOfWarp<5>::kElements
                                  : kWarpsOfUp1 * TapsOfWarp<7>::kElements;
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
        // A thread has a quad of a channel, in some rows.
        const int lanes = runs * kRun > 8 * kQuad ? 16 : 8, line = thread / lanes, step = kThreads / kOfSlice / lanes;
        const int channel = line % kOfSlice, first = line / kOfSlice, column = thread % lanes * kQuad,
                  j = left + column;
        if (column >= runs * kRun) return;
        const T* from = element<const T>(array, n, c + channel, top + first, j);
        T* to = slice + line * kPitch + column;
        with_columns(plan.columns_at_once, [&](auto at_once) __attribute__((always_inline)) {
            constexpr int kColumns = decltype(at_once)::value;
#pragma unroll 2
            for (int row = first; row < rows; row += step, from += step * array.stride_h, to += step * kRowOfSlice) {
                const bool exists = channel < channels &&
                                    static_cast<unsigned>(top + row) < static_cast<unsigned>(height);
#pragma unroll
                for (int k = 0; k < kQuad; k += kColumns) {
                    const bool has = exists && static_cast<unsigned>(j + k) < static_cast<unsigned>(width);
                    if constexpr (kColumns == 1) {
                        to[k].bits = has ? load_input(from + k).bits : 0;
                    } else {
                        copy_async<kColumns * sizeof(T)>(to + k, from + k, has);
                    }
                }
            }
        });
    }
}

// The larger elements of two pairs; of NaN and a number the number.
template <class T>
__device__ __forceinline__ uint32_t larger_pair(uint32_t a, uint32_t b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    uint32_t larger;
    if constexpr (std::is_same_v<T, Float16>) {
        asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    } else {
        asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    }
    return larger;
#else
    const float2 x = widen_pair<T>(a), y = widen_pair<T>(b);
    return pair_of<T>(fmaxf(x.x, y.x), fmaxf(x.y, y.y));
#endif
}

// A word or, if `odd`, its last element and the first one of the word behind it.
__device__ __forceinline__ uint32_t pair_at(uint32_t word, uint32_t behind, bool odd) {
#if defined(__CUDA_ARCH__)
    return __byte_perm(word, behind, odd ? 0x5432 : 0x3210);
#else
    return odd ? word >> 16 | behind << 16 : word;
#endif
}

// Loads the taps of this thread's pixel, at a place in memory, and returns the largest. In a pixel that does not exist
// they are anything. All lanes of a warp call it, with memory of the warp.
template <int K, bool Adjacent, class T>
__device__ __forceinline__ float load_taps(const Up1MmaPlan& plan, const TapsInMemory<const T>& memory, int place,
                                           T* of_warp, TapsOfPixel<K>& own) {
    if (place == memory.kNoPixel) place = 0;  // that of a pixel that exists
    if constexpr (Adjacent) {
        using Copies = TapsOfWarp<K>;
        constexpr unsigned kBytes = K * K * sizeof(T);
        const uint64_t address = reinterpret_cast<uintptr_t>(memory.at(place));
        const bool inside = address / 16 - plan.first_vector < plan.vectors &&
                            (address + kBytes - 1) / 16 - plan.first_vector < plan.vectors;
        const int lane = thread_computed_late() % 32;
        __syncwarp();  // what was there has been read
        if (!__any_sync(0xffffffffu, !inside)) {
            const int number = lane % Copies::kLanes;
#pragma unroll
            for (int before = 0; before < 32; before += 32 / Copies::kLanes) {
                const int pixel = before + lane / Copies::kLanes;
                const T* const first = memory.at(__shfl_sync(0xffffffffu, place, pixel));
                const unsigned skipped = static_cast<unsigned>(reinterpret_cast<uintptr_t>(first)) % 16 / sizeof(T);
                if (static_cast<unsigned>(number) * kWide < skipped + K * K)
                    copy_async<16>(of_warp + pixel * Copies::kPixel + number * kWide, first - skipped + number * kWide,
                                   true);
            }
        } else {
            memory.template each_of_warp<K, true>(place, [&](const T* tap, int pixel, int t) {
                const auto skipped = reinterpret_cast<uintptr_t>(tap - t) % 16 / sizeof(T);
                of_warp[pixel * Copies::kPixel + skipped + t] = load_input(tap);
            });
        }
        wait_for_copies();
        __syncwarp();
        // Two words are loaded at once, as pixels are apart by few banks. Two taps are a word, or halves of two words.
        // The last tap is alone.
        constexpr int kWords = K * K / 2 + 1;
        static_assert(kWords % 2 == 1, "a word more is loaded");
        const unsigned skipped = static_cast<unsigned>(address) % 16 / sizeof(T);
        const uint2* const from = reinterpret_cast<const uint2*>(of_warp + lane * Copies::kPixel) + skipped / 4;
        uint32_t words[kWords + 1], largest[2];
#pragma unroll
        for (int k = 0; k <= kWords; k += 2) {
            const uint2 two = from[k / 2];
            words[k] = two.x, words[k + 1] = two.y;
        }
#pragma unroll
        for (int k = 0; k < kWords; k++) words[k] = skipped / 2 % 2 != 0 ? words[k + 1] : words[k];
#pragma unroll
        for (int k = 0; k < kWords; k++) {
            const bool last = k + 1 == kWords;
            const uint32_t pair = pair_at(words[k], words[last ? k : k + 1], skipped % 2 != 0),
                           own_taps = last ? (pair & 0xffff) * 0x10001 : pair;
            largest[k % 2] = k < 2 ? own_taps : larger_pair<T>(own_taps, largest[k % 2]);
            const float2 taps = widen_pair<T>(pair);
            own.taps[2 * k] = taps.x;
            if (!last) own.taps[2 * k + (last ? 0 : 1)] = taps.y;
        }
        const float2 both = widen_pair<T>(larger_pair<T>(largest[0], largest[1]));
        return fmaxf(both.x, both.y);
    } else {
        memory.template each<K>(
            place, [&](const T* tap, int t) __attribute__((always_inline)) { own.taps[t] = widen(load_input(tap)); });
        return own.largest();
    }
}

// Turns eight elements around by `count` places, towards higher ones: words by one place more, and elements back.
__device__ __forceinline__ uint4 turned(const uint32_t (&words)[4], int count) {
    const bool one = (count + 1) / 2 % 2 != 0, two = (count + 1) / 4 % 2 != 0;
    uint32_t back[4], by_one[4];
#pragma unroll
    for (int k = 0; k < 4; k++) back[k] = pair_at(words[k], words[(k + 1) % 4], count % 2 != 0);
#pragma unroll
    for (int k = 0; k < 4; k++) by_one[k] = one ? back[(k + 3) % 4] : back[k];
    return two ? make_uint4(by_one[2], by_one[3], by_one[0], by_one[1])
               : make_uint4(by_one[0], by_one[1], by_one[2], by_one[3]);
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
