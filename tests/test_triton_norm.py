"""The Triton kernels of the channel statistics against the reference in fp64, interpreted unless there is a GPU."""

import pytest
import torch
from helpers import Zeroing, assert_close, fp64, poisoned_memory, value_and_grads
from torch import Tensor

import swformer_fast as sf
from benchmarks.interpret import count_traffic
from swformer_fast import reference

norm = pytest.importorskip("swformer_kernels.norm", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")


def _check(x: Tensor) -> None:
    grad = torch.randn(2, x.shape[1], device=DEVICE)
    with poisoned_memory():
        statistics, mean = norm.channel_statistics(x)
        grad_x = norm.channel_statistics_backward(grad, mean, x, True)
    assert (statistics.dtype, mean.dtype, grad_x.dtype) == (torch.float32, torch.float64, x.dtype)
    wide = x.double().contiguous().requires_grad_()
    expected = reference.channel_statistics(wide)[0]
    for row, wanted in zip((*statistics, mean), (*expected, expected[0]), strict=True):
        assert_close(row, wanted, torch.float32)
    assert_close(grad_x, torch.autograd.grad(expected, wide, grad.double())[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 3, 1, 5), (1, 1, 3, 5), (2, 35, 7, 9), (3, 4, 33, 40)])
def test_sizes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    _check((torch.randn(shape, device=DEVICE) + 0.3).to(dtype))


def test_several_programs_a_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "_TILE", 32)
    monkeypatch.setattr(norm, "_TILES_A_PROGRAM", 2)
    _check(torch.randn(2, 3, 9, 21, device=DEVICE) + 0.3)


def test_large_mean() -> None:
    _check(0.5 * torch.randn(2, 3, 16, 20, device=DEVICE) + 100)


def test_strided_input() -> None:
    _check(torch.randn(2, 3, 9, 20, device=DEVICE).transpose(2, 3))


def test_edges() -> None:
    statistics, mean = norm.channel_statistics(torch.empty(0, 3, 4, 5, device=DEVICE))
    assert statistics.isnan().all()
    assert mean.isnan().all()
    x = torch.randn(1, 3, 4, 5, device=DEVICE)
    assert norm.channel_statistics_backward(statistics, mean, x[:0], True).shape == (0, 3, 4, 5)
    assert norm.channel_statistics_backward(statistics, mean, x, False).numel() == 0
    with pytest.raises(TypeError, match="x must be float32, float16 or bfloat16"):
        norm.channel_statistics(x.double())


def test_through_the_op() -> None:
    x = torch.randn(2, 3, 6, 7, device=DEVICE, requires_grad=True)
    with sf.use_backend("triton"):
        actual = value_and_grads(lambda x: torch.ops.swformer_fast.channel_statistics(x)[0], (x,))
    assert_close(actual, value_and_grads(lambda x: reference.channel_statistics(x)[0], fp64((x,))))


@pytest.mark.parametrize(
    ("kernel", "output"),
    [
        ("statistics_kernel", 1),
        ("merge_statistics_kernel", 1),
        ("merge_statistics_kernel", 2),
        ("statistics_backward_kernel", 3),
    ],
)
def test_zeroed_kernel_fails(kernel: str, output: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, kernel, Zeroing(output, kernel=getattr(norm, kernel)))
    with pytest.raises(AssertionError):
        _check(torch.randn(2, 3, 6, 7, device=DEVICE) + 0.3)


@interpreted
def test_traffic() -> None:
    """The image is read once; going back it is read and its gradient written."""
    x, grad = torch.randn(1, 4, 64, 64), torch.randn(2, 4)
    with count_traffic() as forward:
        _, mean = norm.channel_statistics(x)
    with count_traffic() as backward:
        norm.channel_statistics_backward(grad, mean, x, True)
    for traffic, passes in ((forward, 1), (backward, 2)):
        assert traffic.total <= 1.1 * passes * x.nbytes
        assert traffic.stored == traffic.distinct_stored
