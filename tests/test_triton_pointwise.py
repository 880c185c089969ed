"""The Triton kernels of the pointwise convolution against the reference in fp64, interpreted unless there is a GPU."""

import pytest
import torch
from helpers import LAYOUTS, assert_close, fp64, poisoned_memory, tf32, value_and_grads, zero_kernel
from torch import Tensor

import swformer_fast as sf
from benchmarks.inspection.interpret import count_traffic
from swformer_fast import reference

pointwise = pytest.importorskip("swformer_kernels.pointwise", reason="triton is not installed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="counts what the interpreter does")
Arguments = tuple[Tensor | None, ...]


def _arguments(
    widths: tuple[int, ...] = (4, 3, 2),
    out: int = 5,
    size: tuple[int, int] = (5, 14),
    batch: int = 2,
    weights: int = 1,
    dtype: torch.dtype = torch.float32,
    residual: bool = True,
) -> Arguments:
    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE)

    maps = [random(batch, c, *size).to(dtype) for c in widths] + [None] * (3 - len(widths))
    weight, bias = random(weights, out, sum(widths)), random(out)
    return (*maps, weight, bias, random(batch, out, *size).to(dtype) if residual else None)


def _check(args: Arguments, grad: Tensor | None = None) -> None:
    x = args[0]
    assert x is not None
    with poisoned_memory():
        y = pointwise.pointwise(*args)
        grad = torch.randn_like(y) if grad is None else grad
        grads = pointwise.pointwise_backward(grad, *args[:5], True, True)
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    inputs = [t if t is None else t.double().contiguous().requires_grad_() for t in args]
    expected = reference.pointwise(*inputs)
    given = [i for i, t in enumerate(inputs[:5]) if t is not None]
    assert_close(y, expected, what="output")
    actual = [grads[i] for i in given]
    assert_close(actual, torch.autograd.grad(expected, [inputs[i] for i in given], grad.double()), what="gradient")
    assert all(grads[i].numel() == 0 for i in range(5) if i not in given)


