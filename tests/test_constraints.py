"""whitened: the closest point with white noise's statistics, against an optimiser that knows only its equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from sdo_fast import whitened

SHAPES = [(2, 7), (2, 4), (1, 3), (3, 1, 33), (2, 4, 7, 5), (2, 3, 16, 16), (1, 4, 3, 8, 6)]


def block_norms(z: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The two norms of every block of one sample and what they must be, by a DFT written out."""
    n = len(z)
    m = math.ceil(n / 2)
    k, l = np.arange(n // 2 + 1)[:, None], np.arange(n)
    angle = 2 * np.pi * k * l / n
    real, imaginary = np.cos(angle) @ z / np.sqrt(n), -np.sin(angle) @ z / np.sqrt(n)
    magnitude = np.hypot(real, imaginary)[:m]
    magnitude[0] = np.hypot(real[0], real[n // 2] if n % 2 == 0 else 0) / np.sqrt(2)
    l1, l2 = np.full(m, np.sqrt(np.pi) / 2), np.ones(m)
    if n % 2:  # |y_0| = |N(0, 1)| / sqrt(2)
        l1[0], l2[0] = np.sqrt(2 / np.pi) / np.sqrt(2), 0.5
    blocks = np.array_split(np.arange(m), math.ceil(m / 16))
    have = [np.array([magnitude[b].sum(), (magnitude[b] ** 2).sum()]) for b in blocks]
    return have, [np.array([l1[b].sum(), l2[b].sum()]) for b in blocks]


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a.double().flatten(1), b.double().flatten(1))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 40.0])
def test_every_block_has_the_norms_of_noise(shape: tuple[int, ...], scale: float) -> None:
    z = torch.randn(shape, dtype=torch.float64) * scale + scale
    w = whitened(z)
    assert w.shape == z.shape
    for sample in w.flatten(1):
        for have, wanted in zip(*block_norms(sample.numpy()), strict=True):
            np.testing.assert_allclose(have, wanted, rtol=1e-9)
    torch.testing.assert_close(
        w.flatten(1).norm(dim=1).square(), torch.full((shape[0],), math.prod(shape[1:])).double()
    )
    torch.testing.assert_close(whitened(w), w, rtol=0, atol=1e-11)
    torch.testing.assert_close(whitened(3 * z), w, rtol=0, atol=1e-11)
    torch.testing.assert_close(whitened(-z), -w, rtol=0, atol=1e-11)


@pytest.mark.parametrize("n", [3, 4, 5, 8, 9, 36])
def test_it_is_the_closest_point(n: int) -> None:
    """SLSQP from many starts finds no closer one, and comes as close."""
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(n)
    z = rng.standard_normal(n) * 1.5 + 0.3
    ours = whitened(torch.from_numpy(z)[None])[0].numpy()

    def residual(x: np.ndarray) -> np.ndarray:
        return np.concatenate([have - wanted for have, wanted in zip(*block_norms(x), strict=True)])

    distances = []
    for start in [z, *rng.standard_normal((12 if n < 20 else 3, n))]:
        found = optimize.minimize(
            lambda x: ((x - z) ** 2).sum(),
            start,
            jac=lambda x: 2 * (x - z),
            constraints={"type": "eq", "fun": residual},
            method="SLSQP",
            options={"maxiter": 300, "ftol": 1e-12},
        )
        if np.abs(residual(found.x)).max() < 1e-7:
            distances.append(np.linalg.norm(found.x - z))
    assert distances
    assert np.linalg.norm(ours - z) == pytest.approx(min(distances), abs=1e-4)


def test_noise_hardly_changes_and_other_latents_do() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 4, 32, 32, generator=generator)
    w = whitened(noise)
    assert cosines(w, noise).mean() > 0.989
    assert cosines(w, noise).min() > 0.98
    assert (w.std() - 1).abs() < 1e-4
    smooth = torch.nn.functional.avg_pool2d(noise, 3, 1, 1)
    assert cosines(whitened(smooth), smooth).max() < 0.95
    line = noise + 0.5 * torch.cos(torch.arange(32) * 2 * torch.pi / 8)  # one frequency
    shift = lambda z: (z * torch.cos(torch.arange(32) * 2 * torch.pi / 8)).mean((1, 2, 3))  # noqa: E731
    assert shift(line).mean() > 0.2
    assert shift(whitened(line)).abs().mean() < 0.06


def test_samples_dtypes_and_layouts() -> None:
    z = torch.randn(3, 4, 9, 8)
    w = whitened(z)
    for i in range(3):
        torch.testing.assert_close(whitened(z[i : i + 1]), w[i : i + 1])
    torch.testing.assert_close(whitened(z.to(memory_format=torch.channels_last)), w)
    torch.testing.assert_close(whitened(z.double()), w.double(), rtol=1e-4, atol=1e-4)
    for dtype in (torch.float16, torch.bfloat16):
        assert whitened(z.to(dtype)).dtype == dtype
        torch.testing.assert_close(whitened(z.to(dtype)), whitened(z.to(dtype).float()).to(dtype))
    assert torch.equal(whitened(z), w)
    assert whitened(z[:0]).shape == (0, 4, 9, 8)


def test_ties_are_broken_in_one_way() -> None:
    for z in (torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8), torch.eye(64)[:2].view(2, 1, 8, 8)):
        w = whitened(z)
        assert w.isfinite().all()
        assert torch.equal(w, whitened(z))
        torch.testing.assert_close(w.flatten(1).norm(dim=1), torch.full((2,), math.sqrt(z[0].numel())))


def test_a_sample_that_is_not_finite_is_nan_and_the_others_are_not() -> None:
    z = torch.randn(3, 4, 8, 8)
    for number in (torch.nan, torch.inf):
        broken = z.clone()
        broken[1, 2, 3, 4] = number
        w = whitened(broken)
        assert w[1].isnan().all()
        assert torch.equal(w[[0, 2]], whitened(z)[[0, 2]])


def test_too_few_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"z must have 3 numbers a sample or more, got shape \(4, 2\)"):
        whitened(torch.randn(4, 2))
    with pytest.raises(ValueError, match="z must have shape"):
        whitened(torch.randn(4))
