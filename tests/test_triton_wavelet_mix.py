"""The Triton kernels of the wavelet branch against the reference in fp64, interpreted unless there is a GPU."""

import pytest
import torch
from helpers import LAYOUTS, SIZES, check_launchers, zero_kernel
from torch import Tensor

from benchmarks.inspection.interpret import count_traffic
from swformer_fast import reference

wavelet_mix = pytest.importorskip("swformer_kernels.wavelet_mix", reason="triton is not installed")
stream = pytest.importorskip("swformer_kernels._stream")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")


def _off_a_boundary(x: Tensor) -> Tensor:
    """The rows of `x` as far apart as they were, but one element beyond a boundary of 16 bytes."""
    return torch.cat((x.new_zeros(1), x.flatten()))[1:].view(x.shape)


_LAYOUTS = LAYOUTS | {"off a boundary": _off_a_boundary}


def _random(shape: tuple[int, ...], layout: str = "contiguous", dtype: torch.dtype = torch.float32) -> Tensor:
    return _LAYOUTS[layout](torch.randn(shape, device=DEVICE).to(dtype))


def _parameters(channels: int, size: int = 3) -> tuple[Tensor, ...]:
    shapes = [(4 * channels, 1, size, size), (4 * channels,), (2,), (2,), (2,), (2,)]
    return tuple(torch.randn(shape, device=DEVICE) for shape in shapes)


def _check(x: Tensor, grad_layout: str = "contiguous", size: int = 3) -> None:
    parameters, grad = _parameters(x.shape[1], size), _random(tuple(x.shape), grad_layout, x.dtype)
    check_launchers(wavelet_mix, reference.wavelet_mix, grad, x, *parameters)


@pytest.mark.parametrize("size", [*SIZES[:4], (3, 5), (5, 2), (2, 96), (65, 3)])
def test_sizes(size: tuple[int, int]) -> None:
    _check(_random((1, 1, *size)))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 6)])
def test_five_by_five(size: tuple[int, int]) -> None:
    _check(_random((1, 2, *size)), size=5)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_several_strips_and_segments(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_STRIP_ROWS", (4, 2))
    monkeypatch.setattr(stream, "_MAX_LANES", 8)
    monkeypatch.setattr(stream, "_LANES_OF_CHANNELS_LAST", 8)
    _check(_random((2, 1, 11, 41), layout))
    _check(_random((1, 1, 10, 48), layout), size=5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 5])
def test_both_images_off_a_boundary(size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_MAX_LANES", 4)
    x = _random((1, 2, 6, 64), "off a boundary", dtype)
    assert x.data_ptr() % 16 == x.element_size()
    _check(x, "off a boundary", size)


def test_what_is_refused() -> None:
    x, (weight, *others) = torch.randn(1, 2, 4, 4), _parameters(2)
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
        wavelet_mix.wavelet_mix(x.double(), weight, *others, False)
    with pytest.raises(ValueError, match="weight must be 3 x 3 or 5 x 5"):
        wavelet_mix.wavelet_mix(x, torch.randn(8, 1, 7, 7), *others, False)


@pytest.mark.parametrize(
    ("kernel", "outputs"),
    [
        ("wavelet_kernel", ("y",)),
        ("wavelet_kernel", ("partials",)),
        ("wavelet_backward_kernel", ("out", "partials", "tap_partials")),
        ("sum_partials_kernel", ("outputs",)),
        ("sum_taps_kernel", ("taps",)),
    ],
)
def test_zeroed_kernel_fails(kernel: str, outputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    zero_kernel(monkeypatch, kernel, *outputs)
    with pytest.raises(AssertionError):
        _check(_random((1, 1, 3, 4)))


@interpreted
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_traffic(layout: str) -> None:
    x, parameters = _random((1, 1, 32, 136), layout), _parameters(1)
    with count_traffic() as forward:
        wavelet_mix.wavelet_mix(x, *parameters, True)
    with count_traffic() as backward:
        wavelet_mix.wavelet_mix_backward(x.clone(), None, x, *parameters, True, True)
    for traffic, tensors in ((forward, 2), (backward, 3)):
        assert traffic.total <= 1.35 * tensors * x.nbytes
        assert traffic.stored == traffic.distinct_stored >= x.nbytes
