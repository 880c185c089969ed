"""optimize_latents: it descends, reports honestly, survives interruption, and takes what it says it takes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from sdo_models import ConvModel, tiny_stable_diffusion
from torch import nn

from sdo_fast import (
    NonFiniteLossError,
    ShortcutPipeline,
    ShortcutSampler,
    TrajectoryCache,
    from_pipeline,
    optimize_latents,
    whitened,
)

diffusers = pytest.importorskip("diffusers")


def make(n=5, **kwargs):
    scheduler = kwargs.pop("scheduler", diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"))
    return ShortcutSampler(ConvModel(scale=0.15), scheduler, n, **kwargs)


def squared(target):
    return lambda image: (image - target).pow(2).mean()


@pytest.mark.parametrize("path", ["first", "identity", "random"])
def test_it_descends_and_reports_what_it_did(path):
    torch.manual_seed(0)
    sampler, x, target = make(path=path), torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    result = optimize_latents(sampler, x, squared(target), steps=60, lr=0.1, progress=False)
    losses = [record.loss for record in result.history]
    assert len(losses) == 61
    assert losses[-1] < 0.3 * losses[0]
    assert [record.iteration for record in result.history] == list(range(61))
    assert all(record.seconds > 0 for record in result.history)
    per_step = 5 if path == "identity" else 6
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
def test_norm_optimises_on_the_sphere(reuse):
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


def test_norm_leaves_zeros_alone():
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
    sampler = make(scheduler=scheduler, step_kwargs={"eta": 1.0}, path="random")
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


# what is sampled


class Doubling:
    """A sampler of the simplest kind, which counts."""

    model_calls = 0

    def __init__(self, wrap):
        self.wrap = wrap

    def __call__(self, latents, factor=2.0):
        self.model_calls += 3
        return self.wrap(latents * factor)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda image: image,
        lambda image: (image, None),
        lambda image: [image, image + 1],
        lambda image: diffusers.utils.BaseOutput(images=image, flags=None),
    ],
    ids=["tensor", "tuple", "list", "output"],
)
def test_any_function_of_the_latents(wrap):
    z, target = torch.randn(2, 5), torch.randn(2, 5)
    sampler = Doubling(wrap)
    result = optimize_latents(sampler, z, squared(target), 20, 0.1, progress=False, factor=0.5)
    leaf = z.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=0.1, betas=(0.9, 0.9))
    for _ in range(20):
        adam.zero_grad()
        squared(target)(0.5 * leaf).backward()
        adam.step()
    assert torch.equal(result.latents, leaf)
    assert torch.equal(result.image, 0.5 * leaf)
    assert [record.model_calls for record in result.history] == [3] * 21
    assert all(record.exact for record in result.history)


def test_a_function_without_a_count_counts_its_calls_and_may_return_the_latents():
    z = torch.randn(2, 3)
    seen = []
    result = optimize_latents(
        lambda latents: latents,
        z,
        squared(0.0),
        4,
        0.5,
        callback=lambda record, latents, image: seen.append((latents, image)),
        progress=False,
    )
    assert [record.model_calls for record in result.history] == [1] * 5
    assert torch.equal(seen[0][1], z)
    assert all(torch.equal(latents, image) for latents, image in seen)
    assert not torch.equal(seen[1][1], z)


def test_a_generator_gives_a_function_the_same_noise():
    generator = torch.Generator().manual_seed(4)

    def sampler(latents, generator):
        return latents + torch.randn(latents.shape, generator=generator)

    z = torch.randn(2, 3)
    result = optimize_latents(sampler, z, squared(0.0), 3, 0.0, progress=False, generator=generator)
    assert len({record.loss for record in result.history}) == 1
    after = torch.Generator().manual_seed(4)
    torch.randn(z.shape, generator=after)
    assert torch.equal(generator.get_state(), after.get_state())


@pytest.fixture(scope="module")
def pipe():
    pipe = tiny_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_pipeline_is_optimised_in_latents_and_prompt(pipe):
    """The gradient is that of the pipeline's own result, for both tensors."""
    torch.manual_seed(0)
    sampler = ShortcutPipeline(pipe, path="first")
    arguments = {"num_inference_steps": 2, "guidance_scale": 1.0, "output_type": "latent"}
    with torch.no_grad():
        e = pipe.encode_prompt("a", "cpu", 1, False)[0]
    z = torch.randn(1, 4, 8, 8)
    result = optimize_latents(
        sampler, {"latents": z, "prompt_embeds": e}, squared(0.5), 2, progress=False,
        optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.1), **arguments,
    )  # fmt: skip
    leaves = [z.clone().requires_grad_(), e.clone().requires_grad_()]
    for _ in range(2):
        image = sampler(latents=leaves[0], prompt_embeds=leaves[1], **arguments).images
        gradients = torch.autograd.grad(squared(0.5)(image), leaves)
        leaves = [(leaf - 0.1 * g).detach().requires_grad_() for leaf, g in zip(leaves, gradients, strict=True)]
    assert list(result.latents) == ["latents", "prompt_embeds"]
    for ours, theirs, before in zip(result.latents.values(), leaves, (z, e), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
        assert (ours - before).abs().max() > 1e-4
    assert [record.model_calls for record in result.history] == [3, 3, 2]
    alone = optimize_latents(sampler, z, squared(0.5), 1, progress=False, prompt="a", **arguments)
    assert alone.history[0].loss == pytest.approx(result.history[0].loss)


def test_a_samplers_latents_and_conditions_are_optimised_together():
    torch.manual_seed(0)
    sampler, target = make(guidance_scale=2.0), torch.randn(2, 3, 6, 6)
    given = {"cond": torch.randn(2, 5), "latents": torch.randn(2, 3, 6, 6).half().float()}
    kwargs = {"uncond_kwargs": {"cond": torch.zeros(2, 5)}}
    shown = []

    def callback(record, latents, image):
        shown.append(latents)

    run = partial(optimize_latents, sampler, loss_fn=squared(target), steps=40, lr=0.1, progress=False, **kwargs)
    result = run(given, callback=callback)
    assert result.history[-1].loss < 0.5 * result.history[0].loss
    image = sampler(result.latents["latents"], {"cond": result.latents["cond"]}, **kwargs)
    assert torch.equal(image.detach(), result.image)
    assert list(result.best.latents) == list(result.latents) == list(shown[0]) == ["cond", "latents"]
    for name, tensor in given.items():
        assert torch.equal(shown[0][name], tensor)
        assert (result.latents[name] - tensor).abs().min() > 0
        assert not result.latents[name].requires_grad
    alone = run(given["latents"], model_kwargs={"cond": given["cond"]})
    assert alone.history[0].loss == result.history[0].loss > alone.history[-1].loss != result.history[-1].loss


def test_conditions_of_a_pipelines_sampler_are_kept_beside_those_that_are_optimised(pipe):
    sampler = from_pipeline(pipe, "a", 2, guidance_scale=3.0)
    z = sampler.prepare_latents(torch.Generator().manual_seed(0))
    cond, uncond = sampler.conditions
    loss = lambda image: image.square().mean()  # noqa: E731
    together = {"latents": z, "encoder_hidden_states": cond["encoder_hidden_states"]}
    result = optimize_latents(sampler, together, loss, 1, progress=False)
    assert result.history[0].loss == pytest.approx(loss(sampler(z)).item())
    assert not torch.equal(result.latents["encoder_hidden_states"], cond["encoder_hidden_states"])
    optimised = dict(result.latents)
    image = sampler(optimised.pop("latents"), optimised, uncond)
    assert torch.equal(image.detach(), result.image)


def test_samplers_and_latents_that_cannot_be_used(pipe):
    z = torch.randn(1, 3, 4, 4)
    run = partial(optimize_latents, loss_fn=squared(0.0), steps=1, progress=False)
    with pytest.raises(TypeError, match="sampler must be a ShortcutSampler, a ShortcutPipeline or a function"):
        run(3, z)
    with pytest.raises(TypeError, match=r"StableDiffusionPipeline, which runs under torch.no_grad: ShortcutPipeline"):
        run(pipe, z)
    with pytest.raises(ValueError, match="sampler must return an image that depends on the latents"):
        run(torch.no_grad()(lambda latents: latents * 2), z)
    with pytest.raises(TypeError, match=r"sampler must return a tensor, a tuple or list that begins with one.*got str"):
        run(lambda latents: "image", z)
    with pytest.raises(TypeError, match="got an empty mapping"):
        run(make(), {})
    with pytest.raises(TypeError, match=r"latents\['cond'\] must have dtype"):
        run(make(), {"latents": z, "cond": torch.ones(1, 5, dtype=torch.int64)})
    with pytest.raises(ValueError, match="latents must hold a tensor of this name for a ShortcutSampler, got cond"):
        run(make(), {"cond": z})
    with pytest.raises(ValueError, match="got cond twice"):
        run(make(), {"latents": z, "cond": torch.ones(1, 5)}, model_kwargs={"cond": torch.ones(1, 5)})
    with pytest.raises(ValueError, match="got b twice"):
        run(lambda a, b: a * b, {"a": z, "b": z}, b=z)
    with pytest.raises(ValueError, match="coarse_steps must be None but for a ShortcutSampler, got 2"):
        run(lambda latents: latents, z, coarse_steps=2)
    with pytest.raises(ValueError, match="constraint must be None without a tensor named 'latents', got 'norm'"):
        run(lambda a: a, {"a": z}, constraint="norm")
    with pytest.raises(ValueError, match=r"latents must be tensors that the image depends on, got cond.*identity"):
        run(make(path="identity"), {"latents": z, "cond": torch.ones(1, 5)})
    with pytest.raises(NonFiniteLossError, match="one of nan at iteration 0 for b and a loss"):
        run(lambda a, b: a * 2 + (b - b.detach()).abs().sqrt(), {"a": z, "b": z})


# the loss


class Weighted:
    def method(self, image, iteration):
        return image.sum() * 0 + iteration

    def __call__(self, *args):
        return args[0].sum() * 0 + 100 * len(args)


class Module(nn.Module):
    def forward(self, image, iteration):
        return image.sum() * 0 + iteration


def scaled(image, factor, offset=7.0):
    return image.sum() * 0 + factor + offset


LOSSES = {
    "image": (lambda image: image.sum() * 0 + 5, [5, 5, 5]),
    "image and iteration": (lambda image, iteration: image.sum() * 0 + iteration, [0, 1, 2]),
    "positional only": (lambda image, k, /: image.sum() * 0 + k, [0, 1, 2]),
    "a default": (lambda image, weight=3: image.sum() * 0 + weight, [3, 3, 3]),
    "a bound method": (Weighted().method, [0, 1, 2]),
    "*args": (Weighted(), [100, 100, 100]),
    "a module": (Module(), [0, 1, 2]),
    "partial": (partial(scaled, factor=1.0), [8, 8, 8]),
    "partial, two left": (partial(scaled, offset=1.0), [1, 2, 3]),
    "a builtin": (torch.sum, None),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_may_ask_for_the_iteration(name):
    loss, expected = LOSSES[name]
    result = optimize_latents(lambda latents: latents, torch.ones(1, 3), loss, 2, 0.5, progress=False)
    losses = [record.loss for record in result.history]
    assert losses == (expected or pytest.approx([3.0, 1.5, 0.0]))


def test_losses_of_other_arguments_are_refused():
    for loss in (lambda: 0, lambda a, b, c: 0, lambda image, *, weight: 0):
        with pytest.raises(TypeError, match="loss_fn must take an image, or an image and the iteration"):
            optimize_latents(lambda latents: latents, torch.ones(1, 3), loss, 1, progress=False)


# the update


def test_another_optimiser_and_clipped_gradients():
    z, e, target = torch.randn(2, 5), torch.randn(2, 5), torch.randn(2, 5)
    for clip in (None, 0.05):
        result = optimize_latents(
            lambda a, b: a * b.exp(), {"a": z, "b": e}, squared(target), 5, progress=False, clip_grad=clip,
            optimizer=partial(torch.optim.SGD, lr=0.5, momentum=0.9),
        )  # fmt: skip
        leaves = [z.clone().requires_grad_(), e.clone().requires_grad_()]
        sgd = torch.optim.SGD(leaves, lr=0.5, momentum=0.9)
        for _ in range(5):
            sgd.zero_grad()
            squared(target)(leaves[0] * leaves[1].exp()).backward()
            if clip is not None:
                norm = torch.cat([leaf.grad.flatten() for leaf in leaves]).norm()
                assert norm > clip
                for leaf in leaves:
                    leaf.grad *= clip / (norm + 1e-6)
            sgd.step()
        for ours, theirs in zip(result.latents.values(), leaves, strict=True):
            torch.testing.assert_close(ours, theirs.detach())


def test_optimisers_that_cannot_be_used():
    run = partial(optimize_latents, lambda latents: latents, torch.ones(1, 3), squared(0.0), 1, progress=False)
    for name, value in (("lr", 0.01), ("betas", (0.9, 0.9))):
        with pytest.raises(ValueError, match=f"{name} must be None with optimizer, which has its own"):
            run(optimizer=torch.optim.SGD, **{name: value})
    with pytest.raises(TypeError, match="optimizer must take steps without a closure, got LBFGS"):
        run(optimizer=torch.optim.LBFGS)
    with pytest.raises(TypeError, match=r"optimizer must return a torch.optim.Optimizer, got list"):
        run(optimizer=list)
    for clip in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="clip_grad must be"):
            run(clip_grad=clip)


# white noise


@pytest.mark.parametrize("reuse", [False, True])
def test_white_latents_stay_white(reuse):
    torch.manual_seed(0)
    x, target = torch.randn(3, 3, 6, 6) * torch.tensor([0.5, 1.0, 14.0]).view(3, 1, 1, 1), torch.randn(3, 3, 6, 6)
    sampler = make(reuse=TrajectoryCache() if reuse else None)
    seen = []

    def keep(record, latents, image):
        seen.append(latents)

    result = optimize_latents(sampler, x, squared(target), 12, 0.1, None, keep, False, constraint="white")
    scale = (x.flatten(1).norm(dim=1) / 108**0.5).view(3, 1, 1, 1)
    torch.testing.assert_close(seen[0], whitened(x) * scale)
    for latents in seen:
        torch.testing.assert_close(whitened(latents) * scale, latents, rtol=1e-4, atol=1e-4)
    assert (seen[-1] - seen[0]).abs().amax((1, 2, 3)).min() > 0.1
    assert result.best.loss < result.history[0].loss
    torch.testing.assert_close(make()(result.latents), result.image)


def test_white_is_projected_descent_on_the_projected_gradient():
    x, target = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    scale = (x.flatten(1).norm(dim=1) / 108**0.5).view(2, 1, 1, 1)
    weights = torch.randn(2, 5)
    result = optimize_latents(
        lambda latents, weights: latents.tanh() * weights.sum(1).view(2, 1, 1, 1),
        {"latents": x, "weights": weights},
        squared(target),
        3,
        0.1,
        progress=False,
        constraint="white",
    )
    z, w = (whitened(x) * scale).requires_grad_(), weights.clone().requires_grad_()
    adam = torch.optim.Adam([z, w], lr=0.1, betas=(0.9, 0.9))
    for _ in range(3):
        adam.zero_grad()
        squared(target)(z.tanh() * w.sum(1).view(2, 1, 1, 1)).backward()
        z.grad = whitened(z.grad)
        adam.step()
        with torch.no_grad():
            z.copy_(whitened(z) * scale)
    torch.testing.assert_close(result.latents["latents"], z.detach(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.latents["weights"], w.detach())


def test_white_leaves_zeros_alone():
    result = optimize_latents(make(), torch.zeros(1, 3, 4, 4), squared(1.0), 3, progress=False, constraint="white")
    assert result.latents.count_nonzero() == 0
