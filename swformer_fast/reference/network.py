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
from .haar_idwt2d import HaarIDWT2d

if TYPE_CHECKING:
    from typing_extensions import Self

EXITS = ("small", "medium", "large")
MERGES = ("add", "concat")
PYRAMIDS = ("haar", "pixel_unshuffle")
MULTIPLE = 16
"""Sides are padded to a multiple of this: the third level has a quarter of the side, its FFN pools by four."""


class Preset(NamedTuple):
    widths: tuple[int, int, int]
    depths: tuple[int, int, int, int, int]


PRESETS = {
    "derain": Preset((24, 48, 96), (21, 3, 1, 10, 15)),
    "lowlight": Preset((16, 32, 64), (6, 6, 8, 6, 6)),
    "defocus": Preset((28, 56, 112), (4, 4, 7, 4, 4)),
    "tiny": Preset((16, 32, 64), (1, 1, 2, 1, 1)),
}
"""Widths and depths. The paper's three tasks, reconstructed to match the parameter and FLOP counts of all three exits;
"tiny" is ours, for demonstrations and tests, and has no counterpart in the paper."""


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


def reflected(image: Tensor, dim: int) -> Tensor:
    """One side padded to a multiple by reflection, as F.pad does, which asks for the number of pixels."""
    side = image.shape[dim]
    padded = (side + MULTIPLE - 1) // MULTIPLE * MULTIPLE
    return image.index_select(dim, side - 1 - (torch.arange(padded, device=image.device) - (side - 1)).abs())


def cropped(x: Tensor, height: int, width: int) -> Tensor:
    """The first rows and columns."""
    if not torch.compiler.is_exporting():
        return x[..., :height, :width]
    rows, columns = (torch.arange(side, device=x.device) for side in (height, width))  # a slice asks whether it is one
    return x.index_select(2, rows).index_select(3, columns)


