// SPDX-License-Identifier: Apache-2.0
// The gradient of features for any factor with 16 bits, on tensor cores, in gather form. A patch is 2 x 4 sources, and
// its window the outputs that touch it. A block has a tile of patches in a slice of channels, and a warp some channels
// of some rows of a column of patches, whose sums stay in registers. The block goes through the outputs around the tile
// in bands of rows. It stages the masks of some bands as matrices: a row has an output's masks of the eight sources of
// a patch, 0 where it has no tap. It stages grad_output a band at a time, channels adjacent, the next one ahead. A step
// of a product has 16 outputs of a band. It serves two patches, one below the other. A zero of a matrix makes NaN of an
// infinite gradient. Sums that are not finite are computed again, tap by tap.
#pragma once

#include "cuda/any/grad_features_patches_stage.h"

namespace carafepp::cuda {

// Stores a vector of elements of shared memory; see add_zeros.
template <class T>
__device__ __forceinline__ void store_elements(uint32_t word, T* to, uint32_t& zeros) {
    add_zeros<T>(word, zeros);
    store_word(word, to);
}
template <class T>
__device__ __forceinline__ void store_elements(uint2 words, T* to, uint32_t& zeros) {
    for (const uint32_t word : {words.x, words.y}) add_zeros<T>(word, zeros);
    __stcs(reinterpret_cast<uint2*>(to), words);
}
template <class T>
__device__ __forceinline__ void store_elements(uint4 words, T* to, uint32_t& zeros) {
    for (const uint32_t word : {words.x, words.y, words.z, words.w}) add_zeros<T>(word, zeros);
    __stcs(reinterpret_cast<uint4*>(to), words);
}
template <class Vector, class T>
__device__ __forceinline__ void store_vector(const T* from, T* to, uint32_t& zeros) {
    store_elements(*reinterpret_cast<const Vector*>(from), to, zeros);
}

// The first row of patches whose matrices of a band are staged, if the first row of sources that the band touches is
// this one of the tile. It is an even one, as two matrices are loaded at once.
__device__ __forceinline__ int slot_of(int source) { return max(source, 0) / (2 * kPatchRows) * 2; }

// `Vectors`: a vector of channels is one in memory, and in bands. Else columns are adjacent there. A warp has
// `Products` along channels.
template <bool Vectors, int Products, class T>
__global__ void __launch_bounds__(kMostThreads, 1)
    grad_features_patches_mma_kernel(Arguments arguments, GradPatchesPlan plan) {
    constexpr int kPatchesOfWarp = patches_of_warp(Products);
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;  // [N, C, H, W]
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int k = static_cast<int>(p.kernel_size), radius = k / 2;
    const RoomOfPatches<T> room{plan};
    const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x), lane = thread % 32;
    const int warp = same_in_warp(thread / 32), part = warp % plan.parts, of_parts = warp / plan.parts,
              own_column = of_parts % plan.patch_columns, own_row = of_parts / plan.patch_columns * kPatchesOfWarp;
    const int vector = thread % plan.vectors, first_of_thread = thread / plan.vectors;
    for (int t = thread; t < plan.steps * kStep; t += threads) {
        const int y = t / plan.window, x = t - y * plan.window;
        room.offsets()[t] = y < plan.band ? (y * plan.pitch + x) * plan.pixel : 0;
    }
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        if (thread == 0) room.tile() = TileOfPatches(p, plan, static_cast<uint32_t>(item));
        __syncthreads();
        const TileOfPatches& tile = room.tile();
        const int up = p.from_logits ? static_cast<int>(p.factor.up) : 1;
        const bool phases_apart = p.from_logits && array.stride_w < array.stride_c;
#pragma unroll 1
        for (int y = thread; y < tile.out_rows; y += threads) {
            const int output = tile.out_top + y, cell = output / up, of_masks = y % plan.mask_rows.number,
                      of = y % plan.band;
            const int first_slot = slot_of(plan.rows.source(output - of) - tile.top - radius);
            const int source = plan.rows.source(output) - tile.top + radius;
            room.rows()[y] = {
                cell * array.stride_h + (output - cell * up) * up * array.stride_c,
                of_masks / plan.band * plan.of_band + of * plan.window * kPatch - first_slot * plan.matrix, source, 0};
        }
#pragma unroll 1
        for (int x = thread; x < tile.out_columns; x += threads) {
            const int output = tile.out_left + x, cell = output / up, apart = phases_apart ? up : 1;
            OutputLine& line = room.columns()[x];
            line.from = cell * array.stride_w + (output - cell * up) * array.stride_c;
            line.to = x * kPatch;
            line.source = plan.columns.source(output) - tile.left + radius;
            const int own = x % apart, count = tile.out_columns;
            room.columns()[own * (count / apart) + min(own, count % apart) + x / apart].in_memory = x;
        }
#pragma unroll 1
        for (int s = thread; s < plan.sources + 2 * (k - 1); s += threads) {
            const int y = s - 2 * radius;
            room.row_terms()[s] = y < 0 || y >= plan.sources
                                      ? kBeyond
                                      : y / kPatchRows * plan.matrix + y % kPatchRows * kPatchColumns;
        }
#pragma unroll 1
        for (int s = thread; s < plan.across.number + 2 * (k - 1); s += threads) {
            const int x = s - 2 * radius, column = x / kPatchColumns;
            const int first = tile.copied_left + plan.first_of_patch(tile, column, radius);
            room.column_terms()[s] = x < 0 || x >= plan.across.number
                                         ? kBeyond
                                         : column * plan.of_column - (first - tile.out_left) * kPatch +
                                               x % kPatchColumns;
        }
#pragma unroll 1
        for (int column = thread; column < plan.patch_columns; column += threads)
            room.firsts()[column] = plan.first_of_patch(tile, column, radius);
#pragma unroll 1
        for (int number = thread; Vectors && number < plan.band * plan.pitch; number += threads) {
            const int y = number / plan.pitch, x = number - y * plan.pitch;
            room.places()[number] = tile.copied_left + x < p.out_w
                                        ? static_cast<int>(y * p.grad_output.stride_h + x * p.grad_output.stride_w)
                                        : kNoPlace;
        }
        // Stages the band from row `first` on.
        const auto copy_band = [&](int first, T* to) __attribute__((always_inline)) {
            const T* const from = static_cast<const T*>(p.grad_output.data) + tile.grads +
                                  first * p.grad_output.stride_h;
            const int rows = min(plan.band, tile.out_rows - first);
            if constexpr (Vectors) {
                copy_pixels_ahead(from + vector * kWide, room.places(), plan.band * plan.pitch, rows * plan.pitch,
                                  first_of_thread, plan.copiers, tile.channels - vector * kWide, to + vector * kWide,
                                  plan.pixel);
            } else {
                BandCopy<T>{from, p.grad_output, plan, rows, p.out_w - tile.copied_left, tile.channels}.copy(to);
            }
        };
        float sums[kPatchesOfWarp][Products][4] = {};
        bool second = false;  // of the buffers
        __syncthreads();
#pragma unroll 1
        for (int first = 0; first < tile.out_rows; first += plan.mask_rows.number) {
            if (first > 0) __syncthreads();  // nobody reads the last masks
            const int count = min(plan.mask_rows.number, tile.out_rows - first);
#pragma unroll 1
            for (int v = thread; v < plan.bands * plan.of_band / kWide; v += threads)
                reinterpret_cast<uint4*>(room.matrices())[v] = make_uint4(0, 0, 0, 0);
#pragma unroll 1
            for (int s = thread; s < plan.bands * plan.pairs(); s += threads) {
                const int of_masks = s / plan.pairs(), pair = s - of_masks * plan.pairs(),
                          row = first + of_masks * plan.band;
                const int top = pair * 2 * kPatchRows, bottom = top + 2 * kPatchRows - 1;  // sources
                int begin = plan.steps, end = 0;
                for (int y = 0; y < plan.band && row + y < tile.out_rows; y++) {
                    const int source = room.rows()[row + y].source;
                    if (source < top || source - 2 * radius > bottom) continue;
                    begin = min(begin, y * plan.window / kStep);
                    end = (y * plan.window + plan.window - 1) / kStep + 1;
                }
                room.steps_of_pairs()[s] = static_cast<uint32_t>(end << 16 | begin);
            }
            __syncthreads();
            MatrixStage<T>{p, plan, room, first, count, tile.out_columns, warp}.stage(tile.n, tile.group);
            // One band ahead of the first.
            int of = first == 0 ? -1 : 0;
#pragma unroll 1
            for (; of < plan.bands && first + of * plan.band < tile.out_rows; of++, second = !second) {
                const int row = first + of * plan.band;
                const int next = row + plan.band;
                wait_for_copies();
                __syncthreads();
                if (next < tile.out_rows) copy_band(next, room.grads() + (second ? 0 : plan.buffer));
                if (of >= 0) {
                    // A lane's row of the matrices: of outputs or, where columns are adjacent, of channels.
                    const int first_channel = part * Products * kChannelsOfMma +
                                              (Vectors ? lane / 8 % 2 * kWide : lane % 16);
                    const T* const grads = room.grads() + (second ? plan.buffer : 0) +
                                           room.firsts()[own_column] * plan.pixel + first_channel * plan.channel;
                    const int* const offsets = room.offsets() + (Vectors ? lane % 8 : 0) + lane / 16 * 8;
                    const int first_slot = slot_of(room.rows()[row].source - 2 * radius);
                    const T* const matrices = room.matrices() + of * plan.of_band + own_column * plan.of_column +
                                              (own_row + lane / 16 - first_slot) * plan.matrix + lane % 16 * kPatch;
                    const uint32_t* const steps = room.steps_of_pairs() + of * plan.pairs() + own_row / 2;
#pragma unroll
                    for (int q = 0; q < kPatchesOfWarp; q += 2) {
                        if (own_row + q >= plan.patch_rows) break;
                        const uint32_t range = static_cast<uint32_t>(same_in_warp(static_cast<int>(steps[q / 2])));
                        const int begin = static_cast<int>(range & 0xffff), end = static_cast<int>(range >> 16);
                        const int* offset = offsets + begin * kStep;
                        const T* matrix = matrices + q * plan.matrix + begin * kStep * kPatch;
#pragma unroll 1
                        for (int step = begin; step < end; step++, offset += kStep, matrix += kStep * kPatch) {
                            const T* const at = grads + *offset;
                            uint32_t values[Products][4], masks[4];
                            load_matrices(matrix, masks);
#pragma unroll
                            for (int m = 0; m < Products; m++)
                                load_matrices<Vectors>(at + m * kChannelsOfMma * (Vectors ? 1 : plan.channel),
                                                       values[m]);
#pragma unroll
                            for (int m = 0; m < Products; m++) {
                                multiply_add<T>(sums[q][m], values[m], {masks[0], masks[1]});
                                multiply_add<T>(sums[q + 1][m], values[m], {masks[2], masks[3]});
                            }
                        }
                    }
                }
            }
        }
        __syncthreads();

