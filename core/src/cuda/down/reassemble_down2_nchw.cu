// SPDX-License-Identifier: Apache-2.0
// The forward for down x2 with adjacent columns of float32. A block has a tile of outputs, whose masks it stages once.
// It goes through the channels a slice at a time: it copies the slice's features, with their halo, into shared memory
// and contracts them. A thread has 2 x 2 outputs in some channels. It keeps their masks in registers through all
// channels.
#include "cuda/down/tile_down2.h"

namespace carafepp::cuda {
namespace {

constexpr int kBlock = 128;                                 // threads
constexpr int kRows = 8, kMostColumns = 28;                 // outputs of a tile
constexpr int kOwnRows = 2, kOwnColumns = 2;                // of a thread
constexpr int kWidth = kBefore + kDown * kMostColumns + 4;  // columns of features
static_assert(kRows / kOwnRows * (kMostColumns / kOwnColumns) <= kBlock, "a thread for each unit");

// The features of a slice: [channel][row][column].
constexpr int kChannels = 8;
template <int K>
struct Slice {
    static constexpr int kHeight = kDown * (kRows - 1) + K, kChannel = kHeight * kWidth;
    using MasksOfTile = Masks<K, kRows, kMostColumns>;
    static constexpr int64_t kBytes = std::max(MasksOfTile::kElements * int64_t{sizeof(float)},
                                               kChannels * kChannel * int64_t{sizeof(float)});
};

struct ReassembleDown2NchwPlan {
    Tiles tiles;
    bool fours;  // columns of features are copied four at once, or else two
    bool pairs;  // columns of outputs are stored two at once

