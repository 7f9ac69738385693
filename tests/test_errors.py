"""Every sentence that a wrong call gets, and that nothing is written by one.

cpp/test_core.cpp tests mistakes that only C can make: NULL, struct_size, negative shapes.
"""

import ctypes
import re

import numpy as np
import pytest

import carafepp

F32 = np.float32


def zeros(*shape: int, dtype=F32) -> np.ndarray:
    return np.zeros(shape, dtype)


X = zeros(2, 4, 3, 5)
M = zeros(2, 9, 6, 10)
L = zeros(2, 36, 3, 5)
D = zeros(2, 4, 6, 10)
LOGITS = {"up": 2, "kernel_size": 3}


class Calls:
    """The functions on arguments that are right, but for those that a test replaces."""

    @staticmethod
    def reassemble(features=X, masks=M, **options):
        return carafepp.reassemble(features, masks, **{"up": 2, **options})

    @staticmethod
    def reassemble_backward(grad_output=D, features=X, masks=M, **options):
        return carafepp.reassemble_backward(grad_output, features, masks, **{"up": 2, **options})

    @staticmethod
    def reassemble_with_logits(features=X, logits=L, **options):
        return carafepp.reassemble_with_logits(features, logits, **{**LOGITS, **options})

    @staticmethod
    def reassemble_with_logits_backward(grad_output=D, features=X, logits=L, **options):
        return carafepp.reassemble_with_logits_backward(
            grad_output, features, logits, **{**LOGITS, **options}
        )

    @staticmethod
    def normalize_masks(logits=L, **options):
        return carafepp.normalize_masks(logits, **{**LOGITS, **options})

    @staticmethod
    def normalize_masks_backward(grad_masks=M, logits=L, **options):
        return carafepp.normalize_masks_backward(grad_masks, logits, **{**LOGITS, **options})


def test_the_calls_are_right_before_anything_is_replaced():
    for name in (name for name in vars(Calls) if not name.startswith("_")):
        getattr(Calls, name)()


def refused(exception, beginning: str):
    return pytest.raises(exception, match=re.escape(beginning))


def misaligned(array: np.ndarray) -> np.ndarray:
    """The same values one byte off, as a view that hides it from NumPy's own checks."""
    buffer = np.zeros(array.nbytes + 1, np.uint8)
    copy = np.ndarray(array.shape, array.dtype, buffer, offset=1)
    copy[...] = array
    return copy


def strided(array: np.ndarray, strides: tuple[int, ...]) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(array, strides=strides)


