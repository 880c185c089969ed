"""A small, real diffusion model that runs anywhere: handwritten digits, a class-conditional UNet and a classifier.

The images are scikit-learn's digits (1,797 of 8 x 8 pixels), enlarged to 16 x 16. The trained weights lie in
``examples/assets``; ``train_digits.py`` makes them again from scratch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DDIMScheduler, UNet2DModel
from safetensors.torch import load_file
from skimage.morphology import skeletonize
from sklearn.datasets import load_digits
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

ASSETS = Path(__file__).resolve().parent / "assets"
UNET_FILE = "digits_unet.safetensors"
CLASSIFIER_FILE = "digits_classifier.safetensors"

IMAGE_SHAPE = (1, 16, 16)
NUM_CLASSES = 10
NULL_LABEL = 10  # "no class": the unconditional half of classifier-free guidance


@functools.cache
def digits(split: str = "train") -> tuple[Tensor, Tensor]:
    """Images (N, 1, 16, 16) in [-1, 1], fp32, and labels (N,), int64, of ``"train"`` (1,500) or ``"test"`` (297).

    The split is fixed (seeded, every class in proportion). The tensors are shared between calls: do not write to them.
    """
    if split not in ("train", "test"):
        raise ValueError(f'split is {split!r}; it must be "train" or "test"')
    data = load_digits()
    train, test = train_test_split(range(len(data.target)), test_size=297, random_state=0, stratify=data.target)
    index = train if split == "train" else test
    images = torch.from_numpy(data.images[index]).float()[:, None] / 8 - 1
    images = nn.functional.interpolate(images, size=IMAGE_SHAPE[1:], mode="bicubic").clamp(-1, 1)
    return images, torch.from_numpy(data.target[index]).long()


def digits_unet() -> UNet2DModel:
    """Untrained class-conditional UNet, 0.65 M parameters; ``unet(x, t, class_labels=labels).sample`` is the noise.

    ``labels`` (B,) holds 0 to 9, or ``NULL_LABEL`` for no class.
    """
    return UNet2DModel(
        sample_size=IMAGE_SHAPE[1],
        in_channels=IMAGE_SHAPE[0],
        out_channels=IMAGE_SHAPE[0],
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
        num_class_embeds=NUM_CLASSES + 1,
    )


class DigitsClassifier(nn.Module):
    """Small CNN: images (B, 1, 16, 16) in [-1, 1] to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([self._stage(IMAGE_SHAPE[0], 32), self._stage(32, 32), self._stage(32, 64)])
        self.head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 4 * 4, NUM_CLASSES))

    @staticmethod
    def _stage(in_channels: int, out_channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 3, padding=1), nn.GroupNorm(4, out_channels), nn.SiLU()
        )

    def features(self, x: Tensor) -> list[Tensor]:
        """The output of each stage: (B, 32, 16, 16), (B, 32, 8, 8), (B, 64, 4, 4)."""
        maps: list[Tensor] = []
        for stage in self.stages:
            x = stage(nn.functional.avg_pool2d(x, 2) if maps else x)
            maps.append(x)
        return maps

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)[-1])


def digits_classifier() -> DigitsClassifier:
    """Untrained classifier; ``load_digits_classifier`` returns the trained one."""
    return DigitsClassifier()


Model = TypeVar("Model", bound=nn.Module)


def _load(model: Model, path: Path) -> Model:
    model.load_state_dict({name: value.float() for name, value in load_file(path).items()})
    return model.eval().requires_grad_(False)


def load_digits_unet(path: Path = ASSETS / UNET_FILE) -> UNet2DModel:
    """The trained UNet in fp32 (stored in fp16), in eval mode, parameters frozen."""
    return _load(digits_unet(), path)


def load_digits_classifier(path: Path = ASSETS / CLASSIFIER_FILE) -> DigitsClassifier:
    """The trained classifier in fp32 (stored in fp16), in eval mode, parameters frozen."""
    return _load(digits_classifier(), path)


def scheduler() -> DDIMScheduler:
    """The DDIM scheduler that matches the UNet: linear betas, noise prediction, start from pure noise, no clipping."""
    return DDIMScheduler(
        num_train_timesteps=1000, prediction_type="epsilon", timestep_spacing="trailing", clip_sample=False
    )


def stroke_thickness(images: Tensor) -> Tensor:
    """Mean thickness of the strokes (B,), in pixels: ink over the length of the skeleton."""
    skeletons = [skeletonize(image[0].detach().cpu().numpy() > 0).sum() for image in images]
    return (images + 1).sum((1, 2, 3)) / 2 / torch.tensor(skeletons, device=images.device).clamp(min=1)


class ThicknessScore(nn.Module):
    """Images (B, 1, 16, 16) to the estimated thickness of their strokes (B,): a linear head on a classifier's features.

    It is to the digits what an aesthetic predictor is to photographs: a differentiable judge that was fitted to
    examples (here by ridge regression, at construction) and can be fooled. ``r2`` is its score on held-out digits.
    """

    def __init__(self, classifier: DigitsClassifier) -> None:
        super().__init__()
        self.classifier = classifier
        (train, _), (test, _) = digits("train"), digits("test")
        ridge = make_pipeline(StandardScaler(), RidgeCV(alphas=(0.01, 0.1, 1, 10, 100)))
        with torch.no_grad():
            ridge.fit(self._pooled(train).numpy(), stroke_thickness(train).numpy())
            self.r2 = float(ridge.score(self._pooled(test).numpy(), stroke_thickness(test).numpy()))
        scaler, head = ridge[0], ridge[-1]
        weight = head.coef_ / scaler.scale_
        self.register_buffer("weight", torch.tensor(weight, dtype=torch.float32))
        self.register_buffer("bias", torch.tensor(head.intercept_ - weight @ scaler.mean_, dtype=torch.float32))

    def _pooled(self, images: Tensor) -> Tensor:
        return torch.cat([stage.mean((2, 3)) for stage in self.classifier.features(images)], dim=1)

    def forward(self, images: Tensor) -> Tensor:
        return self._pooled(images) @ self.weight + self.bias


@torch.no_grad()
def sample(
    unet: UNet2DModel,
    labels: Tensor | Sequence[int],
    *,
    num_inference_steps: int = 50,
    guidance_scale: float = 3.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images (B, 1, 16, 16), one for each label, by deterministic DDIM with classifier-free guidance."""
    labels = torch.as_tensor(labels)
    both = torch.cat([torch.full_like(labels, NULL_LABEL), labels])
    ddim = scheduler()
    ddim.set_timesteps(num_inference_steps)
    x = torch.randn(len(labels), *IMAGE_SHAPE, generator=generator)
    for t in ddim.timesteps:
        uncond, cond = unet(torch.cat([x, x]), t, class_labels=both).sample.chunk(2)
        x = ddim.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
    return x
