// SPDX-License-Identifier: Apache-2.0
//
// The gradient of features for up x2 with adjacent channels. Of a row of sources: stage the masks of its outputs as
// [source][tap][output]; contract them with grad_output, each vector of which, once loaded, serves all rows that the
// windows reach; write out the row that is complete.
#include "cuda/grad_features_up2.h"

namespace carafepp::cuda {
namespace {

struct Cut {
    int lanes, columns;            // of a block: threads along channels, columns of sources
    int64_t panels, runs, chunks;  // of columns in a row, of rows in an image, of channels in a group
};

template <int K, class T>
__global__ void __launch_bounds__(kThreads, 2) grad_features_nhwc_kernel(Arguments arguments, Cut cut) {
    const Problem& p = arguments.problem;
    const Array& grad_features = arguments.result;
    constexpr int kTaps = K * K, kRadius = K / 2;
    float* const staged = shared_memory<float>();
    const int lane = static_cast<int>(threadIdx.x) % cut.lanes,
              own = static_cast<int>(threadIdx.x) / cut.lanes * kColumns;
    const int64_t channels_in_group = p.features.c / p.groups;
    const int64_t items = grad_features.n * p.groups * cut.runs * cut.panels * cut.chunks;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient chunk = divide(item, cut.chunks), panel = divide(chunk.quotient, cut.panels),
                       run = divide(panel.quotient, cut.runs), image = divide(run.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const int first = static_cast<int>(panel.remainder) * cut.columns, j = first + own, left = j - kRadius;
        const int64_t in_group = (chunk.remainder * cut.lanes + lane) * kVector;
        const int64_t c = group * channels_in_group + in_group;
        const bool exists = in_group < channels_in_group && j < p.features.w;
        const auto add = [&](int i, float4(&sums)[K][kColumns]) {
            stage_sources<K, T>(p, n, group, i, first - kRadius, cut.columns + K - 1, staged);
            clear_cropped<K>(p, i, first - kRadius, cut.columns + K - 1, staged);
            if (exists) {
                const bool two_rows = i * kUp + 1 < p.out_h;
                const T* const grads = element<const T>(p.grad_output, n, c, i * kUp, left * kUp);
                const auto load = [&](int x, int output) {
                    const int row = output / kUp, column = x * kUp + output % kUp, out_j = left * kUp + column;
                    const bool exist = (row == 0 || two_rows) && out_j >= 0 && out_j < p.out_w;
                    return load_channels(grads + row * p.grad_output.stride_h + column * p.grad_output.stride_w, exist);
                };
                contract<K>(reinterpret_cast<const float4*>(staged) + own * kTaps, 1, load, sums);
            }
            __syncthreads();
        };
        go_down<K>(p, static_cast<int>(run.remainder) * kRows, add, [&](int i, int s, float4 sum) {
            if (exists && j + s < p.features.w) store_channels(sum, element<T>(grad_features, n, c, i, j + s));
        });
    }
}

template <int K>
void run(const Problem& p, const Array& grad_features) {
    const int64_t channels_in_group = p.features.c / p.groups;
    const Lanes block(channels_in_group, kColumns, K * K * kBytesOfTap, K - 1);
    Cut cut;
    cut.lanes = block.lanes;
    cut.columns = block.columns;
    cut.panels = ceil_div(p.features.w, cut.columns);
    cut.runs = ceil_div(p.features.h, kRows);
    cut.chunks = ceil_div(channels_in_group, cut.lanes * kVector);
    with_floats(p, [&](auto feature) {
        launch(grad_features_nhwc_kernel<K, decltype(feature)>,
               grad_features.n * p.groups * cut.runs * cut.panels * cut.chunks, kThreads, block.shared_bytes, p,
               grad_features, cut);
    });
}

}  // namespace

const char* cannot_run_grad_features_nhwc(const Problem& p, const Array& grad_features) {
    if (const char* reason = not_for_up2(p, 5)) return reason;
    if (const char* reason = not_for_vectors(p, p.grad_output)) return reason;
    return not_for_vectors(p, grad_features);
}

void grad_features_nhwc(const Problem& p, const Array& grad_features) {
    p.kernel_size == 3 ? run<3>(p, grad_features) : run<5>(p, grad_features);
}

}  // namespace carafepp::cuda