# (function, replaced arguments, exception, sentence without its "[function] ")
WRONG = {
    # not an array
    "list": ("reassemble", {"features": [[1.0]]}, TypeError,
             "features must be an array: of NumPy, PyTorch or another library that speaks DLPack; "
             "got list."),
    "none": ("reassemble", {"masks": None}, TypeError,
             "masks must be an array: of NumPy, PyTorch or another library that speaks DLPack; "
             "got NoneType."),
    "scalar": ("normalize_masks", {"logits": np.float32(1)}, TypeError,
               "logits must be an array: of NumPy, PyTorch or another library that speaks DLPack; "
               "got float32."),
    "masked array": ("reassemble", {"features": np.ma.masked_array(X)}, TypeError,
                     "features must not be a masked array: its mask would be lost."),
    "byte order": ("reassemble", {"features": X.astype(">f4")}, TypeError,
                   "features must be an array that DLPack can describe (a plain dtype in the byte "
                   "order of this machine, strides of whole elements); got ndarray."),
    "half strides": ("reassemble", {"features": strided(X, (2, 2, 2, 2))}, TypeError,
                     "features must be an array that DLPack can describe (a plain dtype in the "
                     "byte order of this machine, strides of whole elements); got ndarray."),
    # dtypes
    "int32": ("reassemble", {"features": X.astype(np.int32)}, TypeError,
              "features must be float32, float64, float16 or bfloat16; got int32."),
    "uint16 is not bfloat16": ("reassemble", {"features": X.astype(np.uint16)}, TypeError,
                               "features must be float32, float64, float16 or bfloat16; "
                               "got uint16."),
    "bool": ("reassemble", {"masks": M.astype(bool)}, TypeError,
             "masks must be float32, float64, float16 or bfloat16; got bool."),
    "complex": ("normalize_masks", {"logits": L.astype(np.complex64)}, TypeError,
                "logits must be float32, float64, float16 or bfloat16; got complex64."),
    "mixed": ("reassemble", {"masks": M.astype(np.float64)}, TypeError,
              "masks must have the dtype of features, float32; got float64."),
    "half masks": ("reassemble", {"masks": M.astype(np.float16)}, TypeError,
                   "masks must have the dtype of features, float32; got float16."),
    "half features": ("reassemble_with_logits", {"features": X.astype(np.float16),
                                                 "logits": L.astype(np.float64)}, TypeError,
                      "logits must have the dtype of features, float16, or float32; "
                      "got float64."),
    "grad_output": ("reassemble_backward", {"grad_output": D.astype(np.float64)}, TypeError,
                    "grad_output must have the dtype of features, float32; got float64."),
    "grad_masks": ("normalize_masks_backward", {"grad_masks": M.astype(np.float16)}, TypeError,
                   "grad_masks must have the dtype of logits, float32; got float16."),
    "out dtype": ("reassemble", {"out": zeros(2, 4, 6, 10, dtype=np.float64)}, TypeError,
                  "out must have the dtype of features, float32; got float64."),
    "out dtype of masks": ("normalize_masks", {"out": M.astype(np.float64)}, TypeError,
                           "out must have the dtype of logits, float32; got float64."),
    # ranks
    "two axes": ("reassemble", {"features": zeros(3, 5)}, ValueError,
                 "features must have 4 axes (N, C, H, W) or 3 (C, H, W); got 2."),
    "six axes": ("reassemble", {"features": zeros(1, 1, 1, 1, 1, 1)}, ValueError,
                 "features must have 4 axes (N, C, H, W) or 3 (C, H, W); got 6."),
    "two axes, channels last": ("reassemble", {"features": zeros(3, 5), "layout": "NHWC"},
                                ValueError,
                                "features must have 4 axes (N, H, W, C) or 3 (H, W, C); got 2."),
    "batch of masks alone": ("reassemble", {"features": X[0]}, ValueError,
                             "masks must have as many axes as features, 3; got 4."),
    "out without batch": ("reassemble", {"out": zeros(4, 6, 10)}, ValueError,
                          "out must have as many axes as features, 4; got 3."),
    # shapes
    "masks channels": ("reassemble", {"masks": zeros(2, 75, 6, 10), "groups": 2}, ValueError,
                       "masks must have groups*kernel_size**2 channels with an odd kernel_size "
                       "from 1 to 31; got 75 channels, groups=2."),
    "even kernel": ("reassemble", {"masks": zeros(2, 16, 6, 10), "up": 1, "features": D},
                    ValueError,
                    "masks must have groups*kernel_size**2 channels with an odd kernel_size from "
                    "1 to 31; got 16 channels, groups=1."),
    "kernel of 33": ("reassemble", {"masks": zeros(2, 33 * 33, 6, 10)}, ValueError,
                     "masks must have groups*kernel_size**2 channels with an odd kernel_size from "
                     "1 to 31; got 1089 channels, groups=1."),
    "logits for masks": ("reassemble", {"masks": zeros(2, 36, 3, 5)}, ValueError,
                         "masks must have groups*kernel_size**2 channels with an odd kernel_size "
                         "from 1 to 31; got 36 channels, groups=1."),
    "no mask channels": ("reassemble", {"masks": zeros(2, 0, 6, 10)}, ValueError,
                         "masks must have groups*kernel_size**2 channels with an odd kernel_size "
                         "from 1 to 31; got 0 channels, groups=1."),
    "masks batch": ("reassemble", {"masks": zeros(1, 9, 6, 10)}, ValueError,
                    "masks must have shape (N, groups*kernel_size**2, H', W') = (2, 9, 6, 10); "
                    "got (1, 9, 6, 10)."),
    "masks size": ("reassemble", {"masks": zeros(2, 9, 6, 9)}, ValueError,
                   "masks must have shape (N, groups*kernel_size**2, H', W') = (2, 9, 6, 10); "
                   "got (2, 9, 6, 9)."),
    "masks size, channels last": ("reassemble", {"features": zeros(2, 3, 5, 4),
                                                 "masks": zeros(2, 6, 9, 9), "layout": "NHWC"},
                                  ValueError,
                                  "masks must have shape (N, H', W', groups*kernel_size**2) = "
                                  "(2, 6, 10, 9); got (2, 6, 9, 9)."),
    "masks size, no batch": ("reassemble", {"features": X[0], "masks": zeros(9, 6, 9)}, ValueError,
                             "masks must have shape (groups*kernel_size**2, H', W') = (9, 6, 10); "
                             "got (9, 6, 9)."),
    "empty masks": ("reassemble", {"masks": zeros(2, 9, 0, 10)}, ValueError,
                    "masks must have shape (N, groups*kernel_size**2, H', W') = (2, 9, 6, 10); "
                    "got (2, 9, 0, 10)."),
    "empty features": ("reassemble", {"features": zeros(2, 4, 0, 5)}, ValueError,
                       "masks must have shape (N, groups*kernel_size**2, H', W') = (2, 9, 0, 10); "
                       "got (2, 9, 6, 10)."),
    "empty batch": ("reassemble", {"features": zeros(0, 4, 3, 5)}, ValueError,
                    "masks must have shape (N, groups*kernel_size**2, H', W') = (0, 9, 6, 10); "
                    "got (2, 9, 6, 10)."),
    "masks larger than natural": ("reassemble_backward", {"masks": zeros(2, 9, 7, 10)}, ValueError,
                                  "masks must be at most the natural size (H', W') = "
                                  "(ceil(H*up/down), ceil(W*up/down)) = (6, 10); got (7, 10)."),
    "groups": ("reassemble", {"groups": 3}, ValueError,
               "features must have a number of channels divisible by groups=3; got 4."),
    "logits channels": ("reassemble_with_logits", {"logits": zeros(2, 35, 3, 5)}, ValueError,
                        "logits must have shape (N, groups*kernel_size**2*up**2, ceil(H/down), "
                        "ceil(W/down)) = (2, 36, 3, 5); got (2, 35, 3, 5)."),
    "logits size": ("reassemble_with_logits", {"logits": zeros(2, 9, 3, 5), "up": 1, "down": 2},
                    ValueError,
                    "logits must have shape (N, groups*kernel_size**2*up**2, ceil(H/down), "
                    "ceil(W/down)) = (2, 9, 2, 3); got (2, 9, 3, 5)."),
    "logits batch": ("reassemble_with_logits", {"logits": zeros(3, 36, 3, 5)}, ValueError,
                     "logits must have shape (N, groups*kernel_size**2*up**2, ceil(H/down), "
                     "ceil(W/down)) = (2, 36, 3, 5); got (3, 36, 3, 5)."),
    "logits to normalize": ("normalize_masks", {"logits": zeros(2, 9, 3, 5)}, ValueError,
                            "logits must have shape (N, groups*kernel_size**2*up**2, Hl, Wl) = "
                            "(2, 36, 3, 5); got (2, 9, 3, 5)."),
    "grad_output shape": ("reassemble_backward", {"grad_output": zeros(2, 4, 6, 9)}, ValueError,
                          "grad_output must have shape (N, C, H', W') = (2, 4, 6, 10); "
                          "got (2, 4, 6, 9)."),
    "grad_output size": ("reassemble_with_logits_backward", {"grad_output": zeros(2, 4, 6, 11)},
                         ValueError,
                         "grad_output must be at most the natural size (H', W') = "
                         "(ceil(H*up/down), ceil(W*up/down)) = (6, 10); got (6, 11)."),
    "grad_masks size": ("normalize_masks_backward", {"grad_masks": zeros(2, 9, 7, 10)}, ValueError,
                        "grad_masks must be at most the natural size (H', W') = (Hl*up, Wl*up) = "
                        "(6, 10); got (7, 10)."),
    "grad_masks channels": ("normalize_masks_backward", {"grad_masks": zeros(2, 8, 6, 10)},
                            ValueError,
                            "grad_masks must have shape (N, groups*kernel_size**2, H', W') = "
                            "(2, 9, 6, 10); got (2, 8, 6, 10)."),
    # numbers
    "up 0": ("reassemble", {"up": 0}, ValueError, "up must be at least 1; got 0."),
    "down -1": ("reassemble", {"down": -1}, ValueError, "down must be at least 1; got -1."),
    "groups 0": ("reassemble", {"groups": 0}, ValueError, "groups must be at least 1; got 0."),
    "up None": ("reassemble", {"up": None}, TypeError,
                "up must be an integer; got None (NoneType)."),
    "up 1.5": ("reassemble", {"up": 1.5}, TypeError, "up must be an integer; got 1.5 (float)."),
    "down text": ("reassemble", {"down": "2"}, TypeError,
                  "down must be an integer; got '2' (str)."),
    "up 2**40": ("reassemble", {"up": 2**40}, ValueError,
                 "up must be within 2147483647 of 0; got 1099511627776 (int)."),
    "kernel_size 4": ("reassemble_with_logits", {"kernel_size": 4}, ValueError,
                      "kernel_size must be odd, from 1 to 31; got 4."),
    "kernel_size 33": ("normalize_masks", {"kernel_size": 33}, ValueError,
                       "kernel_size must be odd, from 1 to 31; got 33."),
    "kernel_size 0": ("reassemble_with_logits", {"kernel_size": 0}, ValueError,
                      "kernel_size must be odd, from 1 to 31; got 0."),
    "normalizer": ("reassemble_with_logits", {"normalizer": "tanh"}, ValueError,
                   "normalizer must be one of 'softmax', 'sigmoid', 'sigmoid_normalized', 'none'; "
                   "got 'tanh'."),
    "list of normalizers": ("normalize_masks", {"normalizer": ["none"]}, ValueError,
                            "normalizer must be one of 'softmax', 'sigmoid', 'sigmoid_normalized', "
                            "'none'; got ['none']."),
    "layout": ("reassemble", {"layout": "nhwc"}, ValueError,
               "layout must be 'NCHW' or 'NHWC'; got 'nhwc'."),
    "size too large": ("reassemble", {"size": (6, 11)}, ValueError,
                       "size must be at most the natural size (H', W') = (ceil(H*up/down), "
                       "ceil(W*up/down)) = (6, 10); got (6, 11)."),
    "size of masks too large": ("normalize_masks", {"size": (7, 10)}, ValueError,
                                "size must be at most the natural size (H', W') = (Hl*up, Wl*up) "
                                "= (6, 10); got (7, 10)."),
    "size negative": ("reassemble", {"size": (-1, 3)}, ValueError,
                      "size must not be negative; got (-1, 3)."),
    "size number": ("reassemble", {"size": 6}, TypeError,
                    "size must be a pair (H', W') of integers; got 6 (int)."),
    "size triple": ("reassemble", {"size": (1, 2, 3)}, TypeError,
                    "size must be a pair (H', W') of integers; got (1, 2, 3) (tuple)."),
    "padding too large": ("reassemble", {"padding": 2}, ValueError,
                          "padding must be from 0 to kernel_size // 2 = 1; got (2, 2)."),
    "padding negative": ("reassemble_with_logits_backward", {"padding": (0, -1)}, ValueError,
                         "padding must be from 0 to kernel_size // 2 = 1; got (0, -1)."),
    "padding beyond 64 bits": ("reassemble", {"padding": 2**63}, ValueError,
                               "padding must be within 9223372036854775807 of 0; "
                               "got 9223372036854775808 (int)."),
    "padding 0.5": ("reassemble_backward", {"padding": 0.5}, TypeError,
                    "padding must be an integer or a pair (rows, columns) of integers, from 0 to "
                    "kernel_size // 2; got 0.5 (float)."),
    "padding True": ("reassemble_with_logits", {"padding": (0, True)}, TypeError,
                     "padding must be an integer or a pair (rows, columns) of integers, from 0 to "
                     "kernel_size // 2; got (0, True) (tuple)."),
    "padding triple": ("reassemble", {"padding": [1, 0, 1]}, TypeError,
                       "padding must be an integer or a pair (rows, columns) of integers, from 0 "
                       "to kernel_size // 2; got [1, 0, 1] (list)."),
    "masks of another padding": ("reassemble", {"padding": 0}, ValueError,
                                 "masks must have shape (N, groups*kernel_size**2, H', W') = "
                                 "(2, 9, 2, 6); got (2, 9, 6, 10)."),
    "logits of another padding": ("reassemble_with_logits", {"padding": (1, 0)}, ValueError,
                                  "logits must have shape (N, groups*kernel_size**2*up**2, "
                                  "ceil(h/down), ceil(w/down)) = (2, 36, 3, 3); got (2, 36, 3, 5). "
                                  "Here h = max(0, H + 2*padding - 2*(kernel_size//2)), and w "
                                  "likewise."),
    "size too large for its padding": ("reassemble", {"size": (6, 10), "padding": (1, 0)},
                                       ValueError,
                                       "size must be at most the natural size (H', W') = "
                                       "(ceil(h*up/down), ceil(w*up/down)) = (6, 6); "
                                       "got (6, 10). Here h = max(0, H + 2*padding - "
                                       "2*(kernel_size//2)), and w likewise."),
    "size empty, masks not": ("reassemble", {"size": (0, 10)}, ValueError,
                              "masks must have shape (N, groups*kernel_size**2, H', W') = "
                              "(2, 9, 0, 10); got (2, 9, 6, 10)."),
    "too large for up": ("reassemble", {"features": np.broadcast_to(F32(0), (1, 1, 1, 2**40)),
                                        "up": 2**30}, ValueError,
                         "features is too large for up=1073741824: positions in the result must "
                         "stay below 2**63; got 1 rows of 1099511627776 columns."),
    "too many channels": ("reassemble_with_logits", {"features": zeros(1, 2**31 - 1, 0, 0),
                                                     "logits": zeros(1, 1, 0, 0),
                                                     "up": 2**31 - 1, "groups": 2**31 - 1},
                          ValueError,
                          "groups*kernel_size**2*up**2 must be below 2**63; got "
                          "groups=2147483647, kernel_size=3, up=2147483647."),
    # memory
    "misaligned": ("reassemble", {"features": misaligned(X)}, ValueError,
                   r"features must be aligned to its 4 byte elements; got the address 0x\w+. "
                   "Pass a copy."),
    # out
    "out shape": ("reassemble", {"out": zeros(2, 4, 6, 9)}, ValueError,
                  "out must have shape (N, C, H', W') = (2, 4, 6, 10); got (2, 4, 6, 9)."),
    "out shape of masks": ("normalize_masks", {"out": zeros(2, 9, 6, 9)}, ValueError,
                           "out must have shape (N, groups*kernel_size**2, H', W') = "
                           "(2, 9, 6, 10); got (2, 9, 6, 9)."),
    "out shape of grad_features": ("reassemble_backward", {"out": (zeros(2, 4, 3, 4), None)},
                                   ValueError,
                                   "out[0] must have shape (N, C, H, W) = (2, 4, 3, 5); "
                                   "got (2, 4, 3, 4)."),
    "out shape of grad_masks": ("reassemble_backward", {"out": (None, zeros(2, 9, 6, 9))},
                                ValueError,
                                "out[1] must have shape (N, groups*kernel_size**2, H', W') = "
                                "(2, 9, 6, 10); got (2, 9, 6, 9)."),
    "out shape of grad_logits": ("reassemble_with_logits_backward",
                                 {"out": (None, zeros(2, 36, 3, 4))}, ValueError,
                                 "out[1] must have shape (N, groups*kernel_size**2*up**2, "
                                 "ceil(H/down), ceil(W/down)) = (2, 36, 3, 5); "
                                 "got (2, 36, 3, 4)."),
    "out not an array": ("reassemble", {"out": 5}, TypeError,
                         "out must be an array: of NumPy, PyTorch or another library that speaks "
                         "DLPack; got int."),
    "out not a pair": ("reassemble_backward", {"out": X}, TypeError,
                       "out must be a pair (grad_features, grad_masks); got ndarray."),
    "out of what is not needed": ("reassemble_backward", {"out": (X, None),
                                                          "need_features": False}, ValueError,
                                  "out must be None for grad_features where need_features is "
                                  "False."),
    "out repeats itself": ("reassemble", {"out": np.broadcast_to(zeros(4, 6, 10), (2, 4, 6, 10))},
                           ValueError, "out must be writable; got a read-only array."),
    "out overlaps itself": ("reassemble", {"out": strided(zeros(2, 4, 6, 10), (960, 240, 40, 0))},
                            ValueError,
                            "out must have one place in memory for each element; its strides "
                            "make some share one. Pass another array."),
}  # fmt: skip

