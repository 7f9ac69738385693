// SPDX-License-Identifier: Apache-2.0
// Shared by the kernels for up = down = 1, as in an involution: each output has a source of its own. A block has a tile
// of pixels of a group. It goes through the group's channels in slices, which it stages with the halo of the tile. Sums
// and products are those of four pixels of a row, a quad. Few channels may share a mask. So masks are loaded and
// normalised in registers, with few instructions: rows of taps in one or two threads or, where taps are adjacent, a
// column in each of some threads.
#pragma once

#include "cuda/columns.h"
#include "cuda/positions.h"
#include "cuda/tiles.h"
#include "cuda/window.h"

namespace carafepp::cuda {

constexpr int kQuad = 4;                           // pixels
constexpr int kMostQuads = 8, kMostRows = 6;       // of a tile: more threads would have too few registers
constexpr int kMostVectors = 4;                    // of a slice
constexpr int64_t kMostBytesOfFloats = 75 * 1024;  // of a block: a multiprocessor of sm_90 has three
constexpr int kPitch = (kMostQuads + 2) * kQuad;   // from channel to channel of a row of a slice
constexpr int kRow = kVector * kPitch;             // and from row to row
constexpr int kSkew = 8;                           // vectors of a pixel are in different banks
constexpr int kMostChannels = 64;                  // of a group, where kernels for any factor are faster beyond
constexpr int kEnoughTiles = 384;                  // that keep all multiprocessors busy

// Masks are staged as [row of taps][quad][column of taps][pixel], a slice as [vector][row][channel][column]. Its
// columns begin a quad before those of the tile.
struct Up1Plan {
    int kernel_size;
    int quads;                   // of a row of a tile
    int quad_bits, vector_bits;  // of a thread's number
    bool adjacent;               // taps are
    int rows;                    // of a tile
    Tiles tiles;
    bool whole;         // a quad of a slice is a vector in memory, or outside
    bool whole_result;  // and so is one of the result

    // Tiles are those of the result, of `most` rows at most. Items have all channels if `enough` is 0: see Tiles.
    Up1Plan(const Problem& p, const Array& result, const Array& sliced, int most, int enough, bool adjacent_taps)
        : kernel_size(static_cast<int>(p.kernel_size)),
          quads(even_part(ceil_div(result.w, kQuad), kMostQuads)),
          quad_bits(bits(quads)),
          vector_bits(bits(std::clamp<int64_t>(ceil_div(p.features.c / p.groups, kVector), 1, kMostVectors))),
          adjacent(adjacent_taps),
          rows(even_part(result.h, rows_that_fit(most))),
          tiles(p, result.h, result.w, rows, quads * kQuad, kVector << vector_bits, enough),
          whole(p.offset_w == 0 && not_for_columns(sliced, kQuad) == nullptr),
          whole_result(not_for_columns(result, kQuad) == nullptr) {}

    CARAFEPP_HOST_DEVICE int vectors() const { return 1 << vector_bits; }
    CARAFEPP_HOST_DEVICE int halo_rows() const { return rows + kernel_size - 1; }
    CARAFEPP_HOST_DEVICE int masks() const { return kernel_size * apart(); }                           // floats
    CARAFEPP_HOST_DEVICE int apart() const { return kernel_size * rows * quads * kQuad; }              // rows of taps
    CARAFEPP_HOST_DEVICE int vector(int rows_of_slice) const { return rows_of_slice * kRow + kSkew; }  // floats
    CARAFEPP_HOST_DEVICE int slice(int rows_of_slice) const { return vector(rows_of_slice) << vector_bits; }

    // The place of tap (0, 0) of a pixel of the tile.
    template <int K>
    __device__ __forceinline__ int place(int row, unsigned column) const {
        return static_cast<int>((row * quads + column / kQuad) * (K * kQuad) + column % kQuad);
    }

    // Adjacent taps of the pixels that a block has at once are in the place of the slice.
    int64_t bytes() const {
        const int taps = adjacent ? threads(vectors()) * kernel_size * kernel_size : 0;
        return (masks() + std::max(slice(halo_rows()), taps)) * int64_t{sizeof(float)};
    }
    // If so many share a quad.
    int threads(int of_quad) const { return static_cast<int>(ceil_div((rows * of_quad) << quad_bits, 32)) * 32; }

private:
    static int bits(int64_t number) { return number > 4 ? 3 : number > 2 ? 2 : number > 1 ? 1 : 0; }

    int rows_that_fit(int most) {
        for (rows = most; rows > 1 && bytes() > std::min<int64_t>(most_shared_bytes(), kMostBytesOfFloats);) rows--;
        return rows;
    }
};

// The taps of a pixel, in the registers of a thread.
template <int K>
struct TapsOfPixel {
    float taps[K * K];

