"""Samplers from tiny diffusers pipelines, made from configurations with random weights, and toy transformers."""

from __future__ import annotations

import copy

import pytest
import torch
from sdo_models import gradients, tiny_conditional_unet, tiny_stable_diffusion, tiny_unet, tiny_vae
from test_sdo_shortcut_families import latent_diffusion

from sdo_fast import ShortcutSampler, from_pipeline, invert, optimize_latents
from sdo_fast.reference import path_loop

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def stable_diffusion():
    return tiny_stable_diffusion()


def test_stable_diffusion_samples_as_its_pipeline(stable_diffusion):
    pipe = stable_diffusion
    sampler = from_pipeline(pipe, ["a cat", "dog"], 6, guidance_scale=5.0, negative_prompt=["bad", "ugly"])
    assert sampler.model is pipe.unet
    latents = sampler.prepare_latents(torch.Generator().manual_seed(1))
    assert latents.shape == (2, 4, 8, 8)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        ["a cat", "dog"], negative_prompt=["bad", "ugly"], guidance_scale=5.0, num_inference_steps=6, latents=latents,
        output_type="pt",
    ).images  # fmt: skip
    with torch.no_grad():
        image = sampler.decode(sampler(latents))
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-5)
    assert pipe.scheduler.num_inference_steps == 6


def test_stable_diffusion_is_optimised_end_to_end(stable_diffusion):
    """The authors' style setting: late start, guidance, loss on the decoded, clamped image."""
    sampler = from_pipeline(stable_diffusion, "a cat", 50, start=45, guidance_scale=5.0, negative_prompt="")
    z = sampler.prepare_latents(torch.Generator().manual_seed(1))
    target = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    loss = lambda x0: (sampler.decode(x0) - target).pow(2).mean()  # noqa: E731
    result = optimize_latents(sampler, z, loss, steps=15, lr=0.05, progress=False)
    assert result.history[-1].loss < 0.97 * result.history[0].loss
    assert result.history[0].model_calls == 2 * 6
    assert all(p.grad is None for p in stable_diffusion.unet.parameters())


def test_one_prompt_many_images_and_other_sizes(stable_diffusion):
    sampler = from_pipeline(stable_diffusion, "a", 3, images_per_prompt=3, height=24, width=32)
    x = sampler.prepare_latents()
    assert x.shape == (3, 4, 12, 16)
    assert sampler.decode(sampler(x)).shape == (3, 3, 24, 32)


def test_inversion_of_an_image(stable_diffusion):
    sampler = from_pipeline(stable_diffusion, "a cat", 20, start=10)
    with torch.no_grad():
        x0 = sampler.encode(torch.rand(1, 3, 16, 16))
    inversion = invert(sampler, x0, 10, iterations=15)
    assert inversion.error < 0.3 * invert(sampler, x0, 10).error
    assert torch.equal(sampler(inversion.latents).detach(), inversion.reconstruction)


def test_stable_diffusion_xl():
    torch.manual_seed(0)
    unet = tiny_conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 12
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(), text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet,
        scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False,
    )  # fmt: skip
    embeds = {
        "prompt_embeds": torch.randn(2, 5, 16),
        "negative_prompt_embeds": torch.randn(2, 5, 16),
        "pooled_prompt_embeds": torch.randn(2, 12),
        "negative_pooled_prompt_embeds": torch.randn(2, 12),
    }
    sampler = from_pipeline(pipe, None, 4, guidance_scale=3.0, encode_kwargs=embeds)
    latents = sampler.prepare_latents(torch.Generator().manual_seed(0)).requires_grad_()
    pipe.set_progress_bar_config(disable=True)
    unscaled = latents.detach() / sampler.solver.scheduler.init_noise_sigma
    expected = pipe(
        num_inference_steps=4, guidance_scale=3.0, latents=unscaled, height=16, width=16, output_type="latent", **embeds
    ).images
    image = sampler(latents)
    torch.testing.assert_close(image, expected, rtol=1e-4, atol=1e-4)
    assert gradients(image, latents)[0].abs().sum() > 0


def tiny_sd3():
    torch.manual_seed(0)
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
    ).eval()  # fmt: skip


