"""Losses against plain references, on tiny CLIP models of random weights."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

for package in ("transformers", "safetensors", "PIL"):
    pytest.importorskip(package)

import transformers
from PIL import Image
from safetensors.torch import save_file

from sdo_fast import losses

SIDE = 24
WIDTH = 12


def tiny_clip(folder: Path, seed: int = 0, **processor: Any) -> Path:
    """A CLIP model in a folder: 4 blocks, patches of 8 x 8, letters as tokens, its processor's configuration."""
    letters = [chr(k) for k in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "initializer_range": 0.3}
    end = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    text = {"vocab_size": len(words), "num_hidden_layers": 2, "max_position_embeddings": 16, **end, **size}
    vision = {"image_size": SIDE, "patch_size": 8, "num_hidden_layers": 4, **size}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        transformers.CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, **processor}
    image_processor().__class__(**settings).save_pretrained(folder)
    return folder


def image_processor(folder: Path | None = None) -> Any:
    """The one of CLIP that needs no torchvision."""
    kind = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    return kind() if folder is None else kind.from_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def clip(folder: Path) -> losses.ClipEncoder:
    return losses.ClipEncoder(folder)


def pictures(count: int, height: int, width: int, rng: torch.Generator) -> tuple[Tensor, list[Any]]:
    """8-bit images in [0, 1] and the same for PIL."""
    pixels = torch.randint(0, 256, (count, height, width, 3), generator=rng, dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2) / 255, [Image.fromarray(one.numpy()) for one in pixels]


def by_transformers(folder: Path, pil: list[Any], text: list[str]) -> Tensor:
    """CLIPModel's own forward, logits (images, texts)."""
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    inputs = image_processor(folder)(images=pil, return_tensors="pt")
    with torch.no_grad():
        return model(**inputs, **tokenizer(text, padding=True, return_tensors="pt")).logits_per_image


def scale(folder: Path) -> float:
    return transformers.CLIPModel.from_pretrained(folder).logit_scale.exp().item()


# Preparation


@pytest.mark.parametrize("size", [(24, 24), (37, 61), (80, 50), (24, 40), (10, 13)])
@pytest.mark.parametrize("settings", ["shortest edge", "both sides", "bilinear", "resize larger than crop"])
def test_images_are_prepared_as_by_pil(
    size: tuple[int, int], settings: str, tmp_path: Path, rng: torch.Generator
) -> None:
    """PIL resizes floating-point pixels without rounding them, so that the comparison is exact."""
    options: dict[str, Any] = {
        "shortest edge": {},
        "both sides": {"size": {"height": SIDE, "width": SIDE}, "do_center_crop": False},
        "bilinear": {"resample": 2, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]},
        "resize larger than crop": {"size": {"shortest_edge": 30}},
    }[settings]
    processor = image_processor(tiny_clip(tmp_path, **options))
    images = torch.rand(2, 3, *size, generator=rng)
    pixels = losses.ClipEncoder(tmp_path).pixel_values(images)
    assert pixels.shape == (2, 3, SIDE, SIDE)

    height, width = size
    edge = options.get("size", {}).get("shortest_edge", SIDE)
    new = (int(edge * height / min(size)), int(edge * width / min(size)))
    if settings == "both sides":
        new = (SIDE, SIDE)
    top, left = (new[0] - SIDE) // 2, (new[1] - SIDE) // 2
    resample = Image.Resampling.BILINEAR if settings == "bilinear" else Image.Resampling.BICUBIC
    for image, ours in zip(images, pixels, strict=True):
        for c, plane in enumerate(image):
            resized = np.asarray(Image.fromarray(plane.numpy()).resize(new[::-1], resample))
            cropped = resized[top : top + SIDE, left : left + SIDE]
            expected = (cropped - processor.image_mean[c]) / processor.image_std[c]
            np.testing.assert_allclose(ours[c].numpy(), expected, atol=2e-5)


