"""Channel attention on every backend that runs here, against the reference in fp64."""

from collections.abc import Callable

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_close, fp64, poisoned_memory, value_and_grads, with_field, zero_op
from torch import Tensor

import swformer_fast as sf
from swformer_fast import functional, reference
from swformer_fast.parameters import AttentionParameters

OP = "channel_attention"
Arguments = tuple[Tensor, AttentionParameters]
BACKENDS = [name for name in ("reference", "cpp") if sf.backends()[name] == "available"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    with sf.use_backend(request.param):
        yield request.param


@pytest.fixture
def cpp() -> object:
    with sf.use_backend("cpp"):
        yield


def arguments(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, layout: str = "contiguous", hidden: int = 4
) -> Arguments:
    """An image whose means are not 0, so that they matter, and hidden units that are mostly on."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    channels = shape[1]
    x = LAYOUTS[layout]((torch.randn(shape, dtype=torch.float64) + 1).to(dtype)).requires_grad_()
    w1, w2 = torch.randn(hidden, channels, 1, 1) / channels**0.5, torch.randn(channels, hidden, 1, 1)
    b1, b2 = torch.randn(hidden) + 1, torch.randn(channels)
    return x, AttentionParameters(*(t.to(wide).requires_grad_() for t in (w1, b1, w2, b2)))


def flat(args: Arguments) -> tuple[Tensor, ...]:
    """The arguments of the op."""
    return args[0], *args[1]


def check(args: Arguments, grad: Tensor | None = None) -> None:
    if grad is None:
        grad = torch.randint(0, 65, args[0].shape) / 64
    with poisoned_memory():
        actual = value_and_grads(functional.channel_attention, args, grad)
    assert actual[0].dtype == args[0].dtype
    assert_close(actual, value_and_grads(reference.channel_attention, fp64(args), grad), args[0].dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [*SIZES, (130, 97)])
def test_matches_reference(cpp: object, dtype: torch.dtype, size: tuple[int, int]) -> None:
    check(arguments((2, 12, *size), dtype))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "channels_last"])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_layouts(cpp: object, layout: str, grad_layout: str) -> None:
    check(arguments((2, 5, 19, 37), layout=layout), LAYOUTS[grad_layout](torch.rand(2, 5, 19, 37)))


def test_channels_last_falls_back() -> None:
    args = arguments((2, 5, 9, 7), layout="channels_last")
    assert "channels_last" in sf.why_not(OP, *args)
    check(args)
    assert functional.channel_attention(*args).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("needs", ["x", "parameters"])
def test_partial_gradients(backend: str, needs: str) -> None:
    args = arguments((1, 4, 21, 40))
    for i, tensor in enumerate(flat(args)):
        tensor.requires_grad_((i == 0) == (needs == "x"))
    actual = value_and_grads(functional.channel_attention, args)
    assert_close(actual, value_and_grads(reference.channel_attention, fp64(args)), torch.float32)


def test_units_that_are_off(cpp: object) -> None:
    x, parameters = arguments((2, 6, 8, 9))
    with torch.no_grad():
        parameters.b1[:2] = -100
        parameters.w1[2], parameters.b1[2] = 0, 0
    check((x, parameters))


def test_empty_batch(backend: str) -> None:
    args = arguments((0, 4, 8, 9))
    y = functional.channel_attention(*args)
    assert y.shape == (0, 4, 8, 9)
    y.sum().backward()
    assert all(torch.equal(t.grad, torch.zeros_like(t)) for t in flat(args))


def test_autocast() -> None:
    args = arguments((1, 4, 8, 8))
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.channel_attention(*args)
        assert functional.channel_attention(args[0].double(), args[1]).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    assert_close(y, reference.channel_attention(*fp64(args)), torch.bfloat16)
    y.float().sum().backward()
    assert all(t.grad.dtype == t.dtype for t in flat(args))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_propagate(cpp: object, value: float) -> None:
    args = arguments((2, 4, 6, 7))
    with torch.no_grad():
        args[0][0, 1, 2, 3] = value
        y, expected = functional.channel_attention(*args), reference.channel_attention(*args)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not expected.isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
def test_bitwise_repeatable(cpp: object, threads: int) -> None:
    args = arguments((2, 24, 100, 66))
    first = value_and_grads(functional.channel_attention, args)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        second = value_and_grads(functional.channel_attention, args)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str) -> None:
    args = flat(arguments((2, 4, 9, 10), layout=layout))
    torch.library.opcheck(torch.ops.swformer_fast.channel_attention, args)
    torch.library.opcheck(
        torch.ops.swformer_fast.channel_attention_backward,
        (torch.randn(2, 4, 9, 10), *args, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_gradcheck_twice() -> None:
    args = flat(arguments((2, 3, 4, 3), torch.float64, hidden=2))
    assert torch.autograd.gradcheck(torch.ops.swformer_fast.channel_attention, args)
    assert torch.autograd.gradgradcheck(torch.ops.swformer_fast.channel_attention, args)


def test_compiles_without_graph_breaks(backend: str) -> None:
    def call(x: Tensor, parameters: AttentionParameters) -> Tensor:
        return functional.channel_attention(x.sin(), parameters).cos()

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


@pytest.mark.parametrize(
    ("error", "message", "args"),
    [
        (TypeError, "x must be a torch.Tensor", lambda: ([1.0], arguments((1, 4, 6, 6))[1])),
        (ValueError, "at least one", lambda: (torch.ones(1, 4, 0, 2), arguments((1, 4, 6, 6))[1])),
        (TypeError, "parameters must be a .*AttentionParameters", lambda: (torch.ones(1, 4, 6, 6), (1, 2, 3, 4))),
        (ValueError, "w1 must have shape", lambda: replaced("w1", torch.ones(4, 3, 1, 1))),
        (ValueError, "b1 must have shape", lambda: replaced("b1", torch.ones(3))),
        (ValueError, "w2 must have shape", lambda: replaced("w2", torch.ones(4, 3, 1, 1))),
        (TypeError, "b2 must have the dtype", lambda: replaced("b2", torch.ones(4, dtype=torch.float64))),
    ],
)
def test_errors(error: type[Exception], message: str, args: Callable[[], tuple]) -> None:
    with pytest.raises(error, match=message):
        functional.channel_attention(*args())
