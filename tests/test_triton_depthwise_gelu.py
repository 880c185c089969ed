"""The Triton kernels of depthwise convolution and GELU against the reference in fp64, interpreted without a GPU."""

import pytest
import torch
from helpers import LAYOUTS, SIZES, check_launchers, zero_kernel
from torch import Tensor

from benchmarks.inspection.interpret import count_traffic
from swformer_fast import reference

depthwise_gelu = pytest.importorskip("swformer_kernels.depthwise_gelu", reason="triton is not installed")
stream = pytest.importorskip("swformer_kernels._stream")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")


def _random(shape: tuple[int, ...], layout: str = "contiguous") -> Tensor:
    return LAYOUTS[layout](torch.randn(shape, device=DEVICE))


def _parameters(channels: int) -> tuple[Tensor, Tensor]:
    return _random((channels, 1, 3, 3)), torch.randn(channels, device=DEVICE)


def _check(x: Tensor) -> None:
    parameters, grad = _parameters(x.shape[1]), _random(tuple(x.shape))
    check_launchers(depthwise_gelu, reference.depthwise_gelu, grad, x, *parameters)


@pytest.mark.parametrize("size", [*SIZES[:4], (3, 5), (5, 2), (2, 96), (65, 3)])
def test_sizes(size: tuple[int, int]) -> None:
    _check(_random((1, 2, *size)))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_several_strips_and_segments(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_STRIP_ROWS", (4, 2))
    monkeypatch.setattr(stream, "_MAX_LANES", 8)
    monkeypatch.setattr(stream, "_LANES_OF_CHANNELS_LAST", 8)
    _check(_random((2, 2, 9, 40), layout))


def test_what_is_refused() -> None:
    x, (weight, bias) = torch.randn(1, 2, 4, 4), _parameters(2)
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
        depthwise_gelu.depthwise_gelu(x.double(), weight, bias, False)
    with pytest.raises(ValueError, match="weight must be 3 x 3"):
        depthwise_gelu.depthwise_gelu(x, torch.randn(2, 1, 5, 5), bias, False)


@pytest.mark.parametrize(
    ("kernel", "outputs"),
    [
        ("depthwise_gelu_kernel", ("y",)),
        ("depthwise_gelu_kernel", ("partials",)),
        ("depthwise_gelu_backward_kernel", ("out", "partials")),
        ("sum_partials_kernel", ("outputs",)),
    ],
)
def test_zeroed_kernel_fails(kernel: str, outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
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
