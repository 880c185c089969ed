"""The fused block: pure functions of tensors and bundles.

Normalisations, scales and residuals go into the parameters of the 1x1 convolutions beside them; the branches are never
concatenated. The Fourier branch's part of the mixer's first convolution goes into that branch's first one, `fold_norm`;
its last one, channel attention and the block's scale go into the weights of the mixer's last one, `fold_attention`.
Without gradients the block is one op, which does the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ._layout import as_output, channels_last
from .backend import has_cpp, multiplies_bf16
from .functional import autocasts, check_block, check_local_branches, fourier_mix_and_sums, update_running
from .parameters import (
    BlockParameters,
    Convolution,
    FfnParameters,
    MixerParameters,
    SpatialParameters,
    WaveletParameters,
    flatten,
)


def foldable(x: Tensor) -> bool:
    """Whether the fused path takes this map."""
    return x.dim() == 4 and x.is_floating_point()


def fused(function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """The function of `foldable` maps, contiguous and outside autocast; the result in the first one's layout.

    Under autocast the maps are cast and the result is fp32, as a sum with an fp32 parameter is; a CPU that does not
    multiply autocast's dtype any faster computes in fp32.
    """
    x = maps[0]
    if not autocasts(x):
        return as_output(x, function(*[t.contiguous() if channels_last(t) else t for t in maps]))
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)
    if device == "cpu" and not (dtype == torch.bfloat16 and multiplies_bf16()):
        dtype = torch.float32
    with torch.autocast(device, enabled=False):
        y = fused(function, *[t if t.dtype == torch.float64 else t.to(dtype) for t in maps])
    return y if y.dtype == torch.float64 else y.float()


def convolve(x: Tensor, conv: Convolution) -> Tensor:
    """The 1x1 convolution of x."""
    return torch.ops.swformer_fast.pointwise(x, None, None, conv.weight.flatten(1)[None], conv.bias, None)


def merge(a: Tensor, b: Tensor, conv: Convolution) -> Tensor:
    """The 1x1 convolution of cat((a, b), 1)."""
    return torch.ops.swformer_fast.pointwise(a, b, None, conv.weight.flatten(1)[None], conv.bias, None)


# normalisation --------------------------------------------------------------------------------------------------------

Foldable = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Mean, variance, weight and bias of a normalisation that is yet to be folded into the convolution behind it."""
NOTHING: Foldable = (None, None, None, None)


