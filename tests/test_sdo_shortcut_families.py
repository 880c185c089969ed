"""ShortcutPipeline on a tiny pipeline of each family: the pipeline's own bits, and gradients that arrive."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sdo_models import tiny_conditional_unet, tiny_stable_diffusion, tiny_unet, tiny_vae

from sdo_fast import ShortcutPipeline

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("transformers")

FAMILIES: dict[str, Callable[[], tuple[Any, dict[str, Any], list[str]]]] = {}
"""Each gives a pipeline, the arguments of its call, and which of them are to get a gradient."""


def family(make: Callable[[], Any]) -> Callable[[], Any]:
    FAMILIES[make.__name__] = make
    return make


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def picture(channels: int = 3, side: int = 16) -> torch.Tensor:
    return torch.rand(1, channels, side, side, generator=torch.Generator().manual_seed(3))


def text(width: int = 16, words: int = 5, negative: bool = True) -> dict[str, torch.Tensor]:
    embeds = {"prompt_embeds": noise(1, words, width, seed=1)}
    if negative:
        embeds["negative_prompt_embeds"] = noise(1, words, width, seed=2)
    return embeds


def masked(width: int = 16, words: int = 5) -> dict[str, torch.Tensor]:
    mask = torch.ones(1, words, dtype=torch.long)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    return {**text(width, words), **masks}


NO_TEXT = {"text_encoder": None, "tokenizer": None}
EMBEDS = ["prompt_embeds", "negative_prompt_embeds"]


def stable_diffusion(kind: str, **parts: Any) -> Any:
    components = {**tiny_stable_diffusion().components, **parts}
    if kind == "LatentConsistencyModelPipeline":
        components["scheduler"] = diffusers.LCMScheduler(original_inference_steps=20)
    return getattr(diffusers, kind)(**components, requires_safety_checker=False)


@family
def stable_diffusion_1():
    pipe = stable_diffusion("StableDiffusionPipeline")
    return pipe, {**text(), "guidance_scale": 5.0, "latents": noise(1, 4, 8, 8)}, ["latents", *EMBEDS]


@family
def image_to_image():
    pipe = stable_diffusion("StableDiffusionImg2ImgPipeline")
    arguments = {**text(), "image": picture(), "strength": 0.8}
    return pipe, arguments, ["image", *EMBEDS]


@family
def inpainting():
    pipe = stable_diffusion("StableDiffusionInpaintPipeline")
    mask = (picture(1) > 0.5).float()
    arguments = {**text(), "image": picture(), "mask_image": mask, "height": 16, "width": 16}
    return pipe, {**arguments, "latents": noise(1, 4, 8, 8)}, ["latents", *EMBEDS]


@family
def inpainting_network():
    """Nine channels: latents, mask and masked image."""
    pipe, arguments, needing = inpainting()
    return stable_diffusion(type(pipe).__name__, unet=tiny_conditional_unet(in_channels=9)), arguments, needing


@family
def controlnet():
    unet = tiny_conditional_unet()
    torch.manual_seed(5)
    control = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))
    for parameter in control.parameters():  # what begins at zero would hide its gradient
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    pipe = stable_diffusion("StableDiffusionControlNetPipeline", unet=unet, controlnet=control.eval())
    return pipe, {**text(), "image": picture(), "latents": noise(1, 4, 8, 8)}, ["latents", "image", *EMBEDS]


@family
def instruct_pix2pix():
    pipe = stable_diffusion("StableDiffusionInstructPix2PixPipeline", unet=tiny_conditional_unet(in_channels=8))
    return pipe, {**text(), "image": picture(), "latents": noise(1, 4, 8, 8)}, ["latents", *EMBEDS]


@family
def latent_consistency():
    pipe = stable_diffusion("LatentConsistencyModelPipeline", unet=tiny_conditional_unet(time_cond_proj_dim=8))
    return pipe, {**text(negative=False), "latents": noise(1, 4, 8, 8)}, ["latents", "prompt_embeds"]


@family
def stable_diffusion_xl():
    unet = tiny_conditional_unet(
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=8 * 6 + 12
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=tiny_vae(), **NO_TEXT, text_encoder_2=None, tokenizer_2=None, unet=unet, add_watermarker=False,
        scheduler=diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip
    pooled = {"pooled_prompt_embeds": noise(1, 12, seed=6), "negative_pooled_prompt_embeds": noise(1, 12, seed=7)}
    arguments = {**text(), **pooled, "height": 16, "width": 16, "latents": noise(1, 4, 8, 8)}
    return pipe, arguments, ["latents", *EMBEDS, *pooled]


@family
def stable_diffusion_3():
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
    )  # fmt: skip
    pipe = diffusers.StableDiffusion3Pipeline(
        transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(scaling_factor=1.5, shift_factor=0.06), **NO_TEXT, text_encoder_2=None, tokenizer_2=None,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pooled = {"pooled_prompt_embeds": noise(1, 12, seed=6), "negative_pooled_prompt_embeds": noise(1, 12, seed=7)}
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 1.0, "skip_layer_guidance_start": 0.0}
    arguments = {**text(), **pooled, **skip, "height": 16, "width": 16, "latents": noise(1, 4, 8, 8)}
    return pipe, arguments, ["latents", *EMBEDS, *pooled]


def tiny_flux(**changes: Any) -> Any:
    torch.manual_seed(0)
    network = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    pipe = diffusers.FluxPipeline(
        transformer=network, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=tiny_vae(scaling_factor=1.5, shift_factor=0.06), **NO_TEXT, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


@family
def flux():
    arguments = {**text(negative=False), "pooled_prompt_embeds": noise(1, 12, seed=6), "latents": noise(1, 16, 16)}
    return tiny_flux(), {**arguments, "height": 16, "width": 16}, ["latents", "prompt_embeds", "pooled_prompt_embeds"]


@family
def flux_true_guidance():
    """Two calls of the transformer a step."""
    pipe, arguments, needing = flux()
    negative = {"negative_prompt_embeds": noise(1, 5, 16, seed=2), "negative_pooled_prompt_embeds": noise(1, 12)}
    return pipe, {**arguments, **negative, "true_cfg_scale": 3.0}, [*needing, *negative]


@family
def flux_2_klein():
    network = diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, layers_per_block=1,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.Flux2KleinPipeline(scheduler=scheduler, vae=vae, transformer=network, **NO_TEXT)
    return pipe, {**text(), "latents": noise(1, 16, 4, 4), "height": 16, "width": 16}, ["latents", *EMBEDS]


@family
def qwen_image():
    network = diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.1] * 4, latents_std=[2.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.QwenImagePipeline(scheduler=scheduler, vae=vae, transformer=network, **NO_TEXT)
    masks = {f"{name}_mask": torch.ones(1, 5, dtype=torch.long) for name in EMBEDS}
    return pipe, {**text(), **masks, "latents": noise(1, 16, 16), "height": 16, "width": 16}, ["latents", *EMBEDS]


@family
def z_image():
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=16,
        axes_dims=[4, 6, 6], axes_lens=[64, 32, 32],
    )  # fmt: skip
    for parameter in network.parameters():
        if not parameter.any():
            parameter.data = 0.1 * torch.randn_like(parameter)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    vae = tiny_vae(scaling_factor=0.4, shift_factor=0.1)
    pipe = diffusers.ZImagePipeline(scheduler=scheduler, vae=vae, transformer=network, **NO_TEXT)
    embeds = {name: [noise(5, 16, seed=k)] for k, name in enumerate(EMBEDS)}
    return pipe, {**embeds, "latents": noise(1, 4, 8, 8), "height": 16, "width": 16}, ["latents", *EMBEDS]


@family
def pixart_sigma():
    network = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
        cross_attention_dim=16, caption_channels=16,
    )  # fmt: skip
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=network, vae=tiny_vae(), scheduler=diffusers.DPMSolverMultistepScheduler(), **NO_TEXT
    )
    arguments = {**masked(), "negative_prompt": None, "use_resolution_binning": False, "height": 16, "width": 16}
    return pipe, {**arguments, "latents": noise(1, 4, 8, 8)}, ["latents", *EMBEDS]


@family
def sana():
    network = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1, sample_size=8,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderDC(
        latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()),
        decoder_qkv_multiscales=((), ()), downsample_block_type="conv", upsample_block_type="interpolate",
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.SanaPipeline(scheduler=scheduler, vae=vae, transformer=network, **NO_TEXT)
    arguments = {**masked(), "negative_prompt": None, "use_resolution_binning": False, "height": 32, "width": 32}
    return pipe, {**arguments, "latents": noise(1, 4, 16, 16)}, ["latents", *EMBEDS]


@family
def lumina_2():
    network = diffusers.Lumina2Transformer2DModel(
        sample_size=8, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=3,
        num_kv_heads=1, multiple_of=2, axes_dim_rope=(4, 2, 2), axes_lens=(32, 32, 32), cap_feat_dim=16,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    vae = tiny_vae(scaling_factor=0.4, shift_factor=0.1)
    pipe = diffusers.Lumina2Pipeline(scheduler=scheduler, vae=vae, transformer=network, **NO_TEXT)
    masks = {name: mask.bool() for name, mask in masked().items() if name.endswith("mask")}
    return pipe, {**text(), **masks, "latents": noise(1, 4, 8, 8), "height": 16, "width": 16}, ["latents", *EMBEDS]


@family
def aura_flow():
    network = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, out_channels=4,
        pos_embed_max_size=64,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    pipe = diffusers.AuraFlowPipeline(scheduler=scheduler, vae=tiny_vae(), transformer=network, **NO_TEXT)
    return pipe, {**masked(), "latents": noise(1, 4, 8, 8), "height": 16, "width": 16}, ["latents", *EMBEDS]


@family
def hunyuan_dit():
    network = diffusers.HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=16, cross_attention_dim_t5=16, pooled_projection_dim=8, hidden_size=24, text_len=5,
        text_len_t5=5, activation_fn="gelu-approximate",
    )  # fmt: skip
    pipe = diffusers.HunyuanDiTPipeline(
        vae=tiny_vae(), transformer=network, scheduler=diffusers.DDPMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False, **NO_TEXT,
    )  # fmt: skip
    both = {}
    for name, value in {**text(), **masked()}.items():
        both |= {name: value, f"{name}_2": value.clone()}
    arguments = {**both, "latents": noise(1, 4, 8, 8), "height": 16, "width": 16, "use_resolution_binning": False}
    return pipe, arguments, ["latents", *EMBEDS, *(f"{name}_2" for name in EMBEDS)]


def tiny_wan_transformer(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=16, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


def tiny_wan(**parts: Any) -> Any:
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1] * 4, latents_std=[2.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
    )
    return diffusers.WanPipeline(
        scheduler=scheduler, vae=vae, transformer=tiny_wan_transformer(), **NO_TEXT, **parts
    )  # fmt: skip


@family
def wan():
    arguments = {**text(), "latents": noise(1, 4, 2, 2, 2), "height": 16, "width": 16, "num_frames": 5}
    return tiny_wan(), arguments, ["latents", *EMBEDS]


@family
def wan_two_denoisers():
    """By noise level, as Wan 2.2's."""
    _, arguments, needing = wan()
    return tiny_wan(transformer_2=tiny_wan_transformer(1), boundary_ratio=0.875), arguments, needing


