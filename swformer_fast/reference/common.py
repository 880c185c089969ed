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
    return all(
        type(m).forward is kind.forward
        and "forward" not in m.__dict__
        and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks)
        for m in modules
    )


def plain(*layers: nn.Module) -> bool:
    """Whether convolutions are all that their weights and biases say, so that these may be read and they not called.

    Not so where they are adapted (LoRA), subclassed, hooked (pruning, weight_norm and spectral_norm of old), dilated,
    padded otherwise than by zeros, or have no bias.
    """
    return as_defined(nn.Conv2d, *layers) and all(map(_says_all, layers))


def _says_all(conv: nn.Module) -> bool:
    return (
        isinstance(conv, nn.Conv2d)
        and type(conv)._conv_forward is nn.Conv2d._conv_forward
        and conv.bias is not None
        and conv.padding_mode == "zeros"
        and conv.padding == (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
        and conv.dilation == conv.stride == (1, 1)
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
