// SPDX-License-Identifier: Apache-2.0
// Tensor maps describe boxes of an array to a device, for the copies of boxes.h.
#pragma once

#include <cuda.h>

#include "cuda/boxes.h"
#include "cuda/platform.h"

namespace carafepp::cuda {

// An axis of an array, the innermost first, and the elements that a box has along it.
struct AxisOfBox {
    int64_t size, stride;  // in elements
    int box;
};

// Describes boxes of an array. The answer is false where no device can copy them, or this driver does not know them.
bool describe_boxes(const Array& array, const AxisOfBox (&axes)[4], CUtensorMap* map);

// Boxes of columns x rows x channels.
inline bool describe_boxes_of_columns(const Array& array, int columns, int rows, int channels, CUtensorMap* map) {
    return describe_boxes(array,
                          {{array.w, array.stride_w, columns},
                           {array.h, array.stride_h, rows},
                           {array.c, array.stride_c, channels},
                           {array.n, array.stride_n, 1}},
                          map);
}

}  // namespace carafepp::cuda
