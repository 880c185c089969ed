"""A scheduler's pass as recurrences of scalar coefficients, each step one call of `sampler_step`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor

from . import ops
from .noise import Draw, ReplacedNoise
from .reference.solver import Solver, config
from .schedulers import CLIPPING, NotAffineError, refuse_not_affine

LONGEST_HISTORY = 3
# Relative residuals of a true recurrence: rounding alone. Some schedulers work in float32 whatever they are given.
TOLERANCE, TOLERANCE_IN_FLOAT32 = 1e-11, 2e-7
FAR_OUT = ((0.0, 1e4, 0.0), (0.0, 0.0, 1e4))
"""x and eps of the probes of a step that clips: where nothing is clipped, and two where it should be."""


@dataclass(frozen=True)
class Recurrence:
    """x_{i+1} = a x_i + b eps_i + sum_j states[j] x_{i-j} + sum_j outputs[j] eps_{i-j} + sum_k noise[k] draws[k]().

    The model reads scale x_i. With `clip` there is one more term, c clamp(pred_x x_i + pred_eps eps_i, -clip, clip),
    and no history.
    """

    a: float
    b: float
    states: dict[int, float]
    outputs: dict[int, float]
    scale: float
    draws: tuple[Draw, ...] = ()
    noise: tuple[float, ...] = ()
    c: float = 0.0
    pred_x: float = 0.0
    pred_eps: float = 0.0
    clip: float | None = None

    @property
    def scales(self) -> list[float]:
        """Those of the terms: earlier states, earlier outputs, noise."""
        return [*self.states.values(), *self.outputs.values(), *self.noise]


class FusedSolver(Solver):
    """The same update rule as a `Solver` that is affine up to clipping, from coefficients found once.

    Equal to the scheduler's own arithmetic but for rounding, with the same noise from the same generator. Every step
    costs one pass over memory, and the scheduler is neither copied nor run.

    A pass without gradients writes each state over the oldest one that it still needs, unless another tensor shares
    that memory. So whoever keeps a state beyond its step keeps an alias of it, as the model does.

    Raises:
        NotAffineError: the scheduler thresholds, reads a learned variance, needs too long a history, clips in another
            way than the predicted sample of a step without history, or draws its noise otherwise than by `torch.randn`
            for one step.
    """

    _states: dict[int, Tensor]
    _outputs: dict[int, Tensor]
    _generator: torch.Generator | None
    _kernel: Callable[..., None] | None

    def __init__(self, solver: Solver) -> None:
        vars(self).update(vars(solver))
        self.recurrences = clipped_recurrences(solver) if clips(solver) else recurrences(solver)
        self.depth = max((j for r in self.recurrences.values() for j in (*r.states, *r.outputs)), default=0)
        self._scales = {i: rule.scales for i, rule in self.recurrences.items()}
        if max(map(len, self._scales.values())) > ops.MAX_TERMS:
            raise NotAffineError(f"scheduler: {_name(solver)} needs more than {ops.MAX_TERMS} terms for a step")

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
        solver._states, solver._outputs, solver._kernel = {}, {}, None
        solver._generator = self.step_kwargs.get("generator") if generator is None else generator
        return solver

    def scale_input(self, x: Tensor, i: int) -> Tensor:
        scale = self.recurrences[i].scale
        if scale != 1:
            return x * scale
        return x if torch.is_grad_enabled() else x.detach()  # an alias, which tells whether the model keeps it

    def step(self, output: Tensor, i: int, x: Tensor) -> Tensor:
        return self.guided_step((output,), None, i, x)

    def guided_step(self, outputs: Sequence[Tensor], guidance: float | None, i: int, x: Tensor) -> Tensor:
        """S_i(x, eps) with the model's outputs before guidance: (output,), or (uncond, cond)."""
        rule, terms = self.recurrences[i], []
        cond, uncond = outputs[-1], outputs[0] if guidance is not None else None
        if self.depth:
            unread = self._outputs.pop(i - self.depth - 1, None)
            if uncond is not None and guidance is not None:  # combined here, for later steps read it once more
                memory = None if torch.is_grad_enabled() else unread
                cond, uncond = torch.lerp(uncond, cond, guidance, out=memory), None
            self._outputs[i] = cond
            terms = [self._states[i - j] for j in rule.states] + [self._outputs[i - j] for j in rule.outputs]
        if rule.draws:
            terms += [draw(x, self._generator) for draw in rule.draws]
        clipping = (rule.c, rule.pred_x, rule.pred_eps, rule.clip)
        arguments = (x, cond, uncond, guidance or 0.0, rule.a, rule.b, terms, self._scales[i], *clipping)
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
        if oldest is None or i - self.depth == self.start or type(oldest) is not Tensor:
            return torch.empty_like(x)
        # One for the state, one for the storage object in hand.
        shared = torch._C._storage_Use_Count(oldest.untyped_storage()._cdata) > 2
        return torch.empty_like(x) if shared else oldest


def drawn_noise(solver: Solver) -> dict[int, list[Draw]]:
    """What each step draws. NotAffineError where something else than that moves the origin."""
    x = zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    drawn = {}
    with ReplacedNoise(lambda: zero) as noise:
        run = solver.begin(noise.generator)
        for i in run.steps:
            before = len(noise.drawn)
            run.scale_input(x, i)
            x = run.step(zero, i, x)
            drawn[i] = noise.drawn[before:]
    if x.count_nonzero():
        raise NotAffineError(f"scheduler: {_name(solver)} adds to the result what it does not draw by torch.randn")
    return drawn


