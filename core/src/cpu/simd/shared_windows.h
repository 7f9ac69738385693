// SPDX-License-Identifier: Apache-2.0
// Outputs that read the same window, by rows and by columns: what the kernels compute together. Found once for a call,
// since the divisions would cost as much as a tap in the loops.
#pragma once

#include "cpu/simd/kernels.h"
#include "problem.h"

namespace carafepp {
namespace {

// The output rows [begin, end) centred on the source row `source`.
struct Band {
    int64_t begin, end, source;
};

// How many bands `outputs` rows make; the longest has ceil(up/down) of them.
static inline int64_t bands_in(const Factor& factor, int64_t outputs) {
    return factor.up < factor.down ? outputs : factor.source(outputs - 1) + 1;
}

static inline Band band_of(const Factor& factor, int64_t band, int64_t outputs) {
    if (factor.up < factor.down) return {band, band + 1, factor.source(band)};
    const int64_t end = factor.first_output(band + 1);
    return {factor.first_output(band), end < outputs ? end : outputs, band};
}

// Of the phases of a cell (or of its rows), those centred on one source: `offset` behind the cell's first.
struct Phases {
    struct Group {
        int begin, end, offset;
    };
    Group groups[kMaxFactor];
    int count = 0;

    Phases(const Factor& factor, int64_t phases) {
        for (int phase = 0; phase < phases; phase++) {
            const int offset = static_cast<int>(factor.source(phase));
            if (count == 0 || groups[count - 1].offset != offset) groups[count++] = {phase, phase, offset};
            groups[count - 1].end = phase + 1;
        }
    }
};

}  // namespace
}  // namespace carafepp
