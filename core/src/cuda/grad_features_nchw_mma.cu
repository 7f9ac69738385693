// SPDX-License-Identifier: Apache-2.0
//
// The gradient of features for up x2 with adjacent columns of 16 bits, on tensor cores, in gather form. A warp has a
// tile of 2 x 8 pixels of the result in 64 channels. Of each row of sources whose windows reach them: stage the masks
// of its outputs; multiply grad_output, 16 channels and four sources of one row of outputs at a time, with those masks
// that lead from an output to a pixel, a band matrix. What of the band is 0 would make NaN of an infinite gradient:
// where a sum is not finite it is computed anew, tap by tap.
#include "cuda/grad_features_mma.h"

namespace carafepp::cuda {
namespace {

constexpr int kTile = 8, kTileRows = 2;  // columns and rows of a tile
constexpr int kAtOnce = 16;              // channels
using TileCut = Cut<kTile, kTileRows>;

// The fragments of PTX's mma.m16n8k8: of the products, rows are channels, columns pixels of a row of a tile, and what
// is summed over are the two outputs in a row of four sources; lane / 4 is `row` here, lane % 4 is `pair`.
template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2) grad_features_nchw_mma_kernel(Arguments arguments, TileCut cut) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;
    constexpr int kTaps = K * K, kRadius = K / 2, kReach = kTile + K - 1;  // sources of a row that reach a tile
    constexpr int kSteps = (kReach + 3) / 4;                               // of four of them
    float* const staged = shared_memory<float>();
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int row = lane / 4, pair = lane % 4;
    const int64_t channels_in_group = p.features.c / p.groups;
    const int height = static_cast<int>(p.features.h), sources = cut.strips * kTile + K - 1;
    const float scale = scale_of_masks<T>(p);
    for (int64_t item = blockIdx.x; item < cut.items; item += gridDim.x) {
        const TileOfWarp tile = cut.tile(p, item, warp);
        const int64_t n = tile.n, group = tile.group;
        const int first = tile.first, left = tile.left, strip = tile.strip, channels = tile.channels;
        const int top = tile.top, bottom = min(top + kTileRows, height);
        const int64_t c = group * channels_in_group + tile.in_group + row;  // and, with the next eight, c + 8
        const bool exists = channels > 0 && left < p.features.w;
        float sums[kChannels / kAtOnce][kTileRows][4] = {};
        for (int i = max(top - kRadius, 0); i < min(bottom + kRadius, height); i++) {
            if (i * kUp >= p.out_h || p.out_w == 0) break;
            stage_sources<K, T>(p, n, group, i, first - kRadius, sources, staged);
            clear_cropped<K>(p, i, first - kRadius, sources, staged);
#pragma unroll 1
            for (int step = 0; step < kUp * kSteps && exists; step++) {
                const int r = step / kSteps, out_i = i * kUp + r;  // row of outputs
                const int source = step % kSteps * 4 + pair;       // of this lane's outputs
                const int out_j = (left - kRadius + source) * kUp;
                const float* const masks = staged + (strip * kTile + source) * kTaps * kOutputs + r * kUp;
                const int b = row - source + K - 1;  // the tap that leads to this lane's column of a tile
                uint32_t band[kTileRows];
#pragma unroll
                for (int y = 0; y < kTileRows; y++) {
                    const int a = top + y - i + kRadius;
                    const bool leads = a >= 0 && a < K && b >= 0 && b < K;
                    const float* const weight = masks + (a * K + b) * kOutputs;
                    band[y] = leads ? pair_of<T>(scale * weight[0], scale * weight[1]) : 0;
                }
                const bool there = source < kReach && out_i < p.out_h && out_j >= 0 && out_j < p.out_w;
                const T* grads = element<const T>(p.grad_output, n, c, out_i, out_j);
#pragma unroll
                for (int part = 0; part < kChannels / kAtOnce; part++, grads += kAtOnce * p.grad_output.stride_c) {
                    const int channel = part * kAtOnce + row;
                    const uint32_t words[] = {
                        load_word(grads, there && channel < channels),
                        load_word(grads + 8 * p.grad_output.stride_c, there && channel + 8 < channels)};
#pragma unroll
                    for (int y = 0; y < kTileRows; y++) multiply_add<T>(sums[part][y], words, band[y]);
                }
            }
            __syncthreads();
        }
        if (!exists) continue;
        // The pieces of a lane's sums, two columns each: of 16 channels two, of each of these two rows.
        constexpr int kPieces = kChannels / kAtOnce * 2 * kTileRows;
        const int x = left + 2 * pair;
        struct Place {
            int channel, y;
        };
        const auto place = [&](int piece) {
            return Place{piece / (2 * kTileRows) * kAtOnce + piece % 2 * 8, top + piece / 2 % kTileRows};
        };
        unsigned not_finite = 0;
#pragma unroll
        for (int piece = 0; piece < kPieces; piece++) {
            const Place at = place(piece);
            if (at.y >= height || x >= p.features.w || at.channel + row >= channels) continue;
            const float* const of = sums[piece / (2 * kTileRows)][piece / 2 % kTileRows] + piece % 2 * 2;
            T* const to = element<T>(grad_features, n, c + at.channel, at.y, x);
            if (!store_sums<T>(of, 1 / scale, to)) not_finite |= 1u << piece;
        }
#pragma unroll 1
        for (int piece = 0; not_finite >> piece != 0; piece++) {
            const Place at = place(piece);
            for (int q = 0; q < 2 && (not_finite >> piece & 1) != 0; q++) {
                *element<T>(grad_features, n, c + at.channel, at.y,
                            x + q) = narrow<T>(feature_tap_by_tap<T>(p, n, group, c + at.channel, at.y, x + q));
            }
        }
    }
}

template <int K>
void run(const Problem& p, const Array& grad_features) {
    const TileCut cut(p);
    with_halves(p, [&](auto feature) {
        launch(grad_features_nchw_mma_kernel<K, decltype(feature)>, cut.items, kThreads,
               (cut.strips * kTile + K - 1) * K * K * kBytesOfTap, p, grad_features, cut);
    });
}

}  // namespace

const char* cannot_run_grad_features_nchw_mma(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_columns_of_mma(p, {&p.grad_output, &grad_features})) return reason;
    if (const char* reason = masks_too_large_for_mma(p)) return reason;
    return p.features.dtype == CARAFEPP_BFLOAT16 ? not_compiled_for_bfloat16(grad_features_nchw_mma_kernel<5, BFloat16>)
                                                 : nullptr;
}

void grad_features_nchw_mma(const Problem& p, const Array& grad_features) {
    p.kernel_size == 3 ? run<3>(p, grad_features) : run<5>(p, grad_features);
}

}  // namespace carafepp::cuda
