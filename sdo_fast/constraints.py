"""Where optimised latents may be: anywhere, on the sphere of their norm, or among what looks like white noise."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .arguments import check_batch

BLOCK = 16
"""Frequencies a block; that of the paper."""


def whitened(z: Tensor) -> Tensor:
    r"""The point closest to `z` that has the statistics of white Gaussian noise in every band of frequencies.

    Each sample, flattened to N numbers, is seen as M = ceil(N / 2) complex ones by the orthonormal FFT,

        y_0 = (zhat_0 + i zhat_{N/2}) / sqrt(2),    y_k = zhat_k,    k = 1, ..., M - 1,

    which are independent CN(0, 1) if and only if z is N(0, I), with |z|^2 = 2 |y|^2. (For odd N there is no zhat_{N/2},
    and y_0 is real.) They are divided into P = ceil(M / 16) blocks of neighbours whose sizes differ by at most one. The
    set G holds the z whose every block b has the norms that noise has in the mean,

        |y_b|_1 = sum_k E|y_k|,    |y_b|_2^2 = sum_k E|y_k|^2        (sqrt(pi) / 2 and 1 a number; for odd N, 1/sqrt(pi)
                                                                      and 1/2 for y_0),

    so that no frequency stands out (|y_b|_1) and none is missing (|y_b|_2). Its points have norm sqrt(N). The closest
    one keeps the phases and takes the magnitudes m of a block to

        r_k = |y_b|_1 / (j v) * relu(m_k - mean + v),    v^2 = var * rho / (j - rho),    rho = |y_b|_1^2 / |y_b|_2^2,

    with the mean and variance of its j largest, where j is the number of them that stay above zero: O(N log N).

    Noise comes back with a cosine of 0.99. `whitened(s * z)` is `whitened(z)` for s > 0, minus `whitened(z)` for s < 0.
    Samples do not depend on each other.

    Args:
        z: (B, C, ...) with N >= 3 numbers a sample, float32, float64, float16 or bfloat16.

    Returns:
        A tensor like z; computed in float32 (float64 for float64).

    Raises:
        TypeError, ValueError: z is no such tensor.

    Deterministic: where several points are as close (equal magnitudes, as in a z of zeros) the lower frequencies are
    taken for the larger. Source: "Gradient Preconditioning for Efficient and Reliable Reward-Guided Generation", arXiv
    2602.08646; there N is a multiple of 32, and all blocks have 16.
    """
    check_batch("z", z)
    count = math.prod(z.shape[1:])
    if count < 3:
        raise ValueError(f"z must have 3 numbers a sample or more, got shape {tuple(z.shape)}")
    if not len(z):
        return z.clone()
    y, magnitude, power = _spectrum(z.flatten(1).to(torch.promote_types(z.dtype, torch.float32)))
    blocks = math.ceil(y.shape[1] / BLOCK)
    size, larger = divmod(y.shape[1], blocks)
    cut = larger * (size + 1)
    runs = ((slice(cut), larger, size + 1), (slice(cut, None), blocks - larger, size))
    parts = [
        _closest(*(t[..., part].unflatten(-1, shape) for t in (y, magnitude, power))).flatten(-2)
        for part, *shape in runs
        if shape[0]
    ]
    return _from_spectrum(torch.cat(parts, 1), count).view(z.shape).to(z.dtype)


def _spectrum(flat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, M) of real numbers (B, N), and the mean magnitude and power (M,) that each has for white noise."""
    zhat = torch.fft.rfft(flat, norm="ortho")
    y0, y = zhat[:, :1] / math.sqrt(2), zhat[:, 1:]
    power = flat.new_ones((flat.shape[1] + 1) // 2)
    magnitude = power * (math.sqrt(math.pi) / 2)
    if flat.shape[1] % 2:
        power[0], magnitude[0] = 0.5, 1 / math.sqrt(math.pi)
    else:
        y0, y = torch.complex(y0.real, zhat[:, -1:].real / math.sqrt(2)), y[:, :-1]
    return torch.cat([y0, y], 1), magnitude, power


def _from_spectrum(y: Tensor, count: int) -> Tensor:
    """The real numbers (B, N) of y (B, M)."""
    y0 = y[:, :1] * math.sqrt(2)
    last = [] if count % 2 else [y0.imag.to(y.dtype)]
    return torch.fft.irfft(torch.cat([y0.real.to(y.dtype), y[:, 1:], *last], 1), count, norm="ortho")


def _closest(y: Tensor, magnitude: Tensor, power: Tensor) -> Tensor:
    """The closest blocks (..., n) with sum |y_k| = sum magnitude and sum |y_k|^2 = sum power."""
    l1 = magnitude.sum(-1, keepdim=True)
    rho = l1.square() / power.sum(-1, keepdim=True)
    info = torch.finfo(magnitude.dtype)
    y = y / y.abs().amax(-1, keepdim=True).clamp_min(info.tiny)  # a block's scale does not matter
    m, order = y.abs().sort(dim=-1, descending=True, stable=True)
    j = torch.ones_like(m).cumsum(-1)
    m = m - info.eps * j  # no two are equal
    m = m - m.mean(-1, keepdim=True)
    mean = m.cumsum(-1) / j
    variance = (m.square().cumsum(-1) / j - mean.square()).clamp_min(0)
    v = torch.where(j > rho, variance * rho / (j - rho), torch.inf).sqrt()
    last = (m > mean - v).sum(-1, keepdim=True).clamp_min(1) - 1  # none of NaNs, which stay NaN
    mean, v = mean.gather(-1, last), v.gather(-1, last)
    r = l1 / ((last + 1) * v) * (m - mean + v).relu()
    return torch.where(y == 0, 1, y.sgn()) * torch.zeros_like(r).scatter(-1, order, r)


def norms(z: Tensor) -> Tensor:
    """The norm of each sample, (B, 1, ...)."""
    return torch.linalg.vector_norm(z, dim=tuple(range(1, z.ndim)), keepdim=True)


class Free:
    """No constraint."""

    def seen(self, z: Tensor) -> Tensor:
        """What the sampler sees; gradients pass through it."""
        return z

    def direction(self, gradient: Tensor) -> Tensor:
        """What the optimiser takes for the gradient."""
        return gradient

    def project(self, z: Tensor) -> Tensor:
        """What is optimised, before the first evaluation and after each update."""
        return z


class Sphere(Free):
    """The sampler sees z at the norm of z_0."""

    def __init__(self, z: Tensor) -> None:
        self.norms = norms(z)

    def seen(self, z: Tensor) -> Tensor:
        return z * (self.norms / norms(z).clamp_min(torch.finfo(z.dtype).tiny))


class White(Free):
    """Gradients and, after each update, z go to the closest point of `whitened`, at the norm of z_0."""

    def __init__(self, z: Tensor) -> None:
        self.scale = norms(z) / math.sqrt(math.prod(z.shape[1:]))

    def direction(self, gradient: Tensor) -> Tensor:
        return whitened(gradient) * (norms(gradient) > 0)

    def project(self, z: Tensor) -> Tensor:
        return whitened(z) * self.scale


CONSTRAINTS: dict[str, Callable[[Tensor], Free]] = {"norm": Sphere, "white": White}
