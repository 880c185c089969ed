"""The plain loops against loops written out by hand, and the parts that they share."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from sdo_models import ConvModel, gradients

from sdo_fast.model import GuidedModel
from sdo_fast.reference import full_backprop, path_loop
from sdo_fast.solver import Solver

diffusers = pytest.importorskip("diffusers")


def by_hand(model, scheduler, x, n, chosen, start=0, **step_kwargs):
    """The authors' loop without guidance; `chosen` None keeps every step's graph."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(n)
    for i, t in enumerate(scheduler.timesteps):
        if i < start:
            continue
        output = model(x, t.expand(len(x)))
        if chosen is not None and i != chosen:
            output = output.detach()
        x = scheduler.step(output, t, x, **step_kwargs).prev_sample
    return x


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("start", "step"), [(0, 0), (0, 3), (2, 2), (2, 5)])
def test_path_loop_is_the_loop_by_hand(clip, start, step):
    scheduler, model = diffusers.DDIMScheduler(clip_sample=clip), ConvModel()
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    kwargs = {"use_clipped_model_output": True}
    hand = by_hand(model, scheduler, x, 6, step, start, **kwargs)
    ours = path_loop(model, scheduler, x, 6, start=start, path=step, step_kwargs=kwargs)
    assert torch.equal(hand, ours)
    assert all(
        map(torch.equal, gradients(hand, x, *model.first.parameters()), gradients(ours, x, *model.first.parameters()))
    )


@pytest.mark.parametrize("checkpoint", [False, True])
def test_full_backprop_is_the_loop_by_hand(checkpoint):
    scheduler, model = diffusers.DDIMScheduler(clip_sample=False), ConvModel()
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    hand, ours = by_hand(model, scheduler, x, 5, None), full_backprop(model, scheduler, x, 5, checkpoint=checkpoint)
    assert torch.equal(hand, ours)
    assert all(
        map(torch.equal, gradients(hand, x, *model.first.parameters()), gradients(ours, x, *model.first.parameters()))
    )


def test_full_backprop_agrees_with_finite_differences():
    scheduler, model = diffusers.DDIMScheduler(clip_sample=False), ConvModel().double()
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: full_backprop(model, scheduler, x, 3), (x,), atol=1e-4, rtol=1e-4)


