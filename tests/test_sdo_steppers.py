"""The recurrences of every affine scheduler, and ShortcutSampler(fused=True), against the scheduler's own pass."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers import rel_rms
from sdo_models import ConvModel, gradients
from torch import Tensor

from sdo_fast import ShortcutSampler, TrajectoryCache, ops, recurrences
from sdo_fast.solver import Solver
from sdo_fast.steppers import FusedStepper, SchedulerStepper

diffusers = pytest.importorskip("diffusers")

# The scheduler, and how many earlier steps its recurrence reads.
AFFINE = {
    "ddim": (diffusers.DDIMScheduler, {"clip_sample": False}, 0),
    "ddim v": (diffusers.DDIMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}, 0),
    "euler": (diffusers.EulerDiscreteScheduler, {}, 0),
    "euler v": (diffusers.EulerDiscreteScheduler, {"prediction_type": "v_prediction"}, 0),
    "flow": (diffusers.FlowMatchEulerDiscreteScheduler, {}, 0),
    "edm": (diffusers.EDMEulerScheduler, {}, 0),
    "dpm++ 2m": (diffusers.DPMSolverMultistepScheduler, {}, 1),
    "dpm++ 3m": (diffusers.DPMSolverMultistepScheduler, {"solver_order": 3}, 2),
    "dpm single": (diffusers.DPMSolverSinglestepScheduler, {}, 1),
    "deis": (diffusers.DEISMultistepScheduler, {}, 1),
    "heun": (diffusers.HeunDiscreteScheduler, {}, 1),
    "flow heun": (diffusers.FlowMatchHeunDiscreteScheduler, {}, 1),
    "kdpm2": (diffusers.KDPM2DiscreteScheduler, {}, 1),
    "unipc": (diffusers.UniPCMultistepScheduler, {}, 2),
    "unipc 3": (diffusers.UniPCMultistepScheduler, {"solver_order": 3}, 3),
    "lms": (diffusers.LMSDiscreteScheduler, {}, 3),
    "plms": (diffusers.PNDMScheduler, {"skip_prk_steps": True}, 3),
}
CLIPPED = {
    "ddim clipped": (diffusers.DDIMScheduler, {}, 0),
    "ddim clipped, v": (diffusers.DDIMScheduler, {"prediction_type": "v_prediction"}, 0),
    "ddim clipped, trailing": (diffusers.DDIMScheduler, {"timestep_spacing": "trailing", "clip_sample_range": 0.4}, 0),
    "ddim parallel": (diffusers.DDIMParallelScheduler, {}, 0),
}
# The scheduler, and the keyword arguments of its steps.
STOCHASTIC = {
    "ddim eta": (diffusers.DDIMScheduler, {"clip_sample": False}, {"eta": 0.7}),
    "ddim eta clipped": (diffusers.DDIMScheduler, {}, {"eta": 1.0}),
    "ddim eta clipped output": (diffusers.DDIMScheduler, {}, {"eta": 0.7, "use_clipped_model_output": True}),
    "ddpm": (diffusers.DDPMScheduler, {"clip_sample": False}, {}),
    "ddpm clipped": (diffusers.DDPMScheduler, {}, {}),
    "ddpm v": (diffusers.DDPMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}, {}),
    "euler churn": (diffusers.EulerDiscreteScheduler, {}, {"s_churn": 1.0}),
    "euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}, {}),
    "sde-dpm++": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "sde-dpm++ singlestep": (diffusers.DPMSolverSinglestepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "edm churn": (diffusers.EDMEulerScheduler, {}, {"s_churn": 1.0}),
    "edm sde-dpm++": (diffusers.EDMDPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "flow stochastic": (diffusers.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, {}),
    "flow heun churn": (diffusers.FlowMatchHeunDiscreteScheduler, {}, {"s_churn": 1.0}),
    "kdpm2 ancestral": (diffusers.KDPM2AncestralDiscreteScheduler, {}, {}),
    "lcm": (diffusers.LCMScheduler, {"clip_sample": False}, {}),
    "lcm clipped": (diffusers.LCMScheduler, {"clip_sample": True}, {}),
    "tcd": (diffusers.TCDScheduler, {"clip_sample": False}, {"eta": 0.4}),
    "sa": (diffusers.SASolverScheduler, {}, {}),
}
OTHERS = {
    "ddim thresholding": (diffusers.DDIMScheduler, {"thresholding": True, "clip_sample": False}, "thresholds"),
    "ddpm learned": (diffusers.DDPMScheduler, {"variance_type": "learned_range", "clip_sample": False}, "learned"),
    "pndm": (diffusers.PNDMScheduler, {}, "more than 3 earlier steps"),
}


def scheduler(name: str) -> Any:
    kind, config, _ = {**AFFINE, **CLIPPED, **STOCHASTIC, **OTHERS}[name]
    return kind(**config)


@pytest.mark.parametrize("name", [*AFFINE, *CLIPPED])
def test_recurrences_equal_the_scheduler(name: str) -> None:
    plain = Solver(scheduler(name), 8)
    fused = FusedStepper(plain)
    assert fused.depth == {**AFFINE, **CLIPPED}[name][2]
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64) * float(getattr(plain.scheduler, "init_noise_sigma", 1.0))
    passes = (SchedulerStepper(plain).begin(), fused.begin())
    states = [x, x]
    for i in plain.steps:
        inputs = [stepper.scale_input(state, i) for stepper, state in zip(passes, states, strict=True)]
        assert rel_rms(inputs[1], inputs[0]) <= 1e-6
        output = torch.randn_like(x)
        states = [stepper.step((output,), None, i, state) for stepper, state in zip(passes, states, strict=True)]
        assert rel_rms(states[1], states[0]) <= 1e-6, i


@pytest.mark.parametrize("start", [0, 2])
@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", AFFINE)
def test_sampler_agrees_with_the_scheduler(name: str, late: bool, guidance: float | None, start: int) -> None:
    """Value and gradients of latents, condition and parameters, in float64."""
    model = ConvModel(scale=0.15).double()
    x, cond, uncond = (torch.randn(2, *s, dtype=torch.float64, requires_grad=True) for s in ((3, 6, 5), (5,), (5,)))
    inputs = [x, cond, *model.parameters(), *([uncond] if guidance else [])]
    results = []
    for fused in (False, True):
        step: Any = start + 1 + 2 * late if late or name == "kdpm2" else "first"  # its first stages do not reach x_0
        sampler = ShortcutSampler(model, scheduler(name), 6, start, step, guidance_scale=guidance, fused=fused)
        assert sampler.why_not() == ("sampler_step runs" if fused else "the scheduler runs (fused=False was asked for)")
        image = sampler(x, {"cond": cond}, {"cond": uncond} if guidance else None)
        results.append((image, *gradients(image, *inputs)))
    # Some schedulers round their state to float32 at every step, and a steep model would amplify that.
    limit = 1e-9 if recurrences._tolerance(Solver(scheduler(name), 6)) == recurrences.TOLERANCE else 5e-6
    for theirs, ours in zip(*results, strict=True):
        assert rel_rms(ours, theirs) <= limit


@pytest.mark.parametrize("clipped_output", [False, True])
@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("path", ["first", 3, "last", "identity"])
@pytest.mark.parametrize("name", CLIPPED)
def test_clipping_agrees_with_autograd_through_the_scheduler(
    name: str, path: str | int, guidance: float | None, clipped_output: bool
) -> None:
    """Value and gradients in float64, where some elements are clipped at every step and others at none."""
    model = ConvModel().double()
    x, cond, uncond = (torch.randn(2, *s, dtype=torch.float64, requires_grad=True) for s in ((3, 6, 5), (5,), (5,)))
    inputs = [x] if path == "identity" else [x, cond, *model.parameters(), *([uncond] if guidance else [])]
    results, means = [], []
    settings = {"guidance_scale": guidance, "step_kwargs": {"use_clipped_model_output": clipped_output}}
    for fused in (False, True):
        sampler = ShortcutSampler(model, scheduler(name), 6, 1, path, fused=fused, **settings)
        assert sampler.why_not() == ("sampler_step runs" if fused else "the scheduler runs (fused=False was asked for)")
        image = sampler(x, {"cond": cond}, {"cond": uncond} if guidance else None)
        results.append((image, *gradients(image, *inputs)))
    for theirs, ours in zip(*results, strict=True):
        assert rel_rms(ours, theirs) <= 1e-9
    rules = FusedStepper(Solver(scheduler(name), 6, step_kwargs=settings["step_kwargs"])).recurrences.values()
    for rule in rules:
        predicted = rule.pred_x * x + rule.pred_eps * model(x, torch.tensor([10, 10]), cond)
        means.append((predicted.abs() > rule.clip).double().mean().item())
    assert all(rule.clip == scheduler(name).config.clip_sample_range for rule in rules)
    assert max(means) > 0.3
    assert min(means) < 1


@pytest.mark.parametrize(("guidance", "seeded"), [(None, True), (3.0, False)])
@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_noise_is_drawn_as_the_scheduler_draws_it(name: str, start: int, guidance: float | None, seeded: bool) -> None:
    """Values and gradients in float64, and what is left of the generator, or of torch's global one."""
    model = ConvModel(scale=0.15).double()
    x, cond, uncond = (torch.randn(2, *s, dtype=torch.float64, requires_grad=True) for s in ((3, 6, 5), (5,), (5,)))
    inputs = [x, cond, *model.first.parameters(), *([uncond] if guidance else [])]
    step: Any = start + 1 if name == "kdpm2 ancestral" else "first"  # its first stages do not reach x_0
    arguments = {"cond": cond}, {"cond": uncond} if guidance else None
    results, others = [], []
    for fused in (False, True):
        sampler = ShortcutSampler(
            model, scheduler(name), 9, start, step, guidance, step_kwargs=STOCHASTIC[name][2], fused=fused
        )
        generators = [torch.Generator().manual_seed(seed) if seeded else None for seed in (3, 3, 4)]
        torch.manual_seed(5)
        image = sampler(x, *arguments, generators[0])
        states = torch.get_rng_state(), generators[0].get_state() if seeded else None
        torch.manual_seed(5)
        with torch.no_grad():
            assert rel_rms(sampler(x, *arguments, generators[1]), image) <= 1e-12
        results.append((image, *gradients(image, *inputs)))
        others.append((states, sampler(x, *arguments, generators[2])))
    assert sampler.why_not() == "sampler_step runs"
    for theirs, ours in zip(*results, strict=True):
        assert rel_rms(ours, theirs) <= 1e-6
    (their_states, _), (our_states, other) = others
    assert all(a is b or torch.equal(a, b) for a, b in zip(our_states, their_states, strict=True))
    assert rel_rms(other, results[1][0]) > 1e-3