@family
def ltx_video():
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5, upsample_residual=(False,) * 4, upsample_factor=(1,) * 4, patch_size=1,
        patch_size_t=1,
    )  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = diffusers.LTXPipeline(scheduler=scheduler, vae=vae, transformer=network, **NO_TEXT)
    arguments = {**masked(), "latents": noise(1, 3 * 8 * 8, 4), "height": 32, "width": 32, "num_frames": 9}
    return pipe, arguments, ["latents", *EMBEDS]


@family
def cogvideox():
    network = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=2, text_embed_dim=16,
        num_layers=1, sample_width=8, sample_height=8, sample_frames=9, max_text_seq_length=5,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2,
        temporal_compression_ratio=4,
    )  # fmt: skip
    pipe = diffusers.CogVideoXPipeline(
        transformer=network, vae=vae, scheduler=diffusers.CogVideoXDDIMScheduler(), **NO_TEXT
    )
    arguments = {**text(), "latents": noise(1, 2, 4, 2, 2), "height": 16, "width": 16, "num_frames": 5}
    return pipe, arguments, ["latents", *EMBEDS]


@family
def stable_audio():
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    network = diffusers.StableAudioDiTModel(
        sample_size=4, in_channels=3, num_layers=1, attention_head_dim=4, num_key_value_attention_heads=2,
        out_channels=3, cross_attention_dim=4, time_proj_dim=8, global_states_input_dim=8, cross_attention_input_dim=4,
    )  # fmt: skip
    pipe = diffusers.StableAudioPipeline(
        vae=diffusers.AutoencoderOobleck(
            encoder_hidden_size=6, downsampling_ratios=[1, 2], decoder_channels=3, decoder_input_channels=3,
            audio_channels=2, channel_multiples=[2, 4], sampling_rate=4,
        ),
        projection_model=StableAudioProjectionModel(text_encoder_dim=4, conditioning_dim=4, min_value=0, max_value=32),
        transformer=network, scheduler=diffusers.EDMDPMSolverMultistepScheduler(), **NO_TEXT,
    )  # fmt: skip
    masks = {"attention_mask": torch.ones(1, 5).long(), "negative_attention_mask": torch.ones(1, 5).long()}
    return pipe, {**text(width=4), **masks, "latents": noise(1, 3, 4)}, ["latents", *EMBEDS]


