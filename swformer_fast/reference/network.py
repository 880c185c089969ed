"""The SWFormer network and its presets, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import SWFormerBlock
from .common import check_choice, check_flag, check_positive, check_sequence
from .haar_dwt2d import HaarDWT2d

if TYPE_CHECKING:
    from typing_extensions import Self

MERGES = ("add", "concat")
PYRAMIDS = ("haar", "learnable_haar", "pixel_unshuffle")
MULTIPLE = 16
"""Sides are padded to a multiple of this: the third level has a quarter of the side, its FFN pools by four."""


class Preset(NamedTuple):
    widths: tuple[int, int, int]
    depths: tuple[int, int, int, int, int]


PRESETS = {
    "derain-s": Preset((40, 40, 80), (4, 1, 2, 1, 4)),
    "derain-m": Preset((40, 40, 80), (5, 3, 4, 3, 5)),
    "derain-l": Preset((40, 40, 80), (8, 3, 4, 3, 8)),
    "lowlight-s": Preset((16, 32, 64), (2, 4, 7, 4, 2)),
    "lowlight-m": Preset((16, 32, 64), (3, 6, 8, 6, 3)),
    "lowlight-l": Preset((16, 32, 64), (6, 6, 8, 6, 6)),
    "defocus-s": Preset((32, 48, 96), (4, 2, 9, 2, 4)),
    "defocus-m": Preset((32, 48, 96), (6, 2, 10, 2, 6)),
    "defocus-l": Preset((32, 48, 96), (8, 2, 10, 2, 8)),
    "tiny": Preset((16, 24, 48), (1, 1, 3, 1, 1)),
}
"""Widths and depths. The paper's sizes, reconstructed to match its parameter and FLOP counts; "tiny" is ours, for
demonstrations and tests, and has no counterpart in the paper."""


class PixelUnshuffle(nn.PixelUnshuffle):
    """nn.PixelUnshuffle for empty batches too: PyTorch's returns them unchanged."""

    def forward(self, x: Tensor) -> Tensor:
        r = self.downscale_factor
        return super().forward(x) if x.shape[0] else x.repeat(1, r * r, 1, 1)[..., ::r, ::r]


class PixelShuffle(nn.PixelShuffle):
    """nn.PixelShuffle for empty batches too: PyTorch's gives them a gradient of the wrong shape."""

    def forward(self, x: Tensor) -> Tensor:
        r = self.upscale_factor
        return super().forward(x) if x.shape[0] else x[:, :: r * r].repeat(1, 1, r, r)


class ImageConv2d(nn.Conv2d):
    """A 3x3 convolution between an image and its features."""


class Merge(nn.Module):
    """Two maps of `dim` channels as one: their sum ("add"), or a 1x1 convolution of their concatenation ("concat")."""

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * dim, dim, 1) if kind == "concat" else None

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b if self.conv is None else self.conv(torch.cat((a, b), dim=1))


class Stage(nn.Sequential):
    """The blocks of one resolution on one side."""


class Resample(nn.Sequential):
    """A 1x1 convolution and a rearrangement of pixels to another resolution."""


