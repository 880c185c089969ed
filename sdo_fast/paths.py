"""Which steps' model outputs keep their graph."""

from __future__ import annotations

from collections.abc import Collection

import torch

from .arguments import is_integer
from .solver import Solver

NAMES = ("first", "last", "random", "identity")


def _named_steps(steps: range) -> dict[str, list[int]]:
    """The steps among which each name draws one."""
    return dict(zip(NAMES, (list(steps[:1]), list(steps[-1:]), list(steps), []), strict=True))


def grad_step_choices(grad_step: str | int, solver: Solver) -> list[int]:
    """The steps among which each call draws; empty for "identity"."""
    if isinstance(grad_step, str) and grad_step in NAMES:
        return _named_steps(range(solver.start, len(solver)))[grad_step]
    if is_integer(grad_step) and grad_step in solver.steps:
        return [int(grad_step)]
    raise ValueError(
        f"grad_step must be one of {', '.join(map(repr, NAMES))} or an integer from {solver.start} to "
        f"{len(solver) - 1}, got {grad_step!r}"
    )


def draw_step(choices: list[int], generator: torch.Generator | None) -> int | None:
    """One of the choices, uniformly; takes nothing from the generator where there is nothing to choose."""
    if len(choices) < 2:
        return choices[0] if choices else None
    device = "cpu" if generator is None else generator.device
    return choices[int(torch.randint(len(choices), (), generator=generator, device=device))]


def check_path(path: str | int | Collection[int]) -> str | frozenset[int]:
    """A path by its name, or the set of its steps; raises where it is neither."""
    if isinstance(path, str) and path in (*NAMES, "full"):
        return path
    steps = [path] if is_integer(path) else path
    if isinstance(steps, (list, tuple, range, set, frozenset)) and all(is_integer(i) and i >= 0 for i in steps):
        return frozenset(map(int, steps))
    raise ValueError(
        f"path must be one of {', '.join(map(repr, NAMES))}, 'full', the index of a step from 0 on or a set of "
        f"them, got {path!r}"
    )


def steps_of(path: str | frozenset[int], count: int, generator: torch.Generator | None) -> frozenset[int]:
    """The steps of a checked path among `count`; "random" draws one."""
    if path == "full":
        return frozenset(range(count))
    if isinstance(path, str):
        step = draw_step(_named_steps(range(count))[path], generator)
        return frozenset() if step is None else frozenset({step})
    beyond = [i for i in path if i >= count]
    if beyond:
        raise ValueError(f"path must hold steps from 0 to {count - 1} of this schedule, got {max(beyond)}")
    return path
