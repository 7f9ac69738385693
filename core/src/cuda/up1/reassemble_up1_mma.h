// SPDX-License-Identifier: Apache-2.0
// The forward for up = down = 1 on tensor cores and, transposed, the gradient of features. The pixels of 16 sources, or
// outputs, are multiplied by bands of masks. In a row of taps the taps of a run's eight pixels begin one pixel further
// each. So those in the first eight of 16 pixels and those in the last have different places modulo eight. Bands
// have them in one matrix of 8 x 8, which a lane takes apart.
#pragma once

#include "cuda/up1/up1_mma.h"

namespace carafepp::cuda {

template <bool Transposed>
constexpr int kRunsOfBands = kMostRuns + (Transposed ? 1 : 0);
template <bool Transposed>
constexpr int kRowOfTaps = kRunsOfBands<Transposed> * kRun * kRun;  // elements of bands

// Bands have multiples of masks, which as 16 bits lose few bits. Outputs of the forward are finished by a factor of
// each pixel. Transposed, masks of many pixels meet in a source, and all have one factor.
constexpr int kFactors = kMostRuns * kRun * 2;  // of a tile's row; floats are two elements
template <class T>
constexpr int kExponent = std::is_same_v<T, Float16> ? 15 : 0;

template <bool Transposed>
struct ReassembleUp1MmaPlan : Up1MmaPlan {
    bool whole_result;  // two columns are stored at once

    ReassembleUp1MmaPlan(const Problem& p, const Array& result, bool vectors)
        : Up1MmaPlan(p, result, Transposed ? p.grad_output : p.features, Transposed ? 14 : 8,
                     static_cast<int>(p.kernel_size) * kRowOfTaps<Transposed> + (Transposed ? 0 : kFactors), vectors),
          whole_result(not_for_columns(result) == nullptr) {}
};

// A sum in one channel without tensor cores: of output (y, x) or, transposed, of source (y, x). A zero of a band
// makes NaN of an infinite pixel; here no zero is multiplied.
template <bool Transposed, class T>
__device__ float up1_tap_by_tap(const Problem& p, const TileOfItem& tile, int64_t c, int64_t y, int64_t x) {
    const int64_t k = p.kernel_size, radius = p.radius();
    float sum = 0;
#pragma unroll 1
    for (int64_t t = 0; t < k * k; t++) {
        const int64_t i = Transposed ? y - p.offset_h + radius - t / k : y + p.offset_h - radius + t / k,
                      j = Transposed ? x - p.offset_w + radius - t % k : x + p.offset_w - radius + t % k;
        const Array& array = Transposed ? p.grad_output : p.features;
        if (i < 0 || i >= array.h || j < 0 || j >= array.w) continue;
        sum += mask_of<T>(p, tile.n, tile.group, t, Transposed ? Pixel{i, j} : Pixel{y, x}) *
               widen(*element<const T>(array, tile.n, c, i, j));
    }
    return sum;
}

// Stages masks as bands[row of the result][row of taps][run of outputs]: those of the tile's outputs or, transposed,
// those of all outputs around its sources. Runs of these begin four columns before those of the tile.
template <int K, bool Vectors, bool Transposed, class T>
__device__ __forceinline__ void stage_bands(const Problem& p, const ReassembleUp1MmaPlan<Transposed>& plan,
                                            const TileOfItem& tile, T* bands, float* factors, T* of_warp) {
    const int radius = Transposed ? K / 2 : 0, before = Transposed ? kBeforeRun : 0;
    const int top = tile.top - (Transposed ? static_cast<int>(p.offset_h) : 0),
              left = tile.left - (Transposed ? static_cast<int>(p.offset_w) : 0);
    if (Transposed) {
#pragma unroll 4
        for (int k = thread_computed_late(); k < plan.rows * plan.of_row / kWide; k += kThreads)
            reinterpret_cast<uint4*>(bands)[k] = make_uint4(0, 0, 0, 0);
        __syncthreads();
    }
    const Rectangle outputs(max(top - radius, 0), min(top + plan.rows + radius, static_cast<int>(p.out_h)),
                            max(left - radius, 0), min(left + plan.runs() * kRun + radius, static_cast<int>(p.out_w)));
    const TapsInMemory<const T> memory(p, p.from_logits ? p.logits : p.masks, tile, outputs);
    const carafepp_normalizer normalizer = p.from_logits ? p.normalizer : CARAFEPP_NONE;
    for_each_pixel(outputs, [&](int y, int x, bool exists) __attribute__((always_inline)) {
        TapsOfPixel<K> own;
        const float largest = load_taps<K, Vectors>(plan, memory, memory.place(y, x, exists), of_warp, own);
        if (!exists) return;
        const float factor = own.template to_multiples<kExponent<T>>(normalizer, largest);
        const int column = x + outputs.left - left + before;
        const int row = y + outputs.top - top - radius;  // of the result
        if (!Transposed) factors[y * kMostRuns * kRun + x] = factor;
        const float scale = Transposed ? factor * scale_of_masks<T>(p) : 1;
        T* to = bands + row * K * kRowOfTaps<Transposed> + column * kRun;
#pragma unroll
        for (int a = 0; a < K; a++, to += (Transposed ? K + 1 : 1) * kRowOfTaps<Transposed>) {
            if (Transposed && static_cast<unsigned>(row + a) >= static_cast<unsigned>(plan.rows)) continue;
            uint32_t words[4];
#pragma unroll
            for (int q = 0; q < 4; q++) {
                const auto tap = [&](int b) { return b < K ? scale * own.taps[a * K + (b < K ? b : 0)] : 0.0f; };
                words[q] = 2 * q < K ? pair_of<T>(tap(2 * q), tap(2 * q + 1)) : 0;
            }
            *reinterpret_cast<uint4*>(to) = turned(words, column + kShift<K>);
        }
    });
}

// A lane loads this for a run, from bands and from a slice. Four matrices of bands are loaded at once: of four rows of
// taps or, transposed, of two rows for two runs. Beyond the last row of taps the last one is loaded again.
template <int K, bool Vectors, bool Transposed, class T>
struct LaneOfRun {
    static constexpr int kRowsOfLoad = Transposed ? 2 : 4, kLastLoad = (K - 1) / kRowsOfLoad * kRowsOfLoad;

