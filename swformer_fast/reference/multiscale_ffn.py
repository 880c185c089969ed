"""Multi-scale feed-forward network, in plain PyTorch."""

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..parameters import Convolution, FfnParameters
from .common import (
    LARGEST,
    check_choice,
    check_number,
    check_odd,
    check_positive,
    conv2d,
    conv_parameters,
    plain,
    submodules,
)

SCALES = (1, 2, 4)
POOLS: dict[str, Callable[..., Tensor]] = {"avg": F.avg_pool2d, "max": F.max_pool2d}
UPSAMPLINGS = ("bilinear", "nearest")


def multiscale_ffn(x: Tensor, parameters: FfnParameters, *, pool: str = "avg", upsample: str = "bilinear") -> Tensor:
    """Feed-forward network with depthwise convolutions at full, half and quarter resolution, with
    in_weight, in_bias, depthwise, out_weight, out_bias = parameters::

        parts = conv2d(x, in_weight, in_bias).chunk(3, dim=1)
        for part, s, (weight, bias) in zip(parts, (1, 2, 4), depthwise):
            z = avg_pool2d(part, s, ceil_mode=True)
            z = conv2d(z, weight, bias, padding=k // 2, groups=M)
            z = interpolate(z, size=(H, W), mode="bilinear", align_corners=False)
        conv2d(gelu(cat(all three z, dim=1)), out_weight, out_bias)

    A pooled map has ceil(H / s) x ceil(W / s) samples; where s does not divide a side, the last window averages the
    samples that it holds, and the bilinear map goes from ceil(H / s) to exactly H samples.

    Args:
        x: (B, D, H, W).
        parameters: in_weight (3 * M, D, 1, 1), in_bias (3 * M,), for each scale (M, 1, k, k), k odd, and (M,),
            out_weight (E, 3 * M, 1, 1), out_bias (E,); all are cast to the dtype of `x`.
        pool: "avg" or "max".
        upsample: "bilinear" or "nearest".

    Returns:
        (B, E, H, W) in the dtype of `x`.

    Source: the multi-scale FFN in the architecture figure of arXiv 2505.05504.
    """

    def depthwise(conv: Convolution) -> Callable[[Tensor], Tensor]:
        return lambda part: conv2d(part, *conv, groups=part.shape[1])

    def last(y: Tensor) -> Tensor:
        return conv2d(y, parameters.out_weight, parameters.out_bias)

    hidden = conv2d(x, parameters.in_weight, parameters.in_bias)
    return _after_first(hidden, [depthwise(conv) for conv in parameters.depthwise], last, pool, upsample)


def _after_first(
    hidden: Tensor,
    depthwise: Sequence[Callable[[Tensor], Tensor]],
    last: Callable[[Tensor], Tensor],
    pool: str,
    upsample: str,
) -> Tensor:
    """All but the first convolution."""
    size = (hidden.shape[2], hidden.shape[3])
    align_corners = False if upsample == "bilinear" else None
    outputs = []
    for part, scale, conv in zip(hidden.chunk(len(SCALES), dim=1), SCALES, depthwise, strict=True):
        if scale == 1:
            outputs.append(conv(part))
            continue
        mixed = conv(POOLS[pool](part, scale, ceil_mode=True))
        outputs.append(F.interpolate(mixed, size=size, mode=upsample, align_corners=align_corners))
    return last(F.gelu(torch.cat(outputs, dim=1)))


def hidden_channels(name: str, ratio: float, dim: int) -> int:
    """ratio * dim, a third for each scale; `name`: of the ratio."""
    hidden = check_number(name, ratio) * dim
    if not 3 <= hidden <= LARGEST or hidden % 3:
        raise ValueError(f"{name} * dim must be a positive multiple of 3, got {ratio} * {dim}")
    return int(hidden)


class MultiScaleFFN(nn.Module):
    """`multiscale_ffn` with its parameters and `ratio * dim` hidden channels, a third for each scale.

    Ratio 3 is a fit; kernel 3, average pooling and bilinear upsampling are guesses of ours.
    """

    def __init__(
        self, dim: int, ratio: float = 3, kernel_size: int = 3, pool: str = "avg", upsample: str = "bilinear"
    ) -> None:
        super().__init__()
        dim, kernel_size = check_positive("dim", dim), check_odd("kernel_size", kernel_size)
        check_choice("pool", pool, POOLS)
        check_choice("upsample", upsample, UPSAMPLINGS)
        hidden = hidden_channels("ratio", ratio, dim)
        width = hidden // len(SCALES)
        self.pool, self.upsample = pool, upsample
        self.conv_in = nn.Conv2d(dim, hidden, 1)
        self.dw = nn.ModuleList(
            nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=width) for _ in SCALES
        )
        self.conv_out = nn.Conv2d(hidden, dim, 1)

    @property
    def canonical(self) -> bool:
        """Whether this module is `multiscale_ffn` with its default keywords."""
        return self.pool == "avg" and self.upsample == "bilinear"

    @property
    def readable(self) -> bool:
        """Whether `arguments` says all; else the layers are called."""
        first, depthwise, last = submodules(self, "conv_in", "dw", "conv_out")
        return plain(first, *depthwise, last)

    def arguments(self) -> tuple[FfnParameters]:
        """The positional arguments of `multiscale_ffn` after `x`."""
        first, depthwise, last = submodules(self, "conv_in", "dw", "conv_out")
        one, two, four = [Convolution(*conv_parameters(conv)) for conv in depthwise]
        return (FfnParameters(*conv_parameters(first), (one, two, four), *conv_parameters(last)),)

    def forward(self, x: Tensor) -> Tensor:
        if self.readable:
            return multiscale_ffn(x, *self.arguments(), pool=self.pool, upsample=self.upsample)
        depthwise = cast(Sequence[Callable[[Tensor], Tensor]], self.dw)
        return _after_first(self.conv_in(x), depthwise, self.conv_out, self.pool, self.upsample)

    def extra_repr(self) -> str:
        return f"pool={self.pool!r}, upsample={self.upsample!r}"
