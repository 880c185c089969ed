"""Train a small SWFormer to undo one of the ten degradations: about ten minutes on one core.

    python examples/train_restore.py --task rain_streaks

The photographs are those that scikit-image and scikit-learn bring along; three are never trained on and measure the
result. Interrupt it at any time with Ctrl-C: the state is saved, and the same command goes on where it stopped, bit for
bit as if it had never stopped. The finished weights (fp16) and their quality are written to and read back from `--out`.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
import torch.nn.functional as F
from degradations import DEGRADATIONS, degrade
from restore import PRESET, load_model, quality, weights_file
from runs import OUTPUT, delayed_interrupt, write_atomically
from safetensors.torch import save_file
from sklearn.datasets import load_sample_image
from torch import Generator, Tensor, nn
from tqdm import tqdm

import swformer_fast as sf

EPOCH = 100
"""Steps after which every photograph is degraded anew and the state is saved."""
WINDOW = 512
HELD_OUT_SEEDS = range(1_000_000, 1_000_004)


@cache
def photographs(split: str) -> dict[str, Tensor]:
    """The clean photographs of "train" or "test" by name, (3, H, W) in [0, 1]."""
    if split == "test":
        arrays = {
            "chelsea": skimage.data.chelsea(),
            "coffee": skimage.data.coffee(),
            "china": load_sample_image("china.jpg"),
        }
    elif split == "train":
        names = (
            "astronaut",
            "brick",
            "camera",
            "coins",
            "grass",
            "gravel",
            "hubble_deep_field",
            "immunohistochemistry",
        )
        names += ("moon", "retina", "rocket")
        left, right, _ = skimage.data.stereo_motorcycle()
        arrays = {name: getattr(skimage.data, name)() for name in names}
        arrays |= {"motorcycle_left": left, "motorcycle_right": right, "flower": load_sample_image("flower.jpg")}
    else:
        raise ValueError(f'split must be "train" or "test", got {split!r}')
    return {
        name: torch.from_numpy(np.atleast_3d(array).astype(np.float32) / 255).permute(2, 0, 1).expand(3, -1, -1)
        for name, array in arrays.items()
    }


def window(image: Tensor, generator: Generator) -> Tensor:
    """A random view: scaled by 0.5 to 1, a window of at most WINDOW pixels a side, mirrored half of the time."""
    scale = 0.5 + 0.5 * torch.rand((), generator=generator).item()
    sides = [max(1, round(side * scale)) for side in image.shape[1:]]
    image = F.interpolate(image[None], sides, mode="bicubic", antialias=True)[0].clamp(0, 1)
    return random_crop(image, generator, *(min(side, WINDOW) for side in sides))


def random_crop(image: Tensor, generator: Generator, height: int, width: int) -> Tensor:
    """A window at a random place, mirrored half of the time."""
    top, left = (
        int(torch.randint(side - size + 1, (), generator=generator))
        for side, size in zip(image.shape[1:], (height, width), strict=True)
    )
    image = image[:, top : top + height, left : left + width]
    return image.flip(2) if torch.rand((), generator=generator) < 0.5 else image


def scenes(task: str, seed: int) -> list[Tensor]:
    """A random view of every training photograph and its degradation, (6, H, W) each: degraded, then clean."""
    generator = Generator().manual_seed(seed)
    views = [window(photograph, generator) for photograph in photographs("train").values()]
    return [torch.cat((degrade(view, task, seed * 1009 + i), view)) for i, view in enumerate(views)]


def batch_of(views: Sequence[Tensor], batch: int, crop: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random crops of random views: degraded and clean, (batch, 3, crop, crop) each."""
    generator = Generator().manual_seed(seed)
    chosen = torch.randint(len(views), (batch,), generator=generator).tolist()
    crops = torch.stack([random_crop(views[i], generator, crop, crop) for i in chosen])
    return crops[:, :3].contiguous(), crops[:, 3:].contiguous()


