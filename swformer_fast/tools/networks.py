"""The network that a command line asks for, and how it runs on pictures of any size."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import backend, pretrained
from ..network import SWFormer
from ..reference.network import MULTIPLE
from ..tiling import restore_tiled

TASKS = tuple(name.removeprefix("tiny-") for name in pretrained.names())
"""Those that weights come along for."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OVERLAP = 32
TILES = (4096, 2048, 1024, 512, 256, 128)
"""Sides that --tile auto chooses from: the fewer, the less often a result depends on the memory that was free."""

# Numbers in memory at the peak, for each pixel and each channel of the widest maps: measured with one thread as growth
# of the resident set over 512 x 512 pixels, presets tiny, lowlight and derain in fp32 and bf16, rounded up.
PEAK = {"small": 9, "medium": 9, "large": 13}
PEAK_REFERENCE = 33
"""The same of plain PyTorch, and assumed of a GPU."""
CGROUPS = Path("/sys/fs/cgroup")
FREE = 2**31
"""Bytes that are taken to be free where the system does not say."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which network runs, and how."""
    network = parser.add_argument_group("network")
    weights = network.add_mutually_exclusive_group(required=True)
    weights.add_argument(
        "--task",
        choices=TASKS,
        type=lambda task: task.replace("_", "-"),
        metavar="TASK",
        help=f"what is wrong with the pictures, for which small weights come with the package: {', '.join(TASKS)}",
    )
    weights.add_argument(
        "--weights", metavar="NAME|PATH", help="other weights: a name, a folder, a .safetensors or a .pth file"
    )
    network.add_argument(
        "--tile",
        default="auto",
        type=tile_side,
        metavar="auto|N|none",
        help="side of the tiles of larger pictures, a multiple of 16; auto: the largest of "
        f"{', '.join(map(str, TILES))} that half of the free memory allows; give a number to get the same bits "
        "whatever is free (%(default)s)",
    )
    network.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", *DTYPES),
        help="what the network computes in; auto: fp32, but for what swformer-restore makes of eight bits bf16 where "
        "the processor multiplies it (%(default)s)",
    )
    network.add_argument("--device", help="cpu, cuda, cuda:1 ... (a GPU if there is one)")
    network.add_argument(
        "--threads", type=positive, metavar="N", help="of the CPU; the result is the same for any number"
    )


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def tile_side(text: str) -> int | str:
    if text in ("auto", "none"):
        return text
    side = int(text) if text.isdecimal() else 0
    if side < MULTIPLE or side % MULTIPLE:
        raise argparse.ArgumentTypeError(f"must be auto, none or a multiple of {MULTIPLE}, got {text}")
    return side


@dataclass(frozen=True)
class Restorer:
    """A network, and what it runs on: `restorer(image)` is an image (3, H, W) of any size, in [0, 1]."""

    model: SWFormer
    tile: int | None
    """None: whole pictures."""

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def __call__(self, image: Tensor, exit: str | None = None) -> Tensor:
        height, width = image.shape[1:]
        below, right = max(0, MULTIPLE - height), max(0, MULTIPLE - width)
        padded = F.pad(image[None], (0, right, 0, below), mode="replicate")[0]
        tile = self.tile or -(-max(padded.shape) // MULTIPLE) * MULTIPLE
        overlap, progress = min(OVERLAP, tile // 4), sys.stderr.isatty()
        restored = restore_tiled(self.model, padded, tile, overlap, exit, progress)[:, :height, :width]
        if not restored.isfinite().all():
            raise ValueError("the network gave numbers that are not finite: try --dtype fp32")
        return restored.clamp(0, 1)


def load(args: argparse.Namespace, exit: str | None = None, deep: bool = False) -> Restorer:
    """The network of the arguments that `add_arguments` added, up to an exit; `deep`: for more than bf16's eight bits.

    Raises ValueError, OSError or RuntimeError in words, for weights and devices that there are none of.
    """
    if args.threads:
        torch.set_num_threads(min(args.threads, os.cpu_count() or 1))  # OpenMP crashes on very many
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:  # as PyTorch was built
        reason = re.split(r"\.\s|\n", str(error))[0]
        raise ValueError(f"there is no --device {args.device}: {reason}") from error
    dtype = DTYPES.get(args.dtype) or (torch.float32 if deep else best_dtype(device))
    name = args.weights or f"tiny-{args.task}"
    model = SWFormer.from_pretrained(name, exit=exit).eval().requires_grad_(False).to(device, dtype)
    if model.in_channels != 3:
        raise ValueError(f"{name} is for images of {model.in_channels} channels, not for RGB")
    tile = tile_for(model) if args.tile == "auto" else None if args.tile == "none" else args.tile
    return Restorer(model, tile)


def best_dtype(device: torch.device) -> torch.dtype:
    fast = torch.cuda.is_bf16_supported() if device.type == "cuda" else backend.multiplies_bf16()
    return torch.bfloat16 if fast and device.type in ("cpu", "cuda") else torch.float32


def tile_for(model: SWFormer) -> int:
    """The largest of `TILES` whose peak half of the free memory holds; the rest is for pictures."""
    parameter = next(model.parameters())
    available = free_memory(parameter.device) / 2
    return next((side for side in TILES if side**2 * bytes_per_pixel(model) <= available), TILES[-1])


def bytes_per_pixel(model: SWFormer) -> int:
    parameter = next(model.parameters())
    fused = backend.has_cpp(parameter.device.type)
    numbers = PEAK[model.exit] if fused else PEAK_REFERENCE
    size = 2 if parameter.dtype == torch.bfloat16 else 4  # parts of fp16 compute in fp32
    return numbers * model.options["widths"][0] * size


def free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = _physical_memory() // 2
    return min([free, *_left_to_groups()])


def _left_to_groups() -> list[int]:
    """Bytes that Linux leaves to each control group (version 2) of this process that has a limit (containers)."""
    left = []
    with contextlib.suppress(OSError, KeyError, ValueError):
        own = CGROUPS / Path("/proc/self/cgroup").read_text().strip().rpartition("::/")[2]
        for group in (own, *own.parents):
            file = group / "memory.max"
            limit = file.read_text().strip() if file.exists() else "max"
            if limit != "max":
                used = dict(map(str.split, (group / "memory.stat").read_text().splitlines()))
                left.append(max(0, int(limit) - int(used["anon"])))  # what is cached of files goes when there is need
    return left


def _physical_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return 2 * FREE
