"""The CARAFE++ module for Flax NNX, with the parameters of the module for PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .. import _arguments, ops

Size = tuple[int, int]

_JNP_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


class CARAFE(nnx.Module):
    """Rescale features by up/down with kernels predicted from their own content.

    ``output = reassemble_with_logits(x, content_encoder(channel_compressor(x)))``

    `carafepp.torch.CARAFE` for Flax: the same parameters, initialised alike, on arrays with the
    axes (N, H, W, C), as in Flax's own layers. Its docstring describes the module.

    Parameters
    ----------
    channels, up, down, kernel_size, groups, compressed_channels
        As for `carafepp.torch.CARAFE`.
    encoder_kernel_size, encoder_dilation, padding, padding_mode, batch_norm, normalizer, ceil_mode
        As there. With batch_norm, ``train()`` and ``eval()`` switch BatchNorm.
    dtype : optional
        The dtype to compute in. By default JAX promotes the input and the parameters in the
        convolutions, and the output has the dtype of the input.
    param_dtype : default float32
        The dtype of the parameters.
    rngs : nnx.Rngs
        The source of the initial parameters.

    Raises
    ------
    TypeError
        A number is not an integer.
    ValueError
        A number is out of its range.

    Examples
    --------
    >>> from flax import nnx
    >>> x = jnp.ones((2, 15, 20, 32))
    >>> CARAFE(32, up=2, rngs=nnx.Rngs(0))(x).shape
    (2, 30, 40, 32)
    >>> CARAFE(32, down=2, rngs=nnx.Rngs(0))(x).shape
    (2, 8, 10, 32)
    """

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
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        batch_norm: bool = False,
        normalizer: ops.Normalizer = "softmax",
        ceil_mode: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
        **unknown: NoReturn,
    ) -> None:
        if unknown:
            raise _arguments.unexpected(CARAFE, unknown)
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
        self.dtype = dtype
        layer = {"dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
        # As the authors' code initialises them.
        encoded = self.channels
        if self.compressed_channels is not None:
            encoded = self.compressed_channels
            self.channel_compressor = nnx.Conv(
                self.channels,
                encoded,
                (1, 1),
                use_bias=not batch_norm,
                kernel_init=nnx.initializers.xavier_uniform(),
                **layer,
            )
        if batch_norm:
            self.norm = nnx.BatchNorm(encoded, momentum=0.9, epsilon=1e-5, **layer)
        side, beyond = (
            self.encoder_kernel_size,
            self.encoder_dilation * (self.encoder_kernel_size // 2),
        )
        self.content_encoder = nnx.Conv(
            encoded,
            self.groups * self.kernel_size**2 * self.up**2,
            (side, side),
            strides=self.down,
            padding=((beyond, beyond), (beyond, beyond)),
            kernel_dilation=self.encoder_dilation,
            kernel_init=nnx.initializers.normal(0.001),
            **layer,
        )

    def __call__(self, x: jax.Array, size: Size | None = None) -> jax.Array:
        """Rescale x.

        Parameters
        ----------
        x : array, (N, H, W, C) or (H, W, C)
        size : (int, int), optional
            Another (H', W') than the natural size. It is smaller, or larger by less than `up` rows
            or columns.

        Returns
        -------
        array, (N, H', W', C) or (H', W', C)

        Raises
        ------
        TypeError
            size is not a pair of integers.
        ValueError
            The size is negative or too large.
        """
        size, beyond = self._size(x, size)
        logits = _extend(self.logits(x), beyond)
        if self.dtype is not None:
            x = x.astype(self.dtype)
        rows, columns = self.padding or (self.kernel_size // 2, self.kernel_size // 2)
        bottom, right = (self.down * count for count in beyond)
        padding = self.padding
        if self.padding_mode == "zeros":
            x = _pad(x, (0, bottom), (0, right))
        else:
            mode = _JNP_MODES[self.padding_mode]
            x = _pad(x, (rows, rows + bottom), (columns, columns + right), mode=mode)
            padding = (0, 0)
        return ops.reassemble_with_logits(
            x, logits, down=self.down, padding=padding, **self._how(size)
        )

    def masks(self, x: jax.Array, size: Size | None = None) -> jax.Array:
        """Return the kernels that a call uses: (N, H', W', groups*kernel_size**2)."""
        size, beyond = self._size(x, size)
        return ops.normalize_masks(_extend(self.logits(x), beyond), **self._how(size))

    def logits(self, x: jax.Array) -> jax.Array:
        """Return the kernels before the normaliser and the pixel shuffle."""
        compressed = x
        if self.compressed_channels is not None:
            compressed = self.channel_compressor(x)
        if self.batch_norm:
            compressed = jax.nn.relu(self.norm(compressed))
        if self.padding is not None:  # keep the centres of the windows
            i, j = (self.kernel_size // 2 - number for number in self.padding)
            compressed = compressed[..., i : -i or None, j : -j or None, :]
        logits: jax.Array = self.content_encoder(compressed)
        return logits

    def load_state_dict(self, state_dict: Mapping[str, Any], prefix: str = "") -> None:
        """Take the parameters of a `carafepp.torch.CARAFE` with the same options.

        Parameters
        ----------
        state_dict : mapping
            ``module.state_dict()``, or one of a larger network or of a checkpoint: PyTorch tensors
            or NumPy arrays. mmcv's CARAFEPack has the same names.
        prefix : str, default ""
            The beginning of this module's names, such as "neck.upsample.".

        Raises
        ------
        ValueError
            A parameter is missing, is not one of this module, or has another shape.
        """
        given = {
            name.removeprefix(prefix): value
            for name, value in state_dict.items()
            if name.startswith(prefix) and not name.endswith("num_batches_tracked")
        }
        ours = self._parameters()
        if given.keys() != ours.keys():
            raise ValueError(
                f"[CARAFE] state_dict must have {', '.join(sorted(ours))} after the prefix "
                f"{prefix!r}; got {', '.join(sorted(given)) or 'nothing'}."
            )
        state: dict[str, dict[str, Any]] = {}
        for name, (layer, parameter) in ours.items():
            before, value = getattr(getattr(self, layer), parameter), _to_numpy(given[name])
            if value.ndim == 4:  # PyTorch's convolutions have (out, in, rows, columns)
                value = value.transpose(2, 3, 1, 0)
            if value.shape != before.shape:
                raise ValueError(
                    f"[CARAFE] state_dict must have {prefix}{name} in the shape {before.shape}, in "
                    f"Flax's order of axes; got {value.shape}."
                )
            # A copy: jnp.asarray would share the memory of tensors that PyTorch goes on training.
            state.setdefault(layer, {})[parameter] = jnp.array(value, before.dtype)
        nnx.update(self, state)

    def _parameters(self) -> dict[str, tuple[str, str]]:
        """Return, for the names in PyTorch, the layers and the names of their parameters here."""
        names = {"content_encoder.weight": ("content_encoder", "kernel")}
        names["content_encoder.bias"] = ("content_encoder", "bias")
        if self.batch_norm:
            names["channel_compressor.0.weight"] = ("channel_compressor", "kernel")
            theirs = ("weight", "bias", "running_mean", "running_var")
            for name, ours in zip(theirs, ("scale", "bias", "mean", "var"), strict=True):
                names[f"channel_compressor.1.{name}"] = ("norm", ours)
        elif self.compressed_channels is not None:
            names["channel_compressor.weight"] = ("channel_compressor", "kernel")
            names["channel_compressor.bias"] = ("channel_compressor", "bias")
        return names

    def _size(self, x: jax.Array, size: Any) -> tuple[Size, Size]:
        """Return the output size, and how many rows and columns of logits are missing for it."""
        centres = x.shape[-3], x.shape[-2]
        if self.padding is not None:
            rows, columns = (2 * (self.kernel_size // 2 - number) for number in self.padding)
            centres = centres[0] - rows, centres[1] - columns
        natural = _arguments.natural_size(centres, self.up, self.down)
        if size is None:
            size = natural
            if not self.ceil_mode:
                size = centres[0] * self.up // self.down, centres[1] * self.up // self.down
        size = _arguments.pair("CARAFE", size)
        _arguments.check_reach("CARAFE", size, natural, self.up)
        return size, (int(size[0] > natural[0]), int(size[1] > natural[1]))

    def _how(self, size: Size) -> dict[str, Any]:
        names = ("up", "kernel_size", "groups", "normalizer")
        return {"size": size, "layout": "NHWC", **{name: getattr(self, name) for name in names}}


def _extend(logits: jax.Array, beyond: Size) -> jax.Array:
    """Repeat the last row and column of logits where the size needs one more."""
    return _pad(logits, (0, beyond[0]), (0, beyond[1]), mode="edge")


def _pad(x: jax.Array, rows: Size, columns: Size, mode: str = "constant") -> jax.Array:
    if not any((*rows, *columns)):
        return x
    return jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [rows, columns, (0, 0)], mode=mode)


def _to_numpy(value: Any) -> np.ndarray[Any, Any]:
    if hasattr(value, "detach"):  # a PyTorch tensor
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has no such dtype
            value = value.float()
    return np.asarray(value)