def test_shortcut_is_identity_plus_one_jacobian():
    """d x_0 / d x = A I + B d eps / d x, with A and B of DDIM by hand."""
    scheduler, model = diffusers.DDIMScheduler(clip_sample=False), ConvModel().double()
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    scheduler.set_timesteps(4)
    bar = [scheduler.alphas_cumprod[t].double().item() for t in scheduler.timesteps] + [1.0]
    a = (1 / bar[0]) ** 0.5
    b = (1 / bar[1]) ** 0.5 * ((1 - bar[1]) ** 0.5 - (bar[1] * (1 - bar[0]) / bar[0]) ** 0.5)
    jacobian = torch.autograd.functional.jacobian(lambda x: path_loop(model, scheduler, x, 4), x).reshape(12, 12)
    inner = torch.autograd.functional.jacobian(lambda x: model(x, scheduler.timesteps[:1]), x).reshape(12, 12)
    torch.testing.assert_close(jacobian, a * torch.eye(12, dtype=torch.float64) + b * inner, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("joined", [True, False])
def test_guidance_formula(joined):
    model = ConvModel()
    x, t = torch.randn(2, 3, 4, 4), torch.tensor(17)
    cond, uncond = torch.randn(2, 5), torch.randn(2 if joined else 1, 5)
    eps = GuidedModel(model, 2, 3.0, {"cond": cond}, {"cond": uncond})
    got = eps(x, t)
    assert [batch for batch, _ in model.calls] == ([4] if joined else [2, 2])
    plain_cond, plain_uncond = model(x, t.expand(2), cond), model(x, t.expand(2), uncond)
    torch.testing.assert_close(got, plain_uncond + 3.0 * (plain_cond - plain_uncond), rtol=1e-5, atol=1e-5)


def test_nested_and_shared_arguments_are_joined():
    seen = []

    def model(x, t, **kwargs):
        seen.append(kwargs)
        return x

    shared, one, two = torch.randn(7), torch.randn(2, 4), torch.randn(2, 4)
    common = {"scale": 0.5, "ids": shared, "mask": None}
    GuidedModel(model, 2, 2.0, {**common, "added": {"text": (one,)}}, {**common, "added": {"text": (two,)}})(
        torch.randn(2, 3, 4, 4), torch.tensor(1)
    )
    (kwargs,) = seen
    assert kwargs["scale"] == 0.5
    assert kwargs["ids"] is shared
    assert kwargs["mask"] is None
    assert torch.equal(kwargs["added"]["text"][0], torch.cat([two, one]))


@pytest.mark.parametrize("wrap", [lambda y: y, lambda y: (y, None), lambda y: SimpleNamespace(sample=y)])
def test_output_formats(wrap):
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(GuidedModel(lambda x, t: wrap(2 * x), 2)(x, torch.tensor(1)), 2 * x)


def test_variance_channels():
    x = torch.randn(2, 3, 4, 4)
    both = torch.randn(4, 6, 4, 4)
    assert torch.equal(GuidedModel(lambda x, t: both[:2], 2)(x, torch.tensor(1)), both[:2, :3])
    learned = GuidedModel(lambda x, t: both, 2, 2.0, {}, {}, learned_variance=True)(x, torch.tensor(1))
    torch.testing.assert_close(learned[:, :3], both[:2, :3] + 2.0 * (both[2:, :3] - both[:2, :3]))
    assert torch.equal(learned[:, 3:], both[2:, 3:])
    with pytest.raises(ValueError, match="model must return shape"):
        GuidedModel(lambda x, t: x[:, :2], 2)(x, torch.tensor(1))


def test_learned_variance_scheduler_gets_all_channels():
    scheduler = diffusers.DDPMScheduler(variance_type="learned_range")
    model = ConvModel(out_channels=6)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    image = path_loop(model, scheduler, x, 4, generator=torch.Generator().manual_seed(0))
    assert image.shape == x.shape
    assert gradients(image, x)[0].isfinite().all()


def test_scheduler_is_never_changed():
    for scheduler in (
        diffusers.UniPCMultistepScheduler(),
        diffusers.DDIMScheduler(),
        diffusers.HeunDiscreteScheduler(),
    ):
        before = copy.deepcopy(vars(scheduler))
        model, x = ConvModel(), torch.randn(1, 3, 4, 4, requires_grad=True)
        first, second = path_loop(model, scheduler, x, 4), path_loop(model, scheduler, x, 4)
        assert torch.equal(first, second)
        after = vars(scheduler)
        assert before.keys() == after.keys()
        assert all(
            torch.equal(v, after[k]) if isinstance(v, torch.Tensor) else str(v) == str(after[k])
            for k, v in before.items()
        )


def test_scheduler_that_holds_a_graph():
    scheduler, model = diffusers.DPMSolverMultistepScheduler(), ConvModel()
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    used = copy.deepcopy(scheduler)
    used.set_timesteps(4)
    for t in used.timesteps[:2]:
        used.step(model(x, t.expand(1)), t, x)
    assert torch.equal(path_loop(model, used, x, 4), path_loop(model, scheduler, x, 4))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": None}, "num_inference_steps"),
        ({"num_inference_steps": 5, "start": 5}, "start"),
        ({"num_inference_steps": 5, "start": -1}, "start"),
        ({"num_inference_steps": 5, "step_kwargs": {"tea": 1}}, "step_kwargs"),
    ],
)
def test_solver_errors(kwargs, match):
    with pytest.raises(ValueError, match=match):
        Solver(diffusers.DDIMScheduler(), **kwargs)


def test_more_errors():
    with pytest.raises(TypeError, match="scheduler"):
        Solver(object())
    with pytest.raises(ValueError, match="multiple of 2"):
        Solver(diffusers.HeunDiscreteScheduler(), 5, start=1)
    with pytest.raises(ValueError, match="uncond_kwargs"):
        GuidedModel(torch.sin, 1, 2.0, {})
    with pytest.raises(ValueError, match="uncond_kwargs"):
        GuidedModel(torch.sin, 1, None, {}, {})
    with pytest.raises(TypeError, match="model_kwargs"):
        GuidedModel(torch.sin, 1, None, [1])
    with pytest.raises(TypeError, match="model"):
        GuidedModel(3, 1)
