"""The Triton kernels of depthwise convolution and GELU against the reference in fp64, interpreted without a GPU."""

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_close, fp64, poisoned_memory, value_and_grads, zero_kernel
from torch import Tensor

import swformer_fast as sf
from benchmarks.inspection.interpret import count_traffic
from swformer_fast import functional, reference

depthwise_gelu = pytest.importorskip("swformer_kernels.depthwise_gelu", reason="triton is not installed")
stream = pytest.importorskip("swformer_kernels._stream")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")


def _random(shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    return LAYOUTS[layout](torch.randn(shape, device=DEVICE).to(dtype))


def _parameters(channels: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return _random((channels, 1, 3, 3), dtype=dtype), torch.randn(channels, device=DEVICE).to(dtype)


def _check(x: Tensor, grad_layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    parameters = _parameters(x.shape[1], dtype)
    grad, grad_sums = _random(tuple(x.shape), grad_layout, x.dtype), _random(tuple(x.shape[:2]))
    with poisoned_memory():
        y, sums = depthwise_gelu.depthwise_gelu(x, *parameters, True)
        grads = depthwise_gelu.depthwise_gelu_backward(grad, grad_sums, x, *parameters, True, True)
    assert y.dtype == grads[0].dtype == x.dtype
    assert sums.dtype == torch.float32
    inputs = tuple(t.double().contiguous().requires_grad_() for t in (x, *parameters))
    expected = reference.depthwise_gelu(*inputs)
    assert_close((y, sums), (expected, expected.sum((2, 3))), x.dtype, what="output")
    grad = grad.double() + grad_sums.double()[..., None, None]
    assert_close(grads, torch.autograd.grad(expected, inputs, grad), what="gradient")
    return y, grads[0]


@pytest.mark.parametrize("size", [*SIZES[:4], (3, 5), (5, 2), (2, 96), (65, 3)])
def test_sizes(size: tuple[int, int]) -> None:
    _check(_random((1, 2, *size)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_several_strips_and_segments(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_STRIP_ROWS", (4, 2))
    monkeypatch.setattr(stream, "_MAX_LANES", 8)
    monkeypatch.setattr(stream, "_LANES_OF_CHANNELS_LAST", 8)
    _check(_random((2, 2, 9, 40), layout))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    y, grad_x = _check(_random((2, 5, 7, 24), layout, dtype))
    expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=expected)
    assert grad_x.is_contiguous(memory_format=expected)


@pytest.mark.parametrize("grad_layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layouts_of_the_gradient(layout: str, grad_layout: str) -> None:
    _check(_random((2, 3, 5, 16), layout), grad_layout)


def test_half_parameters() -> None:
    x = _random((1, 3, 5, 6), dtype=torch.bfloat16)
    parameters = _parameters(3, torch.bfloat16)
    grads = depthwise_gelu.depthwise_gelu_backward(x, None, x, *parameters, True, True)
    assert [g.dtype for g in grads] == [torch.bfloat16] * 3
    _check(x, dtype=torch.bfloat16)


def test_transposed_weight() -> None:
    x, (weight, bias) = _random((1, 3, 4, 5)), _parameters(3)
    expected = depthwise_gelu.depthwise_gelu_backward(x, None, x, weight, bias, True, True)
    strided = weight.transpose(-1, -2).contiguous().transpose(-1, -2)
    actual = depthwise_gelu.depthwise_gelu_backward(x, None, x, strided, bias, True, True)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_empty_batch() -> None:
    x, parameters = _random((0, 3, 4, 5)), _parameters(3)
    assert [t.shape for t in depthwise_gelu.depthwise_gelu(x, *parameters, True)] == [x.shape, x.shape[:2]]
    grads = depthwise_gelu.depthwise_gelu_backward(x, None, x, *parameters, True, True)
    assert grads[0].shape == x.shape
    assert_close(grads[1:], tuple(torch.zeros_like(p) for p in parameters))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_only_what_is_needed(layout: str) -> None:
    x, parameters = _random((1, 4, 6, 9), layout), _parameters(4)
    given = _random((1, 4, 6, 9)), _random((1, 4))
    full = depthwise_gelu.depthwise_gelu_backward(*given, x, *parameters, True, True)
    only_x = depthwise_gelu.depthwise_gelu_backward(*given, x, *parameters, True, False)
    only_parameters = depthwise_gelu.depthwise_gelu_backward(*given, x, *parameters, False, True)
    assert [g.numel() for g in only_x[1:]] == [0, 0]
    assert only_parameters[0].numel() == 0
    assert torch.equal(only_x[0], full[0])
    assert all(torch.equal(a, b) for a, b in zip(only_parameters[1:], full[1:], strict=True))
    nothing = depthwise_gelu.depthwise_gelu_backward(*given, x, *parameters, False, False)
    assert [g.numel() for g in nothing] == [0, 0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_repeats_bitwise(dtype: torch.dtype) -> None:
    x, grad, parameters = _random((2, 3, 18, 20), dtype=dtype), _random((2, 3, 18, 20), dtype=dtype), _parameters(3)
    first, second = (depthwise_gelu.depthwise_gelu_backward(grad, None, x, *parameters, True, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("place", [(0, 0), (3, 4), (6, 8)])
def test_nan_stays_where_it_belongs(place: tuple[int, int]) -> None:
    """A NaN reaches its neighbours in the image, nothing else: not other planes, not the zero padding."""
    x, parameters = torch.randn(1, 2, 7, 9, device=DEVICE), _parameters(2)
    x[0, 0][place] = float("nan")
    leaf = x.clone().requires_grad_()
    expected = reference.depthwise_gelu(leaf, *parameters)
    grad = torch.randn_like(x)
    (expected_grad,) = torch.autograd.grad(expected, leaf, grad)
    assert torch.equal(depthwise_gelu.depthwise_gelu(x, *parameters, False)[0].isnan(), expected.isnan())
    actual = depthwise_gelu.depthwise_gelu_backward(grad, None, x, *parameters, True, False)[0]
    assert torch.equal(actual.isnan(), expected_grad.isnan())


def test_what_is_refused() -> None:
    x, (weight, bias) = torch.randn(1, 2, 4, 4), _parameters(2)
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
        depthwise_gelu.depthwise_gelu(x.double(), weight, bias, False)
    with pytest.raises(ValueError, match="weight must be 3 x 3"):
        depthwise_gelu.depthwise_gelu(x, torch.randn(2, 1, 5, 5), bias, False)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_through_the_op(layout: str) -> None:
    inputs = tuple(t.requires_grad_() for t in (_random((2, 3, 5, 7), layout), *_parameters(3)))
    with sf.use_backend("triton"):
        actual = value_and_grads(functional.depthwise_gelu, inputs)
    assert_close(actual, value_and_grads(reference.depthwise_gelu, fp64(inputs)))


@pytest.mark.parametrize(
    ("kernel", "outputs"),
    [
        ("depthwise_gelu_kernel", (2,)),
        ("depthwise_gelu_kernel", (6,)),
        ("depthwise_gelu_backward_kernel", (5, 9)),
        ("sum_weights_kernel", (1, 2)),
    ],
)
def test_zeroed_kernel_fails(kernel: str, outputs: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    zero_kernel(monkeypatch, kernel, *outputs)
    with pytest.raises(AssertionError):
        _check(_random((1, 2, 6, 8)))


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [(16, 64), (16, 136)])
def test_traffic(size: tuple[int, int], layout: str) -> None:
    x, parameters = _random((1, 2, *size), layout), _parameters(2)
    with count_traffic() as forward:
        depthwise_gelu.depthwise_gelu(x, *parameters, True)
    with count_traffic() as backward:
        depthwise_gelu.depthwise_gelu_backward(x.clone(), None, x, *parameters, True, True)
    for traffic, tensors in ((forward, 2), (backward, 3)):
        assert traffic.total <= 1.35 * tensors * x.nbytes
        assert traffic.stored == traffic.distinct_stored >= x.nbytes
