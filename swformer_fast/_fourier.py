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
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


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


def batch_statistics(
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


def _factor(
    eps: float,
    side: float,
    in_weight: Tensor,
    in_bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bias: Tensor,
) -> Tensor:
    """One factor's half of the matrix, (2, C, 2, D + 1)."""
    channels = in_bias.shape[0]
    slope = scale * torch.rsqrt(variance + eps)
    offset = (shift - mean * slope).to(weight.dtype)
    slope = slope.to(weight.dtype)
    mixing = (weight * slope).view(channels, 2, channels, 2).permute(1, 0, 3, 2).contiguous()
    constant = (weight @ offset + bias).view(channels, 2).T
    at_zero = mixing[:, :, 0] @ in_bias * side
    combined = (mixing.view(-1, channels) @ in_weight).view(2, channels, 2, -1)
    return torch.cat((combined, torch.stack((constant, at_zero), 2).unsqueeze(3)), 3)


def compose(
    eps: float,
    side: float,
    count: int,
    parameters: Sequence[Any],
    moments: Tensor | None = None,
    zero: Tensor | None = None,
) -> tuple[Tensor, list[Any]]:
    """The matrix, (4 * C, 2 * (D + 1)), and the statistics in use: gate mean, variance, value mean, variance."""
    in_weight, in_bias, *rest = parameters
    statistics = [rest[0], rest[1], rest[6], rest[7]]
    if moments is not None and zero is not None:
        mean, variance = batch_statistics(in_weight.double(), in_bias.double(), moments, zero, side, count)
        statistics = [part for pair in zip(mean.chunk(2), variance.chunk(2), strict=True) for part in pair]
    in_weights, in_biases = in_weight.chunk(2), in_bias.chunk(2)
    factors = [
        _factor(eps, side, in_weights[i], in_biases[i], *statistics[2 * i : 2 * i + 2], *rest[6 * i + 2 : 6 * i + 6])
        for i in range(2)
    ]
    return torch.cat(factors).flatten(2).flatten(0, 1), statistics


def in_fp32(parameters: Sequence[Any]) -> list[Any]:
    """In fp32, convolutions' weights as matrices."""
    return [
        None if p is None else p.detach().float().flatten(1) if p.dim() == 4 else p.detach().float() for p in parameters
    ]


def output_channels(parameters: Sequence[Any]) -> int:
    """Of `fourier_mix` with these parameters."""
    return parameters[0].shape[0] // 2 if parameters[-2] is None else parameters[-2].shape[0]


def _last_weight(x: Tensor, out_weight: Tensor | None) -> Tensor:
    """The last convolution's weight as the kernels take it: empty where there is none."""
    if out_weight is None:
        return x.new_empty(0, dtype=torch.float32)
    return out_weight.detach().flatten(1).float().contiguous()


def mix(kernels: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op `fourier_mix`."""
    *parameters, eps, need_sums = arguments
    batch, _, height, width = x.shape
    own_statistics = parameters[2] is None
    out_weight, out_bias = parameters[-2:]
    channels = output_channels(parameters)
    sums = x.new_empty((0, channels) if need_sums else 0, dtype=torch.float32)
    if batch == 0:
        return x.new_empty(0, channels, height, width), sums, *no_statistics(x, parameters)
    z = kernels.rfft2(x.contiguous())
    count, side = batch * height * (width // 2 + 1), math.sqrt(height * width)
    moments = kernels.spectrum_moments(z, height, width) if own_statistics else None
    zero = z[:, :, 0, 0, 0].double() if own_statistics else None
    matrix, statistics = compose(eps, side, count, in_fp32(parameters), moments, zero)
    weight = _last_weight(x, out_weight)
    mixed = kernels.spectrum_mix(z, matrix.contiguous(), weight, height, width)
    del z
    if need_sums:
        sums = mixed[:, :, 0, 0, 0] * side
        sums = sums if out_bias is None else sums + out_bias.float() * side**2
    y = kernels.irfft2(mixed, out_bias, x)
    if moments is None:
        return y, sums, *no_statistics(x, parameters)
    unbiased = count / max(count - 1, 1)
    table = torch.stack([s * unbiased if i % 2 else s for i, s in enumerate(statistics)])
    return y, sums, moments, table.to(parameters[4].dtype)


def no_statistics(x: Tensor, parameters: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """The moments and statistics that `fourier_mix` returns where there are none: empty, or 0 for an empty batch."""
    scale = parameters[4]
    own, dim = parameters[2] is None, x.shape[1]
    moments = torch.zeros((2, dim, dim + 1) if own else (0,), dtype=torch.float64, device=x.device)
    return moments, torch.zeros((4, scale.shape[0]) if own else (0,), dtype=scale.dtype, device=x.device)


def mix_backward(
    kernels: Any, grad: Tensor, grad_sums: Tensor | None, moments: Tensor, x: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The op `fourier_mix_backward`; call it where autograd records.

    Recomputed from x: its spectrum and, in the kernel, the tiles of pre-activations.
    """
    *parameters, eps, need_x, need_parameters = arguments
    own_statistics = parameters[2] is None
    places = [i for i in range(len(parameters)) if i not in (2, 3, 8, 9)]
    if x.shape[0] == 0:
        zeros = [
            x.new_empty(0) if parameters[i] is None or not need_parameters else torch.zeros_like(parameters[i])
            for i in places
        ]
        return x.new_empty(x.shape if need_x else (0,)), *zeros
    x, grad = x.detach(), grad.detach()
    batch, _, height, width = x.shape
    z, grad_mixed = kernels.rfft2(x.contiguous()), kernels.rfft2(grad.contiguous())
    count, side = batch * height * (width // 2 + 1), math.sqrt(height * width)
    if grad_sums is not None:
        grad_mixed[:, :, 0, 0, 0] += grad_sums.detach() * side
    terms = in_fp32(parameters[:-2])
    leaves = [terms[i] for i in places[:-2]]
    if own_statistics:
        leaves += [moments.detach(), z[:, :, 0, 0, 0].double()]
    for leaf in leaves:
        leaf.requires_grad_()
    matrix, _ = compose(eps, side, count, terms, *(leaves[-2:] if own_statistics else ()))
    weight = _last_weight(x, parameters[-2])
    grad_z, grad_matrix, grad_weight = kernels.spectrum_mix_backward(
        grad_mixed,
        z,
        matrix.detach().contiguous(),
        weight,
        height,
        width,
        need_x,
        need_parameters or own_statistics,
    )
    grads = []
    if need_parameters or own_statistics:
        grads = list(torch.autograd.grad(matrix, leaves, grad_matrix.to(matrix.dtype)))
    if need_x and own_statistics:
        grad_z[:, :, 0, 0, 0] += grads[-1]
        grad_z = kernels.spectrum_moments_backward(grad_z, z, grads[-2], height, width)
    grad_x = kernels.irfft2(grad_z, None, x) if need_x else x.new_empty(0)
    if not need_parameters:
        return grad_x, *(x.new_empty(0) for _ in places)
    grad_bias = grad_mixed[:, :, 0, 0, 0].double().sum(0) * side
    given = [*grads[: len(places) - 2], grad_weight, grad_bias]
    return grad_x, *(
        x.new_empty(0) if parameters[i] is None else g.to(parameters[i].dtype).reshape(parameters[i].shape).contiguous()
        for i, g in zip(places, given, strict=True)
    )
