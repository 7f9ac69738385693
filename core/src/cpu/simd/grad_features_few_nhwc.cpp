// SPDX-License-Identifier: Apache-2.0
//
// The gradient of features of groups of one channel, with adjacent channels, compiled once for each instruction set.
// Each mask is staged for one product. So an item scatters: it adds each output that touches its sources to their sums,
// in the order of the outputs, however the sources are shared among items.
#include "cpu/simd/few_nhwc.h"
#include "cpu/simd/kernels.h"
#include "cpu/simd/nhwc_windows.h"
#include "cpu/simd/work_items.h"

namespace carafepp::CARAFEPP_ISA {
namespace {

constexpr int64_t kSumsBytes = 256 * 1024;  // of an item, part of a level 2 cache

template <class T>
struct GradFeaturesFewNhwc {
    using A = Accumulator<T>;
    static constexpr int L = kLanes<A>;

    const Problem& p;
    const Array& grad_features;
    const ChannelCells<A> cells{p, false};
    const int64_t row_size = p.features.w * L;  // [column][lane]
    const int64_t vectors = ceil_div(p.groups, L);
    const int64_t block_rows = rows_of_block();
    const int64_t blocks = ceil_div(p.features.h, block_rows);
    const int64_t items = grad_features.n * vectors * blocks;
    const int64_t scratch_size = cells.tile_size + block_rows * row_size;

    // Blocks share rows of outputs, whose masks are staged for each: few blocks, if there are enough for all threads.
    int64_t rows_of_block() const {
        const int64_t shares = ceil_div(threads_worth<A>(p), grad_features.n * vectors);
        const int64_t most = std::min(kSumsBytes / (row_size * int64_t{sizeof(A)}), ceil_div(p.features.h, shares));
        return share_size(p.features.h, most);
    }

    // Some rows of sources in a vector of channels.
    void run_item(int64_t item, A* tile) const {
        const int64_t n = item / blocks / vectors, begin = item % blocks * block_rows;
        const Range sources{begin, std::min(begin + block_rows, p.features.h)};
        const int vector = static_cast<int>(item / blocks % vectors) * L, groups = static_cast<int>(p.groups);
        const int first = groups < L ? 0 : std::min(vector, groups - L), count = std::min(groups, L);
        A* const sums = tile + cells.tile_size;  // [row][column][lane]
        std::fill_n(sums, sources.size() * row_size, A{0});
        const Range outputs = outputs_of(p, sources);
        for (int64_t row = outputs.begin / cells.up; row * cells.up < outputs.end; row++) {
            for (int64_t column = 0; column < cells.columns; column++) {
                cells.stage(n, row, column, first, count, tile);
                cells.for_each_output(row, column, [&](int64_t i, int64_t j, int64_t o) {
                    const T* const grad_output = element<const T>(p.grad_output, n, first, i, j);
                    scatter(i, j, tile + o * L, load_part(grad_output, count), sources, sums);
                });
            }
        }
        for (int64_t i = sources.begin; i < sources.end; i++) {
            const A* sum = sums + (i - sources.begin) * row_size;
            for (int64_t j = 0; j < p.features.w; j++, sum += L)
                store_part(load(sum), element<T>(grad_features, n, first, i, j), count);
        }
    }

    CARAFEPP_MEMBER void scatter(int64_t i, int64_t j, const A* masks, Vector<A> grad_output, Range sources,
                                 A* sums) const {
        const int64_t k = p.kernel_size, step = cells.outputs * L;
        const int64_t top = p.rows().source(i) - p.radius(), left = p.columns().source(j) - p.radius();
        const int64_t b_begin = std::max<int64_t>(-left, 0), b_end = std::min(k, p.features.w - left);
        for (int64_t a = std::max<int64_t>(sources.begin - top, 0); a < std::min(k, sources.end - top); a++) {
            A* sum = sums + (top + a - sources.begin) * row_size + (left + b_begin) * L;
            const A* mask = masks + (a * k + b_begin) * step;
            for (int64_t b = b_begin; b < b_end; b++, sum += L, mask += step)
                store(load(sum) + load(mask) * grad_output, sum);
        }
    }
};

}  // namespace

void grad_features_few_nhwc(const Problem& problem, const Array& grad_features) {
    if (phases_in_lanes(problem)) return phases_nhwc(problem, grad_features, kGradFeatures);
    run_kernel<GradFeaturesFewNhwc>(problem, grad_features);
}

}  // namespace carafepp::CARAFEPP_ISA
