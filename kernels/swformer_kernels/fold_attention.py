"""The mixer's last convolution with channel attention, the Fourier branch's last convolution and a scale folded in, for
each image; forward and backward.

The channels are those of the spatial and the wavelet branch, S + W = L together, and F of the Fourier branch, which its
last convolution makes of I. `sizes` are S, W, F, I, E outputs and R of the attention's hidden layer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import Launch, cdiv, check_dtype, jit_for_all_sizes, matrix_options, next_power_of_2, parameter_gradients
from ._tiles import load, load_matrix, store, store_matrix
from .channel_attention import attention_parameters_kernel, second_layer

_OUTPUTS = 32
_CHANNELS = 16
_INPUTS = 32
_PARTS = 16
_HIDDEN = 64  # at least, so that a network's widths share a kernel


@triton.jit
def _sum_of_parts(partials, row, parts, exists, PARTS: tl.constexpr):
    """Sums over the last dimension of partials (rows, parts)."""
    part = tl.arange(0, PARTS)[None, :]
    total = tl.zeros((row.shape[0], PARTS), tl.float32)
    for first in range(0, parts, PARTS):
        mask = exists[:, None] & (first + part < parts)
        total += tl.load(partials + row[:, None] * parts + first + part, mask=mask, other=0.0)
    return tl.sum(total, 1)


@triton.jit
def _means(sums, last, image, c, sizes, area, BLOCK_K: tl.constexpr, PARTS: tl.constexpr):
    """The means over the pixels of the channels c. Of `sums` those of the local branches are in parts, and those of the
    Fourier branch in some unit.
    """
    spatial, wavelet, fourier, unit, parts, strides = sums
    S, W, F, inputs, _, _ = sizes
    total = _sum_of_parts(spatial, image * S + c, parts[0], c < S, PARTS)
    total += _sum_of_parts(wavelet, image * W + c - S, parts[1], (c >= S) & (c < S + W), PARTS)
    f = c - S - W
    exists = (f >= 0) & (f < F)
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        values = load(fourier + image * strides[0] + k.to(tl.int64) * strides[1], k < inputs) * unit
        total += tl.sum(load_matrix(last[0], f, exists, k, inputs, inputs) * values[None, :], 1)
    return total / area + load(last[1] + f, exists)


@triton.jit
def _before_relu(
    sums, last, network, image, sizes, area,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The attention's hidden layer."""
    S, W, F, _, _, hidden = sizes
    channels = S + W + F
    r = tl.arange(0, BLOCK_R)
    total = load(network[1] + r, r < hidden)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        mean = _means(sums, last, image, c, sizes, area, BLOCK_K, PARTS)
        total += tl.sum(load_matrix(network[0], r, r < hidden, c, channels, channels) * mean[None, :], 1)
    return total


@triton.jit
def _scale(scale, e, outputs):
    if scale is None:
        return tl.where(e < outputs, 1.0, 0.0)
    else:
        return load(scale + e, e < outputs)


@jit_for_all_sizes("S")
def fold_attention_kernel(
    spatial, wavelet, fourier, last, network, weight, bias, scale, out, unit, area,
    S, W, F, inputs, outputs, hidden, batch, spatial_parts, wavelet_parts, fourier_image, fourier_channel,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of image program_id(0), block program_id(1) of the outputs: the weights, and behind all images' the biases."""
    sums = (spatial, wavelet, fourier, unit, (spatial_parts, wavelet_parts), (fourier_image, fourier_channel))
    sizes = (S, W, F, inputs, outputs, hidden)
    local, channels = S + W, S + W + F
    width = local + inputs
    image = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    factor = _scale(scale, e, outputs)
    before = _before_relu(sums, last, network, image, sizes, area, BLOCK_C, BLOCK_K, BLOCK_R, PARTS)
    active = tl.where(before < 0, 0.0, before)
    target = out + image * outputs * width
    for first in range(0, local, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        attention, _ = second_layer(active, network[2], network[3], c, channels, hidden, BLOCK_R)
        values = load_matrix(weight, e, e < outputs, c, channels, channels)
        store_matrix(target, values * factor[:, None] * attention[None, :], e, e < outputs, c, local, width)
    constant = load(bias + e, e < outputs) * factor
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK_E, BLOCK_K), tl.float32)
        for first in range(0, F, BLOCK_C):
            f = first + tl.arange(0, BLOCK_C)
            attention, _ = second_layer(active, network[2], network[3], local + f, channels, hidden, BLOCK_R)
            left = load_matrix(weight + local, e, e < outputs, f, F, channels)
            left *= factor[:, None] * attention[None, :]
            right = load_matrix(last[0], f, f < F, k, inputs, inputs)
            total = tl.dot(left, right, total, input_precision="ieee")
            if start == 0:
                constant += tl.sum(left * load(last[1] + f, f < F)[None, :], 1)
        store_matrix(target + local, total, e, e < outputs, k, inputs, width)
    store(out + batch * outputs * width + image * outputs + e, constant, e < outputs)


