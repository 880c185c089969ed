"""SamplerConfig, the stepper chosen once, and what neither building a sampler nor asking it may change."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import rel_rms
from sdo_models import ConvModel

import sdo_fast
from sdo_fast import SamplerConfig, ShortcutSampler, TrajectoryCache, coefficients, invert
from sdo_fast.model import GuidedModel
from sdo_fast.solver import Solver

diffusers = pytest.importorskip("diffusers")


def ddim(**config: Any) -> Any:
    return diffusers.DDIMScheduler(**{"clip_sample": False, **config})


# options --------------------------------------------------------------------------------------------------------------


def test_the_constructor_shows_every_option_of_the_config() -> None:
    shown = list(inspect.signature(ShortcutSampler).parameters.values())
    assert [p.name for p in shown[:2]] == ["model", "scheduler"]
    assert shown[2:] == list(inspect.signature(SamplerConfig).parameters.values())
    with pytest.raises(TypeError, match="steps"):
        ShortcutSampler(ConvModel(), ddim(), steps=3)


def test_options_are_read_from_the_config_alone() -> None:
    sampler = ShortcutSampler(ConvModel(), ddim(), 6, 2, "last", 2.0, False, inference_mode=True)
    options = {option.name for option in dataclasses.fields(SamplerConfig)}
    assert not options & vars(sampler).keys()
    assert all(getattr(sampler, name) is getattr(sampler.config, name) for name in options)
    assert (sampler.num_inference_steps, sampler.start, sampler.path) == (6, 2, "last")
    for name in options - {"guidance_scale"}:
        with pytest.raises(AttributeError):
            setattr(sampler, name, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sampler.config.start = 0  # type: ignore[misc]


def test_guidance_may_change_and_is_checked() -> None:
    sampler = ShortcutSampler(ConvModel(), ddim(), 4, guidance_scale=2.0)
    x, cond, uncond = (torch.randn(1, *shape) for shape in ((3, 4, 4), (5,), (5,)))
    call = {"model_kwargs": {"cond": cond}, "uncond_kwargs": {"cond": uncond}}
    sampler.guidance_scale = 3.0
    expected = ShortcutSampler(sampler.model, ddim(), 4, guidance_scale=3.0)(x, **call)
    assert torch.equal(sampler(x, **call), expected)
    with pytest.raises(ValueError, match="guidance_scale must be a finite number, got nan"):
        sampler.guidance_scale = float("nan")
    with pytest.raises(TypeError, match=r"guidance_scale must have dtype float32, .*, got torch.int64"):
        sampler.guidance_scale = torch.tensor(3)
    assert sampler.guidance_scale == 3.0


def test_with_options_is_a_new_sampler() -> None:
    model, x = ConvModel(), torch.randn(1, 3, 4, 4)
    sampler = ShortcutSampler(model, ddim(), 5, path="last", step_kwargs={"eta": 0.0})
    other = sampler.with_options(fused=False, checkpoint=False)
    assert dataclasses.replace(sampler.config, fused=False, checkpoint=False).__dict__ == other.config.__dict__
    assert (sampler.fused, other.fused, other.model) == (True, False, model)
    sampler(x)
    assert (sampler.model_calls, other.model_calls) == (5, 0)
    assert torch.equal(other(x), ShortcutSampler(model, ddim(), 5, fused=False)(x))
    reusing = ShortcutSampler(model, ddim(), 5, reuse=TrajectoryCache())
    assert reusing.with_steps(3).reuse is None
    assert reusing.reuse is not None


# the stepper ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_why_not_depends_on_nothing_that_was_called(fused: bool) -> None:
    """PNDM from step 0 needs too long a history for `sampler_step`, its last steps do not."""
    sampler = ShortcutSampler(ConvModel(), diffusers.PNDMScheduler(), 5, 13, fused=fused)
    x = torch.randn(1, 3, 4, 4)
    before, attributes = sampler.why_not(), dict(vars(sampler))
    assert before == ("sampler_step runs" if fused else "the scheduler runs (fused=False was asked for)")
    assert "earlier steps" in ShortcutSampler(ConvModel(), diffusers.PNDMScheduler(), 5).why_not()
    sampler.warm_up(x)
    sampler(x)
    sampler.with_options(start=0)
    assert sampler.why_not() == before
    changed = {name for name, value in vars(sampler).items() if value is not attributes[name]}
    assert changed == {"model_calls", "drawn"}


def test_inversion_leaves_why_not_alone() -> None:
    sampler = ShortcutSampler(ConvModel(scale=0.1), ddim(), 5, fused=False)
    sampler.config = dataclasses.replace(sampler.config, fused=True)
    invert(sampler, torch.randn(1, 3, 4, 4), 2)
    assert sampler.why_not() == "the scheduler runs (fused=False was asked for)"


def test_the_reference_knows_no_kernel() -> None:
    """Nor do the parts that its loops share with the sampler."""
    folder = Path(sdo_fast.__file__).parent
    shared = {"arguments", "model", "noise", "paths", "schedulers", "solver"}
    for file in [*(folder / "reference").glob("*.py"), *(folder / f"{name}.py" for name in shared)]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == (2 if file.parent.name == "reference" else 1):
                assert node.module in shared, f"{file.name} imports {node.module}"


# random numbers -------------------------------------------------------------------------------------------------------


class Watched(diffusers.DDIMScheduler):  # type: ignore[misc]
    """Draws from torch's global generator, by several functions, and sees whether that one is as it was."""

    def step(self, output: Any, t: Any, x: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        noise = torch.randn(x.shape, dtype=x.dtype) + torch.rand_like(x) + torch.empty_like(x).normal_()
        noise = noise * torch.randint(3, (1,)) + torch.bernoulli(torch.full_like(x, 0.5))
        assert torch.equal(torch.get_rng_state(), state)
        return SimpleNamespace(prev_sample=super().step(output, t, x, **kwargs).prev_sample + 0.1 * noise)


SCHEDULERS = {
    "ddim": (ddim, {}),
    "ddim clipped": (diffusers.DDIMScheduler, {}),
    "ddim eta": (ddim, {"eta": 1.0}),
    "ddpm learned": (lambda: diffusers.DDPMScheduler(variance_type="learned_range"), {}),
    "euler ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
    "global": (lambda: Watched(clip_sample=False), {}),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_no_global_generator_is_touched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, step_kwargs = SCHEDULERS[name]

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a global generator was touched")

    for module, function in (
        (torch, "manual_seed"),
        (torch, "set_rng_state"),
        (torch, "seed"),
        (torch.random, "manual_seed"),
        (torch.random, "fork_rng"),
        (torch.cuda, "manual_seed"),
        (torch.cuda, "manual_seed_all"),
    ):
        monkeypatch.setattr(module, function, refuse)
    state = torch.get_rng_state()
    for options in ({}, {"normalize": True}, {"cuda_graph": True}, {"reuse": TrajectoryCache()}, {"start": 4}):
        try:
            ShortcutSampler(torch.mul, make(), 5, step_kwargs=step_kwargs, **options)
        except ValueError:
            assert options
    if name not in ("ddim clipped", "ddpm learned"):
        coefficients(make(), 5, step_kwargs=step_kwargs)
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_of_other_steps_is_found_from_a_late_start() -> None:
    """DDPM draws nothing at its last step."""
    late = Solver(diffusers.DDPMScheduler(clip_sample=False), 5, 4)
    assert late.noise_sources == set()
    assert late.starting_at(0).noise_sources == {"given"}
    assert Solver(ddim(), 5).noise_sources == set()
    assert Solver(Watched(clip_sample=False), 5).noise_sources == {"global"}


def test_a_random_function_without_a_generator_is_refused() -> None:
    class Dropping(diffusers.DDIMScheduler):  # type: ignore[misc]
        def step(self, output: Any, t: Any, x: Any, **kwargs: Any) -> Any:
            return (torch.native_dropout(super().step(output, t, x, **kwargs).prev_sample, 0.5, True)[0],)

    with pytest.raises(ValueError, match="scheduler must draw its noise by functions that take a generator, got aten"):
        coefficients(Dropping(clip_sample=False), 3)


# guidance by a tensor -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tensor_s_guidance_is_combined_in_float32(dtype: torch.dtype) -> None:
    """Rounded once: neither w nor cond - uncond nor their product lose bits before. A step then takes it as it is."""
    uncond = torch.randn(2, 3, 16, 16).to(dtype)
    cond = (uncond + 0.1 * torch.randn(2, 3, 16, 16)).to(dtype)
    x, w = torch.randn(2, 3, 16, 16).to(dtype), torch.tensor([7.313, 3.171]).reshape(2, 1, 1, 1).requires_grad_()
    both = lambda x, t: torch.cat([uncond, cond])  # noqa: E731
    combined = GuidedModel(both, 2, w, {}, {})(x, torch.tensor(1))
    exact = uncond.double() + w.double() * (cond.double() - uncond.double())
    rounded = exact.to(dtype)
    assert combined.dtype == dtype
    assert (combined != rounded).double().mean() < 1e-3  # ties of a float32 result
    (grad,) = torch.autograd.grad(combined.sum(), w)
    expected = (cond.double() - uncond.double()).sum((1, 2, 3), keepdim=True)
    assert grad.dtype == torch.float32
    assert rel_rms(grad, expected) <= 5e-6
    for fused in (True, False):
        ours = ShortcutSampler(both, ddim(), 1, guidance_scale=w, fused=fused)(x, {}, {})
        theirs = ShortcutSampler(lambda x, t: rounded, ddim(), 1, fused=fused)(x)
        assert (ours != theirs).double().mean() < 1e-3
