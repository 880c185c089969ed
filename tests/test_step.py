"""`sampler_step` on every backend that runs here, against the reference in fp64, and against diffusers' schedulers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, SIZES, assert_close, assert_matches, num_threads, poisoned_memory, rel_rms, value_and_grads
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_map_only

import sdo_fast
from sdo_fast import backend, functional, ops, reference

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
BACKENDS = [name for name in ("reference", "cpp") if sdo_fast.backends()[name] == "available"]
AFFINE = {"a": 1.25, "b": -0.75}
CLIPPED = {**AFFINE, "c": 0.5, "pred_x": 1.5, "pred_eps": -0.8, "clip": 1.0}


@pytest.fixture(params=BACKENDS)
def each_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with sdo_fast.use_backend(request.param):
        yield request.param


def tensors(count: int, dtype: torch.dtype = torch.float32, *shape: int, layout: str = "contiguous") -> list[Tensor]:
    shape = shape or (2, 3, 9, 10)
    return [LAYOUTS[layout](torch.randn(shape, dtype=dtype)).requires_grad_() for _ in range(count)]


def flat(guided: bool, count: int, **numbers: float) -> Any:
    """The function of x, cond, (uncond,) *terms with these numbers, for fn or the reference."""
    scales = [0.3, -1.5, 0.7, 2.0, -0.2, 0.1, 0.4, -0.6, 0.9][:count]

    def call(fn: Any, x: Tensor, cond: Tensor, *others: Tensor) -> Tensor:
        uncond, terms = (others[0], others[1:]) if guided else (None, others)
        return fn(x, cond, uncond, 3.5, terms=terms, scales=scales, **numbers)

    return call


def check(arguments: list[Tensor], guided: bool, **numbers: float) -> None:
    call = flat(guided, len(arguments) - 2 - guided, **numbers)
    with poisoned_memory():
        assert_matches(
            lambda *args: call(functional.sampler_step, *args),
            lambda *args: call(reference.sampler_step, *args),
            away_from_bounds(arguments, guided, **numbers),
        )


def away_from_bounds(arguments: list[Tensor], guided: bool, **numbers: float) -> list[Tensor]:
    """The arguments, x changed where the prediction is so near a bound that rounding decides the gradient."""
    if "clip" not in numbers:
        return arguments
    x, cond, *others = (t.detach().double() for t in arguments)
    eps = others[0] + 3.5 * (cond - others[0]) if guided else cond
    near = ((numbers["pred_x"] * x + numbers["pred_eps"] * eps).abs() - numbers["clip"]).abs() < 0.05
    with torch.no_grad():
        first = arguments[0]
        if first.stride(0) == 0:
            first = first.contiguous().requires_grad_()
        first.copy_(torch.where(near, x + 0.2, x))
    return [first, *arguments[1:]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numbers", [AFFINE, CLIPPED], ids=["affine", "clipped"])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("terms", [0, 1, 8])
def test_matches_reference(each_backend: str, dtype: torch.dtype, numbers: Any, guided: bool, terms: int) -> None:
    check(tensors(2 + guided + terms, dtype), guided, **numbers)


@pytest.mark.parametrize("size", [*SIZES, (128, 300)])
def test_sizes(each_backend: str, size: tuple[int, int]) -> None:
    check(tensors(4, torch.float32, 2, 3, *size), True, **AFFINE)


@pytest.mark.parametrize(
    "shape", [(), (1,), (7,), (2, 5, 6), (2, 3, 4, 5, 6), (1, 2, 2, 2, 2, 3), (2,) * 7, (0, 3, 4, 4)]
)
def test_ranks(each_backend: str, shape: tuple[int, ...]) -> None:
    if each_backend == "cpp" and len(shape) > 6:
        with pytest.raises(RuntimeError, match="at most 6 dimensions"):
            functional.sampler_step(torch.ones(shape), torch.ones(shape), **AFFINE)
        return
    arguments = [torch.randn(shape, requires_grad=True) for _ in range(3)]
    call = flat(True, 0, **AFFINE)
    assert_matches(
        lambda *args: call(functional.sampler_step, *args), lambda *args: call(reference.sampler_step, *args), arguments
    )


@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_others", ["contiguous", "channels_last", "strided"])
def test_layouts(each_backend: str, of_x: str, of_others: str) -> None:
    x, others = (
        tensors(1, torch.float32, 2, 5, 7, 18, layout=of_x),
        tensors(3, torch.float32, 2, 5, 7, 18, layout=of_others),
    )
    check([*x, *others], True, **CLIPPED)
    check([*others[:1], *x, *others[1:]], True, **AFFINE)


def test_halves_of_one_model_output(each_backend: str) -> None:
    """The model's output on [uncond, cond], with variance channels to leave out."""
    x, output = torch.randn(2, 3, 6, 6), torch.randn(4, 6, 6, 6)
    uncond, cond = output[:, :3].chunk(2)
    check([x.requires_grad_(), cond.requires_grad_(), uncond.requires_grad_()], True, **AFFINE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_the_result(each_backend: str, layout: str) -> None:
    (x,), (cond,) = tensors(1, layout=layout), tensors(1)
    y = functional.sampler_step(x, cond, **AFFINE)
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("numbers", [AFFINE, CLIPPED], ids=["affine", "clipped"])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "strided", "channels_last"])
def test_out_and_in_place(each_backend: str, layout: str, numbers: Any) -> None:
    x, cond, uncond, term = (t.detach() for t in tensors(4))
    arguments = {"terms": [term], "scales": [0.5], **numbers}
    expected = functional.sampler_step(x, cond, uncond, 2.0, **arguments)
    out = LAYOUTS[layout](torch.full_like(x, torch.nan))
    address = out.data_ptr()
    assert functional.sampler_step(x, cond, uncond, 2.0, **arguments, out=out) is out
    assert out.data_ptr() == address
    assert torch.equal(out, expected)
    for k in range(4):
        inputs = [x.clone(), cond.clone(), uncond.clone(), term.clone()]
        functional.sampler_step(*inputs[:3], 2.0, **{**arguments, "terms": inputs[3:]}, out=inputs[k])
        assert torch.equal(inputs[k], expected)


