// SPDX-License-Identifier: Apache-2.0
//
// The normaliser by itself: stage the masks of some outputs, write them.
#include "cuda/masks.h"

namespace carafepp::cuda {
namespace {

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    normalize_masks_kernel(Arguments arguments, int64_t outputs_of_block, int64_t tiles) {
    const Problem& p = arguments.problem;
    const Array& masks = arguments.result;
    using A = Accumulator<T>;
    A* const staged = shared_memory<A>();
    const int64_t items = masks.n * p.groups * tiles;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient tile = divide(item, tiles), image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder, first = tile.remainder * outputs_of_block;
        const int64_t outputs = min(outputs_of_block, p.out_h * p.out_w - first);
        stage_masks<T>(p, n, group, first, outputs, p.out_w, staged, outputs_of_block);
        for_each_mask(masks, p.taps(), outputs, [&](int64_t t, int64_t q) {
            const Output output = output_at(first + q, p.out_w);
            mask_element<T>(masks, n, group * p.taps() + t, output.i, output.j)
                .store(0, staged[t * outputs_of_block + q]);
        });
        __syncthreads();
    }
}

}  // namespace

void normalize_masks(const Problem& p, const Array& masks) {
    with_types(p, [&](auto storage, auto) {
        using T = typename decltype(storage)::type;
        using A = Accumulator<T>;
        const int64_t outputs = outputs_in_shared<A>(p.taps(), 1, 128);
        const int64_t tiles = ceil_div(p.out_h * p.out_w, outputs);
        launch(normalize_masks_kernel<T>, masks.n * p.groups * tiles, kThreads, p.taps() * outputs * int64_t{sizeof(A)},
               p, masks, outputs, tiles);
    });
}

}  // namespace carafepp::cuda
