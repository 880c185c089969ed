"""derain-s on a real photograph, scikit-learn's china.jpg: the whole network, reference against ours."""

from __future__ import annotations

import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

import swformer_fast as sf

from .harness import Case, Options, Variant, Work, compiled

PRESET = "derain-s"
TARGETS = {"reference": 3.5, "compile": 3.0}


def photograph(side: int) -> Tensor:
    """The top left square of china.jpg: (1, 3, side, side) in [0, 1]."""
    pixels = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)
    return (pixels[None, :, :side, :side].float() / 255).contiguous()


def randomise(model: nn.Module, size: float) -> None:
    """Move parameters and statistics away from their special starting values."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.data.add_(torch.randn_like(tensor), alpha=size)


def models(device: str) -> tuple[nn.Module, nn.Module]:
    """The reference and the fast network with the same weights."""
    torch.manual_seed(0)
    reference = sf.reference.SWFormer.from_preset(PRESET).eval()
    randomise(reference, 0.02)
    fast = sf.SWFormer.from_preset(PRESET).eval()
    fast.load_state_dict(reference.state_dict())
    return reference.to(device), fast.to(device)


def network(side: int, options: Options) -> Work:
    reference, fast = models(options.device)
    image = photograph(side).to(options.device)

    def call(model: nn.Module, x: Tensor = image) -> Tensor:
        """What the network adds to the image: the image itself would hide an error in the comparison."""
        with torch.no_grad():
            return model(x) - x

    def expected() -> Tensor:
        wide = sf.reference.SWFormer.from_preset(PRESET).eval().double().to(options.device)
        wide.load_state_dict(reference.state_dict())
        return call(wide, image.double())

    variants = {"reference": Variant(lambda: call(reference))}
    if options.full:
        variants |= compiled(reference, call)
    else:
        variants["compile"] = Variant(None, note="compiling the network takes minutes; --full does it")
    variants["ours"] = Variant(lambda: call(fast), ours=True)
    return Work(variants, expected, TARGETS)


def cases(options: Options) -> list[Case]:
    sides = (64,) if options.quick else (256, 512) if options.full else (256,)
    return [Case(f"{PRESET} eval {side}x{side}", lambda side=side: network(side, options)) for side in sides]
