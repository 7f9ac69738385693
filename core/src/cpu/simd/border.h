// SPDX-License-Identifier: Apache-2.0
// Taps beyond the border of a tile of neighbouring cells.
#pragma once

#include "cpu/geometry.h"
#include "cpu/simd/vector.h"

namespace carafepp::CARAFEPP_ISA {

// Zeroes the lanes of a phase of a tile whose tap reads beyond the border. Lane 0 is `cell`. Tap t is at
// `lanes + t*tap_step`.
template <class A>
CARAFEPP_INLINE void zero_phase_outside(const Columns& columns, int64_t phase, int64_t cell, A* lanes,
                                        int64_t tap_step) {
    constexpr int64_t L = kLanes<A>;
    if (cell >= columns.inside.begin && cell + L <= columns.inside.end) return;
    const int64_t k = columns.kernel_size;
    for (int64_t b = 0; b < k; b++) {
        const Range& inside = columns.tap(phase, b).inside;
        const int64_t begin = std::clamp<int64_t>(inside.begin - cell, 0, L);
        const int64_t end = std::clamp<int64_t>(inside.end - cell, begin, L);
        if (begin == 0 && end == L) continue;
        for (int64_t a = 0; a < k; a++) {
            A* const tap = lanes + (a * k + b) * tap_step;
            store(load_between(tap, static_cast<int>(begin), static_cast<int>(end)), tap);
        }
    }
}

// The same for a row of a tile, [tap][phase][lane].
template <class A>
CARAFEPP_INLINE void zero_taps_outside(const Columns& columns, int64_t cell, A* row) {
    constexpr int64_t L = kLanes<A>;
    if (cell >= columns.inside.begin && cell + L <= columns.inside.end) return;
    for (int64_t phase = 0; phase < columns.phases; phase++)
        zero_phase_outside(columns, phase, cell, row + phase * L, columns.phases * L);
}

}  // namespace carafepp::CARAFEPP_ISA
