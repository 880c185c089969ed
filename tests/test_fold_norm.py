"""fold_norm: what it stands for. What every op keeps is in test_contract.py."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import KERNELS, arguments, check, device_of
from helpers import assert_close
from torch import Tensor

import swformer_fast as sf

GROUPS = (("mean", "variance"), ("norm_weight",), ("norm_bias",), ("then_weight", "then_bias"), ("scale",))
"""Inputs of fold_norm that come together."""
CHOICES = [c for c in product((True, False), repeat=len(GROUPS)) if c[0] or not (c[1] or c[2])]


def fold_norm_arguments(choice: tuple[bool, ...], channels: int, device: str = "cpu") -> list[Any]:
    args = arguments("fold_norm", 1, channels, 1, 1, device=device)
    names = [spec.name for spec in sf.ops.CATALOGUE["fold_norm"].inputs]
    for group, wanted in zip(GROUPS, choice, strict=True):
        for name in () if wanted else group:
            args[names.index(name)] = None
    if args[names.index("then_weight")] is None and args[names.index("scale")] is not None:
        args[names.index("scale")] = torch.rand(len(args[1]), device=device).requires_grad_()
    return args


@pytest.mark.parametrize("backend", KERNELS)
@pytest.mark.parametrize("choice", CHOICES)
def test_fold_norm_with_some_of_its_parts(choice: tuple[bool, ...], backend: str) -> None:
    with sf.use_backend(backend):
        check("fold_norm", fold_norm_arguments(choice, 5, device_of(backend)))


@pytest.mark.parametrize("choice", CHOICES)
def test_fold_norm_is_what_it_folds(choice: tuple[bool, ...]) -> None:
    """One convolution in place of the layers."""
    args = [a.detach().double() if isinstance(a, Tensor) else a for a in fold_norm_arguments(choice, 4)]
    weight, bias, mean, variance, norm_weight, norm_bias, then_weight, then_bias, scale, eps = args
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    y = x if mean is None else F.batch_norm(x, mean, variance, norm_weight, norm_bias, False, 0.0, eps)
    y = F.conv2d(y, weight[..., None, None], bias)
    if then_weight is not None:
        inner = then_weight.shape[1]
        y = torch.cat((y[:, :-inner], F.conv2d(y[:, -inner:], then_weight[..., None, None], then_bias)), 1)
    y = y if scale is None else scale[:, None, None] * y
    folded = torch.ops.swformer_fast.fold_norm(*args)
    outputs = y.shape[1]
    weight, bias = folded.split((outputs * 4, outputs))
    assert_close(F.conv2d(x, weight.view(outputs, 4, 1, 1), bias), y, torch.float64)
