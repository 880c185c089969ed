"""A scheduler's pass as recurrences of scalar coefficients, each step one call of `sampler_step`."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .reference.solver import Solver, config
from .schedulers import CLIPPING, NotAffineError, refuse_not_affine, refuse_stochastic

LONGEST_HISTORY = 3
# Relative residuals of a true recurrence: rounding alone. Some schedulers work in float32 whatever they are given.
TOLERANCE, TOLERANCE_IN_FLOAT32 = 1e-11, 2e-7
FAR_OUT = ((0.0, 1e4, 0.0), (0.0, 0.0, 1e4))
"""x and eps of the probes of a step that clips: where nothing is clipped, and two where it should be."""


@dataclass(frozen=True)
class Recurrence:
    """x_{i+1} = a x_i + b eps_i + sum_j states[j] x_{i-j} + sum_j outputs[j] eps_{i-j}; the model reads scale x_i.

    With `clip` there is one more term, c clamp(pred_x x_i + pred_eps eps_i, -clip, clip), and no history.
    """

    a: float
    b: float
    states: dict[int, float]
    outputs: dict[int, float]
    scale: float
    c: float = 0.0
    pred_x: float = 0.0
    pred_eps: float = 0.0
    clip: float | None = None


class FusedSolver(Solver):
    """The same update rule as a deterministic `Solver` that is affine up to clipping, from coefficients found once.

    Equal to the scheduler's own arithmetic but for rounding. Every step costs one pass over memory, and the scheduler
    is neither copied nor run.

    Raises:
        NotAffineError: the scheduler thresholds, reads a learned variance, needs too long a history, or clips in
            another way than the predicted sample of a step without history.
        ValueError: it adds noise of its own.
    """

    _states: dict[int, Tensor]
    _outputs: dict[int, Tensor]

    def __init__(self, solver: Solver) -> None:
        vars(self).update(vars(solver))
        self.recurrences = clipped_recurrences(solver) if clips(solver) else recurrences(solver)
        self.depth = max((j for r in self.recurrences.values() for j in (*r.states, *r.outputs)), default=0)

    @property
    def affine(self) -> bool:
        return all(rule.clip is None for rule in self.recurrences.values())

    def derivatives(self, s: int | None) -> tuple[float, float, float]:
        """d x_s / d x_start, d x_n / d x_start and d x_n / d eps_s; 0 for those of no step. Affine schedulers only."""
        of_state, of_output = {self.start: 1.0}, {self.start: 0.0}
        for i in self.steps:
            rule = self.recurrences[i]
            for values in (of_state, of_output):
                values[i + 1] = rule.a * values[i] + sum(k * values[i - j] for j, k in rule.states.items())
            if s is not None:
                of_output[i + 1] += rule.b if i == s else rule.outputs.get(i - s, 0.0)
        return 0.0 if s is None else of_state[s], of_state[len(self)], of_output[len(self)]

    def begin(self, generator: torch.Generator | None = None) -> FusedSolver:
        solver = copy.copy(self)
        solver._states, solver._outputs = {}, {}
        return solver

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        scale = self.recurrences[i].scale
        return x if scale == 1 else x * scale

    def step(self, output: Tensor, i: int, x: Tensor) -> Tensor:
        return self.guided_step((output,), None, i, x)

    def guided_step(self, outputs: Sequence[Tensor], guidance: float | None, i: int, x: Tensor) -> Tensor:
        """S_i(x, eps) with the model's outputs before guidance: (output,), or (uncond, cond)."""
        rule = self.recurrences[i]
        cond, uncond = outputs[-1], outputs[0] if guidance is not None else None
        if self.depth and uncond is not None and guidance is not None:
            cond, uncond = torch.lerp(uncond, cond, guidance), None  # later steps read it once more
        self._states[i], self._outputs[i] = x, cond
        terms = [self._states[i - j] for j in rule.states] + [self._outputs[i - j] for j in rule.outputs]
        scales = [*rule.states.values(), *rule.outputs.values()]
        clipping = (rule.c, rule.pred_x, rule.pred_eps, rule.clip)
        arguments = (x, cond, uncond, guidance or 0.0, rule.a, rule.b, terms, scales, *clipping)
        self._outputs.pop(i - self.depth, None)
        if torch.is_grad_enabled():
            return ops.step(*arguments)
        spare = self._spare(i)
        return ops.step_alone(torch.empty_like(x) if spare is None else spare, *arguments)

    def _spare(self, i: int) -> Tensor | None:
        """A state that this pass made, that no later step reads and nobody else holds: memory for x_{i+1}."""
        old, alone = self._states.pop(i - self.depth - 1, None), object()
        if old is None or i - self.depth - 1 == self.start:
            return None
        # A hook may have kept the state, or a view of it.
        kept = sys.getrefcount(old) > sys.getrefcount(alone)
        viewed = torch._C._storage_Use_Count(old.untyped_storage()._cdata) > 2
        return None if kept or viewed else old


def recurrences(solver: Solver) -> dict[int, Recurrence]:
    """The recurrence of every step, from one pass of the scheduler over unit vectors.

    The scheduler is linear and works element by element, so in a state whose elements stand for the inputs (x_start,
    eps_start, eps_{start+1}, ...) each element becomes the coefficient of its input.
    """
    refuse_not_affine(solver)
    refuse_stochastic(solver)
    units = torch.eye(1 + len(solver), dtype=torch.float64)[:, None, None, None, :]
    run, x = solver.begin(), units[0]
    tolerance = _tolerance(solver)
    states: dict[int, Tensor] = {}
    found = {}
    for i in run.steps:
        states[i] = x
        scale = _input_scale(run, x, i, tolerance)
        following = run.step(units[1 + i], i, x)
        found[i] = _recurrence(solver, i, states, units, following, scale, tolerance)
        x = following
    return found


