"""`shortcut_backward` on every backend that runs here, against autograd through the plain step in fp64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_close, fp64, num_threads, poisoned_memory, rel_rms
from torch import Tensor, nn

import sdo_fast
from sdo_fast import backend, functional, reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BACKENDS = [name for name in ("reference", "cpp") if sdo_fast.backends()[name] == "available"]
CLIPPING = {"c": 0.5, "pred_x": 1.5, "pred_eps": -0.8, "clip": 1.0}
A, B = 157.0, -12.5


@pytest.fixture(params=BACKENDS)
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with sdo_fast.use_backend(request.param):
        yield request.param


def inputs(
    dtype: torch.dtype, guided: bool, *size: int, layouts: tuple[str, str] = ("contiguous", "contiguous")
) -> tuple[Tensor, dict[str, Tensor]]:
    """grad, and x, cond, (uncond) with no prediction so near a bound that rounding decides."""
    size = size or (2, 3, 9, 10)
    grad, x, cond, uncond = (torch.randn(size, dtype=dtype) for _ in range(4))
    eps = uncond.double() + 3.5 * (cond.double() - uncond.double()) if guided else cond.double()
    near = ((1.5 * x.double() - 0.8 * eps).abs() - 1).abs() < 0.05
    x = torch.where(near, x + 0.2, x)
    step = {"x": x, "cond": cond, **({"uncond": uncond} if guided else {})}
    return LAYOUTS[layouts[0]](grad), {name: LAYOUTS[layouts[1]](t) for name, t in step.items()}


def by_autograd(grad: Tensor, guidance: float | None, step: dict[str, Tensor] | None) -> tuple[Tensor, ...]:
    """The cotangents of x, cond and uncond, in fp64, by autograd through the plain step."""
    grad = grad.double()
    names = ["x", "cond"] + ["uncond"] * (guidance is not None)
    operands = fp64(step) if step is not None else {name: torch.zeros_like(grad) for name in names}
    leaves = [t.detach().clone().requires_grad_() for t in operands.values()]
    numbers = CLIPPING if step is not None else {}
    y = reference.sampler_step(*leaves, **({} if guidance is None else {"guidance": guidance}), a=A, b=B, **numbers)
    return torch.autograd.grad(y, leaves, grad)


def check(grad: Tensor, guidance: float | None, step: dict[str, Tensor] | None) -> None:
    with poisoned_memory():
        extra = {**step, **CLIPPING} if step is not None else {}
        actual = functional.shortcut_backward(grad, A, B, guidance, **extra)
    assert (actual[2] is None) is (guidance is None)
    assert all(t.dtype == grad.dtype for t in actual if t is not None)
    assert_close([t for t in actual if t is not None], list(by_autograd(grad, guidance, step)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("guidance", [None, 3.5])
def test_matches_autograd(each_backend: str, dtype: torch.dtype, clipped: bool, guidance: float | None) -> None:
    grad, step = inputs(dtype, guidance is not None)
    check(grad, guidance, step if clipped else None)


@pytest.mark.parametrize("size", [*SIZES, (128, 300)])
def test_sizes(each_backend: str, size: tuple[int, int]) -> None:
    grad, step = inputs(torch.float32, True, 2, 3, *size)
    check(grad, 3.5, step)
    check(grad, 3.5, None)


@pytest.mark.parametrize("size", [(), (7,), (2, 5, 6), (2, 3, 4, 5, 6), (0, 3, 4, 4)])
def test_ranks(each_backend: str, size: tuple[int, ...]) -> None:
    grad = torch.randn(size)
    for got, factor in zip(functional.shortcut_backward(grad, A, B, 3.0), (A, 3 * B, -2 * B), strict=True):
        assert_close(got, factor * grad.double())


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_step", LAYOUTS)
def test_layouts(each_backend: str, of_grad: str, of_step: str) -> None:
    if of_step == "expanded":  # the repeated image must be free of near bounds too
        grad, step = inputs(torch.float32, True, 1, 5, 7, 18)
        grad, step = grad.expand(2, 5, 7, 18), {name: t.expand(2, 5, 7, 18) for name, t in step.items()}
        grad = LAYOUTS[of_grad](grad)
    else:
        grad, step = inputs(torch.float32, True, 2, 5, 7, 18, layouts=(of_grad, of_step))
    check(grad, 3.5, step)
    assert functional.shortcut_backward(grad, A, B)[0].stride() == torch.empty_like(grad).stride()


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "channels_last"])
def test_out(each_backend: str, clipped: bool, layout: str) -> None:
    """Into given memory: the halves of one batch, any of them left out, or grad's own memory."""
    grad, step = inputs(torch.float32, True)
    extra = {**step, **CLIPPING} if clipped else {}
    expected = functional.shortcut_backward(grad, A, B, 3.5, **extra)
    grad_x = LAYOUTS[layout](torch.full_like(grad, torch.nan))
    both = LAYOUTS[layout](torch.full((4, 3, 9, 10), torch.nan))
    uncond, cond = both.chunk(2)
    result = functional.shortcut_backward(grad, A, B, 3.5, **extra, out=(grad_x, cond, uncond))
    assert result[0] is grad_x
    assert torch.equal(grad_x, expected[0])
    assert torch.equal(both, torch.cat([expected[2], expected[1]]))
    for k in range(3):
        out = [torch.full_like(grad, torch.nan) if i == k else None for i in range(3)]
        functional.shortcut_backward(grad, A, B, 3.5, **extra, out=tuple(out))
        assert torch.equal(out[k], expected[k])
    buffer = grad.clone()
    functional.shortcut_backward(buffer, A, B, 3.5, **extra, out=(buffer, None, None))
    assert torch.equal(buffer, expected[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("size", [(64, 64), (9, 11)])
def test_cuda_matches_reference(dtype: torch.dtype, layout: str, size: tuple[int, int]) -> None:
    grad, step = inputs(dtype, True, 2, 4, *size, layouts=(layout, "contiguous"))
    with sdo_fast.use_backend("cuda"):
        check(grad.cuda(), 3.5, {name: t.cuda() for name, t in step.items()})
        check(grad.cuda(), 3.5, None)


def test_it_is_the_gradient_of_a_sampler(each_backend: str) -> None:
    """With A and B of the scheduler, the shortcut's gradient is that of the sampler."""
    diffusers = pytest.importorskip("diffusers")
    model = nn.Conv2d(3, 3, 3, padding=1, dtype=torch.float64)
    scheduler = diffusers.DDIMScheduler(clip_sample=False)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    sampler = sdo_fast.ShortcutSampler(lambda x, t, scale: model(x) * scale, scheduler, 6, start=2, guidance_scale=3.0)
    x0 = sampler(x, {"scale": 1.0}, {"scale": -0.5})
    grad = torch.randn_like(x0)
    (expected,) = torch.autograd.grad(x0, x, grad)
    a, b = (t[2].item() for t in sdo_fast.coefficients(scheduler, 6, start=2))
    direct, cond, uncond = functional.shortcut_backward(grad, a, b, 3.0)
    through = torch.func.vjp(lambda x: (model(x), -0.5 * model(x)), x)[1]((cond, uncond))[0]
    assert rel_rms(direct + through, expected) < 1e-6


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inf_and_nan(each_backend: str, value: float) -> None:
    grad, step = inputs(torch.float32, True)
    for name in ("grad", *step):
        changed_grad, changed = grad.clone(), {n: t.clone() for n, t in step.items()}
        (changed_grad if name == "grad" else changed[name])[0, 1, 2, 3] = value
        actual = functional.shortcut_backward(changed_grad, A, B, 3.5, **changed, **CLIPPING)
        expected = by_autograd(changed_grad, 3.5, changed)
        for a, e in zip(actual, expected, strict=True):
            assert torch.equal(a.isfinite(), e.isfinite())
            assert torch.allclose(a[a.isfinite()].double(), e[a.isfinite()], rtol=1e-4, atol=1e-3)


def test_masked_infinity_gives_no_nan(each_backend: str) -> None:
    """Where the prediction was clipped its path has no gradient, even an infinite one."""
    grad = torch.tensor([float("inf"), 1.0])
    direct, cond, _ = functional.shortcut_backward(
        grad, 2.0, 0.0, x=torch.tensor([9.0, 0.0]), cond=torch.zeros(2), clip=1.0, c=1.0, pred_x=1.0, pred_eps=0.5
    )
    assert direct.tolist() == [float("inf"), 3.0]
    assert cond[1].item() == 0.5


@pytest.mark.parametrize("threads", [1, 2])
def test_bitwise_repeatable(each_backend: str, threads: int) -> None:
    grad, step = inputs(torch.float32, True, 3, 4, 127, 129)
    first = functional.shortcut_backward(grad, A, B, 3.5, **step, **CLIPPING)
    with num_threads(threads):
        moved = {name: LAYOUTS["strided"](t) for name, t in step.items()}
        for arguments in (step, moved):
            again = functional.shortcut_backward(grad, A, B, 3.5, **arguments, **CLIPPING)
            assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("clipped", [False, True])
def test_opcheck_and_gradcheck(each_backend: str, clipped: bool) -> None:
    grad, step = inputs(torch.float64, True, 2, 2, 3, 4)
    grad.requires_grad_()
    tensors = (step["x"], step["cond"], step["uncond"]) if clipped else (None, None, None)
    numbers = tuple(CLIPPING.values()) if clipped else (0.0, 0.0, 0.0, None)
    op = torch.ops.sdo_fast.shortcut_backward
    torch.library.opcheck(op, (grad, 2.0, -0.5, 3.5, *tensors, *numbers, True, True, True))
    torch.library.opcheck(op, (grad, 2.0, -0.5, 3.5, *tensors, *numbers, True, False, True))
    outs = (torch.empty_like(grad.detach()), None, torch.empty_like(grad.detach()))
    torch.library.opcheck(
        torch.ops.sdo_fast.shortcut_backward_out, (grad.detach(), 2.0, -0.5, 3.5, *tensors, *numbers, *outs)
    )

    def of_grad(grad: Tensor) -> tuple[Tensor, ...]:
        return op(grad, 2.0, -0.5, 3.5, *tensors, *numbers, True, True, True)

    assert torch.autograd.gradcheck(of_grad, (grad,))
    assert torch.autograd.gradgradcheck(of_grad, (grad,))


def test_compiles_without_graph_breaks(each_backend: str) -> None:
    def cotangents(grad: Tensor) -> Tensor:
        direct, cond, uncond = functional.shortcut_backward(grad.sin(), A, B, 3.5)
        return direct.cos() + cond * uncond

    torch._dynamo.reset()
    grad = torch.randn(2, 3, 5, 6)
    assert_close(torch.compile(cotangents, fullgraph=True)(grad), cotangents(grad))


def test_a_zeroed_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def zeroed(*args: Any) -> None:
        for out in args[11:]:
            if out is not None:
                out.zero_()

    monkeypatch.setattr(backend, "_implementation", lambda op, name: zeroed)
    grad, step = inputs(torch.float32, True)
    for operands in (step, None):
        with pytest.raises(AssertionError):
            check(grad, 3.5, operands)


ONES = torch.ones(1, 2, 3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "grad must be a torch.Tensor, got int", lambda: functional.shortcut_backward(1, A, B)),
        (
            TypeError,
            "grad must have dtype .*, got torch.int64",
            lambda: functional.shortcut_backward(ONES.long(), A, B),
        ),
        (
            ValueError,
            "x must be given with clip",
            lambda: functional.shortcut_backward(ONES, A, B, cond=ONES, clip=1.0),
        ),
        (
            ValueError,
            "uncond must be given with clip",
            lambda: functional.shortcut_backward(ONES, A, B, 2.0, x=ONES, cond=ONES, clip=1.0),
        ),
        (
            ValueError,
            "uncond must be None where guidance is",
            lambda: functional.shortcut_backward(ONES, A, B, x=ONES, cond=ONES, uncond=ONES, clip=1.0),
        ),
        (
            TypeError,
            "cond must have the dtype of grad, torch.float32, got torch.float64",
            lambda: functional.shortcut_backward(ONES, A, B, x=ONES, cond=ONES.double(), clip=1.0),
        ),
        (
            ValueError,
            r"out \(grad_x\) must have the shape of grad",
            lambda: functional.shortcut_backward(ONES, A, B, out=(ONES[0].clone(), None, None)),
        ),
        (
            ValueError,
            "out must have None in the third place",
            lambda: functional.shortcut_backward(ONES, A, B, out=(None, None, ONES.clone())),
        ),
        (
            ValueError,
            r"out \(grad_cond\) must be the same view as an input",
            lambda: functional.shortcut_backward(ONES, A, B, out=(*(ONES.clone(),) * 2, None)),
        ),
        (
            RuntimeError,
            "out must be None where gradients are recorded",
            lambda: functional.shortcut_backward(ONES.clone().requires_grad_(), A, B, out=(ONES.clone(), None, None)),
        ),
    ],
)
def test_errors(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()