@family
def ddpm():
    unet = tiny_unet(num_class_embeds=None, in_channels=3, out_channels=3)
    return diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()), {}, []


@family
def latent_diffusion():
    vqvae = diffusers.VQModel(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), latent_channels=3, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=8,
    )  # fmt: skip
    unet = tiny_unet(num_class_embeds=None, in_channels=3, out_channels=3)
    return diffusers.LDMPipeline(vqvae=vqvae, unet=unet, scheduler=diffusers.DDIMScheduler()), {}, []


@family
def diffusion_transformer():
    network = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, norm_num_groups=4,
        sample_size=8, num_embeds_ada_norm=1000,
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer=network, vae=tiny_vae(), scheduler=diffusers.DDIMScheduler())
    return pipe, {"class_labels": [3]}, []


def first_tensor(result: Any) -> torch.Tensor:
    """The images, frames or audio of a pipeline's result."""
    value = result[0]
    return torch.as_tensor(value)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_family(name):
    """The same bits as the pipeline's, and a gradient for every argument and every parameter that a step uses."""
    torch.manual_seed(0)
    pipe, arguments, needing = FAMILIES[name]()
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    arguments["num_inference_steps"] = 3
    seeded = lambda: {**arguments, "generator": torch.Generator().manual_seed(4)}  # noqa: E731
    expected = first_tensor(pipe(**seeded(), output_type="pt"))
    for path in ("first", 1):
        sampler = ShortcutPipeline(pipe, path)
        leaves = [part for name in needing for part in _parts(arguments[name])]
        for leaf in leaves:
            leaf.requires_grad_()
        result = first_tensor(sampler(**seeded()))
        assert torch.equal(result.detach(), expected)
        used = [p for name in sampler.denoisers for p in getattr(pipe, name).parameters()]
        (result * noise(*result.shape)).sum().backward()
        assert all(leaf.grad is not None and leaf.grad.any() for leaf in leaves)
        assert any(p.grad is not None and p.grad.any() for p in used)
        for tensor in (*leaves, *used):
            tensor.grad = None
        for leaf in leaves:
            leaf.requires_grad_(False)


def _parts(value: Any) -> list[torch.Tensor]:
    return list(value) if isinstance(value, list) else [value]
