// SPDX-License-Identifier: Apache-2.0
// Blocks of the kernels for few channels in a group, from masks. A block is some rows and columns of the outputs of a
// group. A lane is a column of outputs, so masks are read as they lie. Features are staged for each column instead.
// One tap row of the whole block is read after the other: few streams, each as long as the block.
#pragma once

#include "cpu/geometry.h"
#include "problem.h"

namespace carafepp {

constexpr int64_t kBlockFeatures = 64 * 1024;  // elements of a block; in the level 2 cache

// Rows of a block, at most `most`, while each thread has work. The kernel has vectors of `vector` lanes.
int64_t rows_of_block(const Problem& p, int64_t vector, int64_t rows, int64_t most, int64_t groups_of_images);

struct MaskBlock {
    int64_t n, group;
    Range rows, columns;  // of outputs
};

struct MaskBlocks {
    const Problem& p;
    int64_t up, down, k, channels;                            // of a group
    int64_t rows, row_blocks, columns, column_blocks, items;  // of a block; of an image
    int64_t lanes;                                            // of a row of a block, in whole vectors
    int64_t together;                                         // tap rows that are read together

    // Sources are staged as [channel][row][residue][column of outputs]: the features that tap column `residue` reads.
    // Tap column b reads those of tap column b % down, b / down cells on.
    int64_t residues, residue_stride, sources_row, sources_channel;
    int64_t row_columns;  // of a row of features, before its columns are repeated

    // A row has whole vectors of `vector` lanes. Blocks are smaller if the masks of their tap rows are staged.
    MaskBlocks(const Problem& problem, int64_t vector, bool staged);

    MaskBlock block(int64_t item) const;

    // The row of features, perhaps beyond the border, that the first tap row of an output reads.
    int64_t top(int64_t row) const { return p.rows().source(row) - p.radius(); }

    // Columns of a block in which a tap column reads a column of the row.
    Range inside(int64_t b, Range columns) const;

    int64_t tap_offset(int64_t b) const { return b % down * residue_stride + b / down * up; }
};

}  // namespace carafepp