def test_out_leaves_the_gaps_alone(each_backend: str) -> None:
    buffer = torch.full((2, 3, 9, 20), 7.0)
    functional.sampler_step(torch.ones(2, 3, 9, 10), torch.ones(2, 3, 9, 10), **AFFINE, out=buffer[..., ::2])
    assert (buffer[..., 1::2] == 7).all()
    assert (buffer[..., ::2] == 0.5).all()


def test_more_terms_than_the_kernel_takes() -> None:
    check(tensors(2 + 9), False, **AFFINE)
    arguments = [t.detach() for t in tensors(11)]
    reason = sdo_fast.why_not("sampler_step", *arguments[:2], None, 1.0, 1.0, 0.0, arguments[2:], [1.0] * 9)
    assert reason.startswith("reference runs (not cpp: the kernels take at most 8 terms")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a sparse file")
def test_offsets_beyond_32_bits(each_backend: str, tmp_path: Path) -> None:
    """Two rows 4 GiB apart in sparse files, of which only the touched pages exist."""
    x, cond, out = (
        torch.from_file(str(tmp_path / name), True, 2**31 + 130, dtype=torch.float16).as_strided((2, 130), (2**31, 1))
        for name in ("x", "cond", "out")
    )
    for tensor in (x, cond):
        tensor.copy_(torch.randn(2, 130))
    expected = reference.sampler_step(x.double(), cond.double(), **AFFINE)
    functional.sampler_step(x, cond, **AFFINE, out=out)
    assert_close(out, expected)
    functional.shortcut_backward(x, 2.0, -3.0, out=(out, cond, None))
    assert_close([out, cond], [2 * x.double(), -3 * x.double()], torch.float16)


