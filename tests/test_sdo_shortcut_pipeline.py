"""ShortcutPipeline: gradients against their definition, and all that pipelines do besides."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from sdo_models import tiny_stable_diffusion
from test_sdo_shortcut_families import (
    flux,
    flux_true_guidance,
    latent_diffusion,
    noise,
    stable_diffusion_xl,
    tiny_wan,
    wan,
)
from torch import Tensor, nn

from sdo_fast import NotAffineError, ShortcutPipeline, from_pipeline, paths, shortcut_pipeline

diffusers = pytest.importorskip("diffusers")
STEPS = 4
TEXT = {"prompt": "a cat", "guidance_scale": 5.0, "num_inference_steps": STEPS}


@pytest.fixture(scope="module")
def module_pipe():
    pipe = tiny_stable_diffusion()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(module_pipe):
    """A pipeline of shared modules with a scheduler of its own."""
    parts = {**module_pipe.components, "scheduler": copy.deepcopy(module_pipe.scheduler)}
    pipe = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    yield pipe
    assert "forward" not in vars(pipe.unet)
    assert "step" not in vars(pipe.scheduler)
    assert "decode" not in vars(pipe.vae)


def gradient(result: Any, *inputs: Tensor) -> list[Tensor]:
    image = result[0]
    return list(torch.autograd.grad((image * noise(*image.shape, seed=8)).sum(), inputs))


def undecorated(pipe: Any, **arguments: Any) -> Any:
    """The pipeline's own code, with the graph of everything."""
    return type(pipe).__call__.__wrapped__(pipe, **arguments)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_full_is_plain_autograd(pipe, checkpoint):
    z = noise(1, 4, 8, 8).requires_grad_()
    inputs = (z, *pipe.unet.parameters())
    theirs = undecorated(pipe, latents=z * 1, output_type="pt", **TEXT)
    ours = ShortcutPipeline(pipe, "full", checkpoint)(latents=z, **TEXT)
    assert torch.equal(ours.images, theirs.images)
    for one, other in zip(gradient(ours, *inputs), gradient(theirs, *inputs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("make", [flux, flux_true_guidance, wan])
def test_full_is_plain_autograd_elsewhere(make):
    torch.manual_seed(0)
    pipe, arguments, needing = make()
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, pipe.vae):
        part.eval()
    for name in needing:
        arguments[name].requires_grad_()
    inputs = [arguments[name] for name in needing]
    arguments |= {"num_inference_steps": 3, "output_type": "pt"}
    theirs = undecorated(pipe, **arguments)
    ours = ShortcutPipeline(pipe, "full")(**arguments)
    for one, other in zip(gradient(ours, *inputs), gradient(theirs, *inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


class Frozen(nn.Module):
    """A network in float64 whose outputs are recorded, or replayed at every step but the chosen ones."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.outputs = network, []
        self.live: set[int] | None = None
        self.config, self.dtype, self.device = network.config, network.dtype, network.device

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.live is None:
            self.outputs.append(self.network(*args, **kwargs)[0])
            return (self.outputs[-1],)
        self.calls += 1
        return self.network(*args, **kwargs) if self.calls - 1 in self.live else (self.outputs[self.calls - 1],)


@pytest.mark.parametrize("path", ["first", "last", 1, {0, 2}, "identity"])
def test_the_gradient_is_that_of_its_definition(path):
    """Finite differences with the other steps' outputs frozen."""
    pipe = tiny_stable_diffusion().to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    arguments = {**TEXT, "output_type": "latent", "guidance_scale": 3.0}
    z, direction = (noise(1, 4, 8, 8, seed=k).double() for k in (0, 1))
    z.requires_grad_()
    (ours,) = gradient(ShortcutPipeline(pipe, path)(latents=z, **arguments), z)
    frozen = pipe.unet = Frozen(pipe.unet)
    pipe(latents=z.detach(), **arguments)
    named = {"first": {0}, "last": {STEPS - 1}, "identity": set()}
    frozen.live = named[path] if isinstance(path, str) else {path} if isinstance(path, int) else path

    def loss(latents: Tensor) -> Tensor:
        frozen.calls = 0
        image = pipe(latents=latents, **arguments).images
        return (image * noise(*image.shape, seed=8)).sum()

    h = 1e-5
    difference = (loss(z.detach() + h * direction) - loss(z.detach() - h * direction)) / (2 * h)
    torch.testing.assert_close((ours * direction).sum(), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_the_gradient_is_that_of_from_pipeline(pipe, checkpoint):
    sampler = from_pipeline(pipe, "a cat", STEPS, guidance_scale=5.0, fused=False)
    z = noise(1, 4, 8, 8).requires_grad_()
    wanted = torch.autograd.grad((sampler(z) * noise(1, 4, 8, 8, seed=8)).sum(), (z, *pipe.unet.parameters()))
    result = ShortcutPipeline(pipe, checkpoint=checkpoint)(latents=z, output_type="latent", **TEXT)
    for one, other in zip(gradient(result, z, *pipe.unet.parameters()), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


RECIPES = {
    "refl": paths.refl(0.5),
    "draft": paths.draft(2),
    "drtune": paths.drtune(2),
    "leapalign": paths.leapalign(),
    "flowbp_sparse": paths.flowbp_sparse(2, rescale=0.5),
    "flowbp_bridge": paths.flowbp_bridge(3),
    "flowbp_lagrange": paths.flowbp_lagrange(2),
    "by hand": paths.Path({0: 0.4, 2: 0.0}, {0: -1.5, 2: 2.0}, stop=3),
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("true_guidance", [True, False])
def test_recipes_are_those_of_a_sampler(pipe, name, true_guidance):
    """The same draws give the same path, and its gradient that of the plain loop behind `from_pipeline`."""
    guidance = 5.0 if true_guidance else None
    draws = [torch.Generator().manual_seed(5) for _ in range(2)]
    sampler = from_pipeline(pipe, "a cat", STEPS, path=RECIPES[name], guidance_scale=guidance, fused=False)
    z = noise(1, 4, 8, 8).requires_grad_()
    wanted_image = sampler(z, generator=draws[0])
    wanted = torch.autograd.grad((wanted_image * noise(1, 4, 8, 8, seed=8)).sum(), (z, *pipe.unet.parameters()))
    shortcut = ShortcutPipeline(pipe, RECIPES[name], generator=draws[1])
    result = shortcut(latents=z, output_type="latent", **{**TEXT, "guidance_scale": guidance or 1.0})
    assert shortcut.drawn == sampler.drawn
    torch.testing.assert_close(result.images, wanted_image, rtol=1e-4, atol=1e-4)
    if shortcut.drawn.stop is None:
        plain = pipe(latents=z.detach(), output_type="latent", **{**TEXT, "guidance_scale": guidance or 1.0})
        assert torch.equal(result.images, plain.images)
    for one, other in zip(gradient(result, z, *pipe.unet.parameters()), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * other.abs().max().item())


def test_weights_are_measured_once_a_schedule(pipe, monkeypatch):
    measured, measure = [], shortcut_pipeline.affine_sensitivities
    monkeypatch.setattr(
        shortcut_pipeline, "affine_sensitivities", lambda solver: measured.append(len(solver)) or measure(solver)
    )
    z = noise(1, 4, 8, 8).requires_grad_()
    shortcut = ShortcutPipeline(pipe, "leapalign")
    for steps in (4, 4, 4, 5, 5):
        shortcut(latents=z, **{**TEXT, "num_inference_steps": steps})
    assert measured == [4, 5]
    shortcut(latents=z, eta=0.5, **{**TEXT, "num_inference_steps": 5})
    assert measured == [4, 5, 5]


def test_a_stop_ends_the_denoisers_calls(pipe):
    z = noise(1, 4, 8, 8).requires_grad_()
    shortcut = ShortcutPipeline(pipe, paths.Path({1: 0.0}, stop=1))
    result = shortcut(latents=z, **TEXT)
    assert (shortcut.model_calls, shortcut.graph_calls) == (2, 1)
    gradient(result, z)
    with torch.no_grad():
        assert torch.equal(shortcut(latents=z, **TEXT).images, pipe(latents=z, output_type="pt", **TEXT).images)
    # Nothing is left behind.
    full = ShortcutPipeline(pipe)(latents=z, **TEXT)
    assert torch.equal(full.images, pipe(latents=z.detach(), output_type="pt", **TEXT).images)


@pytest.mark.parametrize(
    "kind",
    [
        diffusers.EulerDiscreteScheduler,
        diffusers.HeunDiscreteScheduler,
        diffusers.LMSDiscreteScheduler,
        diffusers.DPMSolverMultistepScheduler,
        diffusers.PNDMScheduler,
    ],
)
@pytest.mark.parametrize("stop", [0, 2])
def test_a_stop_gives_the_posterior_mean_of_its_step(pipe, kind, stop):
    """Some schedulers count from the scaling of the first input on, before the first call of the denoiser."""
    pipe.scheduler = kind.from_config(pipe.scheduler.config, skip_prk_steps=True)
    z, path = noise(1, 4, 8, 8), paths.Path({stop: 0.0}, stop=stop)
    sampler = from_pipeline(pipe, "a cat", STEPS, path=path, guidance_scale=5.0, fused=False)
    wanted = sampler(z * sampler.solver.scheduler.init_noise_sigma)
    result = ShortcutPipeline(pipe, path)(latents=z, output_type="latent", **TEXT)
    torch.testing.assert_close(result.images, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["leapalign", "flowbp_bridge", "flowbp_lagrange", "flowbp_sparse"])
def test_weights_are_of_steps_that_have_one(pipe, name):
    """Every second output of DPM2 has none."""
    pipe.scheduler = diffusers.KDPM2DiscreteScheduler.from_config(pipe.scheduler.config)
    z, sampler = noise(1, 4, 8, 8), from_pipeline(pipe, "a cat", STEPS, path=RECIPES[name])
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    shortcut = ShortcutPipeline(pipe, RECIPES[name], generator=generators[0])
    for _ in range(6):
        shortcut(latents=z, output_type="latent", **TEXT)
        assert shortcut.drawn == sampler.draw_path(generators[1])


@pytest.mark.parametrize("make", [flux, flux_true_guidance, wan, stable_diffusion_xl])
@pytest.mark.parametrize("name", ["refl", "flowbp_bridge", "flowbp_lagrange"])
def test_recipes_run_in_other_families(make, name):
    """Packed latents, two calls a step, video, Euler; a flow's posterior mean at the last step is its result."""
    torch.manual_seed(0)
    pipe, arguments, needing = make()
    pipe.set_progress_bar_config(disable=True)
    for needed in needing:
        arguments[needed].requires_grad_()
    arguments["num_inference_steps"] = 4
    result = ShortcutPipeline(pipe, RECIPES[name], generator=torch.Generator().manual_seed(1))(**arguments)
    inputs = [arguments[needed] for needed in needing]
    assert all(grad.isfinite().all() for grad in gradient(result, *inputs))
    if make is flux:
        steps = len(pipe.scheduler.timesteps)
        ended = ShortcutPipeline(pipe, paths.Path({steps - 1: 0.0}, stop=steps - 1))(**arguments)
        with torch.no_grad():
            torch.testing.assert_close(ended[0], pipe(**arguments, output_type="pt")[0], rtol=1e-4, atol=1e-4)


def test_a_share_is_of_the_state_and_not_of_the_prompt(pipe):
    z, prompt = noise(1, 4, 8, 8).requires_grad_(), noise(1, 7, 16).requires_grad_()
    arguments = {"latents": z, "prompt_embeds": prompt, "guidance_scale": 1.0, "num_inference_steps": STEPS}
    by_share = {}
    for share in (1.0, 0.5, 0.0):
        shortcut = ShortcutPipeline(pipe, paths.Path({1: share}))
        by_share[share] = gradient(shortcut(output_type="latent", **arguments), z, prompt)
    assert torch.equal(by_share[0.0][1], by_share[1.0][1])
    assert by_share[1.0][1].abs().sum() > 0
    torch.testing.assert_close(by_share[0.5][0], (by_share[0.0][0] + by_share[1.0][0]) / 2, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(by_share[0.0][0], by_share[1.0][0], rtol=1e-3)


def test_what_a_pipeline_cannot_follow_is_named(pipe):
    z = noise(1, 4, 8, 8).requires_grad_()
    with pytest.raises(ValueError, match="no noises in a pipeline"):
        ShortcutPipeline(pipe, "draft_lv")(latents=z, **TEXT)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=True)
    with pytest.raises(NotAffineError, match="clips"):
        ShortcutPipeline(pipe, "leapalign")(latents=z, **TEXT)
    ShortcutPipeline(pipe, "flowbp_sparse")(latents=z, **TEXT)


def test_calls_are_counted(pipe):
    z = noise(1, 4, 8, 8).requires_grad_()
    for path, graphs in (("first", 1), ("identity", 0), ({0, 3}, 2), ("full", STEPS)):
        sampler = ShortcutPipeline(pipe, path)
        result = sampler(latents=z, **TEXT)
        assert (sampler.model_calls, sampler.graph_calls) == (STEPS, graphs)
        gradient(result, z)
        assert sampler.model_calls == STEPS + graphs
        assert len(sampler.drawn.shares) == graphs
    with torch.no_grad():
        image = sampler(latents=z, output_type="np", **TEXT).images
        assert image.shape == (1, 16, 16, 3)
        assert torch.equal(sampler(latents=z, **TEXT).images, result.images)
    assert sampler.model_calls == 4 * STEPS


def test_two_calls_of_the_denoiser_are_one_step():
    pipe, arguments, _ = flux_true_guidance()
    pipe.set_progress_bar_config(disable=True)
    sampler = ShortcutPipeline(pipe, 1)
    arguments["latents"].requires_grad_()
    sampler(num_inference_steps=3, **arguments)
    assert (sampler.model_calls, sampler.graph_calls) == (6, 2)


def test_random_steps_are_drawn_from_a_generator_of_their_own(pipe):
    z = noise(1, 4, 8, 8).requires_grad_()
    drawn = []
    for _ in range(2):
        sampler = ShortcutPipeline(pipe, "random", generator=torch.Generator().manual_seed(3))
        seen = []
        for _ in range(6):
            torch.manual_seed(7)
            sampler(latents=z, **TEXT)
            assert torch.equal(torch.get_rng_state(), torch.manual_seed(7).get_state())
            seen.extend(sampler.drawn.shares)
        drawn.append(seen)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) > 1


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "KDPM2DiscreteScheduler"])
def test_schedulers_of_two_stages(pipe, name):
    """The middle of Heun's step, and the last call, are steps of their own; KDPM2's first stage has no weight."""
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    z = noise(1, 4, 8, 8).requires_grad_()
    expected = pipe(latents=z.detach(), output_type="pt", **TEXT).images
    for path in ("last", 1, "full"):
        sampler = ShortcutPipeline(pipe, path)
        result = sampler(latents=z, **TEXT)
        assert torch.equal(result.images, expected)
        assert sampler.model_calls == 2 * STEPS - 1
        assert gradient(result, z)[0].any()
    assert sampler.drawn.shares.keys() == set(range(2 * STEPS - 1))
    if name.startswith("KDPM2"):
        result = ShortcutPipeline(pipe, "first")(latents=z, **TEXT)
        with pytest.warns(UserWarning, match="exactly zero"):
            gradient(result, z)


@pytest.mark.parametrize("name", ["EulerAncestralDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"])
def test_other_schedulers(pipe, name):
    """Fresh noise, warm-up calls and history: the same bits; no graph stays behind in the scheduler."""
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    z = noise(1, 4, 8, 8).requires_grad_()
    arguments = lambda: {**TEXT, "generator": torch.Generator().manual_seed(1)}  # noqa: E731
    expected = pipe(latents=z.detach(), output_type="pt", **arguments()).images
    result = ShortcutPipeline(pipe)(latents=z, **arguments())
    assert torch.equal(result.images, expected)
    node = weakref.ref(result.images)
    assert gradient(result, z)[0].any()
    copy.deepcopy(pipe.scheduler)
    del result
    gc.collect()
    assert node() is None


def test_image_to_image_counts_the_steps_that_run(pipe):
    parts = pipe.components
    pipe = diffusers.StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 16, 16).requires_grad_()
    sampler = ShortcutPipeline(pipe, "last")
    arguments = {**TEXT, "image": image, "strength": 0.5}
    result = sampler(**arguments)
    assert sampler.drawn.shares.keys() == {1}
    assert gradient(result, image)[0].any()
    with pytest.raises(ValueError, match="path must hold steps from 0 to 1 of this schedule, got 2"):
        ShortcutPipeline(pipe, 2)(**arguments)


def test_two_denoisers():
    """Wan 2.2: the path's step decides which of them has a gradient."""
    pipe = tiny_wan(transformer_2=wan()[0].transformer, boundary_ratio=0.9).to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    arguments = {**wan()[1], "num_inference_steps": 4}
    for path, used in (("first", "transformer"), ("last", "transformer_2")):
        sampler = ShortcutPipeline(pipe, path)
        sampler(**arguments).frames.sum().backward()
        for name in ("transformer", "transformer_2"):
            parameters = list(getattr(pipe, name).parameters())
            assert any(p.grad is not None for p in parameters) == (name == used)
            for parameter in parameters:
                parameter.grad = None


def test_gradients_of_lora(pipe):
    peft = pytest.importorskip("peft")
    unet = copy.deepcopy(pipe.unet).requires_grad_(False)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    tuned = diffusers.StableDiffusionPipeline(**{**pipe.components, "unet": unet}, requires_safety_checker=False)
    tuned.set_progress_bar_config(disable=True)
    trained = [p for p in unet.parameters() if p.requires_grad]
    for checkpoint in (True, False):
        result = ShortcutPipeline(tuned, "last", checkpoint)(latents=noise(1, 4, 8, 8), **TEXT)
        assert all(grad.any() for grad in gradient(result, *trained))


def test_callbacks_and_the_progress_bar(pipe, capsys):
    pipe.set_progress_bar_config(disable=False)
    seen = []

    def callback(owner: Any, i: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((i, owner is pipe))
        values["latents"] *= 0.9  # in place
        return values

    z = noise(1, 4, 8, 8).requires_grad_()
    arguments = {**TEXT, "callback_on_step_end": callback}
    expected = pipe(latents=z.detach(), output_type="pt", **arguments).images
    result = ShortcutPipeline(pipe)(latents=z, **arguments)
    assert torch.equal(result.images, expected)
    assert seen == 2 * [(i, True) for i in range(STEPS)]
    assert gradient(result, z)[0].any()
    assert "4/4" in capsys.readouterr().err


def test_a_copy_of_the_scheduler_is_not_counted(pipe):
    """Pipelines of pictures with sound step a second scheduler, a copy of the first."""
    copies = []

    def callback(owner: Any, i: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        scheduler = copy.deepcopy(owner.scheduler)
        scheduler.set_timesteps(7)
        before = owner.scheduler.num_inference_steps
        copies.append(scheduler.step(values["latents"], scheduler.timesteps[0], values["latents"]).prev_sample)
        assert before == owner.scheduler.num_inference_steps == STEPS
        return values

    z = noise(1, 4, 8, 8).requires_grad_()
    sampler = ShortcutPipeline(pipe, "last")
    result = sampler(latents=z, callback_on_step_end=callback, **TEXT)
    assert len(copies) == STEPS
    assert sampler.drawn.shares.keys() == {STEPS - 1}
    assert torch.equal(result.images, pipe(latents=z.detach(), output_type="pt", **TEXT).images)


def test_an_interrupted_call_names_what_is_missing(pipe):
    def interrupt(owner: Any, i: int, t: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        owner._interrupt = i == 1
        return values

    z = noise(1, 4, 8, 8).requires_grad_()
    ShortcutPipeline(pipe, 1)(latents=z, callback_on_step_end=interrupt, **TEXT)
    with pytest.raises(RuntimeError, match="path 'last' was planned for 4 steps, and StableDiffusionPipeline ran"):
        ShortcutPipeline(pipe, "last")(latents=z, callback_on_step_end=interrupt, **TEXT)


def test_exceptions_restore_the_pipeline(pipe):
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    z = noise(1, 4, 8, 8).requires_grad_()
    sampler = ShortcutPipeline(pipe)
    with pytest.raises(ZeroDivisionError):
        sampler(latents=z, callback_on_step_end=fail, **TEXT)
    assert "forward" not in vars(pipe.unet)
    assert gradient(sampler(latents=z, **TEXT), z)[0].any()


def test_a_second_use_is_refused(pipe):
    z = noise(1, 4, 8, 8).requires_grad_()
    sampler = ShortcutPipeline(pipe)

    def within(run: Any) -> Any:
        return lambda owner, i, t, values: run() and values

    for again, words in (
        (lambda: ShortcutPipeline(pipe)(latents=z, **TEXT), "pipe must not be in use"),
        (lambda: pipe(latents=z.detach(), **TEXT), "a second use of the pipeline within its call"),
    ):
        with pytest.raises(RuntimeError, match=words):
            sampler(latents=z, callback_on_step_end=within(again), **TEXT)

    caught: list[str] = []

    def elsewhere() -> None:
        for run in (lambda: sampler(latents=z, **TEXT), lambda: pipe(latents=z.detach(), **TEXT)):
            try:
                run()
            except RuntimeError as error:
                caught.append(str(error))

    def from_a_thread() -> bool:
        if not caught:
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        return True

    sampler(latents=z, callback_on_step_end=within(from_a_thread), **TEXT)
    assert len(caught) == 2
    assert all("pipe must not be in use" in words for words in caught)


def test_hooks_of_accelerate_keep_running(pipe):
    """A hook that brings the weights for a call and takes them away again: the step is repeated in backward."""
    hooks = pytest.importorskip("accelerate.hooks")
    z = noise(1, 4, 8, 8).requires_grad_()
    (wanted,) = gradient(ShortcutPipeline(pipe)(latents=z, **TEXT), z)

    class Moving(hooks.ModelHook):
        calls = 0

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            Moving.calls += 1
            self.away = [p.data for p in module.parameters()]
            for p in module.parameters():
                p.data = p.data.clone()
            return args, kwargs

        def post_forward(self, module: nn.Module, output: Any) -> Any:
            for p, data in zip(module.parameters(), self.away, strict=True):
                p.data = data
            return output

    hooks.add_hook_to_module(pipe.unet, Moving())
    sampler = ShortcutPipeline(pipe, checkpoint=False)
    assert "repeated in backward" in sampler.why_not()
    result = sampler(latents=z, **TEXT)
    assert Moving.calls == STEPS
    assert torch.equal(gradient(result, z)[0], wanted)
    assert Moving.calls == STEPS + 1
    hooks.remove_hook_from_module(pipe.unet)
    vars(pipe.unet).pop("forward", None)


def test_offloading_layer_by_layer(pipe):
    accelerate = pytest.importorskip("accelerate")
    z = noise(1, 4, 8, 8).requires_grad_()
    (wanted,) = gradient(ShortcutPipeline(pipe)(latents=z, **TEXT), z)
    unet, vae = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.vae)
    for module in (unet, vae):
        accelerate.cpu_offload(module, execution_device="cpu")
    assert next(unet.parameters()).is_meta
    parts = {**pipe.components, "unet": unet, "vae": vae}
    offloaded = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    offloaded.set_progress_bar_config(disable=True)
    assert torch.equal(gradient(ShortcutPipeline(offloaded)(latents=z, **TEXT), z)[0], wanted)


def test_hooks_that_the_pipeline_renews_stay(pipe, monkeypatch):
    """`enable_model_cpu_offload` puts new hooks on the modules at the end of each call."""
    hooks = pytest.importorskip("accelerate.hooks")
    pipe.unet = copy.deepcopy(pipe.unet)

    def renew() -> None:
        hooks.remove_hook_from_module(pipe.unet)
        hooks.add_hook_to_module(pipe.unet, hooks.ModelHook())

    renew()
    monkeypatch.setattr(pipe, "maybe_free_model_hooks", renew)
    z = noise(1, 4, 8, 8).requires_grad_()
    expected = pipe(latents=z.detach(), output_type="pt", **TEXT).images
    sampler = ShortcutPipeline(pipe)
    for calls in (1, 2):
        result = sampler(latents=z, **TEXT)
        assert torch.equal(result.images, expected)
        gradient(result, z)
        assert sampler.model_calls == calls * (STEPS + 1)
        assert hasattr(pipe.unet, "_hf_hook")
    hooks.remove_hook_from_module(pipe.unet)
    vars(pipe.unet).pop("forward")


class Small(nn.Module):
    """A denoiser that compiles in no time."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.config, self.dtype, self.device = network.config, network.dtype, network.device
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor]:
        return (torch.tanh(self.convolution(sample)) + encoder_hidden_states.mean(),)


@pytest.mark.parametrize("how", ["module", "in place"])
def test_compiled_denoisers(pipe, how):
    before, pipe.unet = pipe.unet, Small(pipe.unet)
    z = noise(1, 4, 8, 8).requires_grad_()
    (wanted,) = gradient(ShortcutPipeline(pipe)(latents=z, **TEXT), z)
    if how == "module":
        pipe.unet = torch.compile(pipe.unet, backend="eager")
    else:
        pipe.unet.compile(backend="eager")
    sampler = ShortcutPipeline(pipe)
    result = sampler(latents=z, **TEXT)
    assert sampler.graph_calls == 1
    assert torch.equal(gradient(result, z)[0], wanted)
    assert torch.equal(pipe(latents=z.detach(), output_type="pt", **TEXT).images, result.images)
    pipe.unet = before


def test_the_decoder_is_checkpointed(pipe):
    z = noise(1, 4, 8, 8).requires_grad_()
    kept = []
    for decoder in (False, True):
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # noqa: B023
            result = ShortcutPipeline(pipe, checkpoint_decoder=decoder)(latents=z, **TEXT)
        kept.append((sum(saved), gradient(result, z)[0]))
    assert kept[1][0] < 0.2 * kept[0][0]
    assert torch.equal(kept[0][1], kept[1][1])


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.filterwarnings("ignore:.*upcast_vae:FutureWarning")
def test_an_autoencoder_that_is_cast_and_cast_back(decoder):
    """Stable Diffusion XL in fp16 decodes in fp32."""
    pipe, arguments, _ = stable_diffusion_xl()
    pipe.set_progress_bar_config(disable=True)
    hooks = pytest.importorskip("accelerate.hooks")
    for moved in (False, True):
        if moved:  # the cast and a hook that brings the weights
            hooks.add_hook_to_module(pipe.vae, hooks.ModelHook())
        pipe.vae.half()
        pipe.unet.half()
        half = {k: v.detach().half() if isinstance(v, Tensor) else v for k, v in arguments.items()}
        half["num_inference_steps"] = 2
        expected = pipe(**half, output_type="pt").images
        half["latents"].requires_grad_()
        result = ShortcutPipeline(pipe, checkpoint_decoder=decoder)(**half)
        assert pipe.vae.dtype == torch.float16
        assert result.images.isfinite().all()
        assert torch.equal(result.images, expected)
        (grad,) = gradient(result, half["latents"])
        assert grad.isfinite().all()
        assert grad.any()


def test_memory_does_not_grow_with_the_steps(pipe):
    """What is kept for backward at 12 steps is little more than at 3: the scheduler's arithmetic is linear."""
    z = noise(1, 4, 8, 8).requires_grad_()

    def kept(steps: int, path: str, checkpoint: bool) -> int:
        saved: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            sampler = ShortcutPipeline(pipe, path, checkpoint)
            alive = sampler(latents=z, output_type="latent", **{**TEXT, "num_inference_steps": steps})
        del alive
        return sum(saved.values())

    assert kept(12, "first", False) < 1.1 * kept(3, "first", False)
    assert kept(12, "first", True) < 0.02 * kept(3, "first", False)
    assert kept(12, "full", False) > 3 * kept(3, "full", False)


def test_encoders_keep_no_graph(pipe):
    inputs = pipe.tokenizer(["a cat"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    result = ShortcutPipeline(pipe)(latents=noise(1, 4, 8, 8), **TEXT)
    weight = next(pipe.text_encoder.parameters())
    assert torch.autograd.grad(result.images.sum(), weight, allow_unused=True)[0] is None
    embeds = pipe.text_encoder(inputs)[0]
    result = ShortcutPipeline(pipe)(
        latents=noise(1, 4, 8, 8), prompt_embeds=embeds, num_inference_steps=2, guidance_scale=1.0
    )
    assert gradient(result, weight)[0].any()


def test_a_safety_checker_and_a_watermark_are_constants(pipe):
    class Checker(nn.Module):
        dtype, device = torch.float32, torch.device("cpu")

        def forward(self, images: Tensor, clip_input: Tensor) -> tuple[Tensor, list[bool]]:
            images[1] = 0
            return images, [False, True]

    z = noise(2, 4, 8, 8).requires_grad_()
    pipe.safety_checker, before = Checker(), pipe.safety_checker
    pipe.feature_extractor = lambda images, return_tensors: _Batch(pixel_values=torch.zeros(len(images), 3, 2, 2))
    expected = pipe(["a", "b"], latents=z.detach(), output_type="pt", num_inference_steps=2)
    result = ShortcutPipeline(pipe)(["a", "b"], latents=z, num_inference_steps=2)
    assert torch.equal(result.images, expected.images)
    assert result.nsfw_content_detected == [False, True]
    (grad,) = gradient(result, z)
    assert grad[0].any()
    assert not grad[1].any()
    assert "safety checker" in ShortcutPipeline(pipe).why_not()
    pipe.safety_checker = before

    xl, arguments, _ = stable_diffusion_xl()
    xl.set_progress_bar_config(disable=True)
    xl.watermark = _Watermark()
    arguments |= {"num_inference_steps": 2, "latents": z[:1].detach().requires_grad_()}
    with torch.no_grad():
        expected = xl(**arguments, output_type="pt")
    result = ShortcutPipeline(xl)(**arguments)
    assert torch.equal(result.images, expected.images)
    assert gradient(result, arguments["latents"])[0].any()


class _Batch(dict):
    __getattr__ = dict.__getitem__

    def to(self, device: Any) -> _Batch:
        return self


class _Watermark:
    def apply_watermark(self, images: Tensor) -> Tensor:
        return torch.from_numpy((images.numpy() * 8).round() / 8)


def test_methods_without_gradients_get_them_back(pipe):
    """Some pipelines decorate `encode_prompt` too."""

    class Decorated(diffusers.StableDiffusionPipeline):
        encode_prompt = torch.no_grad()(diffusers.StableDiffusionPipeline.encode_prompt)
        __call__ = diffusers.StableDiffusionPipeline.__call__

    pipe = Decorated(**pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    embeds = noise(1, 5, 16).requires_grad_()
    result = ShortcutPipeline(pipe)(
        prompt_embeds=embeds, negative_prompt_embeds=noise(1, 5, 16), latents=noise(1, 4, 8, 8), num_inference_steps=2
    )
    assert gradient(result, embeds)[0].any()
    assert "encode_prompt" not in vars(pipe)


def test_what_cannot_have_a_gradient_is_said(pipe):
    z = noise(1, 4, 8, 8).requires_grad_()

    class Cutting(diffusers.StableDiffusionPipeline):
        def __call__(self, **arguments: Any) -> Any:
            return super().__call__(**arguments)

    cutting = Cutting(**pipe.components, requires_safety_checker=False)
    with pytest.raises(RuntimeError, match="Cutting must run its scheduler with gradients"):
        ShortcutPipeline(cutting)(latents=z, output_type="pt", **TEXT)
    for kind in ("pil", "np"):
        with pytest.raises(ValueError, match='output_type must be "pt" or "latent"'):
            ShortcutPipeline(pipe)(latents=z, output_type=kind, **TEXT)
    embeds = {name: noise(1, 5, 16).requires_grad_() for name in ("prompt_embeds", "negative_prompt_embeds")}
    with pytest.raises(ValueError, match="negative_prompt_embeds must not require a gradient"):
        ShortcutPipeline(pipe)(**embeds, latents=z, guidance_scale=1.0, num_inference_steps=2)
    with pytest.raises(ValueError, match="prompt_embeds must not require a gradient"):
        ShortcutPipeline(pipe, "identity")(**embeds, latents=z, num_inference_steps=2)


def test_arguments_are_checked_before_work(pipe):
    for path in ("middle", -1, 1.5, {0, "a"}, None, True):
        with pytest.raises(ValueError, match="path must be one of sdo_fast"):
            ShortcutPipeline(pipe, path)
    with pytest.raises(ValueError, match="path must hold steps from 0 to 3 of this schedule, got 4"):
        ShortcutPipeline(pipe, 4)(latents=noise(1, 4, 8, 8).requires_grad_(), **TEXT)
    with pytest.raises(TypeError, match="a pipeline with a scheduler"):
        ShortcutPipeline(object())
    for names in (("unet", "net"), ("scheduler",), ()):
        with pytest.raises(TypeError, match="pipe must have modules named"):
            ShortcutPipeline(pipe, denoisers=names)
    with pytest.raises(TypeError, match="denoisers must be a list or tuple, got str"):
        ShortcutPipeline(pipe, denoisers="unet")
    with pytest.raises(TypeError, match=r"generator must be a torch\.Generator or None"):
        ShortcutPipeline(pipe, generator=3)
    with pytest.raises(TypeError, match="checkpoint must be True or False"):
        ShortcutPipeline(pipe, checkpoint="yes")


def test_arrays_become_tensors():
    pipe, _, _ = latent_diffusion()
    assert "returns an array, this returns a tensor" in ShortcutPipeline(pipe).why_not()


def test_a_model_that_does_not_repeat_itself_is_named(pipe):
    class Drifting(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network, self.calls = network, 0
            self.config, self.dtype, self.device = network.config, network.dtype, network.device

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            return (self.network(*args, **kwargs)[0] * self.calls,)

    before, pipe.unet = pipe.unet, Drifting(pipe.unet)
    z = noise(1, 4, 8, 8).requires_grad_()
    with pytest.raises(RuntimeError, match="model must do the same when its call is repeated"):
        gradient(ShortcutPipeline(pipe)(latents=z, **TEXT), z)
    assert gradient(ShortcutPipeline(pipe, checkpoint=False)(latents=z, **TEXT), z)[0].any()
    pipe.unet = before


def test_latents_are_never_changed(pipe):
    """In place too, and tensors of inference mode are taken."""
    z = noise(1, 4, 8, 8).requires_grad_()
    before = z.detach().clone()
    ShortcutPipeline(pipe)(latents=z, **TEXT)
    assert torch.equal(z, before)
    with torch.inference_mode():
        embeds = {"prompt_embeds": noise(1, 5, 16), "negative_prompt_embeds": noise(1, 5, 16)}
    result = ShortcutPipeline(pipe)(latents=z, num_inference_steps=2, **embeds)
    assert gradient(result, z)[0].any()
