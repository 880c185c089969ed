"""Train SWFormer on pairs of pictures of yours, or for one of ten synthetic degradations.

    python examples/train_restore.py --data Rain200L --layout rain200 --preset derain --crop 128 --steps 300000
    python examples/train_restore.py --task rain_streaks
    torchrun --nproc-per-node 4 examples/train_restore.py --data GOPRO --layout gopro --mixed-precision bf16

All exits are trained at once, each against its level of the clean image's wavelet transform. The second line trains the
preset "tiny" on the photographs that scikit-image and scikit-learn bring along: about six minutes on one core.

Interrupt it at any time with Ctrl-C: the state is saved, as it is every hundred steps, and the same command with
`--resume` goes on where it stopped, bit for bit as if it had never stopped. The finished weights (fp16) and what they
gain on held-out pictures are written to `--out`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from degradations import DEGRADATIONS, degrade
from photographs import HELD_OUT_SEEDS, photographs, random_crop, scenes
from runs import OUTPUT, delayed_interrupt, write_atomically
from torch import Generator, Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import swformer_fast as sf
from swformer_fast.pretrained import save_weights
from swformer_fast.tools.datasets import LAYOUTS, aligned, pairs
from swformer_fast.tools.metrics import psnr, ssim
from swformer_fast.tools.pictures import read

EPOCH = 100
"""Steps after which the state is saved, and every synthetic scene drawn anew."""
STRIDE = 1_000_003
"""Between the seeds of two runs: more than a run has scenes or crops that must differ."""

Pair = tuple[Tensor, Tensor]
"""Degraded and clean, (3, H, W) each."""


class Crops(Dataset[Pair]):
    """Random crops of pairs, mirrored and turned at random: item (n, side) depends on the seed and these alone.

    Args:
        draw: the pair that item n, with its generator, is cut from.
        turned: by quarters too.
    """

    def __init__(self, draw: Callable[[int, Generator], Pair], seed: int, turned: bool) -> None:
        self.draw, self.seed, self.turned = draw, seed, turned

    def __getitem__(self, item: tuple[int, int]) -> Pair:
        n, side = item
        generator = Generator().manual_seed(self.seed * STRIDE + n)
        both = torch.cat(self.draw(n, generator))
        if min(both.shape[1:]) < side:
            raise ValueError(f"crops of {side} are larger than a picture of {both.shape[1]} x {both.shape[2]}")
        both = random_crop(both, generator, side, side)
        if self.turned:
            both = both.rot90(int(torch.randint(4, (), generator=generator)), (1, 2))
        return both[:3].contiguous(), both[3:].contiguous()


def synthetic(args: argparse.Namespace) -> Callable[[int, Generator], Pair]:
    """Photographs, degraded anew every epoch."""

    def draw(n: int, generator: Generator) -> Pair:
        views = scenes(args.task, args.seed * STRIDE + n // (EPOCH * args.batch), args.recolour, args.dead_leaves)
        view = views[int(torch.randint(len(views), (), generator=generator))]
        return view[:3], view[3:]

    return draw


def read_pair(files: tuple[Path, Path], layout: str) -> Pair:
    degraded, clean = (read(path).rgb() for path in files)
    try:
        return degraded, aligned(clean, degraded, layout)
    except ValueError as error:
        raise ValueError(f"{files[0]} {error}") from None


def from_files(files: Sequence[tuple[Path, Path]], layout: str) -> Callable[[int, Generator], Pair]:
    """Pictures of a data set, the last few kept decoded."""
    kept = lru_cache(maxsize=64)(lambda i: read_pair(files[i], layout))
    return lambda n, generator: kept(int(torch.randint(len(files), (), generator=generator)))


def held_out(args: argparse.Namespace) -> Iterator[Pair]:
    """The pictures that measure: photographs, or the first ones of a data set's test split."""
    if args.task:
        for clean in photographs("test").values():
            yield degrade(clean, args.task, HELD_OUT_SEEDS[0]), clean
        return
    for files in pairs(args.data, args.layout, "test")[: args.validate_images]:
        yield read_pair(files, args.layout)