class SWFormer(nn.Module):
    """Image restoration network with three resolutions and an exit at each: "small", "medium" and "large".

    With `p0` the image, `p1`, `p2` its one- and two-level transforms and `inverse` the transform's inverse::

        x1 = stages[0](embeddings[0](p0))
        x2 = stages[1](fusions[0](downs[0](x1), embeddings[1](p1)))
        x3 = stages[2](fusions[1](downs[1](x2), embeddings[2](p2)))
        small = inverse(inverse(heads[0](x3) + p2))
        x4 = stages[3](skips[0](ups[0](x3), x2))
        medium = inverse(heads[1](x4) + p1)
        x5 = stages[4](skips[1](ups[1](x4), x1))
        large = heads[2](x5) + p0

    Embeddings and heads are 3x3 convolutions, downs a 1x1 convolution and PixelUnshuffle(2), ups a 1x1 convolution and
    PixelShuffle(2). Each exit restores the whole image, and nothing that comes after it runs: one set of weights, three
    points of speed and quality. Whatever belongs to a smaller exit comes first in its ModuleList, so a network built
    with a smaller `exit` loads its part of a larger one's state_dict::

        small.load_state_dict({name: state[name] for name in small.state_dict()})

    Training on a smaller exit alone leaves what comes after it without gradients: build the network with that `exit`,
    or give DistributedDataParallel `find_unused_parameters=True`.

    Args:
        in_channels: C of the image.
        widths: channels of the three resolutions; the second and third must be multiples of 4.
        depths: blocks of the five stages; a network without a stage ignores its depth.
        pyramid: "haar" (orthonormal; a guess of ours) or "pixel_unshuffle".
        fusion: how embedded images join the down path, "add" (a guess of ours) or "concat" with a 1x1 convolution.
        skip: how the encoder's maps join the decoder, "concat" with a 1x1 convolution or "add".
        exit: the last exit that is built, one of `EXITS`.
        block_options: of every `SWFormerBlock`.

    `options` holds these arguments again. Subclasses choose other parts by the class attributes `block_type`,
    `conv_type`, `dwt_type`, `idwt_type`, `merge_type`, `resample_type` and `stage_type`.

    Source: architecture figure of arXiv 2505.05504, panel "Lossless Multi-Input Multi-Output", whose authors published
    no code: a reconstruction of matching size and cost. The figure settles the exits and the widths C, 2C, 4C; the
    published counts, which many definitions meet, do not identify the block.
    """

    block_type: type[SWFormerBlock] = SWFormerBlock
    conv_type: type[ImageConv2d] = ImageConv2d
    dwt_type: type[HaarDWT2d] = HaarDWT2d
    idwt_type: type[HaarIDWT2d] = HaarIDWT2d
    merge_type: type[Merge] = Merge
    resample_type: type[Resample] = Resample
    stage_type: type[Stage] = Stage

    def __init__(
        self,
        in_channels: int = 3,
        widths: Sequence[int] = PRESETS["derain"].widths,
        depths: Sequence[int] = PRESETS["derain"].depths,
        pyramid: str = "haar",
        fusion: str = "add",
        skip: str = "concat",
        exit: str = "large",
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
        check_choice("exit", exit, EXITS)

        self.in_channels, self.exit = in_channels, exit
        self.options = {
            "in_channels": in_channels,
            "widths": widths,
            "depths": depths,
            "pyramid": pyramid,
            "fusion": fusion,
            "skip": skip,
            "exit": exit,
            **block_options,
        }
        d1, d2, d3 = widths
        image_channels = (in_channels, 4 * in_channels, 16 * in_channels)
        ups = EXITS.index(exit)
        haar = pyramid == "haar"
        self.pyramid = nn.ModuleList(self.dwt_type(learnable=False) if haar else PixelUnshuffle(2) for _ in range(2))
        self.inverse = self.idwt_type(learnable=False) if haar else PixelShuffle(2)
        self.embeddings = nn.ModuleList(
            self.conv_type(channels, width, 3, padding=1)
            for channels, width in zip(image_channels, widths, strict=True)
        )
        self.stages = nn.ModuleList(
            self.stage_type(*(self.block_type(width, **block_options) for _ in range(depth)))
            for width, depth in list(zip((d1, d2, d3, d2, d1), depths, strict=True))[: 3 + ups]
        )
        self.downs = nn.ModuleList(
            self.resample_type(nn.Conv2d(source, target // 4, 1), PixelUnshuffle(2))
            for source, target in ((d1, d2), (d2, d3))
        )
        self.fusions = nn.ModuleList(self.merge_type(width, fusion) for width in (d2, d3))
        self.ups = nn.ModuleList(
            self.resample_type(nn.Conv2d(source, 4 * target, 1), PixelShuffle(2))
            for source, target in ((d3, d2), (d2, d1))[:ups]
        )
        self.skips = nn.ModuleList(self.merge_type(width, skip) for width in (d2, d1)[:ups])
        self.heads = nn.ModuleList(
            self.conv_type(width, channels, 3, padding=1)
            for channels, width in list(zip(image_channels, widths, strict=True))[::-1][: 1 + ups]
        )

    @classmethod
    def from_preset(cls, name: str, exit: str = "large", **options: Any) -> Self:
        """The network with the widths and depths of `PRESETS[name]`; `options` are those of the constructor."""
        check_choice("name", name, PRESETS)
        return cls(**{**PRESETS[name]._asdict(), "exit": exit, **options})

    def image_pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """What `forward(image, all_scales=True)` should give for a clean image: the targets of a multi-scale loss."""
        levels = self._transforms(self._pad(image))
        return tuple(self._crop(i, levels[i], image) for i in range(len(self.heads)))

    def forward(
        self,
        image: Tensor,
        exit: str | None = None,
        exits: Sequence[str] | None = None,
        all_scales: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        """Restore an image.

        Args:
            image: (B, C, H, W) with H, W >= 16. Sides that are no multiple of 16 are padded by reflection at the bottom
                and right, and the outputs cropped.
            exit: one of `EXITS` that is built, after which the network stops; None: the last one.
            exits: the restored images of several exits, in this order, in one pass.
            all_scales: for training, the output of every exit before the inverse transforms, in the order of `EXITS`.

        Returns:
            The restored image, (B, C, H, W), with `exits` a tuple of them. With `all_scales`
            (B, 16 * C, ceil(H / 4), ceil(W / 4)), (B, 4 * C, ceil(H / 2), ceil(W / 2)) and (B, C, H, W), as many as
            there are exits.

        Raises:
            ValueError: for another rank, number of channels, or a side below 16; for an exit that is none or is not
                built; for more than one of exit, exits and all_scales.
        """
        asked = self._asked(exit, exits, all_scales)
        levels = self._transforms(self._pad(image))
        encoded = [self.stages[0](self.embeddings[0](levels[2]))]  # popped where merged: no map outlives its use
        encoded.append(self.stages[1](self.fusions[0](self.downs[0](encoded[0]), self.embeddings[1](levels[1]))))
        x = self.stages[2](self.fusions[1](self.downs[1](encoded[1]), self.embeddings[2](levels[0])))
        outputs = {}
        for i in range(max(asked) + 1):
            if i:
                x = self.stages[2 + i](self.skips[i - 1](self.ups[i - 1](x), encoded.pop()))
            if i in asked:
                outputs[i] = self.heads[i](x) + levels[i]
        if all_scales:
            return tuple(self._crop(i, outputs[i], image) for i in asked)
        restored = tuple(self._restored(i, outputs[i], image) for i in asked)
        return restored[0] if exits is None else restored

    def _asked(self, exit: str | None, exits: Sequence[str] | None, all_scales: bool) -> Sequence[int]:
        """Places in `EXITS`."""
        all_scales = check_flag("all_scales", all_scales)
        if (exit is not None) + (exits is not None) + all_scales > 1:
            raise ValueError("exit, exits and all_scales exclude each other: give one of them")
        if all_scales:
            return range(len(self.heads))
        if exits is None:
            return (self._place("exit", self.exit if exit is None else exit),)
        if not isinstance(exits, (list, tuple)) or not exits:
            raise ValueError(f"exits must be a list or tuple of exits, got {exits!r}")
        return [self._place("exits", name) for name in exits]

    def _place(self, argument: str, name: str) -> int:
        check_choice(argument, name, EXITS)
        place = EXITS.index(name)
        if place >= len(self.heads):
            raise ValueError(f"{argument} must be built, got {name!r}: this network ends at exit {self.exit!r}")
        return place

    def _pad(self, image: Tensor) -> Tensor:
        if image.dim() != 4 or image.shape[1] != self.in_channels or any(side < MULTIPLE for side in image.shape[2:]):
            raise ValueError(
                f"image must have shape (B, {self.in_channels}, H, W) with H, W >= {MULTIPLE}, got {tuple(image.shape)}"
            )
        if torch.compiler.is_exporting():
            return reflected(reflected(image, 2), 3)
        below, right = -image.shape[2] % MULTIPLE, -image.shape[3] % MULTIPLE
        return F.pad(image, (0, right, 0, below), mode="reflect") if below or right else image

    def _transforms(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two-level, one-level and the image: what the exits add to, in their order."""
        half = self.pyramid[0](image)
        return self.pyramid[1](half), half, image

    def _restored(self, place: int, output: Tensor, image: Tensor) -> Tensor:
        for _ in EXITS[place + 1 :]:
            output = self.inverse(output)
        return cropped(output, image.shape[2], image.shape[3])

    @staticmethod
    def _crop(place: int, output: Tensor, image: Tensor) -> Tensor:
        scale = 2 ** len(EXITS[place + 1 :])
        height, width = ((side + scale - 1) // scale for side in image.shape[2:])
        return cropped(output, height, width)
