"""Which prompt and which noise every image gets: they depend on the seed, the step and the image's number alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .config import RewardConfig

ORDER, NOISE, PATH, EVALUATION = range(4)
"""What a seed is for."""


def seed_of(*numbers: int) -> int:
    """One seed of several numbers, without the patterns that sums of them have."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def generator_of(seed: int) -> torch.Generator:
    """On the CPU, so that noise is the same on every device."""
    return torch.Generator().manual_seed(seed)


def read_prompts(prompts: Any) -> Sequence[Any]:
    """The lines of a text file, or a list or dataset as it is."""
    if isinstance(prompts, (str, Path)):
        file = Path(prompts)
        if not file.is_file():
            raise ValueError(f"prompts must be a list, a dataset or a text file, got {str(prompts)!r}, no such file")
        prompts = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if not hasattr(prompts, "__len__") or not hasattr(prompts, "__getitem__") or isinstance(prompts, Mapping):
        raise TypeError(f"prompts must be a list, a dataset or a text file, got {type(prompts).__name__}")
    if not len(prompts):
        raise ValueError("prompts must hold one prompt or more, got none")
    _prompt(prompts[0])
    return prompts


def _prompt(row: Any) -> Any:
    """A prompt, or that of a dataset's row."""
    if not isinstance(row, Mapping):
        return row
    if "prompt" not in row:
        raise ValueError(f'prompts must be rows with a "prompt", got one of {sorted(map(str, row))}')
    return row["prompt"]


class Batch(NamedTuple):
    prompts: list[Any]
    seeds: list[int]
    """Of each image's noise."""
    path: int
    """Seed of the path, the same for all processes."""


class Batches:
    """Batches of one process among `processes`.

    Image g of a step has the same prompt and noise whoever samples it: for any number of processes, and of images at
    once, a step sees the same images as long as their number and that of the batches an update are the same.
    """

    def __init__(self, prompts: Sequence[Any], config: RewardConfig, processes: int = 1, process: int = 0) -> None:
        self.prompts, self.config = prompts, config
        self.processes, self.process = processes, process
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def train(self, step: int, part: int) -> Batch:
        """Batch `part` of the `gradient_accumulation` ones of a step."""
        config = self.config
        whole = config.batch_size * self.processes
        first = part * whole + self.process * config.batch_size
        images = range(first, first + config.batch_size)
        prompts_a_step = whole * config.gradient_accumulation // config.images_per_prompt
        prompts = [self._nth(step * prompts_a_step + image // config.images_per_prompt) for image in images]
        seeds = [seed_of(config.seed, NOISE, step, image) for image in images]
        return Batch(prompts, seeds, seed_of(config.seed, PATH, step, part))

    def evaluation(self) -> list[Batch]:
        """This process's share of the images to evaluate, as many in every process: the last are repeated."""
        config = self.config
        prompts = min(config.evaluation_prompts, len(self.prompts))
        total = prompts * config.evaluation_images
        share = -(-total // self.processes)
        mine = [min(i, total - 1) for i in range(self.process * share, (self.process + 1) * share)]
        batches = []
        for first in range(0, share, config.batch_size):
            images = mine[first : first + config.batch_size]
            rows = [_prompt(self.prompts[image // config.evaluation_images]) for image in images]
            seeds = [seed_of(config.seed, EVALUATION, image) for image in images]
            batches.append(Batch(rows, seeds, 0))
        return batches

    def _nth(self, n: int) -> Any:
        epoch, place = divmod(n, len(self.prompts))
        return _prompt(self.prompts[self._order(epoch)[place]])

    def _shuffled(self, epoch: int) -> list[int]:
        generator = generator_of(seed_of(self.config.seed, ORDER, epoch))
        return torch.randperm(len(self.prompts), generator=generator).tolist()
