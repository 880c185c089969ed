"""What runs the arithmetic of a sampler's steps: the scheduler itself, or one fused update a step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from . import ops
from .model import guided
from .noise import Generators
from .recurrences import Recurrence, measured
from .solver import Solver

Sensitivities = dict[int | None, dict[int, float]]
"""By where they come from (None: the latents, else the step of an output) and by the index of the state."""


class Stepper(Protocol):
    """The update rule x_{i+1} = S_i(x_i, eps_i) of a sampler, whoever computes it.

    A sampler chooses its stepper once, by `stepper_for`, and takes `begin()` of it for every pass: the steps of a pass
    run in order, each after `scale_input` of the same step.
    """

    def begin(self, generator: Generators = None) -> Stepper:
        """A stepper for one pass; its noise comes from `generator`, or from torch's global one."""

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        """The model's input for the state x of step i."""

    def step(self, outputs: Sequence[Tensor], weight: float | None, i: int, x: Tensor) -> Tensor:
        """S_i(x, eps) in x's dtype: eps is the one output, or (uncond, cond) with uncond + weight (cond - uncond)."""

    def slopes(self, active: Sequence[int]) -> Sensitivities | None:
        """d x_i / d x_start and d x_i / d eps_s, for each active step s and every i from `start` to n.

        None where they are not numbers known beforehand, so that autograd must go through the steps.
        """


def stepper_for(solver: Solver, fused: bool) -> tuple[Stepper, str | None]:
    """The stepper of this schedule, and why it is the scheduler's own one (None for the fused one)."""
    if not fused:
        return SchedulerStepper(solver), "fused=False was asked for"
    try:
        return FusedStepper(solver), None
    except ValueError as reason:
        return SchedulerStepper(solver), str(reason)


class SchedulerStepper:
    """The scheduler's own step, bit for bit."""

    def __init__(self, solver: Solver) -> None:
        self._solver = solver

    def begin(self, generator: Generators = None) -> SchedulerStepper:
        return SchedulerStepper(self._solver.begin(generator))

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        return self._solver.scale_input(x, i)

    def step(self, outputs: Sequence[Tensor], weight: float | None, i: int, x: Tensor) -> Tensor:
        output = outputs[0] if weight is None else guided(outputs[0], outputs[1], weight)
        return self._solver.step(output, i, x)

    def slopes(self, active: Sequence[int]) -> None:
        return None


class FusedStepper:
    """One `sampler_step` a step, from coefficients found once, for a scheduler that is affine up to clipping.

    Equal to the scheduler's own arithmetic but for rounding, with the same noise from the same generator. Every step
    costs one pass over memory, and the scheduler is neither copied nor run.

    A pass without gradients writes each state over the oldest one that it still needs, unless another tensor shares
    that memory. So whoever keeps a state beyond its step keeps an alias of it, as the model does.

    Raises:
        NotAffineError: as `recurrences.measured`.
    """

    _states: dict[int, Tensor]
    _outputs: dict[int, Tensor]
    _generator: Generators
    _kernel: Callable[..., None] | None

    def __init__(self, solver: Solver) -> None:
        self.recurrences: dict[int, Recurrence] = measured(solver)
        self.depth = max((j for r in self.recurrences.values() for j in (*r.states, *r.outputs)), default=0)
        self._start, self._steps = solver.start, solver.steps
        self._step_generator = solver.step_kwargs.get("generator")
        self._scales = {i: rule.scales for i, rule in self.recurrences.items()}
        self._clips = any(rule.clip is not None for rule in self.recurrences.values())

    def slopes(self, active: Sequence[int]) -> Sensitivities | None:
        if self._clips:
            return None
        slopes: Sensitivities = {None: {self._start: 1.0}} | {s: {self._start: 0.0} for s in active}
        for i in self._steps:
            rule = self.recurrences[i]
            for s, values in slopes.items():
                values[i + 1] = rule.a * values[i] + sum(k * values[i - j] for j, k in rule.states.items())
                if s is not None:
                    values[i + 1] += rule.b if i == s else rule.outputs.get(i - s, 0.0)
        return slopes

    def begin(self, generator: Generators = None) -> FusedStepper:
        stepper = copy.copy(self)
        stepper._states, stepper._outputs, stepper._kernel = {}, {}, None
        stepper._generator = self._step_generator if generator is None else generator
        return stepper

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        scale = self.recurrences[i].scale
        if scale != 1:
            return x * scale
        return x if torch.is_grad_enabled() else x.detach()  # an alias, which tells whether the model keeps it

    def step(self, outputs: Sequence[Tensor], weight: float | None, i: int, x: Tensor) -> Tensor:
        rule, terms = self.recurrences[i], []
        cond, uncond = outputs[-1], None if weight is None else outputs[0]
        if self.depth:
            unread = self._outputs.pop(i - self.depth - 1, None)
            if uncond is not None and weight is not None:  # combined here, for later steps read it once more
                memory = None if torch.is_grad_enabled() else unread
                cond, uncond = torch.lerp(uncond, cond, weight, out=memory), None
            self._outputs[i] = cond
            terms = [self._states[i - j] for j in rule.states] + [self._outputs[i - j] for j in rule.outputs]
        if rule.draws:
            terms += [draw(x, self._generator) for draw in rule.draws]
        clipping = (rule.c, rule.pred_x, rule.pred_eps, rule.clip)
        arguments = (x, cond, uncond, weight or 0.0, rule.a, rule.b, terms, self._scales[i], *clipping)
        self._states[i] = x
        if torch.is_grad_enabled():
            return ops.step(*arguments)
        if self._kernel is None:
            self._kernel = ops.step_kernel(x)
        out = self._workspace(i, x)
        self._kernel(*arguments, out)
        return out

    def _workspace(self, i: int, x: Tensor) -> Tensor:
        """Memory for x_{i+1}: of the state that no later step reads, if this pass made it and nobody shares it."""
        oldest = self._states.pop(i - self.depth, None)
        if oldest is None or i - self.depth == self._start or type(oldest) is not Tensor:
            return torch.empty_like(x)
        # One for the state, one for the storage object in hand.
        shared = torch._C._storage_Use_Count(oldest.untyped_storage()._cdata) > 2
        return torch.empty_like(x) if shared else oldest
