"""What the ten shipped networks gain on held-out photographs, by exit: a table, and a sheet of pictures.

    python examples/restore_tasks.py                       # some minutes on one core
    python examples/restore_tasks.py --task haze --seeds 1

Three photographs that were never trained on are degraded with four seeds each, restored whole by each exit and by a
method without learning, and compared. Results are kept as they come: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from classical import CLASSICAL
from degradations import DEGRADATIONS, degrade
from matplotlib.figure import Figure
from photographs import HELD_OUT_SEEDS, photographs
from runs import OUTPUT, write_atomically
from torch import Tensor
from tqdm import tqdm

import swformer_fast as sf
from swformer_fast.tools.metrics import psnr, ssim

COLUMNS = ("degraded", "classical", *sf.EXITS)
SHOWN = "coffee"


def load(task: str) -> sf.SWFormer:
    return sf.SWFormer.from_pretrained(f"tiny-{task.replace('_', '-')}").requires_grad_(False)


def restorations(model: sf.SWFormer, task: str, degraded: Tensor) -> dict[str, Tensor]:
    """By the names of `COLUMNS`, in [0, 1]."""
    exits = [y[0].clamp(0, 1) for y in model(degraded[None], exits=sf.EXITS)]
    return dict(zip(COLUMNS, (degraded, CLASSICAL[task][1](degraded), *exits), strict=True))


def measure(task: str, seeds: int) -> dict[str, list[tuple[float, float]]]:
    """(PSNR in dB, SSIM) of each photograph and seed, by the names of `COLUMNS`."""
    model, table = load(task), {name: [] for name in COLUMNS}
    for clean, seed in itertools.product(photographs("test").values(), HELD_OUT_SEEDS[:seeds]):
        for name, image in restorations(model, task, degrade(clean, task, seed)).items():
            table[name].append((psnr(image, clean), ssim(image, clean)))
    return table


def milliseconds(side: int = 512, rounds: int = 5) -> dict[str, float]:
    """Median time of an image of each exit, taking turns."""
    model = load("haze")
    image, times = torch.rand(1, 3, side, side), {name: [] for name in sf.EXITS}
    for _ in range(rounds + 1):
        for name in sf.EXITS:
            begin = time.perf_counter()
            model(image, exit=name)
            times[name].append(1e3 * (time.perf_counter() - begin))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def report(results: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    """Markdown: PSNR and SSIM, means, and what exit large gains."""
    lines = ["| task | degraded | small | medium | large | gain | without learning |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for task, table in results.items():
        mean = {name: [statistics.mean(column) for column in zip(*rows, strict=True)] for name, rows in table.items()}
        cell = {name: f"{p:.2f} / {s:.3f}" for name, (p, s) in mean.items()}
        gain = mean["large"][0] - mean["degraded"][0]
        classical = f"{cell['classical']} ({CLASSICAL[task][0]})"
        columns = (cell["degraded"], *(cell[exit] for exit in sf.EXITS), f"{gain:+.2f} dB", classical)
        lines.append(f"| {task.replace('_', ' ')} | {' | '.join(columns)} |")
    return "\n".join(lines)


def sheet(tasks: Sequence[str], path: Path, side: int = 224) -> None:
    """A row a task: degraded, the exits, clean, with PSNR."""
    figure = Figure(figsize=(10, 2.05 * len(tasks)), layout="constrained")
    clean = photographs("test")[SHOWN][:, 60 : 60 + side, 160 : 160 + side]
    for task, row in zip(tasks, figure.subplots(len(tasks), 5, squeeze=False), strict=True):
        images = restorations(load(task), task, degrade(clean, task, HELD_OUT_SEEDS[0])) | {"clean": clean}
        del images["classical"]
        for axes, (name, image) in zip(row, images.items(), strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set_title(name if image is clean else f"{name}, {psnr(image, clean):.1f} dB", fontsize=8)
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(task.replace("_", " "), fontsize=8)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=100, pil_kwargs={"quality": 85}))


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=DEGRADATIONS, action="append", help="one of them, repeatable (all)")
    parser.add_argument("--seeds", type=int, default=len(HELD_OUT_SEEDS), help="of each photograph (%(default)s)")
    parser.add_argument("--out", type=Path, default=OUTPUT, help="folder of results (%(default)s)")
    args = parser.parse_args(argv)
    tasks = args.task or list(DEGRADATIONS)
    kept = args.out / f"restore_tasks_{args.seeds}.json"
    results = json.loads(kept.read_text()) if kept.exists() else {}
    for task in tqdm([task for task in tasks if task not in results], desc="tasks"):
        results[task] = measure(task, args.seeds)
        write_atomically(kept, lambda partial: partial.write_text(json.dumps(results)))
    print(report({task: results[task] for task in tasks}))
    times = ", ".join(f"{name} {value:.0f} ms" for name, value in milliseconds().items())
    print(f"\n512 x 512, {torch.get_num_threads()} thread(s): {times}")
    sheet(tasks, args.out / "restore_tasks.jpg")
    print(f"wrote {args.out / 'restore_tasks.jpg'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
