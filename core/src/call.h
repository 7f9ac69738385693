// SPDX-License-Identifier: Apache-2.0
// The check of a call, with the sentences for wrong arguments. Kernels include problem.h alone: <string> takes most of
// a second of each CUDA source's compilation.
#pragma once

#include <string>

#include "problem.h"

namespace carafepp {

struct Error {
    carafepp_status status;
    std::string message;
};

// The public name of a function without its prefix; it stands in brackets before a sentence.
const char* function_name(carafepp_function function);

// How many arrays a function of arrays reads, and the name of its argument k.
int inputs_of(carafepp_function function);
const char* argument_name(carafepp_function function, int k);

std::string dtype_name(carafepp_dtype dtype);

// A checked call: the problem, and the results that its function writes, in the order of its signature.
struct Call {
    carafepp_params params;  // as the current version
    Problem problem;
    Array results[2];
    bool wanted[2] = {false, false};
};

// Checks every argument of a call; throws Error with the sentence for the caller. `tensors` are in the order of the
// signature. Without `results_required` results may be NULL, while they are not known: each has the shape, the dtype
// and the order of memory that it would have.
// A refused call gets a hint (hints.h).
Call check_call(carafepp_function function, const carafepp_params* params, const carafepp_tensor* const* tensors,
                bool results_required);

// The part of check_call that comes after the params, without hints.
Call check_arrays(carafepp_function function, const carafepp_params& params, const carafepp_tensor* const* tensors,
                  bool results_required);

// Fills shape[0 .. input->ndim) as carafepp_output_shape promises.
void output_shape(carafepp_function function, const carafepp_params* params, const carafepp_tensor* input,
                  int64_t* shape);

}  // namespace carafepp
