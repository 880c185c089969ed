"""The fused block: pure functions of tensors and bundles.

Normalisations, scales and residuals go into the parameters of the 1x1 convolutions beside them; the branches are never
concatenated. The Fourier branch's part of the mixer's first convolution goes into that branch's first one; its last
one, channel attention and the block's scale go into the weights of the mixer's last one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._layout import channels_last
from .backend import has_cpp
from .functional import autocasts, check_local_branches, fourier_mix_and_sums, update_running
from .parameters import (
    AttentionParameters,
    Convolution,
    FfnParameters,
    MixerParameters,
    SpatialParameters,
    WaveletParameters,
    flatten,
)


def foldable(x: Tensor) -> bool:
    """Whether folding constants into weights keeps this input's accuracy and layout."""
    full_precision = x.dtype in (torch.float32, torch.float64)
    return x.dim() == 4 and full_precision and not channels_last(x) and not autocasts(x)


def merge(a: Tensor, b: Tensor, conv: Convolution) -> Tensor:
    """The 1x1 convolution of cat((a, b), 1)."""
    return torch.ops.swformer_fast.pointwise(a, b, None, conv.weight.flatten(1)[None], conv.bias, None)


# normalisation --------------------------------------------------------------------------------------------------------


def fold(mean: Tensor, variance: Tensor, norm: nn.BatchNorm2d, conv: Convolution) -> Convolution:
    """`conv` so that it gives of x what it gave of the normalised x."""
    scale = (variance + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -mean * scale if norm.bias is None else torch.addcmul(norm.bias, mean, scale, value=-1)
    weight, bias = conv
    return Convolution(weight * scale[:, None, None], torch.addmv(bias, weight.flatten(1), shift))


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


def normalised(x: Tensor, norm: nn.BatchNorm2d, conv: Convolution) -> tuple[Tensor, Convolution]:
    """What to convolve, and with what, to get `conv` of norm(x).

    On a GPU the batch's statistics are not folded: the algebra of the parameters takes more launches than the passes it
    saves are worth.
    """
    mean, variance = norm.running_mean, norm.running_var
    if norm.training or mean is None or variance is None:
        if not has_cpp(x.device.type) or x.numel() <= x.shape[1]:
            return norm(x), conv  # which refuses a single value
        mean, variance = mean_and_variance(x, norm)
    return x, fold(mean, variance, norm, conv)


# mixer ----------------------------------------------------------------------------------------------------------------


def local_branches(
    x: Tensor, conv: Convolution, spatial: SpatialParameters, wavelet: WaveletParameters
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference.local_branches` and the sums of both results over the pixels, (B, C).

    Without gradients in one pass, on the CPU, and the convolution's map never exists.
    """
    check_local_branches(x, conv, spatial, wavelet)
    ops = torch.ops.swformer_fast
    needs_grad = torch.is_grad_enabled()
    if torch.jit.is_tracing():  # what is traced in one mode runs in the other too
        needs_grad = any(t.requires_grad for t in (x, *conv, *spatial, *wavelet))
    if not needs_grad and has_cpp(x.device.type):
        return ops.local_branches(x, *conv, *spatial, *wavelet)
    weights, biases = conv.weight[None].chunk(2, 1), conv.bias.chunk(2)
    # One after the other: their inputs do not exist at a time.
    u = ops.pointwise(x, None, None, weights[0], biases[0], None)
    left, left_sums = ops.depthwise_gelu(u, *spatial, True)
    del u
    v = ops.pointwise(x, None, None, weights[1], biases[1], None)
    right, right_sums = ops.wavelet_mix(v, *wavelet, True)
    return left, right, left_sums, right_sums


def attention_of_means(means: Tensor, parameters: AttentionParameters) -> Tensor:
    """Channel attention's weights, (B, C), from the means over the pixels, (B, C)."""
    w1, b1, w2, b2 = parameters
    hidden = torch.addmm(b1, means, w1.flatten(1).t()).relu()
    return torch.addmm(b2, hidden, w2.flatten(1).t()).sigmoid()


def mix(
    x: Tensor,
    parameters: MixerParameters,
    training: bool,
    momentum: float,
    eps: float,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """`residual + scale * MultiDomainMixer(x)`; training, momentum and eps are the Fourier branch's.

    The first convolution's weight is (3 * D, D, 1, 1) or (3 * D, D).
    """
    dim, fourier = x.shape[1], parameters.fourier
    weight, bias = parameters.conv_in
    (local_weight, weight), (local_bias, bias) = (t.split((2 * dim, dim)) for t in (weight.flatten(1), bias))
    assert fourier.out_weight is not None
    assert fourier.out_bias is not None
    first, last, last_bias = fourier.in_weight.flatten(1), fourier.out_weight.flatten(1), fourier.out_bias
    composed = fourier._replace(
        in_weight=(first @ weight)[..., None, None],
        in_bias=torch.addmv(fourier.in_bias, first, bias),
        out_weight=None,
        out_bias=None,
    )
    # The branch that needs most memory first.
    frequencies, of_frequencies = fourier_mix_and_sums(x, composed, training, momentum, eps, True)
    local = Convolution(local_weight, local_bias)
    spatial, wavelet, *of_local = local_branches(x, local, parameters.spatial, parameters.wavelet)
    area = x.shape[2] * x.shape[3]
    means = [sums / area for sums in of_local]
    means.append(torch.addmm(last_bias, of_frequencies, last.t(), alpha=1 / area))
    attention = attention_of_means(torch.cat(means, dim=1), parameters.attention)
    weight, bias = parameters.conv_out
    weight = weight.flatten(1)
    if scale is not None:
        weight, bias = weight * scale.view(-1, 1), bias * scale.view(-1)
    weight = weight * attention[:, None]
    of_last = weight[..., 2 * dim :]
    weight = torch.cat((weight[..., : 2 * dim], of_last @ last), dim=2)
    bias = bias + of_last @ last_bias
    return torch.ops.swformer_fast.pointwise(spatial, wavelet, frequencies, weight, bias, residual)


# FFN ------------------------------------------------------------------------------------------------------------------


def feed_forward(x: Tensor, parameters: FfnParameters, scale: Tensor, residual: Tensor) -> Tensor:
    """`residual + scale * multiscale_ffn(x, parameters)`."""
    gamma = scale.view(-1)
    scaled = parameters._replace(
        out_weight=parameters.out_weight * gamma[:, None, None, None], out_bias=parameters.out_bias * gamma
    )
    return torch.ops.swformer_fast.multiscale_ffn(x, *flatten(scaled), residual)
