"""The Fourier branch on the C++ kernels: transforms, algebra of the parameters, order of the steps.

The first convolution, the normalisations and the second convolutions are linear up to the non-linearities, so they are
one matrix on the spectrum of x itself; the last convolution commutes with the inverse transform. The kernels' matrix is
(2, 2, C, 2, D + 1): factor (gate, value), part (real, imaginary) and channel of the output, part and channel of the
input; at channel D of the input stand the constant (part 0) and what the zero frequency receives beside (part 1): a
bias of the first convolution is a constant image.

Statistics of a batch follow from the second moments of x's spectrum, in fp64. The zero frequency, far larger than the
others unless x has mean 0, is kept out of the moments and enters by itself. `compose` is also the definition that the
Triton kernels of this algebra are tested against.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .parameters import Factor, FourierParameters, flatten, unflatten


class _Spread(torch.autograd.Function):
    """(weight @ covariance * weight).sum(2) for symmetric covariances (2, D, D): one product serves both passes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, covariance: Tensor) -> Tensor:
        product = weight @ covariance
        ctx.save_for_backward(weight, product)
        return (product * weight).sum(2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        weight, product = ctx.saved_tensors
        grad = grads[0].unsqueeze(2)
        return (2 * grad * product).sum(0), weight.T @ (grad * weight)


def mean_and_variance(
    in_weight: Tensor, in_bias: Tensor, moments: Tensor, zero: Tensor, side: float, count: int
) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of both factors' inputs, (4 * C,) each.

    moments: (2, D, D + 1), of the real and imaginary parts of x's spectrum over all frequencies but zero: products of
    the channels, and in the last column their sums. zero: (B, D), the zero frequency (it is real). side: sqrt(H * W).
    count: values per channel.
    """
    batch, dim = zero.shape
    others = max(count - batch, 1)
    real = zero @ in_weight.T + in_bias * side
    at_zero = torch.stack((real, torch.zeros_like(real)))
    sums = moments[..., dim] @ in_weight.T
    covariance = moments[..., :dim] - moments[..., dim].unsqueeze(2) * moments[..., dim].unsqueeze(1) / others
    spread = _Spread.apply(in_weight, covariance).clamp(min=0)
    mean = (sums + at_zero.sum(1)) / count
    shift = (count - batch) * (sums / others - mean).square() + (at_zero - mean.unsqueeze(1)).square().sum(1)
    return mean.T.flatten(), ((spread + shift) / count).T.flatten()


def _factor(eps: float, side: float, in_weight: Tensor, in_bias: Tensor, factor: Factor) -> Tensor:
    """One factor's half of the matrix, (2, C, 2, D + 1)."""
    channels = in_bias.shape[0]
    mean, variance, scale, shift = factor.norm
    assert mean is not None
    assert variance is not None
    slope = scale * torch.rsqrt(variance + eps)
    offset = (shift - mean * slope).to(factor.weight.dtype)
    slope = slope.to(factor.weight.dtype)
    mixing = (factor.weight * slope).view(channels, 2, channels, 2).permute(1, 0, 3, 2).contiguous()
    constant = (factor.weight @ offset + factor.bias).view(channels, 2).T
    at_zero = mixing[:, :, 0] @ in_bias * side
    combined = (mixing.view(-1, channels) @ in_weight).view(2, channels, 2, -1)
    return torch.cat((combined, torch.stack((constant, at_zero), 2).unsqueeze(3)), 3)


def compose(
    eps: float,
    side: float,
    count: int,
    parameters: FourierParameters,
    moments: Tensor | None = None,
    zero: Tensor | None = None,
) -> tuple[Tensor, list[Any]]:
    """The matrix, (4 * C, 2 * (D + 1)), and the statistics in use: gate mean, variance, value mean, variance.

    The weights are matrices.
    """
    in_weight, in_bias, factors = parameters.in_weight, parameters.in_bias, list(parameters.factors)
    if moments is not None and zero is not None:
        batch = mean_and_variance(in_weight.double(), in_bias.double(), moments, zero, side, count)
        factors = [
            factor._replace(norm=factor.norm._replace(running_mean=mean, running_var=variance))
            for factor, mean, variance in zip(factors, *(t.chunk(2) for t in batch), strict=True)
        ]
    halves = zip(in_weight.chunk(2), in_bias.chunk(2), factors, strict=True)
    matrix = torch.cat([_factor(eps, side, *half) for half in halves])
    statistics = [t for factor in factors for t in (factor.norm.running_mean, factor.norm.running_var)]
    return matrix.flatten(2).flatten(0, 1), statistics


def in_fp32(parameters: FourierParameters) -> FourierParameters:
    """In fp32, convolutions' weights as matrices."""

    def convert(p: Tensor | None) -> Tensor | None:
        return None if p is None else p.detach().float().flatten(1) if p.dim() == 4 else p.detach().float()

    return unflatten(FourierParameters, [convert(p) for p in flatten(parameters)])


def learnable(parameters: FourierParameters) -> tuple[Tensor | None, ...]:
    """All but the running statistics, in order."""
    of_factors = (t for f in parameters.factors for t in (f.norm.weight, f.norm.bias, f.weight, f.bias))
    first = parameters.in_weight, parameters.in_bias
    return *first, *of_factors, parameters.out_weight, parameters.out_bias


def output_channels(parameters: FourierParameters) -> int:
    """Of `fourier_mix` with these parameters."""
    last = parameters.out_weight
    return parameters.in_weight.shape[0] // 2 if last is None else last.shape[0]


def _last_weight(x: Tensor, out_weight: Tensor | None) -> Tensor:
    """The last convolution's weight as the kernels take it: empty where there is none."""
    if out_weight is None:
        return x.new_empty(0, dtype=torch.float32)
    return out_weight.detach().flatten(1).float().contiguous()


def mix(kernels: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `fourier_mix`."""
    *flat, eps, need_sums = arguments
    parameters = unflatten(FourierParameters, flat)
    batch, _, height, width = x.shape
    batch_statistics = parameters.gate.norm.running_mean is None
    channels = output_channels(parameters)
    sums = x.new_empty((0, channels) if need_sums else 0, dtype=torch.float32)
    if batch == 0:
        return x.new_empty(0, channels, height, width), sums, *no_statistics(x, parameters)
    z = kernels.rfft2(x.contiguous())
    count, side = batch * height * (width // 2 + 1), math.sqrt(height * width)
    moments = kernels.spectrum_moments(z, height, width) if batch_statistics else None
    zero = z[:, :, 0, 0, 0].double() if batch_statistics else None
    matrix, statistics = compose(eps, side, count, in_fp32(parameters), moments, zero)
    weight = _last_weight(x, parameters.out_weight)
    mixed = kernels.spectrum_mix(z, matrix.contiguous(), weight, height, width)
    del z
    bias = parameters.out_bias
    if need_sums:
        sums = mixed[:, :, 0, 0, 0] * side
        sums = sums if bias is None else sums + bias.float() * side**2
    y = kernels.irfft2(mixed, bias, x)
    if moments is None:
        return y, sums, *no_statistics(x, parameters)
    unbiased = count / max(count - 1, 1)
    table = torch.stack([s * unbiased if i % 2 else s for i, s in enumerate(statistics)])
    return y, sums, moments, table.to(parameters.gate.norm.weight.dtype)


def no_statistics(x: Tensor, parameters: FourierParameters) -> tuple[Tensor, Tensor]:
    """The moments and statistics that `fourier_mix` returns where there are none: empty, or 0 for an empty batch."""
    norm, dim = parameters.gate.norm, x.shape[1]
    batch_statistics, scale = norm.running_mean is None, norm.weight
    moments = torch.zeros((2, dim, dim + 1) if batch_statistics else (0,), dtype=torch.float64, device=x.device)
    return moments, torch.zeros((4, scale.shape[0]) if batch_statistics else (0,), dtype=scale.dtype, device=x.device)


def mix_backward(
    kernels: Any, grad: Tensor, grad_sums: Tensor | None, moments: Tensor, x: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The op `fourier_mix_backward`; call it where autograd records.

    Recomputed from x: its spectrum and, in the kernel, the tiles of pre-activations.
    """
    *flat, eps, need_images, need_parameters = arguments
    parameters = unflatten(FourierParameters, flat)
    batch_statistics, tensors = parameters.gate.norm.running_mean is None, learnable(parameters)
    if x.shape[0] == 0:
        zeros = (x.new_empty(0) if p is None or not need_parameters else torch.zeros_like(p) for p in tensors)
        return x.new_empty(x.shape if need_images else (0,)), *zeros
    x, grad = x.detach(), grad.detach()
    batch, _, height, width = x.shape
    z, grad_mixed = kernels.rfft2(x.contiguous()), kernels.rfft2(grad.contiguous())
    count, side = batch * height * (width // 2 + 1), math.sqrt(height * width)
    if grad_sums is not None:
        grad_mixed[:, :, 0, 0, 0] += grad_sums.detach() * side
    terms = in_fp32(parameters._replace(out_weight=None, out_bias=None))
    leaves = [t for t in learnable(terms) if t is not None]
    statistics = [moments.detach(), z[:, :, 0, 0, 0].double()] if batch_statistics else []
    for leaf in (*leaves, *statistics):
        leaf.requires_grad_()
    matrix, _ = compose(eps, side, count, terms, *statistics)
    weight = _last_weight(x, parameters.out_weight)
    through = need_parameters or batch_statistics
    grad_z, grad_matrix, grad_weight = kernels.spectrum_mix_backward(
        grad_mixed, z, matrix.detach().contiguous(), weight, height, width, need_images, through
    )
    grads: list[Tensor] = []
    if through:
        grads = list(torch.autograd.grad(matrix, [*leaves, *statistics], grad_matrix.to(matrix.dtype)))
    if need_images and batch_statistics:
        of_moments, of_zero = grads[len(leaves) :]
        grad_z[:, :, 0, 0, 0] += of_zero
        grad_z = kernels.spectrum_moments_backward(grad_z, z, of_moments, height, width)
    grad_x = kernels.irfft2(grad_z, None, x) if need_images else x.new_empty(0)
    if not need_parameters:
        return grad_x, *(x.new_empty(0) for _ in tensors)
    grad_bias = grad_mixed[:, :, 0, 0, 0].double().sum(0) * side
    gradients = zip(tensors, (*grads[: len(leaves)], grad_weight, grad_bias), strict=True)
    return grad_x, *(x.new_empty(0) if p is None else g.to(p.dtype).reshape(p.shape).contiguous() for p, g in gradients)