# Hints at the end of some of these sentences; test_hints.py follows them.
HINTS = {
    "int32": "Cast features to float32: features.astype(np.float32).",
    "uint16 is not bfloat16": "Cast features to float32: features.astype(np.float32).",
    "bool": "Cast masks to float32: masks.astype(np.float32).",
    "mixed": "Cast masks to float32: masks.astype(np.float32).",
    "half masks": "Cast masks to float32: masks.astype(np.float32).",
    "half features": "Cast logits to float32: logits.astype(np.float32).",
    "grad_output": "Cast grad_output to float32: grad_output.astype(np.float32).",
    "grad_masks": "Cast grad_masks to float32: grad_masks.astype(np.float32).",
    "logits for masks": "Logits of that shape go to reassemble_with_logits, with kernel_size=3.",
    "groups": "Did you mean groups=1?",
    "logits size": "Did you mean down=1?",
    "logits to normalize": "Did you mean up=1?",
    "padding too large": "Did you mean padding=1?",
    "padding negative": "Did you mean padding=1?",
    "masks of another padding": "Did you mean padding=1?",
    "logits of another padding": "Did you mean padding=1?",
    "size too large for its padding": "Did you mean padding=1?",
}


@pytest.mark.parametrize("name", WRONG)
def test_sentence(name):
    function, replaced, exception, sentence = WRONG[name]
    pattern = sentence if r"\w" in sentence else re.escape(sentence)
    if name in HINTS:
        pattern += re.escape(" " + HINTS[name])
    with pytest.raises(exception) as caught:
        getattr(Calls, function)(**replaced)
    assert type(caught.value) is exception
    assert re.fullmatch(rf"\[{function}\] {pattern}", str(caught.value)), str(caught.value)