def test_tensor_guidance(each_backend: str) -> None:
    x, cond, uncond = tensors(3, torch.float64)
    scale = torch.tensor([2.0, 5.0], dtype=torch.float64).reshape(2, 1, 1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: functional.sampler_step(*t, **AFFINE), (x, cond, uncond, scale))
    for i in range(2):
        expected = functional.sampler_step(x[i], cond[i], uncond[i], scale[i].item(), **AFFINE)
        assert_close(functional.sampler_step(x, cond, uncond, scale, **AFFINE)[i], expected)
    with pytest.raises(ValueError, match="uncond must be given with a tensor guidance"):
        functional.sampler_step(x, cond, None, scale, **AFFINE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tensor_guidance_of_float32_beside_16_bits(each_backend: str, dtype: torch.dtype) -> None:
    """eps is rounded once, and the guidance's gradient has its own dtype."""
    x, cond, uncond = tensors(3, dtype)
    scale = torch.tensor([2.31, 7.313]).reshape(2, 1, 1, 1).requires_grad_()
    ours = functional.sampler_step(x, cond, uncond, scale, **AFFINE)
    eps = (uncond.double() + scale.double() * (cond.double() - uncond.double())).to(dtype)
    assert (ours != functional.sampler_step(x, eps, **AFFINE)).double().mean() < 1e-2  # eps may be a tie of rounding
    assert_close(ours, AFFINE["a"] * x.double() + AFFINE["b"] * eps.double())
    (grad,) = torch.autograd.grad(ours.sum(), scale)
    exact = AFFINE["b"] * (cond.double() - uncond.double()).sum((1, 2, 3), keepdim=True)
    assert grad.dtype == torch.float32
    assert_close(grad, exact, dtype)
    with pytest.raises(ValueError, match=r"guidance must broadcast against x \(2, 3, 9, 10\)"):
        functional.sampler_step(x, cond, uncond, torch.ones(3, 1, 1, 1, 1), **AFFINE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("numbers", [AFFINE, CLIPPED], ids=["affine", "clipped"])
def test_inf_and_nan_propagate(each_backend: str, numbers: Any, value: float) -> None:
    arguments = tensors(3)
    for k in range(3):
        changed = [t.detach().clone() for t in arguments]
        changed[k][0, 1, 2, 3] = value
        changed = [t.requires_grad_() for t in changed]
        actual = value_and_grads(lambda *t: functional.sampler_step(*t, 3.5, **numbers), changed)
        expected = value_and_grads(lambda *t: reference.sampler_step(*t, 3.5, **numbers), changed)
        for a, e in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
            assert torch.allclose(a, e, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_clipping_equals_clamp_at_the_bounds(each_backend: str) -> None:
    """Predictions of exactly -1 and 1 pass gradients, as torch.clamp's do."""
    x = torch.tensor([-1.5, -1.0, -0.5, 1.0, 1.5], requires_grad=True)
    numbers = {"a": 0.0, "b": 0.0, "c": 1.0, "pred_x": 1.0, "clip": 1.0}
    y, (grad,) = value_and_grads(lambda x: functional.sampler_step(x, torch.zeros(5), **numbers), [x], torch.ones(5))
    assert y.tolist() == [-1, -1, -0.5, 1, 1]
    assert grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize("threads", [1, 2])
def test_bitwise_repeatable(each_backend: str, threads: int) -> None:
    """The same bits for every number of threads, and for an element wherever it lies in memory."""
    x, cond, uncond = (t.detach() for t in tensors(3, torch.float32, 3, 4, 127, 129))
    first = functional.sampler_step(x, cond, uncond, 3.5, **CLIPPED)
    with num_threads(threads):
        assert torch.equal(first, functional.sampler_step(x, cond, uncond, 3.5, **CLIPPED))
        moved = [LAYOUTS["strided"](t) for t in (x, cond, uncond)]
        assert torch.equal(first, functional.sampler_step(*moved, 3.5, **CLIPPED))


def arguments_of_op(guided: bool, clipped: bool, terms: int) -> tuple[Any, ...]:
    x, cond, uncond, *others = tensors(3 + terms, torch.float64, 2, 2, 3, 4)
    clip = (0.5, 1.5, -0.8, 1.0) if clipped else (0.0, 0.0, 0.0, None)
    return x, cond, uncond if guided else None, 2.5, 1.25, -0.75, others, [0.5, -2.0][:terms], *clip


@pytest.mark.parametrize(
    ("guided", "clipped", "terms"), [(False, False, 0), (True, False, 2), (True, True, 1), (False, True, 0)]
)
def test_opcheck_and_gradcheck(each_backend: str, guided: bool, clipped: bool, terms: int) -> None:
    arguments = arguments_of_op(guided, clipped, terms)
    torch.library.opcheck(torch.ops.sdo_fast.sampler_step, arguments)
    plain = tree_map_only(Tensor, Tensor.detach, arguments)
    torch.library.opcheck(torch.ops.sdo_fast.sampler_step_out, (*plain, torch.empty_like(plain[0])))

    def by_tensors(*inputs: Tensor) -> Tensor:
        following = iter(inputs)
        x, cond = next(following), next(following)
        uncond = next(following) if guided else None
        return torch.ops.sdo_fast.sampler_step(x, cond, uncond, *arguments[3:6], list(following), *arguments[7:])

    inputs = [t for t in (*arguments[:3], *arguments[6]) if t is not None]
    assert torch.autograd.gradcheck(by_tensors, inputs)
    assert torch.autograd.gradgradcheck(by_tensors, inputs)


def test_compiles_without_graph_breaks(each_backend: str) -> None:
    def two_steps(x: Tensor, cond: Tensor, uncond: Tensor, a: float) -> Tensor:
        y = functional.sampler_step(x.sin(), cond, uncond, 2.5, a=a, b=0.5, terms=[x], scales=[0.25])
        return functional.sampler_step(y, cond.cos(), clip=1.0, c=0.5, pred_x=1.1, pred_eps=-0.3, a=0.5, b=a)

    torch._dynamo.reset()
    compiled, arguments = torch.compile(two_steps, fullgraph=True), tensors(3)
    for a in (1.5, 0.25, -2.0):
        actual, expected = (value_and_grads(partial(fn, a=a), arguments) for fn in (compiled, two_steps))
        assert_close(actual, expected)


def test_out_compiles(each_backend: str) -> None:
    def step(x: Tensor, cond: Tensor) -> Tensor:
        return functional.sampler_step(x, cond, **AFFINE, out=x).sin()

    torch._dynamo.reset()
    x, cond = (t.detach() for t in tensors(2))
    mine, theirs = x.clone(), x.clone()
    assert_close(torch.compile(step, fullgraph=True)(mine, cond), step(theirs, cond))
    assert torch.equal(mine, theirs)


def test_autocast_keeps_the_state(each_backend: str) -> None:
    (x,), (cond, uncond, term) = tensors(1), tensors(3, torch.bfloat16)
    plain = functional.sampler_step(x, cond.float(), uncond.float(), 2.0, terms=[term.float()], scales=[0.5], **AFFINE)
    with torch.autocast("cpu", torch.bfloat16):
        y = functional.sampler_step(x, cond, uncond, 2.0, terms=[term], scales=[0.5], **AFFINE)
        with torch.no_grad():
            out = functional.sampler_step(
                x, cond, uncond, 2.0, terms=[term], scales=[0.5], **AFFINE, out=torch.empty_like(x)
            )
    assert y.dtype == torch.float32
    assert torch.equal(y, plain)
    assert torch.equal(out, plain)
    grads = torch.autograd.grad(y.sum(), (x, cond, uncond, term))
    assert [g.dtype for g in grads] == [torch.float32] + [torch.bfloat16] * 3


def test_only_clipping_saves_tensors() -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        functional.sampler_step(*tensors(3), 2.0, **AFFINE)
    assert not saved


def test_a_zeroed_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "_implementation", lambda op, name: lambda *args: args[-1].zero_())
    with pytest.raises(AssertionError):
        check(tensors(3), True, **AFFINE)


def test_wrong_numbers_are_noticed() -> None:
    """Each number matters: the check fails where one of them is changed."""
    arguments = tensors(4)
    numbers = {**CLIPPED, "guidance": 3.5, "scales": [0.7]}
    x, cond, uncond, term = arguments
    expected = reference.sampler_step(x, cond, uncond, terms=[term], **numbers)
    for name in numbers:
        changed = {**numbers, name: [1.1] if name == "scales" else 1.2 * numbers[name]}
        actual = functional.sampler_step(x, cond, uncond, terms=[term], **changed)
        assert rel_rms(actual, expected) > 1e-3, name


ONES = torch.ones(1, 2, 3)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must be a torch.Tensor, got list", lambda: functional.sampler_step([1.0], ONES, **AFFINE)),
        (
            TypeError,
            "x must have dtype .*, got torch.int64",
            lambda: functional.sampler_step(ONES.long(), ONES, **AFFINE),
        ),
        (
            TypeError,
            "cond must have the dtype of x, torch.float32, got torch.float64",
            lambda: functional.sampler_step(ONES, ONES.double(), **AFFINE),
        ),
        (
            ValueError,
            r"uncond must have the shape of x, \(1, 2, 3\), got \(1, 2\)",
            lambda: functional.sampler_step(ONES, ONES, ONES[..., 0], **AFFINE),
        ),
        (
            ValueError,
            "cond must be on the device of x, cpu, got meta",
            lambda: functional.sampler_step(ONES, ONES.to("meta"), **AFFINE),
        ),
        (
            ValueError,
            r"terms\[1\] must have the shape of x",
            lambda: functional.sampler_step(ONES, ONES, terms=[ONES, ONES[0]], scales=[1.0, 1.0], **AFFINE),
        ),
        (
            ValueError,
            "scales must have one number for each of the 1 terms, got 0",
            lambda: functional.sampler_step(ONES, ONES, terms=[ONES], **AFFINE),
        ),
        (
            TypeError,
            "out must have the dtype of x, torch.float32, got torch.float64",
            lambda: functional.sampler_step(ONES, ONES, out=ONES.double(), **AFFINE),
        ),
        (
            ValueError,
            "out must have memory of its own, got a tensor whose elements share",
            lambda: functional.sampler_step(ONES, ONES, out=torch.ones(1, 1, 3).expand(1, 2, 3), **AFFINE),
        ),
        (
            RuntimeError,
            "out must be None where gradients are recorded",
            lambda: functional.sampler_step(ONES.clone().requires_grad_(), ONES, out=ONES.clone(), **AFFINE),
        ),
    ],
)
def test_errors(error: type[Exception], message: str, call: Any) -> None:
    with pytest.raises(error, match=message):
        call()


