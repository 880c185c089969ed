"""depthwise_gelu on every backend that runs here, against the reference in fp64."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_close, assert_matches, poisoned_memory, value_and_grads
from torch import Tensor

import swformer_fast as sf
from swformer_fast import functional, reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BACKENDS = [name for name in ("reference", "cpp") if sf.backends()[name] == "available"]
needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the compiled extension was not built")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
Arguments = tuple[Tensor, Tensor, Tensor]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    with sf.use_backend(request.param):
        yield request.param


def arguments(
    *shape: int, kernel: int = 3, dtype: torch.dtype = torch.float32, layout: str = "contiguous"
) -> Arguments:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = LAYOUTS[layout]((torch.randn(shape, dtype=wide) + 0.5).to(dtype)).requires_grad_()
    weight = (torch.randn(shape[1], 1, kernel, kernel, dtype=wide) / kernel).requires_grad_()
    return x, weight, torch.randn(shape[1], dtype=wide, requires_grad=True)


def check(args: Arguments, grad: Tensor | None = None) -> None:
    with poisoned_memory():
        assert_matches(functional.depthwise_gelu, reference.depthwise_gelu, args, grad=grad)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, (96, 1), (3, 200)])
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
        assert functional.depthwise_gelu(*args).is_contiguous(memory_format=expected)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layout_of_x", ["contiguous", "channels_last"])
def test_layouts_of_the_gradient(layout_of_x: str, layout: str, dtype: torch.dtype) -> None:
    with sf.use_backend("cpp"):
        check(
            arguments(2, 20, 9, 33, dtype=dtype, layout=layout_of_x),
            LAYOUTS[layout](torch.randn(2, 20, 9, 33).to(dtype)),
        )


@needs_cpp
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_ranges_of_rows_meet(kernel: int) -> None:
    """Tall images are cut into ranges of rows that overlap by the kernel."""
    with sf.use_backend("cpp"):
        check(arguments(1, 1, 301, 40, kernel=kernel))
        check(arguments(1, 2, 260, 21, kernel=kernel, layout="channels_last"))


def test_other_kernel_sizes_fall_back() -> None:
    args = arguments(1, 2, 9, 8, kernel=9, dtype=torch.float64)
    check(args)
    if "cpp" in BACKENDS:
        assert "3 x 3, 5 x 5, 7 x 7 only, got 9 x 9" in sf.why_not("depthwise_gelu", *args)


@needs_cpp
def test_gelu_is_exact_to_a_millionth() -> None:
    """A kernel that passes the pixels on shows GELU and, as its gradient, GELU's derivative."""
    x = torch.linspace(-12, 12, 1 << 18).view(1, 1, 1, -1).requires_grad_()
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1
    wide = x.detach().double().requires_grad_()
    with sf.use_backend("cpp"):
        y = functional.depthwise_gelu(x, weight, torch.zeros(1))
        y.sum().backward()
    expected = torch.nn.functional.gelu(wide)
    expected.sum().backward()
    assert (y - expected).abs().max() < 1e-6
    assert (x.grad - wide.grad).abs().max() < 1e-6
    small = (wide.abs() < 1e-2) & (wide != 0)
    assert ((y - expected)[small] / expected[small]).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_special_values(dtype: torch.dtype) -> None:
    """Each channel is one pixel, so that no infinity meets a zero weight."""
    values = [float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38, 50.0, -50.0, 88.0]
    x = torch.tensor(values, dtype=dtype).view(1, -1, 1, 1)
    weight, bias = torch.ones(len(values), 1, 3, 3, dtype=dtype), torch.zeros(len(values), dtype=dtype)
    for layout in ("contiguous", "channels_last"):
        actual = value_and_grads(
            functional.depthwise_gelu, (LAYOUTS[layout](x).requires_grad_(), weight, bias), torch.ones(x.shape)
        )
        expected = value_and_grads(torch.nn.functional.gelu, (x.double().requires_grad_(),), torch.ones(x.shape))
        torch.testing.assert_close(actual[0].double(), expected[0], rtol=1e-6, atol=1e-6, equal_nan=True)
        torch.testing.assert_close(actual[1][0].double(), expected[1][0], rtol=1e-6, atol=1e-6, equal_nan=True)


@needs_cpp
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_infinities_and_nan_stay_where_they_belong(layout: str) -> None:
    x, weight, bias = arguments(1, 3, 9, 37, dtype=torch.float64, layout=layout)
    with torch.no_grad():
        x[0, 0, 2, 36], x[0, 1, 8, 0], x[0, 2, 4, 4] = float("inf"), float("nan"), float("-inf")
    single = tuple(t.detach().float().requires_grad_() for t in (x, weight, bias))
    expected = value_and_grads(reference.depthwise_gelu, (x, weight, bias))
    for args in (single, (x, weight, bias)):
        actual = value_and_grads(functional.depthwise_gelu, args)
        for a, e in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
            torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)])
