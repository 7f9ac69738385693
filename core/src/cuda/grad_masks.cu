// SPDX-License-Identifier: Apache-2.0
//
// The gradient of masks or logits for any strides, factor and kernel size. A block has some outputs of a group:
// contract grad_output and features over the channels, each thread of one tap of one output at a time (or load the
// gradient of masks that is given); carry it through the normaliser, each thread of one output; write out.
#include "cuda/masks.h"

namespace carafepp::cuda {
namespace {

struct Cut {
    int64_t outputs, tiles;  // of a block, of the plane
    int64_t height, width;   // of the plane: of masks, or of the sub-pixels of logits
    bool given;              // the gradient of masks is an input; else it is contracted
};

// 0 for a tap beyond the border, whatever the gradient there.
template <class T>
__device__ Accumulator<T> contract(const Problem& p, int64_t n, int64_t group, Output output, int64_t a, int64_t b) {
    const int64_t i = p.factor.source(output.i) + a - p.radius(), j = p.factor.source(output.j) + b - p.radius();
    if (i < 0 || j < 0 || i >= p.features.h || j >= p.features.w) return 0;
    const int64_t channels = p.features.c / p.groups;
    if (channels == 0) return 0;  // perhaps there is no array
    const T* grad = element<const T>(p.grad_output, n, group * channels, output.i, output.j);
    const T* feature = element<const T>(p.features, n, group * channels, i, j);
    Accumulator<T> sum = 0;
    for (int64_t c = 0; c < channels; c++)
        sum += widen(grad[c * p.grad_output.stride_c]) * widen(feature[c * p.features.stride_c]);
    return sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2) grad_masks_kernel(Arguments arguments, Cut cut) {
    const Problem& p = arguments.problem;
    const Array& grad_masks = arguments.result;
    using A = Accumulator<T>;
    const int64_t tile_size = p.taps() * cut.outputs;
    A* const grads = shared_memory<A>();
    const int64_t items = grad_masks.n * p.groups * cut.tiles;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient tile = divide(item, cut.tiles), image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder, first = tile.remainder * cut.outputs;
        const int64_t outputs = min(cut.outputs, cut.height * cut.width - first);

        for_each_mask(grad_masks, p.taps(), outputs, [&](int64_t t, int64_t q) {
            const Output output = output_at(first + q, cut.width);
            A grad = 0;  // of a sub-pixel that a crop leaves out
            if (output.i < p.out_h && output.j < p.out_w) {
                const Quotient tap = divide(t, p.kernel_size);
                grad = cut.given ? A(mask_element<T>(p.grad_masks, n, group * p.taps() + t, output.i, output.j)[0])
                                 : A(contract<T>(p, n, group, output, tap.quotient, tap.remainder));
            }
            grads[t * cut.outputs + q] = grad;
        });
        if (p.from_logits) {
            A* const masks = grads + tile_size;
            A* const logits = masks + tile_size;
            load_masks<T>(p, p.logits, n, group, 0, p.taps(), first, outputs, cut.width, logits, cut.outputs);
            __syncthreads();
            for (int64_t q = threadIdx.x; q < outputs; q += kThreads) {
                const Output output = output_at(first + q, cut.width);
                if (output.i >= p.out_h || output.j >= p.out_w) continue;
                for (int64_t t = 0; t < p.taps(); t++) masks[t * cut.outputs + q] = logits[t * cut.outputs + q];
                A scratch[2];
                normalize(p.normalizer, masks + q, p.taps(), cut.outputs, 1, scratch);
                normalize_backward(p.normalizer, grads + q, masks + q, logits + q, p.taps(), cut.outputs, 1, scratch);
            }
        }
        __syncthreads();
        for_each_mask(grad_masks, p.taps(), outputs, [&](int64_t t, int64_t q) {
            mask_at<T>(p, grad_masks, n, group, t, output_at(first + q, cut.width))
                .store(0, grads[t * cut.outputs + q]);
        });
        __syncthreads();
    }
}

void run(const Problem& p, const Array& grad_masks, bool given) {
    with_types(p, [&](auto features, auto) {
        using T = typename decltype(features)::type;
        using A = Accumulator<T>;
        const int64_t staged = p.from_logits ? 3 : 1;  // grads; masks and logits
        Cut cut;
        cut.given = given;
        cut.height = p.from_logits ? p.logits.h * p.factor.up : p.out_h;
        cut.width = p.from_logits ? p.logits.w * p.factor.up : p.out_w;
        cut.outputs = outputs_in_shared<A>(p.taps(), staged, 64);
        cut.tiles = ceil_div(cut.height * cut.width, cut.outputs);
        launch(grad_masks_kernel<T>, grad_masks.n * p.groups * cut.tiles, kThreads,
               staged * p.taps() * cut.outputs * int64_t{sizeof(A)}, p, grad_masks, cut);
    });
}

}  // namespace

void grad_masks(const Problem& p, const Array& grad_masks) { run(p, grad_masks, false); }

void normalize_masks_backward(const Problem& p, const Array& grad_logits) { run(p, grad_logits, true); }

}  // namespace carafepp::cuda
