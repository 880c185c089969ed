"""The Haar operators on every backend that runs here, against the reference in fp64 and PyWavelets."""

import numpy as np
import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_close, fp64, poisoned_memory, rel_rms, value_and_grads, zero_op
from torch import Tensor

import swformer_fast as sf
from swformer_fast import functional, reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BACKENDS = [name for name in ("reference", "cpp") if sf.backends()[name] == "available"]


# The reference computes in the image's own dtype: below fp64 it is the fallback, not a match for itself in fp64.
KERNEL_DTYPES = [(b, d) for b in BACKENDS for d in DTYPES if b != "reference" or d == torch.float64]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    with sf.use_backend(request.param):
        yield request.param


def taps(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.randn(2, dtype=wide, requires_grad=True), torch.randn(2, dtype=wide, requires_grad=True)


def image(layout: str, dtype: torch.dtype, *shape: int) -> Tensor:
    return LAYOUTS[layout](torch.randn(shape, dtype=dtype)).requires_grad_()


def bands_size(height: int, width: int) -> tuple[int, int]:
    return (height + 1) // 2, (width + 1) // 2


def check_dwt(x: Tensor, grad: Tensor | None = None) -> None:
    arguments = (x, *taps(x.dtype))
    with poisoned_memory():
        actual = value_and_grads(functional.haar_dwt2d, arguments, grad)
    assert_close(actual, value_and_grads(reference.haar_dwt2d, fp64(arguments), grad), x.dtype)


def check_idwt(y: Tensor, size: tuple[int, int], grad: Tensor | None = None) -> None:
    arguments = (y, *taps(y.dtype), size)
    with poisoned_memory():
        actual = value_and_grads(functional.haar_idwt2d, arguments, grad)
    assert_close(actual, value_and_grads(reference.haar_idwt2d, fp64(arguments), grad), y.dtype)


@pytest.mark.parametrize(("name", "dtype"), KERNEL_DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_matches_reference(name: str, dtype: torch.dtype, size: tuple[int, int]) -> None:
    with sf.use_backend(name):
        check_dwt(image("contiguous", dtype, 2, 3, *size))
        check_idwt(image("contiguous", dtype, 2, 12, *bands_size(*size)), size)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "dtype"), [case for case in KERNEL_DTYPES if case[1] != torch.float16])
@pytest.mark.parametrize("channels", [1, 3, 20])
def test_layouts(name: str, layout: str, dtype: torch.dtype, channels: int) -> None:
    with sf.use_backend(name):
        check_dwt(image(layout, dtype, 2, channels, 37, 70))
        check_idwt(image(layout, dtype, 2, 4 * channels, 19, 35), (37, 70))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "dtype"), [case for case in KERNEL_DTYPES if case[1].itemsize > 2])
def test_layouts_of_the_gradient(name: str, dtype: torch.dtype, layout: str) -> None:
    grad = LAYOUTS[layout](torch.randn(2, 16, 17, 25, dtype=dtype))
    grad_of_inverse = LAYOUTS[layout](torch.randn(2, 4, 33, 50, dtype=dtype))
    with sf.use_backend(name):
        check_dwt(image("contiguous", dtype, 2, 4, 33, 50), grad)
        check_idwt(image("contiguous", dtype, 2, 16, 17, 25), (33, 50), grad_of_inverse)


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, True, True)])
def test_partial_gradients(backend: str, needs: tuple[bool, ...]) -> None:
    arguments = [
        t.detach().requires_grad_(n)
        for t, n in zip((torch.randn(2, 3, 9, 40), *taps(torch.float32)), needs, strict=True)
    ]
    actual = value_and_grads(functional.haar_dwt2d, arguments)
    assert_close(actual, value_and_grads(reference.haar_dwt2d, fp64(arguments)), torch.float32)


def test_empty_batch(backend: str) -> None:
    x = torch.randn(0, 3, 8, 9, requires_grad=True)
    low, high = taps(torch.float32)
    y = functional.haar_dwt2d(x, low, high)
    z = functional.haar_idwt2d(y, low, high, (8, 9))
    assert y.shape == (0, 12, 4, 5)
    assert z.shape == (0, 3, 8, 9)
    z.sum().backward()
    assert torch.equal(low.grad, torch.zeros(2))
    assert x.grad.shape == x.shape


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (63, 64), (65, 96)])
def test_equals_pywavelets(backend: str, size: tuple[int, int]) -> None:
    pywt = pytest.importorskip("pywt")
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    low, (horizontal, vertical, diagonal) = pywt.dwt2(x.numpy(), "haar")
    expected = np.concatenate((low, horizontal, vertical, diagonal), axis=1)
    y = functional.haar_dwt2d(x)
    assert rel_rms(y, torch.from_numpy(expected)) < 1e-14
    assert rel_rms(functional.haar_idwt2d(y, output_size=size), x) < 1e-14


def test_mixed_dtypes_and_autocast(backend: str) -> None:
    x = torch.randn(1, 2, 6, 6)
    for fn, argument in ((functional.haar_dwt2d, x), (functional.haar_idwt2d, torch.randn(1, 8, 3, 3))):
        with torch.autocast("cpu", torch.bfloat16):
            assert fn(argument).dtype == torch.bfloat16
            assert fn(argument.double()).dtype == torch.float64
        assert fn(argument.half(), *(t.float() for t in taps(torch.float32))).dtype == torch.float16


