"""The multi-scale FFN on every backend that runs here, against the reference in fp64."""

from collections.abc import Callable

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_close, fp64, poisoned_memory, value_and_grads, with_field, zero_op
from torch import Tensor

import swformer_fast as sf
from swformer_fast import functional, reference
from swformer_fast.parameters import Convolution, FfnParameters, flatten

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Arguments = tuple[Tensor, FfnParameters]
OP = "multiscale_ffn"
BACKENDS = [name for name in ("reference", "cpp") if sf.backends()[name] == "available"]
needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the extension is not built")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    with sf.use_backend(request.param):
        yield request.param


@pytest.fixture
def cpp() -> object:
    with sf.use_backend("cpp"):
        yield


def arguments(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    mid: int = 5,
    out: int = 7,
    kernel: int = 3,
    parameter_dtype: torch.dtype | None = None,
) -> Arguments:
    """Weights scaled as a trained network's, so that every GELU sees both sides; an image whose mean is not 0."""
    wide = parameter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    dim = shape[1]

    def parameter(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, dtype=torch.float64)).to(wide).requires_grad_()

    def depthwise() -> Convolution:
        return Convolution(parameter(mid, 1, kernel, kernel, scale=1 / kernel), parameter(mid))

    x = LAYOUTS[layout]((torch.randn(shape, dtype=torch.float64) + 0.5).to(dtype)).requires_grad_()
    return x, FfnParameters(
        parameter(3 * mid, dim, 1, 1, scale=dim**-0.5),
        parameter(3 * mid),
        (depthwise(), depthwise(), depthwise()),
        parameter(out, 3 * mid, 1, 1, scale=(3 * mid) ** -0.5),
        parameter(out),
    )


def flat(args: Arguments) -> tuple[Tensor, ...]:
    """The arguments of the op."""
    return args[0], *flatten(args[1])


def check(args: Arguments, grad: Tensor | None = None) -> None:
    """By default with a gradient of one sign: sums that cancel are as inexact in PyTorch's own fp32."""
    dtype = args[0].dtype
    if grad is None:
        batch, _, height, width = args[0].shape
        grad = torch.randint(0, 65, (batch, args[1].out_bias.shape[0], height, width)) / 64
    with poisoned_memory():
        actual = value_and_grads(functional.multiscale_ffn, args, grad)
    assert actual[0].dtype == dtype
    assert_close(actual, value_and_grads(reference.multiscale_ffn, fp64(args), grad), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, (3, 3), (7, 10), (5, 31), (61, 33), (130, 17), (33, 135)])
def test_matches_reference(cpp: object, dtype: torch.dtype, size: tuple[int, int]) -> None:
    check(arguments((2, 3, *size), dtype))


@pytest.mark.parametrize(("dim", "mid", "out"), [(1, 1, 1), (16, 16, 16), (40, 40, 40), (17, 33, 9), (128, 64, 64)])
def test_widths(cpp: object, dim: int, mid: int, out: int) -> None:
    check(arguments((1, dim, 38, 50), mid=mid, out=out))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(cpp: object, layout: str, dtype: torch.dtype) -> None:
    args = arguments((2, 4, 37, 70), dtype, layout)
    check(args)
    y = functional.multiscale_ffn(*args)
    expected = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=expected)
    assert torch.autograd.grad(y.sum(), args[0])[0].is_contiguous(memory_format=expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("image_layout", ["contiguous", "channels_last"])
def test_layouts_of_the_gradient(cpp: object, layout: str, image_layout: str) -> None:
    check(arguments((2, 4, 18, 33), layout=image_layout), LAYOUTS[layout](torch.rand(2, 7, 18, 33)))


def test_parameters_of_any_layout_and_dtype(cpp: object) -> None:
    x, parameters = arguments((1, 6, 9, 12), torch.bfloat16, parameter_dtype=torch.bfloat16)
    transposed = torch.randn(6, 15, 1, 1).bfloat16().transpose(0, 1).requires_grad_()
    check((x, parameters._replace(in_weight=transposed)))


@pytest.mark.parametrize("needs", ["x", "parameters", "out_bias"])
def test_partial_gradients(backend: str, needs: str) -> None:
    args = arguments((1, 4, 21, 40))
    for i, tensor in enumerate(flat(args)):
        tensor.requires_grad_(i == 0 if needs == "x" else i == 10 if needs == "out_bias" else i > 0)
    actual = value_and_grads(functional.multiscale_ffn, args)
    assert_close(actual, value_and_grads(reference.multiscale_ffn, fp64(args)), torch.float32)


def test_many_images_are_taken_in_groups(cpp: object) -> None:
    """The gradients between the two backward passes are bounded: this batch needs several groups."""
    check(arguments((9, 3, 200, 200), mid=32, out=2))


@needs_cpp
def test_no_channels_between_the_convolutions() -> None:
    """What is left is the last bias."""
    x, bias, empty = torch.randn(2, 3, 9, 6), torch.randn(4), torch.empty(0)
    depthwise = (torch.empty(0, 1, 3, 3), empty) * 3
    args = (x, torch.empty(0, 3, 1, 1), empty, *depthwise, torch.empty(4, 0, 1, 1), bias)
    y = torch.ops._swformer_fast.multiscale_ffn(*args, None)
    assert torch.equal(y, bias.view(4, 1, 1).expand_as(y))
    grads = torch.ops._swformer_fast.multiscale_ffn_backward(torch.ones_like(y), *args, True, True)
    assert [g.shape for g in grads] == [t.shape for t in args]
    assert not grads[0].any()
    assert torch.equal(grads[-1], torch.full((4,), 2 * 9 * 6.0))


def test_empty_batch(backend: str) -> None:
    args = arguments((0, 4, 8, 9))
    y = functional.multiscale_ffn(*args)
    assert y.shape == (0, 7, 8, 9)
    y.sum().backward()
    assert args[0].grad.shape == args[0].shape
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in flat(args)[1:])