    ReassembleDown2NchwPlan(const Problem& p, const Array& output)
        : tiles(p, p.out_h, p.out_w, kRows, even_columns(p.out_w, kMostColumns, kOwnColumns), kChannels, kEnoughItems),
          fours(not_for_columns(p.features, 4) == nullptr),
          pairs(not_for_columns(output) == nullptr) {}
};

template <int K>
__global__ void __launch_bounds__(kBlock, 3)
    reassemble_down2_nchw_kernel(Arguments arguments, ReassembleDown2NchwPlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    using S = Slice<K>;
    using M = typename S::MasksOfTile;
    float* const masks = shared_memory<float>();     // [tap][row][column]
    float* const features = shared_memory<float>();  // in the same place, later: [channel][row][column]
    const auto place = [](int row, int column) { return row * kMostColumns + column; };
    for (int64_t item = blockIdx.x; item < plan.tiles.items; item += gridDim.x) {
        const TileOfItem tile(p, plan.tiles, item);
        const int top = tile.top * kDown - K / 2, left = tile.left * kDown - kBefore;
        const float* from = element<const float>(p.features, tile.n, tile.c, top, left);
        M::template stage<kBlock, float>(p, tile.n, tile.group, tile.top, tile.left, masks, place);
        M::template clear_outside<kBlock>(p, tile.top, tile.left, masks, place);

        const int thread = thread_computed_late();
        const int units_in_row =
            static_cast<int>(min(int64_t{plan.tiles.columns}, p.out_w - tile.left + kOwnColumns - 1)) / kOwnColumns;
        const int unit_rows = static_cast<int>(min(int64_t{kRows}, p.out_h - tile.top + kOwnRows - 1)) / kOwnRows;
        // In half a warp are units of one row, if there are about as many: others are in the same banks.
        const int apart = units_in_row > 12 ? 16 : units_in_row;
        const int units = apart * unit_rows, sharers = kBlock / units, unit = thread % units;
        const int row = unit / apart * kOwnRows, column = unit % apart * kOwnColumns;
        const bool has_outputs = thread / units < sharers && unit % apart < units_in_row;
        const int first = has_outputs ? thread / units : kChannels;
        const int out_i = tile.top + row, out_j = tile.left + column;
        float weights[kOwnRows][kOwnColumns][K * K];
#pragma unroll
        for (int t = 0; t < K * K; t++) {
#pragma unroll
            for (int r = 0; r < kOwnRows; r++) {
                const float2 two = staged_columns(masks + t * M::kApart + place(row + r, column));
                weights[r][0][t] = two.x, weights[r][1][t] = two.y;
            }
        }
        float* to = element<float>(output, tile.n, tile.c + first, out_i, out_j);  // [C, H', W']
        const bool below = out_i + 1 < p.out_h, right = out_j + 1 < p.out_w;
        const float* const own_features = features + row * kDown * kWidth + column * kDown;
        const int end = min(static_cast<int>(p.features.w), left + kBefore + kDown * plan.tiles.columns + 4);
#pragma unroll 1
        for (int channels = tile.channels; channels > 0; channels -= kChannels) {
            __syncthreads();
            if (plan.fours) {
                copy_rows<S::kHeight, kWidth, kChannels, kBlock, 4>(p.features, from, top, left, end, channels,
                                                                    features);
            } else {
                copy_rows<S::kHeight, kWidth, kChannels, kBlock, 2>(p.features, from, top, left, end, channels,
                                                                    features);
            }
            from += kChannels * p.features.stride_c;
            wait_for_copies();
            __syncthreads();
            float* upper = to;
            float* lower = to + output.stride_h;
            to += kChannels * output.stride_c;
#pragma unroll 1
            for (int q = first; q < min(channels, kChannels); q += sharers) {
                float sums[kOwnRows][kOwnColumns] = {};
                const float* const pixels = own_features + q * S::kChannel;
#pragma unroll
                for (int y = 0; y < kDown * (kOwnRows - 1) + K; y++) {
                    // columns from kBefore - 2 on
                    const float2 before = staged_columns(pixels + y * kWidth + 2);
                    const float4 four = staged_channels(pixels + y * kWidth + 4);
                    const float behind = K > 3 ? pixels[y * kWidth + 8] : 0;
                    const float feature[] = {before.x, before.y, four.x, four.y, four.z, four.w, behind};
#pragma unroll
                    for (int r = 0; r < kOwnRows; r++) {
                        const int a = y - kDown * r;
                        if (a < 0 || a >= K) continue;
#pragma unroll
                        for (int s = 0; s < kOwnColumns; s++) {
#pragma unroll
                            for (int b = 0; b < K; b++)
                                sums[r][s] += weights[r][s][a * K + b] * feature[kDown * s + b + 2 - K / 2];
                        }
                    }
                }
                if (plan.pairs) {
                    store_columns(make_float2(sums[0][0], sums[0][1]), upper);
                    if (below) store_columns(make_float2(sums[1][0], sums[1][1]), lower);
                } else {
                    upper[0] = sums[0][0];
                    if (right) upper[1] = sums[0][1];
                    if (below) lower[0] = sums[1][0];
                    if (below && right) lower[1] = sums[1][1];
                }
                upper += sharers * output.stride_c;
                lower += sharers * output.stride_c;
            }
        }
        __syncthreads();
    }
}

}  // namespace

const char* cannot_run_reassemble_down2_nchw(const Problem& p, const Array& output) {
    if (const char* reason = not_for_down2(p)) return reason;
    if (p.features.dtype != CARAFEPP_FLOAT32) return "features are not float32";
    if (!output.empty() && output.stride_w != 1) return "columns are not adjacent";
    return not_for_columns(p.features);
}

void reassemble_down2_nchw(const Problem& p, const Array& output) {
    const ReassembleDown2NchwPlan plan(p, output);
    const auto launch_for = [&](auto k) {
        launch(reassemble_down2_nchw_kernel<k>, plan.tiles.items, kBlock, Slice<k>::kBytes, p, output, plan);
    };
    if (p.kernel_size == 3) {
        launch_for(std::integral_constant<int, 3>());
    } else {
        launch_for(std::integral_constant<int, 5>());
    }
}

}  // namespace carafepp::cuda