@pytest.mark.parametrize("name", [name for name, case in WRONG.items() if "out" not in case[1]])
def test_nothing_is_written_when_a_check_fails(name):
    function, replaced, exception, _ = WRONG[name]
    shapes = {
        "reassemble": (2, 4, 6, 10),
        "reassemble_with_logits": (2, 4, 6, 10),
        "normalize_masks": (2, 9, 6, 10),
        "normalize_masks_backward": (2, 36, 3, 5),
        "reassemble_backward": ((2, 4, 3, 5), (2, 9, 6, 10)),
        "reassemble_with_logits_backward": ((2, 4, 3, 5), (2, 36, 3, 5)),
    }[function]
    pair = isinstance(shapes[0], tuple)
    results = [np.full(shape, 7, F32) for shape in (shapes if pair else [shapes])]
    with pytest.raises(exception):
        getattr(Calls, function)(**replaced, out=tuple(results) if pair else results[0])
    assert all((result == 7).all() for result in results)


def test_out_must_be_writable():
    out = zeros(2, 4, 6, 10)
    out.flags.writeable = False
    with refused(ValueError, "[reassemble] out must be writable; got"):
        Calls.reassemble(out=out)


OVERLAPS = {
    "output on features": ("reassemble", "features", "output"),
    "output on masks": ("reassemble", "masks", "output"),
    "output on logits": ("reassemble_with_logits", "logits", "output"),
    "masks on logits": ("normalize_masks", "logits", "masks"),
    "grad_logits on grad_masks": ("normalize_masks_backward", "grad_masks", "grad_logits"),
}


