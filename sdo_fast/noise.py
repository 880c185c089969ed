"""The noise that a scheduler draws: replaced while the scheduler is measured, and drawn as the scheduler draws it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .schedulers import NotAffineError

SEED = 7_450_328_911_305_622


@dataclass(frozen=True)
class Draw:
    """A call of `torch.randn` in a scheduler's step, for a tensor of the state's shape."""

    seeded: bool
    """From the generator of the pass; else from torch's global one."""
    dtype: torch.dtype | None
    """None for the state's own."""

    def __call__(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        generator = generator if self.seeded else None
        device = x.device if generator is None else generator.device
        noise = torch.randn(x.shape, generator=generator, device=device, dtype=self.dtype or x.dtype)
        return noise.to(x.device, x.dtype)


class ReplacedNoise(TorchDispatchMode):
    """Inside, `torch.randn` for a state of float64 returns `source()` instead, and `drawn` tells how it was called.

    Raises NotAffineError where the noise comes from another random function or has another shape.
    """

    def __init__(self, source: Callable[[], Tensor]) -> None:
        super().__init__()
        self.source, self.drawn = source, list[Draw]()
        self.generator = torch.Generator().manual_seed(SEED)
        """For the pass inside. It is told from others by its seed, for the object does not reach the dispatcher."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if func.overloadpacket is not torch.ops.aten.randn:
            raise NotAffineError(f"scheduler: it draws noise by {func}, torch.randn is needed")
        noise, dtype = self.source(), kwargs.get("dtype") or torch.get_default_dtype()
        if noise.shape != torch.Size(args[0]):
            raise NotAffineError(f"scheduler: it draws noise of shape {list(args[0])} for a state {list(noise.shape)}")
        generator = kwargs.get("generator")
        if generator is not None and generator.initial_seed() != SEED:
            raise NotAffineError("scheduler: it draws noise from a generator of its own")
        self.drawn.append(Draw(generator is not None, None if dtype == noise.dtype else dtype))
        return noise.to(dtype)
