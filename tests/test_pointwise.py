"""pointwise: a weight or a bias for each image, and several widths. What every op keeps is in test_contract.py."""

import pytest
import torch
from contract import check, image, needs_cpp, parameter

import swformer_fast as sf

pytestmark = needs_cpp


def arguments(
    dtype: torch.dtype, batch: int, widths: tuple[int, ...], out: int, size: tuple[int, int], weights: int = 1
) -> list:
    parameter_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    maps = [image((batch, c, *size)).to(dtype).requires_grad_() for c in widths] + [None] * (3 - len(widths))
    weight = parameter("weight", (weights, out, sum(widths))).to(parameter_dtype)
    bias = parameter("bias", (out,)).to(parameter_dtype)
    return [
        *maps,
        weight.requires_grad_(),
        bias.requires_grad_(),
        image((batch, out, *size)).to(dtype).requires_grad_(),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 15), (33, 40)])
@pytest.mark.parametrize("widths", [(5,), (8, 3), (16, 9, 24)])
def test_widths(dtype: torch.dtype, size: tuple[int, int], widths: tuple[int, ...]) -> None:
    with sf.use_backend("cpp"):
        check("pointwise", arguments(dtype, 2, widths, 13, size))


def test_a_weight_for_each_image() -> None:
    with sf.use_backend("cpp"):
        check("pointwise", arguments(torch.float32, 3, (6, 5, 4), 10, (7, 30), weights=3))


def test_a_bias_for_each_image() -> None:
    args = arguments(torch.float32, 3, (6, 5), 10, (7, 30), weights=3)
    args[4] = parameter("weight", (3, 10)).float().requires_grad_()
    with sf.use_backend("cpp"):
        check("pointwise", args)
