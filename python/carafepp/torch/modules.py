"""The CARAFE++ module predicts kernels from features and reassembles the features by them."""

import inspect
from typing import Any, Literal, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _arguments, ops

Size = tuple[int, int]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


def reset_as_authors(module: nn.Module, content_encoder: nn.Conv2d) -> None:
    """Initialise all parameters of a module as the authors' code does."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif layer is not module and hasattr(layer, "reset_parameters"):
            layer.reset_parameters()  # a normalisation layer
    nn.init.normal_(content_encoder.weight, std=0.001)


# torch.fx records the next two functions as single nodes: its traces have no numbers for sizes.


def reassemble_to(
    x: Tensor,
    logits: Tensor,
    size: Any,
    up: int,
    down: int,
    ceil_mode: bool,
    kernel_size: int,
    padding: Size | None = None,
    padding_mode: str = "zeros",
    **how: Any,
) -> Tensor:
    """Return x rescaled to a size, as described in `CARAFE`."""
    centres = _centres(x, kernel_size, padding)
    beyond, logits, size, crop = _fit(centres, logits, size, up, down, ceil_mode)
    if padding_mode == "zeros":
        x = pad_beyond(x, *beyond, down)
    else:
        rows, columns = padding or (kernel_size // 2, kernel_size // 2)
        bottom, right = rows + down * beyond[0], columns + down * beyond[1]
        x, padding = _pad(x, (columns, right, rows, bottom), padding_mode), (0, 0)
    output: Tensor = ops.reassemble_with_logits(
        x, logits, up=up, down=down, kernel_size=kernel_size, padding=padding, size=size, **how
    )
    return output if crop is None else output[..., : crop[0], : crop[1]]


def masks_of(
    x: Tensor,
    logits: Tensor,
    size: Any,
    up: int,
    down: int,
    ceil_mode: bool,
    kernel_size: int,
    padding: Size | None = None,
    padding_mode: str = "zeros",
    **how: Any,
) -> Tensor:
    """Return the masks that `reassemble_to` uses."""
    centres = _centres(x, kernel_size, padding)
    natural = _arguments.natural_size(centres, up, down)
    _, logits, size, crop = _fit(centres, logits, size, up, down, ceil_mode)
    if torch.jit.is_tracing():
        crop = crop or natural
    else:
        size = size or natural
    masks: Tensor = ops.normalize_masks(logits, up=up, kernel_size=kernel_size, size=size, **how)
    return masks if crop is None else masks[..., : crop[0], : crop[1]]


torch.fx.wrap("reassemble_to")
torch.fx.wrap("masks_of")


def _centres(x: Tensor, kernel_size: int, padding: Size | None) -> Size:
    """Return how many rows and columns of features windows can be centred on."""
    height, width = x.shape[-2:]
    if padding is None:
        return height, width
    offset_h, offset_w = (kernel_size // 2 - number for number in padding)
    return height - 2 * offset_h, width - 2 * offset_w


def _fit(
    centres: Size, logits: Tensor, size: Any, up: int, down: int, ceil_mode: bool
) -> tuple[tuple[bool, bool], Tensor, Size | None, Size | None]:
    """Return where the size exceeds the natural one, logits extended there, a size and a crop.

    Call the operator with the size, and crop its result. In a trace of PyTorch, sizes are tensors.
    No operator takes them, and the crop must be valid for other sizes too.
    """
    beyond = False, False
    if size is not None:
        size = _arguments.pair("CARAFE", size)
        beyond = exceeds("CARAFE", centres, size, up, down)
        if beyond[0]:
            logits = torch.cat((logits, logits[..., -1:, :]), -2)
        if beyond[1]:
            logits = torch.cat((logits, logits[..., -1:]), -1)
    elif not ceil_mode:
        size = centres[0] * up // down, centres[1] * up // down
    return (beyond, logits, None, size) if torch.jit.is_tracing() else (beyond, logits, size, None)


def exceeds(where: str, centres: Size, size: Size, up: int, down: int) -> tuple[bool, bool]:
    """Tell for rows and columns whether a size exceeds the natural size of features.

    Raise a ValueError if it exceeds that size by `up` or more.
    """
    natural = _arguments.natural_size(centres, up, down)
    if not torch.jit.is_tracing() and not _is_exporting():
        _arguments.check_reach(where, size, natural, up)
    rows, columns = (up > 1 and _may_exceed(s, n) for s, n in zip(size, natural, strict=True))
    return rows, columns


def pad_beyond(x: Tensor, rows: bool, columns: bool, down: int) -> Tensor:
    """Return features padded with the zeros that windows beyond the natural size reach."""
    return F.pad(x, (0, down * columns, 0, down * rows)) if rows or columns else x


def _pad(x: Tensor, widths: tuple[int, ...], mode: str) -> Tensor:
    """Return x padded in a mode of `torch.nn.functional.pad`, in its memory format."""
    padded = F.pad(x, widths, mode=mode)
    # Circular padding returns NCHW. vmap knows no `memory_format`, but strides and axes.
    if mode == "circular" and x.dim() == 4 and x.stride(1) == 1 < x.stride(3):
        padded = padded.movedim(1, -1).contiguous().movedim(-1, 1)
    return padded


def _is_exporting() -> bool:
    if hasattr(torch.compiler, "is_exporting"):
        return bool(torch.compiler.is_exporting())
    # In older versions, an export compiles without Dynamo.
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def _may_exceed(size: int, natural: int) -> bool:
    """Tell whether a size exceeds the natural one, now or in a later run of a recorded graph."""
    if torch.jit.is_tracing():
        return True
    if not _is_exporting():
        return size > natural
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return not statically_known_true(size <= natural)


class CARAFE(nn.Module):
    """Rescale features by up/down with kernels predicted from their own content.

    ``output = reassemble_with_logits(x, content_encoder(channel_compressor(x)))``

    A 1x1 convolution compresses the channels. A convolution of stride `down` predicts
    ``groups*kernel_size**2*up**2`` logits at each of its positions. A normaliser turns them into
    kernels. Every output pixel is a sum over a window of x, weighted by its own kernel. The kernels
    are never stored.

    Parameters
    ----------
    channels : int
        C, for the input and the output.
    up, down : int, default 1
        The factor up/down: up=2 doubles the size, down=2 halves it, and up=3 with down=2 makes it
        1.5 times as large.
    kernel_size : int, default 5
        The side of the windows, k_reassembly in the paper: odd, 1 to 31.
    groups : int, default 1
        The number of groups of channels; each group has its own kernels. `channels` is divisible
        by it.
    compressed_channels : int or None, optional
        C_m, the channels after the compressor; by default 64, or 16 if down > up. With None there
        is no compressor ("N/A" in Table 11).
    encoder_kernel_size : int, default 3
        k_encoder in the paper: odd, 1 to 31.
    encoder_dilation : int, default 1
        The dilation of the content encoder.
    padding : int or (int, int), default kernel_size//2
        The numbers of rows and columns beyond each border that count as features, as in a
        convolution: from 0 ("valid") to kernel_size//2.
    padding_mode : {"zeros", "reflect", "replicate", "circular"}, default "zeros"
        Their values, as in `torch.nn.Conv2d`. The content encoder always pads with zeros.
    batch_norm : bool, default False
        Whether BatchNorm and ReLU follow the compressor (section 5.1, image classification).
    normalizer : {"softmax", "sigmoid", "sigmoid_normalized", "none"}, default "softmax"
        The kernel normaliser (Table 14).
    ceil_mode : bool, default True
        How to round a size that `down` does not divide: up, as a strided convolution with padding
        does, or down, as a pooling layer does.
    device, dtype : optional
        The device and dtype of the parameters.

    Raises
    ------
    TypeError
        A number is not an integer.
    ValueError
        A number is out of its range.

    Notes
    -----
    On the CPU, the reassembly runs on carafepp's own threads. ``torch.set_num_threads`` does not
    change their number, but `carafepp.set_num_threads` and CARAFEPP_NUM_THREADS do.

    The input is (N, C, H, W) or (C, H, W). The output is (N, C, H', W') or (C, H', W'), in the
    memory format of the input. Its size is (ceil(H*up/down), ceil(W*up/down)) or, with
    ceil_mode=False, (H*up//down, W*up//down).

    With a padding, H in these formulas is H + 2*padding - 2*(kernel_size//2), and W likewise. At
    each border, the content encoder then leaves out kernel_size//2 - padding rows or columns of the
    compressed features. So its logits belong to the centres of the windows.

    A call may ask for another `size`. A smaller size is a crop at the bottom and right. A larger
    size, by less than `up` rows or columns, is for decoders whose encoder rounded down (27 to 13,
    and back to 27). The formula then continues. Features outside their borders have the values of
    `padding_mode`, and the extra rows and columns repeat the last logits. The pixels within the
    natural size do not change.

    A module traced by ``torch.jit.trace`` also works with other sizes. ``torch.fx`` traces through
    the module, with the reassembly as one node.

    Weights are initialised as in the authors' code: Xavier uniform in the compressor, normal with
    standard deviation 0.001 in the encoder, and 0 for biases. With the softmax, the initial output
    is nearly an average.

    References
    ----------
    J. Wang et al., "CARAFE++: Unified Content-Aware ReAssembly of FEatures", section 3.

    Examples
    --------
    >>> x = torch.randn(2, 32, 15, 20)
    >>> CARAFE(32, up=2)(x).shape
    torch.Size([2, 32, 30, 40])
    >>> CARAFE(32, up=2)(x, size=(29, 40)).shape
    torch.Size([2, 32, 29, 40])
    >>> CARAFE(32, up=2)(x, size=(31, 40)).shape
    torch.Size([2, 32, 31, 40])
    >>> CARAFE(32, down=2)(x).shape
    torch.Size([2, 32, 8, 10])
    """

    # A module that was pickled before these parameters has no attributes of its own for them.
    padding: Size | None = None
    padding_mode: str = "zeros"

    def __init__(
        self,
        channels: int,
        *,
        up: int = 1,
        down: int = 1,
        kernel_size: int = 5,
        groups: int = 1,
        compressed_channels: int | Literal["auto"] | None = "auto",
        encoder_kernel_size: int = 3,
        encoder_dilation: int = 1,
        padding: ops.Padding | None = None,
        padding_mode: PaddingMode = "zeros",
        batch_norm: bool = False,
        normalizer: ops.Normalizer = "softmax",
        ceil_mode: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            raise _arguments.unexpected(CARAFE, unknown)
        super().__init__()

        options = _arguments.module_options(
            channels=channels,
            up=up,
            down=down,
            kernel_size=kernel_size,
            groups=groups,
            compressed_channels=compressed_channels,
            encoder_kernel_size=encoder_kernel_size,
            encoder_dilation=encoder_dilation,
            padding=padding,
            padding_mode=padding_mode,
            batch_norm=batch_norm,
            normalizer=normalizer,
            ceil_mode=ceil_mode,
        )
        for name, value in options.items():
            setattr(self, name, value)
        channels, compressed_channels = self.channels, self.compressed_channels
        encoder_kernel_size, encoder_dilation = self.encoder_kernel_size, self.encoder_dilation
        tensor_options = {"device": device, "dtype": dtype}
        self.channel_compressor: nn.Module = nn.Identity()
        if compressed_channels is not None:
            self.channel_compressor = nn.Conv2d(
                channels, compressed_channels, 1, bias=not batch_norm, **tensor_options
            )
        if batch_norm:
            self.channel_compressor = nn.Sequential(
                self.channel_compressor,
                nn.BatchNorm2d(compressed_channels, **tensor_options),
                nn.ReLU(),
            )
        self.content_encoder = nn.Conv2d(
            channels if compressed_channels is None else compressed_channels,
            self.groups * self.kernel_size**2 * self.up**2,
            encoder_kernel_size,
            stride=self.down,
            padding=encoder_dilation * (encoder_kernel_size // 2),
            dilation=encoder_dilation,
            **tensor_options,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters."""
        reset_as_authors(self, self.content_encoder)

    def forward(self, x: Tensor, size: Size | None = None) -> Tensor:
        """Rescale x.

        Parameters
        ----------
        x : Tensor, (N, C, H, W) or (C, H, W)
        size : (int, int), optional
            Another (H', W') than the natural size, as for a skip connection. It is smaller, or
            larger by less than `up` rows or columns (see the notes of the class).

        Raises
        ------
        TypeError
            size is not a pair of integers.
        ValueError
            The size is negative or too large.
        """
        return reassemble_to(x, self.logits(x), size, **self._how())

    def masks(self, x: Tensor, size: Size | None = None) -> Tensor:
        """Return the kernels that `forward` uses: (N, groups*kernel_size**2, H', W')."""
        return masks_of(x, self.logits(x), size, **self._how())

    def logits(self, x: Tensor) -> Tensor:
        """Return the kernels before the normaliser and the pixel shuffle."""
        compressed = self.channel_compressor(x)
        if self.padding is not None:  # keep the centres of the windows
            i, j = (self.kernel_size // 2 - number for number in self.padding)
            compressed = compressed[..., i : -i or None, j : -j or None]
        logits: Tensor = self.content_encoder(compressed)
        return logits

    def _how(self) -> dict[str, Any]:
        names = (
            *("up", "down", "ceil_mode", "kernel_size", "padding", "padding_mode"),
            *("groups", "normalizer"),
        )
        return {name: getattr(self, name) for name in names}

    def extra_repr(self) -> str:
        """Return the parameters that differ from their defaults, for `print`."""
        defaults = {
            name: parameter.default
            for name, parameter in inspect.signature(CARAFE).parameters.items()
            if name in vars(self)
        }
        del defaults["channels"]
        values = {name: getattr(self, name) for name in defaults}
        differ = [f"{name}={value!r}" for name, value in values.items() if value != defaults[name]]
        return ", ".join([str(self.channels), *differ])