@pytest.mark.parametrize("name", OVERLAPS)
def test_a_result_must_not_share_memory_with_an_input(name):
    function, argument, result = OVERLAPS[name]
    inputs = {"features": X, "masks": M, "logits": L, "grad_masks": M}
    shapes = {"output": D.shape, "masks": M.shape, "grad_logits": L.shape}
    shape, like = shapes[result], inputs[argument]
    size = int(np.prod(shape))
    buffer = zeros(like.size + size)
    given = buffer[: like.size].reshape(like.shape)
    out = buffer[like.size - 1 :][:size].reshape(shape)  # from the last element of the input on
    sentence = f"[{function}] out must not share memory with {argument}; it does."
    with refused(ValueError, sentence):
        getattr(Calls, function)(**{argument: given}, out=out)
    # One element further it is right.
    out = buffer[like.size :][:size].reshape(shape)
    getattr(Calls, function)(**{argument: given}, out=out)


def test_results_must_not_share_memory_with_each_other():
    buffer = zeros(X.size + M.size - 1)
    grad_features = buffer[: X.size].reshape(X.shape)
    grad_masks = buffer[X.size - 1 :].reshape(M.shape)
    sentence = "[reassemble_backward] out[1] must not share memory with out[0]; it does."
    with refused(ValueError, sentence):
        Calls.reassemble_backward(out=(grad_features, grad_masks))