class SWFormer(nn.Module):
    """Image restoration network with three resolutions, an image in and a residual image out at each.

    With `p0` the image and `p1`, `p2` its one- and two-level transforms::

        x1 = stages[0](embeddings[0](p0))
        x2 = stages[1](fusions[0](downs[0](x1), embeddings[1](p1)))
        x3 = stages[2](fusions[1](downs[1](x2), embeddings[2](p2)))
        x4 = stages[3](skips[0](ups[0](x3), x2))
        x5 = stages[4](skips[1](ups[1](x4), x1))
        outputs = heads[0](x5) + p0, heads[1](x4) + p1, heads[2](x3) + p2

    Embeddings and heads are 3x3 convolutions, downs a 1x1 convolution and PixelUnshuffle(2), ups a 1x1 convolution and
    PixelShuffle(2).

    Args:
        in_channels: C of the image.
        widths: channels of the three resolutions; the second and third must be multiples of 4.
        depths: blocks of the five stages.
        pyramid: "haar" (fixed, orthonormal; a guess of ours), "learnable_haar" or "pixel_unshuffle".
        fusion: how embedded images join the down path, "add" (a guess of ours) or "concat" with a 1x1 convolution.
        skip: how the encoder's maps join the decoder, "concat" with a 1x1 convolution or "add".
        block_options: of every `SWFormerBlock`.

    Subclasses choose other parts by the class attributes `block_type`, `conv_type`, `dwt_type`, `merge_type`,
    `resample_type` and `stage_type`.

    Source: architecture figure of arXiv 2505.05504, whose authors published no code: a reconstruction of matching size
    and cost.
    """

    block_type: type[SWFormerBlock] = SWFormerBlock
    conv_type: type[ImageConv2d] = ImageConv2d
    dwt_type: type[HaarDWT2d] = HaarDWT2d
    merge_type: type[Merge] = Merge
    resample_type: type[Resample] = Resample
    stage_type: type[Stage] = Stage

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = PRESETS["derain-s"].widths,
        depths: Sequence[int] = PRESETS["derain-s"].depths,
        pyramid: str = "haar",
        fusion: str = "add",
        skip: str = "concat",
        **block_options: Any,
    ) -> None:
        super().__init__()
        in_channels = check_positive("in_channels", in_channels)
        check_sequence("widths", widths, 3)
        check_sequence("depths", depths, 5)
        widths, depths = (
            [check_positive(name, value) for value in values]
            for name, values in (("widths", widths), ("depths", depths))
        )
        if any(width % 4 for width in widths[1:]):
            raise ValueError(f"the second and third of widths must be multiples of 4, got {tuple(widths)}")
        check_choice("pyramid", pyramid, PYRAMIDS)
        check_choice("fusion", fusion, MERGES)
        check_choice("skip", skip, MERGES)

        self.in_channels = in_channels
        d1, d2, d3 = widths
        image_channels = (in_channels, 4 * in_channels, 16 * in_channels)
        self.pyramid = nn.ModuleList(
            PixelUnshuffle(2) if pyramid == "pixel_unshuffle" else self.dwt_type(learnable=pyramid != "haar")
            for _ in range(2)
        )
        self.embeddings = nn.ModuleList(
            self.conv_type(channels, width, 3, padding=1)
            for channels, width in zip(image_channels, widths, strict=True)
        )
        self.stages = nn.ModuleList(
            self.stage_type(*(self.block_type(width, **block_options) for _ in range(depth)))
            for width, depth in zip((d1, d2, d3, d2, d1), depths, strict=True)
        )
        self.downs = nn.ModuleList(
            self.resample_type(nn.Conv2d(source, target // 4, 1), PixelUnshuffle(2))
            for source, target in ((d1, d2), (d2, d3))
        )
        self.fusions = nn.ModuleList(self.merge_type(width, fusion) for width in (d2, d3))
        self.ups = nn.ModuleList(
            self.resample_type(nn.Conv2d(source, 4 * target, 1), PixelShuffle(2))
            for source, target in ((d3, d2), (d2, d1))
        )
        self.skips = nn.ModuleList(self.merge_type(width, skip) for width in (d2, d1))
        self.heads = nn.ModuleList(
            self.conv_type(width, channels, 3, padding=1)
            for channels, width in zip(image_channels, widths, strict=True)
        )

    @classmethod
    def from_preset(cls, name: str, **options: Any) -> Self:
        """The network with the widths and depths of `PRESETS[name]`; `options` are those of the constructor."""
        check_choice("name", name, PRESETS)
        return cls(**{**PRESETS[name]._asdict(), **options})

    def image_pyramid(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The image and its two transforms, cropped as `forward(image, all_scales=True)` crops: the targets of a
        multi-scale loss."""
        return self._crop(self._transforms(self._pad(image)), image)

    def forward(self, image: Tensor, all_scales: bool = False) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Restore an image.

        Args:
            image: (B, C, H, W) with H, W >= 16. Sides that are no multiple of 16 are padded by reflection at the bottom
                and right, and the outputs cropped.
            all_scales: return the outputs at every resolution.

        Returns:
            The restored image, (B, C, H, W); with `all_scales` also its one- and two-level transforms,
            (B, 4 * C, ceil(H / 2), ceil(W / 2)) and (B, 16 * C, ceil(H / 4), ceil(W / 4)).

        Raises:
            ValueError: for another rank, number of channels, or a side below 16.
        """
        check_flag("all_scales", all_scales)
        p0, p1, p2 = self._transforms(self._pad(image))
        encoded = [self.stages[0](self.embeddings[0](p0))]  # popped where they are merged: no map outlives its use
        encoded.append(self.stages[1](self.fusions[0](self.downs[0](encoded[0]), self.embeddings[1](p1))))
        x3 = self.stages[2](self.fusions[1](self.downs[1](encoded[1]), self.embeddings[2](p2)))
        x4 = self.stages[3](self.skips[0](self.ups[0](x3), encoded.pop()))
        x5 = self.stages[4](self.skips[1](self.ups[1](x4), encoded.pop()))
        restored = self.heads[0](x5) + p0
        if not all_scales:
            return restored[..., : image.shape[2], : image.shape[3]]
        return self._crop((restored, self.heads[1](x4) + p1, self.heads[2](x3) + p2), image)

    def _pad(self, image: Tensor) -> Tensor:
        if image.dim() != 4 or image.shape[1] != self.in_channels or min(image.shape[2:]) < MULTIPLE:
            raise ValueError(
                f"image must have shape (B, {self.in_channels}, H, W) with H, W >= {MULTIPLE}, got {tuple(image.shape)}"
            )
        below, right = -image.shape[2] % MULTIPLE, -image.shape[3] % MULTIPLE
        return F.pad(image, (0, right, 0, below), mode="reflect") if below or right else image

    def _transforms(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = self.pyramid[0](image)
        return image, half, self.pyramid[1](half)

    @staticmethod
    def _crop(maps: tuple[Tensor, Tensor, Tensor], image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = image.shape[2:]
        full, half, quarter = maps
        return (
            full[..., :height, :width],
            half[..., : (height + 1) // 2, : (width + 1) // 2],
            quarter[..., : (height + 3) // 4, : (width + 3) // 4],
        )
