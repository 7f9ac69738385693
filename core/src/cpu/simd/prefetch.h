// SPDX-License-Identifier: Apache-2.0
// Prefetches the rows that a kernel stages next, some lines at a time. Its arithmetic in between hides the wait.
#pragma once

#include <algorithm>

#include "cpu/simd/vector.h"

namespace carafepp::CARAFEPP_ISA {

// Rows of some channels, for the level 2 cache. The processor's own prefetching ends with a page.
struct RowPrefetch {
    const char* row = nullptr;  // the current one
    int64_t at = 0, row_bytes = 0;
    int64_t row_stride = 0, channel_stride = 0;  // bytes; from the last row of a channel to the next one's first
    int rows = 0, channels = 0;                  // rows of a channel, channels that are left
    int row_index = 0;

    RowPrefetch() = default;

    RowPrefetch(const Array& array, int64_t n, int64_t channel, int64_t first_row, int64_t column, int64_t columns,
                int64_t rows_of_channel, int64_t channel_count)
        : rows(static_cast<int>(rows_of_channel)), channels(static_cast<int>(channel_count)) {
        const int64_t size = itemsize(array.dtype);
        row = element<const char>(array, 0, 0, 0, 0) + size * (n * array.stride_n + channel * array.stride_c +
                                                               first_row * array.stride_h + column * array.stride_w);
        row_bytes = columns * array.stride_w * size;
        row_stride = array.stride_h * size;
        channel_stride = array.stride_c * size - (rows - 1) * row_stride;
        if (array.stride_c == 1) channels = std::min(channels, 1);  // they share their rows
        if (rows <= 0 || columns <= 0) channels = 0;
        if (row_stride == row_bytes) {  // adjacent rows are one row
            row_bytes *= rows;
            channel_stride += (rows - 1) * row_stride;
            rows = 1;
        }
    }

    int64_t lines() const { return int64_t{channels} * rows * ((row_bytes + 63) / 64); }

    // Prefetches some lines; returns how many of them are not there.
    __attribute__((noinline)) int64_t prefetch_lines(int64_t lines) {
        while (lines > 0 && channels > 0) {
            const int64_t here = std::min(lines, (row_bytes - at + 63) / 64);
            lines -= here;
            const char *line = row + at, *const end = line + 64 * here;
            for (; line + 256 <= end; line += 256) {
#pragma GCC unroll 4
                for (int k = 0; k < 4; k++) __builtin_prefetch(line + 64 * k, 0, 2);
            }
#pragma GCC unroll 1
            for (; line < end; line += 64) __builtin_prefetch(line, 0, 2);
            at += 64 * here;
            if (at >= row_bytes) step_to_next_row();
        }
        return lines;
    }

private:
    __attribute__((always_inline)) void step_to_next_row() {
        at = 0;
        if (++row_index < rows) {
            row += row_stride;
        } else {
            row_index = 0;
            row += channel_stride;
            channels--;
        }
    }
};

}  // namespace carafepp::CARAFEPP_ISA
