// SPDX-License-Identifier: Apache-2.0
#include "cuda.h"

namespace carafepp::cuda {

const char* unavailable() {
    return "carafepp was built without CUDA, and its CUDA kernels are not written yet. Copy the arrays to the CPU";
}

}  // namespace carafepp::cuda
