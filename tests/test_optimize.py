"""optimize_latents: it descends, reports honestly, and survives interruption."""

from __future__ import annotations

import pytest
import torch
from sdo_models import ConvModel

from sdo_fast import NonFiniteLossError, ShortcutSampler, TrajectoryCache, optimize_latents

diffusers = pytest.importorskip("diffusers")


def make(n=5, **kwargs):
    scheduler = kwargs.pop("scheduler", diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"))
    return ShortcutSampler(ConvModel(scale=0.15), scheduler, n, **kwargs)


def squared(target):
    return lambda image: (image - target).pow(2).mean()


@pytest.mark.parametrize("grad_step", ["first", "identity", "random"])
def test_it_descends_and_reports_what_it_did(grad_step):
    torch.manual_seed(0)
    sampler, x, target = make(grad_step=grad_step), torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    result = optimize_latents(sampler, x, squared(target), steps=60, lr=0.1, progress=False)
    losses = [record.loss for record in result.history]
    assert len(losses) == 61
    assert losses[-1] < 0.3 * losses[0]
    assert [record.iteration for record in result.history] == list(range(61))
    assert all(record.seconds > 0 for record in result.history)
    per_step = 5 if grad_step == "identity" else 6
    assert [record.model_calls for record in result.history] == [per_step] * 60 + [5]
    assert torch.equal(sampler(result.latents).detach(), result.image)
    assert squared(target)(result.image).item() == losses[-1]
    assert result.best.loss == min(losses) == losses[result.best.iteration]
    assert torch.equal(sampler(result.best.latents).detach(), result.best.image)
    assert not result.interrupted


def test_it_is_adam_on_the_samplers_gradient():
    sampler, x, target = make(), torch.randn(1, 3, 6, 6), torch.randn(1, 3, 6, 6)
    result = optimize_latents(sampler, x, squared(target), steps=3, lr=0.1, progress=False)
    z = x.clone().requires_grad_()
    adam = torch.optim.Adam([z], lr=0.1, betas=(0.9, 0.9))
    for _ in range(3):
        adam.zero_grad()
        squared(target)(sampler(z)).backward()
        adam.step()
    assert torch.equal(result.latents, z)


@pytest.mark.parametrize("reuse", [False, True])
def test_keep_norm_optimises_on_the_sphere(reuse):
    torch.manual_seed(0)
    x, target = torch.randn(3, 3, 6, 6) * torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1), torch.randn(3, 3, 6, 6)
    sampler = make(reuse=TrajectoryCache() if reuse else None)
    result = optimize_latents(sampler, x, squared(target), steps=12, lr=0.3, progress=False, constraint="norm")
    norms = x.flatten(1).norm(dim=1)
    for latents in (result.latents, result.best.latents):
        torch.testing.assert_close(latents.flatten(1).norm(dim=1), norms)
        assert (latents - x).abs().max() > 0.1
    assert result.best.loss < result.history[0].loss
    torch.testing.assert_close(make()(result.latents), result.image)


def test_keep_norm_leaves_zeros_alone():
    result = optimize_latents(make(), torch.zeros(1, 3, 4, 4), squared(1.0), 3, progress=False, constraint="norm")
    assert result.latents.count_nonzero() == 0


def test_inputs_and_parameters_are_left_alone():
    sampler, x = make(), torch.randn(1, 3, 6, 6)
    before = x.clone()
    optimize_latents(sampler, x, squared(torch.zeros_like(x)), steps=2, progress=False)
    assert torch.equal(x, before)
    assert not x.requires_grad
    assert all(p.grad is None for p in sampler.model.parameters())


def test_no_steps_is_one_evaluation():
    sampler, x = make(), torch.randn(1, 3, 6, 6)
    result = optimize_latents(sampler, x, squared(torch.zeros_like(x)), steps=0, progress=False)
    assert torch.equal(result.latents, x)
    assert len(result.history) == 1
    assert result.history[0].model_calls == 5


def test_half_precision_latents_move_by_small_steps():
    x = torch.randn(1, 3, 6, 6, dtype=torch.float16)
    sampler = ShortcutSampler(
        ConvModel().half(), diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"), 3
    )
    result = optimize_latents(sampler, x, lambda image: image.float().pow(2).mean(), steps=30, lr=1e-3, progress=False)
    assert result.latents.dtype == result.image.dtype == torch.float16
    assert result.history[-1].loss < result.history[0].loss
    assert 0 < (result.latents - x).abs().max() < 0.05