    template <class F>
    __device__ __forceinline__ void each(F f) {
#pragma unroll
        for (int t = 0; t < K * K; t++) f(taps[t], t);
    }
    // taps[t] = f(taps[t], t) for what is rare: in a loop, in which taps take turns with the first register.
    template <class F>
    __device__ __forceinline__ void map(F f) {
#pragma unroll 1
        for (int t = 0; t < K * K; t++) {
            const float value = f(taps[0], t);
#pragma unroll
            for (int next = 1; next < K * K; next++) taps[next - 1] = taps[next];
            taps[K * K - 1] = value;
        }
    }

    __device__ __forceinline__ float largest() {
        float of[4] = {-INFINITY, -INFINITY, -INFINITY, -INFINITY};          // so that few wait for each other
        each([&](float tap, int t) { of[t % 4] = fmaxf(tap, of[t % 4]); });  // of NaN and a number the number
        return fmaxf(fmaxf(of[0], of[1]), fmaxf(of[2], of[3]));
    }

    // Turns logits, of which the largest is known, into multiples of masks. The largest of a softmax becomes
    // 2^Exponent. Returns what a multiple times is the mask.
    template <int Exponent = 0>
    __device__ __forceinline__ float to_multiples(carafepp_normalizer normalizer, float largest) {
        constexpr float kScale = 1 << Exponent;
        if (normalizer == CARAFEPP_NONE) return 1;
        if (normalizer != CARAFEPP_SOFTMAX) {
            map([&](float tap, int) {
                return normalizer == CARAFEPP_SIGMOID ? kScale * sigmoid(tap) : log_sigmoid(tap);
            });
            if (normalizer == CARAFEPP_SIGMOID) return 1 / kScale;
            largest = log_sigmoid(largest);
        }
        // The rounding of `shift` is common to all taps. It is small, unless logits are huge.
        if (!(fabsf(largest) < 0x1p10f)) {
            map([&](float tap, int) { return tap - largest; });
            largest = 0;
        }
        const float shift = Exponent - largest * kLog2OfE;
        float sums[2] = {};
        each([&](float& tap, int t) {
            tap = power_of_2(fmaf(tap, kLog2OfE, shift));
            sums[t % 2] += tap;
        });
        return reciprocal(sums[0] + sums[1]);
    }
};

// Some rows and columns of an array.
struct Rectangle {
    int top, left, rows, columns;

    __device__ __forceinline__ Rectangle(int from_row, int to_row, int from_column, int to_column)
        : top(from_row), left(from_column), rows(to_row - from_row), columns(to_column - from_column) {}
};

// Calls f(row, column, exists) for the pixels of a thread, counted in the rectangle. All lanes of a warp call it
// equally often.
template <class F>
__device__ __forceinline__ void for_each_pixel(const Rectangle& pixels, F f) {
    if (pixels.rows <= 0 || pixels.columns <= 0) return;
    const int threads = static_cast<int>(blockDim.x);
    int row = 0, column = thread_computed_late();
#pragma unroll 1
    for (int before = 0; before < pixels.rows * pixels.columns; before += threads) {
#pragma unroll 1
        while (column >= pixels.columns) column -= pixels.columns, row++;
        if (__any_sync(0xffffffffu, row < pixels.rows)) f(row, column, row < pixels.rows);
        column += threads;
    }
}

// The taps of the pixels of a rectangle, in an array of the shape of masks.
template <class M>
struct TapsInMemory {
    static constexpr int kNoPixel = INT32_MIN;

    M* corner;
    int stride_h, stride_w, stride_c;

    __device__ __forceinline__ TapsInMemory(const Problem& p, const Array& array, const TileOfItem& tile,
                                            const Rectangle& pixels)
        : corner(element<M>(array, tile.n, tile.group * p.taps(), pixels.top, pixels.left)),
          stride_h(static_cast<int>(array.stride_h)),
          stride_w(static_cast<int>(array.stride_w)),
          stride_c(static_cast<int>(array.stride_c)) {}

    // The place of the first tap of a pixel, from the corner on.
    __device__ __forceinline__ int place(int row, int column, bool exists) const {
        return exists ? row * stride_h + column * stride_w : kNoPixel;
    }
    __device__ __forceinline__ M* at(int place) const { return at_stride(corner, place, 1); }

