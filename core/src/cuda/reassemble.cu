// SPDX-License-Identifier: Apache-2.0
//
// The forward for any strides, factor and kernel size. A block has some outputs of a group and some of its channels:
// stage the masks of the outputs, contract the taps, each thread of one output in one channel at a time, write out.
#include "cuda/masks.h"

namespace carafepp::cuda {
namespace {

constexpr int64_t kChannels = 32;  // of a block
constexpr int64_t kOutputs = 128;

struct Cut {
    int64_t outputs, channels;                                             // of a block
    int64_t tiles, chunks;                                                 // of outputs, of channels
    CARAFEPP_HOST_DEVICE int64_t items() const { return tiles * chunks; }  // of a group of an image
};

template <class T>
__global__ void __launch_bounds__(kThreads, 2) reassemble_kernel(Arguments arguments, Cut cut) {
    const Problem& p = arguments.problem;
    const Array& output = arguments.result;
    using A = Accumulator<T>;
    A* const masks = shared_memory<A>();
    const int64_t k = p.kernel_size, channels_in_group = p.features.c / p.groups;
    const bool channels_adjacent = output.stride_c < output.stride_w;
    const int64_t items = output.n * p.groups * cut.items();
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient chunk = divide(item, cut.chunks), tile = divide(chunk.quotient, cut.tiles),
                       image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int64_t first = tile.remainder * cut.outputs, first_channel = chunk.remainder * cut.channels;
        const int64_t outputs = min(cut.outputs, p.out_h * p.out_w - first);
        const int64_t channels = min(cut.channels, channels_in_group - first_channel);
        stage_masks<T>(p, n, group, first, outputs, p.out_w, masks, cut.outputs);
        for (int64_t place = threadIdx.x; place < outputs * channels; place += kThreads) {
            const Quotient at = divide(place, channels_adjacent ? channels : outputs);
            const int64_t q = channels_adjacent ? at.quotient : at.remainder;
            const int64_t c = group * channels_in_group + first_channel +
                              (channels_adjacent ? at.remainder : at.quotient);
            const Output pixel = output_at(first + q, p.out_w);
            const int64_t top = p.factor.source(pixel.i) - p.radius(), left = p.factor.source(pixel.j) - p.radius();
            const int64_t b_begin = max(-left, int64_t{0}), b_end = min(k, p.features.w - left);
            A sum = 0;
            for (int64_t a = max(-top, int64_t{0}); a < min(k, p.features.h - top); a++) {
                const T* const row = element<const T>(p.features, n, c, top + a, left);
                const A* const weights = masks + a * k * cut.outputs + q;
                for (int64_t b = b_begin; b < b_end; b++)
                    sum += weights[b * cut.outputs] * widen(row[b * p.features.stride_w]);
            }
            *element<T>(output, n, c, pixel.i, pixel.j) = narrow<T>(sum);
        }
        __syncthreads();
    }
}

}  // namespace

void reassemble(const Problem& p, const Array& output) {
    with_types(p, [&](auto features, auto) {
        using T = typename decltype(features)::type;
        using A = Accumulator<T>;
        Cut cut;
        cut.outputs = outputs_in_shared<A>(p.taps(), 1, kOutputs);
        cut.channels = kChannels;
        cut.tiles = ceil_div(p.out_h * p.out_w, cut.outputs);
        cut.chunks = ceil_div(p.features.c / p.groups, cut.channels);
        launch(reassemble_kernel<T>, output.n * p.groups * cut.items(), kThreads,
               p.taps() * cut.outputs * int64_t{sizeof(A)}, p, output, cut);
    });
}

}  // namespace carafepp::cuda