def test_partial_gradients(backend: str, needs: tuple[bool, ...]) -> None:
    args = tuple(t.detach().requires_grad_(n) for t, n in zip(arguments(2, 3, 9, 40), needs, strict=True))
    check(args)


def test_backward_op_leaves_out_what_is_not_asked_for(backend: str) -> None:
    args = [t.detach() for t in arguments(1, 2, 5, 6)]
    grads = torch.ops.swformer_fast.depthwise_gelu_backward(torch.ones_like(args[0]), None, *args, False, False)
    assert [g.numel() for g in grads] == [0, 0, 0]


def test_empty_batch(backend: str) -> None:
    args = arguments(0, 3, 8, 9)
    y = functional.depthwise_gelu(*args)
    y.sum().backward()
    assert y.shape == (0, 3, 8, 9)
    assert [t.grad.abs().sum().item() for t in args] == [0, 0, 0]


def test_autocast(backend: str) -> None:
    x, weight, bias = arguments(1, 2, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.depthwise_gelu(x, weight, bias)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == weight.grad.dtype == torch.float32


@needs_cpp
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_bitwise_repeatable(threads: int, layout: str) -> None:
    args = arguments(3, 20, 96, 70, layout=layout)
    first = value_and_grads(functional.depthwise_gelu, args)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        second = value_and_grads(functional.depthwise_gelu, args)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_opcheck(backend: str) -> None:
    args = arguments(2, 3, 5, 6)
    last = (args[0].detach().contiguous(memory_format=torch.channels_last), *args[1:])
    for need_sums in (False, True):
        torch.library.opcheck(torch.ops.swformer_fast.depthwise_gelu, (*args, need_sums))
        torch.library.opcheck(torch.ops.swformer_fast.depthwise_gelu, (*last, need_sums), test_utils="test_faketensor")
        grad_sums = torch.randn(2, 3) if need_sums else None
        torch.library.opcheck(
            torch.ops.swformer_fast.depthwise_gelu_backward,
            (torch.randn(2, 3, 5, 6), grad_sums, *args, True, True),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_gradcheck_twice(backend: str) -> None:
    args = arguments(2, 2, 4, 3, dtype=torch.float64)
    for need_sums in (False, True):
        assert torch.autograd.gradcheck(torch.ops.swformer_fast.depthwise_gelu, (*args, need_sums))
        assert torch.autograd.gradgradcheck(torch.ops.swformer_fast.depthwise_gelu, (*args, need_sums))


def test_compiles_without_graph_breaks(backend: str) -> None:
    def twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.depthwise_gelu(functional.depthwise_gelu(x.sin(), weight, bias).cos(), weight, bias)

    torch._dynamo.reset()
    args = arguments(2, 3, 9, 12)
    actual = value_and_grads(torch.compile(twice, fullgraph=True), args)
    assert_close(actual, value_and_grads(twice, args), torch.float32)


@needs_triton
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton(dtype: torch.dtype, layout: str) -> None:
    with sf.use_backend("triton"):
        check(arguments(2, 3, 5, 7, dtype=dtype, layout=layout))


def zeroed(t: Tensor) -> Tensor:
    return torch.zeros_like(t)


def shuffled(t: Tensor) -> Tensor:
    return t.flatten().roll(1).view_as(t)


@pytest.mark.parametrize("op", ["depthwise_gelu", "depthwise_gelu_backward"])
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
        (ValueError, r"weight must have shape \(2, 1, 3, 3\), got \(3, 1, 3, 3\)", {"weight": torch.ones(3, 1, 3, 3)}),
        (ValueError, "weight", {"weight": torch.ones(2, 1, 4, 4)}),
        (ValueError, r"bias must have shape \(2,\), got \(3,\)", {"bias": torch.ones(3)}),
        (TypeError, "bias must have the dtype of the image", {"bias": torch.ones(2, dtype=torch.float64)}),
        (ValueError, "weight must have shape .*, got NoneType", {"weight": None}),
    ],
)
def test_errors(error: type[Exception], message: str, change: dict[str, object]) -> None:
    args = {"x": torch.ones(1, 2, 4, 4), "weight": torch.ones(2, 1, 3, 3), "bias": torch.ones(2)} | change
    with pytest.raises(error, match=message):
        functional.depthwise_gelu(**args)


def test_triton_kernels_of_other_sizes_are_refused() -> None:
    arguments = torch.randn(1, 2, 6, 7), torch.randn(2, 1, 5, 5), torch.randn(2)
    with sf.use_backend("triton"), pytest.raises(RuntimeError, match=r"3 x 3 only, got 5 x 5|triton is not installed"):
        functional.depthwise_gelu(*arguments)
