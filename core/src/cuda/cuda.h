// SPDX-License-Identifier: Apache-2.0
// What the entry points know of CUDA. A build without it has the same symbols, from no_cuda.cpp.
#pragma once

namespace carafepp::cuda {

// Why no CUDA tensor can be computed on, or NULL where they can.
const char* unavailable();

}  // namespace carafepp::cuda
