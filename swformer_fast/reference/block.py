"""Multi-domain mixer and SWFormer block, in plain PyTorch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .channel_attention import ChannelAttention
from .common import LARGEST, check_choice, check_number, check_odd, check_positive, check_sequence, submodules
from .depthwise_gelu import SpatialBranch
from .fourier_mix import FourierBranch
from .multiscale_ffn import MultiScaleFFN, hidden_channels
from .wavelet_mix import WaveletBranch

BRANCHES = ("spatial", "wavelet", "fourier")
NORM_POSITIONS = ("pre", "post")


class MultiDomainMixer(nn.Module):
    """Three branches on a split of the channels, then channel attention::

        parts = conv_in(x).split(...)                              # 1x1, one part for each branch
        y = cat([spatial(parts[0]), wavelet(parts[1]), fourier(parts[2])], dim=1)
        conv_out(attention(y))                                     # 1x1

    Args:
        dim: channels of input and output.
        split: the width of the spatial, wavelet and Fourier branch as multiples of `dim`; (1, 1, 1) by fit.
        order: the branches in the order of their channels after `conv_in`.
        spatial_kernel, wavelet_kernel: sides of the depthwise kernels; 3 is a guess of ours.
        layout: order of real and imaginary channels in the Fourier branch.
        reduction: of the channel attention; 4 by fit.

    Subclasses choose other branches by the class attributes `spatial_type`, `wavelet_type`, `fourier_type` and
    `attention_type`. Source: architecture figure of arXiv 2505.05504.
    """

    spatial_type: type[SpatialBranch] = SpatialBranch
    wavelet_type: type[WaveletBranch] = WaveletBranch
    fourier_type: type[FourierBranch] = FourierBranch
    attention_type: type[ChannelAttention] = ChannelAttention

    def __init__(
        self,
        dim: int,
        split: tuple[float, float, float] = (1, 1, 1),
        order: Sequence[str] = BRANCHES,
        spatial_kernel: int = 3,
        wavelet_kernel: int = 3,
        layout: str = "interleaved",
        reduction: int = 4,
    ) -> None:
        super().__init__()
        dim = check_positive("dim", dim)
        check_sequence("split", split, len(BRANCHES))
        if any(check_number("split", ratio) * dim % 1 or not 1 <= ratio * dim <= LARGEST for ratio in split):
            raise ValueError(f"split must be three multiples of dim that give whole channels, got {split} of {dim}")
        check_sequence("order", order, len(BRANCHES))
        for branch in order:
            check_choice("order", branch, BRANCHES)
        if len(set(order)) != len(BRANCHES):
            raise ValueError(f"order must hold each of {BRANCHES} once, got {tuple(order)}")
        spatial_kernel = check_odd("spatial_kernel", spatial_kernel)
        wavelet_kernel = check_odd("wavelet_kernel", wavelet_kernel)
        widths = {branch: int(ratio * dim) for branch, ratio in zip(BRANCHES, split, strict=True)}
        self.order = tuple(order)
        self.widths = [widths[branch] for branch in self.order]
        self.conv_in = nn.Conv2d(dim, sum(self.widths), 1)
        self.spatial = self.spatial_type(widths["spatial"], spatial_kernel)
        self.wavelet = self.wavelet_type(widths["wavelet"], wavelet_kernel)
        self.fourier = self.fourier_type(widths["fourier"], layout)
        self.attention = self.attention_type(sum(self.widths), reduction)
        self.conv_out = nn.Conv2d(sum(self.widths), dim, 1)

    @property
    def canonical(self) -> bool:
        """Whether split and order are the default and the Fourier branch is canonical."""
        conv_in, fourier = submodules(self, "conv_in", "fourier")
        dim = conv_in.in_channels
        return self.order == BRANCHES and self.widths == [dim, dim, dim] and fourier.canonical

    def forward(self, x: Tensor) -> Tensor:
        parts = self.conv_in(x).split(self.widths, dim=1)
        branches = {"spatial": self.spatial, "wavelet": self.wavelet, "fourier": self.fourier}
        outputs = [branches[name](part) for name, part in zip(self.order, parts, strict=True)]
        return self.conv_out(self.attention(torch.cat(outputs, dim=1)))

    def extra_repr(self) -> str:
        return f"order={self.order}, widths={self.widths}"


class SWFormerBlock(nn.Module):
    """Mixer and feed-forward network, each on the normalised input and added with a learnable scale per channel::

        x = x + beta * mixer(norm1(x))
        x = x + gamma * ffn(norm2(x))

    Args:
        dim: channels.
        norm_position: "pre" as above (figure) or "post", `x + beta * norm1(mixer(x))`.
        scale_init: start of `beta` and `gamma`, of shape (1, dim, 1, 1); 0 follows the authors' published code.
        ffn_ratio, ffn_kernel, pool, upsample: of the `MultiScaleFFN`.
        mixer_options: of the `MultiDomainMixer`.

    Subclasses choose other parts by the class attributes `mixer_type` and `ffn_type`. Source: architecture figure of
    arXiv 2505.05504.
    """

    mixer_type: type[MultiDomainMixer] = MultiDomainMixer
    ffn_type: type[MultiScaleFFN] = MultiScaleFFN

    def __init__(
        self,
        dim: int,
        norm_position: str = "pre",
        scale_init: float = 0.0,
        ffn_ratio: float = 3,
        ffn_kernel: int = 3,
        pool: str = "avg",
        upsample: str = "bilinear",
        **mixer_options: Any,
    ) -> None:
        super().__init__()
        check_choice("norm_position", norm_position, NORM_POSITIONS)
        dim, scale_init = check_positive("dim", dim), check_number("scale_init", scale_init)
        ffn_kernel = check_odd("ffn_kernel", ffn_kernel)
        hidden_channels("ffn_ratio", ffn_ratio, dim)
        self.norm_position = norm_position
        self.mixer = self.mixer_type(dim, **mixer_options)
        self.norm1 = nn.BatchNorm2d(dim)
        self.beta = nn.Parameter(torch.full((1, dim, 1, 1), float(scale_init)))
        self.ffn = self.ffn_type(dim, ffn_ratio, ffn_kernel, pool, upsample)
        self.norm2 = nn.BatchNorm2d(dim)
        self.gamma = nn.Parameter(torch.full((1, dim, 1, 1), float(scale_init)))

    @property
    def canonical(self) -> bool:
        """Whether the normalisation comes first and mixer and FFN are canonical."""
        return self.norm_position == "pre" and self.mixer.canonical and self.ffn.canonical

    def forward(self, x: Tensor) -> Tensor:
        if self.norm_position == "pre":
            x = x + self.beta * self.mixer(self.norm1(x))
            return x + self.gamma * self.ffn(self.norm2(x))
        x = x + self.beta * self.norm1(self.mixer(x))
        return x + self.gamma * self.norm2(self.ffn(x))

    def extra_repr(self) -> str:
        return f"norm_position={self.norm_position!r}"