def test_inf_and_nan_propagate(backend: str) -> None:
    x = torch.randn(1, 1, 6, 6)
    x[0, 0, 2, 3], x[0, 0, 5, 0] = float("inf"), float("nan")
    expected = reference.haar_dwt2d(x)
    assert torch.allclose(functional.haar_dwt2d(x), expected, equal_nan=True)


@pytest.mark.parametrize("threads", [1, 2])
def test_bitwise_repeatable(backend: str, threads: int) -> None:
    x, (low, high) = image("contiguous", torch.float32, 3, 8, 128, 130), taps(torch.float32)
    first = value_and_grads(functional.haar_dwt2d, (x, low, high))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        second = value_and_grads(functional.haar_dwt2d, (x, low, high))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


OPS = {
    "haar_dwt2d": lambda low, high: (torch.randn(2, 3, 5, 6, dtype=low.dtype, requires_grad=True), low, high),
    "haar_idwt2d": lambda low, high: (torch.randn(2, 8, 3, 3, dtype=low.dtype, requires_grad=True), low, high, 5, 6),
}


@pytest.mark.parametrize("name", OPS)
def test_opcheck(backend: str, name: str) -> None:
    arguments = OPS[name](*taps(torch.float32))
    torch.library.opcheck(getattr(torch.ops.swformer_fast, name), arguments)
    last = (x.contiguous(memory_format=torch.channels_last) if i == 0 else x for i, x in enumerate(arguments))
    torch.library.opcheck(getattr(torch.ops.swformer_fast, name), tuple(last), test_utils="test_faketensor")
    output = getattr(torch.ops.swformer_fast, name)(*arguments).detach()
    torch.library.opcheck(
        getattr(torch.ops.swformer_fast, f"{name}_backward"),
        (torch.randn_like(output), *arguments, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("name", OPS)
def test_gradcheck_twice(backend: str, name: str) -> None:
    arguments = OPS[name](*taps(torch.float64))
    op = getattr(torch.ops.swformer_fast, name)
    assert torch.autograd.gradcheck(op, arguments)
    assert torch.autograd.gradgradcheck(op, arguments)


def test_compiles_without_graph_breaks(backend: str) -> None:
    def pyramid(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return functional.haar_idwt2d(functional.haar_dwt2d(x.sin(), low, high), low, high, (9, 12)).cos()

    torch._dynamo.reset()
    arguments = (torch.randn(2, 3, 9, 12, requires_grad=True), *taps(torch.float32))
    actual = value_and_grads(torch.compile(pyramid, fullgraph=True), arguments)
    assert_close(actual, value_and_grads(pyramid, arguments), torch.float32)


def test_functorch_is_refused_not_wrong(backend: str) -> None:
    with pytest.raises(RuntimeError, match="functorch"):
        torch.func.grad(lambda x: functional.haar_dwt2d(x).square().sum())(torch.randn(1, 2, 6, 6))


@pytest.mark.parametrize("op", ["haar_dwt2d", "haar_dwt2d_backward", "haar_idwt2d", "haar_idwt2d_backward"])
def test_a_zeroed_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """The comparison above must fail for a kernel that writes zeros: it measures something."""
    zero_op(monkeypatch, op)
    if "idwt" in op:
        with pytest.raises(AssertionError):
            check_idwt(image("contiguous", torch.float32, 1, 4, 3, 3), (5, 6))
    else:
        with pytest.raises(AssertionError):
            check_dwt(image("contiguous", torch.float32, 1, 1, 5, 6))


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must be a torch.Tensor, got list", lambda: functional.haar_dwt2d([1.0])),
        (TypeError, "int64", lambda: functional.haar_dwt2d(torch.ones(1, 1, 2, 2, dtype=torch.long))),
        (ValueError, r"\(B, C, H, W\), got \(2, 2\)", lambda: functional.haar_dwt2d(torch.ones(2, 2))),
        (ValueError, "at least one", lambda: functional.haar_dwt2d(torch.ones(1, 1, 0, 2))),
        (
            ValueError,
            r"dec_lo must have shape \(2,\)",
            lambda: functional.haar_dwt2d(torch.ones(1, 1, 2, 2), torch.ones(3)),
        ),
        (
            TypeError,
            "dec_hi must have the dtype of the image",
            lambda: functional.haar_dwt2d(torch.ones(1, 1, 2, 2), dec_hi=torch.ones(2, dtype=torch.float64)),
        ),
        (ValueError, "4 . C channels", lambda: functional.haar_idwt2d(torch.ones(1, 3, 2, 2))),
        (ValueError, "output_size must be", lambda: functional.haar_idwt2d(torch.ones(1, 4, 2, 2), output_size=(5, 4))),
    ],
)
def test_errors(error: type[Exception], message: str, call: object) -> None:
    with pytest.raises(error, match=message):
        call()


def test_every_op_has_a_fake_and_a_backward() -> None:
    names = {"haar_dwt2d", "haar_dwt2d_backward", "haar_idwt2d", "haar_idwt2d_backward"}
    assert names <= sf.backend.OPS.keys()
    assert all(torch._C._dispatch_has_kernel_for_dispatch_key(f"swformer_fast::{name}", "Meta") for name in names)
