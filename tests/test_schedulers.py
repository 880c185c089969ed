"""The affine coefficients of every diffusers scheduler, against finite differences of plain scheduler loops."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch

from sdo_fast import NotAffineError, coefficients

diffusers = pytest.importorskip("diffusers")
D = diffusers

AFFINE = {
    "ddim": (D.DDIMScheduler, {"clip_sample": False}, {}),
    "ddim v": (D.DDIMScheduler, {"clip_sample": False, "prediction_type": "v_prediction"}, {}),
    "ddim sample": (D.DDIMScheduler, {"clip_sample": False, "prediction_type": "sample"}, {}),
    "ddim eta": (D.DDIMScheduler, {"clip_sample": False}, {"eta": 0.7}),
    "ddpm": (D.DDPMScheduler, {"clip_sample": False}, {}),
    "euler": (D.EulerDiscreteScheduler, {}, {}),
    "euler v": (D.EulerDiscreteScheduler, {"prediction_type": "v_prediction"}, {}),
    "euler churn": (D.EulerDiscreteScheduler, {}, {"s_churn": 1.0}),
    "euler ancestral": (D.EulerAncestralDiscreteScheduler, {}, {}),
    "dpm++ 2m": (D.DPMSolverMultistepScheduler, {}, {}),
    "dpm++ 2m karras": (D.DPMSolverMultistepScheduler, {"use_karras_sigmas": True}, {}),
    "dpm++ 2m sde": (D.DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}, {}),
    "dpm++ 3m": (D.DPMSolverMultistepScheduler, {"solver_order": 3}, {}),
    "dpm++ 2s": (D.DPMSolverSinglestepScheduler, {}, {}),
    "unipc": (D.UniPCMultistepScheduler, {}, {}),
    "deis": (D.DEISMultistepScheduler, {}, {}),
    "lms": (D.LMSDiscreteScheduler, {}, {}),
    "pndm": (D.PNDMScheduler, {}, {}),
    "pndm skip prk": (D.PNDMScheduler, {"skip_prk_steps": True}, {}),
    "ipndm": (D.IPNDMScheduler, {}, {}),
    "lcm": (D.LCMScheduler, {"clip_sample": False}, {}),
    "tcd": (D.TCDScheduler, {"clip_sample": False}, {}),
    "sa": (D.SASolverScheduler, {}, {}),
    "flow euler": (D.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {}),
    "flow euler stochastic": (D.FlowMatchEulerDiscreteScheduler, {"stochastic_sampling": True}, {}),
    "heun": (D.HeunDiscreteScheduler, {}, {}),
    "flow heun": (D.FlowMatchHeunDiscreteScheduler, {}, {}),
    "edm euler": (D.EDMEulerScheduler, {}, {}),
    "edm dpm++": (D.EDMDPMSolverMultistepScheduler, {}, {}),
    "kdpm2": (D.KDPM2DiscreteScheduler, {}, {}),
    "kdpm2 ancestral": (D.KDPM2AncestralDiscreteScheduler, {}, {}),
}


def loop(scheduler, n, x, outputs, step_kwargs, start=0):
    """x_0 and every step's input, by diffusers alone, with frozen model outputs and fixed noise."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(n)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    if "generator" in inspect.signature(scheduler.step).parameters:
        step_kwargs = {**step_kwargs, "generator": torch.Generator().manual_seed(1)}
    inputs = []
    torch.manual_seed(1)
    for i in range(start, len(scheduler.timesteps)):
        t = scheduler.timesteps[i]
        x = x + 0
        if x.requires_grad:
            x.retain_grad()
        inputs.append(x)
        if hasattr(scheduler, "scale_model_input"):
            scheduler.scale_model_input(x, t)
        x = scheduler.step(outputs[i], t, x, **step_kwargs).prev_sample
    return x, inputs


