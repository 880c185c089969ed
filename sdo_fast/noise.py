"""The noise that a scheduler draws: seeded while it is measured, and drawn as the scheduler draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Generators = torch.Generator | Sequence[torch.Generator] | None
"""One for all, or one an image as diffusers takes them; None for torch's global one."""


def each(generator: Generators) -> list[torch.Generator]:
    return [] if generator is None else [generator] if isinstance(generator, torch.Generator) else list(generator)


def randn(shape: Sequence[int], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Noise on the generators' device, as diffusers draws it, brought to `device`."""
    if generator is None or isinstance(generator, torch.Generator):
        place = device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=place, dtype=dtype).to(device)
    parts = [torch.randn((1, *shape[1:]), generator=g, device=g.device, dtype=dtype).to(device) for g in generator]
    return torch.cat(parts)


@dataclass(frozen=True)
class Draw:
    """A call of `torch.randn` in a scheduler's step, for a tensor of the state's shape."""

    seeded: bool
    """From the generator of the pass; else from torch's global one."""
    dtype: torch.dtype | None
    """None for the state's own."""

    def __call__(self, x: Tensor, generator: Generators) -> Tensor:
        return randn(x.shape, generator if self.seeded else None, x.device, self.dtype or x.dtype).to(x.dtype)


class SeededNoise(TorchDispatchMode):
    """Inside, what would draw from torch's global generator draws from this one; the global one is never touched.

    `sources` tells what was drawn from: "given" generators, the "global" one.
    """

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.generator, self.sources = generator, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            self.sources.add("given")
            return func(*args, **kwargs)
        self.sources.add("global")
        return _with_generator(func)(*args, **{**kwargs, "generator": self.generator})


@cache
def _with_generator(func: Any) -> Any:
    """The overload of a random function that takes a generator besides."""
    names = {argument.name for argument in func._schema.arguments} | {"generator"}
    for overload in (getattr(func.overloadpacket, name) for name in func.overloadpacket.overloads()):
        if {argument.name for argument in overload._schema.arguments} == names:
            return overload
    raise ValueError(f"scheduler must draw its noise by functions that take a generator, got {func}")