    // Calls f(pointer, tap) for the taps of the pixel there.
    template <int K, class F>
    __device__ __forceinline__ void each(int place, F f) const {
        M* row = at(place);
#pragma unroll
        for (int a = 0; a < K; a++, row = at_stride(row, stride_c, K)) {
#pragma unroll
            for (int b = 0; b < K; b++) f(at_stride(row, stride_c, b), a * K + b);
        }
    }
    // The same for the pixels of the lanes of a warp, whose taps are adjacent: calls f(pointer, lane, tap). `All` of
    // the pixels exist, or some. All lanes call it.
    template <int K, bool All, class F>
    __device__ __forceinline__ void each_of_warp(int place, F f) const {
        constexpr int kTaps = K * K, kAtOnce = kTaps < 32 ? 32 / kTaps : 1;  // pixels
        const int lane = thread_computed_late() % 32, own = lane / kTaps, tap = lane % kTaps;
#pragma unroll 2
        for (int before = 0; before < 32; before += kAtOnce) {
            const int pixel = before + own, of_pixel = __shfl_sync(0xffffffffu, place, pixel);
            if (!All && of_pixel == kNoPixel) continue;
            if (kTaps < 32 && (own >= kAtOnce || pixel >= 32)) continue;
            M* const of_lane = at(of_pixel + tap);
#pragma unroll
            for (int t = 0; t < kTaps; t += 32) {
                if (t + 32 <= kTaps || tap + t < kTaps) f(of_lane + t, pixel, tap + t);
            }
        }
    }
};

// Loads the taps of this thread's pixel, at a place in memory. In one that does not exist they are anything. All
// lanes of a warp call it. With adjacent taps it has memory of the warp, for all taps of 32 pixels.
template <int K, bool Adjacent>
__device__ __forceinline__ void load_taps(const TapsInMemory<const float>& memory, int place, float* of_warp,
                                          TapsOfPixel<K>& own) {
    if (place == memory.kNoPixel) place = 0;  // that of a pixel that exists
    if constexpr (Adjacent) {
        __syncwarp();  // what was there has been read
        memory.each_of_warp<K, true>(place, [&](const float* tap, int lane, int t) __attribute__((always_inline)) {
            copy_async<sizeof(float)>(of_warp + lane * K * K + t, tap, true);
        });
        wait_for_copies();
        __syncwarp();
        const float* const from = of_warp + thread_computed_late() % 32 * K * K;
        own.each([&](float& tap, int t) { tap = from[t]; });
    } else {
        memory.each<K>(place != memory.kNoPixel ? place : 0,
                       [&](const float* tap, int t) __attribute__((always_inline)) { own.taps[t] = load_input(tap); });
    }
}

// Stores them likewise.
template <int K, bool Adjacent, class T>
__device__ __forceinline__ void store_taps(const TapsInMemory<T>& memory, int place, T* of_warp, TapsOfPixel<K>& own) {
    if constexpr (Adjacent) {
        __syncwarp();  // what was there has been read
        T* const to = of_warp + thread_computed_late() % 32 * K * K;
        own.each([&](float tap, int t) { to[t] = narrow<T>(tap); });
        __syncwarp();
        memory.template each_of_warp<K, false>(
            place, [&](T* tap, int lane, int t) __attribute__((always_inline)) { *tap = of_warp[lane * K * K + t]; });
    } else if (place != memory.kNoPixel) {
        memory.template each<K>(place,
                                [&](T* tap, int t) __attribute__((always_inline)) { *tap = narrow<T>(own.taps[t]); });
    }
}

// Four columns of a row, of which those in [begin, end) exist; others are 0. If they are `whole`, all exist or none.
__device__ __forceinline__ float4 load_quad(const float* from, int64_t stride_w, bool whole, int begin, int end) {
    if (whole) return load_channels(from, begin <= 0 && end > 0);
    const auto load = [&](int k) { return k >= begin && k < end ? load_input(from + k * stride_w) : 0.0f; };
    return make_float4(load(0), load(1), load(2), load(3));
}

// Stages a slice of `channels` channels, from c on: `rows` rows, from (top, left) on; 0 where nothing exists.
// `InFlight` vectors are on their way at once.
template <bool Vectors, int InFlight>
__device__ __forceinline__ void stage_slice(const Up1Plan& plan, const Array& array, int64_t n, int64_t c, int channels,
                                            int top, int left, int rows, float* slice) {
    const int thread = thread_computed_late(), threads = static_cast<int>(blockDim.x);
    const int quads = plan.quads + 2, height = static_cast<int>(array.h), width = static_cast<int>(array.w);
    const int apart = plan.vector(rows);
    if constexpr (Vectors) {
        const int stride_w = static_cast<int>(array.stride_w);
        const int vector = thread & (plan.vectors() - 1), pixels = 32 >> plan.vector_bits;  // at once
        const int first = thread % 32 >> plan.vector_bits, there = channels - vector * kVector;
#pragma unroll 1
        for (int row = thread / 32; row < rows; row += threads / 32) {
            const int i = top + row;
            const bool exists = i >= 0 && i < height && there > 0;
            const float* const from = static_cast<const float*>(array.data) +
                                      (exists ? n * array.stride_n + c + vector * kVector + i * array.stride_h : 0);
            float* const to = slice + vector * apart + row * kRow;
#pragma unroll 1
            for (int column = first; column < quads * kQuad; column += InFlight * pixels) {
                float4 values[InFlight];
#pragma unroll
                for (int load = 0; load < InFlight; load++) {
                    const int j = left + column + load * pixels;
                    values[load] = load_channels(at_stride(from, stride_w, j),
                                                 exists && static_cast<unsigned>(j) < static_cast<unsigned>(width));
                }
#pragma unroll
                for (int load = 0; load < InFlight; load++) {
                    if (column + load * pixels >= quads * kQuad) continue;
                    float* const at = to + column + load * pixels;
                    at[0] = values[load].x, at[kPitch] = values[load].y;
                    at[2 * kPitch] = values[load].z, at[3 * kPitch] = values[load].w;
                }
            }
        }
    } else {
#pragma unroll 1
        for (int slot = thread; slot < rows * quads; slot += threads) {
            const int row = slot / quads, column = slot % quads * kQuad, i = top + row, j = left + column;
            const bool exists = i >= 0 && i < height;
            const float* from = static_cast<const float*>(array.data) + n * array.stride_n + c * array.stride_c +
                                i * array.stride_h + j * array.stride_w;
            float* const to = slice + row * kRow + column;
            constexpr int kChannels = InFlight < kVector ? InFlight : kVector;  // at once
#pragma unroll 1
            for (int channel = 0; channel < plan.vectors() * kVector; channel += kChannels) {
                float4 values[kChannels];
#pragma unroll
                for (int q = 0; q < kChannels; q++, from += array.stride_c) {
                    const int end = exists && channel + q < channels ? width - j : 0;
                    values[q] = load_quad(from, array.stride_w, plan.whole, -j, end);
                }
                float* const of_channel = to + channel / kVector * apart + channel % kVector * kPitch;
#pragma unroll
                for (int q = 0; q < kChannels; q++) *reinterpret_cast<float4*>(of_channel + q * kPitch) = values[q];
            }
        }
    }
}

// A quad of floats in shared memory.
__device__ __forceinline__ void load_staged(const float* from, float (&to)[kQuad]) {
    const float4 values = *reinterpret_cast<const float4*>(from);
    to[0] = values.x, to[1] = values.y, to[2] = values.z, to[3] = values.w;
}

// A row of a slice around a quad: it, and the quads before and behind.
struct RowAround {
    float columns[3][kQuad];