@pytest.mark.parametrize("n", [4, 10, 50])
@pytest.mark.parametrize("name", AFFINE)
def test_coefficients(name, n):
    cls, config, step_kwargs = AFFINE[name]
    scheduler = cls(**config)
    a, b = coefficients(scheduler, n, step_kwargs=step_kwargs)
    assert a.dtype == b.dtype == torch.float64
    scheduler.set_timesteps(n)
    steps = len(scheduler.timesteps)
    assert a.shape == b.shape == (steps,)

    x = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    outputs = torch.randn(steps, 1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    x0, inputs = loop(scheduler, n, x, outputs, step_kwargs)
    x0.sum().backward()

    def expand(c):
        return c.reshape(-1, 1, 1, 1, 1).expand(outputs.shape)

    floor = 1e-6 * max(a.abs().max().item(), b.abs().max().item())
    by_autograd = torch.stack([torch.zeros_like(x) if y.grad is None else y.grad for y in inputs])
    torch.testing.assert_close(by_autograd, expand(a), rtol=1e-6, atol=1e-3 * floor)
    torch.testing.assert_close(outputs.grad, expand(b), rtol=1e-6, atol=1e-3 * floor)

    with torch.no_grad():  # an affine function moves by exactly its coefficients, however far
        dx, d = 10 * torch.randn_like(x), 10 * torch.randn_like(outputs)
        moved, _ = loop(scheduler, n, x + dx, outputs + d, step_kwargs)
        predicted = x0 + a[0] * dx + (expand(b) * d).sum(0)
        scale = (a[0] * dx).abs().max() + (expand(b) * d).abs().max()
        assert (moved - predicted).abs().max() <= 2e-6 * scale


@pytest.mark.parametrize("name", ["ddim", "dpm++ 2m", "unipc", "heun", "flow euler", "euler ancestral"])
def test_coefficients_of_a_late_start(name):
    """Multistep schedulers begin without history, so this is not the tail of the whole schedule's coefficients."""
    cls, config, step_kwargs = AFFINE[name]
    scheduler = cls(**config)
    a, b = coefficients(scheduler, 10, start=4, step_kwargs=step_kwargs)
    assert a[:4].isnan().all()
    assert b[:4].isnan().all()
    x = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    outputs = torch.randn(len(a), 1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    x0, inputs = loop(scheduler, 10, x, outputs, step_kwargs, start=4)
    x0.sum().backward()
    torch.testing.assert_close(inputs[0].grad, a[4].expand_as(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(outputs.grad[4:, 0, 0, 0, 0], b[4:], rtol=1e-6, atol=1e-9)
    from_the_start = coefficients(scheduler, 10, step_kwargs=step_kwargs)[1][4]
    assert torch.isclose(b[4], from_the_start, rtol=1e-3) == (name not in ("dpm++ 2m", "unipc"))


def test_ddim_by_its_formula():
    scheduler = D.DDIMScheduler(clip_sample=False)
    a, b = coefficients(scheduler, 10)
    scheduler.set_timesteps(10)
    bar = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps].double(), torch.ones(1, dtype=torch.float64)])
    alpha, sigma = bar.sqrt(), (1 - bar).sqrt()
    expected = alpha[-1] / alpha[:-1]
    torch.testing.assert_close(a, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(b, (sigma[1:] - alpha[1:] * sigma[:-1] / alpha[:-1]) / alpha[1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (D.DDIMScheduler(), "clip_sample"),
        (D.DDPMScheduler(), "clip_sample"),
        (D.DDIMScheduler(clip_sample=False, thresholding=True), "thresholding"),
        (D.DPMSolverMultistepScheduler(thresholding=True), "thresholding"),
        (D.DDPMScheduler(clip_sample=False, variance_type="learned_range"), "variance"),
        (D.DDPMScheduler(clip_sample=False, variance_type="learned"), "variance"),
    ],
)
def test_not_affine(scheduler, reason):
    with pytest.raises(NotAffineError, match=reason):
        coefficients(scheduler, 5)
    assert issubclass(NotAffineError, ValueError)


def test_not_affine_by_measurement():
    class Squashing(D.DDIMScheduler):
        def step(self, model_output, timestep, sample, **kwargs):
            result = super().step(model_output, timestep, sample, **kwargs)
            result.prev_sample = torch.tanh(result.prev_sample)
            return result

    with pytest.raises(NotAffineError, match="not an affine function"):
        coefficients(Squashing(clip_sample=False), 5)
    with pytest.raises(NotAffineError, match="step_kwargs"):
        coefficients(
            D.DDIMScheduler(clip_sample=False), 5, step_kwargs={"eta": 1.0, "variance_noise": torch.randn(2, 3, 4, 4)}
        )


def test_nothing_outside_is_touched():
    scheduler = D.EulerAncestralDiscreteScheduler()
    before, state = copy.deepcopy(vars(scheduler)), torch.get_rng_state()
    with torch.no_grad():
        coefficients(scheduler, 5)
    assert torch.equal(torch.get_rng_state(), state)
    assert str(before) == str(vars(scheduler))
