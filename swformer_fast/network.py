"""The SWFormer network on the fast modules."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import functional, fusion, pretrained, reference
from ._layout import as_output, channels_last
from .modules import HaarDWT2d, HaarIDWT2d, SWFormerBlock
from .parameters import Convolution
from .reference import EXITS, PRESETS
from .reference import network as reference_network
from .reference.common import conv_parameters, plain

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["EXITS", "PRESETS", "SWFormer"]


class ImageConv2d(reference_network.ImageConv2d):
    """A 3x3 convolution between an image and its features; that of fp16 on a CPU computes in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype(x.device.type) if functional.autocasts(x) else x.dtype
        if x.device.type != "cpu" or dtype != torch.float16:
            return super().forward(x)
        # PyTorch's own takes twenty times as long on most CPUs.
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(x.float(), self.weight.float(), bias).half()


class Merge(reference_network.Merge):
    __doc__ = reference_network.Merge.__doc__

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        if self.conv is None or not (plain(self.conv) and fusion.foldable(a) and fusion.foldable(b)):
            return super().forward(a, b)
        conv = Convolution(*conv_parameters(self.conv))
        return fusion.fused(lambda a, b: fusion.merge(a, b, conv), a, b)


class Resample(reference_network.Resample):
    __doc__ = reference_network.Resample.__doc__

    def forward(self, x: Tensor) -> Tensor:
        conv, rearrange = self
        if not (plain(conv) and fusion.foldable(x)):
            return super().forward(x)
        parameters = Convolution(*conv_parameters(conv))
        return rearrange(fusion.fused(lambda x: fusion.convolve(x, parameters), x))


class Stage(reference_network.Stage):
    __doc__ = reference_network.Stage.__doc__

    def forward(self, x: Tensor) -> Tensor:
        # Once for all of its blocks, which take contiguous maps.
        return super().forward(x.contiguous() if channels_last(x) and fusion.foldable(x) else x)


class SWFormer(reference.SWFormer):
    __doc__ = reference.SWFormer.__doc__

    block_type = SWFormerBlock
    conv_type = ImageConv2d
    dwt_type = HaarDWT2d
    idwt_type = HaarIDWT2d
    merge_type = Merge
    resample_type = Resample
    stage_type = Stage

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike[str],
        exit: str | None = None,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **options: Any,
    ) -> Self:
        """A trained network, in eval mode and fp32.

        Args:
            name_or_path: the first that there is of: a name that comes with the package (`pretrained.names()`,
                "tiny-haze" for instance), which needs no network; a file (.safetensors, or .pth, .pt, .ckpt with a
                state_dict as trainers write it); a folder that `save_pretrained` wrote; a repository of the Hugging
                Face Hub, "user/repository" (package huggingface_hub).
            exit: the last exit to build, no larger than what the file holds; None: all that it holds.
            revision, token, cache_dir, force_download, local_files_only: of the Hub, as huggingface_hub takes them.
            options: of the constructor, before those of the file. A file without options, a trainer's .pth, has them
                inferred from names and shapes, which do not tell all: say `pyramid="pixel_unshuffle"`, for instance.

        Raises:
            ValueError: there is no such name or file; the file is damaged, not safe to load or no SWFormer's; exit is
                larger than what it holds.
            OSError: a file or the Hub cannot be read.
            ImportError: safetensors or huggingface_hub is missing.
        """
        hub_options = {"revision": revision, "token": token, "cache_dir": cache_dir}
        hub_options |= {"force_download": force_download, "local_files_only": local_files_only}
        path, config = pretrained.find(name_or_path, **hub_options)
        return pretrained.build(cls, pretrained.load_weights(path), exit, {**(config or {}), **options}, str(path))

    def save_pretrained(
        self, folder: str | os.PathLike[str], dtype: torch.dtype | None = None, **metadata: Any
    ) -> None:
        """Write config.json, model.safetensors and, where there is none, README.md, a model card, to a folder.

        `from_pretrained` reads it, and so does huggingface_hub's PyTorchModelHubMixin. Each file is whole or as before.

        Args:
            folder: made where there is none.
            dtype: of the floating weights; None: their own.
            metadata: what else to say about them ("task", "psnr"), in model.safetensors and in the card.
        """
        pretrained.save(self, folder, dtype, metadata)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **options: Any
    ) -> Any:
        """Upload what `save_pretrained` writes to the Hugging Face Hub's repository "user/name", made where missing.

        A card that is there stays.
        `options` are those of huggingface_hub.upload_folder (`commit_message`, `revision`, `create_pr`), whose result,
        the commit, is returned.
        """
        return pretrained.push(self, repo_id, private, token, options)

    def forward(
        self,
        image: Tensor,
        exit: str | None = None,
        exits: Sequence[str] | None = None,
        all_scales: bool = False,
    ) -> Tensor | tuple[Tensor, ...]:
        outputs = super().forward(image, exit, exits, all_scales)
        if not channels_last(image):
            return outputs
        return as_output(image, outputs) if isinstance(outputs, Tensor) else tuple(as_output(image, y) for y in outputs)

    forward.__doc__ = reference.SWFormer.forward.__doc__

    def _pad(self, image: Tensor) -> Tensor:
        functional.check_input("image", image, next(self.parameters()))
        return super()._pad(image)
