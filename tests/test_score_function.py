"""ScoreFunction: an unbiased gradient from values alone, and optimisation of losses that have none."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sdo_fast import ScoreFunction, optimize_latents


def draws(loss: object, x: Tensor, count: int, **options: object) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.stack([ScoreFunction(generator=generator, **options).gradient(loss, x) for _ in range(count)])


def test_it_is_unbiased_for_a_quadratic() -> None:
    """The mean of many draws, within five standard errors of autograd's, which are small."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    a, b = torch.randn(6, 6, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)

    def loss(images: Tensor) -> Tensor:
        flat = images.flatten(1)
        return (flat @ a * flat).sum(1) + (flat * b.repeat(len(flat) // 2, 1)).sum(1)

    leaf = x.clone().requires_grad_()
    (exact,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    for scale in (0.02, 1.5):
        g = draws(loss, x, 4000, samples=4, scale=scale)
        error = g.std(0) / math.sqrt(len(g))
        assert ((g.mean(0) - exact).abs() < 5 * error).all()
        assert (error < 0.1 * exact.norm() / math.sqrt(exact.numel())).all()


def test_a_linear_loss_has_the_variance_that_is_told() -> None:
    """Each of n elements |grad|^2 (1 + its own share) 2 / Q, whatever the scale, and the value plays no part."""
    torch.manual_seed(0)
    x, slope = torch.randn(1, 12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    for samples, scale, offset in ((2, 0.01, 0.0), (8, 3.0, 1e6)):
        g = draws(lambda images, offset=offset: images @ slope + offset, x, 3000, samples=samples, scale=scale)[:, 0]
        told = (slope.square().sum() + slope.square()) * 2 / samples
        torch.testing.assert_close(g.var(0), told, rtol=0.2, atol=0)
        torch.testing.assert_close(g.mean(0), slope, rtol=0, atol=5 * (told.max() / 3000).sqrt().item())
    many = ScoreFunction(200_000, 0.1, torch.Generator().manual_seed(0)).gradient(lambda images: images @ slope, x)[0]
    assert torch.nn.functional.cosine_similarity(many, slope, 0) > 0.999


def test_images_do_not_mix() -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64)

    def loss(images: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        assert images.shape == (8 * 3, 2, 4)
        return images.view(8, 3, 8).sum(2).mul(torch.tensor([0.0, 1.0, 0.0])).flatten()

    g = ScoreFunction(8).gradient(loss, x)
    assert g[1].all()
    assert not g[::2].any()


def rounded(image: Tensor) -> Tensor:
    """Squared distance to 1 in steps of a quarter: its gradient is zero almost everywhere."""
    return ((image - 1).square() * 4).round().flatten(1).mean(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_loss_without_a_gradient_goes_down(dtype: torch.dtype) -> None:
    z = torch.randn(2, 1, 4, 4).to(dtype)
    estimate = ScoreFunction(64, 0.3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = rounded(z.float().tanh() * 2)

    def sampler(latents: Tensor) -> Tensor:
        return latents.tanh() * 2

    result = optimize_latents(
        sampler, z, lambda image: rounded(image.float()), 60, 0.05, progress=False, estimate=estimate
    )
    assert result.history[0].loss == pytest.approx(before.sum().item(), rel=1e-2)
    assert result.history[-1].loss < 0.15 * result.history[0].loss
    assert result.latents.dtype == result.image.dtype == dtype


def test_the_latents_gradient_is_the_estimate_through_the_sampler() -> None:
    z, seed = torch.randn(2, 3, dtype=torch.float64), 3
    estimate = ScoreFunction(4, 0.1, torch.Generator().manual_seed(seed))
    result = optimize_latents(
        lambda latents: latents**3, z, lambda x, k: x.abs().sum(1) + k, 1, progress=False, estimate=estimate,
        optimizer=lambda leaves: torch.optim.SGD(leaves, lr=0.5),
    )  # fmt: skip
    again = ScoreFunction(4, 0.1, torch.Generator().manual_seed(seed))
    gradient = again.gradient(lambda x: x.abs().sum(1), z**3) * 3 * z**2
    torch.testing.assert_close(result.latents, z - 0.5 * gradient)
    assert result.history[1].loss == pytest.approx((result.image.abs().sum() + 2).item())


def test_what_it_does_not_take() -> None:
    z = torch.randn(2, 3)

    def run(loss: object, **options: object) -> object:
        return optimize_latents(lambda x: x * 2, z, loss, 1, progress=False, estimate=ScoreFunction(4), **options)

    with pytest.raises(
        ValueError, match=r"loss_fn must return one loss an image, shape \(2,\), with estimate, got shape"
    ):
        run(lambda image: image.sum())
    with pytest.raises(ValueError, match=r"shape \(8,\), with estimate, got shape \(2,\)"):
        run(lambda image: image.sum(1)[:2])
    with pytest.raises(ValueError, match="got list"):
        run(lambda image: [0.0] * len(image))
    for samples in (0, 3, 2.0):
        with pytest.raises(ValueError, match="samples must be a positive even integer"):
            ScoreFunction(samples)
    with pytest.raises(ValueError, match="scale must be greater than 0"):
        ScoreFunction(4, 0.0)
    with pytest.raises(TypeError, match=r"estimate must be a ScoreFunction or None, got int"):
        optimize_latents(lambda x: x, z, torch.sum, 1, estimate=3)