def test_slices_that_interleave_without_sharing_an_element_are_fine():
    both = np.random.default_rng(1).random((2, 8, 3, 5), F32)
    expected = carafepp.reassemble(both[:, :4].copy(), M[:, :, :3, :5] + 1)
    carafepp.reassemble(both[:, :4], M[:, :, :3, :5] + 1, out=both[:, 4:])
    np.testing.assert_array_equal(both[:, 4:], expected)
    columns = np.zeros((2, 4, 3, 10), F32)
    carafepp.reassemble(columns[..., ::2], M[:, :, :3, :5], out=columns[..., 1::2])


@pytest.mark.parametrize("name", ["", "nonsense", "reassemble"])
def test_an_implementation_must_exist(name):
    sentence = (
        f"[reassemble] implementation must be a name of the list of implementations; got {name}."
    )
    with carafepp.force_implementation(name), refused(ValueError, sentence):
        Calls.reassemble()


def test_list_implementations_checks_like_the_function():
    with pytest.raises(ValueError, match="'nonsense' has no implementations to list"):
        carafepp.list_implementations("nonsense", X)
    with pytest.raises(ValueError, match="'output_size' has no implementations to list"):
        carafepp.list_implementations("output_size", X)
    with pytest.raises(TypeError, match="depend on 2 arrays, those that the function reads; got 1"):
        carafepp.list_implementations("reassemble", X)
    with pytest.raises(ValueError, match="masks must have shape"):
        carafepp.list_implementations("reassemble", X, M)
    with refused(TypeError, "[normalize_masks] padding must be None: there are no features; got"):
        carafepp.list_implementations("normalize_masks", L, padding=1)


