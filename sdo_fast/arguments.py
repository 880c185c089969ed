"""Checks of arguments, for every public function: a wrong one is named before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_GREATEST = sys.float_info.max
_PLAIN = (Tensor, torch.nn.Parameter)


def is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def number(name: str, value: Any, least: float = -_GREATEST) -> float:
    """`value`, which must be a finite real number, as Python's own."""
    if type(value) is float and least <= value <= _GREATEST:
        return value
    if type(value) is not int:
        if isinstance(value, torch.SymFloat):
            return cast(float, value)
        if not isinstance(value, Real):
            raise TypeError(f"{name} must be a finite number, got {value!r}")
        value = float(value)
    if not least <= value <= _GREATEST:
        bound = "" if least == -_GREATEST else f", {least} or more"
        raise ValueError(f"{name} must be a finite number{bound}, got {value!r}")
    return value


def check_flag(name: str, value: Any) -> None:
    if not isinstance(value, (int, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_mapping(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Mapping):
        raise TypeError(f"{name} must be a mapping of argument names to values, got {type(value).__name__}")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_sequence(name: str, value: Any) -> None:
    if isinstance(value, (str, Tensor)) or not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        raise TypeError(f"{name} must be a list or tuple, got {type(value).__name__}")


def check_floating(name: str, tensor: Any) -> None:
    """Raise unless it is a dense tensor of a dtype that the arithmetic takes."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must have dtype float32, float64, float16 or bfloat16, got {tensor.dtype}")


def check_like(name: str, tensor: Any, other_name: str, other: Tensor) -> None:
    """Raise unless it is a dense tensor with the other's shape, dtype (but under autocast) and device."""
    if (
        type(tensor) in _PLAIN
        and type(other) in _PLAIN
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and tensor.shape == other.shape
        and tensor.dtype == other.dtype
        and tensor.device == other.device
    ):
        return
    check_floating(name, tensor)
    if tensor.shape != other.shape:
        raise ValueError(f"{name} must have the shape of {other_name}, {tuple(other.shape)}, got {tuple(tensor.shape)}")
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {tensor.device}")
    if tensor.dtype != other.dtype and (other.is_meta or not torch.is_autocast_enabled(other.device.type)):
        raise TypeError(f"{name} must have the dtype of {other_name}, {other.dtype}, got {tensor.dtype}")
    check_real(name, tensor, other_name, other)


def check_real(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Raise where one of them is a FakeTensor that the other cannot meet."""
    for fake, real in ((tensor, other), (other, tensor)):
        if isinstance(fake, FakeTensor) and type(real) in _PLAIN and not fake.fake_mode.allow_non_fake_inputs:
            got = "one" if fake is tensor else "none"
            raise TypeError(f"{name} must be a FakeTensor where {other_name} is one, and else none, got {got}")


def check_guidance(name: str, weight: Tensor, other_name: str, other: Tensor) -> None:
    """Raise unless a tensor can guide an x: it broadcasts and, on whatever device, holds numbers where x does."""
    check_floating(name, weight)
    sides = zip(reversed(weight.shape), reversed(other.shape), strict=False)
    if weight.dim() > other.dim() or any(a not in (1, b) for a, b in sides):
        raise ValueError(
            f"{name} must broadcast against {other_name} {tuple(other.shape)}, got shape {tuple(weight.shape)}"
        )
    if weight.is_meta and not other.is_meta:
        raise ValueError(f"{name} must be on the device of {other_name}, {other.device}, got {weight.device}")
    check_real(name, weight, other_name, other)


def check_generator(generator: Any) -> None:
    many = isinstance(generator, (list, tuple)) and all(isinstance(g, torch.Generator) for g in generator)
    if generator is not None and not many and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"generator must be a torch.Generator, one for each image, or None, got {type(generator).__name__}"
        )


def check_batch(name: str, x: Any) -> None:
    """Raise unless it is a batch of latents, or of images."""
    check_floating(name, x)
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape (B, C, ...), got {tuple(x.shape)}")


def numbers(**values: Any) -> list[float]:
    return [number(name, value) for name, value in values.items()]


def number_list(name: str, values: Sequence[Any]) -> list[float]:
    check_sequence(name, values)
    return [number(f"{name}[{i}]", value) for i, value in enumerate(values)]
