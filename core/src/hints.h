// SPDX-License-Identifier: Apache-2.0
// Hints at what the caller of a refused call may have meant. The check accepts the call that a hint makes.
#pragma once

#include <string>

#include "call.h"

namespace carafepp {

// A sentence that begins with a space, or nothing, for a call that the check refused with a status. It is about the
// inputs. `params` were found right by themselves; `tensors` are in the order of the signature.
std::string hint(carafepp_status status, carafepp_function function, const carafepp_params& params,
                 const carafepp_tensor* const* tensors);

}  // namespace carafepp
