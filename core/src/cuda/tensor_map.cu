// SPDX-License-Identifier: Apache-2.0
#include "cuda/tensor_map.h"

namespace carafepp::cuda {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function, or NULL. So nobody links against the driver.
static Encode find_encode() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    constexpr char kName[] = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
    constexpr unsigned kVersion = 12000;  // of CUDA, that has it first
    const cudaError_t error = cudaGetDriverEntryPointByVersion(kName, &function, kVersion, cudaEnableDefault, &found);
#else
    const cudaError_t error = cudaGetDriverEntryPoint(kName, &function, cudaEnableDefault, &found);
#endif
    if (error != cudaSuccess) cudaGetLastError();  // or a caller would find it and think it its own
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

bool describe_boxes(const Array& array, const AxisOfBox (&axes)[4], CUtensorMap* map) {
    constexpr int kAlignment = 16;
    const int64_t bytes = itemsize(array.dtype);
    cuuint64_t sizes[4], strides[4];
    cuuint32_t box[4], element_strides[4];
    if (reinterpret_cast<uintptr_t>(array.data) % kAlignment != 0) return false;
    if (axes[0].stride != 1 || axes[0].box * bytes % kAlignment != 0) return false;
    for (int axis = 0; axis < 4; axis++) {
        const auto& [size, own_stride, of_box] = axes[axis];
        const int64_t stride = axis > 0 && size == 1 ? kAlignment : own_stride;  // which nobody asks for
        if (size < 1 || size > INT32_MAX || stride < 1 || stride >= (int64_t{1} << 40) / bytes) return false;
        if (axis > 0 && stride * bytes % kAlignment != 0) return false;
        sizes[axis] = static_cast<cuuint64_t>(size);
        strides[axis] = static_cast<cuuint64_t>(stride * bytes);
        box[axis] = static_cast<cuuint32_t>(of_box);
        element_strides[axis] = 1;
    }
    static const Encode encode = find_encode();
    return encode != nullptr &&
           encode(map, bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_UINT16 : CU_TENSOR_MAP_DATA_TYPE_UINT32, 4, array.data,
                  sizes, strides + 1, box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                  CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace carafepp::cuda
