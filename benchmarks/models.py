"""Models in the dtype and the layout that the options ask for, and the same in fp32 and fp64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .harness import DTYPES, FORMATS, Options, Run, Variant
from .op_cases import on_device


def randomise(model: nn.Module, size: float) -> None:
    """Move parameters and statistics away from their special starting values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.data.add_(torch.randn_like(tensor), alpha=size)


def model_as_asked(model: nn.Module, options: Options) -> nn.Module:
    model = model.to(options.device, DTYPES[options.dtype])
    return model.to(memory_format=FORMATS[options.layout])  # type: ignore[call-overload]


def image_as_asked(image: Tensor, options: Options) -> Tensor:
    return image.to(options.device, DTYPES[options.dtype], memory_format=FORMATS[options.layout])


class Models(NamedTuple):
    """One set of weights, those of `reference`: others hold them as its dtype has rounded them."""

    reference: nn.Module
    ours: nn.Module
    exact: nn.Module
    """The definition in fp64."""
    reference_fp32: nn.Module | None
    """Contiguous, as `ours_fp32` is; None where `reference` is that itself."""
    ours_fp32: nn.Module | None


def models(reference: nn.Module, make_ours: Callable[[], nn.Module], options: Options, train: bool) -> Models:
    """`reference`, in fp32, becomes what is asked for."""
    reference = model_as_asked(reference, options)
    plain = Options(device=options.device)

    def ours(options: Options) -> nn.Module:
        model = model_as_asked(make_ours(), options)
        model.load_state_dict(reference.state_dict())
        return model

    exact = model_as_asked(copy.deepcopy(reference), plain).double()
    beside = (
        (model_as_asked(copy.deepcopy(reference), plain), ours(plain)) if differs_from_fp32(options) else (None, None)
    )
    result = Models(reference, ours(options), exact, *beside)
    for model in result:
        if model is not None:
            model.train(train)
    return result


def differs_from_fp32(options: Options) -> bool:
    """Whether fp32 and contiguous are timed beside what is asked for; tf32 is a setting of the process."""
    return bool(options.words) and options.dtype != "tf32"


def beside(same: Models, run: Callable[[nn.Module], Run], options: Options) -> Iterator[tuple[str, Variant]]:
    """PyTorch and ours in fp32 and contiguous, where something else is asked for."""
    if same.reference_fp32 is not None:
        yield "reference, fp32", Variant(run(same.reference_fp32), plain=True)
    if same.ours_fp32 is not None:
        yield "ours, fp32", Variant(on_device(options.device)(run(same.ours_fp32)), ours=True, plain=True)
