// SPDX-License-Identifier: Apache-2.0
#include "cpu/mask_blocks.h"

#include "cpu/parallel.h"
#include "cpu/simd/kernels.h"

namespace carafepp {

// Elements of a block, in the level 2 cache: as long is each stream of masks. Elements of a channel, in the level 1
// cache.
constexpr int64_t kBlockSums = 16 * 1024, kChannelSums = 4096;

int64_t rows_of_block(const Problem& p, int64_t vector, int64_t rows, int64_t most, int64_t groups_of_images) {
    const int64_t threads = threads_for(INT32_MAX, p.cost() / static_cast<double>(vector));
    const int64_t fewest = threads > 1 ? ceil_div(4 * threads, groups_of_images) : 1;
    return share_size(rows, std::min(std::max<int64_t>(most, 1), ceil_div(rows, fewest)));
}

MaskBlocks::MaskBlocks(const Problem& problem, int64_t vector, bool staged)
    : p(problem), up(p.factor.up), down(p.factor.down), k(p.kernel_size), channels(p.features.c / p.groups) {
    columns = share_size(std::max<int64_t>(ceil_div(p.out_w, up), 1), kFewColumns / up) * up;
    column_blocks = ceil_div(p.out_w, columns);
    lanes = ceil_div(columns, vector) * vector;
    together = k <= 3 ? k : 1;
    residues = std::min(down, k);
    residue_stride = ceil_div(lanes + (k - 1) / down * up, vector) * vector;
    sources_row = residues * residue_stride;
    const int64_t fewest_channels = std::max<int64_t>(channels, 1);
    const int64_t most_sums = staged ? kChannelSums : std::max(kBlockSums / fewest_channels, kChannelSums);
    const int64_t rows_of_sums = std::min(most_sums, kBlockFeatures / fewest_channels) / lanes;
    const int64_t rows_of_features = kBlockFeatures / std::max<int64_t>(channels * sources_row, 1) - k;
    const int64_t images = p.features.n * p.groups * column_blocks;
    rows = rows_of_block(p, vector, p.out_h, std::min(rows_of_sums, rows_of_features * up / down), images);
    row_blocks = ceil_div(p.out_h, rows);
    items = images * row_blocks;
    sources_channel = (p.factor.source(rows - 1) + k + 1) * sources_row;
    row_columns = ceil_div(p.factor.source(residue_stride) + k, vector) * vector + vector;
}

MaskBlock MaskBlocks::block(int64_t item) const {
    const int64_t column = item % column_blocks * columns, of_columns = item / column_blocks;
    const int64_t row = of_columns % row_blocks * rows, of_rows = of_columns / row_blocks;
    return {of_rows / p.groups,
            of_rows % p.groups,
            {row, std::min(row + rows, p.out_h)},
            {column, std::min(column + columns, p.out_w)}};
}

Range MaskBlocks::inside(int64_t b, Range some) const {
    return {p.columns().first_output(p.radius() - b) - some.begin,
            std::min(p.columns().first_output(p.features.w + p.radius() - b), some.end) - some.begin};
}

}  // namespace carafepp