@contextmanager
def given_noise(solver: Solver, values: Iterable[Tensor] | None) -> Iterator[Solver]:
    """A pass of the solver, inside which its draws are the values; None for a solver that draws nothing."""
    if values is None:
        yield solver.begin()
        return
    following = iter(values)
    with ReplacedNoise(lambda: next(following)) as noise:
        yield solver.begin(noise.generator)


def recurrences(solver: Solver) -> dict[int, Recurrence]:
    """The recurrence of every step, from one pass of the scheduler over unit vectors.

    The scheduler is linear and works element by element, so in a state whose elements stand for the inputs (x_start,
    eps_start, eps_{start+1}, ..., and all noise) each element becomes the coefficient of its input.
    """
    refuse_not_affine(solver)
    drawn, known = drawn_noise(solver), 1 + len(solver)
    units = torch.eye(known + sum(map(len, drawn.values())), dtype=torch.float64)[:, None, None, None, :]
    x, tolerance = units[0], _tolerance(solver)
    states: dict[int, Tensor] = {}
    found = {}
    with given_noise(solver, units[1 + len(solver) :] if len(units) > known else None) as run:
        for i in run.steps:
            states[i] = x
            scale = _input_scale(run, x, i, tolerance)
            following = run.step(units[1 + i], i, x)
            own = slice(known, known + len(drawn[i]))
            found[i] = _recurrence(solver, i, states, units, following, scale, tolerance, own, drawn[i])
            x, known = following, own.stop
    return found


def _recurrence(
    solver: Solver,
    i: int,
    states: dict[int, Tensor],
    units: Tensor,
    following: Tensor,
    scale: float,
    tolerance: float,
    own: slice,
    draws: Sequence[Draw],
) -> Recurrence:
    target = following.flatten().clone()
    b, noise = target[1 + i].item(), tuple(target[own].tolist())
    target[1 + i] = target[own] = 0
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
                tuple(draws),
                noise,
            )
    more = " or the noise of one" if own.start > 1 + len(solver) else ""
    raise NotAffineError(f"scheduler: {_name(solver)} uses more than {LONGEST_HISTORY} earlier steps{more}")


def clipped_recurrences(solver: Solver) -> dict[int, Recurrence]:
    """The recurrence of every step of a scheduler that clips its predicted sample, measured and then verified.

    Without noise a step is odd and piecewise affine, so its slopes at zero and far out, and its value there, are all
    there is to it. Noise is added to the result.
    """
    refuse_not_affine(solver, clipped=True)
    clip, tolerance = float(config(solver.scheduler, "clip_sample_range", 1.0)), _tolerance(solver)
    drawn, found = drawn_noise(solver), {}
    count, probes = sum(map(len, drawn.values())), len(FAR_OUT[0])
    # The last of a probe's elements stands for the noise of a step.
    units = [torch.eye(probes + len(own), dtype=torch.float64)[:, None, None, None] for own in drawn.values()]
    with given_noise(solver, (unit for of_step in units for unit in of_step[probes:]) if count else None) as run:
        for i in run.steps:
            rows = (torch.tensor([*row, *(0.0 for _ in drawn[i])], dtype=torch.float64) for row in FAR_OUT)
            x, eps = (row[None, None, None].requires_grad_() for row in rows)
            scale = _input_scale(run, x.detach(), i, tolerance)
            with torch.enable_grad():
                following = run.step(eps, i, x)
                slopes = torch.stack(torch.autograd.grad(following.sum(), (x, eps)))[:, 0, 0, 0, :probes]
            values = following.detach().flatten().tolist()
            inside, outside = slopes[:, 0], slopes[:, 1:]
            by_clamp = inside[:, None] - outside  # c pred_x and c pred_eps, where the probe is clipped
            probe = int(by_clamp.abs().sum(0).argmax())
            a, b = outside[:, probe].tolist()
            c = abs(values[1 + probe] - a * FAR_OUT[0][1 + probe] - b * FAR_OUT[1][1 + probe]) / clip
            pred_x, pred_eps = (by_clamp[:, probe] / c).tolist() if c else (0.0, 0.0)
            noise = tuple(values[probes:])
            found[i] = Recurrence(a, b, {}, {}, scale, tuple(drawn[i]), noise, c, pred_x, pred_eps, clip)
    _verify(solver, found, tolerance)
    return found


def _verify(solver: Solver, found: dict[int, Recurrence], tolerance: float) -> None:
    """NotAffineError unless the recurrences do as the scheduler does, on states of every size."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 2, 64, dtype=torch.float64)

    def random() -> Tensor:
        return torch.randn(1, 1, 1, 64, generator=draw, dtype=torch.float64)

    noises = [[random() for _ in rule.draws] for rule in found.values()]
    given = [noise for of_step in noises for noise in of_step]
    x = sizes * random()
    eps = [sizes * random() for _ in found]
    with given_noise(solver, given or None) as run:
        for i, output, noise in zip(run.steps, eps, noises, strict=True):
            rule = found[i]
            clamped = (rule.pred_x * x + rule.pred_eps * output).clamp(-clip, clip) if (clip := rule.clip) else 0.0
            following, expected = rule.a * x + rule.b * output + rule.c * clamped, run.step(output, i, x)
            following += sum(k * value for k, value in zip(rule.noise, noise, strict=True))
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
        with given_noise(solver, repeat(torch.zeros_like(x))) as run:
            run.scale_input(k * x, solver.start)
            results.append(run.step(k * output, solver.start, k * x))
    atol = 1e-12 * results[0].abs().max().item()
    exact = torch.allclose(results[1], factor * results[0], rtol=1e-12, atol=atol)
    return TOLERANCE if exact else TOLERANCE_IN_FLOAT32


def _name(solver: Solver) -> str:
    return type(solver.scheduler).__name__