def test_overlap_is_refused() -> None:
    buffer = torch.randn(5, 4)
    with pytest.raises(ValueError, match="out must be the same view as an input, or other memory"):
        functional.sampler_step(buffer[:4], buffer[:4], out=buffer[1:], **AFFINE)
    functional.sampler_step(buffer[:2], buffer[:2], out=buffer[3:], **AFFINE)


def test_names() -> None:
    assert set(backend.OPS) == {"sampler_step", "shortcut_backward"}
    assert ops.NAMESPACE == "sdo_fast"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("numbers", [AFFINE, CLIPPED], ids=["affine", "clipped"])
@pytest.mark.parametrize("size", [(64, 64), (9, 11)])
def test_cuda_matches_reference(dtype: torch.dtype, layout: str, numbers: Any, size: tuple[int, int]) -> None:
    inputs = away_from_bounds(tensors(4, dtype, 2, 4, *size), True, **numbers)
    arguments = [LAYOUTS[layout](t.detach().cuda()).requires_grad_() for t in inputs]
    call = flat(True, 1, **numbers)
    with sdo_fast.use_backend("cuda"):
        assert_matches(
            lambda *args: call(functional.sampler_step, *args),
            lambda *args: call(reference.sampler_step, *args),
            arguments,
        )


@pytest.mark.gpu
def test_cuda_graphs_record_the_step() -> None:
    x, cond, uncond = (t.detach().cuda() for t in tensors(3))
    out, graph = torch.empty_like(x), torch.cuda.CUDAGraph()
    with sdo_fast.use_backend("cuda"):
        functional.sampler_step(x, cond, uncond, 2.0, **AFFINE, out=out)
        with torch.cuda.graph(graph):
            functional.sampler_step(x, cond, uncond, 2.0, **AFFINE, out=out)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_close(out, reference.sampler_step(x.double(), cond.double(), uncond.double(), 2.0, **AFFINE))


