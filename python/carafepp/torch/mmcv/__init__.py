"""The CARAFE of mmcv.ops, with its names, signatures, parameters and state_dict keys.

Replace ``from mmcv.ops import CARAFEPack`` by ``from carafepp.torch.mmcv import CARAFEPack``:
checkpoints load strictly, and outputs are the same. If a framework builds the model, put
``custom_imports = dict(imports=["carafepp.torch.mmcv.install"])`` into its config.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal

from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ... import _arguments, ops
from .. import modules
from ..modules import reset_as_authors


def carafe(
    features: Tensor, masks: Tensor, kernel_size: int, group_size: int, scale_factor: int
) -> Tensor:
    """Upsample features, (N, C, H, W), with masks, (N, group_size*kernel_size**2, H', W').

    Parameters
    ----------
    features, masks : Tensor
    kernel_size : int
        Odd, 1 to 31.
    group_size : int
        The number of groups.
    scale_factor : int
        1 or more: H' = H*scale_factor, W' = W*scale_factor.

    Returns
    -------
    Tensor, (N, C, H', W')

    Raises
    ------
    TypeError
        A number is not an integer.
    ValueError
        Shapes or numbers do not fit (mmcv raises an AssertionError).
    """
    if has_torch_function((features, masks)):  # proxies of torch.fx have no shape to check
        sizes = kernel_size, group_size, scale_factor
        output: Tensor = handle_torch_function(carafe, (features, masks), features, masks, *sizes)
        return output
    kernel_size, group_size, scale_factor = _check_sizes(
        "carafe", kernel_size, group_size, scale_factor
    )
    _arguments.divisible("carafe", "features", features.shape[-3], "group_size", group_size)
    channels = group_size * kernel_size**2
    if masks.shape[-3] != channels:
        raise ValueError(
            "[carafe] masks must have group_size*kernel_size**2 = "
            f"{group_size}*{kernel_size}**2 = {channels} channels; got {masks.shape[-3]}."
        )
    (height, width), size = features.shape[-2:], tuple(masks.shape[-2:])
    if size != (height * scale_factor, width * scale_factor):
        fits = size[0] // max(1, height)
        meant = fits > 0 and size == (height * fits, width * fits)
        hint = f" Did you mean scale_factor={fits}?" if meant else ""
        raise ValueError(
            f"[carafe] masks must have the size of features, {(height, width)}, times "
            f"scale_factor={scale_factor}; got {size}.{hint}"
        )
    output = ops.reassemble(features, masks, up=scale_factor, groups=group_size)
    return output


carafe_naive = carafe  # mmcv's first implementation, with the same result


def _check_sizes(
    where: str, kernel_size: Any, group_size: Any, scale_factor: Any
) -> tuple[int, int, int]:
    return (
        _arguments.odd(where, "kernel_size", kernel_size),
        _arguments.integer(where, "group_size", group_size),
        _arguments.integer(where, "scale_factor", scale_factor),
    )


class CARAFE(nn.Module):
    """`carafe` as a module.

    Parameters
    ----------
    kernel_size, group_size, scale_factor : int

    Raises
    ------
    TypeError, ValueError
        `carafe` refuses a number.
    """

    def __init__(self, kernel_size: int, group_size: int, scale_factor: int) -> None:
        super().__init__()
        self.kernel_size, self.group_size, self.scale_factor = _check_sizes(
            type(self).__name__, kernel_size, group_size, scale_factor
        )

    def forward(self, features: Tensor, masks: Tensor) -> Tensor:
        """Upsample features with masks."""
        return carafe(features, masks, self.kernel_size, self.group_size, self.scale_factor)


class CARAFENaive(CARAFE):
    """The same as `CARAFE`."""


class CARAFEPack(nn.Module):
    """The whole upsampler: channel compressor, content encoder, kernel normaliser, reassembly.

    Parameters
    ----------
    channels : int
    scale_factor : int
    up_kernel : int, default 5
    up_group : int, default 1
    encoder_kernel : int, default 3
    encoder_dilation : int, default 1
    compressed_channels : int, default 64

    Raises
    ------
    TypeError
        A number is not an integer.
    ValueError
        A number is out of its range.

    Notes
    -----
    `forward` normalises and reassembles in one pass. `kernel_normalizer` and `feature_reassemble`
    are the two separate steps, for code that calls them.
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        up_kernel: int = 5,
        up_group: int = 1,
        encoder_kernel: int = 3,
        encoder_dilation: int = 1,
        compressed_channels: int = 64,
    ) -> None:
        super().__init__()
        channels, scale_factor, up_group, encoder_kernel, encoder_dilation, compressed_channels = (
            _arguments.positive(
                "CARAFEPack",
                channels=channels,
                scale_factor=scale_factor,
                up_group=up_group,
                encoder_kernel=encoder_kernel,
                encoder_dilation=encoder_dilation,
                compressed_channels=compressed_channels,
            )
        )
        up_kernel = _arguments.odd("CARAFEPack", "up_kernel", up_kernel)
        _arguments.divisible("CARAFEPack", "channels", channels, "up_group", up_group)
        if (encoder_kernel - 1) * encoder_dilation % 2:
            raise ValueError(
                "[CARAFEPack] encoder_kernel must be odd with an odd encoder_dilation="
                f"{encoder_dilation}; got {encoder_kernel}."
            )
        self.channels = channels
        self.scale_factor = scale_factor
        self.up_kernel = up_kernel
        self.up_group = up_group
        self.encoder_kernel = encoder_kernel
        self.encoder_dilation = encoder_dilation
        self.compressed_channels = compressed_channels
        self.channel_compressor = nn.Conv2d(channels, compressed_channels, 1)
        self.content_encoder = nn.Conv2d(
            compressed_channels,
            up_kernel**2 * up_group * scale_factor**2,
            encoder_kernel,
            padding=(encoder_kernel - 1) * encoder_dilation // 2,
            dilation=encoder_dilation,
        )
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise weights as mmcv does: Xavier uniform, and normal in the encoder."""
        reset_as_authors(self, self.content_encoder)

    def kernel_normalizer(self, mask: Tensor) -> Tensor:
        """Return masks, (N, up_group*up_kernel**2, H', W'), of the encoder's logits."""
        masks: Tensor = ops.normalize_masks(
            mask, up=self.scale_factor, kernel_size=self.up_kernel, groups=self.up_group
        )
        return masks

    def feature_reassemble(self, x: Tensor, mask: Tensor) -> Tensor:
        """Upsample x with masks."""
        return carafe(x, mask, self.up_kernel, self.up_group, self.scale_factor)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample x."""
        logits = self.content_encoder(self.channel_compressor(x))
        return modules.reassemble_to(  # by this name, which torch.fx knows
            x,
            logits,
            None,
            up=self.scale_factor,
            down=1,
            ceil_mode=True,
            kernel_size=self.up_kernel,
            groups=self.up_group,
        )


def normal_init(module: nn.Module, mean: float = 0, std: float = 1, bias: float = 0) -> None:
    """Set a layer's weight to normal numbers and its bias to `bias`, in place, as mmcv does."""
    if getattr(module, "weight", None) is not None:
        nn.init.normal_(module.weight, mean, std)
    if getattr(module, "bias", None) is not None:
        nn.init.constant_(module.bias, bias)


