"""`restore_tiled`: restore images that do not fit in memory, tile by tile."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from .functional import check_floating
from .reference import EXITS
from .reference.common import check_choice, check_flag, check_integer, check_positive
from .reference.network import MULTIPLE


def restore_tiled(
    model: nn.Module | Callable[..., Tensor],
    image: Tensor,
    tile: int = 512,
    overlap: int = 32,
    exit: str | None = None,
    progress: bool = True,
) -> Tensor:
    """`model(image)`, or `model(image, exit=exit)`, on overlapping tiles, blended linearly where they overlap.

    Memory beside the image and the result is that of one tile, whatever the image's size. The result differs from
    `model(image)`: each tile sees its own pixels only (the Fourier branch mixes over the whole tile). An image that
    fits into one tile goes through the model as it is.

    Args:
        model: takes and returns (1, C, h, w); runs without gradients, in the mode (train or eval) that it is in. A
            module gets tiles in the dtype and on the device of its parameters (offloaded by accelerate: where it runs).
        image: (C, H, W) or (B, C, H, W) on any device; it stays there.
        tile: side of a tile, a multiple of 16.
        overlap: least number of pixels that neighbouring tiles share, below tile / 2.
        exit: that of an `SWFormer` to take; None: the model is called with the tile alone.
        progress: show a progress bar (tqdm, where installed).

    Returns:
        The restored image in the shape, dtype and device of `image`.

    Raises:
        TypeError, ValueError: image is no dense floating tensor of rank 3 or 4, or is empty; tile or overlap is no int
            or out of range; the model cannot be called, or returns something else for the first tile;
            exit is none of `EXITS`, or the model has none such.
    """
    if not callable(model):
        raise TypeError(f"model must be an nn.Module or a function of a tile, got {type(model).__name__}")
    check_floating("image", image)
    if image.dim() not in (3, 4) or 0 in image.shape[-3:]:
        raise ValueError(f"image must have shape (C, H, W) or (B, C, H, W), got {tuple(image.shape)}")
    tile, overlap = check_positive("tile", tile), check_integer("overlap", overlap)
    if exit is not None:
        check_choice("exit", exit, EXITS)
    check_flag("progress", progress)
    if tile < MULTIPLE or tile % MULTIPLE:
        raise ValueError(f"tile must be a positive multiple of {MULTIPLE}, got {tile}")
    if not 0 <= overlap < tile / 2:
        raise ValueError(f"overlap must be at least 0 and less than tile / 2 = {tile / 2:g}, got {overlap}")
    device, dtype = _where_it_runs(model, image) if isinstance(model, nn.Module) else (image.device, image.dtype)
    options = {} if exit is None else {"exit": exit}
    batch = image if image.dim() == 4 else image[None]
    rows, columns = (_windows(size, tile, overlap) for size in batch.shape[2:])
    places = list(itertools.product(range(len(batch)), rows, columns))
    restored = torch.zeros_like(batch, memory_format=torch.contiguous_format)
    with torch.no_grad():
        for i, (top, bottom, down), (left, right, across) in _bar(places, progress):
            crop = batch[i : i + 1, :, top:bottom, left:right]
            patch = _checked(model(crop.to(device, dtype), **options), crop).to(image)
            weights = down.to(patch)[:, None] * across.to(patch)
            restored[i, :, top:bottom, left:right].addcmul_(patch[0], weights)
    return restored if image.dim() == 4 else restored[0]


def _where_it_runs(model: nn.Module, image: Tensor) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of the model's input: of its parameters, or where accelerate's hooks bring what is offloaded."""
    hooks = (getattr(module, "_hf_hook", None) for module in model.modules())
    devices = [d for d in (getattr(hook, "execution_device", None) for hook in hooks) if d is not None]
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    devices += [p.device for p in parameters if p.device.type != "meta"]
    device = torch.device(devices[0]) if devices else image.device
    return device, parameters[0].dtype if parameters else image.dtype


def _checked(output: object, crop: Tensor) -> Tensor:
    if not isinstance(output, Tensor):
        raise TypeError(f"model must return a tensor for a tile, got {type(output).__name__}: call it in eval mode?")
    if output.shape != crop.shape:
        raise ValueError(f"model must return {tuple(crop.shape)} for such a tile, got {tuple(output.shape)}")
    return output


def _windows(size: int, tile: int, overlap: int) -> list[tuple[int, int, Tensor]]:
    """(begin, end, weight of each pixel) of the tiles along one axis; at every pixel the weights add up to 1."""
    if size <= tile:
        return [(0, size, torch.ones(size))]
    count = -(-(size - overlap) // (tile - overlap))
    begins = [round(k * (size - tile) / (count - 1)) for k in range(count)]
    ramp = torch.arange(1, tile + 1, dtype=torch.float64)
    weights, total = [], torch.zeros(size, dtype=torch.float64)
    for k, begin in enumerate(begins):
        rise = ramp if k else torch.full_like(ramp, tile)
        fall = ramp.flip(0) if k + 1 < count else torch.full_like(ramp, tile)
        shared = max(overlap, 1)
        weights.append(torch.minimum(rise, fall).clamp(max=shared))
        total[begin : begin + tile] += weights[-1]
    return [(b, b + tile, (w / total[b : b + tile]).float()) for b, w in zip(begins, weights, strict=True)]


def _bar(places: list, progress: bool) -> list:
    if not progress:
        return places
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return places
    return tqdm(places, desc="tiles", unit="tile", leave=False)
