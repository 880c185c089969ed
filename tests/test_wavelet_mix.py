"""wavelet_mix: filters, and errors of its own. What every op keeps is in test_contract.py."""

import pytest
import torch
from contract import arguments, needs_cpp
from helpers import assert_close, assert_matches, poisoned_memory

import swformer_fast as sf
from swformer_fast import functional, reference
from swformer_fast.reference.haar_dwt2d import HAAR_HIGH, HAAR_LOW

NAMES = ("x", "weight", "bias", "dec_lo", "dec_hi", "rec_lo", "rec_hi")


@needs_cpp
def test_filter_gradients_that_cancel() -> None:
    """An image far from zero: the filters' gradients are small sums of large terms."""
    *args, _ = arguments("wavelet_mix", 2, 8, 128, 128, mean=100)
    with sf.use_backend("cpp"), poisoned_memory():
        assert_matches(functional.wavelet_mix, reference.wavelet_mix, args, grad=torch.randn(2, 8, 128, 128))


@needs_cpp
def test_haar_filters_and_a_passing_kernel_change_nothing() -> None:
    x, weight, bias, *_ = arguments("wavelet_mix", 1, 2, 33, 34, dtype=torch.float64)
    low, high = (torch.tensor(t, dtype=torch.float64) for t in (HAAR_LOW, HAAR_HIGH))
    passing = torch.zeros_like(weight)
    passing[:, :, 1, 1] = 1
    with sf.use_backend("cpp"):
        y = functional.wavelet_mix(x, passing, torch.zeros_like(bias), low, high, low, high)
    assert_close(y, x)


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (ValueError, r"weight must have shape \(8, 1, 3, 3\), got \(2, 1, 3, 3\)", {"weight": torch.ones(2, 1, 3, 3)}),
        (ValueError, "weight must have a square kernel of odd side", {"weight": torch.ones(8, 1, 4, 4)}),
        (ValueError, r"bias must have shape \(8,\), got \(2,\)", {"bias": torch.ones(2)}),
        (ValueError, r"rec_hi must have shape \(2,\), got \(3,\)", {"rec_hi": torch.ones(3)}),
        (TypeError, "dec_lo must have the dtype of the image", {"dec_lo": torch.ones(2, dtype=torch.float64)}),
        (TypeError, "dec_hi must be a torch.Tensor, got NoneType", {"dec_hi": None}),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, object]) -> None:
    shapes = ((1, 2, 4, 4), (8, 1, 3, 3), (8,), (2,), (2,), (2,), (2,))
    args = {name: torch.ones(shape) for name, shape in zip(NAMES, shapes, strict=True)} | change
    with pytest.raises(error, match=message):
        functional.wavelet_mix(**args)
