// SPDX-License-Identifier: Apache-2.0
//
// The forward for down x2 with adjacent columns. A thread has two outputs, one below the other, and some channels: the
// masks of both stay in its registers (normalised there); then, a channel at a time, the rows of features that both
// windows reach are loaded once, two columns in one access. Pairs of outputs are numbered through, so that small maps
// fill blocks.
#include "cuda/masks.h"

namespace carafepp::cuda {
namespace {

constexpr int kDown = 2;
constexpr int kOutputs = 2;    // of a thread
constexpr int kBlock = 128;    // threads
constexpr int kChannels = 64;  // of a thread

struct Cut {
    int64_t tiles, chunks;  // of pairs of outputs in an image, of channels in a group
};

// Two neighbouring columns, the first an even one.
__device__ __forceinline__ float2 load_columns(const float* from) {
    return __ldg(reinterpret_cast<const float2*>(from));
}
template <class T>
__device__ __forceinline__ float2 load_columns(const T* from) {
    const uint32_t bits = __ldg(reinterpret_cast<const uint32_t*>(from));
    return make_float2(widen(T{static_cast<uint16_t>(bits)}), widen(T{static_cast<uint16_t>(bits >> 16)}));
}

// Both windows in `channels` channels. Unless `Inside`, what is beyond a border is 0, as are its weights.
template <int K, bool Inside, class T>
__device__ __forceinline__ void contract(const Problem& p, int64_t n, int64_t c, int channels, int out_i, int out_j,
                                         const float (&masks)[kOutputs][K * K]) {
    constexpr int kRadius = K / 2, kBefore = kRadius + kRadius % 2;  // columns before the centre's, an even number
    constexpr int kPairs = (kBefore + kRadius) / 2 + 1, kRows = K + kDown * (kOutputs - 1);
    const int top = out_i * kDown - kRadius, left = out_j * kDown - kBefore;
    const T* window = element<const T>(p.features, n, c, top, left);
    T* outputs = element<T>(p.result, n, c, out_i, out_j);
    const bool two_rows = out_i + 1 < p.out_h;
#pragma unroll 1
    for (; channels > 0; channels--, window += p.features.stride_c, outputs += p.result.stride_c) {
        float sums[kOutputs] = {};
        const T* row = window;
#pragma unroll
        for (int y = 0; y < kRows; y++, row += p.features.stride_h) {
#pragma unroll
            for (int x = 0; x < kPairs; x++) {
                const bool inside = Inside || (top + y >= 0 && top + y < p.features.h && left + 2 * x >= 0 &&
                                               left + 2 * x < p.features.w);
                const float2 features = inside ? load_columns(row + 2 * x) : make_float2(0, 0);
#pragma unroll
                for (int o = 0; o < kOutputs; o++) {
                    const int a = y - kDown * o, b = 2 * x - (kBefore - kRadius);
                    if (a < 0 || a >= K) continue;
                    if (b >= 0 && b < K) sums[o] += masks[o][a * K + b] * features.x;
                    if (b + 1 >= 0 && b + 1 < K) sums[o] += masks[o][a * K + b + 1] * features.y;
                }
            }
        }
        outputs[0] = narrow<T>(sums[0]);
        if (two_rows) outputs[p.result.stride_h] = narrow<T>(sums[1]);
    }
}

template <int K, class T, class M>
__global__ void __launch_bounds__(kBlock) reassemble_down2_nchw_kernel(Problem p, Cut cut) {
    constexpr int kRadius = K / 2;
    const int64_t channels_in_group = p.features.c / p.groups;
    const Array& array = p.from_logits ? p.logits : p.masks;
    const int64_t items = p.result.n * p.groups * cut.tiles * cut.chunks;
    for (int64_t item = blockIdx.x; item < items; item += gridDim.x) {
        const Quotient chunk = divide(item, cut.chunks), tile = divide(chunk.quotient, cut.tiles),
                       image = divide(tile.quotient, p.groups);
        const int64_t n = image.quotient, group = image.remainder;
        const Output pair = output_at(tile.remainder * kBlock + threadIdx.x, p.out_w);
        const int out_i = static_cast<int>(pair.i) * kOutputs, out_j = static_cast<int>(pair.j);
        if (pair.i * kOutputs >= p.out_h) continue;

        const int top = out_i * kDown - kRadius, left = out_j * kDown - kRadius;
        const bool inside = top >= 0 && left > 0 && top + K + kDown * (kOutputs - 1) <= p.features.h &&
                            left + K < p.features.w;  // those of a pair that no window has, too
        float masks[kOutputs][K * K];
#pragma unroll
        for (int o = 0; o < kOutputs; o++) {
            const bool exists = out_i + o < p.out_h;
            if (exists) {
                load_taps<K>(element<const M>(array, n, group * p.taps(), out_i + o, out_j), array.stride_c,
                             p.from_logits, p.normalizer, masks[o]);
            }
#pragma unroll
            for (int t = 0; t < K * K; t++) {  // 0 * 0 is 0 even where a mask is Inf
                const int y = top + kDown * o + t / K, x = left + t % K;
                const bool reaches = inside || (y >= 0 && y < p.features.h && x >= 0 && x < p.features.w);
                if (!exists || !reaches) masks[o][t] = 0;
            }
        }
        const int64_t first = chunk.remainder * kChannels, c = group * channels_in_group + first;
        const int channels = static_cast<int>(min(int64_t{kChannels}, channels_in_group - first));
        if (inside) {
            contract<K, true, T>(p, n, c, channels, out_i, out_j, masks);
        } else {
            contract<K, false, T>(p, n, c, channels, out_i, out_j, masks);
        }
    }
}

template <int K>
void run(const Problem& p) {
    with_floats(p, [&](auto feature, auto mask) {
        Cut cut;
        cut.tiles = ceil_div(ceil_div(p.out_h, kOutputs) * p.out_w, kBlock);
        cut.chunks = ceil_div(p.features.c / p.groups, kChannels);
        launch(reassemble_down2_nchw_kernel<K, decltype(feature), decltype(mask)>,
               p.result.n * p.groups * cut.tiles * cut.chunks, kBlock, 0, p, cut);
    });
}

}  // namespace

const char* not_for_reassemble_down2_nchw(const Problem& p) {
    if (p.factor.up != 1 || p.factor.down != kDown) return "the factor is not 1/2";
    if (p.kernel_size != 3 && p.kernel_size != 5) return "kernel_size is not 3 or 5";
    if (p.features.dtype == CARAFEPP_FLOAT64) return "features are float64";
    if (p.features.h > INT32_MAX - 8 || p.features.w > INT32_MAX - 8) return "rows or columns are too many";
    if (p.features.stride_w != 1 || (!p.result.empty() && p.result.stride_w != 1)) return "columns are not adjacent";
    if (p.features.w % 2 != 0) return "columns are odd in number";
    for (int64_t stride : {p.features.stride_n, p.features.stride_c, p.features.stride_h}) {
        if (stride % 2 != 0) return "rows are not pairs of columns apart";
    }
    if (reinterpret_cast<uintptr_t>(p.features.data) % static_cast<uintptr_t>(2 * itemsize(p.features.dtype)) != 0)
        return "features are not aligned to pairs of columns";
    return nullptr;
}

void reassemble_down2_nchw(const Problem& p) { p.kernel_size == 3 ? run<3>(p) : run<5>(p); }

}  // namespace carafepp::cuda