def test_stable_diffusion_3():
    network = tiny_sd3()
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(scaling_factor=1.5, shift_factor=0.06), text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    embeds = {
        "prompt_embeds": torch.randn(1, 5, 16),
        "negative_prompt_embeds": torch.randn(1, 5, 16),
        "pooled_prompt_embeds": torch.randn(1, 12),
        "negative_pooled_prompt_embeds": torch.randn(1, 12),
    }
    sampler = from_pipeline(pipe, None, 4, guidance_scale=3.0, encode_kwargs=embeds, fused=False)
    latents = sampler.prepare_latents(torch.Generator().manual_seed(0)).requires_grad_()
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=latents.detach(),
        height=16,
        width=16,
        output_type="pt",
        **embeds,
    ).images
    image = sampler(latents)
    torch.testing.assert_close(sampler.decode(image), expected, rtol=1e-4, atol=1e-4)
    cond, uncond = sampler.conditions
    theirs = path_loop(network, pipe.scheduler, latents, 4, guidance_scale=3.0, model_kwargs=cond, uncond_kwargs=uncond)
    assert torch.equal(image, theirs)
    ours, expected = (gradients(x0, latents, *network.transformer_blocks.parameters()) for x0 in (image, theirs))
    assert all(map(torch.equal, ours, expected))


def test_flux_transformer():
    """Packed tokens, shared position ids, and time in [0, 1], by a function around the network."""
    torch.manual_seed(0)
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip

    def model(x, t, **kwargs):
        guidance = torch.full((len(x),), 3.5)
        return network(x, timestep=t / 1000, guidance=guidance, img_ids=ids, txt_ids=torch.zeros(5, 3), **kwargs)

    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    cond = {"encoder_hidden_states": torch.randn(2, 5, 16), "pooled_projections": torch.randn(2, 12)}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    sampler = ShortcutSampler(model, scheduler, 4, schedule_kwargs={"mu": 0.9})
    x = torch.randn(2, 16, 8, requires_grad=True)
    image = sampler(x, cond)
    theirs = path_loop(model, scheduler, x, 4, model_kwargs=cond, schedule_kwargs={"mu": 0.9})
    inputs = (x, *network.single_transformer_blocks.parameters())
    assert torch.equal(image, theirs)
    assert all(map(torch.equal, gradients(image, *inputs), gradients(theirs, *inputs)))
    result = optimize_latents(
        sampler, x, lambda x0: x0.pow(2).mean(), steps=8, lr=0.05, progress=False, model_kwargs=cond
    )
    assert result.history[-1].loss < result.history[0].loss


def test_unconditional_pixel_pipeline():
    unet = tiny_unet(num_class_embeds=None, in_channels=3, out_channels=3)
    pipe = diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler())
    sampler = from_pipeline(pipe, num_inference_steps=5, images_per_prompt=2)
    x = sampler.prepare_latents(torch.Generator().manual_seed(3))
    assert x.shape == (2, 3, 8, 8)
    assert 0 <= sampler.decode(sampler(x)).min() <= sampler.decode(sampler(x)).max() <= 1
    torch.testing.assert_close(sampler.decode(sampler.encode(torch.full_like(x, 0.25))), torch.full_like(x, 0.25))
    with pytest.raises(ValueError, match="unconditional"):
        from_pipeline(pipe, "a cat")


def test_coarse_steps_of_a_pipeline(stable_diffusion):
    sampler = from_pipeline(stable_diffusion, "a", 8)
    z = sampler.prepare_latents(torch.Generator().manual_seed(1))
    result = optimize_latents(sampler, z, lambda x0: x0.pow(2).mean(), steps=5, lr=0.02, progress=False, coarse_steps=2)
    assert [record.model_calls for record in result.history] == [3] * 4 + [9, 8]


def test_other_pipelines_are_refused():
    with pytest.raises(TypeError, match="ShortcutPipeline"):
        from_pipeline(object(), "a cat")


