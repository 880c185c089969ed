"""Which step's model output keeps its graph."""

from __future__ import annotations

import torch

from .arguments import is_integer
from .solver import Solver


def grad_step_choices(grad_step: str | int, solver: Solver) -> list[int]:
    """The steps among which each call draws; empty for "identity"."""
    named = {"first": [solver.start], "last": [len(solver) - 1], "random": list(solver.steps), "identity": []}
    if isinstance(grad_step, str) and grad_step in named:
        return named[grad_step]
    if is_integer(grad_step) and grad_step in solver.steps:
        return [int(grad_step)]
    raise ValueError(
        f"grad_step must be one of {', '.join(map(repr, named))} or an integer from {solver.start} to "
        f"{len(solver) - 1}, got {grad_step!r}"
    )


def draw_step(choices: list[int], generator: torch.Generator | None) -> int | None:
    """One of the choices, uniformly; takes nothing from the generator where there is nothing to choose."""
    if len(choices) < 2:
        return choices[0] if choices else None
    device = "cpu" if generator is None else generator.device
    return choices[int(torch.randint(len(choices), (), generator=generator, device=device))]
