"""What the reference modules share: a same-padded convolution and checks of constructor arguments."""

from collections.abc import Collection
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, groups: int = 1) -> Tensor:
    """`F.conv2d` that keeps H and W (zero padding, odd kernels), with the parameters cast to the dtype of `x`."""
    padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
    return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=padding, groups=groups)


def conv_parameters(conv: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of an nn.Conv2d that has both; anything else in its place would never be called."""
    if not isinstance(conv, nn.Conv2d):
        raise TypeError(f"need an nn.Conv2d, whose parameters are used without calling it, got {type(conv).__name__}")
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