        // Sums go to shared memory in the order of the result.
        const float unscale = 1 / scale_of_masks<T>(p);
        const int row = lane / 4, pair = lane % 4;
#pragma unroll
        for (int q = 0; q < kPatchesOfWarp; q++) {
            if (own_row + q >= plan.patch_rows) break;
            const int source = ((own_row + q) * kPatchRows + pair / 2) * plan.across.number +
                               own_column * kPatchColumns + pair % 2 * 2;
#pragma unroll
            for (int m = 0; m < Products; m++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int channel = (part * Products + m) * kChannelsOfMma + half * 8 + row;
                    const float* const sum = sums[q][m] + half * 2;
                    const uint32_t own = pair_of<T>(sum[0] * unscale, sum[1] * unscale);
                    if constexpr (Vectors) {
                        // Lanes of two channels exchange a source: each has both channels of one then.
                        const uint32_t other = __shfl_xor_sync(0xffffffffu, own, 4);
                        const uint32_t word = row % 2 == 0 ? halves_of(own, other, false) : halves_of(other, own, true);
                        *reinterpret_cast<uint32_t*>(room.results() + (source + row % 2) * plan.pixel + channel -
                                                     row % 2) = word;
                    } else {
                        *reinterpret_cast<uint32_t*>(room.results() + channel * plan.plane + source) = own;
                    }
                }
            }
        }
        __syncthreads();
        const int height = static_cast<int>(min(p.features.h - tile.top, int64_t{plan.sources})),
                  columns = static_cast<int>(min(p.features.w - tile.left, int64_t{plan.across.number}));
        T* const to = element<T>(grad_features, tile.n, tile.c, tile.top, tile.left);
        uint32_t zeros = 0;  // while all results are finite
        // Calls f(channel, row, column) for the thread's results: first ones of eight channels, or of some columns.
        const auto for_each_stored = [&](auto f) {
            if constexpr (Vectors) {
                if (vector * kWide >= tile.channels) return;
#pragma unroll 1
                for (int s = first_of_thread; s < height * plan.across.number; s += plan.copiers) {
                    const int y = plan.across.quotient(s), x = s - y * plan.across.number;
                    if (x < columns) f(vector * kWide, y, x);
                }
            } else {
                const int in_row = plan.stored_in_row.number;
#pragma unroll 1
                for (int s = thread; s < tile.channels * plan.sources * in_row; s += threads) {
                    const int line = plan.stored_in_row.quotient(s), x = (s - line * in_row) * plan.columns_at_once,
                              c = plan.rows_of_tile.quotient(line), y = line - c * plan.sources;
                    if (x < columns && y < height) f(c, y, x);
                }
            }
        };
        for_each_stored([&](int channel, int y, int x) __attribute__((always_inline)) {
            T* const result = to + channel * grad_features.stride_c + y * grad_features.stride_h +
                              x * grad_features.stride_w;
            if constexpr (Vectors) {
                store_vector<uint4>(room.results() + (y * plan.across.number + x) * plan.pixel + channel, result,
                                    zeros);
            } else {
                const T* const values = room.results() + channel * plan.plane + y * plan.across.number + x;
                if (plan.columns_at_once == 8) {
                    store_vector<uint4>(values, result, zeros);
                } else if (plan.columns_at_once == 4) {
                    store_vector<uint2>(values, result, zeros);
                } else if (plan.columns_at_once == 2) {
                    store_vector<uint32_t>(values, result, zeros);
                } else {
                    add_zeros<T>(values->bits, zeros);
                    *result = *values;
                }
            }
        });
        if (zeros != 0) {
            for_each_stored([&](int channel, int y, int x) {
                const int in_channels = Vectors ? kWide : 1, in_row = Vectors ? 1 : plan.columns_at_once;
#pragma unroll 1
                for (int v = 0; v < in_channels * in_row; v++) {
                    const int i = tile.top + y, j = tile.left + x + (Vectors ? 0 : v);
                    const int64_t c = tile.c + channel + (Vectors ? v : 0);
                    T* const stored = element<T>(grad_features, tile.n, c, i, j);
                    if (!(fabsf(widen(*stored)) < INFINITY))
                        *stored = narrow<T>(
                            feature_tap_by_tap<T>(p, plan.rows, plan.columns, tile.n, tile.group, c, i, j));
                }
            });
        }
        __syncthreads();
    }
}

