"""What `swformer-eval` measures and writes."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from .._files import replacing
from . import datasets, metrics, networks
from .pictures import read

Scores = dict[str, float]
Measure = Callable[[Tensor, Tensor], float]
MEASURES: dict[str, Measure] = {"psnr": metrics.psnr, "ssim": metrics.ssim}


def by_pyiqa(name: str, device: torch.device) -> Measure:
    """A metric of an image and its clean one, (3, H, W), by pyiqa's name."""
    import pyiqa

    if name not in pyiqa.list_models():
        raise ValueError(f"pyiqa has no metric {name!r}")
    metric = pyiqa.create_metric(name, device=device)
    if metric.metric_mode == "NR":
        return lambda image, clean: metric(image[None].to(device)).item()
    return lambda image, clean: metric(image[None].to(device), clean[None].to(device)).item()


class Results:
    """What is measured so far: for each picture and each column ("degraded" and the exits) its scores."""

    def __init__(self, args: argparse.Namespace, exits: Sequence[str]) -> None:
        self.args, self.exits = args, exits
        self.images: dict[str, dict[str, Scores]] = {}
        self.failed: dict[str, str] = {}
        self.computed: dict[str, Any] = {}
        """What was chosen where the command line says "auto"."""
        self.complete = False

    def measure(self, pairs: datasets.Pairs, restore: networks.Restorer, others: dict[str, Measure]) -> None:
        """PSNR and SSIM of the channel that is asked for, and others of RGB."""
        self.computed = {"dtype": str(restore.dtype).removeprefix("torch."), "tile": restore.tile}
        for degraded_path, clean_path in tqdm(pairs, unit="pair", disable=None):
            name = str(degraded_path.relative_to(self.args.data))
            try:
                self.images[name] = self._scores(degraded_path, clean_path, restore, others)
            except Exception as error:  # whatever a library says of a damaged file
                self.failed[name] = str(error).strip().split("\n")[0] or type(error).__name__
        self.complete = True

    def _scores(
        self, degraded_path: Path, clean_path: Path, restore: networks.Restorer, others: dict[str, Measure]
    ) -> dict[str, Scores]:
        degraded = read(degraded_path).rgb()
        clean = datasets.aligned(read(clean_path).rgb(), degraded, self.args.layout)
        outputs = {"degraded": degraded}
        for exit in self.exits:
            restored = restore(degraded, exit)
            outputs[exit] = metrics.as_bright_as(restored, clean) if self.args.gt_mean else restored
        channel = metrics.luma if self.args.channel == "y" else lambda image: image
        truth = channel(clean.double())
        return {
            column: {
                **{name: measure(channel(image.double()), truth) for name, measure in MEASURES.items()},
                **{name: measure(image, clean) for name, measure in others.items()},
            }
            for column, image in outputs.items()
        }

    @property
    def means(self) -> dict[str, Scores]:
        rows = list(self.images.values())
        return {
            column: {name: sum(row[column][name] for row in rows) / len(rows) for name in scores}
            for column, scores in (rows[0] if rows else {}).items()
        }

    def write(self) -> None:
        args = self.args
        for path, text in ((args.json, self._json), (args.markdown, self._markdown)):
            if path is not None:
                with replacing(path) as partial:
                    partial.write_text(text(), "utf-8", "backslashreplace")

    def _json(self) -> str:
        args = self.args
        content: dict[str, Any] = {
            "data": str(args.data),
            "layout": args.layout,
            "split": args.split,
            "weights": args.weights or f"tiny-{args.task}",
            "channel": args.channel,
            "gt_mean": args.gt_mean,
            **self.computed,
            "complete": self.complete,
            "mean": self.means,
            "images": self.images,
            "failed": self.failed,
        }
        return json.dumps(_finite(content), indent=2, allow_nan=False) + "\n"

    def summary(self) -> str:
        """Means as a Markdown table, a line a column."""
        means = self.means
        if not means:
            return "nothing is measured"
        names = list(next(iter(means.values())))
        lines = [f"| mean of {len(self.images)} | {' | '.join(map(_title, names))} |", _rule(len(names))]
        lines += [f"| {column} | {' | '.join(_text(*item) for item in row.items())} |" for column, row in means.items()]
        return "\n".join(lines)

    def _markdown(self) -> str:
        args, columns = self.args, ("degraded", *self.exits)
        channel = "Y (BT.601)" if args.channel == "y" else "RGB"
        weights = args.weights or f"tiny-{args.task}"
        head = f"{weights} on {args.data} ({args.layout}, {args.split}): {channel}"
        head += ", scaled to the clean mean" if args.gt_mean else ""
        lines = [head + ("." if self.complete else ". Interrupted."), "", self.summary(), ""]
        names = [name for scores in list(self.images.values())[:1] for name in scores["degraded"]]
        titles = [f"{_title(name)} {column}" for name in names for column in columns]
        lines += [f"| picture | {' | '.join(titles)} |", _rule(len(titles))]
        for image, scores in self.images.items():
            cells = (_text(name, scores[column][name]) for name in names for column in columns)
            lines.append(f"| {image} | {' | '.join(cells)} |")
        lines += ["", *(f"- {name} {reason}" for name, reason in self.failed.items())]
        return "\n".join(lines).rstrip() + "\n"


def _title(name: str) -> str:
    return name.upper() if name in ("psnr", "ssim") else name


def _rule(columns: int) -> str:
    return f"| --- |{' ---: |' * columns}"


def _text(name: str, value: float) -> str:
    return f"{value:.2f}" if name == "psnr" else f"{value:.4f}"


def _finite(content: Any) -> Any:
    """JSON knows no infinity, the PSNR of equal pictures: null stands for it."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    return None if isinstance(content, float) and not math.isfinite(content) else content