def test_output_size():
    with refused(ValueError, "[output_size] up must be at least 1; got 0."):
        carafepp.output_size((3, 3), up=0)
    with refused(ValueError, "[output_size] size must not be negative; got (-3, 3)."):
        carafepp.output_size((-3, 3))
    with refused(ValueError, "[output_size] down must be below 2**31; got 1099511627776."):
        carafepp.output_size((3, 3), down=2**40)
    with refused(ValueError, "[output_size] size is too large for up=1024: "):
        carafepp.output_size((2**62, 3), up=1024)
    with refused(
        TypeError, "[output_size] size must be a pair (H, W) of integers; got (3.5, 3) (tuple)."
    ):
        carafepp.output_size((3.5, 3))
    with refused(TypeError, "[output_size] size must be a pair (H, W)"):
        carafepp.output_size(3)
    with refused(ValueError, "[output_size] kernel_size must be odd, from 1 to 31; got 4."):
        carafepp.output_size((3, 3), kernel_size=4)
    with refused(
        TypeError,
        "[output_size] kernel_size must be given with padding: the output size depends on it; "
        "got None.",
    ):
        carafepp.output_size((3, 3), padding=1)
    with refused(
        ValueError, "[output_size] padding must be from 0 to kernel_size // 2 = 2; got (3, 3)."
    ):
        carafepp.output_size((3, 3), kernel_size=5, padding=3)
    with refused(TypeError, "[output_size] padding must be an integer or a pair (rows, columns)"):
        carafepp.output_size((3, 3), kernel_size=5, padding="1")


# ---- libraries and devices ----