// Why no tile can be planned for a problem.
inline const char* not_for_grad_patches(const Problem& p, const Array& grad_features, bool vectors) {
    if (itemsize(p.features.dtype) != 2) return "features are not of 16 bits";
    if (const char* reason = not_for_tiles(p)) return reason;
    if (p.kernel_size < 3) return "kernel_size is less than 3";
    if (p.factor.down >= 2 * p.factor.up) return "few outputs touch a source";
    if (p.features.c / p.groups < kWide) return "a group has fewer than 8 channels";
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    const GradPatchesPlan plan(p, grad_features, vectors);
    if (plan.shared_bytes > plan.most_bytes) return "outputs are too far apart";
    if (std::abs(plan.tap) > INT32_MAX / 32) return "masks of an output are too far apart";
    if (p.grad_output.stride_c != static_cast<int>(p.grad_output.stride_c)) return "channels are too far apart";
    for (const int64_t stride : {p.grad_output.stride_h * plan.band, p.grad_output.stride_w * plan.pitch}) {
        if (vectors && std::abs(stride) > INT32_MAX / 16) return "outputs are too far apart";
    }
    return plan.items > UINT32_MAX ? "tiles are too many" : nullptr;
}

template <bool Vectors>
void grad_features_patches(const Problem& p, const Array& grad_features) {
    const GradPatchesPlan plan(p, grad_features, Vectors);
    const bool wide = products_along_channels(p.features.c / p.groups) == 4,
               float16 = p.features.dtype == CARAFEPP_FLOAT16;
    const auto kernel = wide      ? float16 ? grad_features_patches_mma_kernel<Vectors, 4, Float16>
                                            : grad_features_patches_mma_kernel<Vectors, 4, BFloat16>
                        : float16 ? grad_features_patches_mma_kernel<Vectors, 1, Float16>
                                  : grad_features_patches_mma_kernel<Vectors, 1, BFloat16>;
    launch(kernel, plan.items, plan.threads(), plan.shared_bytes, p, grad_features, plan);
}

}  // namespace carafepp::cuda
