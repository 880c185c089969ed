"""Tiled restoration: blending, memory, errors."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import randomise
from torch import Tensor, nn

import swformer_fast as sf
from swformer_fast.tiling import _windows


@pytest.mark.parametrize("size", [16, 31, 64, 65, 100, 257, 1000])
@pytest.mark.parametrize(("tile", "overlap"), [(16, 0), (32, 7), (64, 31), (64, 32 - 1)])
def test_weights_add_up_to_one(size: int, tile: int, overlap: int) -> None:
    total, covered = torch.zeros(size), 0
    for begin, end, weights in _windows(size, tile, overlap):
        assert 0 <= begin <= covered
        assert end - begin == min(size, tile)
        assert weights.min() > 0
        total[begin:end] += weights
        covered = end
    assert covered == size
    assert torch.allclose(total, torch.ones(size), atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 70, 90), (2, 3, 70, 90), (3, 16, 200)])
def test_a_local_model_is_reproduced(shape: tuple[int, ...]) -> None:
    model = nn.Conv2d(3, 3, 1)
    image = torch.rand(shape)
    with torch.no_grad():
        expected = model(image if len(shape) == 4 else image[None])
    actual = sf.restore_tiled(model, image, tile=32, overlap=8, progress=False)
    assert actual.shape == image.shape
    assert not actual.requires_grad
    assert torch.allclose(actual, expected.reshape(shape), atol=1e-6)


def test_neighbours_are_blended_without_a_seam() -> None:
    """Tiles that disagree by a constant meet in a ramp, not in a step."""
    levels = iter(range(100))
    result = sf.restore_tiled(lambda x: torch.full_like(x, next(levels)), torch.rand(1, 32, 56), 32, 8, progress=False)
    row = result[0, 0]
    assert row[0] == 0
    assert row[-1] == 1
    assert (row.diff() >= 0).all()
    assert row.diff().max() <= 0.2


def test_one_tile_is_the_model_itself() -> None:
    model = sf.SWFormer.from_preset("tiny").eval()
    image = torch.rand(1, 3, 40, 50)
    with torch.no_grad():
        assert torch.equal(sf.restore_tiled(model, image, tile=64, overlap=8, progress=False), model(image))


@torch.no_grad()
@pytest.mark.parametrize("exit", [None, *sf.EXITS])
def test_exits(exit: str | None) -> None:
    model, image = randomise(sf.SWFormer.from_preset("tiny")).eval(), torch.rand(1, 3, 40, 50)
    actual = sf.restore_tiled(model, image, tile=32, overlap=8, exit=exit, progress=False)
    whole = sf.restore_tiled(lambda x: model(x, exit=exit), image, tile=32, overlap=8, progress=False)
    assert torch.equal(actual, whole)


def test_an_exit_that_is_not_built() -> None:
    model = sf.SWFormer.from_preset("tiny", exit="small").eval()
    with pytest.raises(ValueError, match="exit must be built, got 'large'"):
        sf.restore_tiled(model, torch.rand(3, 16, 16), exit="large")
    with pytest.raises(ValueError, match="exit must be one of 'small', 'medium', 'large', got 'huge'"):
        sf.restore_tiled(model, torch.rand(3, 16, 16), exit="huge")


def test_memory_does_not_grow_with_the_image() -> None:
    largest = 0

    def model(x: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, x.numel())
        return x

    for size in (128, 512):
        sf.restore_tiled(model, torch.rand(3, size, size), tile=64, overlap=8, progress=False)
        assert largest == 3 * 64 * 64


@pytest.mark.slow
def test_a_large_image_stays_within_two_gigabytes() -> None:
    code = (
        "import resource, torch, swformer_fast as sf\n"
        "torch.set_num_threads(1)\n"
        "model = sf.SWFormer.from_preset('tiny').eval()\n"
        "result = sf.restore_tiled(model, torch.rand(3, 3072, 4096), progress=False)\n"
        "assert torch.isfinite(result).all()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 2 * 2**20


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "must have dtype float32, .*, got torch.uint8", (torch.zeros(3, 8, 8, dtype=torch.uint8),)),
        (ValueError, r"\(C, H, W\) or \(B, C, H, W\), got \(8, 8\)", (torch.zeros(8, 8),)),
        (ValueError, "multiple of 16, got 40", (torch.zeros(3, 8, 8), 40)),
        (ValueError, "less than tile / 2 = 16, got 16", (torch.zeros(3, 8, 8), 32, 16)),
    ],
)
def test_errors(error: type[Exception], message: str, arguments: tuple) -> None:
    with pytest.raises(error, match=message):
        sf.restore_tiled(nn.Identity(), *arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_dtype(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, image = nn.Conv2d(3, 3, 1).to(dtype), torch.rand(3, 40, 50)
    result = sf.restore_tiled(model, image, tile=32, overlap=8, progress=False)
    assert result.dtype == torch.float32
    assert (result - model(image.to(dtype))).abs().max() < 2e-2


def test_an_offloaded_model_gets_tiles_where_it_runs() -> None:
    model = nn.Conv2d(3, 3, 1).to("meta")
    model._hf_hook = SimpleNamespace(execution_device="cpu")
    tiles: list[Tensor] = []
    model.forward = lambda x: tiles.append(x) or x  # what accelerate's hook would bring is not here
    image = torch.rand(3, 40, 50)
    assert (sf.restore_tiled(model, image, tile=32, overlap=8, progress=False) - image).abs().max() < 1e-6
    assert {t.device.type for t in tiles} == {"cpu"}


@pytest.mark.parametrize(
    ("error", "message", "model"),
    [
        (TypeError, "model must return a tensor for a tile, got tuple", lambda x: (x, x)),
        (
            ValueError,
            r"model must return \(1, 3, 32, 32\) for such a tile, got \(1, 3, 16, 16\)",
            lambda x: x[..., ::2, ::2],
        ),
    ],
)
def test_what_the_model_returns_is_checked_at_once(error: type[Exception], message: str, model: Any) -> None:
    calls: list[Tensor] = []
    with pytest.raises(error, match=message):
        sf.restore_tiled(lambda x: calls.append(x) or model(x), torch.rand(3, 40, 50), 32, 8, progress=False)
    assert len(calls) == 1
