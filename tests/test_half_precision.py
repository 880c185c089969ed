"""The fused block in half precision, as on a GPU: Triton's kernels, interpreted where there is none."""

from __future__ import annotations

import pytest
import torch
from contract import KERNELS
from helpers import perturb
from torch import Tensor, nn

import swformer_fast as sf
from swformer_fast import fusion

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif("triton" not in KERNELS, reason="triton is not installed")
OUTPUT = {torch.bfloat16: 1e-2, torch.float16: 1e-3}
GRADIENTS = {torch.bfloat16: 4e-2, torch.float16: 4e-3}
"""Relative RMS: what eight or eleven bits of every map between the kernels leave."""


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusion, "foldable", lambda x: True)


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norms", [pytest.param("of the model", marks=pytest.mark.slow), "fp32"])
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=["fp16", "bf16"]
)
def test_block(dtype: torch.dtype, norms: str, train: bool) -> None:
    fast = sf.SWFormerBlock(4, scale_init=0.5)
    perturb(fast)
    fast.to(DEVICE, dtype)
    for module in fast.modules():
        if norms == "fp32" and isinstance(module, nn.BatchNorm2d):
            module.float()
    slow = sf.reference.SWFormerBlock(4).to(DEVICE).double()
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(2, 4, 5, 8, device=DEVICE).to(dtype).requires_grad_()
    in_fp64 = x.detach().double().requires_grad_()
    expected = slow.train(train)(in_fp64)
    wanted = torch.autograd.grad(expected.square().mean(), (in_fp64, *slow.parameters()))
    with sf.use_backend("triton"):
        output = fast.train(train)(x)
        grads = torch.autograd.grad(output.float().square().mean(), (x, *fast.parameters()))
        with torch.no_grad():
            alone = fast(x)
    assert output.dtype == alone.dtype == dtype
    assert error(output, expected) < OUTPUT[dtype]
    assert train or error(alone, expected) < OUTPUT[dtype]
    largest = max(w.norm() for w in wanted)
    for grad, want in zip(grads, wanted, strict=True):
        # A bias before a normalisation has a gradient of rounding errors alone.
        assert (grad.double() - want).norm() < GRADIENTS[dtype] * (want.norm() + 1e-2 * largest)


@pytest.mark.skipif(DEVICE != "cuda", reason="autocast of a CPU is another")
@pytest.mark.gpu
@pytest.mark.parametrize("train", [False, True])
def test_autocast(train: bool) -> None:
    """fp32 parameters, one cast of the input, an fp32 result."""
    fast = sf.SWFormerBlock(40, scale_init=0.5)
    perturb(fast)
    slow = sf.reference.SWFormerBlock(40).double()
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(2, 40, 64, 66, device=DEVICE)
    with torch.autocast("cuda", torch.bfloat16):
        output = fast.to(DEVICE).train(train)(x)
    assert output.dtype == torch.float32
    assert error(output, slow.to(DEVICE).train(train)(x.double())) < OUTPUT[torch.bfloat16]
