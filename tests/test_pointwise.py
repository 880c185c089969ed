"""The pointwise convolution of up to three maps, against the reference in fp64."""

import pytest
import torch
from helpers import LAYOUTS, assert_close, fp64, poisoned_memory, value_and_grads
from torch import Tensor

import swformer_fast as sf
from swformer_fast import reference

pytestmark = pytest.mark.skipif(sf.backends()["cpp"] != "available", reason="the extension is not built")


@pytest.fixture(autouse=True)
def kernel() -> object:
    with sf.use_backend("cpp"):
        yield


def arguments(
    dtype: torch.dtype, batch: int, widths: tuple[int, ...], out: int, size: tuple[int, int], weights: int = 1
):
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    maps = [torch.randn(batch, c, *size, dtype=dtype, requires_grad=True) for c in widths] + [None] * (3 - len(widths))
    weight = torch.randn(weights, out, sum(widths), dtype=parameter, requires_grad=True)
    bias = torch.randn(out, dtype=parameter, requires_grad=True)
    return (*maps, weight, bias, torch.randn(batch, out, *size, dtype=dtype, requires_grad=True))


def check(args: tuple, dtype: torch.dtype) -> None:
    with poisoned_memory():
        actual = value_and_grads(torch.ops.swformer_fast.pointwise, args)
    assert_close(actual, value_and_grads(reference.pointwise, fp64(args)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (16, 15), (33, 40)])
@pytest.mark.parametrize("widths", [(5,), (8, 3), (16, 9, 24)])
def test_matches_reference(dtype: torch.dtype, size: tuple[int, int], widths: tuple[int, ...]) -> None:
    # Products of 30 terms with unit weights: half-precision storage of the gradients of x is the only rounding.
    check(arguments(dtype, 2, widths, 13, size), dtype)


def test_a_weight_for_each_image() -> None:
    check(arguments(torch.float32, 3, (6, 5, 4), 10, (7, 30), weights=3), torch.float32)


def test_a_bias_for_each_image() -> None:
    args = list(arguments(torch.float32, 3, (6, 5), 10, (7, 30), weights=3))
    args[4] = torch.randn(3, 10, requires_grad=True)
    check(tuple(args), torch.float32)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "channels_last"])
def test_layouts(layout: str) -> None:
    args = list(arguments(torch.float32, 2, (4, 3, 2), 5, (9, 20)))
    for i in (0, 1, 2, 5):
        args[i] = LAYOUTS[layout](args[i].detach()).requires_grad_()
    check(tuple(args), torch.float32)


def test_channels_last_falls_back() -> None:
    args = list(arguments(torch.float32, 2, (4,), 5, (9, 20)))
    args[0] = args[0].detach().contiguous(memory_format=torch.channels_last)
    with sf.use_backend("auto"):
        assert "channels_last" in sf.why_not("pointwise", *args)
        assert_close(torch.ops.swformer_fast.pointwise(*args), reference.pointwise(*fp64(args)), torch.float32)


def test_empty_batch_and_opcheck() -> None:
    args = arguments(torch.float32, 0, (4, 3), 5, (6, 7))
    output, grads = value_and_grads(torch.ops.swformer_fast.pointwise, args)
    assert output.shape == (0, 5, 6, 7)
    assert all(torch.isfinite(g).all() for g in grads if isinstance(g, Tensor))
    torch.library.opcheck(torch.ops.swformer_fast.pointwise, arguments(torch.float32, 2, (4, 3), 5, (6, 7)))


def test_double_backward() -> None:
    args = arguments(torch.float64, 1, (2, 1), 3, (2, 3))
    assert torch.autograd.gradcheck(torch.ops.swformer_fast.pointwise, args)
    assert torch.autograd.gradgradcheck(torch.ops.swformer_fast.pointwise, args)