    const T *bands, *slice;
    int beyond;      // elements from the last row of taps on
    uint32_t first;  // of a word's two pixels, those in the first eight of 16: in line r of a band those from r on

    __device__ __forceinline__ LaneOfRun(const T* all_bands, const T* all_pixels, int run) {
        const int lane = thread_computed_late() % 32, matrix = lane / 8, line = lane % 8;
        const int row = Transposed ? matrix / 2 : matrix;
        beyond = max(row - (K - 1 - kLastLoad), 0) * kRowOfTaps<Transposed>;
        bands = all_bands + row * kRowOfTaps<Transposed> + ((run + (Transposed ? matrix % 2 : 0)) * kRun + line) * kRun;
        slice = all_pixels + (Vectors ? ((run + matrix / 2) * kRun + line) * kOfSlice + (matrix % 2 ^ line / 4) * kWide
                                      : (matrix % 2 * kRun + line) * kPitch + (run + matrix / 2) * kRun);
        const int own = lane / 4, pair = lane % 4 * 2;
        const auto bits = [&](int pixel) { return (Transposed ? own >= pixel : pixel >= own) ? 0xffffu : 0u; };
        first = bits(pair) | bits(pair + 1) << 16;
    }

    // Adds the products of a row of the result.
    __device__ __forceinline__ void multiply(int row, float (&sums)[4]) const {
        const T* const own_bands = bands + row * K * kRowOfTaps<Transposed>;
        const T* const pixels = slice + row * kRowOfSlice;
#pragma unroll
        for (int a = 0; a < K; a += kRowsOfLoad) {
            uint32_t words[4];
            load_matrices<Transposed>(own_bands + a * kRowOfTaps<Transposed> - (a == kLastLoad ? beyond : 0), words);
#pragma unroll
            for (int k = 0; k < kRowsOfLoad && a + k < K; k++) {
                uint32_t values[4];
                load_matrices<Vectors>(pixels + (Transposed ? K - 1 - a - k : a + k) * kRowOfSlice, values);
                if constexpr (Transposed) {
                    multiply_add<T>(sums, values, {words[2 * k] & ~first, words[2 * k + 1] & first});
                } else {
                    multiply_add<T>(sums, values, {words[k] & first, words[k] & ~first});
                }
            }
        }
    }
};

template <int K, bool Vectors, bool Transposed, class T>
__global__ void __launch_bounds__(kThreads, K == 7 || Transposed ? 2 : 3)
    reassemble_up1_mma_kernel(Arguments arguments, ReassembleUp1MmaPlan<Transposed> plan) {
    const Problem& p = arguments.problem;
    const Array& result = arguments.result;
    const Array& sliced = Transposed ? p.grad_output : p.features;
    T* const bands = shared_memory<T>();
    float* const factors = reinterpret_cast<float*>(bands + plan.rows * K * kRowOfTaps<Transposed>);
    T* const results = bands + plan.rows * plan.of_row;
    T* const slice = results + plan.of_results;
    const int warp = same_in_warp(thread_computed_late() / 32);
    T* const of_warp = slice + warp * TapsOfWarp<K>::kElements;
    T* const of_run = results + warp * kRun * kOfSlice;
    const int offset_h = static_cast<int>(Transposed ? -p.offset_h : p.offset_h),
              offset_w = static_cast<int>(Transposed ? -p.offset_w : p.offset_w);
    const int run = warp & (plan.runs() - 1), first_row = warp >> plan.run_bits, step = kWarpsOfUp1 >> plan.run_bits;
#pragma unroll 1
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        const int j = tile.left + run * kRun, columns = static_cast<int>(result.w) - j;
        const int end = columns > 0 ? min(plan.rows, static_cast<int>(result.h) - tile.top) : 0;
        float zero = 0;  // while all sums are finite
#pragma unroll 1
        for (int before = 0; before < tile.channels; before += kOfSlice) {
            const int channels = tile.channels - before;
            const auto stage = [&] { stage_bands<K, Vectors, Transposed>(p, plan, tile, bands, factors, of_warp); };
            if (before == 0 && Vectors) {
                stage();
                __syncthreads();  // the slice takes the place of taps in memory
            }
            copy_slice<Vectors>(plan, sliced, tile.n, tile.c + before, channels, tile.top + offset_h - K / 2,
                                tile.left + offset_w - kBeforeRun, plan.halo_rows(), plan.runs() + 1, slice);
            if (before == 0 && !Vectors) stage();
            wait_for_copies();
            __syncthreads();
            const LaneOfRun<K, Vectors, Transposed, T> own(bands, slice, run);
            const int lane = thread_computed_late() % 32, channel = lane / 4, pair = lane % 4 * 2;
            const float scale = scale_of_masks<T>(p);
            // With adjacent channels a lane stores half a pixel, else two pixels in two channels.
            const int half = Vectors ? lane % 2 * kWide : channel, pixel = Vectors ? lane / 2 : pair;
            const int there = pixel < min(columns, kRun) ? channels - half : 0;
            T* to = element<T>(result, tile.n, tile.c + before + half, tile.top + first_row, j + pixel);
#pragma unroll 1
            for (int row = first_row; row < end; row += step, to += step * result.stride_h) {
                float sums[4] = {};
                own.multiply(row, sums);
                float2 factor = make_float2(1 / scale, 1 / scale);
                if (!Transposed)
                    factor = reinterpret_cast<const float2*>(factors + (row * kMostRuns + run) * kRun)[lane % 4];
                // Pixels that do not exist may be anything.
                if (pair < columns) zero += (sums[0] + sums[2]) * 0;
                if (pair + 1 < columns) zero += (sums[1] + sums[3]) * 0;
                if constexpr (Vectors) {
                    __syncwarp();  // what was there has been stored
#pragma unroll
                    for (int k = 0; k < 4; k++)
                        of_run[(pair + k % 2) * kOfSlice + k / 2 * kWide + channel] = narrow<T>(
                            sums[k] * (k % 2 == 0 ? factor.x : factor.y));
                    __syncwarp();
                    if (there > 0) __stcs(reinterpret_cast<uint4*>(to), reinterpret_cast<const uint4*>(of_run)[lane]);
                } else {
                    T* of_channel = to;
#pragma unroll
                    for (int k = 0; k < 2; k++, of_channel += kWide * result.stride_c) {
                        if (k * kWide >= there) continue;
                        const float values[2] = {sums[k * 2] * factor.x, sums[k * 2 + 1] * factor.y};
                        if (plan.whole_result) {
                            store_row<true>(values, 2, 1, of_channel);
                        } else {
                            store_row<false>(values, columns - pair, 1, of_channel);
                        }
                    }
                    __syncwarp();  // lanes diverge in stores
                }
            }
            __syncthreads();
        }
        if (!__any_sync(0xffffffffu, !(zero == 0))) continue;
        // A lane looks at what others of its warp have stored.
#pragma unroll 1
        for (int row = first_row; row < end; row += step) {
#pragma unroll 1
            for (int number = thread_computed_late() % 32; number < kRun * tile.channels; number += 32) {
                const int64_t c = tile.c + number / kRun, y = tile.top + row, x = j + number % kRun;
                if (x >= result.w) continue;
                T* const stored = element<T>(result, tile.n, c, y, x);
                if (!(fabsf(widen(*stored)) < INFINITY))
                    *stored = narrow<T>(up1_tap_by_tap<Transposed, T>(p, tile, c, y, x));
            }
        }
    }
}

