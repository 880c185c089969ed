"""The Haar operators: PyWavelets' numbers, and errors of their own. What every op keeps is in test_contract.py."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from contract import refusal
from helpers import rel_rms

import swformer_fast as sf
from swformer_fast import functional


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (63, 64), (65, 96)])
def test_equals_pywavelets(backend: str, size: tuple[int, int]) -> None:
    pywt = pytest.importorskip("pywt")
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    low, (horizontal, vertical, diagonal) = pywt.dwt2(x.numpy(), "haar")
    expected = np.concatenate((low, horizontal, vertical, diagonal), axis=1)
    if refusal("haar_dwt2d", backend, (x, *functional.haar_filters(x.dtype, x.device))):
        pytest.skip("the compiled extension was not built")
    with sf.use_backend(backend):
        y = functional.haar_dwt2d(x)
        assert rel_rms(y, torch.from_numpy(expected)) < 1e-14
        assert rel_rms(functional.haar_idwt2d(y, output_size=size), x) < 1e-14


def test_default_filters_take_the_image_s_precision() -> None:
    x = torch.randn(1, 4, 6, 6)
    for function in (functional.haar_dwt2d, functional.haar_idwt2d):
        with torch.autocast("cpu", torch.bfloat16):
            assert function(x).dtype == torch.bfloat16
            assert function(x.double()).dtype == torch.float64
        assert function(x.half()).dtype == torch.float16


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (ValueError, r"dec_lo must have shape \(2,\)", lambda x: functional.haar_dwt2d(x, torch.ones(3))),
        (
            TypeError,
            "dec_hi must have the dtype of the image",
            lambda x: functional.haar_dwt2d(x, dec_hi=torch.ones(2, dtype=torch.float64)),
        ),
        (ValueError, "4 . C channels", lambda x: functional.haar_idwt2d(x[:, :3])),
        (ValueError, "output_size must be", lambda x: functional.haar_idwt2d(x, output_size=(5, 4))),
    ],
)
def test_errors(error: type[Exception], message: str, call: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(error, match=message):
        call(torch.ones(1, 4, 2, 2))
