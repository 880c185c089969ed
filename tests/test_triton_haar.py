"""The Triton kernels of the Haar transform against the reference in fp64, interpreted unless there is a GPU."""

from collections.abc import Callable

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_close, poisoned_memory, zero_kernel
from torch import Tensor

from benchmarks.inspection.interpret import count_traffic
from swformer_fast import reference

haar = pytest.importorskip("swformer_kernels._haar", reason="triton is not installed")
from swformer_kernels import haar_dwt2d, haar_idwt2d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")


def _taps() -> tuple[Tensor, Tensor]:
    return torch.randn(2, device=DEVICE), torch.randn(2, device=DEVICE)


def _random(shape: tuple[int, ...], layout: str = "contiguous") -> Tensor:
    return LAYOUTS[layout](torch.randn(shape, device=DEVICE))


def _expected(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = tuple(t.double().contiguous().requires_grad_() for t in inputs)
    output = fn(*inputs)
    return output.detach(), torch.autograd.grad(output, inputs, grad.double())


def _check_dwt(x: Tensor, low: Tensor, high: Tensor) -> None:
    batch, channels, height, width = x.shape
    grad = _random((batch, 4 * channels, -(-height // 2), -(-width // 2)))
    with poisoned_memory():
        y = haar_dwt2d.haar_dwt2d(x, low, high)
        grads = haar_dwt2d.haar_dwt2d_backward(grad, x, low, high, True, True)
    assert y.dtype == grads[0].dtype == x.dtype
    expected, expected_grads = _expected(reference.haar_dwt2d, (x, low, high), grad)
    assert_close(y, expected, what="output")
    assert_close(grads, expected_grads, what="gradient")


def _check_idwt(y: Tensor, low: Tensor, high: Tensor, height: int, width: int) -> None:
    grad = _random((y.shape[0], y.shape[1] // 4, height, width))
    with poisoned_memory():
        x = haar_idwt2d.haar_idwt2d(y, low, high, height, width)
        grads = haar_idwt2d.haar_idwt2d_backward(grad, y, low, high, height, width, True, True)
    assert x.dtype == grads[0].dtype == y.dtype
    expected, expected_grads = _expected(
        lambda y, low, high: reference.haar_idwt2d(y, low, high, (height, width)), (y, low, high), grad
    )
    assert_close(x, expected, what="output")
    assert_close(grads, expected_grads, what="gradient")


@pytest.mark.parametrize("size", [*SIZES, (3, 5), (5, 2), (1, 96)])
def test_sizes(size: tuple[int, int]) -> None:
    height, width = size
    _check_dwt(_random((2, 3, *size)), *_taps())
    _check_idwt(_random((2, 12, -(-height // 2), -(-width // 2))), *_taps(), *size)


def test_many_programs_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than partial sums: every program takes several tiles."""
    monkeypatch.setattr(haar, "_MAX_PARTIALS", 3)
    _check_dwt(_random((2, 3, 64, 65)), *_taps())
    _check_idwt(_random((2, 12, 32, 33)), *_taps(), 64, 65)


def test_fp64_is_refused() -> None:
    x, taps = torch.randn(1, 1, 4, 4, dtype=torch.float64), _taps()
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
        haar_dwt2d.haar_dwt2d(x, *taps)
    with pytest.raises(TypeError, match="y must be"):
        haar_idwt2d.haar_idwt2d(x, *taps, 8, 8)


@pytest.mark.parametrize(
    ("kernel", "outputs"),
    [
        ("analysis_kernel", ("out", "partials")),
        ("synthesis_kernel", ("out", "partials")),
        ("sum_taps_kernel", ("taps",)),
    ],
)
def test_zeroed_kernel_fails(kernel: str, outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    zero_kernel(monkeypatch, kernel, *outputs)
    with pytest.raises(AssertionError):
        _check_dwt(_random((1, 2, 6, 8)), *_taps())
    with pytest.raises(AssertionError):
        _check_idwt(_random((1, 8, 3, 4)), *_taps(), 6, 8)


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(1, 8, 32, 64), (1, 3, 33, 63)])
def test_traffic(shape: tuple[int, ...], layout: str) -> None:
    x, taps = _random(shape, layout), _taps()
    size = shape[2:]
    y = haar_dwt2d.haar_dwt2d(x, *taps)
    for call, inputs, outputs in (
        (lambda: haar_dwt2d.haar_dwt2d(x, *taps), (x,), (y,)),
        (lambda: haar_idwt2d.haar_idwt2d(y, *taps, *size), (y,), (x,)),
        (lambda: haar_dwt2d.haar_dwt2d_backward(y, x, *taps, True, True), (y, x), (x,)),
        (lambda: haar_idwt2d.haar_idwt2d_backward(x, y, *taps, *size, True, True), (x, y), (y,)),
    ):
        with count_traffic() as traffic:
            call()
        compulsory = sum(t.nbytes for t in inputs + outputs)
        assert traffic.total <= 1.1 * compulsory
        assert traffic.distinct_loaded >= sum(t.nbytes for t in inputs)
        assert traffic.stored == traffic.distinct_stored >= sum(t.nbytes for t in outputs)
