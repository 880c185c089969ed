"""The fused block in half precision: the C++ kernels, and Triton's, interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from contract import KERNELS, needs_cpp
from helpers import perturb
from torch import Tensor, nn

import swformer_fast as sf

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUTPUT = {torch.bfloat16: 1e-2, torch.float16: 1e-3}
GRADIENTS = {torch.bfloat16: 1e-2, torch.float16: 3e-3}
"""Relative RMS: what eight or eleven bits of every map between the kernels leave."""
SCALE = 1024.0
"""Of losses, as fp16's gradients need it."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])


InPairs = Callable[[bool], bool]


@pytest.fixture
def in_pairs() -> Iterator[InPairs]:
    """`multiply_in_pairs` of the C++ kernels, as it was afterwards."""
    switch = torch.ops._swformer_fast.multiply_in_pairs
    before = switch()
    yield switch
    switch(before)


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def check_block(backend: str, device: str, dtype: torch.dtype, norms: str, train: bool, *size: int) -> None:
    """Outputs and all gradients of a block of that dtype against fp64, with and without gradients."""
    fast = sf.SWFormerBlock(size[1], scale_init=0.5)
    perturb(fast)
    fast.to(device, dtype)
    for module in fast.modules():
        if norms == "fp32" and isinstance(module, nn.BatchNorm2d):
            module.float()
    slow = sf.reference.SWFormerBlock(size[1]).to(device).double()
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(size, device=device).to(dtype).requires_grad_()
    in_fp64 = x.detach().double().requires_grad_()
    expected = slow.train(train)(in_fp64)
    wanted = torch.autograd.grad(SCALE * expected.square().mean(), (in_fp64, *slow.parameters()))
    with sf.use_backend(backend):
        output = fast.train(train)(x)
        grads = torch.autograd.grad(SCALE * output.float().square().mean(), (x, *fast.parameters()))
        with torch.no_grad():
            alone = fast(x)
    assert output.dtype == alone.dtype == dtype
    assert error(output, expected) < OUTPUT[dtype]
    assert train or error(alone, expected) < OUTPUT[dtype]
    largest = max(w.norm() for w in wanted)
    for grad, want in zip(grads, wanted, strict=True):
        # A bias before a normalisation has a gradient of rounding errors alone.
        assert (grad.double() - want).norm() < GRADIENTS[dtype] * (want.norm() + 3e-2 * largest)


@pytest.mark.skipif("triton" not in KERNELS, reason="triton is not installed")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norms", [pytest.param("of the model", marks=pytest.mark.slow), "fp32"])
@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.bfloat16], ids=["fp16", "bf16"]
)
def test_block_on_a_gpu(dtype: torch.dtype, norms: str, train: bool) -> None:
    check_block("triton", DEVICE, dtype, norms, train, 2, 4, 5, 8)


@needs_cpp
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("norms", ["of the model", "fp32"])
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("size", [(2, 7, 33, 21), (1, 16, 64, 40)], ids=str)
@DTYPES
def test_block_on_a_cpu(
    dtype: torch.dtype, size: tuple[int, ...], pairs: bool, norms: str, train: bool, in_pairs: InPairs
) -> None:
    if in_pairs(pairs) != pairs:
        pytest.skip("this processor has no products of bf16 in pairs")
    check_block("cpp", "cpu", dtype, norms, train, *size)


@needs_cpp
def test_pairs_are_taken(in_pairs: InPairs) -> None:
    """Rounded weights give other bits, and as small an error."""
    if not in_pairs(True):
        pytest.skip("this processor has no products of bf16 in pairs")
    block = sf.SWFormerBlock(24, scale_init=0.5).eval().bfloat16()
    x = torch.randn(1, 24, 32, 48).bfloat16()
    with torch.no_grad():
        in_pairs(True)
        first = block(x)
        in_pairs(False)
        second = block(x)
    assert not torch.equal(first, second)
    assert error(first, second.double()) < OUTPUT[torch.bfloat16]


@needs_cpp
def test_extremes_in_pairs(in_pairs: InPairs) -> None:
    """Infinities and NaN go where they go in the definition; an odd number of channels adds nothing to a sum."""
    in_pairs(True)
    x = torch.randn(1, 5, 4, 40).bfloat16()
    x[0, 2, 1, 3], x[0, 4, 2, 39], x[0, 0, 3, 7] = float("inf"), float("nan"), -float("inf")
    weight, bias = torch.rand(1, 3, 5) + 0.1, torch.randn(3)
    actual = torch.ops.swformer_fast.pointwise(x, None, None, weight, bias, None)
    expected = sf.reference.pointwise(x.double(), None, None, weight.double(), bias.double())
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.isposinf(), expected.isposinf())
    assert torch.equal(actual.isneginf(), expected.isneginf())
    finite = expected.isfinite()
    assert error(actual[finite], expected[finite]) < OUTPUT[torch.bfloat16]


@needs_cpp
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_autocast_on_a_cpu(dtype: torch.dtype, train: bool) -> None:
    """fp32 parameters, one cast of the input, an fp32 result, gradients of fp32."""
    fast = sf.SWFormerBlock(12, scale_init=0.5)
    perturb(fast)
    slow = sf.reference.SWFormerBlock(12).double().train(train)
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(2, 12, 32, 30)
    expected = slow(x.double())
    wanted = torch.autograd.grad(SCALE * expected.square().mean(), tuple(slow.parameters()))
    with torch.autocast("cpu", dtype):
        output = fast.train(train)(x)
        with torch.autocast("cpu", enabled=False):
            exact = fast.eval()(x)
    grads = torch.autograd.grad(SCALE * output.square().mean(), tuple(fast.parameters()))
    assert output.dtype == torch.float32
    assert error(output, expected) < OUTPUT[dtype]
    assert error(exact, slow.eval()(x.double())) < 5e-6
    largest = max(w.norm() for w in wanted)
    for grad, want in zip(grads, wanted, strict=True):
        assert grad.dtype == torch.float32
        assert (grad.double() - want).norm() < GRADIENTS[dtype] * (want.norm() + 3e-2 * largest)


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
