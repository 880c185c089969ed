"""What a run tells: a bar, a JSON line a step, trackers, grids of images."""

from __future__ import annotations

import math
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from .config import RewardConfig
from .files import append_line, cut_lines


def peak_memory() -> int:
    """Bytes: of the GPU's tensors, or of this process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


class Records:
    """The main process's; the others' tell nothing."""

    def __init__(self, config: RewardConfig, accelerator: Accelerator, output: Path | None) -> None:
        self.config, self.accelerator, self.output = config, accelerator, output
        self.main = accelerator.is_main_process
        self.bar: Any = None

    def begin(self, step: int) -> None:
        """The run goes on after `step`."""
        if self.config.log_with is not None:
            where = {"wandb": {"dir": str(self.output)}} if self.config.log_with == "wandb" else {}
            self.accelerator.init_trackers("reward", config=self.config.as_json(), init_kwargs=where)
        if self.main and self.output is not None:
            cut_lines(self.output / "log.jsonl", step)
        show = self.config.progress and self.main
        self.bar = tqdm(total=self.config.steps, initial=step, disable=not show, dynamic_ncols=True)

    @property
    def begun(self) -> bool:
        return self.bar is not None

    def end(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.config.log_with is not None:
            self.accelerator.end_training()

    def step(self, record: dict[str, Any]) -> None:
        self._write(record)
        if self.bar is None or self.bar.disable:
            return
        shown = {name: f"{record[name]:.4g}" for name in ("reward", "diversity") if record[name] is not None}
        shown["memory"] = f"{record['memory'] / 2**30:.2f} GiB"
        shown["images/s"] = f"{record['images_per_second']:.3g}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()

    def evaluation(self, record: dict[str, Any], images: Tensor, columns: int) -> None:
        self._write(record)
        if not self.main or self.output is None or images.ndim != 4 or images.shape[1] not in (1, 3):
            return
        picture = grid(images, columns)
        path = self.output / "images" / f"{record['step']:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        pixels = _pixels(images).expand(-1, 3, -1, -1).movedim(1, -1).numpy()
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({"samples": pixels}, step=record["step"], **layout)

    def _write(self, record: dict[str, Any]) -> None:
        if self.main and self.output is not None:
            append_line(self.output / "log.jsonl", record)
        if self.config.log_with is not None:
            numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "step"}
            self.accelerator.log(numbers, step=record["step"])


def finite(value: float) -> float | None:
    """As JSON has it: None for NaN."""
    return value if math.isfinite(value) else None


def _pixels(images: Tensor) -> Tensor:
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def grid(images: Tensor, columns: int) -> Any:
    """A PIL image of images (B, C, H, W) in [0, 1], C = 1 or 3, `columns` in a row."""
    from diffusers.utils import make_image_grid
    from PIL import Image

    arrays = _pixels(images).movedim(1, -1).numpy()
    pictures = [Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array) for array in arrays]
    return make_image_grid(pictures, len(pictures) // columns, columns)
