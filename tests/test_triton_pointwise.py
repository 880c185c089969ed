"""The Triton kernels of the pointwise convolution against the reference in fp64, interpreted unless there is a GPU."""

import pytest
import torch
from helpers import assert_close, poisoned_memory, rel_rms, tf32, zero_kernel
from torch import Tensor

import swformer_fast as sf
from benchmarks.inspection.interpret import count_traffic
from swformer_fast import reference

pointwise = pytest.importorskip("swformer_kernels.pointwise", reason="triton is not installed")
_device = pytest.importorskip("swformer_kernels._device")

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
    present = [i for i, t in enumerate(inputs[:5]) if t is not None]
    assert_close(y, expected, what="output")
    actual = [grads[i] for i in present]
    assert_close(actual, torch.autograd.grad(expected, [inputs[i] for i in present], grad.double()), what="gradient")
    assert all(grads[i].numel() == 0 for i in range(5) if i not in present)


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


def test_parts_of_one_map() -> None:
    """Slices of a map's channels are read where they are."""
    parts = torch.randn(2, 9, 5, 14, device=DEVICE).split((4, 3, 2), dim=1)
    _check((*parts, *_arguments()[3:]))


def test_what_is_refused() -> None:
    args = [t if t is None else t.double() for t in _arguments()]
    with pytest.raises(TypeError, match="x0 must be float32, float16 or bfloat16"):
        pointwise.pointwise(*args)
    with sf.use_backend("triton"), pytest.raises(RuntimeError, match="float64"):
        torch.ops.swformer_fast.pointwise(*args)


def test_products_of_three_tf32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 numbers as sums of two of tf32, three of whose four products are taken, are as exact as fp32."""
    monkeypatch.setattr(pointwise, "input_precision", lambda x: "tf32x3")
    _check(_arguments((33, 40), out=20, size=(5, 14)))


@interpreted
def test_tf32_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies in fp32 what the kernels leave of the operands: the nearest numbers of tf32, of which
    positive ones are too large as often as too small, where numbers cut off are always too small.
    """
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    x, weight, bias = torch.rand(1, 40, 16, 16) + 0.1, torch.rand(1, 33, 40) + 0.1, torch.zeros(33)
    y = pointwise.pointwise(x, None, None, weight, bias, None)
    of_x, _, _, of_weight, _ = pointwise.pointwise_backward(y, x, None, None, weight, bias, True, True)
    y_rounded, x_rounded, weight_rounded = (tf32(t).double() for t in (y, x, weight))
    expected = (
        torch.einsum("oec,bchw->behw", weight_rounded, x_rounded),
        torch.einsum("oec,behw->bchw", weight_rounded, y_rounded),
        torch.einsum("behw,bchw->ec", y_rounded, x_rounded)[None],
    )
    for actual, wanted in zip((y, of_x, of_weight), expected, strict=True):
        assert rel_rms(actual, wanted) < 1e-6
    exact = torch.einsum("oec,bchw->behw", weight.double(), x.double())
    cut = torch.einsum("oec,bchw->behw", *((t.view(torch.int32) & ~0x1FFF).view(torch.float32) for t in (weight, x)))
    bias_of_rounded, bias_of_cut = (((result - exact) / exact).mean().abs() for result in (y, cut))
    assert 20 * bias_of_rounded < bias_of_cut


@interpreted
@pytest.mark.parametrize("precision", ["tf32", "tf32x3"])
@pytest.mark.filterwarnings("ignore:invalid value encountered in:RuntimeWarning")
def test_tf32_keeps_what_is_not_finite(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "input_precision", lambda x: precision)
    numbers = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, torch.finfo(torch.float32).tiny])
    numbers = torch.cat((numbers, torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)))
    y = pointwise.pointwise(numbers.view(1, 1, 1, -1), None, None, torch.ones(1, 1, 1), torch.zeros(1), None)
    assert torch.equal(y.flatten().nan_to_num(1.5, 2.5, 3.5), numbers.nan_to_num(1.5, 2.5, 3.5))


@pytest.mark.parametrize(
    ("target", "exact"),
    [
        *((target, "tf32x3") for target in ("sm_80", "sm_90", "sm_100")),
        *((target, "ieee") for target in ("sm_86", "sm_89", "sm_120", "gfx942")),
    ],
)
def test_products_are_taken_the_fastest_way(target: str, exact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three products of tf32 where they are faster than one of fp32; what is asked for stays."""
    monkeypatch.setattr(_device, "architecture", lambda device: target)
    x = torch.empty(0)
    assert _device.input_precision(x) == exact
    if target != "gfx942":
        assert [_device.input_precision(x, asked) for asked in ("tf32x3", "tf32")] == ["tf32x3", "tf32"]
        assert _device.input_precision(x.bfloat16()) == "tf32"
        monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
        assert _device.input_precision(x) == "tf32"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_are_exact_intf32(dtype: torch.dtype) -> None:
    x, weight = torch.randn(120, 256).to(dtype), torch.randn(64, 120)
    assert torch.equal(tf32(x.float()), x.float())
    assert_close((tf32(weight) @ x.float()).to(dtype), weight.double() @ x.double())


@pytest.mark.parametrize(
    ("kernel", "output"),
    [("pointwise_kernel", "outs"), ("pointwise_parameters_kernel", "partials"), ("sum_partials_kernel", "outputs")],
)
def test_zeroed_kernel_fails(kernel: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    zero_kernel(monkeypatch, kernel, output)
    with pytest.raises(AssertionError):
        _check(_arguments())
    if DEVICE == "cpu":
        with pytest.raises(AssertionError):
            test_tf32_rounds(monkeypatch)


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