@triton.jit
def _local_backward(
    grad, active, network, weight, scale, of_attention, of_weight, sizes, block,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of an image and a block of the channels of the spatial and the wavelet branch."""
    S, W, F, inputs, outputs, hidden = sizes
    local, channels = S + W, S + W + F
    c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    attention, _ = second_layer(active, network[2], network[3], c, channels, hidden, BLOCK_R)
    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, outputs, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        upstream = load_matrix(grad, e, e < outputs, c, local, local + inputs)
        values = load_matrix(weight, e, e < outputs, c, local, channels)
        total += tl.sum(upstream * values * _scale(scale, e, outputs)[:, None], 0)
        store_matrix(of_weight, upstream * attention[None, :], e, e < outputs, c, local, channels)
    tl.store(of_attention + c, total, mask=c < local)


@triton.jit
def _fourier_backward(
    grad, of_biases, active, last, network, weight, scale, of_attention, of_weight, of_last, sizes, block,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Of an image and a block of the channels of the Fourier branch."""
    S, W, F, inputs, outputs, hidden = sizes
    local, channels = S + W, S + W + F
    width, row_stride = local + inputs, inputs + 1
    grad += local
    weight += local
    f = block * BLOCK_C + tl.arange(0, BLOCK_C)
    attention, _ = second_layer(active, network[2], network[3], local + f, channels, hidden, BLOCK_R)
    total = tl.zeros((BLOCK_C,), tl.float32)
    constant = total
    offset = load(last[1] + f, f < F)
    for start in range(0, outputs, BLOCK_E):
        e = start + tl.arange(0, BLOCK_E)
        of_bias = load(of_biases + e, e < outputs)
        upstream = of_bias[:, None] * offset[None, :]
        for first in range(0, inputs, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            left = load_matrix(grad, e, e < outputs, k, inputs, width)
            right = tl.trans(load_matrix(last[0], f, f < F, k, inputs, inputs))
            upstream = tl.dot(left, right, upstream, input_precision="ieee")
        values = load_matrix(weight, e, e < outputs, f, F, channels) * _scale(scale, e, outputs)[:, None]
        total += tl.sum(upstream * values, 0)
        constant += tl.sum(values * of_bias[:, None], 0)
        store_matrix(of_weight + local, upstream * attention[None, :], e, e < outputs, f, F, channels)
    tl.store(of_attention + local + f, total, mask=f < F)
    tl.store(of_last + f * row_stride + inputs, constant * attention, mask=f < F)
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        product = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
        for start in range(0, outputs, BLOCK_E):
            e = start + tl.arange(0, BLOCK_E)
            values = load_matrix(weight, e, e < outputs, f, F, channels) * _scale(scale, e, outputs)[:, None]
            right = load_matrix(grad, e, e < outputs, k, inputs, width)
            product = tl.dot(tl.trans(values), right, product, input_precision="ieee")
        store_matrix(of_last, product * attention[:, None], f, f < F, k, inputs, row_stride)


@jit_for_all_sizes("S")
def fold_attention_backward_kernel(
    grad, spatial, wavelet, fourier, last, network, weight, scale, of_attention, of_weight, of_last, area,
    S, W, F, inputs, outputs, hidden, batch, locals,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of image program_id(0) and a block of channels, the first `locals` blocks those of the spatial and the wavelet
    branch: the attention's gradient (B, C), the scaled weight's (B, E, C), and of the Fourier branch's last convolution
    (B, F, I + 1), weight and bias, what comes through the product.
    """
    sums, sizes = (spatial, wavelet, fourier, 1.0, (1, 1), (inputs, 1)), (S, W, F, inputs, outputs, hidden)
    channels, width = S + W + F, S + W + inputs
    image = tl.program_id(0).to(tl.int64)
    before = _before_relu(sums, last, network, image, sizes, area, BLOCK_C, BLOCK_K, BLOCK_R, PARTS)
    active = tl.where(before < 0, 0.0, before)
    of_biases = grad + batch * outputs * width + image * outputs
    grad += image * outputs * width
    of_attention += image * channels
    of_weight += image * outputs * channels
    block = tl.program_id(1)
    if block < locals:
        _local_backward(
            grad, active, network, weight, scale, of_attention, of_weight, sizes, block, BLOCK_E, BLOCK_C, BLOCK_R
        )
    else:
        _fourier_backward(
            grad, of_biases, active, last, network, weight, scale, of_attention, of_weight,
            of_last + image * F * (inputs + 1), sizes, block - locals, BLOCK_E, BLOCK_C, BLOCK_K, BLOCK_R,
        )  # fmt: skip


@jit_for_all_sizes("S")
def fold_attention_network_backward_kernel(
    spatial, wavelet, fourier, last, network, of_attention, mean, grad_logits, grad_means, hiddens, grad_hiddens, grads,
    area, S, W, F, inputs, outputs, hidden,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Of image `program_id`, from the attention's gradient: those of the maps' sums, and the factors of the network's,
    as `attention_parameters_kernel` takes them; those of the means.
    """
    sums, sizes = (spatial, wavelet, fourier, 1.0, (1, 1), (inputs, 1)), (S, W, F, inputs, outputs, hidden)
    local, channels = S + W, S + W + F
    image = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    before = _before_relu(sums, last, network, image, sizes, area, BLOCK_C, BLOCK_K, BLOCK_R, PARTS)
    active = tl.where(before < 0, 0.0, before)
    grad_hidden = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        row = image * channels + c
        attention, weight = second_layer(active, network[2], network[3], c, channels, hidden, BLOCK_R)
        upstream = tl.load(of_attention + row, mask=c < channels, other=0.0)
        grad_logit = upstream * attention * (1.0 - attention)
        grad_hidden += tl.sum(weight * grad_logit[:, None], 0)
        tl.store(grad_logits + row, grad_logit, mask=c < channels)
        tl.store(mean + row, _means(sums, last, image, c, sizes, area, BLOCK_K, PARTS), mask=c < channels)
    grad_hidden = tl.where(before <= 0, 0.0, grad_hidden)
    tl.store(hiddens + image * hidden + r, active, mask=r < hidden)
    tl.store(grad_hiddens + image * hidden + r, grad_hidden, mask=r < hidden)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        factor = load_matrix(network[0], r, r < hidden, c, channels, channels)
        of_mean = tl.sum(factor * grad_hidden[:, None], 0)
        store(grads[0] + image * S + c, of_mean / area, c < S)
        store(grads[1] + image * W + c - S, of_mean / area, (c >= S) & (c < local))
        tl.store(grad_means + image * channels + c, of_mean, mask=c < channels)
    for start in range(0, inputs, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK_K,), tl.float32)
        for first in range(0, F, BLOCK_C):
            f = first + tl.arange(0, BLOCK_C)
            factor = load_matrix(network[0] + local, r, r < hidden, f, F, channels)
            of_mean = tl.sum(factor * grad_hidden[:, None], 0)
            total += tl.sum(load_matrix(last[0], f, f < F, k, inputs, inputs) * of_mean[:, None], 0)
        store(grads[2] + image * inputs + k, total / area, k < inputs)


@triton.jit
def _output_parameters(
    grad, weight, bias, scale, of_weight, grads, sizes, batch, block, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Gradients of a block of the outputs' weights, biases and scales."""
    S, W, F, _, outputs, _ = sizes
    channels = S + W + F
    e = block * BLOCK_E + tl.arange(0, BLOCK_E)
    factor = _scale(scale, e, outputs)
    of_bias = tl.zeros((BLOCK_E,), tl.float32)
    for image in range(batch):
        of_bias += load(grad + image * outputs + e, e < outputs)
    store(grads[1] + e, of_bias * factor, e < outputs)
    of_scale = of_bias * load(bias + e, e < outputs)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_E, BLOCK_C), tl.float32)
        of_image = of_weight
        for _ in range(batch):
            total += load_matrix(of_image, e, e < outputs, c, channels, channels)
            of_image += outputs * channels
        store_matrix(grads[0], total * factor[:, None], e, e < outputs, c, channels, channels)
        of_scale += tl.sum(total * load_matrix(weight, e, e < outputs, c, channels, channels), 1)
    if scale is not None:
        store(grads[2] + e, of_scale, e < outputs)


@triton.jit
def _last_parameters(
    fourier, of_last, grad_means, grads, sizes, batch, area, block, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Gradients of a block of channels of the Fourier branch's last convolution."""
    S, W, F, inputs, _, _ = sizes
    channels, row_stride = S + W + F, inputs + 1
    f = block * BLOCK_C + tl.arange(0, BLOCK_C)
    grad_means += S + W
    of_bias = tl.zeros((BLOCK_C,), tl.float32)
    for image in range(batch):
        of_bias += load(of_last + (image * F + f) * row_stride + inputs, f < F)
        of_bias += load(grad_means + image * channels + f, f < F)
    store(grads[4] + f, of_bias, f < F)
    for first in range(0, inputs, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        total = tl.zeros((BLOCK_C, BLOCK_K), tl.float32)
        for image in range(batch):
            total += load_matrix(of_last + image * F * row_stride, f, f < F, k, inputs, row_stride)
            of_mean = load(grad_means + image * channels + f, f < F) / area
            total += of_mean[:, None] * load(fourier + image * inputs + k, k < inputs)[None, :]
        store_matrix(grads[3], total, f, f < F, k, inputs, inputs)


@jit_for_all_sizes("S")
def fold_attention_parameters_kernel(
    grad, fourier, weight, bias, scale, of_weight, of_last, grad_means, grads, area,
    S, W, F, inputs, outputs, hidden, batch, blocks,
    BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Sums over the images, in order, into the gradients of weight, bias, scale, and the Fourier branch's last weight
    and bias; `grad` is the folded biases'. The first `blocks` programs have the outputs, the others that branch.
    """
    sizes = (S, W, F, inputs, outputs, hidden)
    program = tl.program_id(0)
    if program < blocks:
        _output_parameters(grad, weight, bias, scale, of_weight, grads, sizes, batch, program, BLOCK_E, BLOCK_C)
    else:
        _last_parameters(fourier, of_last, grad_means, grads, sizes, batch, area, program - blocks, BLOCK_C, BLOCK_K)


class _Net(NamedTuple):
    """Sizes and parameters as the kernels take them."""

    sizes: tuple[int, ...]
    last: tuple[Tensor, Tensor]
    network: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor
    scale: Tensor | None

    @property
    def outputs(self) -> int:
        return len(self.bias)


def _blocks(hidden: int, like: Tensor) -> dict[str, int | bool]:
    """Constants of the kernels."""
    sizes = {"BLOCK_E": _OUTPUTS, "BLOCK_C": _CHANNELS, "BLOCK_K": _INPUTS, "PARTS": _PARTS}
    return {**sizes, "BLOCK_R": max(_HIDDEN, next_power_of_2(hidden)), **matrix_options(like), "num_warps": 4}


def prepare(
    like: Tensor,
    sizes: tuple[int, ...],
    batch: int,
    area: float,
    unit: float,
    parts: tuple[int, int],
    strides: tuple[int, ...],
) -> Launch:
    """Of `fold_attention_kernel`: the sums of the local branches are (B, channels, parts), those of the Fourier branch
    in some unit, with the strides of images and of channels.
    """
    numbers = (unit, area, *sizes, batch, *parts, *strides)
    return Launch(fold_attention_kernel, (batch, cdiv(sizes[4], _OUTPUTS)), numbers, _blocks(sizes[5], like))


def _net(spatial: Tensor, wavelet: Tensor, fourier: Tensor, *parameters: Any) -> _Net:
    contiguous: list[Any] = [None if p is None else p.contiguous() for p in parameters]
    w1, b1, w2, b2, last_weight, last_bias, weight, bias, scale = contiguous
    sizes = (spatial.shape[1], wavelet.shape[1], len(last_bias), fourier.shape[1], len(bias), len(b1))
    return _Net(sizes, (last_weight, last_bias), (w1, b1, w2, b2), weight, bias, scale)


def fold_attention(spatial: Tensor, wavelet: Tensor, fourier: Tensor, *arguments: Any) -> Tensor:
    """`reference.fold_attention`. Parameters are float32, float16 or bfloat16; arithmetic is fp32.

    Raises:
        TypeError: the sums have another dtype.
    """
    *parameters, area = arguments
    check_dtype("spatial_sums", spatial)
    spatial, wavelet = spatial.contiguous(), wavelet.contiguous()
    net, batch = _net(spatial, wavelet, fourier, *parameters), len(fourier)
    out = spatial.new_empty(batch * net.outputs * (spatial.shape[1] + wavelet.shape[1] + fourier.shape[1] + 1))
    if batch:
        launch = prepare(out, net.sizes, batch, float(area), 1.0, (1, 1), fourier.stride())
        with torch.cuda.device_of(out):
            launch(spatial, wavelet, fourier, net.last, net.network, net.weight, net.bias, net.scale, out)
    return out


def fold_attention_backward(
    grad: Tensor, spatial: Tensor, wavelet: Tensor, fourier: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """Gradients of `fold_attention` by its twelve tensors; those not there are empty, and all unless needed.

    Deterministic. The attention is computed again.
    """
    *parameters, area, needed = arguments
    inputs = (spatial, wavelet, fourier, *parameters)
    every = parameter_gradients(spatial, inputs, needed)
    if not needed or not len(spatial):
        return every
    spatial, wavelet, fourier, grad = (t.contiguous() for t in (spatial, wavelet, fourier, grad))
    net, batch = _net(spatial, wavelet, fourier, *parameters), len(spatial)
    local, channels = spatial.shape[1] + wavelet.shape[1], net.network[0].shape[1]
    last_channels, last_inputs = net.last[0].shape
    numbers = (4 * (channels,), 2 * (net.sizes[5],), (net.outputs * channels, last_channels * (last_inputs + 1)))
    (of_attention, mean, grad_logits, grad_means), hiddens, (of_weight, of_last) = (
        [torch.empty(batch * n, dtype=torch.float32, device=grad.device) for n in counts] for counts in numbers
    )
    sums, constants = (spatial, wavelet, fourier), _blocks(net.sizes[5], grad)
    locals, lasts = cdiv(local, _CHANNELS), cdiv(last_channels, _CHANNELS)
    blocks, weights = cdiv(net.outputs, _OUTPUTS), batch * net.outputs * (local + last_inputs)
    with torch.cuda.device_of(grad):
        fold_attention_backward_kernel[(batch, locals + lasts)](
            grad, *sums, net.last, net.network, net.weight, net.scale, of_attention, of_weight, of_last, float(area),
            *net.sizes, batch, locals, **constants,
        )  # fmt: skip
        del constants["BLOCK_E"]
        fold_attention_network_backward_kernel[(batch,)](
            *sums, net.last, net.network, of_attention, mean, grad_logits, grad_means, *hiddens,
            every[:3], float(area), *net.sizes, **constants,
        )  # fmt: skip
        attention_parameters_kernel[(cdiv(channels, 32), cdiv(net.sizes[5], 32))](
            mean, grad_logits, *hiddens, *every[3:7], batch, channels, net.sizes[5],
            BLOCK_C=32, BLOCK_R=32, enable_fp_fusion=True,
        )  # fmt: skip
        of_last_weight, of_last_bias, of_weights, of_biases, of_scales = every[7:]
        fold_attention_parameters_kernel[(blocks + lasts,)](
            grad[weights:], fourier, net.weight, net.bias, net.scale, of_weight, of_last, grad_means,
            (of_weights, of_biases, of_scales, of_last_weight, of_last_bias), float(area), *net.sizes, batch, blocks,
            BLOCK_E=_OUTPUTS, BLOCK_C=_CHANNELS, BLOCK_K=_INPUTS, enable_fp_fusion=True,
        )  # fmt: skip
    return every