def test_saves_the_input_and_the_parameters_only(cpp: object) -> None:
    args, saved = arguments((1, 4, 16, 16)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.multiscale_ffn(*args)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in flat(args)}


def test_autocast() -> None:
    args = arguments((1, 4, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.multiscale_ffn(*args)
        assert functional.multiscale_ffn(args[0].double(), args[1]).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    assert_close(y, reference.multiscale_ffn(*fp64(args)), torch.bfloat16)
    y.float().sum().backward()
    assert all(t.grad.dtype == t.dtype for t in flat(args))


@needs_cpp
def test_why_not() -> None:
    assert sf.why_not(OP, *arguments((1, 4, 8, 8))) == "cpp runs"
    assert "float64" in sf.why_not(OP, *arguments((1, 4, 8, 8), torch.float64))
    wide = arguments((1, 4, 8, 8), kernel=5)
    assert "3 x 3" in sf.why_not(OP, *wide)
    assert_close(functional.multiscale_ffn(*wide), reference.multiscale_ffn(*wide))


def test_nan_stays_where_it_belongs(cpp: object) -> None:
    args = arguments((1, 4, 40, 40))
    with torch.no_grad():
        args[0][0, 1, 20, 9] = float("nan")
        args[0][0, 2, 39, 39] = float("inf")
        y, expected = functional.multiscale_ffn(*args), reference.multiscale_ffn(*args)
    assert torch.equal(y.isfinite(), expected.isfinite())
    finite = expected.isfinite()
    assert_close(y[finite], expected[finite])
    assert finite.any()
    assert not finite.all()


@pytest.mark.parametrize("threads", [1, 2])
def test_bitwise_repeatable(cpp: object, threads: int) -> None:
    args = arguments((2, 8, 100, 66))
    first = value_and_grads(functional.multiscale_ffn, args)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        second = value_and_grads(functional.multiscale_ffn, args)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(backend: str, layout: str) -> None:
    args = flat(arguments((2, 4, 9, 10), layout=layout))
    torch.library.opcheck(torch.ops.swformer_fast.multiscale_ffn, (*args, None))
    torch.library.opcheck(
        torch.ops.swformer_fast.multiscale_ffn_backward,
        (torch.randn(2, 7, 9, 10), *args, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_gradcheck_twice() -> None:
    args = flat(arguments((1, 2, 5, 3), torch.float64, mid=1, out=2))
    op = torch.ops.swformer_fast.multiscale_ffn
    args += (torch.randn(1, 2, 5, 3, dtype=torch.float64, requires_grad=True),)
    assert torch.autograd.gradcheck(op, args)
    assert torch.autograd.gradgradcheck(op, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("residual_layout", LAYOUTS)
def test_residual(cpp: object, layout: str, residual_layout: str, dtype: torch.dtype) -> None:
    args = flat(arguments((2, 4, 9, 20), dtype, layout=layout))
    args += (LAYOUTS[residual_layout](torch.randn(2, 7, 9, 20, dtype=dtype)).requires_grad_(),)
    with poisoned_memory():
        actual = value_and_grads(torch.ops.swformer_fast.multiscale_ffn, args)
    expected = value_and_grads(sf.backend.OPS["multiscale_ffn"].reference, fp64(args))
    assert_close(actual, expected, dtype)
    only = args[:-1], args[-1].detach()
    without = value_and_grads(torch.ops.swformer_fast.multiscale_ffn, (*only[0], only[1]))
    assert all(torch.equal(a, b) for a, b in zip(without[1], actual[1], strict=False))


def test_gradient_of_the_residual_alone(cpp: object) -> None:
    args = [t.detach() for t in flat(arguments((1, 4, 6, 5)))]
    residual = torch.randn(1, 7, 6, 5, requires_grad=True)
    grad = torch.randn(1, 7, 6, 5)
    y = torch.ops.swformer_fast.multiscale_ffn(*args, residual)
    assert torch.equal(torch.autograd.grad(y, residual, grad)[0], grad)


def test_double_backward(cpp: object) -> None:
    def second_derivatives(function: Callable[..., Tensor], args: Arguments) -> tuple[Tensor, ...]:
        leaves = flat(args)[:-1]
        first = torch.autograd.grad(function(*args).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), leaves)

    args = arguments((1, 3, 6, 7))
    actual = second_derivatives(functional.multiscale_ffn, args)
    assert_close(actual, second_derivatives(reference.multiscale_ffn, fp64(args)), torch.float32)


def test_compiles_without_graph_breaks(backend: str) -> None:
    def call(*args: object) -> Tensor:
        return functional.multiscale_ffn(args[0].sin(), *args[1:]).cos()

    torch._dynamo.reset()
    args = arguments((2, 3, 9, 12))
    actual = value_and_grads(torch.compile(call, fullgraph=True), args)
    assert_close(actual, value_and_grads(call, args), torch.float32)


@pytest.mark.parametrize("op", [OP, f"{OP}_backward"])
def test_a_zeroed_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """The comparison above must fail for a kernel that writes zeros: it measures something."""
    zero_op(monkeypatch, op)
    with pytest.raises(AssertionError):
        check(arguments((1, 3, 5, 6)))


def replaced(name: str, value: object) -> tuple:
    x, parameters = arguments((1, 4, 6, 6))
    return x, with_field(parameters, name, value)


def depthwise(*shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[Convolution, ...]:
    return tuple(Convolution(torch.ones(weight), torch.ones(bias)) for weight, bias in shapes)


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (TypeError, "x must be a torch.Tensor", lambda: ([1.0], arguments((1, 4, 6, 6))[1])),
        (ValueError, "at least one", lambda: (torch.ones(1, 4, 0, 2), arguments((1, 4, 6, 6))[1])),
        (
            ValueError,
            r"in_weight must have shape \(3 \* M, 4, 1, 1\)",
            lambda: replaced("in_weight", torch.ones(5, 4, 1, 1)),
        ),
        (ValueError, r"in_bias must have shape \(15,\)", lambda: replaced("in_bias", torch.ones(3))),
        (TypeError, "parameters must be a .*FfnParameters", lambda: flat(arguments((1, 4, 6, 6)))[:2]),
        (ValueError, "hold three convolutions", lambda: replaced("depthwise", depthwise(((5, 1, 3, 3), (5,))))),
        (TypeError, r"depthwise\[0\] must be a .*Convolution", lambda: replaced("depthwise", ((1, 2),) * 3)),
        (
            ValueError,
            r"depthwise\[0\]\.weight must have a square",
            lambda: replaced("depthwise", depthwise(*[((5, 1, 2, 2), (5,))] * 3)),
        ),
        (
            ValueError,
            r"depthwise\[0\]\.bias must have shape",
            lambda: replaced("depthwise", depthwise(*[((5, 1, 3, 3), (4,))] * 3)),
        ),
        (ValueError, "out_weight must have shape", lambda: replaced("out_weight", torch.ones(7, 14, 1, 1))),
        (TypeError, "out_bias must have the dtype", lambda: replaced("out_bias", torch.ones(7, dtype=torch.float64))),
    ],
)
def test_errors(error: type[Exception], message: str, args: Callable[[], tuple]) -> None:
    with pytest.raises(error, match=message):
        functional.multiscale_ffn(*args())
