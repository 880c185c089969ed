"""Small models for the tests of sdo_fast."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ConvModel(nn.Module):
    """A deterministic two-layer model, conditioned on t and optionally on a vector per sample."""

    def __init__(
        self,
        channels: int = 3,
        width: int = 8,
        condition: int = 5,
        out_channels: int | None = None,
        dropout: float = 0.0,
        scale: float = 0.3,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.second = nn.Conv2d(width, out_channels or channels, 3, padding=1)
        self.condition = nn.Linear(condition, width)
        self.dropout = nn.Dropout(dropout)
        self.calls: list[tuple[int, bool]] = []
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) * scale

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        self.calls.append((len(x), torch.is_grad_enabled()))
        h = self.first(x) + torch.sin(t.to(x.dtype) / 100)[:, None, None, None]
        if cond is not None:
            h = h + self.condition(cond)[:, :, None, None]
        return self.second(self.dropout(torch.tanh(h)))


def tiny_unet(**config: Any) -> nn.Module:
    from diffusers import UNet2DModel

    torch.manual_seed(11)
    settings: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "num_class_embeds": 11,
        "class_embed_type": None,
    }
    return UNet2DModel(**{**settings, **config}).eval()


def tiny_vae(**config: Any) -> nn.Module:
    import diffusers

    return diffusers.AutoencoderKL(
        in_channels=3, out_channels=3, block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **config,
    ).eval()  # fmt: skip


def tiny_conditional_unet(**config: Any) -> nn.Module:
    import diffusers

    return diffusers.UNet2DConditionModel(
        sample_size=8, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4, **{"in_channels": 4, **config},
    ).eval()  # fmt: skip


def tiny_stable_diffusion() -> Any:
    """A pipeline with text encoder and autoencoder, of random weights."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    letters = [chr(k) for k in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    tokenizer.model_max_length = 16
    text = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=len(words) - 2, eos_token_id=len(words) - 1,
    )  # fmt: skip
    return diffusers.StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=transformers.CLIPTextModel(text).eval(),
        tokenizer=tokenizer,
        unet=tiny_conditional_unet(),
        scheduler=diffusers.DDIMScheduler(clip_sample=False, beta_schedule="scaled_linear", steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def gradients(image: Tensor, *inputs: Tensor, seed: int = 5) -> tuple[Tensor, ...]:
    """Gradients of a fixed quadratic loss of the image."""
    target = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed)).to(image)
    return torch.autograd.grad(((image - target) ** 2).sum(), inputs)
