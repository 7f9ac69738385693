// SPDX-License-Identifier: Apache-2.0
// The forward for any strides, factor and kernel size. A block has some outputs of a group, in some channels. It stages
// their masks. Then a thread sums one output in one channel at a time, and writes it.
#include "cuda/masks.h"

namespace carafepp::cuda {
namespace {

constexpr int64_t kChannelsOfBlock = 32;  // of a block
constexpr int64_t kMostOutputsOfBlock = 128;

struct ReassemblePlan {
    int64_t outputs;         // of a block
    int64_t tiles;           // of an image
    int64_t channel_blocks;  // of a group
    int64_t items;
    int64_t shared_bytes;

    ReassemblePlan(const Problem& p, const Array& output, int64_t accumulator_bytes) {
        outputs = outputs_in_shared(p.taps() * accumulator_bytes, kMostOutputsOfBlock);
        tiles = ceil_div(p.out_h * p.out_w, outputs);
        channel_blocks = ceil_div(p.features.c / p.groups, kChannelsOfBlock);
        items = output.n * p.groups * tiles * channel_blocks;
        shared_bytes = outputs * (p.taps() * accumulator_bytes + kBytesOfPlace);
    }
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) reassemble_kernel(Arguments arguments, ReassemblePlan plan) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;  // [N, C, H', W']
    using A = Accumulator<T>;
    int64_t* const places = shared_memory<int64_t>();              // of outputs
    A* const masks = reinterpret_cast<A*>(places + plan.outputs);  // [tap][output]
    const int64_t k = p.kernel_size, channels_in_group = p.features.c / p.groups;
    const bool channels_adjacent = output.stride_c < output.stride_w;
    for (int64_t item = blockIdx.x; item < plan.items; item += gridDim.x) {
        const Quotient channel_block = divide(item, plan.channel_blocks),
                       tile = divide(channel_block.quotient, plan.tiles), image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int64_t first = tile.remainder * plan.outputs, first_channel = channel_block.remainder * kChannelsOfBlock;
        const int64_t outputs = min(plan.outputs, p.out_h * p.out_w - first);
        const int64_t channels = min(kChannelsOfBlock, channels_in_group - first_channel);
        stage_masks<T>(p, n, group, first, outputs, p.out_w, places, masks, plan.outputs);
        for (int64_t index = threadIdx.x; index < outputs * channels; index += kThreads) {
            const Quotient at = divide(index, channels_adjacent ? channels : outputs);
            const int64_t q = channels_adjacent ? at.quotient : at.remainder;
            const int64_t c = group * channels_in_group + first_channel +
                              (channels_adjacent ? at.remainder : at.quotient);
            const Pixel pixel = pixel_at(first + q, p.out_w);
            const int64_t top = p.rows().source(pixel.i) - p.radius(), left = p.columns().source(pixel.j) - p.radius();
            const int64_t b_begin = max(-left, int64_t{0}), b_end = min(k, p.features.w - left);
            A sum = 0;
            for (int64_t a = max(-top, int64_t{0}); a < min(k, p.features.h - top); a++) {
                const T* const row = element<const T>(p.features, n, c, top + a, left);
                const A* const weights = masks + a * k * plan.outputs + q;
                for (int64_t b = b_begin; b < b_end; b++)
                    sum += weights[b * plan.outputs] * widen(row[b * p.features.stride_w]);
            }
            *element<T>(output, n, c, pixel.i, pixel.j) = narrow<T>(sum);
        }
    }
}

}  // namespace

void reassemble(const Problem& p, const Array& output) {
    with_types(p, [&](auto features, auto) {
        using T = typename decltype(features)::type;
        const ReassemblePlan plan(p, output, sizeof(Accumulator<T>));
        launch(reassemble_kernel<T>, plan.items, kThreads, plan.shared_bytes, p, output, plan);
    });
}

}  // namespace carafepp::cuda
