// SPDX-License-Identifier: Apache-2.0
// Whether strided arrays share memory: exact, so that slices which interleave in one buffer are told from ones that
// collide.
#pragma once

#include "problem.h"

namespace carafepp {

// Whether an element of a and one of b share a byte. Where an exact answer would take too long (strides that no slice
// of a dense array has), the answer is yes.
bool share_memory(const Array& a, const Array& b);

// Whether two different indices of a name the same element; likewise.
bool overlaps_itself(const Array& a);

}  // namespace carafepp