@pytest.mark.parametrize(("widths", "size"), [((5,), (1, 1)), ((18, 3), (3, 5)), ((4, 3, 2), (6, 64))])
def test_sizes(widths: tuple[int, ...], size: tuple[int, int]) -> None:
    _check(_arguments(widths, size=size, residual=len(widths) > 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_for_each_image(dtype: torch.dtype) -> None:
    _check(_arguments(weights=2, dtype=dtype))


@pytest.mark.parametrize("weights", [1, 2])
def test_a_bias_for_each_image(weights: int) -> None:
    args = list(_arguments(weights=weights))
    args[4] = torch.randn(2, 5, device=DEVICE)
    _check(tuple(args))


def test_wide() -> None:
    """Several blocks of either side's channels and several partial sums."""
    _check(_arguments((33, 40), out=130, size=(2, 3), batch=1))


def test_several_partial_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "_PIXELS_A_PARTIAL", 32)
    _check(_arguments(size=(7, 13)))
    _check(_arguments(size=(7, 13), weights=2))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    args = list(_arguments())
    for i in (0, 1, 2, 5):
        args[i] = LAYOUTS[layout](args[i])
    _check(tuple(args), LAYOUTS[layout](torch.randn(2, 5, 5, 14, device=DEVICE)))


def test_parts_of_one_map() -> None:
    """Slices of a map's channels are read where they are."""
    parts = torch.randn(2, 9, 5, 14, device=DEVICE).split((4, 3, 2), dim=1)
    _check((*parts, *_arguments()[3:]))


def test_half_parameters_and_transposed_weight() -> None:
    args = list(_arguments(dtype=torch.bfloat16, weights=2))
    args[3] = torch.randn(2, 9, 5, device=DEVICE).bfloat16().mT
    args[4] = args[4].bfloat16()
    grads = pointwise.pointwise_backward(args[5], *args[:5], True, True)
    assert {g.dtype for g in grads} == {torch.bfloat16}
    _check(tuple(args))


def test_empty_batch() -> None:
    args = _arguments(batch=0)
    assert pointwise.pointwise(*args).shape == (0, 5, 5, 14)
    grads = pointwise.pointwise_backward(args[5], *args[:5], True, True)
    assert_close(grads[3:5], (torch.zeros_like(args[3]), torch.zeros_like(args[4])))


def test_only_what_is_needed() -> None:
    args, grad = _arguments(), torch.randn(2, 5, 5, 14, device=DEVICE)
    full = pointwise.pointwise_backward(grad, *args[:5], True, True)
    groups = (0, 0, 0, 1, 1)
    for wanted in range(2):
        grads = pointwise.pointwise_backward(grad, *args[:5], *(wanted == flag for flag in range(2)))
        for group, mine, whole in zip(groups, grads, full, strict=True):
            assert torch.equal(mine, whole) if group == wanted else mine.numel() == 0


def test_repeats_bitwise() -> None:
    args, grad = _arguments(), torch.randn(2, 5, 5, 14, device=DEVICE)
    first, second = (pointwise.pointwise_backward(grad, *args[:5], True, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_nan_stays_at_its_pixel() -> None:
    args = _arguments()
    args[1][1, 2, 3, 4] = float("nan")
    assert torch.equal(pointwise.pointwise(*args).isnan(), reference.pointwise(*args).isnan())


def test_what_is_refused() -> None:
    args = [t if t is None else t.double() for t in _arguments()]
    with pytest.raises(TypeError, match="x0 must be float32, float16 or bfloat16"):
        pointwise.pointwise(*args)
    with sf.use_backend("triton"), pytest.raises(RuntimeError, match="float64"):
        torch.ops.swformer_fast.pointwise(*args)


@pytest.mark.parametrize("weights", [1, 2])
def test_through_the_op(weights: int) -> None:
    args = tuple(t.requires_grad_() for t in _arguments(weights=weights))
    with sf.use_backend("triton"):
        actual = value_and_grads(torch.ops.swformer_fast.pointwise, args)
    assert_close(actual, value_and_grads(reference.pointwise, fp64(args)))


def test_products_of_three_tf32_products() -> None:
    """What the interpreter does not do: fp32 numbers as sums of two of tf32, three of whose four products are taken."""
    a, b = torch.randn(64, 120), torch.randn(120, 256)
    high_a, high_b = tf32(a), tf32(b)
    low_a, low_b = tf32(a - high_a), tf32(b - high_b)
    assert_close(low_a @ high_b + high_a @ low_b + high_a @ high_b, a.double() @ b.double())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_exact_intf32(dtype: torch.dtype) -> None:
    x, weight = torch.randn(120, 256).to(dtype), torch.randn(64, 120)
    assert torch.equal(tf32(x.float()), x.float())
    assert_close((tf32(weight) @ x.float()).to(dtype), weight.double() @ x.double())


@pytest.mark.parametrize(
    ("kernel", "output"), [("pointwise_kernel", 9), ("pointwise_parameters_kernel", 5), ("sum_partials_kernel", 1)]
)
def test_zeroed_kernel_fails(kernel: str, output: int, monkeypatch: pytest.MonkeyPatch) -> None:
    zero_kernel(monkeypatch, kernel, output)
    with pytest.raises(AssertionError):
        _check(_arguments())


@interpreted
def test_traffic() -> None:
    """Maps are read and written once; few channels, so that the parameters, which come from cache, hardly count."""
    args = _arguments(size=(8, 64))
    with count_traffic() as forward:
        y = pointwise.pointwise(*args)
    with count_traffic() as backward:
        pointwise.pointwise_backward(y, *args[:5], True, False)
    with count_traffic() as parameters:
        pointwise.pointwise_backward(y, *args[:5], False, True)
    maps = sum(t.nbytes for t in args[:3])
    for traffic, least in ((forward, maps + 2 * y.nbytes), (backward, maps + y.nbytes), (parameters, maps + y.nbytes)):
        assert traffic.total <= 1.1 * least
        assert traffic.stored == traffic.distinct_stored