@pytest.mark.parametrize("size", [(24, 24), (24, 40), (60, 45)])
def test_images_are_prepared_as_by_the_processor(size: tuple[int, int], folder: Path, rng: torch.Generator) -> None:
    """The processor rounds to 8 bits after resizing: smooth pictures differ by less than one of 255 levels."""
    coarse = torch.rand(2, 3, 4, 4, generator=rng) * 0.8 + 0.1
    images = (nn.functional.interpolate(coarse, size, mode="bilinear") * 255).round() / 255
    pil = [Image.fromarray((image * 255).byte().movedim(0, -1).numpy()) for image in images]
    processor = image_processor(folder)
    expected = processor(images=pil, return_tensors="pt").pixel_values
    difference = (losses.ClipEncoder(folder).pixel_values(images) - expected).abs()
    levels = difference * 255 * torch.tensor(processor.image_std).view(1, 3, 1, 1)
    assert levels.max() < (1e-3 if size == (24, 24) else 1.01)


def test_configurations_of_older_files(tmp_path: Path, folder: Path) -> None:
    """One number for size and for crop, as in OpenAI's repositories."""
    tiny_clip(tmp_path)
    text = (
        '{"crop_size": 24, "do_center_crop": true, "do_normalize": true, "do_resize": true, "feature_extractor_type": '
        '"CLIPFeatureExtractor", "image_mean": [0.48145466, 0.4578275, 0.40821073], '
        '"image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3, "size": 24}'
    )
    (tmp_path / "preprocessor_config.json").write_text(text)
    images = torch.rand(1, 3, 30, 50)
    old, new = (losses.ClipEncoder(one).pixel_values(images) for one in (tmp_path, folder))
    assert torch.equal(old, new)


# CLIP


