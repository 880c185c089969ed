"""CLIP as a judge of images: agreement with a text, and the style of a reference."""

from __future__ import annotations

import copy
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..arguments import is_integer
from .preparation import at_least_float32, check_images, preparation_of


def imported(package: str, purpose: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {package}, which cannot be imported: pip install {extra}") from error


def texts(text: Any) -> list[str]:
    """One text or several as a list."""
    many = [text] if isinstance(text, str) else list(text) if isinstance(text, (list, tuple)) else []
    if not many or not all(isinstance(one, str) for one in many):
        raise TypeError(f"text must be a string, or a list of one for each image, got {text!r}")
    return many


class Reward(nn.Module):
    """Base of the losses: `score(images)` (B,), the higher the better; the loss is -score(images).mean()."""

    def score(self, images: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        return -self.score(images).mean()


class ClipEncoder(nn.Module):
    """A CLIP model of transformers with its image processor, differentiable, and its tokenizer; shared by losses.

    Images are resized (antialiased; shorter edge or both, as the processor's configuration says), cropped in the middle
    and normalised, all in torch:

        x = interpolate(images, size, mode="bicubic", antialias=True)[..., top : top + h, left : left + w]
        embedding = normalize(visual_projection(vision_model((x - mean) / std).pooler_output), dim=-1)

    The processor itself works on 8-bit pixels and rounds to them after resizing; of images of the model's own size both
    make the same.

    Args:
        model: the folder of a CLIP model (`CLIPModel.save_pretrained`), or its id on the Hugging Face Hub.
        processor: folder or id of its image processor and tokenizer; those of the model by default.

    Move and cast it as any module; losses that share it share its weights.

    Raises:
        ImportError: transformers is missing.
        ValueError: there is nothing to load, it is no CLIP model, or its processor's resampling is neither bilinear nor
            bicubic, or leaves less than it crops.

    Deterministic where torch is (the antialiased resize is not on CUDA, backward).
    """

    def __init__(self, model: str | Path, processor: str | Path | None = None) -> None:
        super().__init__()
        transformers = imported("transformers", "A loss by CLIP", "'sdo-swformer-fast[losses]'")
        mixin = importlib.import_module("transformers.image_processing_base").ImageProcessingMixin
        processor = model if processor is None else processor
        kind = _loaded("model", model, transformers.AutoConfig.from_pretrained).model_type
        if kind != "clip":
            raise ValueError(f"model must be a CLIP model (model_type 'clip'), got {str(model)!r} of type {kind!r}")
        self.preparation = preparation_of(_loaded("processor", processor, mixin.get_image_processor_dict)[0])
        self.tokenizer = _loaded("processor", processor, transformers.AutoTokenizer.from_pretrained)
        self.clip = _loaded("model", model, transformers.CLIPModel.from_pretrained).eval().requires_grad_(False)

    @staticmethod
    def of(model: str | Path | ClipEncoder, processor: str | Path | None = None) -> ClipEncoder:
        """The encoder itself, or one of a folder or id."""
        return model if isinstance(model, ClipEncoder) else ClipEncoder(model, processor)

    def pixel_values(self, images: Tensor) -> Tensor:
        """What the vision model takes for images (B, 3, H, W) in [0, 1]."""
        check_images("images", images)
        return self.preparation(images).to(self.clip.device, self.clip.dtype)

    def images(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of unit length."""
        pooled = self.clip.vision_model(pixel_values=self.pixel_values(images)).pooler_output
        embeddings = self.clip.visual_projection(pooled).to(images.device)
        return functional.normalize(embeddings.to(torch.promote_types(images.dtype, torch.float32)), dim=-1)

    @torch.no_grad()
    def texts(self, text: str | Sequence[str]) -> Tensor:
        """Embeddings (N, D) of unit length, in float32 at least; texts are cut to what the model takes."""
        length = self.clip.config.text_config.max_position_embeddings
        tokens = self.tokenizer(texts(text), padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = {name: tokens[name].to(self.clip.device) for name in ("input_ids", "attention_mask")}
        embeddings = self.clip.text_projection(self.clip.text_model(**tokens).pooler_output)
        return functional.normalize(at_least_float32(embeddings), dim=-1)


class ClipTextSimilarity(Reward):
    """Agreement of images with a text: the cosine of their CLIP embeddings.

        score = (clip.images(images) * clip.texts(text)).sum(-1)        (B,), in [-1, 1]
        loss = -score.mean()

    Minus the loss leads away from a text.

    Args:
        model: a `ClipEncoder`, or folder or id of one.
        text: one for all images, or a list; image i is compared with text i modulo their number, which holds for
            `Cutouts(images)` and `images.repeat(n, 1, 1, 1)` too. Encoded once.
        processor: of `ClipEncoder`.

    Raises:
        TypeError, ValueError: the text is none; images are not (B, 3, H, W), or B is no multiple of the texts' number;
            and what `ClipEncoder` raises.

    Source: "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020; the authors of
    SDO guide by it with ViT-B/32.
    """

    text: Tensor

    def __init__(
        self,
        model: str | Path | ClipEncoder,
        text: str | Sequence[str],
        processor: str | Path | None = None,
    ) -> None:
        super().__init__()
        texts(text)
        self.clip = ClipEncoder.of(model, processor)
        self.register_buffer("text", self.clip.texts(text), persistent=False)

    def score(self, images: Tensor, text: str | Sequence[str] | None = None) -> Tensor:
        """Cosines (B,); `text` takes the place of the loss's own, for rewards of many prompts."""
        embeddings = self.clip.images(images)
        wanted = (self.text if text is None else self.clip.texts(text)).to(embeddings)
        if len(images) % len(wanted):
            raise ValueError(f"images must be a multiple of the {len(wanted)} texts, got {len(images)}")
        return (embeddings * wanted.repeat(len(images) // len(wanted), 1)).sum(-1)


class ClipGramStyle(Reward):
    """Distance of images from a reference's style: Gram matrices of the patch tokens of one hidden state of CLIP.

        F = vision_model(clip.pixel_values(images)).hidden_states[layer][:, 1:]       (B, P, D), without the class token
        G = F.mT @ F                                                                  (B, D, D), in float32 at least
        loss = (G - G_reference).square().mean()

    score = -(G - G_reference).square().mean((1, 2)), (B,). Blocks after `layer` are not run.

    Args:
        model: a `ClipEncoder`, or folder or id of one.
        reference_image: (1, 3, H, W) in [0, 1], of any size.
        layer: 1 to the number of blocks; hidden state k is the output of block k, counted from 1.

    Raises:
        TypeError, ValueError: images are not (B, 3, H, W), the layer is none; and what `ClipEncoder` raises.

    Source: the style transfer of SDO's authors (ViT-B/16, block 3); Gram matrices as style: arXiv 1508.06576.
    """

    reference: Tensor

    def __init__(self, model: str | Path | ClipEncoder, reference_image: Tensor, layer: int = 3) -> None:
        super().__init__()
        check_images("reference_image", reference_image)
        if len(reference_image) != 1:
            raise ValueError(f"reference_image must be one, of shape (1, 3, H, W), got {tuple(reference_image.shape)}")
        encoder = ClipEncoder.of(model)
        vision = encoder.clip.vision_model
        count = len(vision.encoder.layers)
        if not is_integer(layer) or not 1 <= layer <= count:
            raise ValueError(f"layer must be an integer from 1 to {count}, got {layer!r}")
        self.preparation = encoder.preparation
        self.vision = _first_blocks(vision, layer)
        with torch.no_grad():
            # Tokens and not their Gram matrix, which a cast to float16 would overflow.
            self.register_buffer("reference", self.tokens(reference_image), persistent=False)

    def tokens(self, images: Tensor) -> Tensor:
        """F, (B, P, D)."""
        check_images("images", images)
        pixels = self.preparation(images).to(next(self.vision.parameters()))
        return self.vision(pixel_values=pixels).last_hidden_state[:, 1:].to(images.device)

    def score(self, images: Tensor) -> Tensor:
        """Minus the mean squared residual of the Gram matrices, (B,)."""
        tokens = self.tokens(images)
        dtype = torch.promote_types(images.dtype, torch.float32)
        # Sums over patches pass float16's range.
        with torch.autocast(images.device.type, enabled=False):
            have, want = (one.mT @ one for one in (tokens.to(dtype), self.reference.to(tokens.device, dtype)))
            return -(have - want).square().mean((1, 2))


def _first_blocks(vision: nn.Module, count: int) -> nn.Module:
    """A vision model of the same weights that ends after so many blocks; its last_hidden_state is their output."""
    shorter, encoder = _shallow(vision), _shallow(vision.get_submodule("encoder"))
    shorter.encoder, encoder.layers = encoder, nn.ModuleList(list(encoder.layers)[:count])
    return shorter


def _shallow(module: nn.Module) -> Any:
    """A module with the same weights and parts, of which others can be put in without a change to the first."""
    other = copy.copy(module)
    other._modules = dict(module._modules)
    return other


def _loaded(name: str, source: Any, load: Any) -> Any:
    """load(source), or a sentence in the place of what transformers raises."""
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"{name} must be a ClipEncoder, a folder or an id on the Hub, got {type(source).__name__}")
    try:
        return load(str(source))
    except (OSError, ValueError) as error:
        what = "a folder without all it needs" if Path(source).is_dir() else "no folder, nor an id that can be loaded"
        raise ValueError(
            f"{name} must be the folder of a CLIP model with config.json, weights, preprocessor_config.json and "
            f"tokenizer, or its id on the Hugging Face Hub, got {str(source)!r}, {what}: {error}"
        ) from error