@pytest.mark.parametrize("name", ["ddpm", "sde-dpm++", "flow stochastic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_noise_of_other_dtypes_and_layouts(name: str, dtype: torch.dtype) -> None:
    model = ConvModel(scale=0.15).to(dtype)
    x = torch.randn(2, 3, 6, 6, dtype=dtype).to(memory_format=torch.channels_last)
    theirs, ours = (
        ShortcutSampler(model, scheduler(name), 6, fused=fused)(x, generator=torch.Generator().manual_seed(1))
        for fused in (False, True)
    )
    assert ours.dtype == dtype
    assert ours.is_contiguous(memory_format=torch.channels_last)
    assert rel_rms(ours, theirs) <= {torch.float32: 5e-6, torch.float16: 6e-3, torch.bfloat16: 5e-2}[dtype]


def test_noise_from_a_generator_among_the_step_kwargs() -> None:
    model, x = ConvModel(), torch.randn(1, 3, 4, 4)
    of_call, of_step = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    expected = ShortcutSampler(model, scheduler("ddpm"), 4)(x, generator=of_call)
    sampler = ShortcutSampler(model, scheduler("ddpm"), 4, step_kwargs={"generator": of_step})
    assert torch.equal(of_step.get_state(), torch.Generator().manual_seed(1).get_state())
    assert torch.equal(sampler(x), expected)


NOISES = {
    "must draw its noise by torch.randn, got aten.rand": lambda x: torch.rand(x.shape, dtype=x.dtype),
    "adds to the result what it does not draw": lambda x: torch.from_numpy(
        np.random.default_rng().normal(size=x.shape)
    ),
    "must draw from the generator that it is given, got one of its own": lambda x: torch.randn(
        x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype
    ),
    r"must draw noise of its state's shape .*, got \[1\]": lambda x: torch.randn(1, dtype=x.dtype),
    "no more than 8 terms": lambda x: sum(torch.randn(x.shape, dtype=x.dtype) for _ in range(9)),
}


@pytest.mark.parametrize("reason", NOISES)
def test_noise_of_another_kind_runs_the_scheduler(reason: str) -> None:
    class Noisy(diffusers.DDIMScheduler):
        def step(self, output: Any, t: Any, x: Any, **kwargs: Any) -> Any:
            following = super().step(output, t, x, **kwargs).prev_sample
            return (following + 0.1 * NOISES[reason](x).to(x.dtype),)

    x = torch.randn(1, 3, 5, 5)
    sampler = ShortcutSampler(ConvModel(), Noisy(), 4)
    assert re.search(reason, sampler.why_not())
    assert sampler(x).isfinite().all()


def test_clipping_of_another_kind_runs_the_scheduler() -> None:
    """A flag alone proves nothing: what the step does is measured."""

    class Squashing(diffusers.DDIMScheduler):
        def step(self, output: Any, t: Any, x: Any, **kwargs: Any) -> Any:
            return (super().step(output, t, x, **kwargs).prev_sample.tanh(),)

    sampler = ShortcutSampler(ConvModel(), Squashing(), 5)
    assert "more than to clip" in sampler.why_not()
    x = torch.randn(1, 3, 5, 5)
    assert torch.equal(sampler(x), ShortcutSampler(ConvModel(), Squashing(), 5, fused=False)(x))


@pytest.mark.parametrize("name", OTHERS)
def test_others_run_the_scheduler(name: str) -> None:
    model = ConvModel(out_channels=6 if "learned" in name else 3)
    x, results = torch.randn(2, 3, 6, 6), []
    for fused in (False, True):
        sampler = ShortcutSampler(model, scheduler(name), 5, fused=fused)
        results.append(sampler(x, generator=torch.Generator().manual_seed(0)))
    assert OTHERS[name][2] in sampler.why_not()
    assert torch.equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    model, x = ConvModel().to(dtype), torch.randn(2, 3, 6, 6, dtype=dtype, requires_grad=True)
    image = ShortcutSampler(model, scheduler("unipc"), 5, start=2, normalize=True, fused=True)(x)
    assert image.dtype == dtype
    double = x.detach().double().requires_grad_()
    exact = ShortcutSampler(copy.deepcopy(model).double(), scheduler("unipc"), 5, start=2, normalize=True)(double)
    tolerance = {torch.float32: 5e-6, torch.bfloat16: 5e-2, torch.float16: 6e-3}[dtype]
    assert rel_rms(image, exact) <= tolerance
    assert rel_rms(gradients(image, x)[0], gradients(exact, double)[0]) <= tolerance


def test_one_call_per_step_and_no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = ShortcutSampler(ConvModel(), scheduler("ddim"), 7, guidance_scale=2.0, fused=True)
    calls: list[int] = []
    step_kernel = ops.step_kernel

    def counted(x: Tensor) -> Any:
        kernel = step_kernel(x)
        return lambda *args: calls.append(1) or kernel(*args)

    monkeypatch.setattr(ops, "step_kernel", counted)
    monkeypatch.setattr(type(sampler.solver.scheduler), "step", None)
    sampler(torch.randn(1, 3, 4, 4), {}, {})
    assert len(calls) == 7


def test_caller_s_latents_are_left_alone_and_passes_are_independent() -> None:
    sampler = ShortcutSampler(ConvModel(), scheduler("unipc"), 5, fused=True)
    x = torch.randn(1, 3, 4, 4)
    before = x.clone()
    first = sampler(x)
    assert torch.equal(x, before)
    sampler(torch.randn(1, 3, 4, 4))
    assert torch.equal(sampler(x), first)


@pytest.mark.parametrize("name", ["ddim", "dpm++ 2m", "unipc"])
@pytest.mark.parametrize("keep", [lambda x: x, lambda x: x[:, 1:], lambda x: x.detach(), lambda x: None])
def test_states_that_somebody_keeps_are_not_overwritten(name: str, keep: Any) -> None:
    """Plain sampling writes new states over old ones, but only over those that nobody holds."""
    inner, seen, kept, addresses = ConvModel(), [], [], set()

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x.clone())
        kept.append(keep(x))
        addresses.add(x.data_ptr())
        return inner(x, t)

    sampler = ShortcutSampler(model, scheduler(name), 12, fused=True)
    with torch.no_grad():
        sampler(torch.randn(1, 3, 40, 40))
    if kept[0] is None:
        assert len(addresses) == AFFINE[name][2] + 2
    else:
        assert all(torch.equal(keep(x), y) for x, y in zip(seen, kept, strict=True))


def test_with_reuse_normalize_and_warm_up() -> None:
    model, x = ConvModel(), torch.randn(1, 3, 4, 4, requires_grad=True)
    plain, fused = (
        ShortcutSampler(model, scheduler("ddim"), 6, normalize=True, reuse=TrajectoryCache(), fused=f)
        for f in (False, True)
    )
    for _ in range(3):
        images = plain(x), fused(x)
        assert rel_rms(images[1], images[0]) <= 1e-5
        assert rel_rms(gradients(images[1], x)[0], gradients(images[0], x)[0]) <= 1e-5
    late = [ShortcutSampler(model, scheduler("ddim"), 6, start=3, fused=f) for f in (False, True)]
    torch.testing.assert_close(*(sampler.warm_up(x.detach()) for sampler in late), rtol=1e-5, atol=1e-5)
    assert fused.with_steps(3).why_not() == "sampler_step runs"


def test_second_derivatives() -> None:
    model, x = ConvModel().double(), torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    results: list[Tensor] = []
    for fused in (False, True):
        image = ShortcutSampler(model, scheduler("dpm++ 2m"), 3, fused=fused)(x)
        (first,) = torch.autograd.grad(image.pow(2).sum(), x, create_graph=True)
        results += torch.autograd.grad(first.pow(2).sum(), x)
    assert rel_rms(results[1], results[0]) <= 1e-6


class SameMemory(ConvModel):
    """Returns the same memory at every call, as a CUDA graph or a TensorRT engine does."""

    outputs: Tensor | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        output = super().forward(*args, **kwargs)
        if self.outputs is None or self.outputs.shape != output.shape:
            self.outputs = torch.empty_like(output)
        return self.outputs.copy_(output)


@pytest.mark.parametrize("conditions", ["none", "joined", "two calls"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", AFFINE)
def test_models_that_return_the_same_memory(name: str, fused: bool, conditions: str) -> None:
    x, cond = torch.randn(2, 3, 6, 5), torch.randn(2, 5)
    call = {} if conditions == "none" else {"model_kwargs": {"cond": cond}}
    if conditions != "none":
        call["uncond_kwargs"] = {"cond": cond + 1} if conditions == "joined" else {}
    guidance = None if conditions == "none" else 3.0
    with torch.no_grad():
        ours, fresh = (
            ShortcutSampler(model, scheduler(name), 6, 0, "identity", guidance, fused=fused)(x, **call)
            for model in (SameMemory(), ConvModel())
        )
    assert torch.equal(ours, fresh)
