"""Arrays with another label in DLPack: a dtype or a device that their library cannot export.

NumPy and older CuPy export no bfloat16: its bits are uint16 arrays. A rehearsal labels host memory
as CUDA memory, for kernels that are emulated on the CPU.
"""

import ctypes
from typing import Any

CUDA = 2  # kDLCUDA
BFLOAT = 4  # kDLBfloat

# Offsets in bytes of the DLTensor within a capsule, and of fields within the DLTensor.
_TENSOR = {b"dltensor": 0, b"dltensor_versioned": 32}
_DEVICE_TYPE, _DTYPE_CODE = 8, 20

_name = ctypes.pythonapi.PyCapsule_GetName
_name.restype, _name.argtypes = ctypes.c_char_p, (ctypes.py_object,)
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


class Relabelled:
    """An array that exports another device type or dtype code.

    Parameters
    ----------
    array : Any
        Exports itself by DLPack; bfloat16 as uint16.
    dtype : str
        The dtype of the elements.
    on_cuda : bool
        Label the memory as a CUDA device's.
    """

    def __init__(self, array: Any, dtype: str, on_cuda: bool):
        self.array, self.dtype, self.shape = array, dtype, tuple(array.shape)
        self.device = "cuda:0"
        self._on_cuda = on_cuda

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the device type and number."""
        return (CUDA, 0) if self._on_cuda else self.array.__dlpack_device__()

    def __dlpack__(self, **options: Any) -> Any:
        """Return the array's capsule with the new labels; host memory has no stream."""
        if self._on_cuda:
            options.pop("stream", None)
        try:
            capsule = self.array.__dlpack__(**options)
        except TypeError:  # a library without versions
            options.pop("max_version", None)
            capsule = self.array.__dlpack__(**options)
        name = _name(capsule)
        tensor = _pointer(capsule, name) + _TENSOR[name]
        if self._on_cuda:
            ctypes.c_int32.from_address(tensor + _DEVICE_TYPE).value = CUDA
        if self.dtype == "bfloat16":
            ctypes.c_uint8.from_address(tensor + _DTYPE_CODE).value = BFLOAT
        return capsule
