// SPDX-License-Identifier: Apache-2.0
// Tells if strided arrays share memory. The answer is exact: slices of one buffer may interleave without a collision.
#pragma once

#include "problem.h"

namespace carafepp {

// True if an element of a and one of b share a byte. Also true if an exact answer would take too long: for strides that
// no slice of a dense array has.
bool share_memory(const Array& a, const Array& b);

// True if two different indices of a name the same element; likewise.
bool overlaps_itself(const Array& a);

}  // namespace carafepp