def _recurrence(
    solver: Solver, i: int, states: dict[int, Tensor], units: Tensor, following: Tensor, scale: float, tolerance: float
) -> Recurrence:
    b = following.flatten()[1 + i].item()
    target = (following - b * units[1 + i]).flatten()
    for depth in range(LONGEST_HISTORY + 1):
        back = [j for j in range(1, depth + 1) if i - j in states]
        columns = [states[i], *(states[i - j] for j in back), *(units[1 + i - j] for j in back)]
        basis = torch.stack([column.flatten() for column in columns], dim=1)
        norms = basis.norm(dim=0)
        solution = torch.linalg.lstsq(basis / norms, target[:, None], driver="gelsd").solution[:, 0]
        if (basis / norms @ solution - target).norm() <= tolerance * (target.norm() + abs(b)):
            solution[solution.abs() <= 1e-2 * tolerance * solution.abs().max()] = 0
            a, *rest = (solution / norms).tolist()
            of_states, of_outputs = rest[: len(back)], rest[len(back) :]
            return Recurrence(
                a,
                b,
                {j: value for j, value in zip(back, of_states, strict=True) if value},
                {j: value for j, value in zip(back, of_outputs, strict=True) if value},
                scale,
            )
    raise NotAffineError(f"scheduler: {_name(solver)} uses more than {LONGEST_HISTORY} earlier steps")


def clipped_recurrences(solver: Solver) -> dict[int, Recurrence]:
    """The recurrence of every step of a scheduler that clips its predicted sample, measured and then verified.

    A step is odd and piecewise affine, so its slopes at zero and far out, and its value there, are all there is to it.
    """
    refuse_not_affine(solver, clipped=True)
    refuse_stochastic(solver)
    clip, tolerance = float(config(solver.scheduler, "clip_sample_range", 1.0)), _tolerance(solver)
    run, found = solver.begin(), {}
    for i in run.steps:
        x, eps = (torch.tensor(row, dtype=torch.float64)[None, None, None].requires_grad_() for row in FAR_OUT)
        scale = _input_scale(run, x.detach(), i, tolerance)
        with torch.enable_grad():
            following = run.step(eps, i, x)
            slopes = torch.stack(torch.autograd.grad(following.sum(), (x, eps)))[:, 0, 0, 0]
        inside, outside = slopes[:, 0], slopes[:, 1:]
        by_clamp = inside[:, None] - outside  # c pred_x and c pred_eps, where the probe is clipped
        probe = int(by_clamp.abs().sum(0).argmax())
        a, b = outside[:, probe].tolist()
        values = [row[1 + probe] for row in FAR_OUT]
        c = abs(following.flatten()[1 + probe].item() - a * values[0] - b * values[1]) / clip
        pred_x, pred_eps = (by_clamp[:, probe] / c).tolist() if c else (0.0, 0.0)
        found[i] = Recurrence(a, b, {}, {}, scale, c, pred_x, pred_eps, clip)
    _verify(solver, found, tolerance)
    return found


def _verify(solver: Solver, found: dict[int, Recurrence], tolerance: float) -> None:
    """NotAffineError unless the recurrences do as the scheduler does, on states of every size."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 2, 64, dtype=torch.float64)
    run, x = solver.begin(), sizes * torch.randn(1, 1, 1, 64, generator=draw, dtype=torch.float64)
    for i in run.steps:
        eps = sizes * torch.randn(1, 1, 1, 64, generator=draw, dtype=torch.float64)
        rule = found[i]
        clamped = (rule.pred_x * x + rule.pred_eps * eps).clamp(-clip, clip) if (clip := rule.clip) else 0.0
        following, expected = rule.a * x + rule.b * eps + rule.c * clamped, run.step(eps, i, x)
        if not (following - expected).norm() <= 100 * tolerance * expected.norm():
            raise NotAffineError(f"scheduler: {_name(solver)} does more than to clip its predicted sample")
        x = expected


def clips(solver: Solver) -> bool:
    return any(config(solver.scheduler, flag, False) for flag in CLIPPING)


def _input_scale(run: Solver, x: Tensor, i: int, tolerance: float) -> float:
    model_input = run.scale_input(x, i)
    if torch.equal(model_input, x):
        return 1.0
    scale = (model_input.flatten() @ x.flatten() / x.square().sum()).item()
    if not torch.allclose(model_input, scale * x, rtol=tolerance):
        raise NotAffineError(f"scheduler: {_name(run)} does more to the model's input than to scale it")
    return scale


def _tolerance(solver: Solver) -> float:
    """By whether the first step of a float64 state is less exact than float64 is."""
    draw = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 1, 1, 1, 64, generator=draw, dtype=torch.float64)
    factor = 1 + 2.0**-30
    results = []
    for k in (1.0, factor):
        run = solver.begin()
        run.scale_input(k * x, solver.start)
        results.append(run.step(k * output, solver.start, k * x))
    atol = 1e-12 * results[0].abs().max().item()
    exact = torch.allclose(results[1], factor * results[0], rtol=1e-12, atol=atol)
    return TOLERANCE if exact else TOLERANCE_IN_FLOAT32


def _name(solver: Solver) -> str:
    return type(solver.scheduler).__name__