class Foreign:
    """An array of a library that speaks DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_two_libraries(torch):
    with refused(
        TypeError,
        "[reassemble] masks must be an array of the library of features, numpy; got one of torch.",
    ):
        Calls.reassemble(masks=torch.zeros(2, 9, 6, 10))
    with refused(
        TypeError,
        "[reassemble] out must be an array of the library of features, torch; got one of numpy.",
    ):
        Calls.reassemble(torch.zeros(X.shape), torch.zeros(M.shape), out=zeros(2, 4, 6, 10))


def test_no_namespace_to_make_a_result_from():
    with refused(
        TypeError,
        "[reassemble] out must be given: Foreign has no __array_namespace__ that a result "
        "could come from.",
    ):
        Calls.reassemble(Foreign(X), Foreign(M))
    out = zeros(2, 4, 6, 10)
    Calls.reassemble(Foreign(X), Foreign(M), out=Foreign(out))


def test_immutable_arrays():
    immutable = type("Array", (Foreign,), {"__module__": "tensorflow.python"})
    sentence = "[reassemble] arrays of tensorflow are immutable"
    with refused(TypeError, sentence):
        Calls.reassemble(immutable(X), immutable(M), out=immutable(zeros(2, 4, 6, 10)))


def test_dlpack_that_fails():
    class Broken(Foreign):
        def __dlpack__(self, **options):
            raise BufferError("no")

    sentence = "[reassemble] features must be an array that DLPack can describe"
    with refused(TypeError, sentence):
        Calls.reassemble(Broken(X), Foreign(M), out=Foreign(zeros(2, 4, 6, 10)))


def on_device(array: np.ndarray, device: tuple[int, int]):
    """A DLPack array that says of its host memory that it lies on another device."""

    class Elsewhere(Foreign):
        def __dlpack__(self, **options):
            capsule = self.array.__dlpack__()
            pointer = ctypes.pythonapi.PyCapsule_GetPointer
            pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
            # DLTensor: data, then the device's type and index
            fields = ctypes.cast(pointer(capsule, b"dltensor"), ctypes.POINTER(ctypes.c_int32))
            fields[2], fields[3] = device
            return capsule

        def __dlpack_device__(self):
            return device

    return Elsewhere(array)


CUDA, PINNED, METAL = 2, 3, 8


@pytest.mark.usefixtures("without_cuda")
def test_cuda_arrays_need_a_build_with_cuda():
    arrays = [on_device(array, (CUDA, 1)) for array in (X, M, zeros(2, 4, 6, 10))]
    with refused(
        NotImplementedError,
        "[reassemble] CUDA arrays cannot be computed on: carafepp was built without CUDA",
    ):
        Calls.reassemble(*arrays[:2], out=arrays[2])


def test_two_devices():
    x, m, y = (on_device(array, (CUDA, 1)) for array in (X, M, zeros(2, 4, 6, 10)))
    sentence = "[reassemble] masks must be on the device of features (cuda:1); got cpu."
    with refused(ValueError, sentence):
        Calls.reassemble(x, on_device(M, (PINNED, 0)), out=y)
    sentence = "[reassemble] masks must be on the device of features (cuda:1); got cuda:0."
    with refused(ValueError, sentence):
        Calls.reassemble(x, on_device(M, (CUDA, 0)), out=y)
    sentence = "[reassemble] out must be on the device of features (cuda:1); got cpu."
    with refused(ValueError, sentence):
        Calls.reassemble(x, m, out=Foreign(zeros(2, 4, 6, 10)))


def test_other_devices():
    sentence = "features must be on the CPU or on a CUDA device; got DLPack device type 8."
    with refused(ValueError, sentence):
        Calls.reassemble(on_device(X, (METAL, 0)), Foreign(M), out=Foreign(zeros(2, 4, 6, 10)))


def test_pinned_memory_counts_as_cpu():
    out = zeros(2, 4, 6, 10) - 1
    Calls.reassemble(on_device(X, (PINNED, 0)), Foreign(M), out=Foreign(out))
    assert (out == 0).all()


# ---- PyTorch ----


TORCH_WRONG = {
    "requires grad": (
        lambda torch: torch.zeros(X.shape, requires_grad=True),
        NotImplementedError,
        "features must not require grad: what is written to out has no gradient.",
    ),
    "meta": (
        lambda torch: torch.zeros(X.shape, device="meta"),
        TypeError,
        "features must be a dense tensor with data of its own; got one on meta",
    ),
    "sparse": (
        lambda torch: torch.zeros(X.shape).to_sparse(),
        TypeError,
        "features must be a dense tensor with data of its own; got one on cpu with layout "
        "torch.sparse_coo",
    ),
    "lazy negative": (
        lambda torch: torch.zeros(X.shape, dtype=torch.complex64).conj().imag,
        ValueError,
        "features must hold its values; call its resolve_neg().",
    ),
    "int64": (
        lambda torch: torch.zeros(X.shape, dtype=torch.int64),
        TypeError,
        "features must be float32, float64, float16 or bfloat16; got int64.",
    ),
    "float8": (
        lambda torch: torch.zeros(X.shape).to(torch.float8_e5m2),
        TypeError,
        "features must be float32, float64, float16 or bfloat16; got ",
    ),
}


@pytest.mark.parametrize("name", TORCH_WRONG)
def test_tensor(torch, name):
    make, exception, sentence = TORCH_WRONG[name]
    features, masks = make(torch), torch.zeros(M.shape)
    with refused(exception, f"[reassemble] {sentence}"):
        Calls.reassemble(features, masks, out=torch.zeros(D.shape))


def test_fake_tensor(torch):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake = torch.zeros(X.shape)
    sentence = "[reassemble] features must be a tensor with data of its own; got FakeTensor."
    with refused(TypeError, sentence):
        Calls.reassemble(fake, torch.zeros(M.shape), out=torch.zeros(D.shape))


def test_vmapped_tensor(torch):
    sentence = "[reassemble] features must be a dense tensor with data of its own"
    with refused(TypeError, sentence):
        torch.vmap(lambda x, m: Calls.reassemble(x, m, out=torch.zeros(D.shape)))(
            torch.zeros(3, *X.shape), torch.zeros(3, *M.shape)
        )


def test_a_tensor_among_other_arrays(torch):
    for features, masks in ((torch.zeros(X.shape), M), (X, torch.zeros(M.shape))):
        with refused(TypeError, "[reassemble] masks must be an array of the library of features"):
            Calls.reassemble(features, masks)


def test_a_wrong_shape_of_tensors(torch):
    """The operators have the sentences of the core."""
    with refused(ValueError, "[reassemble] up must be at least 1; got 0."):
        Calls.reassemble(torch.zeros(X.shape), torch.zeros(M.shape), up=0)
    sentence = "[reassemble_backward] grad_output must have shape"
    features = torch.zeros(X.shape, requires_grad=True)
    with refused(ValueError, sentence):
        Calls.reassemble_backward(torch.zeros(2, 4, 5, 9), features, torch.zeros(M.shape))


HUGE = {
    "reassemble": "masks must have shape",
    "reassemble_with_logits": "groups*kernel_size**2*up**2 must be below 2**63",
    "normalize_masks": "groups*kernel_size**2*up**2 must be below 2**63",
}


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("function", HUGE)
def test_a_factor_too_large_for_any_result_is_refused_by_the_core(function, library, request):
    """No library can make such a result, but its own error would not name the argument."""
    arrays = {"features": X, "masks": M} if function == "reassemble" else {"logits": L}
    if library == "torch":
        torch = request.getfixturevalue("torch")
        arrays = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if function == "reassemble_with_logits":
            arrays["features"] = torch.from_numpy(X)
    with refused(ValueError, f"[{function}] {HUGE[function]}"):
        getattr(Calls, function)(**arrays, up=2**31 - 1)


def test_a_negative_number_of_threads():
    sentence = "[set_num_threads] threads must be from 0 to 1024; got -1."
    with refused(ValueError, sentence):
        carafepp.set_num_threads(-1)
