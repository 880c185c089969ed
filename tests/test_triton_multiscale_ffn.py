"""The Triton kernels of the multi-scale FFN against the reference in fp64, interpreted unless there is a GPU."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYOUTS, assert_close, poisoned_memory, zero_kernel
from torch import Tensor

import swformer_fast as sf
from benchmarks.inspection.interpret import Session, watch
from swformer_fast import reference
from swformer_fast.parameters import FfnParameters, unflatten

tl = pytest.importorskip("triton.language", reason="triton is not installed")
multiscale_ffn = pytest.importorskip("swformer_kernels.multiscale_ffn")
device = pytest.importorskip("swformer_kernels._device")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")
Parameters = tuple[Tensor, ...]


@pytest.fixture(autouse=True)
def faster_interpreter() -> Iterator[None]:
    """Counting patches the interpreter once a launch, not at every call."""
    if DEVICE == "cuda":
        yield
    else:
        with watch(Session()):
            yield


def _random(shape: tuple[int, ...], layout: str = "contiguous") -> Tensor:
    return LAYOUTS[layout](torch.randn(shape, device=DEVICE) + 0.5)


def _parameters(dim: int, mid: int, out: int) -> Parameters:
    """Weights scaled as a trained network's, so that every GELU sees both sides."""

    def parameter(*size: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, device=DEVICE)

    depthwise = (t for _ in range(3) for t in (parameter(mid, 1, 3, 3, scale=1 / 3), parameter(mid)))
    first = parameter(3 * mid, dim, 1, 1, scale=dim**-0.5), parameter(3 * mid)
    return (*first, *depthwise, parameter(out, 3 * mid, 1, 1, scale=(3 * mid) ** -0.5), parameter(out))


def _reference(x: Tensor, *parameters: Tensor) -> Tensor:
    return reference.multiscale_ffn(x, unflatten(FfnParameters, parameters))


def _gradient(*size: int) -> Tensor:
    """Of one sign: sums that cancel are as inexact in PyTorch's own fp32."""
    return torch.randint(0, 65, size, device=DEVICE) / 64


def _check(x: Tensor, parameters: Parameters) -> None:
    grad = _gradient(x.shape[0], len(parameters[-1]), *x.shape[2:])
    args = (x, *parameters)
    inputs = tuple(t.double().contiguous().requires_grad_() for t in args)
    expected = _reference(*inputs)
    with poisoned_memory():
        y = multiscale_ffn.multiscale_ffn(*args)
    assert_close(y, expected, what="output")
    with poisoned_memory():
        grads = multiscale_ffn.multiscale_ffn_backward(grad, *args, True, True)
    assert y.dtype == grads[0].dtype == x.dtype
    assert_close(grads, torch.autograd.grad(expected, inputs, grad.double()), x.dtype, what="gradient")
    last = torch.channels_last if device.is_channels_last(x) else torch.contiguous_format
    assert y.is_contiguous(memory_format=last)
    assert grads[0].is_contiguous(memory_format=last)


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (6, 34)])
def test_sizes(size: tuple[int, int]) -> None:
    _check(_random((1, 3, *size)), _parameters(3, 2, 5))


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "mid", "out"), [(17, 18, 5), (5, 33, 66)])
def test_widths(dim: int, mid: int, out: int) -> None:
    _check(_random((1, dim, 3, 6)), _parameters(dim, mid, out))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(63, 64), (65, 96), (30, 131)])
def test_large_sizes(size: tuple[int, int]) -> None:
    _check(_random((2, 3, *size)), _parameters(3, 5, 7))


@pytest.mark.slow
def test_many_channels() -> None:
    _check(_random((1, 70, 6, 10)), _parameters(70, 70, 70))


def test_several_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multiscale_ffn, "_PIXELS_A_PARTIAL", 64)
    _check(_random((1, 2, 5, 34)), _parameters(2, 2, 3))


def test_what_is_refused() -> None:
    x, parameters = _random((1, 3, 4, 5)), list(_parameters(3, 2, 5))
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
        multiscale_ffn.multiscale_ffn(x.double(), *parameters)
    parameters[2] = torch.randn(2, 1, 5, 5)
    with pytest.raises(ValueError, match="must be 3 x 3"):
        multiscale_ffn.multiscale_ffn(x, *parameters)
    with sf.use_backend("triton"), pytest.raises(RuntimeError, match="3 x 3"):
        torch.ops.swformer_fast.multiscale_ffn(x, *parameters, None)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual_layout", ["contiguous", "channels_last", "transposed"])
def test_residual(layout: str, residual_layout: str) -> None:
    x, residual = _random((1, 3, 5, 9), layout), _random((1, 5, 5, 9), residual_layout)
    parameters = _parameters(3, 2, 5)
    with poisoned_memory():
        y = multiscale_ffn.multiscale_ffn(x, *parameters, residual)
    assert_close(y, _reference(x.double(), *(p.double() for p in parameters)) + residual.double())


@pytest.mark.parametrize(
    ("kernel", "output"),
    [
        ("ffn_in_kernel", "hidden"),
        ("ffn_low_kernel", "mixed"),
        ("ffn_out_kernel", "y"),
        *(
            pytest.param("ffn_out_backward_kernel", output, marks=pytest.mark.slow)
            for output in ("first_grad", "other_grads", "partials")
        ),
        ("ffn_downsample_kernel", "out"),
        *(
            pytest.param("ffn_depthwise_backward_kernel", output, marks=pytest.mark.slow)
            for output in ("out", "partials")
        ),
        pytest.param("ffn_in_backward_kernel", "out", marks=pytest.mark.slow),
        ("ffn_in_parameters_kernel", "partials"),
    ],
)
def test_zeroed_kernel_fails(kernel: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zero_kernel(monkeypatch, kernel, output)
    with pytest.raises(AssertionError):
        _check(_random((1, 2, 3, 5)), _parameters(2, 2, 3))


class _Touched(Session):
    """Bytes of maps that each kernel touches: once a program, whose cache holds its tile, and once altogether."""

    def __init__(self) -> None:
        self.bytes: dict[str, tuple[int, int]] = {}

    def begin(self, kernel: str, arguments: dict[str, Any]) -> dict[str, Any]:
        maps = (t for n, t in arguments.items() if isinstance(t, Tensor) and not n.endswith(("weight", "bias")))
        self.ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in maps]
        self.kernel, self.touched, self.program, self.once = kernel, 0, [], []
        return arguments

    def access(self, kind: str, addresses: Any, itemsize: int) -> None:
        inside = np.zeros(addresses.shape, dtype=bool)
        for begin, end in self.ranges:
            inside |= (addresses >= begin) & (addresses < end)
        self.program.append(np.unique(addresses[inside].astype(np.int64)) * 8 + itemsize)

    def end_program(self, program: Any) -> None:
        different = np.unique(np.concatenate(self.program))
        self.touched += int((different % 8).sum())
        self.once.append(different)
        self.program = []

    def end(self) -> None:
        self.bytes[self.kernel] = self.touched, int((np.unique(np.concatenate(self.once)) % 8).sum())


@interpreted
@pytest.mark.slow
def test_traffic() -> None:
    x, parameters = _random((1, 4, 32, 64)), _parameters(4, 4, 4)
    with watch(touched := _Touched()):
        y = multiscale_ffn.multiscale_ffn(x, *parameters)
        multiscale_ffn.multiscale_ffn_backward(y, x, *parameters, True, True)
    for kernel, (bytes_of_programs, once) in touched.bytes.items():
        assert bytes_of_programs <= 1.35 * once, kernel
