"""wavelet_mix on every backend that runs here, against the reference in fp64."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_close, assert_matches, fp64, poisoned_memory, value_and_grads
from torch import Tensor

import swformer_fast as sf
from swformer_fast import functional, reference
from swformer_fast.reference.haar_dwt2d import HAAR_HIGH, HAAR_LOW

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BACKENDS = [name for name in ("reference", "cpp") if sf.backends()[name] == "available"]
NAMES = ("x", "weight", "bias", "dec_lo", "dec_hi", "rec_lo", "rec_hi")
needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the compiled extension was not built")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
Arguments = tuple[Tensor, ...]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    with sf.use_backend(request.param):
        yield request.param


def arguments(
    *shape: int, kernel: int = 3, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> Arguments:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = LAYOUTS[layout]((torch.randn(shape, dtype=wide) + 0.5).to(dtype)).requires_grad_()
    weight = (torch.randn(4 * shape[1], 1, kernel, kernel, dtype=wide) / kernel).requires_grad_()
    bias = torch.randn(4 * shape[1], dtype=wide, requires_grad=True)
    return x, weight, bias, *(torch.randn(2, dtype=wide, requires_grad=True) for _ in range(4))


def check(args: Arguments, grad: Tensor | None = None) -> None:
    with poisoned_memory():
        assert_matches(functional.wavelet_mix, reference.wavelet_mix, args, grad=grad)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, (96, 1), (3, 200), (4, 65)])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_matches_reference(kernel: int, size: tuple[int, int], dtype: torch.dtype) -> None:
    with sf.use_backend("cpp"):
        check(arguments(2, 3, *size, kernel=kernel, dtype=dtype))


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("channels", [1, 3, 16, 21])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_layouts(kernel: int, channels: int, layout: str, dtype: torch.dtype) -> None:
    with sf.use_backend("cpp"):
        args = arguments(2, channels, 19, 37, kernel=kernel, dtype=dtype, layout=layout)
        grad = torch.randint(0, 65, (2, channels, 19, 37)) / 64  # of one sign: a lone channel's sums do not cancel
        check(args, grad)
        last = layout == "channels_last" and channels > 1
        expected = torch.channels_last if last else torch.contiguous_format
        assert functional.wavelet_mix(*args).is_contiguous(memory_format=expected)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layout_of_x", ["contiguous", "channels_last"])
def test_layouts_of_the_gradient(layout_of_x: str, layout: str, dtype: torch.dtype) -> None:
    with sf.use_backend("cpp"):
        check(
            arguments(2, 20, 9, 35, dtype=dtype, layout=layout_of_x),
            LAYOUTS[layout](torch.randn(2, 20, 9, 35).to(dtype)),
        )


@needs_cpp
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_ranges_of_rows_meet(kernel: int) -> None:
    """Tall images are cut into ranges of rows that overlap by the kernel."""
    with sf.use_backend("cpp"):
        check(arguments(1, 1, 531, 40, kernel=kernel))
        check(arguments(1, 2, 402, 21, kernel=kernel, layout="channels_last"))


@needs_cpp
def test_filter_gradients_that_cancel() -> None:
    """An image far from zero: the filters' gradients are small sums of large terms."""
    args = arguments(2, 8, 128, 128)
    x = (args[0].detach() + 100).requires_grad_()
    with sf.use_backend("cpp"):
        check((x, *args[1:]), torch.randn(2, 8, 128, 128))


@needs_cpp
def test_haar_filters_and_a_passing_kernel_change_nothing() -> None:
    x, weight, bias, *_ = arguments(1, 2, 33, 34, dtype=torch.float64)
    low, high = (torch.tensor(t, dtype=torch.float64) for t in (HAAR_LOW, HAAR_HIGH))
    passing = torch.zeros_like(weight)
    passing[:, :, 1, 1] = 1
    with sf.use_backend("cpp"):
        y = functional.wavelet_mix(x, passing, torch.zeros_like(bias), low, high, low, high)
    assert_close(y, x)


def test_other_kernel_sizes_fall_back() -> None:
    args = arguments(1, 2, 9, 8, kernel=9, dtype=torch.float64)
    check(args)
    if "cpp" in BACKENDS:
        assert "3 x 3, 5 x 5, 7 x 7 only, got 9 x 9" in sf.why_not("wavelet_mix", *args)


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinities_and_nan_stay_where_they_belong(layout: str) -> None:
    args = arguments(1, 3, 11, 74, dtype=torch.float64, layout=layout)
    with torch.no_grad():
        args[0][0, 0, 2, 73], args[0][0, 1, 10, 0] = float("inf"), float("nan")
    expected = value_and_grads(reference.wavelet_mix, args)
    with sf.use_backend("cpp"):
        for dtype in (torch.float32, torch.float64):
            actual = value_and_grads(functional.wavelet_mix, [t.detach().to(dtype).requires_grad_() for t in args])
            for a, e in zip((actual[0], *actual[1][:2]), (expected[0], *expected[1][:2]), strict=True):
                torch.testing.assert_close(a.double(), e, rtol=1e-3, atol=1e-3, equal_nan=True)


@pytest.mark.parametrize("needs", NAMES)
def test_partial_gradients(backend: str, needs: str) -> None:
    args = tuple(t.detach().requires_grad_(n == needs) for t, n in zip(arguments(2, 3, 9, 40), NAMES, strict=True))
    actual = value_and_grads(functional.wavelet_mix, args)
    assert_close(actual, value_and_grads(reference.wavelet_mix, fp64(args)), torch.float32)