@pytest.mark.parametrize("kind", [losses.ClipTextSimilarity, losses.HPSv2, losses.PickScore])
def test_scores_of_clip_as_by_transformers(kind: Any, folder: Path, rng: torch.Generator) -> None:
    images, pil = pictures(4, SIDE, SIDE, rng)
    text = ["a cat", "dogs and more"]
    expected = by_transformers(folder, pil, text)
    if kind is not losses.PickScore:
        expected = expected / scale(folder)
    one = kind(folder, text[1])
    torch.testing.assert_close(one.score(images), expected[:, 1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one(images), -expected[:, 1].mean(), rtol=1e-4, atol=1e-5)
    paired = torch.stack([expected[i, i % 2] for i in range(4)])
    torch.testing.assert_close(kind(folder, text).score(images), paired, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one.score(images, text), paired, rtol=1e-4, atol=1e-5)
    assert expected.std() > 1e-2, "a constant would pass"


def test_hpsv2_fills_images_up_to_squares(folder: Path, rng: torch.Generator) -> None:
    similarity, hps = (kind(folder, "a cat") for kind in (losses.ClipTextSimilarity, losses.HPSv2))
    for height, width in ((20, 33), (33, 20)):
        images = torch.rand(2, 3, height, width, generator=rng)
        square = torch.zeros(2, 3, 33, 33)
        square[:, :, (33 - height) // 2 :, (33 - width) // 2 :][..., :height, :width] = images
        torch.testing.assert_close(hps.score(images), similarity.score(square))
        assert (hps.score(images) - similarity.score(images)).abs().max() > 1e-3


def test_texts_are_cut_to_what_the_model_takes(clip: losses.ClipEncoder) -> None:
    long = "abcdefghij klmnopqrstuvwxyz"
    assert torch.equal(clip.texts(long), clip.texts(long + " and more"))
    assert not torch.equal(clip.texts(long), clip.texts("x" + long))


@pytest.mark.parametrize("layer", [1, 3, 4])
def test_gram_style(layer: int, folder: Path, rng: torch.Generator) -> None:
    images = torch.rand(2, 3, SIDE, SIDE, generator=rng)
    reference = torch.rand(1, 3, 50, 70, generator=rng)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    clip = losses.ClipEncoder(folder)
    grams = []
    for batch in (images, reference):
        with torch.no_grad():
            states = model.vision_model(clip.pixel_values(batch), output_hidden_states=True).hidden_states
        patches = states[layer][:, 1:].double()
        grams.append(torch.einsum("bpc,bpd->bcd", patches, patches))
    have, want = grams
    expected = ((have - want) ** 2).mean((1, 2)).float()
    style = losses.ClipGramStyle(clip, reference, layer)
    torch.testing.assert_close(style.score(images), -expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(style(images), expected.mean(), rtol=1e-4, atol=1e-4)
    assert style(reference) < 1e-6 * style(images)
    assert len(clip.clip.vision_model.encoder.layers) == 4, "the shared model lost its blocks"
    assert losses.ClipGramStyle(folder, reference).score(images).shape == (2,)


# Every loss


def make_losses(clip: losses.ClipEncoder) -> dict[str, losses.Reward]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        head = {"weight": torch.randn(1, WIDTH), "bias": torch.full((1,), 5.0)}
        reference = torch.rand(1, 3, 30, 30)
    return {
        "text": losses.ClipTextSimilarity(clip, "a cat"),
        "style": losses.ClipGramStyle(clip, reference),
        "aesthetic": losses.AestheticScore(clip, head),
        "aesthetic to a target": losses.AestheticScore([clip, clip], [head, head], 10.0, [0.5, 1.5]),
        "pick": losses.PickScore(clip, "a cat"),
        "hps": losses.HPSv2(clip, ["a cat", "dog"]),
    }


NAMES = ["text", "style", "aesthetic", "aesthetic to a target", "pick", "hps"]


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str, clip: losses.ClipEncoder, rng: torch.Generator) -> None:
    loss = make_losses(clip)[name].double()
    images = torch.rand(2, 3, 26, 30, generator=rng, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(images.shape, generator=rng, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(loss(images), images)
    assert gradient.isfinite().all()
    assert (gradient.abs() > 0).float().mean() > 0.9
    step = 1e-6
    with torch.no_grad():
        slope = (loss(images + step * direction) - loss(images - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-9)
    assert all(p.grad is None and not p.requires_grad for p in loss.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_one_an_image(name: str, clip: losses.ClipEncoder, rng: torch.Generator) -> None:
    loss = make_losses(clip)[name]
    images = torch.rand(2, 3, 20, 20, generator=rng)
    scores = loss.score(images)
    assert scores.shape == (2,)
    assert scores.std() > 0
    if name != "hps":
        torch.testing.assert_close(torch.cat([loss.score(image[None]) for image in images]), scores)
    expected = -scores.mean() if "target" not in name else (scores.mean() - 10).abs()
    assert torch.equal(loss(images), expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("image_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_half_precision_models(
    name: str, dtype: torch.dtype, image_dtype: torch.dtype, folder: Path, rng: torch.Generator
) -> None:
    images = torch.rand(2, 3, 30, 30, generator=rng).to(image_dtype).requires_grad_()
    exact = make_losses(losses.ClipEncoder(folder))[name].score(images.detach().float())
    scores = make_losses(losses.ClipEncoder(folder))[name].to(dtype).score(images)
    assert scores.dtype == (torch.float64 if image_dtype == torch.float64 else torch.float32)
    tolerance = (0.15 if dtype == torch.bfloat16 else 0.03) * (exact.abs().max() if name == "style" else 1)
    if name == "pick":
        tolerance *= scale(folder)
    torch.testing.assert_close(scores.float(), exact, rtol=0, atol=float(tolerance))
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.dtype == image_dtype
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0


def test_large_gram_matrices_do_not_overflow_float16(clip: losses.ClipEncoder) -> None:
    """Nor under autocast: tokens of 150 in 9 patches make sums of 200,000."""
    with torch.no_grad():
        clip.clip.vision_model.encoder.layers[0].mlp.fc2.bias.fill_(150)
    images = torch.rand(1, 3, SIDE, SIDE)
    style = losses.ClipGramStyle(clip, torch.rand(1, 3, SIDE, SIDE), 1)
    tokens = style.tokens(images)
    assert (tokens.mT @ tokens).max() > 2 * 65504
    with torch.autocast("cpu", torch.float16):
        assert style(images).isfinite()
    assert style.half()(images).isfinite()


def test_a_score_rises_along_its_gradient(clip: losses.ClipEncoder, rng: torch.Generator) -> None:
    images = torch.rand(1, 3, 32, 32, generator=rng, requires_grad=True)
    for loss in make_losses(clip).values():
        if isinstance(loss, losses.HPSv2):
            continue
        value = loss(images)
        (gradient,) = torch.autograd.grad(value, images)
        with torch.no_grad():
            moved = images - 1e-3 * gradient / gradient.norm()
            assert loss(moved) < value
            assert loss.score(moved) > loss.score(images)


def test_losses_of_an_autocast_model(clip: losses.ClipEncoder, rng: torch.Generator) -> None:
    images = torch.rand(1, 3, 24, 24, generator=rng, requires_grad=True)
    for loss in make_losses(clip).values():
        if isinstance(loss, losses.HPSv2):
            continue
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(images)
        (gradient,) = torch.autograd.grad(value, images)
        assert value.dtype == torch.float32
        assert gradient.abs().sum() > 0


# Aesthetic scores


def test_aesthetic_score_of_two_heads(tmp_path: Path, rng: torch.Generator) -> None:
    folders = [tiny_clip(tmp_path / str(k), seed=k) for k in range(2)]
    files = [tmp_path / "head.pth", tmp_path / "head.safetensors"]
    images, pil = pictures(12, SIDE, SIDE, rng)
    expected = []
    for folder, middle in zip(folders, (5.0, 10.0), strict=True):
        model = transformers.CLIPModel.from_pretrained(folder).eval()
        head = nn.Linear(WIDTH, 1)
        with torch.no_grad():
            head.weight.normal_(std=3)
            pixels = image_processor(folder)(images=pil, return_tensors="pt").pixel_values
            features = model.visual_projection(model.vision_model(pixels).pooler_output)
            features = features / features.norm(dim=-1, keepdim=True)
            head.bias += middle - head(features).median()
            expected.append(head(features).clip(1, 10)[:, 0])
        (torch.save if len(expected) == 1 else save_file)(head.state_dict(), files[len(expected) - 1])
    assert 0 < (expected[1] == 10).sum() < 12, "some must be clipped"

    loss = losses.AestheticScore(folders, files, weights=(0.5, 1.5))
    combined = (0.5 * expected[0] + 1.5 * expected[1]) / 2
    torch.testing.assert_close(torch.stack(loss.scores(images)), torch.stack(expected), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss.score(images), combined, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss(images), -combined.mean(), rtol=1e-4, atol=1e-4)
    near = losses.AestheticScore(folders, files, 3.0, (0.5, 1.5))
    torch.testing.assert_close(near(images), (combined.mean() - 3).abs(), rtol=1e-4, atol=1e-4)
    single = losses.AestheticScore(folders[1], files[1])
    torch.testing.assert_close(single.score(images), expected[1], rtol=1e-4, atol=1e-4)


def test_linear_layers_in_a_row_are_one(clip: losses.ClipEncoder, rng: torch.Generator) -> None:
    """The form of LAION's predictor of version 2."""

    class Predictor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = [nn.Linear(WIDTH, 8), nn.Dropout(0.2), nn.Linear(8, 5), nn.Dropout(0.1), nn.Linear(5, 1)]
            self.layers = nn.Sequential(*sizes)

    predictor = Predictor().eval()
    with torch.no_grad():
        predictor.layers[4].bias.fill_(5)
    images = torch.rand(3, 3, 30, 30, generator=rng)
    expected = predictor.layers(clip.images(images)).clip(1, 10)[:, 0]
    score = losses.AestheticScore(clip, predictor.state_dict()).score(images)
    torch.testing.assert_close(score, expected, rtol=1e-5, atol=1e-5)


# Augmentation


def clone(generator: torch.Generator) -> torch.Generator:
    return torch.Generator().set_state(generator.get_state())


@pytest.mark.parametrize("shape", [(2, 3, 40, 30), (1, 3, 20, 50), (3, 1, 9, 9)])
def test_cutouts_are_averages_of_random_squares(shape: tuple[int, ...], rng: torch.Generator) -> None:
    """Each pixel of a view by its definition, a mean over a window of the square."""
    images, size, count = torch.rand(shape, generator=rng), 10, 5
    cutouts = losses.Cutouts(count, size, 0.3, rng)
    draws = torch.rand(count, 3, generator=clone(rng), dtype=torch.float64).numpy()
    views = cutouts(images)
    batch, channels, height, width = shape
    assert views.shape == (count * batch, channels, size, size)
    for k, (u, v, w) in enumerate(draws):
        most, least = min(height, width), min(height, width, size)
        side = int(u**0.3 * (most - least) + least)
        top, left = int(v * (height - side + 1)), int(w * (width - side + 1))
        square = images[..., top : top + side, left : left + side].numpy()
        assert square.shape[2:] == (side, side)
        expected = np.empty((batch, channels, size, size), np.float32)
        for i in range(size):
            for j in range(size):
                rows = slice(i * side // size, -((i + 1) * side // -size))
                columns = slice(j * side // size, -((j + 1) * side // -size))
                expected[..., i, j] = square[..., rows, columns].mean((2, 3))
        np.testing.assert_allclose(views[k * batch : (k + 1) * batch].numpy(), expected, atol=1e-6)


def test_cutouts_reach_everywhere_and_prefer_large_squares(rng: torch.Generator) -> None:
    """On a ramp the mean of a view is the square's middle, and its slope the square's side."""
    ramp = torch.arange(64.0).expand(1, 1, 64, 64)
    ramps = torch.cat([ramp, ramp.mT], 1)
    for power, mean in ((0.3, 16 + 48 / 1.3), (1.0, 16 + 48 / 2)):  # E u^p = 1 / (1 + p)
        views = losses.Cutouts(2000, 16, power, rng)(ramps)
        sides = (views[:, 0, 8, -1] - views[:, 0, 8, 0]) * 16 / 15
        assert sides.min() > 15
        assert sides.max() < 65
        assert sides.mean().item() == pytest.approx(mean, abs=1.5)
        middles = views.mean((2, 3))
        assert middles.mean(0).tolist() == pytest.approx([31.5, 31.5], abs=0.7)
        assert abs(torch.corrcoef(middles.T)[0, 1].item()) < 0.1, "both offsets must be drawn"
    small = middles[sides < 24]
    assert small.amin(0).max() < 14
    assert small.amax(0).min() > 50


AUGMENTATIONS: dict[str, Callable[[torch.Generator | None], nn.Module]] = {
    "cutouts": lambda generator: losses.Cutouts(3, 6, 0.3, generator),
    "color": lambda generator: losses.DiffAugment("color", generator),
    "translation": lambda generator: losses.DiffAugment("translation", generator),
    "resize": lambda generator: losses.DiffAugment("resize", generator),
    "cutout": lambda generator: losses.DiffAugment("cutout", generator),
    "all": lambda generator: losses.DiffAugment("color,translation,resize,cutout", generator),
}


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_augmentations_have_gradients_and_repeat_themselves(name: str, rng: torch.Generator) -> None:
    images = torch.rand(2, 3, 9, 11, generator=rng, dtype=torch.float64, requires_grad=True)
    make = AUGMENTATIONS[name]
    state = clone(rng)
    assert torch.autograd.gradcheck(lambda x: make(clone(state))(x), images)
    augment = make(clone(state))
    first, second = augment(images), augment(images)
    assert not torch.equal(first, second), "two calls must differ"
    again = make(clone(state))
    assert torch.equal(again(images), first)
    assert torch.equal(again(images), second)
    torch.testing.assert_close(make(clone(state))(images.float()), first.float(), rtol=1e-5, atol=1e-5)
    half = make(clone(state))(images.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), first, rtol=0, atol=0.05)
    torch.manual_seed(1)
    by_seed = make(None)(images)
    torch.manual_seed(1)
    assert torch.equal(make(None)(images), by_seed)


def test_colours_change_by_definition(rng: torch.Generator) -> None:
    images = torch.rand(4, 3, 5, 6, generator=rng, dtype=torch.float64)
    brightness, saturation, contrast = (
        torch.rand(4, generator=g, dtype=torch.float64).numpy() for g in [clone(rng)] for _ in range(3)
    )
    result = losses.DiffAugment("color", rng)(images)
    for b in range(4):
        x = images[b].numpy() * 2 - 1 + brightness[b] - 0.5
        grey = x.mean(0)
        x = (x - grey) * saturation[b] * 2 + grey
        x = (x - x.mean()) * (contrast[b] + 0.5) + x.mean()
        np.testing.assert_allclose(result[b].numpy(), x / 2 + 0.5, atol=1e-12)
    many = losses.DiffAugment("color", rng)(torch.full((4000, 3, 1, 1), 0.5))
    assert many.min() == pytest.approx(0.25, abs=0.002)
    assert many.max() == pytest.approx(0.75, abs=0.002)


def test_translation_shifts_by_up_to_an_eighth(rng: torch.Generator) -> None:
    images = torch.rand(300, 2, 16, 28, generator=rng)
    result = losses.DiffAugment("translation", rng)(images)
    seen = set()
    for image, moved in zip(images, result, strict=True):
        for dy in range(-2, 3):
            for dx in range(-4, 5):
                expected = torch.full_like(image, 0.5)
                target = expected[:, max(dy, 0) : 16 + min(dy, 0), max(dx, 0) : 28 + min(dx, 0)]
                target.copy_(image[:, max(-dy, 0) : 16 + min(-dy, 0), max(-dx, 0) : 28 + min(-dx, 0)])
                if torch.allclose(expected, moved, atol=1e-6):
                    seen.add((dy, dx))
    assert {dy for dy, _ in seen} == set(range(-2, 3))
    assert {dx for _, dx in seen} == set(range(-4, 5))
    assert len(seen) > 30


def test_cutout_greys_a_rectangle_of_half_of_either_side(rng: torch.Generator) -> None:
    images = torch.rand(400, 3, 10, 17, generator=rng) * 0.4
    result = losses.DiffAugment("cutout", rng)(images)
    grey = (result == 0.5).all(1)
    torch.testing.assert_close(result.movedim(1, -1)[~grey], images.movedim(1, -1)[~grey])
    sizes = set()
    corners = torch.zeros(10, 17, dtype=torch.bool)
    for mask in grey:
        rows, columns = mask.any(1), mask.any(0)
        assert torch.equal(mask, rows[:, None] & columns[None])
        at = columns.nonzero()[:, 0]
        assert len(at) == at[-1] - at[0] + 1
        sizes.add((int(rows.sum()), int(columns.sum())))
        corners |= mask
    # int(10 / 2 + 0.5) = 5 rows and int(17 / 2 + 0.5) = 9 columns, cut off where the middle is near an edge.
    assert max(h for h, _ in sizes) == 5
    assert max(w for _, w in sizes) == 9
    assert min(h for h, _ in sizes) == 3
    assert min(w for _, w in sizes) == 5
    assert corners.all()


def test_resize_keeps_the_middle(rng: torch.Generator) -> None:
    images = torch.rand(2, 3, 40, 20, generator=rng)
    smaller = larger = 0
    for _ in range(20):
        ratio = 0.8 + 0.4 * torch.rand(1, generator=clone(rng), dtype=torch.float64).item()
        result = losses.DiffAugment("resize", rng)(images)
        height, width = int(ratio * 40), int(ratio * 20)
        x = nn.functional.interpolate(images, (height, width), mode="bilinear")
        assert result.shape == images.shape
        if ratio < 1:
            top, left = (40 - height) // 2, (20 - width) // 2
            expected = torch.full_like(images, 0.5)
            expected[..., top : top + height, left : left + width] = x
            smaller += 1
        else:
            top, left = (height - 40) // 2, (width - 20) // 2
            expected = x[..., top : top + 40, left : left + 20]
            larger += 1
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-6)
    assert smaller > 2
    assert larger > 2


def test_texts_repeat_over_copies_and_cutouts(clip: losses.ClipEncoder, rng: torch.Generator) -> None:
    """Copies lie batch after batch, and so do cutouts: view i belongs to image i modulo the batch."""
    images = torch.rand(2, 3, 30, 30, generator=rng)
    loss = losses.ClipTextSimilarity(clip, ["a cat", "dog"])
    torch.testing.assert_close(loss.score(images.repeat(3, 1, 1, 1)), loss.score(images).repeat(3))
    views = losses.Cutouts(3, 30, 1.0, rng)(images)  # no smaller than the images: they themselves
    torch.testing.assert_close(loss.score(views), loss.score(images).repeat(3), rtol=1e-4, atol=1e-5)


# Metrics of pyiqa


class StandInMetric(nn.Module):
    """What pyiqa's InferenceModel does, for a metric that is the mean of the image or of its difference."""

    def __init__(self, name: str, as_loss: bool, loss_reduction: str, device: str) -> None:
        super().__init__()
        self.lower_better, self.metric_mode = name == "difference", "FR" if name == "difference" else "NR"
        assert (as_loss, loss_reduction, device) == (True, "none", "cpu")
        self.weight = nn.Parameter(torch.ones(()))
        self.name = name

    def forward(self, target: Tensor, ref: Tensor | None = None) -> Tensor:
        with torch.set_grad_enabled(True):
            if self.name == "whole":
                return target.mean()
            value = self.weight * (target if ref is None else (target - ref).abs()).flatten(1).mean(1, keepdim=True)
            return value.detach() if self.name == "counted" else value


@pytest.fixture
def pyiqa(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("pyiqa")
    module.list_models = lambda: ["mean", "difference", "whole", "counted"]
    module.create_metric = StandInMetric
    monkeypatch.setitem(sys.modules, "pyiqa", module)


@pytest.mark.usefixtures("pyiqa")
def test_metrics_are_higher_for_better_images(rng: torch.Generator) -> None:
    images = torch.rand(2, 3, 8, 8, generator=rng, requires_grad=True)
    reference = torch.rand(1, 3, 8, 8, generator=rng)
    mean = losses.IQAMetric("mean")
    torch.testing.assert_close(mean.score(images), images.mean((1, 2, 3)))
    torch.testing.assert_close(mean(images), -images.mean())
    difference = losses.IQAMetric("difference", reference)
    torch.testing.assert_close(difference.score(images), -(images - reference).abs().mean((1, 2, 3)))
    (gradient,) = torch.autograd.grad(difference(images), images)
    torch.testing.assert_close(gradient, (images - reference).sign() / images.numel())
    with torch.no_grad():
        assert not mean.score(images).requires_grad
    assert not any(p.requires_grad for p in mean.parameters())


@pytest.mark.usefixtures("pyiqa")
def test_metrics_that_cannot_be() -> None:
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"name must be one of 'mean', .*got 'nothing'"):
        losses.IQAMetric("nothing")
    with pytest.raises(ValueError, match="reference must be an image for difference, got None"):
        losses.IQAMetric("difference")
    with pytest.raises(ValueError, match="reference must be None for mean, got Tensor"):
        losses.IQAMetric("mean", images)
    with pytest.raises(ValueError, match="images must be as many as references, 3, got 2"):
        losses.IQAMetric("difference", torch.rand(3, 3, 8, 8)).score(images)
    with pytest.raises(ValueError, match="one number an image, got 'whole'"):
        losses.IQAMetric("whole").score(images)
    with pytest.raises(ValueError, match="with a gradient, got 'counted'"):
        losses.IQAMetric("counted").score(images)


# Errors


def test_missing_packages(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("transformers", "pyiqa"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"needs transformers.*pip install 'sdo-swformer-fast\[losses\]'"):
        losses.ClipTextSimilarity(folder, "a cat")
    with pytest.raises(ImportError, match=r"IQAMetric needs pyiqa.*pip install pyiqa"):
        losses.IQAMetric("musiq")


def test_import_loads_no_transformers() -> None:
    code = "import sys, sdo_fast.losses; assert not {'transformers', 'safetensors', 'pyiqa'} & set(sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_models_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model must be the folder.*got '.*nowhere'"):
        losses.ClipTextSimilarity(tmp_path / "nowhere", "a cat")
    with pytest.raises(ValueError, match=r"model must be the folder.*a folder without all it needs"):
        losses.ClipTextSimilarity(tmp_path, "a cat")
    with pytest.raises(TypeError, match="model must be a ClipEncoder, a folder or an id on the Hub, got int"):
        losses.ClipTextSimilarity(3, "a cat")
    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    config.save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"model must be a CLIP model \(model_type 'clip'\), got .* of type 'vit'"):
        losses.ClipTextSimilarity(tmp_path / "vit", "a cat")
    model = transformers.CLIPModel.from_pretrained(folder)
    model.save_pretrained(tmp_path / "alone")
    with pytest.raises(ValueError, match="processor must be the folder"):
        losses.ClipTextSimilarity(tmp_path / "alone", "a cat")
    assert losses.PickScore(tmp_path / "alone", "a cat", processor=folder).score(torch.rand(1, 3, 9, 9)).shape == (1,)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"resample": 0}, "resample by 2 .* or 3 .*, got 0"),
        ({"size": {"longest_edge": 24}}, "size of shortest_edge"),
        ({"image_mean": [0.5]}, "image_mean of 3 numbers"),
    ],
)
def test_processors_that_cannot_be(settings: dict[str, Any], match: str) -> None:
    config = {"size": 24, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, **settings}
    with pytest.raises(ValueError, match=match):
        losses.preparation.preparation_of(config)


def test_images_that_cannot_be(clip: losses.ClipEncoder) -> None:
    for loss in make_losses(clip).values():
        for images in (torch.rand(2, 1, 8, 8), torch.rand(3, 8, 8), torch.rand(0, 3, 8, 8)):
            with pytest.raises(ValueError, match=r"images must have shape \(B, 3, H, W\), got"):
                loss(images)
        with pytest.raises(TypeError, match="images must have dtype"):
            loss(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="images must be a multiple of the 2 texts, got 3"):
        losses.HPSv2(clip, ["a", "b"]).score(torch.rand(3, 3, 8, 8))
    crop = losses.preparation.Preparation(None, "bicubic", (24, 24), [0.0] * 3, [1.0] * 3)
    with pytest.raises(ValueError, match="at least 24 x 24 before they are cropped, got 8 x 30"):
        crop(torch.rand(1, 3, 8, 30))
    with pytest.raises(ValueError, match="reference_image must have shape"):
        losses.ClipGramStyle(clip, torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match="reference_image must be one"):
        losses.ClipGramStyle(clip, torch.rand(2, 3, 8, 8))
    for layer in (0, 5, 1.5):
        with pytest.raises(ValueError, match="layer must be an integer from 1 to 4"):
            losses.ClipGramStyle(clip, torch.rand(1, 3, 8, 8), layer)
    for text in ((), [3], None):
        with pytest.raises(TypeError, match="text must be a string"):
            losses.ClipTextSimilarity(clip, text)


def test_heads_that_cannot_be(clip: losses.ClipEncoder, tmp_path: Path) -> None:
    good = {"weight": torch.ones(1, WIDTH), "bias": torch.ones(1)}
    for head, match in (
        (tmp_path / "none.pth", "head must be a file, got"),
        ({"weight": torch.ones(1, WIDTH)}, "head must be linear layers"),
        ({"weight": torch.ones(2, WIDTH), "bias": torch.ones(2)}, "head must be linear layers"),
        ({**good, "scale": torch.ones(1)}, "head must be a linear layer's weight and bias"),
        ({}, "head must be a linear layer's weight and bias, got nothing"),
        ({"weight": torch.ones(1, 7), "bias": torch.ones(1)}, r"shape \(1, 12\) for its model, got \(1, 7\)"),
    ):
        with pytest.raises(ValueError, match=match):
            losses.AestheticScore(clip, head)
    with pytest.raises(TypeError, match="head must be a file or a mapping of tensors, got int"):
        losses.AestheticScore(clip, 3)
    with pytest.raises(ValueError, match="head must hold one for each of 2 models, got 1"):
        losses.AestheticScore([clip, clip], good)
    with pytest.raises(ValueError, match="weights must hold one for each of 1 models, got 2"):
        losses.AestheticScore(clip, good, weights=[1, 2])


def test_augmentations_that_cannot_be() -> None:
    for options, match in (
        ({"count": 0}, "count must be a positive integer"),
        ({"size": 1.5}, "size must be a positive integer"),
        ({"power": -1}, "power must be a finite number, 0 or more"),
    ):
        with pytest.raises(ValueError, match=match):
            losses.Cutouts(**options)
    for policy in ("", "colour", "color, cutout", None):
        with pytest.raises(ValueError, match="policy must be names out of color, translation, resize, cutout"):
            losses.DiffAugment(policy)
    for make in (losses.Cutouts, losses.DiffAugment):
        with pytest.raises(TypeError, match=r"generator must be a torch.Generator or None, got int"):
            make(generator=3)
        with pytest.raises(ValueError, match=r"images must have shape \(B, C, H, W\)"):
            make()(torch.rand(3, 8, 8))
