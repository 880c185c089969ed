"""Inversion against diffusers' DDIMInverseScheduler, and its round trip."""

from __future__ import annotations

import pytest
import torch
from sdo_models import ConvModel

from sdo_fast import NotAffineError, ShortcutSampler, invert
from sdo_fast.schedulers import step_coefficients
from sdo_fast.solver import Solver

diffusers = pytest.importorskip("diffusers")

SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "ddim offset": lambda: diffusers.DDIMScheduler(clip_sample=False, steps_offset=1, set_alpha_to_one=False),
    "ddim v": lambda: diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "ddim trailing": lambda: diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def by_diffusers(model, scheduler, x, steps):
    inverse = diffusers.DDIMInverseScheduler.from_config(scheduler.config)
    inverse.set_timesteps(10)
    with torch.no_grad():
        for t in inverse.timesteps[:steps]:
            x = inverse.step(model(x, t.expand(len(x))), t, x).prev_sample
    return x


@pytest.mark.parametrize("upto", [0, 4, 9])
@pytest.mark.parametrize("name", ["ddim", "ddim offset", "ddim trailing"])
def test_one_iteration_is_ddim_inversion(name, upto):
    scheduler, model, image = SCHEDULERS[name](), ConvModel(scale=0.15), torch.randn(2, 3, 6, 6)
    x = by_diffusers(model, scheduler, image, 10 - upto)
    ours = invert(ShortcutSampler(model, scheduler, 10), image, upto)
    torch.testing.assert_close(ours.latents, x, rtol=1e-4, atol=1e-4 * x.abs().max().item())
    back = ShortcutSampler(model, scheduler, 10, start=upto)(ours.latents)
    assert torch.equal(back, ours.reconstruction)
    assert ours.error == pytest.approx(((back - image).norm() / image.norm()).item(), rel=1e-5)


def test_v_prediction_comes_back_closer_than_by_diffusers():
    """There DDIMInverseScheduler reads v at the lower noise level; undoing the sampler's own step is closer."""
    scheduler, model, image = SCHEDULERS["ddim v"](), ConvModel(scale=0.15), torch.randn(2, 3, 6, 6)
    sampler = ShortcutSampler(model, scheduler, 10)
    theirs = sampler(by_diffusers(model, scheduler, image, 10)) - image
    assert invert(sampler, image, 0).error < 0.5 * (theirs.norm() / image.norm()).item()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_more_iterations_close_the_round_trip(name):
    model = ConvModel(scale=0.08).double()
    sampler = ShortcutSampler(model, SCHEDULERS[name](), 20)
    image = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    errors = [invert(sampler, image, 6, iterations=k).error for k in (1, 3, 12)]
    assert errors[0] < 0.2
    assert errors[1] < 0.5 * errors[0]
    assert errors[2] < 1e-3 * errors[0] + 3e-6


def test_guidance_and_arguments():
    model = ConvModel(scale=0.1)
    sampler = ShortcutSampler(model, SCHEDULERS["ddim"](), 10, guidance_scale=2.0, start=4)
    image, kwargs = torch.randn(1, 3, 4, 4), ({"cond": torch.ones(1, 5)}, {"cond": torch.zeros(1, 5)})
    inversion = invert(sampler, image, 4, *kwargs, iterations=5)
    assert torch.equal(sampler(inversion.latents, *kwargs), inversion.reconstruction)
    assert inversion.error < 0.05
    assert not inversion.latents.requires_grad
    assert sampler.model_calls == 2 * (6 * 5 + 6 + 6)


def test_errors():
    model, image = ConvModel(), torch.randn(1, 3, 4, 4)
    sampler = ShortcutSampler(model, SCHEDULERS["ddim"](), 10)
    for upto in (-1, 10, 2.0):
        with pytest.raises(ValueError, match="upto"):
            invert(sampler, image, upto)
    with pytest.raises(ValueError, match="iterations"):
        invert(sampler, image, 3, iterations=0)
    for scheduler, error, match in (
        (diffusers.DDIMScheduler(), NotAffineError, "clip_sample"),
        (diffusers.DPMSolverMultistepScheduler(), NotAffineError, "history"),
        (diffusers.DDPMScheduler(clip_sample=False), ValueError, "noise"),
    ):
        with pytest.raises(error, match=match):
            invert(ShortcutSampler(model, scheduler, 10), image, 3)
    sample = diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample")
    with pytest.raises(ValueError, match="cannot be undone"):
        invert(ShortcutSampler(model, sample, 10, path="last"), image, 3)


def test_step_coefficients_run_the_scheduler():
    for make in SCHEDULERS.values():
        solver = Solver(make(), 10, 2)
        a, b = step_coefficients(solver)
        assert a[:2].isnan().all()
        run, x = solver.begin(), torch.randn(1, 2, 3, 3, dtype=torch.float64)
        for i in solver.steps:
            output = torch.randn_like(x)
            run.scale_input(x, i)
            following = run.step(output, i, x)
            torch.testing.assert_close(following, a[i] * x + b[i] * output, rtol=1e-5, atol=1e-5)
            x = following
    with pytest.raises(NotAffineError, match="history"):
        step_coefficients(Solver(diffusers.HeunDiscreteScheduler(), 5))
