"""depthwise_gelu: GELU to the last digits, and errors of its own. What every op keeps is in test_contract.py."""

import pytest
import torch
from contract import needs_cpp
from helpers import LAYOUTS, value_and_grads

import swformer_fast as sf
from swformer_fast import functional


@needs_cpp
def test_gelu_is_exact_to_a_millionth() -> None:
    """A kernel that passes the pixels on shows GELU and, as its gradient, GELU's derivative."""
    x = torch.linspace(-12, 12, 1 << 18).view(1, 1, 1, -1).requires_grad_()
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1
    in_fp64 = x.detach().double().requires_grad_()
    with sf.use_backend("cpp"):
        y = functional.depthwise_gelu(x, weight, torch.zeros(1))
        y.sum().backward()
    expected = torch.nn.functional.gelu(in_fp64)
    expected.sum().backward()
    assert (y - expected).abs().max() < 1e-6
    assert (x.grad - in_fp64.grad).abs().max() < 1e-6
    small = (in_fp64.abs() < 1e-2) & (in_fp64 != 0)
    assert ((y - expected)[small] / expected[small]).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_special_values(layout: str, dtype: torch.dtype) -> None:
    """Each channel is one pixel, so that no infinity meets a zero weight."""
    values = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38, 50.0, -50.0, 88.0]
    x = torch.tensor(values, dtype=dtype).view(1, -1, 1, 1)
    weight, bias = torch.ones(len(values), 1, 3, 3, dtype=dtype), torch.zeros(len(values), dtype=dtype)
    args = (LAYOUTS[layout](x).requires_grad_(), weight, bias)
    actual = value_and_grads(functional.depthwise_gelu, args, torch.ones(x.shape))
    expected = value_and_grads(torch.nn.functional.gelu, (x.double().requires_grad_(),), torch.ones(x.shape))
    torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(actual[1][0].double(), expected[1][0], rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"weight must have shape \(2, 1, 3, 3\), got \(3, 1, 3, 3\)", {"weight": torch.ones(3, 1, 3, 3)}),
        (ValueError, "weight must have a square kernel of odd side", {"weight": torch.ones(2, 1, 4, 4)}),
        (ValueError, r"weight must have shape \(channels, 1, k, k\), got \(2, 3, 3\)", {"weight": torch.ones(2, 3, 3)}),
        (ValueError, r"bias must have shape \(2,\), got \(3,\)", {"bias": torch.ones(3)}),
        (TypeError, "bias must have the dtype of the image", {"bias": torch.ones(2, dtype=torch.float64)}),
        (TypeError, "weight must be a torch.Tensor, got NoneType", {"weight": None}),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, object]) -> None:
    args = {"x": torch.ones(1, 2, 4, 4), "weight": torch.ones(2, 1, 3, 3), "bias": torch.ones(2)} | change
    with pytest.raises(error, match=message):
        functional.depthwise_gelu(**args)


@needs_cpp
def test_gelu_of_bf16() -> None:
    """A shorter form: its errors are below those of rounding to bf16, but where GELU is next to nothing."""
    x = torch.linspace(-9, 9, 3001).bfloat16()[None, None, None]
    weight = torch.zeros(1, 1, 3, 3)
    weight[..., 1, 1] = 1
    y = torch.ops.swformer_fast.depthwise_gelu(x, weight, torch.zeros(1), False)[0]
    expected = torch.nn.functional.gelu(x.double())
    assert ((y.double() - expected).abs() <= expected.abs() * 2**-8 + 2e-4).all()
