"""The weights that come with the package: small, whole, and worth what the examples' page says."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import swformer_fast as sf

for package in ("safetensors", "skimage", "sklearn"):
    pytest.importorskip(package)

from degradations import DEGRADATIONS, degrade
from photographs import HELD_OUT_SEEDS, photographs
from safetensors import safe_open

from swformer_fast import pretrained, reference
from swformer_fast.tools.metrics import psnr

GAINS = {
    "rain_streaks": 8.0,
    "raindrops": 1.8,
    "haze": 9.0,
    "snow": 6.0,
    "motion_blur": 0.4,
    "defocus_blur": 1.4,
    "cloud": 8.0,
    "shadow": 5.0,
    "underwater": 8.0,
    "low_light": 11.0,
}
"""The least mean gain in dB at exit large on views of the held-out photographs."""
ORDERED = [task for task in DEGRADATIONS if task not in ("raindrops", "underwater")]
"""Whose exits are in order of PSNR: small, medium, large."""
TASKS = pytest.mark.parametrize("task", DEGRADATIONS)


def name_of(task: str) -> str:
    return f"tiny-{task.replace('_', '-')}"


def views() -> list[Tensor]:
    return [photograph[:, 50:274, 60:284] for photograph in photographs("test").values()]


def means(
    task: str, dtype: torch.dtype, pictures: Sequence[Tensor], seeds: Sequence[int], kind: Any = sf.SWFormer
) -> dict[str, float]:
    """PSNR of pictures as they are degraded ("degraded") and of what each exit restores."""
    shipped = sf.SWFormer.from_pretrained(name_of(task))
    model = kind(**shipped.options).eval().to(dtype)
    model.load_state_dict(shipped.state_dict())
    totals: dict[str, float] = {}
    for clean, seed in itertools.product(pictures, seeds):
        degraded = degrade(clean, task, seed)
        with torch.no_grad():
            restored = model(degraded[None].to(dtype), exits=sf.EXITS)
        for name, image in zip(("degraded", *sf.EXITS), (degraded, *(y[0].float() for y in restored)), strict=True):
            totals[name] = totals.get(name, 0.0) + psnr(image.clamp(0, 1), clean) / (len(pictures) * len(seeds))
    return totals


def test_every_task_has_weights() -> None:
    assert pretrained.names() == sorted(map(name_of, DEGRADATIONS))


@TASKS
def test_files_are_small_and_say_what_they_are(task: str) -> None:
    path = pretrained.FOLDER / f"{name_of(task)}.safetensors"
    assert path.stat().st_size < 1e6
    with safe_open(path, "pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F16", "I64"}  # noqa: SIM118
        assert stored.metadata()["task"] == task
    model = sf.SWFormer.from_pretrained(name_of(task))
    assert not model.training
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    small = sf.SWFormer.from_pretrained(name_of(task), exit="small")
    image = torch.rand(1, 3, 32, 48)
    with torch.no_grad():
        assert torch.equal(small(image), model(image, exit="small"))


@TASKS
def test_gain_and_half_precision(task: str) -> None:
    """bf16 and fp16 lose less than a twentieth of a dB, or little more than PyTorch's bf16 loses by itself."""
    values = means(task, torch.float32, views(), [77])
    assert values["large"] - values["degraded"] >= GAINS[task]
    for dtype in (torch.bfloat16, torch.float16):
        others = means(task, dtype, views(), [77])
        changed = {exit: abs(others[exit] - values[exit]) for exit in sf.EXITS}
        if max(changed.values()) >= 0.05:
            assert dtype == torch.bfloat16
            plain = means(task, dtype, views(), [77], reference.SWFormer)
            assert all(change < max(0.05, 1.5 * abs(plain[e] - values[e])) for e, change in changed.items())


def assert_in_order(values: dict[str, float]) -> None:
    assert values["small"] < values["medium"] < values["large"]


@pytest.mark.parametrize("task", [task for task in ORDERED if task != "haze"])
def test_exits_are_in_order_on_views(task: str) -> None:
    """Over four seeds; haze asks for whole pictures."""
    assert_in_order(means(task, torch.float32, views(), range(77, 81)))


@pytest.mark.slow
@pytest.mark.parametrize("task", ORDERED)
def test_exits_are_in_order_on_the_pictures_of_the_page(task: str) -> None:
    assert_in_order(means(task, torch.float32, list(photographs("test").values()), HELD_OUT_SEEDS))