REFUSED = {
    "a mask": (lambda pipe: diffusers.StableDiffusionInpaintPipeline(**pipe.components), "a mask to paint in"),
    "instructions": (
        lambda pipe: diffusers.StableDiffusionInstructPix2PixPipeline(
            **{**pipe.components, "unet": tiny_conditional_unet(in_channels=8)}
        ),
        "a network of 8 channels on an autoencoder of 4",
    ),
    "guidance embedded": (
        lambda pipe: diffusers.StableDiffusionPipeline(
            **{**pipe.components, "unet": tiny_conditional_unet(time_cond_proj_dim=8)}
        ),
        "a network with time_cond_proj_dim",
    ),
    "normalised latents": (
        lambda pipe: diffusers.StableDiffusionPipeline(
            **{**pipe.components, "vae": tiny_vae(latents_mean=[0.1] * 4, latents_std=[2.0] * 4)}
        ),
        "an autoencoder with latents_mean or latents_std",
    ),
    "ControlNet": (
        lambda pipe: diffusers.StableDiffusionControlNetPipeline(
            **pipe.components,
            controlnet=diffusers.ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(4, 8)),
        ),
        "a controlnet",
    ),
    "an image to begin with": (
        lambda pipe: diffusers.StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False),
        "a call of its own",
    ),
    "another call": (lambda pipe: OtherCall(**pipe.components, requires_safety_checker=False), "a call of its own"),
    "LDM": (lambda pipe: latent_diffusion()[0], "an autoencoder that is not called vae"),
    "video": (
        lambda pipe: diffusers.TextToVideoSDPipeline(
            **{k: pipe.components[k] for k in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
        ),
        "a call of its own",
    ),
}


class OtherCall(diffusers.StableDiffusionPipeline):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("name", REFUSED)
def test_pipelines_with_more_parts_are_refused(stable_diffusion, name):
    make, reason = REFUSED[name]
    with pytest.raises(TypeError, match=f"{reason}; ShortcutPipeline runs any"):
        from_pipeline(make(stable_diffusion), "a cat")


def test_sizes_that_would_be_rounded_are_refused(stable_diffusion):
    for name in ("height", "width"):
        with pytest.raises(ValueError, match=f"{name} must be a positive multiple of 2 pixels .*, got 25"):
            from_pipeline(stable_diffusion, "a cat", **{name: 25})


def test_an_autoencoder_that_overflows_in_half_precision_runs_in_single(stable_diffusion):
    pipe = diffusers.StableDiffusionPipeline(**{**stable_diffusion.components, "vae": tiny_vae()})
    vae = pipe.vae
    assert vae.config.force_upcast
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(1e4)
    sampler = from_pipeline(pipe, "a cat", 3)
    x0 = torch.randn(1, 4, 8, 8, requires_grad=True)
    expected = sampler.decode(x0)
    (wanted,) = torch.autograd.grad(expected.sum(), x0)
    vae.half()
    image = sampler.decode(x0)
    assert image.isfinite().all()
    torch.testing.assert_close(image, expected, rtol=1e-2, atol=1e-2)
    (grad,) = torch.autograd.grad(image.sum(), x0)
    assert (grad - wanted).norm() < 2e-2 * wanted.norm()
    assert vae.dtype == torch.float16
    assert sampler.encode(torch.rand(1, 3, 16, 16)).isfinite().all()


def test_an_offloaded_pipeline_samples_as_itself(stable_diffusion):
    """Weights on no device of their own (meta), brought by accelerate's hooks layer by layer."""
    accelerate = pytest.importorskip("accelerate")
    modules = {k: copy.deepcopy(part) for k, part in stable_diffusion.components.items() if hasattr(part, "parameters")}
    for module in modules.values():
        accelerate.cpu_offload(module, execution_device="cpu")
    pipe = diffusers.StableDiffusionPipeline(**{**stable_diffusion.components, **modules})
    pipe.set_progress_bar_config(disable=True)
    sampler = from_pipeline(pipe, "a cat", 4, guidance_scale=5.0)
    z = sampler.prepare_latents(torch.Generator().manual_seed(1)).requires_grad_()
    arguments = {"guidance_scale": 5.0, "num_inference_steps": 4, "latents": z.detach(), "output_type": "pt"}
    image = sampler.decode(sampler(z))
    torch.testing.assert_close(image, pipe("a cat", **arguments).images, rtol=1e-4, atol=1e-5)
    assert torch.autograd.grad(image.sum(), z)[0].any()
    pipe.vae.half()
    with pytest.raises(ValueError, match="offloaded layer by layer"):
        sampler.decode(z)