def loss_fn(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """L1 of the pixels and 0.1 times L1 of the spectrum, at every scale (SFHformer's loss)."""
    terms = []
    for output, target in zip(outputs, targets, strict=True):
        error = output.float() - target
        terms.append(error.abs().mean() + 0.1 * torch.view_as_real(torch.fft.rfft2(error)).abs().mean())
    return torch.stack(terms).sum()


@torch.no_grad()
def measure(model: sf.SWFormer, args: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """PSNR in dB and SSIM on the held-out pictures, means: as they are ("degraded") and restored by each exit."""
    exits = sf.EXITS[: len(model.heads)]
    device = next(model.parameters()).device
    table: dict[str, list[tuple[float, float]]] = {name: [] for name in ("degraded", *exits)}
    for degraded, clean in held_out(args):
        restored = model(degraded[None].to(device), exits=exits)
        for name, image in zip(table, (degraded, *(y[0].cpu() for y in restored)), strict=True):
            table[name].append((psnr(image, clean), ssim(image, clean)))
    return table


def means(table: dict[str, list[tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    return {
        name: (sum(p for p, _ in rows) / len(rows), sum(s for _, s in rows) / len(rows)) for name, rows in table.items()
    }


class Training:
    """A run and all of its state: what `save` writes is what `load` needs to go on bit for bit."""

    def __init__(self, args: argparse.Namespace, accelerator: Accelerator) -> None:
        self.args, self.accelerator = args, accelerator
        self.settings = {name: getattr(args, name) for name in SETTINGS} | {"processes": accelerator.num_processes}
        torch.manual_seed(args.seed)
        model = sf.SWFormer.from_preset(args.preset, exit=args.exit)
        optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.steps, eta_min=args.lr / 1000)
        average = get_ema_multi_avg_fn(args.ema)
        self.ema = AveragedModel(self.plain, multi_avg_fn=average) if args.ema else None
        self.step, self.seconds = 0, 0.0

    @property
    def plain(self) -> sf.SWFormer:
        return self.accelerator.unwrap_model(self.model)

    @property
    def finished(self) -> sf.SWFormer:
        """Whose weights are measured and kept, in training mode or not."""
        return self.plain if self.ema is None else self.ema.module

    def parts(self) -> dict[str, Any]:
        parts = {"model": self.plain, "optimizer": self.optimizer, "schedule": self.schedule}
        parts |= {} if self.ema is None else {"ema": self.ema}
        return parts if self.accelerator.scaler is None else parts | {"scaler": self.accelerator.scaler}

    def save(self, path: Path, seconds: float) -> None:
        state = {"settings": self.settings, "step": self.step, "seconds": seconds}
        state |= {name: part.state_dict() for name, part in self.parts().items()}
        if self.accelerator.is_main_process:
            write_atomically(path, lambda partial: torch.save(state, partial))

    def load(self, path: Path) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["settings"] != self.settings:
            raise ValueError(f"{path} was made with {state['settings']}, this run has {self.settings}")
        self.step, self.seconds = state["step"], state["seconds"]
        for name, part in self.parts().items():
            part.load_state_dict(state[name])

    def batches(self, crops: Crops) -> Iterator[list[Tensor]]:
        """This process's share of the batches from the present step on: the same crops for any number of processes."""
        args, processes, own = self.args, self.accelerator.num_processes, self.accelerator.process_index
        plan = []
        for step in range(self.step, args.steps):
            late = args.progressive and 4 * step >= 3 * args.steps
            size, side = (args.batch // 4, 2 * args.crop) if late else (args.batch, args.crop)
            share = range(size // processes * own, size // processes * (own + 1))
            plan.append([(step * args.batch + i, side) for i in share])
        return iter(DataLoader(crops, batch_sampler=plan, num_workers=args.workers))

    def update(self, degraded: Tensor, clean: Tensor) -> float:
        """One step; the loss before it."""
        device = self.accelerator.device
        outputs = self.model(degraded.to(device), all_scales=True)
        loss = loss_fn(outputs, self.plain.image_pyramid(clean.to(device)))
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.clip)
        self.optimizer.step()
        self.schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.plain)
        self.step += 1
        return loss.item()

    def anywhere(self, happened: bool) -> bool:
        """Whether it happened in any process, so that all stop at one step."""
        if self.accelerator.num_processes == 1:
            return happened
        flag = torch.tensor(float(happened), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)


SETTINGS = ("task", "layout", "preset", "exit", "steps", "batch", "crop", "lr", "seed", "progressive", "recolour")
SETTINGS += ("dead_leaves", "ema", "clip", "mixed_precision")


def train(args: argparse.Namespace, accelerator: Accelerator, checkpoint: Path) -> sf.SWFormer | None:
    """The trained model in eval mode, or None if interrupted (and saved)."""
    if args.task:
        crops = Crops(synthetic(args), args.seed, False)
    else:
        crops = Crops(from_files(pairs(args.data, args.layout, "train"), args.layout), args.seed, True)
    run = Training(args, accelerator)
    if args.resume:
        run.load(checkpoint)
    begin = time.perf_counter() - run.seconds
    bar = tqdm(
        total=args.steps, initial=run.step, desc=args.name, mininterval=1, disable=not accelerator.is_main_process
    )
    batches = run.batches(crops)
    with delayed_interrupt() as interrupted, bar:
        while run.step < args.steps:
            loss = run.update(*next(batches))
            bar.update()
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            accelerator.log({"loss": loss, "lr": run.schedule.get_last_lr()[0]}, step=run.step)
            stop = run.anywhere(interrupted())
            if stop or run.step % EPOCH == 0 or run.step == args.steps:
                run.save(checkpoint, time.perf_counter() - begin)
            if stop:
                return None
            if args.validate and run.step % args.validate == 0 and accelerator.is_main_process:
                validate(run, args)
    if accelerator.is_main_process:
        print(f"{args.steps} steps in {time.perf_counter() - begin:.0f} s")
    return run.finished.eval()


def validate(run: Training, args: argparse.Namespace) -> None:
    """Print and log PSNR by exit; training goes on as if nothing had been."""
    model = run.finished
    values = means(measure(model.eval(), args))
    model.train()
    tqdm.write(f"step {run.step}: " + ", ".join(f"{name} {p:.2f} dB" for name, (p, _) in values.items()))
    run.accelerator.log({f"psnr/{name}": p for name, (p, _) in values.items()}, step=run.step)


def report(values: dict[str, tuple[float, float]]) -> str:
    """Markdown."""
    before = values["degraded"][0]
    lines = ["| exit | PSNR | SSIM | gain |", "| --- | --- | --- | --- |"]
    lines += [f"| {name} | {p:.2f} dB | {s:.3f} | {p - before:+.2f} dB |" for name, (p, s) in values.items()]
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--task", choices=DEGRADATIONS, help="degradation of the photographs to undo")
    source.add_argument("--data", type=Path, help="folder of a data set")
    parser.add_argument("--layout", choices=LAYOUTS, default="pairs", help="how it is laid out (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder of weights and checkpoints (%(default)s)")
    parser.add_argument("--name", help="of the files there (tiny-haze for --task haze, or the data's folder)")
    parser.add_argument("--preset", choices=sf.PRESETS, default="tiny", help="size of the network (%(default)s)")
    parser.add_argument("--exit", choices=sf.EXITS, default="large", help="last exit of the network (%(default)s)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="crops a step, of all processes together (%(default)s)")
    parser.add_argument("--crop", type=int, default=64, help="side of the crops (%(default)s)")
    parser.add_argument(
        "--progressive",
        action="store_true",
        help="in the last quarter a quarter of the crops, twice as large",
    )
    parser.add_argument("--recolour", action="store_true", help="photographs in other colours and turned (for --task)")
    parser.add_argument(
        "--dead-leaves",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of synthetic scenes instead of photographs (for --task; %(default)s)",
    )
    parser.add_argument("--lr", type=float, default=2e-3, help="learning rate at the start of the cosine (%(default)s)")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient (%(default)s)")
    parser.add_argument("--ema", type=float, default=0.0, help="decay of averaged weights, 0 for none (%(default)s)")
    parser.add_argument(
        "--mixed-precision", choices=("no", "bf16", "fp16"), default="no", help="autocast (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, crops and degradations (%(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures (%(default)s)")
    parser.add_argument("--validate", type=int, default=0, metavar="STEPS", help="measure every so many (at the end)")
    parser.add_argument("--validate-images", type=int, default=16, help="pictures that measure (%(default)s)")
    parser.add_argument("--log", choices=("tensorboard",), help="write losses and PSNR for it below --out")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    args = parser.parse_args(argv)
    args.name = args.name or (f"{args.preset}-{args.task.replace('_', '-')}" if args.task else args.data.resolve().name)
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    checkpoint = args.out / f"{args.name}.checkpoint"
    if checkpoint.exists() != args.resume:
        state = "exists: --resume goes on from it, or remove it" if checkpoint.exists() else "does not exist"
        print(f"{checkpoint} {state}", file=sys.stderr)
        return 2
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with=args.log,
        project_dir=args.out,
        cpu=not torch.accelerator.is_available(),  # it would not take torchrun's processes for its own
    )
    unit = accelerator.num_processes * (4 if args.progressive else 1)
    if args.batch % unit:
        print(f"--batch must be a multiple of {unit}, got {args.batch}", file=sys.stderr)
        return 2
    if not 0 <= args.dead_leaves <= 1:
        print(f"--dead-leaves must be from 0 to 1, got {args.dead_leaves}", file=sys.stderr)
        return 2
    accelerator.init_trackers(args.name)
    try:
        model = train(args, accelerator, checkpoint)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        accelerator.end_training()
    if not accelerator.is_main_process:
        return 0 if model is not None else 130
    if model is None:
        print(f"interrupted; saved in {checkpoint}. The same command with --resume goes on from there.")
        return 130
    values = means(measure(model, args))
    metadata = {f"psnr_{name}": round(p, 3) for name, (p, _) in values.items()}
    save_weights(model, args.out / f"{args.name}.safetensors", task=args.task or args.name, **metadata)
    print(report(values))
    return 0


if __name__ == "__main__":
    sys.exit(main())
