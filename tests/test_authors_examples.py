"""The recipes of SDO's authors on tiny models of random weights, and their settings."""

from __future__ import annotations

import argparse
import re
import signal
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from sdo_models import tiny_stable_diffusion, tiny_unet

for package in ("diffusers", "matplotlib", "peft", "PIL", "safetensors", "skimage", "sklearn", "tqdm", "transformers"):
    pytest.importorskip(package)

import authors
import authors_aesthetic
import authors_style
import authors_text
import diffusers
from matplotlib.image import imread
from PIL import Image
from test_sdo_losses import WIDTH, tiny_clip
from torch import Tensor

from sdo_fast import from_pipeline, invert, losses
from sdo_fast.reference import path_loop


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pipelines, two CLIP models with heads, and a picture."""
    folder = tmp_path_factory.mktemp("models")
    tiny_stable_diffusion().save_pretrained(folder / "sd")
    unet = tiny_unet(in_channels=3, out_channels=6, num_class_embeds=None)
    unet.save_pretrained(folder / "unet")
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(folder / "ddpm")
    for k in range(2):
        tiny_clip(folder / f"clip{k}", seed=k)
        generator = torch.Generator().manual_seed(k)
        head = {"weight": 5 * torch.randn(1, WIDTH, generator=generator), "bias": torch.full((1,), 5.0)}
        torch.save(head, folder / f"head{k}.pth")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder


def options(script: ModuleType, models: Path) -> list[str]:
    shared = ["--input_image", str(models / "picture.png"), "--device", "cpu"]
    clip, heads = [str(models / "clip0"), str(models / "clip1")], [str(models / "head0.pth"), str(models / "head1.pth")]
    if script is authors_aesthetic:
        return [*shared, "--model_path", str(models / "sd"), "--clip_model", *clip, "--heads", *heads]
    model = models / ("sd" if script is authors_style else "unet")
    return [*shared, "--model_path", str(model), "--clip_model", clip[0], "--prompt", "a cat"]


def reported(output: str) -> tuple[float, float]:
    ((before, after),) = re.findall(r"iterations, loss: ([-.\d]+) -> ([-.\d]+)", output)
    return float(before), float(after)


SCRIPTS = {"style": authors_style, "text": authors_text, "aesthetic": authors_aesthetic}


@pytest.mark.parametrize("name", SCRIPTS)
def test_quick(name: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert SCRIPTS[name].main(["--quick", *options(SCRIPTS[name], models), "--out", str(tmp_path / "new")]) == 0
    before, after = reported(capsys.readouterr().out)
    assert before != after
    count = 7 if name == "text" else 4
    pictures = {f"rec_img_{k}.png" for k in range(count)}
    assert {file.name for file in (tmp_path / "new").iterdir()} == {*pictures, "gt.png", "loss.png"}
    side = 8 if name == "text" else 16
    first, last = (imread(tmp_path / "new" / f"rec_img_{k}.png") for k in (0, count - 1))
    assert first.shape == (side, side, 3)
    assert first.std() > 0
    assert (first != last).any()
    assert min(imread(tmp_path / "new" / "loss.png").shape[:2]) > 300


@pytest.mark.parametrize("name", ["style", "aesthetic"])
def test_loss_falls(name: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--optim_steps", "15", "--lr", "0.05", "--every", "10", "--quick", "--out", str(tmp_path)]
    assert SCRIPTS[name].main([*options(SCRIPTS[name], models), *argv]) == 0
    before, after = reported(capsys.readouterr().out)
    assert after < before
    assert {file.name for file in tmp_path.glob("rec*")} == {"rec_img_0.png", "rec_img_10.png"}


@pytest.mark.parametrize("model", ["unet", "ddpm"])
def test_text_follows_the_picture_and_then_the_text(model: str, models: Path, tmp_path: Path) -> None:
    argv = [*options(authors_text, models), "--model_path", str(models / model), "--lr", "0.05"]
    argv += ["--custom_steps", "4", "--guidance_steps", "12", "--alpha_warmup_steps", "8", "--out", str(tmp_path)]
    diaries: list[authors.Diary] = []

    class Kept(authors.Diary):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]
            diaries.append(self)

    def unchanged(policy: str, generator: torch.Generator) -> Callable[[Tensor], Tensor]:
        assert policy == "color,translation,resize,cutout"
        return lambda images: images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authors_text, "Diary", Kept)
        patch.setattr(authors_text, "DiffAugment", unchanged)
        assert authors_text.main(argv) == 0
    (diary,) = diaries
    reference = authors.load_square(models / "picture.png", 8)
    text = losses.ClipTextSimilarity(models / "clip0", "a cat")
    distances = []
    for k, loss in enumerate(diary.losses):
        image = torch.tensor(imread(tmp_path / f"rec_img_{k}.png")).permute(2, 0, 1)[None]
        distances.append(2 * (image - reference).abs().mean().item())
        share = 0.0 if k < 8 else 0.5
        expected = share * text(image).item() + (1 - share) * distances[k]
        assert loss == pytest.approx(expected, abs=2 / 255)
    assert abs(text(image).item() - distances[-1]) > 0.1, "the two terms are alike"
    assert distances[7] < distances[0]


def test_settings_are_the_authors() -> None:
    seen: dict[str, argparse.Namespace] = {}
    with pytest.MonkeyPatch.context() as patch:
        for name, script in SCRIPTS.items():
            patch.setattr(script, "run", lambda args, name=name: seen.update({name: args}))
            needed = ["--input_image", "a.png", *(["--model_path", "unet"] if name == "text" else [])]
            script.main(needed)
    for args in seen.values():
        assert (args.custom_steps, args.lr, args.eta, args.seed) == (50, 0.01, 0.0, 42)
    style, text, aesthetic = seen["style"], seen["text"], seen["aesthetic"]
    assert (style.pre_steps, style.optim_steps, style.guidance_scale, style.layer) == (45, 200, 5.0, 3)
    assert (text.guidance_steps, text.alpha_warmup_steps, text.alpha_after, text.copies) == (200, 150, 0.5, 20)
    assert (aesthetic.pre_steps, aesthetic.optim_steps, aesthetic.aesthetic_target) == (10, 100, 10.0)
    assert aesthetic.cutouts == 16
    assert (authors.BETAS, authors_aesthetic.WEIGHTS) == ((0.9, 0.9), (0.5, 1.5))
    assert [authors_text.alpha(k, text) for k in (0, 149, 150, 200)] == [0, 0, 0.5, 0.5]


def test_scheduler_is_the_authors(models: Path) -> None:
    pipe = authors.stable_diffusion(argparse.Namespace(model_path=models / "sd", device="cpu"))
    config = pipe.scheduler.config
    assert (config.beta_start, config.beta_end, config.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert (config.clip_sample, config.set_alpha_to_one, config.steps_offset) == (False, False, 0)
    assert not any(p.requires_grad for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())


def test_optimisation_is_the_authors_loop(models: Path) -> None:
    """Two iterations against the plain loop of the reference with Adam."""
    args = argparse.Namespace(model_path=models / "sd", device="cpu", eta=0.0, lr=0.01, optim_steps=2)
    pipe = authors.stable_diffusion(args)
    sampler = from_pipeline(
        pipe, "a cat", 6, start=4, guidance_scale=5.0, step_kwargs=authors.ddim_arguments(args), negative_prompt=""
    )
    noise = sampler.prepare_latents(torch.Generator().manual_seed(42))
    latents = sampler.warm_up(noise)
    target = torch.rand(1, 3, 16, 16)

    def loss_fn(image: Tensor) -> Tensor:
        return (image - target).square().mean()

    z = latents.clone().requires_grad_()
    adam = torch.optim.Adam([z], lr=0.01, betas=(0.9, 0.9))
    cond, uncond = sampler.conditions
    for _ in range(2):
        x0 = path_loop(
            pipe.unet, pipe.scheduler, z, 6, 4, guidance_scale=5.0, model_kwargs=cond, uncond_kwargs=uncond,
            step_kwargs=authors.ddim_arguments(args),
        )  # fmt: skip
        image = (pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        adam.zero_grad()
        loss_fn(image).backward()
        adam.step()
    diary = authors.Diary(Path("nowhere"), 10**9)
    diary.write = lambda name, image: None  # type: ignore[method-assign]
    found = authors.optimise_scaled(lambda z: sampler.decode(sampler(z)), latents, loss_fn, args, diary)
    torch.testing.assert_close(found, z.detach(), rtol=1e-4, atol=1e-5)
    assert (found - latents).abs().max() > 0.015
    assert len(diary.losses) == 3


@pytest.mark.parametrize("name", ["style", "aesthetic"])
def test_as_on_a_gpu(
    name: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The float16 models, autocast and the scaler of a GPU, on the CPU."""
    scales = []
    update = torch.amp.GradScaler.update

    def recorded(self: torch.amp.GradScaler) -> None:
        scales.append(self.get_scale())
        update(self)

    monkeypatch.setattr(authors, "on_gpu", lambda args: True)
    monkeypatch.setattr(torch.amp.GradScaler, "update", recorded)
    argv = ["--quick", "--optim_steps", "12", "--lr", "0.05", "--out", str(tmp_path)]
    SCRIPTS[name].main([*options(SCRIPTS[name], models), *argv])
    before, after = reported(capsys.readouterr().out)
    assert after < before
    assert len(scales) == 12
    assert scales[0] > 1


