"""Train the digits UNet and classifier from scratch: about seven minutes on two cores.

    python examples/train_digits.py

Interrupt it at any time with Ctrl-C: the state is saved, and the same command goes on where it stopped, bit for bit as
if it had never stopped. The finished weights (fp16) and their quality are written to and read back from ``--out``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from digits_model import (
    CLASSIFIER_FILE,
    NULL_LABEL,
    UNET_FILE,
    digits,
    digits_classifier,
    digits_unet,
    load_digits_classifier,
    load_digits_unet,
    sample,
    scheduler,
)
from runs import OUTPUT, delayed_interrupt, write_atomically
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


def unet_loss(unet: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Noise prediction error at B spread timesteps, with 15 % of the labels dropped for guidance."""
    batch = len(images)
    noise = torch.randn(images.shape, generator=generator)
    t = ((torch.arange(batch) + torch.rand(1, generator=generator)) * (1000 / batch)).long()
    dropped = torch.rand(batch, generator=generator) < 0.15
    noisy = scheduler().add_noise(images, noise, t)
    predicted = unet(noisy, t, class_labels=torch.where(dropped, NULL_LABEL, labels)).sample
    return nn.functional.mse_loss(predicted, noise)


def classifier_loss(classifier: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Cross-entropy on images moved by up to one pixel, with noise of a random strength.

    The noise makes the gradient towards a class one of strokes and not of single pixels, as a reward needs it.
    """
    dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
    strength = torch.rand(len(images), 1, 1, 1, generator=generator)
    images = (images.roll((dy, dx), (2, 3)) + strength * torch.randn(images.shape, generator=generator)).clamp(-1, 1)
    return nn.functional.cross_entropy(classifier(images), labels, label_smoothing=0.02)


def train(
    name: str, make: Callable[[], nn.Module], loss_fn: Loss, steps: int, *, batch: int, seed: int, checkpoint: Path
) -> nn.Module | None:
    """Train from ``checkpoint`` if it exists; return the averaged model, or None if interrupted (and saved).

    The random numbers of step i depend on (seed, i) alone, so an interrupted run and a whole one see the same batches.
    """
    settings = {"name": name, "steps": steps, "batch": batch, "seed": seed}
    torch.manual_seed(seed)
    model = make()
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1, cycle_momentum=False
    )
    parts: dict[str, Any] = {"model": model, "averaged": averaged, "optimizer": optimizer, "schedule": schedule}

    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["settings"] != settings:
            raise ValueError(
                f"{checkpoint} was made with {state['settings']}, this run has {settings}; remove the file"
            )
        start = state["step"]
        for key, part in parts.items():
            part.load_state_dict(state[key])

    def save(step: int) -> None:
        state = {"settings": settings, "step": step, **{key: part.state_dict() for key, part in parts.items()}}
        write_atomically(checkpoint, lambda path: torch.save(state, path))

    images, labels = digits("train")
    generator = torch.Generator()
    with delayed_interrupt() as interrupted, tqdm(total=steps, initial=start, desc=name, mininterval=1) as bar:
        for step in range(start, steps):
            generator.manual_seed(seed * 1_000_003 + step)
            torch.manual_seed(seed * 1_000_003 + step)  # dropout draws from the default generator
            index = torch.randint(len(images), (batch,), generator=generator)
            loss = loss_fn(model, images[index], labels[index], generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            averaged.update_parameters(model)
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
            if interrupted() or (step + 1) % 100 == 0 or step + 1 == steps:
                save(step + 1)
            if interrupted():
                return None
    return averaged.module.eval()


def export(model: nn.Module, path: Path) -> None:
    half = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, lambda partial: save_file(half, partial))


def classifier_accuracy(classifier: nn.Module) -> float:
    """Share of the held-out digits that are classified as their label."""
    images, labels = digits("test")
    with torch.no_grad():
        return (classifier(images).argmax(1) == labels).float().mean().item()


def sample_accuracy(unet: nn.Module, classifier: nn.Module, per_class: int = 20, seed: int = 0) -> float:
    """Share of samples (guidance 3, 50 DDIM steps) that the classifier gives their class with probability > 0.9."""
    labels = torch.arange(10).repeat(per_class)
    images = sample(unet, labels, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        probability = classifier(images.clamp(-1, 1)).softmax(1).gather(1, labels[:, None])
    return (probability > 0.9).float().mean().item()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder of weights and checkpoints (%(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of the UNet (%(default)s)")
    parser.add_argument("--classifier-steps", type=int, default=600, help="and of the classifier (%(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="images a step (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and noise (%(default)s)")
    args = parser.parse_args(argv)

    for name, make, loss_fn, steps, file in (
        ("classifier", digits_classifier, classifier_loss, args.classifier_steps, CLASSIFIER_FILE),
        ("unet", digits_unet, unet_loss, args.steps, UNET_FILE),
    ):
        checkpoint = args.out / f"{name}.checkpoint"
        model = train(name, make, loss_fn, steps, batch=args.batch, seed=args.seed, checkpoint=checkpoint)
        if model is None:
            print(f"interrupted; saved in {checkpoint}. The same command goes on from there.")
            return 130
        export(model, args.out / file)

    classifier, unet = load_digits_classifier(args.out / CLASSIFIER_FILE), load_digits_unet(args.out / UNET_FILE)
    print(f"classifier: {classifier_accuracy(classifier):.1%} of {len(digits('test')[0])} held-out digits are right")
    print(f"unet: {sample_accuracy(unet, classifier):.1%} of 200 samples are classified > 0.9 as the asked class")
    return 0


if __name__ == "__main__":
    sys.exit(main())