def loss_fn(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """L1 of the pixels and 0.1 times L1 of the spectrum, at every scale."""
    terms = []
    for output, target in zip(outputs, targets, strict=True):
        error = output - target
        terms.append(error.abs().mean() + 0.1 * torch.view_as_real(torch.fft.rfft2(error)).abs().mean())
    return torch.stack(terms).sum()


def train(
    task: str, network: type[nn.Module], steps: int, *, batch: int, crop: int, lr: float, seed: int, checkpoint: Path
) -> nn.Module | None:
    """Train from ``checkpoint`` if it exists; return the model, or None if interrupted (and saved).

    The random numbers of step i depend on (seed, i) alone, so an interrupted run and a whole one see the same batches.
    """
    settings = {"task": task, "network": network.__module__, "steps": steps, "batch": batch, "crop": crop, "lr": lr}
    settings["seed"] = seed
    torch.manual_seed(seed)
    model = network.from_preset(PRESET)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps, eta_min=lr / 1000)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "schedule": schedule}

    start, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{checkpoint} was made with {state['settings']}, this run has {settings}; remove the file"
            )
        start, seconds = state["step"], state["seconds"]
        for key, part in parts.items():
            part.load_state_dict(state[key])

    def save(step: int) -> None:
        state = {"settings": settings, "step": step, "seconds": seconds + time.perf_counter() - begin}
        state |= {key: part.state_dict() for key, part in parts.items()}
        write_atomically(checkpoint, lambda path: torch.save(state, path))

    begin = time.perf_counter()
    views: list[Tensor] = []
    with delayed_interrupt() as interrupted, tqdm(total=steps, initial=start, desc=task, mininterval=1) as bar:
        for step in range(start, steps):
            if not views or step % EPOCH == 0:
                views = scenes(task, seed * 1_000_003 + step // EPOCH)
            degraded, clean = batch_of(views, batch, crop, seed * 1_000_003 + step)
            loss = loss_fn(model(degraded, all_scales=True), model.image_pyramid(clean))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            if interrupted() or (step + 1) % EPOCH == 0 or step + 1 == steps:
                save(step + 1)
            if interrupted():
                return None
    print(f"{steps} steps in {seconds + time.perf_counter() - begin:.0f} s")
    return model.eval()


def export(model: nn.Module, path: Path) -> None:
    """Write the weights in half precision."""
    state = {name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()}
    write_atomically(path, lambda partial: save_file(state, partial))


def measure(model: nn.Module, task: str) -> dict[str, np.ndarray]:
    """(degraded PSNR, degraded SSIM, restored PSNR, restored SSIM) of each held-out photograph, mean over the seeds."""
    table: dict[str, np.ndarray] = {}
    pairs = list(itertools.product(photographs("test").items(), HELD_OUT_SEEDS))
    for (name, clean), seed in tqdm(pairs, desc="held-out photographs", leave=False):
        degraded = degrade(clean, task, seed)
        with torch.no_grad():
            restored = model(degraded[None])[0]
        row = np.array([*quality(degraded, clean), *quality(restored, clean)])
        table[name] = table.get(name, 0) + row / len(HELD_OUT_SEEDS)
    return table


def report(table: dict[str, np.ndarray]) -> str:
    """The table and its mean as Markdown."""
    lines = ["| photograph | degraded PSNR / SSIM | restored PSNR / SSIM | gain |", "| --- | --- | --- | --- |"]
    for name, (psnr, ssim, better_psnr, better_ssim) in {**table, "mean": np.mean([*table.values()], axis=0)}.items():
        gain = f"{better_psnr - psnr:+.2f} dB"
        lines.append(f"| {name} | {psnr:.2f} dB / {ssim:.3f} | {better_psnr:.2f} dB / {better_ssim:.3f} | {gain} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=DEGRADATIONS, required=True, help="degradation to undo")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder of weights and checkpoints (%(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="crops a step (%(default)s)")
    parser.add_argument("--crop", type=int, default=64, help="side of the crops (%(default)s)")
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate at the start of the cosine (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and degradations (%(default)s)")
    parser.add_argument("--reference", action="store_true", help="train the plain PyTorch modules, to compare the time")
    args = parser.parse_args(argv)

    checkpoint = args.out / f"restore_{args.task}.checkpoint"
    model = train(
        args.task,
        sf.reference.SWFormer if args.reference else sf.SWFormer,
        args.steps,
        batch=args.batch,
        crop=args.crop,
        lr=args.lr,
        seed=args.seed,
        checkpoint=checkpoint,
    )
    if model is None:
        print(f"interrupted; saved in {checkpoint}. The same command goes on from there.")
        return 130
    weights = args.out / weights_file(args.task)
    export(model, weights)
    print(report(measure(load_model(weights), args.task)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