def test_inversion_is_the_authors(models: Path) -> None:
    """The first steps of DDIMInverseScheduler: the last ones of the sampler's schedule."""
    pipe = authors.stable_diffusion(argparse.Namespace(model_path=models / "sd", device="cpu"))
    sampler = from_pipeline(pipe, "", 50, start=10)
    x = x0 = torch.randn(1, 4, 8, 8)
    inverse = diffusers.DDIMInverseScheduler.from_config(pipe.scheduler.config)
    inverse.set_timesteps(50)
    (cond, _) = sampler.conditions
    with torch.no_grad():
        for t in inverse.timesteps[:10]:
            x = inverse.step(pipe.unet(x, t, **cond).sample, t, x).prev_sample
    torch.testing.assert_close(invert(sampler, x0, 40).latents, x, rtol=1e-4, atol=1e-4)
    assert inverse.timesteps[9] == 180
    assert (sampler.timesteps[40], sampler.timesteps[10]) == (180, 780)


def test_inversion_to_the_start(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shared = [*options(authors_aesthetic, models), "--quick", "--optim_steps", "1"]
    firsts = []
    for name, more in (("authors", []), ("start", ["--invert_to_start"])):
        authors_aesthetic.main([*shared, *more, "--out", str(tmp_path / name)])
        firsts.append(imread(tmp_path / name / "rec_img_0.png"))
    steps = re.findall(r"inversion up to step (\d+): [.\d]+% away", capsys.readouterr().out)
    assert steps == ["4", "1"]
    assert (firsts[0] != firsts[1]).any()


def test_runs_repeat_themselves(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for script in (authors_text, authors_aesthetic):
        seen = []
        for seed in ("1", "1", "2"):
            argv = ["--quick", "--seed", seed, "--every", "9", "--out", str(tmp_path)]
            script.main([*options(script, models), *argv])
            seen.append(reported(capsys.readouterr().out))
        assert seen[0] == seen[1] != seen[2]


def test_interrupted(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What was done until then is drawn."""
    write = authors.Diary.write

    def interrupting(self: authors.Diary, name: str, image: Tensor) -> None:
        write(self, name, image)
        if name == "rec_img_1.png":
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(authors.Diary, "write", interrupting)
        authors_style.main([*options(authors_style, models), "--quick", "--out", str(tmp_path)])
    assert "style: 0 iterations" in capsys.readouterr().out
    assert (tmp_path / "loss.png").exists()
    assert not (tmp_path / "rec_img_2.png").exists()


def test_pictures_are_cut_to_squares(tmp_path: Path) -> None:
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = (255, 128, 0)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    image = authors.load_square(tmp_path / "wide.png", 10)
    torch.testing.assert_close(image, torch.tensor([1, 128 / 255, 0]).view(1, 3, 1, 1).expand(1, 3, 10, 10))
