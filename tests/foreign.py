"""Arrays built by hand that speak DLPack, over the memory of NumPy arrays."""

import ctypes
import types

import numpy as np

FLOAT, BFLOAT = 2, 4
CPU, CUDA, CUDA_HOST, ROCM, CUDA_MANAGED = 1, 2, 3, 10, 13
READ_ONLY = 1


class DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class DLManagedTensor(ctypes.Structure):
    _fields_ = (
        ("dl_tensor", DLTensor),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class DLManagedTensorVersioned(ctypes.Structure):
    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("dl_tensor", DLTensor),
    )


def _capsule(managed: ctypes.Structure, name: bytes):
    new = ctypes.pythonapi.PyCapsule_New
    new.restype = ctypes.py_object
    new.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    return new(ctypes.addressof(managed), name, None)


class Foreign:
    """An array of any device, dtype and strides; `asked` lists the options of its exports."""

    def __init__(
        self,
        array,
        *,
        device=(CPU, 0),
        code=None,
        strides=True,
        byte_offset=0,
        lanes=1,
        read_only=False,
    ):
        self.array, self.dlpack_device, self.asked = array, device, []
        self.shape, self.read_only = array.shape, read_only
        if code is None:
            code = BFLOAT if array.dtype.name == "bfloat16" else FLOAT
        extents = ctypes.c_int64 * array.ndim
        self.extents = extents(*array.shape)
        self.steps = extents(*(stride // array.itemsize for stride in array.strides))
        tensor = DLTensor(
            array.ctypes.data - byte_offset,
            *device,
            array.ndim,
            code,
            8 * array.itemsize,
            lanes,
            self.extents,
            self.steps if strides else None,
            byte_offset,
        )
        self.managed = DLManagedTensor(tensor, None, None)
        flags = READ_ONLY if read_only else 0
        self.versioned = DLManagedTensorVersioned(1, 0, None, None, flags, tensor)

    def __dlpack_device__(self):
        return self.dlpack_device

    def __dlpack__(self, **options):
        self.asked.append(options)
        if options.get("max_version", (0, 0))[0] >= 1:
            return _capsule(self.versioned, b"dltensor_versioned")
        if self.read_only:
            raise BufferError("only version 1 of DLPack can tell that an array is read-only")
        return _capsule(self.managed, b"dltensor")


class PretendedCUDA(Foreign):
    """Host memory that says it is a CUDA array of a library with a namespace of its own.

    As CuPy up to 14.2, it divides negative strides as numbers without a sign.
    """

    device = "cuda:0"

    def __init__(self, array, **options):
        super().__init__(array, **{"device": (CUDA, 0), **options})
        self.dtype = array.dtype
        for axis, stride in enumerate(array.strides):
            self.steps[axis] = stride % 2**64 // array.itemsize

    def __array_namespace__(self):
        def empty(shape, *, dtype, device):
            assert device == PretendedCUDA.device
            return PretendedCUDA(np.full(shape, np.nan, dtype))

        return types.SimpleNamespace(empty=empty)