def mean_and_variance(x: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the batch; in training the running statistics take them in, as in `norm(x)`."""
    mean, variance = torch.ops.swformer_fast.channel_statistics(x)[0].unbind()
    if norm.training and norm.running_mean is not None:
        momentum = norm.momentum
        if norm.num_batches_tracked is not None:
            with torch.no_grad():
                norm.num_batches_tracked.add_(1)
            momentum = 1 / float(norm.num_batches_tracked) if momentum is None else momentum
        count = x.numel() // x.shape[1]
        batch = (mean.detach(), variance.detach() * (count / (count - 1)))
        update_running((norm.running_mean, norm.running_var), batch, 0.0 if momentum is None else momentum)
    return mean, variance


def normalised(x: Tensor, norm: nn.BatchNorm2d) -> tuple[Tensor, Foldable]:
    """What to convolve for a convolution of norm(x), and what to fold into it.

    On a GPU the batch's statistics are not folded: the passes that this saves are worth less than its launches.
    """
    mean, variance = norm.running_mean, norm.running_var
    if norm.training or mean is None or variance is None:
        if not has_cpp(x.device.type) or x.numel() <= x.shape[1]:
            return norm(x), NOTHING  # which refuses a single value
        mean, variance = mean_and_variance(x, norm)
    return x, (mean, variance, norm.weight, norm.bias)


# mixer ----------------------------------------------------------------------------------------------------------------


def local_branches(
    x: Tensor, weight: Tensor, bias: Tensor, spatial: SpatialParameters, wavelet: WaveletParameters
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.local_branches` and the sums of both results over the pixels, (B, C).

    Without gradients in one pass, on the CPU, and the convolution's map never exists.
    """
    check_local_branches(x, weight, bias, spatial, wavelet)
    ops = torch.ops.swformer_fast
    in_one_pass = has_cpp(x.device.type) and (
        x.dtype.itemsize > 2 or spatial.weight.shape[-1] == wavelet.weight.shape[-1] == 3
    )
    if not in_one_pass:  # on a GPU these are fewer launches
        u, v = ops.pointwise(x, None, None, weight[None], bias, None).chunk(2, 1)
        left, left_sums = ops.depthwise_gelu(u, *spatial, True)
        right, right_sums = ops.wavelet_mix(v, *wavelet, True)
        return left, right, left_sums, right_sums
    needs_grad = torch.is_grad_enabled()
    if torch.jit.is_tracing():  # what is traced in one mode runs in the other too
        needs_grad = any(t.requires_grad for t in (x, weight, bias, *spatial, *wavelet))
    if not needs_grad:
        return ops.local_branches(x, weight, bias, *spatial, *wavelet)
    weights, biases = weight[None].chunk(2, 1), bias.chunk(2)
    # One after the other: their inputs do not exist at a time.
    u = ops.pointwise(x, None, None, weights[0], biases[0], None)
    left, left_sums = ops.depthwise_gelu(u, *spatial, True)
    del u
    v = ops.pointwise(x, None, None, weights[1], biases[1], None)
    right, right_sums = ops.wavelet_mix(v, *wavelet, True)
    return left, right, left_sums, right_sums


def mix(
    x: Tensor,
    norm: Foldable,
    norm_eps: float,
    parameters: MixerParameters,
    training: bool,
    momentum: float,
    eps: float,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`residual + scale * MultiDomainMixer(batch_norm(x, *norm, norm_eps))`; training, momentum and eps are the Fourier
    branch's.
    """
    ops, fourier = torch.ops.swformer_fast, parameters.fourier
    dim, channels = x.shape[1], len(fourier.in_bias)
    assert fourier.out_weight is not None
    assert fourier.out_bias is not None
    weight, bias = parameters.conv_in
    folded = ops.fold_norm(
        weight.flatten(1), bias, *norm, fourier.in_weight.flatten(1), fourier.in_bias, None, norm_eps
    )
    local_weight, fourier_weight, local_bias, fourier_bias = folded.split(
        (2 * dim * dim, channels * dim, 2 * dim, channels)
    )
    composed = fourier._replace(
        in_weight=fourier_weight.view(channels, dim, 1, 1), in_bias=fourier_bias, out_weight=None, out_bias=None
    )
    # The branch that needs most memory first.
    frequencies, of_frequencies = fourier_mix_and_sums(x, composed, training, momentum, eps, True)
    local = local_weight.view(2 * dim, dim), local_bias
    spatial, wavelet, *of_local = local_branches(x, *local, parameters.spatial, parameters.wavelet)
    sums, area = (*of_local, of_frequencies), x.shape[2] * x.shape[3]
    if torch.jit.is_tracing():  # which would keep this image's area for every other
        sums, area = tuple(of_map / area for of_map in sums), 1
    w1, b1, w2, b2 = parameters.attention
    attention = w1.flatten(1), b1, w2.flatten(1), b2
    weight, bias = parameters.conv_out
    last = fourier.out_weight.flatten(1), fourier.out_bias, weight.flatten(1), bias
    folded = ops.fold_attention(*sums, *attention, *last, None if scale is None else scale.view(-1), area)
    batch, outputs, width = x.shape[0], bias.shape[0], 2 * dim + frequencies.shape[1]
    weights, biases = folded.split((batch * outputs * width, batch * outputs))
    weights = weights.view(batch, outputs, width)
    return ops.pointwise(spatial, wavelet, frequencies, weights, biases.view(batch, outputs), residual)


# FFN ------------------------------------------------------------------------------------------------------------------


def feed_forward(
    x: Tensor, norm: Foldable, eps: float, parameters: FfnParameters, scale: Tensor, residual: Tensor
) -> Tensor:
    """`residual + scale * multiscale_ffn(batch_norm(x, *norm, eps), parameters)`."""

    def folded(weight: Tensor, bias: Tensor, norm: Foldable, scale: Tensor | None) -> Convolution:
        both = torch.ops.swformer_fast.fold_norm(weight.flatten(1), bias, *norm, None, None, scale, eps)
        weights, biases = both.split((weight.numel(), bias.numel()))
        return Convolution(weights.view(weight.shape), biases)

    first, last = (
        Convolution(parameters.in_weight, parameters.in_bias),
        folded(parameters.out_weight, parameters.out_bias, NOTHING, scale.view(-1)),
    )
    if norm is not NOTHING:
        first = folded(*first, norm, None)
    parameters = parameters._replace(
        in_weight=first.weight, in_bias=first.bias, out_weight=last.weight, out_bias=last.bias
    )
    return torch.ops.swformer_fast.multiscale_ffn(x, *flatten(parameters), residual)


# block ----------------------------------------------------------------------------------------------------------------


def in_one(x: Tensor, parameters: BlockParameters) -> bool:
    """Whether the block may be one op, which has no gradients: what its kernels for the CPU and for a GPU take."""
    if x.dtype == torch.float64 or torch.jit.is_tracing():  # what is traced in one mode runs in the other too
        return False
    mixer, ffn = parameters.mixer, parameters.ffn
    norms = parameters.norm1, parameters.norm2, mixer.fourier.gate.norm
    kernels = mixer.spatial.weight, mixer.wavelet.weight, *[conv.weight for conv in ffn.depthwise]
    return all([weight.shape[-1] == 3 for weight in kernels]) and not any([t is None for n in norms for t in n])


def block(x: Tensor, parameters: BlockParameters, eps1: float, eps2: float, fourier_eps: float) -> Tensor:
    """`reference.swformer_block` in one op, without gradients."""
    tensors: Any = flatten(parameters)
    check_block(x, parameters, tensors)
    return torch.ops.swformer_fast.swformer_block(x, *tensors, eps1, eps2, fourier_eps)
