"""ShortcutSampler against the plain loop (bit for bit with fused=False), and as a part of other people's code."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from sdo_models import ConvModel, gradients, tiny_unet

from sdo_fast import NotAffineError, ShortcutSampler, coefficients, optimize_latents
from sdo_fast.reference import full_backprop, path_loop

diffusers = pytest.importorskip("diffusers")


Plain = partial(ShortcutSampler, fused=False)


def ddim(**config):
    return diffusers.DDIMScheduler(**{"clip_sample": False, **config})


def equal(ours, theirs):
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.fixture(scope="module")
def unet():
    return tiny_unet()


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("path", ["first", "last", 3, "random", "identity"])
@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("clip", [False, True])
class TestEqualsReference:
    """Values and all gradients, in float32, bit for bit."""

    def test_conv_model(self, clip, guidance, path, checkpoint):
        model, scheduler = ConvModel(), ddim(clip_sample=clip)
        x, cond, uncond = (torch.randn(2, *s, requires_grad=True) for s in ((3, 7, 6), (5,), (5,)))
        inputs = [x] if path == "identity" else [x, cond, *model.parameters(), *([uncond] if guidance else [])]
        self.compare(model, scheduler, x, inputs, {"cond": cond}, {"cond": uncond}, guidance, path, checkpoint)

    def test_unet(self, unet, clip, guidance, path, checkpoint):
        x = torch.randn(2, 1, 8, 8, requires_grad=True)
        inputs = [x] if path == "identity" else [x, *unet.parameters()]
        cond, uncond = {"class_labels": torch.tensor([1, 2])}, {"class_labels": torch.tensor([10, 10])}
        self.compare(unet, ddim(clip_sample=clip), x, inputs, cond, uncond, guidance, path, checkpoint)

    def compare(self, model, scheduler, x, inputs, cond, uncond, guidance, path, checkpoint):
        kwargs = {"start": 1, "guidance_scale": guidance, "step_kwargs": {"use_clipped_model_output": True}}
        call = {"model_kwargs": cond, "uncond_kwargs": uncond if guidance else None}
        seeds = [torch.Generator().manual_seed(4) for _ in range(2)]
        theirs = path_loop(model, scheduler, x, 5, path=path, generator=seeds[0], **kwargs, **call)
        sampler = Plain(model, scheduler, 5, path=path, checkpoint=checkpoint, **kwargs)
        ours = sampler(x, generator=seeds[1], **call)
        assert torch.equal(ours, theirs)
        assert equal(gradients(ours, *inputs), gradients(theirs, *inputs))


STOCHASTIC = {
    "ddpm": lambda: (diffusers.DDPMScheduler(), {}),
    "ddpm learned": lambda: (diffusers.DDPMScheduler(variance_type="learned_range"), {}),
    "ddim eta": lambda: (ddim(), {"eta": 1.0}),
    "euler ancestral": lambda: (diffusers.EulerAncestralDiscreteScheduler(), {}),
    "sde-dpm++": lambda: (diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), {}),
}
DETERMINISTIC = {
    "euler": lambda: (diffusers.EulerDiscreteScheduler(), {}),
    "dpm++ 2m": lambda: (diffusers.DPMSolverMultistepScheduler(), {}),
    "unipc": lambda: (diffusers.UniPCMultistepScheduler(), {}),
    "pndm": lambda: (diffusers.PNDMScheduler(), {}),
    "heun": lambda: (diffusers.HeunDiscreteScheduler(), {}),
    "flow": lambda: (diffusers.FlowMatchEulerDiscreteScheduler(), {}),
    "thresholding": lambda: (ddim(thresholding=True, sample_max_value=2.0), {}),
}


@pytest.mark.parametrize("path", ["first", 2])
@pytest.mark.parametrize("name", [*STOCHASTIC, *DETERMINISTIC])
def test_other_schedulers_equal_reference(name, path):
    scheduler, step_kwargs = {**STOCHASTIC, **DETERMINISTIC}[name]()
    model = ConvModel(out_channels=6 if "learned" in name else 3)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    inputs = (x, *model.first.parameters())
    seeds = [torch.Generator().manual_seed(4) for _ in range(2)]
    theirs = path_loop(model, scheduler, x, 5, path=path, generator=seeds[0], step_kwargs=step_kwargs)
    sampler = Plain(model, scheduler, 5, path=path, step_kwargs=step_kwargs)
    ours = sampler(x, generator=seeds[1])
    assert torch.equal(ours, theirs)
    assert equal(gradients(ours, *inputs), gradients(theirs, *inputs))
    again = sampler(x, generator=torch.Generator().manual_seed(4))
    assert torch.equal(ours, again)
    other = sampler(x, generator=torch.Generator().manual_seed(5))
    assert torch.equal(ours, other) is (name in DETERMINISTIC)


def test_values_are_those_of_sampling_and_of_full_backprop():
    model, x = ConvModel(), torch.randn(2, 3, 6, 6, requires_grad=True)
    sampler = Plain(model, ddim(), 6)
    with torch.no_grad():
        plain = sampler(x)
    assert not plain.requires_grad
    assert torch.equal(plain, sampler(x))
    assert torch.equal(plain, full_backprop(model, ddim(), x, 6))


def test_one_step_is_full_backprop():
    """With one step left there is nothing to cut, so both gradients are the same."""
    model, x = ConvModel(), torch.randn(2, 3, 6, 6, requires_grad=True)
    ours = Plain(model, ddim(), 6, start=5)(x)
    theirs = full_backprop(model, ddim(), x, 6, start=5)
    assert equal(gradients(ours, x, *model.first.parameters()), gradients(theirs, x, *model.first.parameters()))
    assert not equal(gradients(Plain(model, ddim(), 6)(x), x), gradients(full_backprop(model, ddim(), x, 6), x))


@pytest.mark.parametrize("path", ["first", "last", 2, "identity"])
def test_which_calls_keep_a_graph(path):
    model, x = ConvModel(), torch.randn(1, 3, 4, 4, requires_grad=True)
    ShortcutSampler(model, ddim(), 5, path=path)(x)
    expected = {"first": 0, "last": 4, 2: 2, "identity": None}[path]
    assert [grad for _, grad in model.calls] == [i == expected for i in range(5)]


def test_random_step_is_new_at_each_call():
    model, x, generator = ConvModel(), torch.randn(1, 3, 4, 4), torch.Generator().manual_seed(0)
    sampler = ShortcutSampler(model, ddim(), 5, path="random", start=1)
    for _ in range(40):
        sampler(x, generator=generator)
    steps = {i % 4 for i, (_, grad) in enumerate(model.calls) if grad}
    assert steps == {0, 1, 2, 3}
    assert sum(grad for _, grad in model.calls) == 40


def test_identity_gradient_is_a_times_the_loss_gradient():
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    a, _ = coefficients(ddim(), 7, start=2)
    image = ShortcutSampler(ConvModel().double(), ddim(), 7, start=2, path="identity")(x)
    (got,) = torch.autograd.grad(image.sum(), x)
    torch.testing.assert_close(got, a[2].expand_as(got))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_normalize_divides_the_gradient_by_a(prediction_type):
    model, scheduler = ConvModel().double(), ddim(prediction_type=prediction_type)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, *model.first.parameters())
    plain = ShortcutSampler(model, scheduler, 6, start=1)(x)
    normal = ShortcutSampler(model, scheduler, 6, start=1, normalize=True)(x)
    a = coefficients(scheduler, 6, start=1)[0][1].item()
    assert torch.equal(plain, normal)
    for p, n in zip(gradients(plain, *inputs), gradients(normal, *inputs), strict=True):
        torch.testing.assert_close(n * a, p)


def test_gradients_reach_what_requires_them_and_nothing_else():
    model, x, cond = ConvModel(), torch.randn(2, 3, 4, 4), torch.randn(2, 5)
    model.first.requires_grad_(False)
    sampler = ShortcutSampler(model, ddim(), 4)
    sampler(x, {"cond": cond}).sum().backward()
    assert x.grad is None
    assert cond.grad is None
    assert all(p.grad is None for p in model.first.parameters())
    assert all(p.grad.abs().sum() > 0 for p in [*model.second.parameters(), *model.condition.parameters()])
    model.requires_grad_(False)
    assert not sampler(x, {"cond": cond}).requires_grad
    sampler(x, {"cond": cond.requires_grad_()}).sum().backward()
    assert cond.grad.abs().sum() > 0


@pytest.mark.parametrize("path", ["first", 2, "identity"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("shape", [(), (2, 1, 1, 1)])
def test_guidance_can_be_optimised(shape, clip, path):
    """Its gradient is that of guidance at every step, with all that the model returns held constant."""
    model, scheduler = ConvModel().double(), ddim(clip_sample=clip)
    x, cond, uncond = (torch.randn(2, *s, dtype=torch.float64) for s in ((3, 7, 6), (5,), (5,)))
    x.requires_grad_()
    w = torch.full(shape, 2.5, requires_grad=True)
    inputs = [x, w] if path == "identity" else [x, w, *model.parameters()]
    arguments = {"model_kwargs": {"cond": cond}, "uncond_kwargs": {"cond": uncond}}
    theirs = path_loop(model, scheduler, x, 5, path=path, guidance_scale=w, **arguments)
    number = path_loop(model, scheduler, x, 5, path=path, guidance_scale=2.5, **arguments)
    torch.testing.assert_close(theirs, number, rtol=1e-6, atol=1e-6)
    expected = gradients(theirs, *inputs)
    assert expected[1].abs().min() > 0
    for fused in (False, True):
        ours = ShortcutSampler(model, scheduler, 5, path=path, guidance_scale=w, fused=fused)(x, **arguments)
        torch.testing.assert_close(gradients(ours, *inputs), expected, rtol=1e-9, atol=1e-9)
    if not clip:
        outputs = []
        scale = w.detach().requires_grad_()

        def recorded(*args, **kwargs):
            outputs.append(model(*args, **kwargs).detach())
            return outputs[-1]

        image = path_loop(recorded, scheduler, x.detach(), 5, path=path, guidance_scale=scale, **arguments)
        _, b = coefficients(scheduler, 5)
        by_hand = sum(b[i] * (both[2:] - both[:2]) for i, both in enumerate(outputs))
        target = torch.randn(image.shape, generator=torch.Generator().manual_seed(5)).to(image)
        product = 2 * (image.detach() - target) * by_hand
        product = product.sum((1, 2, 3), keepdim=True) if shape else product.sum()
        torch.testing.assert_close(gradients(image, scale)[0].double(), product, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("path", ["first", 2, "identity"])
@pytest.mark.parametrize("clip", [False, True])
def test_inference_mode_changes_no_bit(clip, path):
    model, x, cond = ConvModel(), torch.randn(2, 3, 6, 6, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    results, modes = [], []
    model.register_forward_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    for inference in (False, True):
        sampler = ShortcutSampler(
            model, ddim(clip_sample=clip), 4, path=path, guidance_scale=2.0, inference_mode=inference
        )
        image = sampler(x, {"cond": cond}, {"cond": cond})
        results.append((image, *gradients(image, x, *([] if path == "identity" else [cond]))))
    assert equal(*results)
    calls = {"first": [False, True, True, True], 2: [True, True, False, True], "identity": [True] * 4}[path]
    assert modes[-len(modes) // 2 :][:4] == calls
    with torch.no_grad():
        assert not sampler(x, {"cond": cond}, {"cond": cond}).is_inference()


def test_warm_up_gives_the_input_of_start():
    model, x = ConvModel(), torch.randn(2, 3, 4, 4)
    sampler = Plain(model, ddim(), 6, start=4)
    middle = sampler.warm_up(x)
    assert len(model.calls) == 4
    assert torch.equal(sampler(middle), Plain(model, ddim(), 6)(x))


def test_dropout_is_the_same_in_recomputation():
    model, x = ConvModel(dropout=0.5).train(), torch.randn(2, 3, 6, 6, requires_grad=True)
    results = []
    for checkpoint in (False, True):
        torch.manual_seed(3)
        image = ShortcutSampler(model, ddim(), 4, checkpoint=checkpoint)(x)
        torch.manual_seed(99)
        results.append((image, *gradients(image, x, *model.second.parameters())))
    assert equal(*results)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = ConvModel().to(dtype)
    x = torch.randn(2, 3, 6, 6, dtype=dtype, requires_grad=True)
    image = ShortcutSampler(model, ddim(), 4, start=2, normalize=True)(x)
    assert image.dtype == dtype
    (grad,) = gradients(image, x)
    double = x.detach().double().requires_grad_()
    exact = ShortcutSampler(model.double(), ddim(), 4, start=2, normalize=True)(double)
    (expected,) = gradients(exact, double)
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 5e-2, torch.float16: 6e-3}[dtype]
    for a, b in ((image, exact), (grad, expected)):
        assert (a.double() - b).pow(2).mean() <= tolerance**2 * b.pow(2).mean()


def test_autocast_keeps_the_state_in_full_precision():
    model, x = ConvModel(), torch.randn(2, 3, 6, 6, requires_grad=True)
    exact = ShortcutSampler(model, diffusers.EulerDiscreteScheduler(), 4)
    with torch.autocast("cpu", torch.bfloat16):
        image = exact(x)
    assert image.dtype == torch.float32
    plain = exact(x)
    assert 0 < (image - plain).abs().max() < 0.05 * plain.abs().max()
    torch.testing.assert_close(
        gradients(image, x)[0], gradients(plain, x)[0], rtol=0.1, atol=0.1 * plain.abs().max().item()
    )


def test_channels_last_is_kept():
    model = ConvModel().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last).requires_grad_()
    image = Plain(model, ddim(), 4)(x)
    assert image.is_contiguous(memory_format=torch.channels_last)
    theirs = path_loop(model, ddim(), x, 4)
    assert torch.equal(image, theirs)
    assert equal(gradients(image, x), gradients(theirs, x))


def test_empty_batch():
    x = torch.randn(0, 3, 4, 4, requires_grad=True)
    image = ShortcutSampler(ConvModel(), ddim(), 3)(x)
    assert image.shape == x.shape
    assert torch.autograd.grad(image.sum(), x)[0].shape == x.shape


def test_sequence_latents():
    """Tokens (B, L, D), as packed by Flux."""
    model = torch.nn.Linear(6, 6)
    x = torch.randn(2, 5, 6, requires_grad=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sampler = ShortcutSampler(
        lambda x, t: model(x) * t[:, None, None] / 1000, scheduler, 4, schedule_kwargs={"mu": 0.8}
    )
    assert gradients(sampler(x), x)[0].shape == x.shape


def test_custom_timesteps():
    scheduler = diffusers.DPMSolverMultistepScheduler()
    sampler = ShortcutSampler(ConvModel(), scheduler, None, schedule_kwargs={"timesteps": [900, 500, 100]})
    assert sampler.timesteps.tolist() == [900, 500, 100]
    assert sampler(torch.randn(1, 3, 4, 4)).isfinite().all()


def test_duck_typed_scheduler():
    class Halving:
        def set_timesteps(self, n):
            self.timesteps = torch.arange(n)

        def scale_model_input(self, x, t):
            return x

        def step(self, output, t, x):
            return SimpleNamespace(prev_sample=0.5 * x + output)

    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    sampler = ShortcutSampler(lambda x, t: torch.zeros_like(x), Halving(), 3, path="identity")
    assert torch.equal(sampler(x), x / 8)
    assert torch.equal(torch.autograd.grad(sampler(x).sum(), x)[0], torch.full_like(x, 0.125))


def test_model_calls_count_guidance_and_recomputation():
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    sampler = ShortcutSampler(ConvModel(), ddim(), 5, guidance_scale=2.0)
    image = sampler(x, {}, {})
    assert sampler.model_calls == 10
    image.sum().backward()
    assert sampler.model_calls == 12


def test_second_backward_and_higher_derivatives():
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    model = ConvModel().double()
    results = []
    for sample in (Plain(model, ddim(), 3), lambda x: path_loop(model, ddim(), x, 3)):
        (first,) = torch.autograd.grad(sample(x).pow(2).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.pow(2).sum(), x))
    assert equal(*results)


def test_progress_bar(capsys):
    pytest.importorskip("tqdm")
    ShortcutSampler(ConvModel(), ddim(), 3)(torch.randn(1, 3, 4, 4), progress=True)
    assert "sampling" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"path": "middle"}, "path"),
        ({"path": 5}, "path"),
        ({"path": 1, "start": 2}, "path"),
        ({"path": True}, "path"),
        ({"start": 5}, "start"),
        ({"num_inference_steps": -1}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": "5"}, "guidance_scale"),
    ],
)
def test_constructor_errors(kwargs, match):
    with pytest.raises((TypeError, ValueError), match=match):
        ShortcutSampler(ConvModel(), ddim(), **{"num_inference_steps": 5, **kwargs})


def test_call_errors():
    sampler = ShortcutSampler(ConvModel(), ddim(), 3)
    for latents, match in ((None, "latents"), (torch.ones(1, 3, 4, 4, dtype=torch.long), "got torch.int64")):
        with pytest.raises(TypeError, match=match):
            sampler(latents)
    with pytest.raises(ValueError, match="latents"):
        sampler(torch.randn(3))
    with pytest.raises(TypeError, match="generator"):
        sampler(torch.randn(1, 3, 4, 4), generator=3)
    with pytest.raises(ValueError, match="uncond_kwargs"):
        sampler(torch.randn(1, 3, 4, 4), uncond_kwargs={})
    with pytest.raises(TypeError, match="model"):
        ShortcutSampler(3, ddim())
    with pytest.raises(NotAffineError, match="clip"):
        ShortcutSampler(ConvModel(), diffusers.DDIMScheduler(), 3, normalize=True)


def test_traps_name_the_way_out():
    model = ConvModel()
    for config in ({"clip_sample": True}, {"clip_sample": False}):
        sample = diffusers.DDIMScheduler(prediction_type="sample", **config)
        for path in ("first", "identity"):
            with pytest.raises(ValueError, match="exactly zero"):
                ShortcutSampler(model, sample, 5, path=path)
        x = torch.randn(1, 3, 4, 4, requires_grad=True)
        assert gradients(ShortcutSampler(model, sample, 5, path="last")(x), x)[0].abs().sum() > 0
    with pytest.raises(ValueError, match=r"0-4.*B = 0"):
        ShortcutSampler(model, diffusers.PNDMScheduler(skip_prk_steps=True), 5, path="last")
    with pytest.raises(ValueError, match="1, 3, 5, 7-8"):
        ShortcutSampler(model, diffusers.KDPM2DiscreteScheduler(), 5)
    ShortcutSampler(model, diffusers.KDPM2DiscreteScheduler(), 5, path=1)
    drawing = ShortcutSampler(model, diffusers.KDPM2DiscreteScheduler(), 5, path="random")
    drawn = {i for k in range(60) for i in drawing.draw_path(torch.Generator().manual_seed(k)).shares}
    assert drawn == {1, 3, 5, 7, 8}


def test_import_is_light():
    code = (
        "import sys, torch; before = set(sys.modules); import sdo_fast; "
        "print({name.split('.')[0] for name in set(sys.modules) - before})"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "sdo_fast" in loaded
    assert not any(name in loaded for name in ("diffusers", "transformers", "triton", "tqdm", "_C"))


def test_forward_mode_and_transforms_are_refused():
    sampler, x = ShortcutSampler(ConvModel(), ddim(), 3), torch.randn(1, 3, 6, 6)
    call = partial(sampler, model_kwargs={"cond": torch.randn(1, 5)})
    with pytest.raises(RuntimeError, match="no forward mode"):
        torch.func.jvp(call, (x,), (x,))
    with pytest.raises(RuntimeError, match=r"no torch\.func transform"):
        torch.func.grad(lambda x: call(x).sum())(x)


def test_another_default_device_changes_nothing():
    """torch.set_default_device: schedules are measured on the CPU. The meta device stands for a GPU."""
    schedulers = [ddim(), ddim(clip_sample=True), diffusers.UniPCMultistepScheduler(), diffusers.DDPMScheduler()]
    model, x = ConvModel(), torch.randn(1, 3, 6, 6)

    def results(scheduler):
        sampler = ShortcutSampler(model, scheduler, 5, normalize=type(scheduler) is diffusers.UniPCMultistepScheduler)
        affine = coefficients(scheduler, 5) if scheduler.config.get("clip_sample") is False else ()
        with torch.device("cpu"):
            return sampler.why_not(), sampler(x, generator=torch.Generator().manual_seed(3)), *affine

    expected = [results(scheduler) for scheduler in schedulers]
    torch.set_default_device("meta")
    try:
        actual = [results(scheduler) for scheduler in schedulers]
    finally:
        torch.set_default_device(None)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours[0] == theirs[0] == "sampler_step runs"
        assert equal(ours[1:], theirs[1:])


def test_zero_terminal_snr_with_epsilon_prediction():
    """The first step divides by zero: clipping bounds it, as in diffusers; without, the reason is told."""
    config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    model, x, scheduler = ConvModel(), torch.randn(2, 3, 6, 5), ddim(clip_sample=True, **config)
    sampler = ShortcutSampler(model, scheduler, 4)
    assert "finite results" in sampler.why_not()
    state = x
    scheduler.set_timesteps(4)
    with torch.no_grad():
        for t in scheduler.timesteps:
            state = scheduler.step(model(state, t[None]), t, state).prev_sample
    assert torch.equal(sampler(x), state)
    with pytest.raises(ValueError, match="must give finite results, got DDIMScheduler, whose step 0 divides by zero"):
        ShortcutSampler(model, ddim(**config), 4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["ddpm", "ddim eta"])
def test_a_generator_for_each_image(name, fused):
    """As diffusers takes them: an image's noise does not depend on the others of its batch."""
    scheduler, step_kwargs = STOCHASTIC[name]()
    sampler = ShortcutSampler(ConvModel(), scheduler, 6, 0, "random", step_kwargs=step_kwargs, fused=fused)
    x = torch.randn(3, 3, 6, 5)

    def generators():
        return [torch.Generator().manual_seed(i) for i in (5, 6, 7)]

    together = sampler.sample(x, 2, generator=generators())
    for i, generator in enumerate(generators()):
        alone = sampler.sample(x[i : i + 1], 2, generator=generator)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
    assert sampler(x, generator=generators()).shape == x.shape
    result = optimize_latents(sampler, x, lambda y: y.square().mean(), steps=2, progress=False, generator=generators())
    again = optimize_latents(sampler, x, lambda y: y.square().mean(), steps=2, progress=False, generator=generators())
    assert [record.loss for record in result.history] == [record.loss for record in again.history]
    for generator, message in ((generators()[:2], "one for each of 3 images, got 2"), ([1, 2, 3], "got list")):
        with pytest.raises((TypeError, ValueError), match=message):
            sampler(x, generator=generator)
