"""What the reference modules share: a same-padded convolution and checks of constructor arguments."""

from collections.abc import Collection
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, groups: int = 1) -> Tensor:
    """`F.conv2d` that keeps H and W (zero padding, odd kernels), with the parameters cast to the dtype of `x`."""
    padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
    return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=padding, groups=groups)


def as_defined(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Whether calling these modules does what `kind` does and nothing more: no other forward, no hooks."""
    for module in modules:  # in loops and by __dict__: this runs at every call of a block
        state = module.__dict__
        if type(module).forward is not kind.forward or "forward" in state:
            return False
        if state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"]:
            return False
        if state["_backward_pre_hooks"]:
            return False
    return True


def plain(*layers: nn.Module) -> bool:
    """Whether convolutions are all that their weights and biases say, so that these may be read and they not called.

    Not so where they are adapted (LoRA), subclassed, hooked (pruning, weight_norm and spectral_norm of old), dilated,
    padded otherwise than by zeros, or have no bias.
    """
    if not as_defined(nn.Conv2d, *layers):
        return False
    for conv in layers:
        if type(conv) is not nn.Conv2d and not _is_convolution(conv):
            return False
        options = conv.__dict__
        height, width = options["kernel_size"]
        if options["padding"] != (height // 2, width // 2) or options["padding_mode"] != "zeros":
            return False
        if options["dilation"] != (1, 1) or options["stride"] != (1, 1):
            return False
        if type(conv) is nn.Conv2d and options["_parameters"].get("bias") is None:
            return False
    return True


def _is_convolution(conv: nn.Module) -> bool:
    """Of a subclass, one with parametrised parameters for instance."""
    return (
        isinstance(conv, nn.Conv2d)
        and type(conv)._conv_forward is nn.Conv2d._conv_forward
        and getattr(conv, "bias", None) is not None
    )


def conv_parameters(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a `plain` convolution."""
    return cast(Tensor, conv.weight), cast(Tensor, conv.bias)


def check_positive(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_odd(name: str, value: int) -> None:
    check_positive(name, value)
    if value % 2 == 0:
        raise ValueError(f"{name} must be odd, got {value}")


def check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