def test_backward_op_leaves_out_what_is_not_asked_for(backend: str) -> None:
    args = [t.detach() for t in arguments(1, 2, 5, 6)]
    grads = torch.ops.swformer_fast.wavelet_mix_backward(torch.ones_like(args[0]), None, *args, False, False)
    assert [g.numel() for g in grads] == [0] * 7


def test_saves_the_input_and_the_parameters_alone(backend: str) -> None:
    saved: list[Tensor] = []
    args = arguments(1, 2, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.wavelet_mix(*args)
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in args)


def test_empty_batch(backend: str) -> None:
    args = arguments(0, 3, 8, 9)
    y = functional.wavelet_mix(*args)
    y.sum().backward()
    assert y.shape == (0, 3, 8, 9)
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in args)


def test_autocast(backend: str) -> None:
    args = arguments(1, 2, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.wavelet_mix(*args)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert {t.grad.dtype for t in args} == {torch.float32}


@needs_cpp
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bitwise_repeatable(threads: int, layout: str) -> None:
    args = arguments(3, 20, 96, 70, layout=layout)
    first = value_and_grads(functional.wavelet_mix, args)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        second = value_and_grads(functional.wavelet_mix, args)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_opcheck(backend: str) -> None:
    args = arguments(2, 3, 5, 6)
    last = (args[0].detach().contiguous(memory_format=torch.channels_last), *args[1:])
    for need_sums in (False, True):
        torch.library.opcheck(torch.ops.swformer_fast.wavelet_mix, (*args, need_sums))
        torch.library.opcheck(torch.ops.swformer_fast.wavelet_mix, (*last, need_sums), test_utils="test_faketensor")
        grad_sums = torch.randn(2, 3) if need_sums else None
        torch.library.opcheck(
            torch.ops.swformer_fast.wavelet_mix_backward,
            (torch.randn(2, 3, 5, 6), grad_sums, *args, True, True),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_gradcheck_twice(backend: str) -> None:
    args = arguments(1, 1, 5, 4, dtype=torch.float64)
    for need_sums in (False, True):
        assert torch.autograd.gradcheck(torch.ops.swformer_fast.wavelet_mix, (*args, need_sums))
        assert torch.autograd.gradgradcheck(torch.ops.swformer_fast.wavelet_mix, (*args, need_sums))


def test_compiles_without_graph_breaks(backend: str) -> None:
    def twice(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional.wavelet_mix(functional.wavelet_mix(x.sin(), *parameters).cos(), *parameters)

    torch._dynamo.reset()
    args = arguments(2, 3, 9, 12)
    actual = value_and_grads(torch.compile(twice, fullgraph=True), args)
    assert_close(actual, value_and_grads(twice, args), torch.float32)


@needs_triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton(dtype: torch.dtype, layout: str) -> None:
    with sf.use_backend("triton"):
        check(arguments(2, 2, 5, 7, dtype=dtype, layout=layout))


def zeroed(t: Tensor) -> Tensor:
    return torch.zeros_like(t)


def shuffled(t: Tensor) -> Tensor:
    return t.flatten().roll(1).view_as(t)


@pytest.mark.parametrize("op", ["wavelet_mix", "wavelet_mix_backward"])
@pytest.mark.parametrize("damage", [zeroed, shuffled])
def test_a_wrong_kernel_is_noticed(
    monkeypatch: pytest.MonkeyPatch, op: str, damage: Callable[[Tensor], Tensor]
) -> None:
    kernel = sf.backend.OPS[op].reference

    def damaged(*args: object) -> object:
        result = kernel(*args)
        return damage(result) if isinstance(result, Tensor) else tuple(map(damage, result))

    monkeypatch.setattr(sf.backend, "_implementation", lambda o, b: damaged if o.name == op else o.reference)
    with pytest.raises(AssertionError):
        check(arguments(1, 2, 5, 6))


@pytest.mark.parametrize(
    ("error", "message", "change"),
    [
        (TypeError, "x must be a torch.Tensor, got float", {"x": 1.0}),
        (TypeError, "int64", {"x": torch.ones(1, 2, 4, 4, dtype=torch.long)}),
        (ValueError, r"\(B, C, H, W\), got \(4, 4\)", {"x": torch.ones(4, 4)}),
        (ValueError, "at least one", {"x": torch.ones(1, 2, 0, 4)}),
        (ValueError, r"weight must have shape \(8, 1, 3, 3\), got \(2, 1, 3, 3\)", {"weight": torch.ones(2, 1, 3, 3)}),
        (ValueError, "weight", {"weight": torch.ones(8, 1, 4, 4)}),
        (ValueError, r"bias must have shape \(8,\), got \(2,\)", {"bias": torch.ones(2)}),
        (ValueError, r"rec_hi must have shape \(2,\), got \(3,\)", {"rec_hi": torch.ones(3)}),
        (TypeError, "dec_lo must have the dtype of the image", {"dec_lo": torch.ones(2, dtype=torch.float64)}),
        (TypeError, "dec_hi must be a torch.Tensor, got NoneType", {"dec_hi": None}),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, object]) -> None:
    shapes = ((1, 2, 4, 4), (8, 1, 3, 3), (8,), (2,), (2,), (2,), (2,))
    args = {name: torch.ones(shape) for name, shape in zip(NAMES, shapes, strict=True)} | change
    with pytest.raises(error, match=message):
        functional.wavelet_mix(**args)
