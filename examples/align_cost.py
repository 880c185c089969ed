"""What an update of RewardTrainer costs on the digits model: time over sampling alone, and peak memory.

    PYTHONPATH=. python examples/align_cost.py
    PYTHONPATH=. torchrun --nproc-per-node 2 examples/align_cost.py --processes

Times are processor time of one thread, medians of interleaved calls, so that other programs on the machine matter
little; memory is the largest number of bytes of tensors alive at a time beside those alive before. `--processes` prints
processor and clock time an image in each process of a data-parallel run instead.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from digits_model import IMAGE_SHAPE, ThicknessScore, load_digits_classifier, load_digits_unet, scheduler

from benchmarks.harness import peak_bytes
from sdo_fast import RewardConfig, RewardTrainer, SamplerSource, ShortcutSampler

BATCH = 16


def labels(prompts: Sequence[int]) -> dict[str, torch.Tensor]:
    return {"class_labels": torch.tensor(prompts)}


def trainer_of(steps: int, **options: Any) -> RewardTrainer:
    sampler = ShortcutSampler(load_digits_unet(), scheduler(), steps, path="random", checkpoint=True)
    score = ThicknessScore(load_digits_classifier())
    config = RewardConfig(batch_size=BATCH, learning_rate=1e-6, progress=False, steps=10**6, **options)
    source = SamplerSource(sampler, labels, IMAGE_SHAPE)
    return RewardTrainer(source, lambda images, prompts: score(images), range(10), config)


def sampling(steps: int) -> Callable[[], Any]:
    """Sampling alone, by the model as it is."""
    sampler, x = ShortcutSampler(load_digits_unet(), scheduler(), steps), torch.randn(BATCH, *IMAGE_SHAPE)
    return torch.no_grad()(lambda: sampler(x, labels([3] * BATCH)))


def measure(steps: int, rounds: int) -> None:
    cases = {
        "sampling alone": sampling(steps),
        "one step, all parameters": trainer_of(steps, train="all").update,
        "one step, all parameters, checkpoint=False": trainer_of(steps, train="all", checkpoint=False).update,
        "one step, LoRA": trainer_of(steps).update,
        "one step, LoRA, kl_weight": trainer_of(steps, kl_weight=1.0).update,
        "all steps, checkpoint=True": trainer_of(steps, path="full", train="all").update,
        "all steps, checkpoint=False": trainer_of(steps, path="full", train="all", checkpoint=False).update,
    }
    memory = {name: max(peak_bytes(run)[0] for _ in range(2)) for name, run in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            begin = time.process_time()
            run()
            times[name].append(time.process_time() - begin)
    print(f"\n{steps} sampling steps, {BATCH} images | time | images/s | peak memory\n--- | --- | --- | ---")
    alone = statistics.median(times["sampling alone"])
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name} | {median / alone:.2f} | {BATCH / median:.1f} | {memory[name] / 2**20:.1f} MiB")


def measure_processes(steps: int, rounds: int) -> None:
    trainer = trainer_of(steps, train="all")
    trainer.update()
    clock, processor = time.perf_counter(), time.process_time()
    for _ in range(rounds):
        trainer.update()
    clock, processor = time.perf_counter() - clock, time.process_time() - processor
    images, accelerator = rounds * BATCH, trainer.accelerator
    print(
        f"process {accelerator.process_index} of {accelerator.num_processes}: {1e3 * processor / images:.2f} ms of "
        f"processor time an image of its own; {images * accelerator.num_processes / clock:.1f} images/s by the clock"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sampler-steps", type=int, nargs="+", default=[10, 28], help="(%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="calls of each (%(default)s)")
    parser.add_argument("--processes", action="store_true", help="time an image in this and other processes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for steps in args.sampler_steps:
        (measure_processes if args.processes else measure)(steps, args.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