    __device__ __forceinline__ explicit RowAround(const float* before) {
#pragma unroll
        for (int k = 0; k < 3; k++) load_staged(before + k * kQuad, columns[k]);
    }
    // The element that column b of the window of pixel q reads.
    template <int K>
    __device__ __forceinline__ float at(int q, int b) const {
        const int column = kQuad + q + b - K / 2;
        return columns[column / kQuad][column % kQuad];
    }
};

// Why kernels for up = down = 1 do not take a problem.
inline const char* not_for_up1(const Problem& p) {
    if (p.factor.up != 1 || p.factor.down != 1) return "up and down are not 1";
    if (p.kernel_size != 3 && p.kernel_size != 5 && p.kernel_size != 7) return "kernel_size is not 3, 5 or 7";
    if (const char* reason = not_for_tiles(p)) return reason;
    if (p.features.c > INT32_MAX / 2) return "channels are too many";
    return nullptr;
}
// The same for kernels without tensor cores, which have 16 bits.
inline const char* not_for_up1_of_floats(const Problem& p) {
    return p.features.dtype != CARAFEPP_FLOAT32 ? "features are not float32" : not_for_up1(p);
}

// The same for an array of the shape of masks.
inline const char* not_for_taps(const Array& array, bool adjacent) {
    if (adjacent && array.stride_c != 1) return "channels of masks are not adjacent";
    for (int64_t stride : {array.stride_c, array.stride_h, array.stride_w}) {
        if (std::abs(stride) > INT32_MAX / 128) return "masks are too far apart";  // of a tile and its halo
    }
    return nullptr;
}

// The same for an array of adjacent channels of which slices are staged.
inline const char* not_for_slice(const Array& array) {
    return std::abs(array.stride_w) > INT32_MAX ? "columns are too far apart" : nullptr;
}

}  // namespace carafepp::cuda
