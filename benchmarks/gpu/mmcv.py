"""mmcv's CARAFE, built from a few files of mmcv's source tree.

    CARAFEPP_GPU_MMCV=TREE TORCH_EXTENSIONS_DIR=FOLDER python -m benchmarks.gpu.mmcv

The build takes a minute or two, beside other steps. It then writes FOLDER/built: an empty file, or
the error. The step `time` loads a good build and never builds.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch

_BINDING = r"""
#include <torch/extension.h>
using at::Tensor;

void CARAFEForwardCUDAKernelLauncher(
    const Tensor features, const Tensor masks, Tensor rfeatures, Tensor routput, Tensor rmasks,
    Tensor output, const int kernel_size, const int group_size, const int scale_factor);
void CARAFEBackwardCUDAKernelLauncher(
    const Tensor top_grad, const Tensor rfeatures, const Tensor masks, Tensor rtop_grad,
    Tensor rbottom_grad_hs, Tensor rbottom_grad, Tensor rmask_grad, Tensor bottom_grad,
    Tensor mask_grad, const int kernel_size, const int group_size, const int scale_factor);

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
    m.def("forward", &CARAFEForwardCUDAKernelLauncher);
    m.def("backward", &CARAFEBackwardCUDAKernelLauncher);
}
"""


def _headers_of_libraries() -> list[str]:
    """Return nvcc's options for the CUDA headers that PyTorch's headers include.

    A toolkit may lack some, like cusparse.h: search PyTorch's own packages after all others.
    """
    folders = Path(torch.__file__).parents[1].glob("nvidia/*/include")
    return [f"-Xcompiler=-idirafter,{folder}" for folder in folders]


def load_mmcv(tree: Path) -> Callable:
    """Build mmcv's CARAFE; return its function of features, masks, kernel size, groups, factor."""
    from torch.utils.cpp_extension import _get_build_directory, load

    csrc = tree / "mmcv" / "ops" / "csrc"
    build = Path(_get_build_directory("mmcv_carafe", verbose=False))
    shim = build / "include" / "THC"  # newer versions of PyTorch moved a header
    shim.mkdir(parents=True, exist_ok=True)
    _write(shim / "THCAtomics.cuh", "#include <ATen/cuda/Atomic.cuh>\n")
    binding = build / "binding.cpp"
    _write(binding, _BINDING)
    module = load(
        "mmcv_carafe",
        [str(binding), str(csrc / "pytorch" / "cuda" / "carafe_cuda.cu")],
        extra_cuda_cflags=_headers_of_libraries(),
        extra_include_paths=[
            str(csrc / "common"),
            str(csrc / "common" / "cuda"),
            str(build / "include"),
        ],
    )

    class Carafe(torch.autograd.Function):
        """The same calls as in mmcv, zeroed buffers included."""

        @staticmethod
        def forward(ctx, features, masks, kernel_size, groups, factor):
            n, c, h, w = features.shape
            output = features.new_zeros((n, c, h * factor, w * factor))
            output_nhwc, features_nhwc = torch.zeros_like(output), torch.zeros_like(features)
            ctx.params = kernel_size, groups, factor
            module.forward(
                features,
                masks,
                features_nhwc,
                output_nhwc,
                torch.zeros_like(masks),
                output,
                *ctx.params,
            )
            ctx.save_for_backward(features, masks, features_nhwc)
            return output

        @staticmethod
        def backward(ctx, grad_output):
            features, masks, features_nhwc = ctx.saved_tensors
            grad_features, grad_masks = torch.zeros_like(features), torch.zeros_like(masks)
            module.backward(
                grad_output.contiguous(),
                features_nhwc,
                masks,
                torch.zeros_like(grad_output),
                torch.zeros_like(grad_output),
                torch.zeros_like(features),
                torch.zeros_like(masks),
                grad_features,
                grad_masks,
                *ctx.params,
            )
            return grad_features, grad_masks, None, None, None

    return Carafe.apply


def _write(path: Path, text: str) -> None:
    """Write a file if its text changes: a new date alone would make ninja build again."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def built(extensions: Path) -> str:
    """Return why mmcv's CARAFE cannot be loaded; nothing if it can."""
    marker = extensions / "built"
    return marker.read_text() if marker.exists() else "its build has not ended"


def main() -> None:
    """Build; write the result into FOLDER/built."""
    marker = Path(os.environ["TORCH_EXTENSIONS_DIR"]) / "built"
    marker.parent.mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    for lock in marker.parent.glob(
        "*/lock"
    ):  # a killed build leaves one, and the next build would wait for it
        lock.unlink()
    try:
        load_mmcv(Path(os.environ["CARAFEPP_GPU_MMCV"]))
    except Exception as error:
        marker.write_text(f"its build failed: {error}"[-2000:])
        raise
    marker.write_text("")


if __name__ == "__main__":
    main()
