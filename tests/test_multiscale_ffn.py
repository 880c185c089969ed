"""multiscale_ffn: sizes around its pyramids, widths, residual, errors. What every op keeps is in test_contract.py."""

from collections.abc import Callable

import pytest
import torch
from contract import needs_cpp
from helpers import LAYOUTS, SIZES, assert_close, fp64, poisoned_memory, value_and_grads, with_field
from torch import Tensor

import swformer_fast as sf
from swformer_fast import functional, reference
from swformer_fast.parameters import Convolution, FfnParameters, flatten

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Arguments = tuple[Tensor, FfnParameters]
OP = "multiscale_ffn"


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
    parameter_dtype = parameter_dtype or (torch.float64 if dtype == torch.float64 else torch.float32)
    dim = shape[1]

    def parameter(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, dtype=torch.float64)).to(parameter_dtype).requires_grad_()

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


@needs_cpp
def test_why_not() -> None:
    assert sf.why_not(OP, *arguments((1, 4, 8, 8))) == "cpp runs"
    assert "float64" in sf.why_not(OP, *arguments((1, 4, 8, 8), torch.float64))
    five_by_five = arguments((1, 4, 8, 8), kernel=5)
    assert "3 x 3" in sf.why_not(OP, *five_by_five)
    assert_close(functional.multiscale_ffn(*five_by_five), reference.multiscale_ffn(*five_by_five))


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


def replaced(name: str, value: object) -> tuple:
    x, parameters = arguments((1, 4, 6, 6))
    return x, with_field(parameters, name, value)


def depthwise(*shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> tuple[Convolution, ...]:
    return tuple(Convolution(torch.ones(weight), torch.ones(bias)) for weight, bias in shapes)


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
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


@needs_cpp
def test_the_gradient_of_a_mean_over_a_large_image(cpp: object) -> None:
    """Millions of equal numbers are summed: each of three channels' biases has a third."""
    x, parameters = arguments((1, 1, 1080, 1920), mid=1, out=3)
    bias = parameters.out_bias
    (grad,) = torch.autograd.grad(functional.multiscale_ffn(x, parameters).mean(), bias)
    torch.testing.assert_close(grad, torch.full_like(grad, 1 / 3), rtol=1e-6, atol=0)
