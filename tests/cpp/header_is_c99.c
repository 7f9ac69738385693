/* SPDX-License-Identifier: Apache-2.0
 * The public header compiles as C99 -Wpedantic, and its layout is what the ABI promises. */
#include "carafepp/carafepp.h"

/* C99 has no static assertion: an array of negative size stands in for one. */
#define PROMISE(name, condition) typedef char name[(condition) ? 1 : -1]

PROMISE(status_is_four_bytes, sizeof(carafepp_status) == 4);
PROMISE(tensor_data_first, offsetof(carafepp_tensor, data) == 0);
PROMISE(tensor_dtype, offsetof(carafepp_tensor, dtype) == 8);
PROMISE(tensor_shape, offsetof(carafepp_tensor, shape) == 24);
PROMISE(tensor_strides, offsetof(carafepp_tensor, strides) == 64);
PROMISE(tensor_size, sizeof(carafepp_tensor) == 104);
PROMISE(params_struct_size_first, offsetof(carafepp_params, struct_size) == 0);
PROMISE(params_up, offsetof(carafepp_params, up) == 8);
PROMISE(params_flags, offsetof(carafepp_params, flags) == 28);
PROMISE(params_implementation, offsetof(carafepp_params, implementation) == 32);
PROMISE(params_size, offsetof(carafepp_params, size) == 40);
PROMISE(params_total, sizeof(carafepp_params) == 88);

int header_is_c99(void);
int header_is_c99(void) { return carafepp_abi_version(); }