def xavier_init(
    module: nn.Module,
    gain: float = 1,
    bias: float = 0,
    distribution: Literal["normal", "uniform"] = "normal",
) -> None:
    """Set a layer's weight to Xavier's numbers and its bias to `bias`, in place, as mmcv does."""
    if distribution not in ("normal", "uniform"):
        raise ValueError(
            f"[xavier_init] distribution must be 'normal' or 'uniform'; got {distribution!r}."
        )
    uniform = distribution == "uniform"
    if getattr(module, "weight", None) is not None:
        (nn.init.xavier_uniform_ if uniform else nn.init.xavier_normal_)(module.weight, gain=gain)
    if getattr(module, "bias", None) is not None:
        nn.init.constant_(module.bias, bias)


_CLASSES = {cls.__name__: cls for cls in (CARAFE, CARAFENaive, CARAFEPack)}
_SIZES = ("kernel_size", "group_size", "scale_factor")
_PACK = ("channels", "scale_factor", "up_kernel", "up_group", "encoder_kernel", "encoder_dilation")
_PARAMETERS = {
    f"{layer}.{name}"
    for layer in ("channel_compressor", "content_encoder")
    for name in ("weight", "bias")
}


def swap_mmcv(model: nn.Module) -> list[str]:
    """Replace the classes of mmcv's CARAFE modules in a model by ours; parameters and hooks stay.

    The name of a class or its attributes identify a module. So the modules of older mmdet and of
    the authors' package ``carafe`` are replaced too, as are copies and subclasses.

    Parameters
    ----------
    model : Module

    Returns
    -------
    list of str
        The names of the modules that were swapped.

    Warns
    -----
    UserWarning
        A module looks like CARAFE but stays: its attributes or parameters differ from mmcv's, or a
        subclass overrides a method.
    """
    swapped, stay = [], []
    for name, module in model.named_modules():
        mro = type(module).__mro__
        packages = [cls.__module__.partition(".")[0] for cls in mro]
        if "carafepp" in packages and packages[0] != "mmcv":  # built on ours
            continue
        named = [
            cls
            for cls, package in zip(mro, packages, strict=True)
            if cls.__name__ in _CLASSES and package != "carafepp"
        ]
        is_pack = all(hasattr(module, attribute) for attribute in _PACK)
        if not named and not is_pack:
            continue
        original = named[-1] if named else mro[0]
        ours = CARAFEPack if is_pack else _CLASSES[original.__name__]
        reason = _why_not(module, ours, mro[: mro.index(original)])
        if reason:
            stay.append(f"{name or 'model'} ({mro[0].__qualname__}) stays: {reason}.")
        else:
            module.__class__ = ours
            swapped.append(name)
    if stay:
        warnings.warn("[swap_mmcv] " + " ".join(stay), stacklevel=2)
    return swapped


def _why_not(
    module: nn.Module, ours: type[nn.Module], subclasses: tuple[type[nn.Module], ...]
) -> str:
    """Return why a module cannot have our class, or an empty string if it can."""
    attributes, parameters = (_PACK, _PARAMETERS) if ours is CARAFEPack else (_SIZES, set())
    lacking = [name for name in attributes if not hasattr(module, name)]
    if lacking:
        return f"it has no {', '.join(lacking)}"
    found = set(module.state_dict())
    if found != parameters:
        return f"its parameters are {', '.join(sorted(found)) or 'none'}"
    if ours is CARAFEPack:
        channels = module.up_kernel**2 * module.up_group * module.scale_factor**2
        encoder = module.content_encoder
        shape = getattr(encoder, "out_channels", None), getattr(encoder, "stride", None)
        if shape != (channels, (1, 1)):
            return f"its content_encoder has not {channels} channels and a stride of 1"
    if "forward" in vars(module):
        return "it has a forward of its own"
    overridden = [
        f"{cls.__qualname__} overrides {name}"
        for cls in subclasses
        for name in vars(cls)
        if name in vars(ours) and not name.startswith("__")
    ]
    return ", ".join(overridden)
