"""The Triton kernels of the Haar transform against the reference in fp64, interpreted unless there is a GPU."""

from collections.abc import Callable

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_close, fp64, poisoned_memory, value_and_grads, zero_kernel
from torch import Tensor

import swformer_fast as sf
from benchmarks.inspection.interpret import count_traffic
from swformer_fast import functional, reference

haar = pytest.importorskip("swformer_kernels._haar", reason="triton is not installed")
from swformer_kernels import haar_dwt2d, haar_idwt2d

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")


def _taps(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(2, dtype=dtype, device=DEVICE), torch.randn(2, dtype=dtype, device=DEVICE)


def _random(shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    return LAYOUTS[layout](torch.randn(shape, device=DEVICE).to(dtype))


def _expected(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = tuple(t.double().contiguous().requires_grad_() for t in inputs)
    output = fn(*inputs)
    return output.detach(), torch.autograd.grad(output, inputs, grad.double())


def _check_dwt(x: Tensor, low: Tensor, high: Tensor, grad_layout: str = "contiguous") -> tuple[Tensor, ...]:
    batch, channels, height, width = x.shape
    grad = _random((batch, 4 * channels, -(-height // 2), -(-width // 2)), grad_layout, x.dtype)
    with poisoned_memory():
        y = haar_dwt2d.haar_dwt2d(x, low, high)
        grads = haar_dwt2d.haar_dwt2d_backward(grad, x, low, high, True, True)
    assert y.dtype == grads[0].dtype == x.dtype
    expected, expected_grads = _expected(reference.haar_dwt2d, (x, low, high), grad)
    assert_close(y, expected, what="output")
    assert_close(grads, expected_grads, what="gradient")
    return y, *grads


def _check_idwt(
    y: Tensor, low: Tensor, high: Tensor, height: int, width: int, grad_layout: str = "contiguous"
) -> tuple[Tensor, ...]:
    grad = _random((y.shape[0], y.shape[1] // 4, height, width), grad_layout, y.dtype)
    with poisoned_memory():
        x = haar_idwt2d.haar_idwt2d(y, low, high, height, width)
        grads = haar_idwt2d.haar_idwt2d_backward(grad, y, low, high, height, width, True, True)
    assert x.dtype == grads[0].dtype == y.dtype
    expected, expected_grads = _expected(
        lambda y, low, high: reference.haar_idwt2d(y, low, high, (height, width)), (y, low, high), grad
    )
    assert_close(x, expected, what="output")
    assert_close(grads, expected_grads, what="gradient")
    return x, *grads


@pytest.mark.parametrize("size", [*SIZES, (3, 5), (5, 2), (1, 96)])
def test_sizes(size: tuple[int, int]) -> None:
    height, width = size
    _check_dwt(_random((2, 3, *size)), *_taps())
    _check_idwt(_random((2, 12, -(-height // 2), -(-width // 2))), *_taps(), *size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    y, grad_x, *_ = _check_dwt(_random((2, 5, 17, 24), layout, dtype), *_taps())
    x, grad_y, *_ = _check_idwt(_random((2, 20, 9, 12), layout, dtype), *_taps(), 17, 24)
    expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert all(t.is_contiguous(memory_format=expected) for t in (y, grad_x, x, grad_y))


@pytest.mark.parametrize("grad_layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layouts_of_the_gradient(layout: str, grad_layout: str) -> None:
    _check_dwt(_random((2, 8, 15, 32), layout), *_taps(), grad_layout)
    _check_idwt(_random((2, 32, 8, 16), layout), *_taps(), 15, 32, grad_layout)


def test_half_filters() -> None:
    _check_dwt(_random((1, 2, 6, 7), dtype=torch.bfloat16), *(t.bfloat16() for t in _taps()))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (0, 3, 1, 1)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    _, _, height, width = shape
    x, taps = _random(shape), _taps()
    y = haar_dwt2d.haar_dwt2d(x, *taps)
    assert y.shape == (0, 12, -(-height // 2), -(-width // 2))
    assert haar_idwt2d.haar_idwt2d(y, *taps, height, width).shape == shape
    grads = haar_dwt2d.haar_dwt2d_backward(y, x, *taps, True, True)
    assert grads[0].shape == shape
    assert_close(grads[1:], (torch.zeros(2), torch.zeros(2)))
    grads = haar_idwt2d.haar_idwt2d_backward(x, y, *taps, height, width, True, True)
    assert grads[0].shape == y.shape
    assert_close(grads[1:], (torch.zeros(2), torch.zeros(2)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_only_what_is_needed(layout: str) -> None:
    x, taps = _random((1, 4, 6, 9), layout), _taps()
    grad = _random((1, 16, 3, 5))
    full = haar_dwt2d.haar_dwt2d_backward(grad, x, *taps, True, True)
    only_x = haar_dwt2d.haar_dwt2d_backward(grad, x, *taps, True, False)
    only_taps = haar_dwt2d.haar_dwt2d_backward(grad, x, *taps, False, True)
    assert [g.numel() for g in only_x[1:]] == [0, 0]
    assert only_taps[0].numel() == 0
    assert torch.equal(only_x[0], full[0])
    assert torch.equal(torch.stack(only_taps[1:]), torch.stack(full[1:]))
    assert [g.numel() for g in haar_dwt2d.haar_dwt2d_backward(grad, x, *taps, False, False)] == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bitwise(dtype: torch.dtype) -> None:
    x, taps, grad = _random((2, 3, 33, 70), dtype=dtype), _taps(), _random((2, 12, 17, 35), dtype=dtype)
    first, second = (haar_dwt2d.haar_dwt2d_backward(grad, x, *taps, True, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    first, second = (haar_idwt2d.haar_idwt2d_backward(x, grad, *taps, 33, 70, True, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_many_programs_reduce(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tiles than partial sums: every program takes several tiles."""
    monkeypatch.setattr(haar, "_MAX_PARTIALS", 3)
    _check_dwt(_random((2, 3, 64, 65)), *_taps())
    _check_idwt(_random((2, 12, 32, 33)), *_taps(), 64, 65)


def test_nan_and_infinity_stay_where_they_belong() -> None:
    x, taps = torch.randn(1, 2, 7, 9, device=DEVICE), _taps()
    x[0, 0, 6, 8], x[0, 1, 2, 3] = float("nan"), float("inf")
    y = haar_dwt2d.haar_dwt2d(x, *taps)
    expected = reference.haar_dwt2d(x, *taps)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


def test_fp64_is_refused() -> None:
    x, taps = torch.randn(1, 1, 4, 4, dtype=torch.float64), _taps()
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
        haar_dwt2d.haar_dwt2d(x, *taps)
    with pytest.raises(TypeError, match="y must be"):
        haar_idwt2d.haar_idwt2d(x, *taps, 8, 8)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_through_the_op(layout: str) -> None:
    inputs = tuple(t.requires_grad_() for t in (_random((2, 3, 5, 7), layout), *_taps()))
    with sf.use_backend("triton"):
        actual = value_and_grads(functional.haar_dwt2d, inputs)
    assert_close(actual, value_and_grads(reference.haar_dwt2d, fp64(inputs)))


@pytest.mark.parametrize(
    ("kernel", "outputs"), [("analysis_kernel", (4, 8)), ("synthesis_kernel", (4, 8)), ("sum_taps_kernel", (1,))]
)
def test_zeroed_kernel_fails(kernel: str, outputs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
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
