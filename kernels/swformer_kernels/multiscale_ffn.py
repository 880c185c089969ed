"""Multi-scale feed-forward network, forward and backward.

Average pooling commutes with the first 1x1 convolution, so the pooled image is convolved. Maps of all three scales that
are kept between kernels make a pyramid: one buffer with the levels (B, M, ceil(H / s), ceil(W / s)) for s = 1, 2, 4.
Their rows end in zeros up to a multiple of 16 bytes, so that kernels are the same for all sizes. A program takes a tile
of some rows and columns of an image or a level; pixels that it needs from its neighbours' tiles it reads or computes
again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._device import (
    Launch,
    alignment,
    architecture,
    cdiv,
    channel_block,
    check_dtype,
    empty,
    input_precision,
    is_channels_last,
    lane_first,
    matrix_options,
    parameter_gradients,
)
from ._ffn_backward import (
    ffn_depthwise_backward_kernel,
    ffn_downsample_kernel,
    ffn_in_backward_kernel,
    ffn_in_parameters_kernel,
    ffn_out_backward_kernel,
)
from ._ffn_forward import ffn_in_kernel, ffn_low_kernel, ffn_out_kernel
from ._sums import sum_partials

_COLUMNS = 32
# Rows and columns of a tile of the 1x1 convolutions around the pyramid: rows of a sample of the last level, and columns
# whose sums fit 128 registers a thread.
_BAND, _BAND_COLUMNS = 4, 16
# Rows of a tile: of the planes' part forward and backward, and of the kernels of single levels.
_OUT_ROWS, _OUT_COLUMNS = 8, 16
_OUT_BACKWARD_ROWS = 1
_LEVEL_ROWS = 8
# Targets whose matrix units leave the planes' part registers for 512 threads; of them, Triton 3.6 spends more.
_SPARES_REGISTERS = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)
_MANY_WARPS = ("sm_90", "sm_10", "sm_11") if _SPARES_REGISTERS else ("sm_90",)
# Channels that a program takes: of the first convolution and its gradients, after and before the last one, of a level.
_HIDDEN_CHANNELS = 64
_INPUT_CHANNELS = 64
_PARAMETER_CHANNELS = 32
_OUT_CHANNELS = 64
_OUT_BACKWARD_CHANNELS = 32
_LEVEL_CHANNELS = 4
# Pixels a program of a reduction adds up in fp32 before the second stage goes on in fp64.
_PIXELS_A_PARTIAL = 1024


class Sizes(NamedTuple):
    """Of an image and a network."""

    size: tuple[int, ...]
    mid: int
    outputs: int

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """Heights and widths."""
        return tuple((cdiv(self.size[2], s), cdiv(self.size[3], s)) for s in (1, 2, 4))

    def tiles(self, rows: int, columns: int = _COLUMNS) -> int:
        """Tiles of the images."""
        batch, _, height, width = self.size
        return batch * cdiv(height, rows) * cdiv(width, columns)

    def low_tiles(self) -> int:
        """Programs over the levels 1 and 2."""
        tiles = sum(cdiv(h, _LEVEL_ROWS) * cdiv(w, _COLUMNS) for h, w in self.levels[1:])
        return self.size[0] * cdiv(self.mid, _LEVEL_CHANNELS) * tiles

    def level_numel(self, like: Tensor, level: int) -> int:
        """Elements of a level of a pyramid, with what its rows end in."""
        height, width = self.levels[level]
        vector = 16 // like.element_size()
        return self.size[0] * self.mid * height * (cdiv(width, vector) * vector)

    def numel(self, like: Tensor, first: int = 0) -> int:
        """Elements of a pyramid without the levels before `first`."""
        return sum(self.level_numel(like, level) for level in range(first, 3))


class _Parameters(NamedTuple):
    in_weight: Tensor
    in_bias: Tensor
    dw_weights: tuple[Tensor, ...]
    dw_biases: tuple[Tensor, ...]
    out_weight: Tensor
    out_bias: Tensor


def _one_dtype(three: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of which a program takes one."""
    return three if three[0].dtype == three[1].dtype == three[2].dtype else tuple(p.float() for p in three)


