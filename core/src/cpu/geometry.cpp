// SPDX-License-Identifier: Apache-2.0
#include "cpu/geometry.h"

namespace carafepp {

Columns::Columns(const Problem& problem, int64_t all_phases)
    : up(problem.factor.up),
      down(problem.factor.down),
      kernel_size(problem.kernel_size),
      phases(all_phases),
      width(problem.features.w),
      out_width(problem.out_w),
      cells(ceil_div(out_width, up)),
      least_shift(static_cast<int>(floor_div(problem.offset_w - problem.radius(), down))),
      most_shift(static_cast<int>(
          floor_div(problem.columns().source(std::max<int64_t>(phases - 1, 0)) + problem.radius(), down))),
      inside{INT64_MIN, INT64_MAX} {
    table.reserve(static_cast<size_t>(phases * kernel_size));
    for (int64_t phase = 0; phase < phases; phase++) {
        for (int64_t b = 0; b < kernel_size; b++) {
            const int64_t column = problem.columns().source(phase) + b - problem.radius();
            const int64_t residue = floor_mod(column, down), shift = floor_div(column, down);
            table.push_back({static_cast<int>(residue), static_cast<int>(shift), {-shift, sources(residue) - shift}});
            inside = {std::max(inside.begin, table.back().inside.begin), std::min(inside.end, table.back().inside.end)};
        }
    }
}

Columns::~Columns() = default;

CellWindows::CellWindows(const Factor& factor, int64_t phases)
    : count(static_cast<int>(shared_windows_in(factor, phases))) {
    for (int w = 0; w < count; w++) windows[w] = shared_window(factor, w, phases);
}

}  // namespace carafepp