template <bool Vectors, bool Transposed>
const char* not_for_reassemble_up1_mma(const Problem& p, const Array& result) {
    if (const char* reason = not_for_up1_mma(p)) return reason;
    if (const char* reason = not_for_taps_of_mma(p, p.from_logits ? p.logits : p.masks, Vectors)) return reason;
    if (const char* reason = not_for_pixels_of_mma(p, Transposed ? p.grad_output : p.features, Vectors)) return reason;
    if (const char* reason = not_for_pixels_of_mma(p, result, Vectors)) return reason;
    const int64_t bytes = ReassembleUp1MmaPlan<Transposed>(p, result, Vectors).bytes();
    if (const char* reason = not_for_shared_memory(bytes)) return reason;
    return not_compiled_for_bfloat16(p, reassemble_up1_mma_kernel<5, Vectors, Transposed, BFloat16>);
}

template <bool Vectors, bool Transposed>
void reassemble_up1_mma(const Problem& p, const Array& result) {
    const ReassembleUp1MmaPlan<Transposed> plan(p, result, Vectors);
    with_kernel_of_up1_mma(p, [&](auto k, auto type) {
        launch(reassemble_up1_mma_kernel<decltype(k)::value, Vectors, Transposed, decltype(type)>, plan.tiles.items,
               kThreads, plan.bytes(), p, result, plan);
    });
}

}  // namespace carafepp::cuda
