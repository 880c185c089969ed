"""Scores that people gave to images, as models predict them, and metrics of quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arguments import check_choice, number, number_list
from .clip import ClipEncoder, ClipTextSimilarity, Reward, imported
from .preparation import check_images

Head = str | Path | Mapping[str, Tensor]


class AestheticScore(Reward):
    """The aesthetic score of images, from 1 to 10: linear heads on CLIP's image embeddings.

        score_k = (clip_k.images(images) @ weight_k + bias_k).clamp(1, 10)       (B,)
        score = sum_k weights[k] * score_k / K
        loss = -score.mean(), or with a target |score.mean() - target|

    A prediction outside [1, 10] has no gradient.

    Args:
        model: a `ClipEncoder`, or folder or id of one; or a list of K.
        head: for each model a file (.pth of torch.save, or .safetensors) or a mapping with a linear layer's `weight`
            (1, D) and `bias` (1,), as LAION's sa_0_4_vit_l_14_linear.pth and sa_0_4_vit_b_32_linear.pth. Several linear
            layers in a row without activations between them (LAION's predictor of version 2) are one.
        target: score to reach; None raises it.
        weights: one for each model, 1 by default; the authors of SDO weigh ViT-L/14 by 0.5 and ViT-B/32 by 1.5.

    Raises:
        TypeError, ValueError: lists of different lengths, a head that is none or of another width, images that are not
            (B, 3, H, W); and what `ClipEncoder` raises.

    Source: LAION-AI/aesthetic-predictor; the loss is that of SDO's authors, who average over 16 `Cutouts`.
    """

    def __init__(
        self,
        model: str | Path | ClipEncoder | Sequence[str | Path | ClipEncoder],
        head: Head | Sequence[Head],
        target: float | None = None,
        weights: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        models: list[Any] = list(model) if isinstance(model, (list, tuple)) else [model]
        heads: list[Any] = list(head) if isinstance(head, (list, tuple)) else [head]
        self.target = None if target is None else number("target", target)
        self.weights = [1.0] * len(models) if weights is None else number_list("weights", weights)
        for name, values in (("head", heads), ("weights", self.weights)):
            if not models or len(values) != len(models):
                raise ValueError(f"{name} must hold one for each of {len(models)} models, got {len(values)}")
        loaded = [_linear(_state(one)) for one in heads]
        clips = [ClipEncoder.of(one) for one in models]
        for k, (clip, (weight, bias)) in enumerate(zip(clips, loaded, strict=True)):
            width = clip.clip.config.projection_dim
            if weight.shape != (width,):
                raise ValueError(f"head must have a weight of shape (1, {width}) for its model, got (1, {len(weight)})")
            self.register_buffer(f"weight{k}", weight, persistent=False)
            self.register_buffer(f"bias{k}", bias, persistent=False)
        self.clips: Any = nn.ModuleList(clips)

    def scores(self, images: Tensor) -> list[Tensor]:
        """The score of each head, (B,), in [1, 10]."""
        found = []
        for k, clip in enumerate(self.clips):
            embeddings = clip.images(images)
            weight, bias = (self.get_buffer(f"{name}{k}").to(embeddings) for name in ("weight", "bias"))
            found.append(((embeddings * weight).sum(-1) + bias).clamp(1, 10))
        return found

    def score(self, images: Tensor) -> Tensor:
        weighted = [weight * score for weight, score in zip(self.weights, self.scores(images), strict=True)]
        return torch.stack(weighted).mean(0)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) if self.target is None else (self.score(images).mean() - self.target).abs()


class PickScore(ClipTextSimilarity):
    """Preference of people among images of a prompt: a tuned CLIP's cosine, scaled.

        score = logit_scale.exp() * (clip.images(images) * clip.texts(text)).sum(-1)       (B,), about 15 to 25
        loss = -score.mean()

    Args:
        model: a `ClipEncoder`, or folder or id of the tuned model (a CLIPModel, as yuvalkirstain/PickScore_v1).
        text: the prompt, or a list, of `ClipTextSimilarity`.
        processor: where its tokenizer and image processor are, if not with the model (those of
            laion/CLIP-ViT-H-14-laion2B-s32B-b79K).

    Source: "Pick-a-Pic: An Open Dataset of User Preferences for Text-to-Image Generation", arXiv 2305.01569.
    """

    def score(self, images: Tensor, text: str | Sequence[str] | None = None) -> Tensor:
        """Scaled cosines (B,)."""
        scale = self.clip.clip.logit_scale.float().exp()
        cosines = super().score(images, text)
        return scale.to(cosines) * cosines


class HPSv2(ClipTextSimilarity):
    """Human preference score, version 2: a tuned CLIP's cosine.

        score = (clip.images(images) * clip.texts(text)).sum(-1)       (B,), about 0.2 to 0.35
        loss = -score.mean()

    Args:
        model: a `ClipEncoder`, or folder or id of the weights as a CLIPModel of transformers. The published ones
            (HPS_v2_compressed.pt, HPS_v2.1_compressed.pt) are open_clip's ViT-H-14 and are to be converted first, which
            is the conversion of laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
        text, processor: of `ClipTextSimilarity`.

    Images that are no squares are filled up to squares with black, as by hpsv2 (which does so after resizing).

    Source: "Human Preference Score v2", arXiv 2306.09341.
    """

    def score(self, images: Tensor, text: str | Sequence[str] | None = None) -> Tensor:
        """Cosines (B,)."""
        check_images("images", images)
        height, width = images.shape[-2:]
        side = max(height, width)
        top, left = (side - height) // 2, (side - width) // 2
        square = functional.pad(images, (left, side - width - left, top, side - height - top))
        return super().score(square, text)


class IQAMetric(Reward):
    """A metric of image quality by its name in pyiqa, as a loss.

        score = metric(images) if higher is better else -metric(images)        (B,)
        loss = -score.mean()

    Args:
        name: of `pyiqa.list_models()`: "musiq", "clipiqa", "niqe", ...; or "lpips", "dists" and others that
            compare with a reference.
        reference: (1, 3, H, W) or (B, 3, H, W) in [0, 1] for a metric that needs one, and only for such.
        **options: of `pyiqa.create_metric`.

    Raises:
        ImportError: pyiqa is missing.
        TypeError, ValueError: pyiqa has no metric of this name, a reference is missing or not needed, images are not
            (B, 3, H, W); at the call: the metric has no gradient, or does not give one number an image.

    Source: chaofengc/IQA-PyTorch. It downloads weights of its own.
    """

    reference: Tensor | None

    def __init__(self, name: str, reference: Tensor | None = None, **options: Any) -> None:
        super().__init__()
        pyiqa = imported("pyiqa", "IQAMetric", "pyiqa")
        check_choice("name", name, pyiqa.list_models())
        options = {"device": "cpu", **options}
        self.metric = pyiqa.create_metric(name, as_loss=True, loss_reduction="none", **options).requires_grad_(False)
        needed = self.metric.metric_mode == "FR"
        if needed != (reference is not None):
            raise ValueError(
                f"reference must be {'an image' if needed else 'None'} for {name}, got "
                f"{'None' if reference is None else type(reference).__name__}"
            )
        self.name = name
        self.register_buffer("reference", None, persistent=False)
        if reference is not None:
            check_images("reference", reference)
            self.reference = reference

    def score(self, images: Tensor) -> Tensor:
        check_images("images", images)
        reference = self.reference
        if reference is not None:
            if len(reference) not in (1, len(images)):
                raise ValueError(f"images must be as many as references, {len(reference)}, got {len(images)}")
            reference = reference.to(images).expand(len(images), *reference.shape[1:])
        value = self.metric(images, reference)
        if value.numel() != len(images):
            raise ValueError(f"name must be a metric of one number an image, got {self.name!r} of {tuple(value.shape)}")
        if images.requires_grad and torch.is_grad_enabled() and not value.requires_grad:
            raise ValueError(f"name must be a metric with a gradient, got {self.name!r}, which has none")
        value = value.reshape(len(images)).to(images.device)
        # pyiqa keeps a graph under torch.no_grad too.
        value = value if torch.is_grad_enabled() else value.detach()
        return -value if self.metric.lower_better else value


def _state(head: Any) -> Mapping[str, Tensor]:
    """The head's tensors by name."""
    if isinstance(head, Mapping):
        return head
    if not isinstance(head, (str, Path)):
        raise TypeError(f"head must be a file or a mapping of tensors, got {type(head).__name__}")
    if not Path(head).is_file():
        raise ValueError(f"head must be a file, got {str(head)!r}, which is none")
    if Path(head).suffix == ".safetensors":
        safetensors = imported("safetensors.torch", "A head in a .safetensors file", "safetensors")
        return safetensors.load_file(head)
    return torch.load(head, map_location="cpu", weights_only=True)


def _linear(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight (D,) and bias () of what linear layers in a row do together."""
    names = [name for name in state if name.endswith("weight")]
    rows, bias = torch.eye(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for name in reversed(names):
        weight, shift = state[name], state.get(name.removesuffix("weight") + "bias")
        if weight.ndim != 2 or shift is None or shift.shape != weight.shape[:1] or len(weight) != rows.shape[1]:
            raise ValueError(f"head must be linear layers in a row that end in one output, got {_shapes(state)}")
        bias = bias + rows @ shift.detach().double()
        rows = rows @ weight.detach().double()
    if not names or 2 * len(names) != len(state):
        raise ValueError(f"head must be a linear layer's weight and bias, got {_shapes(state)}")
    return rows[0].float(), bias[0].float()


def _shapes(state: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(value.shape)}" for name, value in state.items()) or "nothing"
