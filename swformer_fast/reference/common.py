"""What the reference modules share: a same-padded convolution and checks of constructor arguments."""

import sys
from collections.abc import Collection
from numbers import Integral, Real
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parameters import Norm


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


def batch_norms(*norms: nn.Module) -> bool:
    """Whether these do what nn.BatchNorm2d does: an nn.SyncBatchNorm too where there is nothing to synchronise."""
    return as_defined(nn.BatchNorm2d, *norms) or all(
        as_defined(nn.BatchNorm2d, norm) or (as_defined(nn.SyncBatchNorm, norm) and not _synchronises(norm))
        for norm in norms
    )


def _synchronises(norm: nn.Module) -> bool:
    return norm.training and torch.distributed.is_available() and torch.distributed.is_initialized()


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


# nn.Module looks for all that follows in classes first, which for a block's would take longer than its kernels on a
# small image. What is not where it belongs is parametrised.


def submodules(module: nn.Module, *names: str) -> list[Any]:
    modules = module._modules
    return [modules[name] for name in names]


def parameters_of(module: nn.Module, *names: str) -> list[Any]:
    parameters = module._parameters
    try:
        return [parameters[name] for name in names]
    except KeyError:
        return [getattr(module, name) for name in names]


def norm_parameters(norm: nn.Module) -> Norm:
    """Those of a batch normalisation."""
    parameters, buffers = norm._parameters, norm._buffers
    try:
        statistics = buffers["running_mean"], buffers["running_var"]
        return Norm(*statistics, parameters["weight"], parameters["bias"])  # type: ignore[arg-type]
    except KeyError:
        return Norm(*[getattr(norm, name) for name in Norm._fields])


def conv_parameters(conv: nn.Module) -> tuple[Any, Any]:
    """Weight and bias of a `plain` convolution."""
    parameters = conv._parameters
    try:
        return parameters["weight"], parameters["bias"]
    except KeyError:
        weight: Any = conv.weight
        return weight, conv.bias


# arguments (numpy's numbers come back as Python's) --------------------------------------------------------------------

_GREATEST = sys.float_info.max
LARGEST = 2**31 - 1
"""More channels, blocks or pixels than that are a mistake, and overflow somewhere."""


def check_integer(name: str, value: Any) -> int:
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return cast(int, value)
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    return int(value)


def check_positive(name: str, value: Any) -> int:
    value = check_integer(name, value)
    if not 1 <= value <= LARGEST:
        raise ValueError(f"{name} must be at least 1 and at most {LARGEST}, got {value}")
    return value


def check_odd(name: str, value: Any) -> int:
    value = check_positive(name, value)
    if value % 2 == 0:
        raise ValueError(f"{name} must be odd, got {value}")
    return value


def check_number(name: str, value: Any, least: float = -_GREATEST) -> float:
    if type(value) is float and least <= value <= _GREATEST:
        return value
    if type(value) is not int:
        if isinstance(value, torch.SymFloat):
            return cast(float, value)
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
        value = float(value)
    if not least <= value <= _GREATEST:
        bound = "" if least == -_GREATEST else f", {least} or more"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return value


def check_flag(name: str, value: Any) -> bool:
    if not isinstance(value, (int, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_sequence(name: str, value: Any, length: int) -> None:
    if not isinstance(value, (list, tuple)) or len(value) != length:
        raise ValueError(f"{name} must be a list or tuple of {length}, got {value!r}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