def test_a_generator_gives_every_iteration_the_same_noise():
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    sampler = make(scheduler=scheduler, step_kwargs={"eta": 1.0}, grad_step="random")
    x, generator = torch.randn(1, 3, 6, 6), torch.Generator().manual_seed(2)
    loss = squared(torch.zeros_like(x))
    fixed = optimize_latents(sampler, x, loss, steps=6, lr=0.0, progress=False, generator=generator)
    assert len({record.loss for record in fixed.history}) == 1
    fresh = optimize_latents(sampler, x, loss, steps=6, lr=0.0, progress=False)
    assert len({record.loss for record in fresh.history}) == 7
    steps = [i % 5 for i, (_, grad) in enumerate(sampler.model.calls) if grad]
    assert len(set(steps)) > 1


def test_guidance_arguments_are_passed_on():
    sampler, x = make(guidance_scale=2.0), torch.randn(1, 3, 6, 6)
    kwargs = {"model_kwargs": {"cond": torch.ones(1, 5)}, "uncond_kwargs": {"cond": torch.zeros(1, 5)}}
    result = optimize_latents(sampler, x, squared(torch.zeros_like(x)), steps=1, progress=False, **kwargs)
    assert [record.model_calls for record in result.history] == [12, 10]


def test_interruption_keeps_what_was_done():
    sampler, x = make(), torch.randn(1, 3, 6, 6)
    calls = 0

    def loss(image):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return image.pow(2).mean()

    result = optimize_latents(sampler, x, loss, steps=50, progress=False)
    assert result.interrupted
    assert len(result.history) == 3
    assert torch.equal(sampler(result.latents).detach(), result.image)
    assert result.history[-1].loss == result.image.pow(2).mean().item()


def test_callback_sees_each_iteration_and_can_stop():
    seen = []

    def callback(record, latents, image):
        assert not latents.requires_grad
        assert not image.requires_grad
        seen.append(record)
        return record.iteration == 2

    sampler, x = make(), torch.randn(1, 3, 6, 6)
    result = optimize_latents(sampler, x, squared(torch.zeros_like(x)), callback=callback, progress=False)
    assert seen == result.history
    assert len(seen) == 3


def test_losses_that_cannot_be_used():
    sampler, x = make(), torch.randn(2, 3, 6, 6)

    def run(loss):
        return optimize_latents(sampler, x, loss, steps=5, progress=False)

    with pytest.raises(ValueError, match="scalar"):
        run(lambda image: image.pow(2).mean(dim=(1, 2, 3)))
    with pytest.raises(ValueError, match="scalar"):
        run(lambda image: 3.0)
    with pytest.raises(ValueError, match="does not depend"):
        run(lambda image: image.detach().sum())
    with pytest.raises(ValueError, match="does not depend"):
        run(lambda image: torch.ones((), requires_grad=True) * 2)
    count = iter(range(9))
    with pytest.raises(NonFiniteLossError, match="iteration 2") as caught:
        run(lambda image: image.sum() * (float("nan") if next(count) == 2 else 1))
    assert len(caught.value.result.history) == 2
    with pytest.raises(
        NonFiniteLossError, match=r"a finite gradient, got one of (nan|infinity) at iteration 0"
    ) as caught:
        run(lambda image: (image - image.detach()).abs().sqrt().sum())
    assert caught.value.result.history == []
    with pytest.raises(ValueError, match="steps"):
        optimize_latents(sampler, x, squared(x), steps=-1)


def test_progress_bar_shows_the_loss(capsys):
    pytest.importorskip("tqdm")
    sampler, x = make(), torch.randn(1, 3, 6, 6)
    optimize_latents(sampler, x, squared(torch.zeros_like(x)), steps=1)
    shown = capsys.readouterr().err
    assert "optimising" in shown
    assert "loss=" in shown


class Caching(ConvModel):
    """Keeps what its layers gave and takes it again at every second call, as DeepCache does."""

    turn = 0

    def forward(self, x, t):
        self.turn += 1
        if self.turn % 2:
            self.kept = super().forward(x, t)
        return self.kept


def test_a_model_that_caches_is_told_about_checkpoint():
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    sampler = ShortcutSampler(Caching(scale=0.15), scheduler, 5)
    with pytest.raises(RuntimeError, match=r"DeepCache.*checkpoint=False"):
        optimize_latents(sampler, torch.randn(1, 3, 6, 6), squared(0.0), steps=2, progress=False)


class Reusing(ConvModel):
    """Adds at every call what it gave at the last one."""

    last = 0.0

    def forward(self, x, t):
        y = super().forward(x, t)
        y, self.last = y + 0.5 * self.last, y.detach()
        return y


def test_a_model_that_does_not_repeat_itself_has_no_wrong_gradient():
    """Its activations have the same shapes, by which PyTorch notices nothing."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    latents = torch.randn(1, 3, 6, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"DeepCache.*checkpoint=False"):
        ShortcutSampler(Reusing(scale=0.15), scheduler, 5)(latents).sum().backward()
    ShortcutSampler(Reusing(scale=0.15), scheduler, 5, checkpoint=False)(latents).sum().backward()
    assert latents.grad.isfinite().all()
