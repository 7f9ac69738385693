"""
The C ABI of carafepp (carafepp.h) on arrays that speak DLPack. Private: use the functions of carafepp.
"""



OUTPUT_SIZE: int = 0

REASSEMBLE: int = 1

REASSEMBLE_BACKWARD: int = 2

REASSEMBLE_WITH_LOGITS: int = 3

REASSEMBLE_WITH_LOGITS_BACKWARD: int = 4

NORMALIZE_MASKS: int = 5

NORMALIZE_MASKS_BACKWARD: int = 6

SOFTMAX: int = 0

SIGMOID: int = 1

SIGMOID_NORMALIZED: int = 2

NONE: int = 3

CHANNELS_LAST: int = 1

BFLOAT16: int = 1040

CUDA: int = 2

CUDA_MANAGED: int = 13

class Params:
    """The carafepp_params of one function."""

    def __init__(self, function: str, number: int, up: object | None, down: object | None, kernel_size: object | None, groups: object | None, normalizer: int, size: object | None, padding: object | None, channels_last: bool, implementation: str | None) -> None: ...

def reassemble(params: Params, features: object, masks: object, output: object, stream: int) -> None: ...

def reassemble_backward(params: Params, grad_output: object, features: object, masks: object, grad_features: object | None, grad_masks: object | None, stream: int) -> None: ...

def reassemble_with_logits(params: Params, features: object, logits: object, output: object, stream: int) -> None: ...

def reassemble_with_logits_backward(params: Params, grad_output: object, features: object, logits: object, grad_features: object | None, grad_logits: object | None, stream: int) -> None: ...

def normalize_masks(params: Params, logits: object, masks: object, stream: int) -> None: ...

def normalize_masks_backward(params: Params, grad_masks: object, logits: object, grad_logits: object, stream: int) -> None: ...

def output_shape(params: Params, shape: object) -> tuple[int, ...]: ...

def list_implementations(params: Params, inputs: list[object], results: list[object], fastest: bool = False) -> list[tuple[str, str | None]]: ...

def version() -> str: ...

def config() -> str: ...

def devices() -> str: ...

def set_num_threads(threads: int) -> None: ...

def get_num_threads() -> int: ...