def depthwise_parameters(depthwise: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Weights and biases of the three convolutions."""
    return _one_dtype(tuple(depthwise[::2])), _one_dtype(tuple(depthwise[1::2]))


def _read(x: Tensor, *parameters: Tensor) -> tuple[Sizes, _Parameters]:
    check_dtype("x", x)
    in_weight, in_bias, *depthwise, out_weight, out_bias = (p.contiguous() for p in parameters)
    if any(weight.shape[-2:] != (3, 3) for weight in depthwise[::2]):
        raise ValueError("the depthwise kernels must be 3 x 3 for the Triton kernels")
    sizes = Sizes(tuple(x.shape), in_bias.shape[0] // 3, out_bias.shape[0])
    return sizes, _Parameters(in_weight, in_bias, *depthwise_parameters(depthwise), out_weight, out_bias)


def _layout(x: Tensor, tensors: list[Tensor]) -> dict[str, Any]:
    """Constants of the access to images (B, C, H, W) that are laid out like `x`."""
    last = is_channels_last(x)
    lane = 1 if last else 3
    return {"ALIGN": alignment(tensors[0].shape[lane], lane, tensors), "CHANNELS_LAST": last}


def _band(x: Tensor) -> tuple[int, int]:
    """Columns of a tile of `x`, and registers of a thread. The last level's part of a tile must hold 16 bytes, to which
    its rows are padded: half-precision tiles are wider.
    """
    return (_BAND_COLUMNS, 128) if x.element_size() == 4 else (max(_BAND_COLUMNS, 32), 255)


def _out_options(x: Tensor, held: bool = True) -> dict[str, int | bool]:
    """Options of the planes' part: 512 threads, held to 128 registers so that two programs fit a multiprocessor, unless
    they would spill."""
    return matrix_options(x, 512, 128) if held and architecture(x.device).startswith(_MANY_WARPS) else matrix_options(x)


def _out_backward_options(x: Tensor, block: int, channels_last: bool) -> dict[str, int | bool]:
    """Blackwell's program would spill, in fp32 Hopper's of few outputs or of channels_last, and those of Triton 3.6."""
    light = x.element_size() == 2 or (block == _OUT_CHANNELS and not channels_last)
    return _out_options(x, _SPARES_REGISTERS and light and architecture(x.device).startswith("sm_90"))


def prepare_in(net: Sizes, x: Tensor) -> Launch:
    """Of `ffn_in_kernel`."""
    batch, dim, height, width = net.size
    block, layout = channel_block(net.mid, _HIDDEN_CHANNELS), _layout(x, [x])
    lane, *strides = lane_first(x, layout["CHANNELS_LAST"])
    columns, registers = _band(x)
    constants = {"BLOCK_K": 16, "BLOCK_M": block, "ROWS": _BAND, "COLUMNS": columns, "PRECISION": input_precision(x)}
    constants |= layout | matrix_options(x, registers=registers)
    grid = (net.tiles(_BAND, columns), cdiv(net.mid, block))
    return Launch(ffn_in_kernel, grid, (lane, dim, net.mid, batch, height, width, *strides), constants)


def prepare_low(net: Sizes) -> Launch:
    """Of `ffn_low_kernel`."""
    batch, _, height, width = net.size
    constants = {"BLOCK_C": _LEVEL_CHANNELS, "ROWS": _LEVEL_ROWS, "COLUMNS": _COLUMNS, "enable_fp_fusion": True}
    return Launch(ffn_low_kernel, (net.low_tiles(),), (batch, net.mid, height, width), constants)


def prepare_out(net: Sizes, y: Tensor, residual: Tensor | None) -> Launch:
    """Of `ffn_out_kernel`."""
    batch, _, height, width = net.size
    layout, block = _layout(y, [y] if residual is None else [y, residual]), channel_block(net.outputs, _OUT_CHANNELS)
    last = layout["CHANNELS_LAST"]
    (residual_lane, *residual_strides), (lane, *strides) = lane_first(residual, last), lane_first(y, last)
    numbers = (residual_lane, lane, net.outputs, net.mid, batch, height, width, *residual_strides, *strides)
    constants: dict[str, Any] = {"BLOCK_C": 16, "BLOCK_E": block, "ROWS": _OUT_ROWS, "COLUMNS": _OUT_COLUMNS}
    constants |= {"PRECISION": input_precision(y), **layout, **_out_options(y)}
    grid = (net.tiles(_OUT_ROWS, _OUT_COLUMNS), cdiv(net.outputs, block))
    return Launch(ffn_out_kernel, grid, numbers, constants)


def _forward_pyramids(net: Sizes, parameters: _Parameters, x: Tensor) -> tuple[Tensor, Tensor]:
    """The pyramids before and (without its first level) after the depthwise convolutions."""
    hidden, mixed = x.new_empty(net.numel(x)), x.new_empty(net.numel(x, first=1))
    prepare_in(net, x)(x, parameters.in_weight, parameters.in_bias, hidden)
    prepare_low(net)(hidden, mixed, parameters.dw_weights, parameters.dw_biases)
    return hidden, mixed


def multiscale_ffn(x: Tensor, *arguments: Any) -> Tensor:
    """`reference.multiscale_ffn`; `arguments` are weight and bias of the first, the three depthwise and the last
    convolution, and what is added to the result, which may be None or missing.

    `x` is float32, float16 or bfloat16 of any strides, the parameters of any of these dtypes; sums are fp32, products
    as `torch.set_float32_matmul_precision` says, for a half-precision `x` tf32. Maps between kernels have the dtype of
    `x`. A channels_last `x` gives a channels_last result, any other a contiguous one.

    Raises:
        TypeError: `x` has another dtype.
        ValueError: a depthwise kernel is not 3 x 3.
    """
    residual = arguments[10] if arguments[10:] else None
    net, of_net = _read(x, *arguments[:10])
    y = empty(x, x.shape[0], net.outputs, *x.shape[2:])
    if residual is not None:
        layout = torch.channels_last if is_channels_last(y) else torch.contiguous_format
        residual = residual.contiguous(memory_format=layout)
    if x.numel():
        with torch.cuda.device_of(x):
            hidden, mixed = _forward_pyramids(net, of_net, x)
            first = of_net.dw_weights[0], of_net.dw_biases[0]
            last = of_net.out_weight, of_net.out_bias
            prepare_out(net, y, residual)(hidden, mixed, *first, *last, None, residual, y)
    return y


def multiscale_ffn_backward(grad: Tensor, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of `multiscale_ffn` by x and the ten parameters; those not needed are empty. Deterministic.

    `arguments` are the parameters, need_x and need_parameters. Everything is recomputed from `x`. `grad` may have any
    strides; the gradient of x has the layout that `multiscale_ffn` gives its result.
    """
    *parameters, need_x, need_parameters = arguments
    net, of_net = _read(x, *parameters)
    batch, dim, height, width = net.size
    mid, outputs = net.mid, net.outputs
    out = empty(x, *x.shape) if need_x else x.new_empty(0)
    grads = parameter_gradients(x, tuple(parameters), need_parameters)
    if not x.numel() or not (need_x or need_parameters):
        return out, *grads

    def partials(parts: int, count: int) -> Tensor | None:
        return torch.empty((parts, 1, count), dtype=torch.float32, device=x.device) if need_parameters else None

    precision = input_precision(x)
    columns, registers = _band(x)
    light = {"PRECISION": precision, **matrix_options(x, registers=registers)}
    with torch.cuda.device_of(x):
        hidden, mixed = _forward_pyramids(net, of_net, x)
        mixed_grads, full = torch.empty_like(hidden), net.level_numel(x, 0)
        first_grads, low_grads = mixed_grads[:full], mixed_grads[full:]
        other_grads = x.new_empty(2 * full)
        tiles, each = net.tiles(_OUT_BACKWARD_ROWS), max(1, _PIXELS_A_PARTIAL // (_OUT_BACKWARD_ROWS * _COLUMNS))
        block, parts = channel_block(outputs, _OUT_CHANNELS), cdiv(tiles, each)
        of_out = partials(parts, outputs * (3 * mid + 1))
        blocks = cdiv(outputs, block) if need_parameters else 1
        # Products without matrix units take more registers.
        channels = channel_block(
            mid, min(16, _OUT_BACKWARD_CHANNELS) if precision == "ieee" else _OUT_BACKWARD_CHANNELS
        )
        layout = _layout(grad, [grad])
        lane, *strides = lane_first(grad, layout["CHANNELS_LAST"])
        options = {"PRECISION": precision, **_out_backward_options(x, block, layout["CHANNELS_LAST"])}
        ffn_out_backward_kernel[(parts, cdiv(mid, channels), blocks)](
            grad, hidden, mixed, of_net.dw_weights[0], of_net.dw_biases[0], of_net.out_weight, first_grads, other_grads,
            of_out, lane, outputs, mid, batch, height, width, tiles, each, *strides,
            BLOCK_K=16, BLOCK_C=channels, BLOCK_E=block, ROWS=_OUT_BACKWARD_ROWS, COLUMNS=_COLUMNS, **layout, **options,
        )  # fmt: skip
        levels = {"BLOCK_C": _LEVEL_CHANNELS, "ROWS": _LEVEL_ROWS, "COLUMNS": _COLUMNS, "enable_fp_fusion": True}
        ffn_downsample_kernel[(net.low_tiles(),)](other_grads, low_grads, batch, mid, height, width, **levels)
        hidden_grads = torch.empty_like(hidden)
        parts = cdiv(net.tiles(_LEVEL_ROWS), max(1, _PIXELS_A_PARTIAL // (_LEVEL_ROWS * _COLUMNS)))
        of_depthwise = partials(parts, 3 * mid * 10)
        ffn_depthwise_backward_kernel[(parts, 3, cdiv(mid, _LEVEL_CHANNELS))](
            mixed_grads, hidden, hidden_grads, of_net.dw_weights, of_depthwise, batch, mid, height, width, **levels
        )
        if need_x:
            block, layout = channel_block(dim, _INPUT_CHANNELS), _layout(x, [out])
            lane, *strides = lane_first(out, layout["CHANNELS_LAST"])
            ffn_in_backward_kernel[(net.tiles(_BAND, columns), cdiv(dim, block))](
                hidden_grads, of_net.in_weight, out, lane, dim, mid, batch, height, width, *strides,
                BLOCK_K=16, BLOCK_D=block, ROWS=_BAND, COLUMNS=columns, **layout, **light,
            )  # fmt: skip
        if need_parameters:
            tiles, each = net.tiles(1, columns), max(1, _PIXELS_A_PARTIAL // columns)
            block, parts, layout = channel_block(dim, _INPUT_CHANNELS), cdiv(tiles, each), _layout(x, [x])
            lane, *strides = lane_first(x, layout["CHANNELS_LAST"])
            of_in = partials(parts, 3 * mid * (dim + 1))
            ffn_in_parameters_kernel[(parts, cdiv(mid, _PARAMETER_CHANNELS), cdiv(dim, block))](
                hidden_grads, x, of_in, lane, dim, mid, batch, height, width, tiles, each, *strides,
                BLOCK_M=_PARAMETER_CHANNELS, BLOCK_D=block, COLUMNS=columns, **layout, **light,
            )  # fmt: skip
            for sums, places in ((of_in, (0, 1)), (of_depthwise, range(2, 8)), (of_out, (8, 9))):
                if sums is not None:
                    sum_partials(sums, *(grads[i] for i in places))
    return out, *grads