# schedulers -----------------------------------------------------------------------------------------------------------


def ddim_step(scheduler: Any, t: Tensor, clipped_output: bool, x: Tensor, eps: Tensor) -> Tensor:
    return scheduler.step(eps, t, x, use_clipped_model_output=clipped_output).prev_sample


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("clipped_output", [False, True])
def test_ddim_is_one_call(each_backend: str, prediction: str, clip: float | None, clipped_output: bool) -> None:
    """The numbers of the docstring's table, against diffusers: value and gradients."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(prediction_type=prediction, clip_sample=clip is not None)
    scheduler.set_timesteps(10)
    x, eps = tensors(2, torch.float64)
    for i, t in enumerate(scheduler.timesteps):
        following = scheduler.timesteps[i + 1] if i + 1 < len(scheduler.timesteps) else None
        bar = scheduler.alphas_cumprod[t].double()
        later = (
            scheduler.final_alpha_cumprod.double()
            if following is None
            else scheduler.alphas_cumprod[following].double()
        )
        alpha, sigma = bar.sqrt().item(), (1 - bar).sqrt().item()
        alpha2, sigma2 = later.sqrt().item(), (1 - later).sqrt().item()
        noise_x, noise_eps = (0.0, 1.0) if prediction == "epsilon" else (sigma, alpha)
        pred_x, pred_eps = (1 / alpha, -sigma / alpha) if prediction == "epsilon" else (alpha, -sigma)
        if clipped_output:
            noise_x, noise_eps, alpha2 = 1 / sigma, 0.0, alpha2 - alpha * sigma2 / sigma
        numbers = {"a": sigma2 * noise_x, "b": sigma2 * noise_eps}
        if clip is None:
            numbers = {"a": numbers["a"] + alpha2 * pred_x, "b": numbers["b"] + alpha2 * pred_eps}
        else:
            numbers |= {"c": alpha2, "pred_x": pred_x, "pred_eps": pred_eps, "clip": clip}
        ours = partial(functional.sampler_step, **numbers)
        theirs = partial(ddim_step, scheduler, t, clipped_output)
        actual, expected = value_and_grads(ours, (x, eps)), value_and_grads(theirs, (x, eps))
        for a, e in zip((actual[0], *actual[1]), (expected[0], *expected[1]), strict=True):
            assert rel_rms(a, e) < 2e-6


@pytest.mark.parametrize("numbers", [AFFINE, CLIPPED], ids=["affine", "clipped"])
def test_forward_mode_and_transforms(each_backend: str, numbers: Any) -> None:
    x, cond, uncond, term = (t.detach() for t in tensors(4, torch.float64))
    tangents = [torch.randn_like(x) for _ in range(4)]

    def step(*t: Tensor) -> Tensor:
        return functional.sampler_step(*t[:3], 3.5, terms=[t[3]], scales=[0.5], **numbers)

    def expected(*t: Tensor) -> Tensor:
        return reference.sampler_step(*t[:3], 3.5, terms=[t[3]], scales=[0.5], **numbers)

    inputs = (x, cond, uncond, term)
    wanted = torch.func.jvp(expected, inputs, tuple(tangents))
    assert_close(torch.func.jvp(step, inputs, tuple(tangents)), wanted)
    with forward_ad.dual_level():
        y = step(*(forward_ad.make_dual(t, tangent) for t, tangent in zip(inputs, tangents, strict=True)))
        assert_close(forward_ad.unpack_dual(y).tangent, wanted[1])
        with pytest.raises(RuntimeError, match="out must be None in forward mode"):
            functional.sampler_step(x, cond, out=torch.empty_like(x), **numbers)
    grads = torch.func.grad(lambda *t: step(*t).square().sum(), argnums=(0, 1, 2, 3))(*inputs)
    assert_close(grads, torch.func.grad(lambda *t: expected(*t).square().sum(), argnums=(0, 1, 2, 3))(*inputs))
    halves = functional.shortcut_backward(x, 2.0, -3.0, 1.5)
    with forward_ad.dual_level():
        dual = functional.shortcut_backward(forward_ad.make_dual(x, tangents[0]), 2.0, -3.0, 1.5)
        parts = [forward_ad.unpack_dual(t) for t in dual]
        assert_close([p.primal for p in parts], list(halves))
        assert_close([p.tangent for p in parts], list(functional.shortcut_backward(tangents[0], 2.0, -3.0, 1.5)))
