"""A scheduler's pass as recurrences of scalar coefficients, measured by running it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .noise import Draw
from .ops import MAX_TERMS
from .schedulers import CLIPPING, affine_sensitivities, refuse_by_config
from .solver import NotAffineError, Solver, config, on_cpu

SKETCH = 64
LONGEST_HISTORY = 3
# Relative residuals of a true recurrence: rounding alone. Some schedulers work in float32 whatever they are given.
TOLERANCE, TOLERANCE_IN_FLOAT32 = 1e-11, 2e-7
FAR_OUT = ((0.0, 1e4, 0.0), (0.0, 0.0, 1e4))
"""x and eps of the probes of a step that clips: where nothing is clipped, and two where it should be."""
SEED = 7_450_328_911_305_622


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


@on_cpu
def measured(solver: Solver) -> dict[int, Recurrence]:
    """The recurrence of every step of a scheduler that is affine up to clipping.

    Raises:
        NotAffineError: the scheduler thresholds, reads a learned variance, needs too long a history, clips in another
            way than the predicted sample of a step without history, or draws its noise otherwise than by `torch.randn`
            for one step.
    """
    rules = clipped_recurrences(solver) if clips(solver) else recurrences(solver)
    terms = max(len(rule.scales) for rule in rules.values())
    if terms > MAX_TERMS:
        raise NotAffineError(
            f"scheduler must need no more than {MAX_TERMS} terms for a step, got {solver.name}: {terms}"
        )
    return rules


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
            raise NotAffineError(f"scheduler must draw its noise by torch.randn, got {func}")
        noise, dtype = self.source(), kwargs.get("dtype") or torch.get_default_dtype()
        if noise.shape != torch.Size(args[0]):
            raise NotAffineError(
                f"scheduler must draw noise of its state's shape {list(noise.shape)}, got {list(args[0])}"
            )
        generator = kwargs.get("generator")
        if generator is not None and generator.initial_seed() != SEED:
            raise NotAffineError("scheduler must draw from the generator that it is given, got one of its own")
        self.drawn.append(Draw(generator is not None, None if dtype == noise.dtype else dtype))
        return noise.to(dtype)


def drawn_noise(solver: Solver) -> dict[int, list[Draw]]:
    """What each step draws. NotAffineError where something else than that moves the origin."""
    x = zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    drawn = {}
    with ReplacedNoise(lambda: zero) if solver.noise_sources else nullcontext() as noise:
        run = solver.begin(noise and noise.generator)
        for i in run.steps:
            before = len(noise.drawn) if noise else 0
            run.scale_input(x, i)
            x = run.step(zero, i, x)
            drawn[i] = noise.drawn[before:] if noise else []
    if not x.isfinite().all():
        raise NotAffineError(f"scheduler must give finite results without clipping, got {solver.name}")
    if x.count_nonzero():
        raise NotAffineError(
            f"scheduler must draw its noise by torch.randn, got {solver.name}, which adds to the result what it does "
            "not draw"
        )
    return drawn


@contextmanager
def pass_with_noise(solver: Solver, values: Iterable[Tensor] | None) -> Iterator[Solver]:
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
    affine_sensitivities(solver)
    drawn, first = drawn_noise(solver), 1 + len(solver)
    units = torch.eye(first + sum(map(len, drawn.values())), dtype=torch.float64)[:, None, None, None, :]
    x, tolerance = units[0], _tolerance(solver)
    # Random combinations of a state's many elements, from which its few coefficients follow as well.
    draw = torch.Generator().manual_seed(0)
    sketch = torch.randn(SKETCH, len(units), generator=draw, dtype=torch.float64)
    states: dict[int, Tensor] = {}
    rules = {}
    with pass_with_noise(solver, units[1 + len(solver) :] if len(units) > first else None) as run:
        for i in run.steps:
            states[i] = x
            scale = _input_scale(run, x, i, tolerance)
            following = run.step(units[1 + i], i, x)
            of_noise = slice(first, first + len(drawn[i]))
            rules[i] = _recurrence(solver, i, states, units, sketch, following, scale, tolerance, of_noise, drawn[i])
            x, first = following, of_noise.stop
    return rules


def _recurrence(
    solver: Solver,
    i: int,
    states: dict[int, Tensor],
    units: Tensor,
    sketch: Tensor,
    following: Tensor,
    scale: float,
    tolerance: float,
    of_noise: slice,
    draws: Sequence[Draw],
) -> Recurrence:
    target = following.flatten().clone()
    b, noise = target[1 + i].item(), tuple(target[of_noise].tolist())
    target[1 + i] = target[of_noise] = 0
    for depth in range(LONGEST_HISTORY + 1):
        back = [j for j in range(1, depth + 1) if i - j in states]
        columns = [states[i], *(states[i - j] for j in back), *(units[1 + i - j] for j in back)]
        basis = torch.stack([column.flatten() for column in columns], dim=1)
        norms = basis.norm(dim=0)
        few_rows = (sketch @ (basis / norms), sketch @ target[:, None])
        solution = torch.linalg.lstsq(*few_rows, driver="gelsd").solution[:, 0]
        if (basis / norms @ solution - target).norm() <= tolerance * (target.norm() + abs(b)):
            solution[solution.abs() <= 1e-2 * tolerance * solution.abs().max()] = 0
            a, *factors = (solution / norms).tolist()
            of_states, of_outputs = factors[: len(back)], factors[len(back) :]
            return Recurrence(
                a,
                b,
                {j: value for j, value in zip(back, of_states, strict=True) if value},
                {j: value for j, value in zip(back, of_outputs, strict=True) if value},
                scale,
                tuple(draws),
                noise,
            )
    more = " or the noise of one" if of_noise.start > 1 + len(solver) else ""
    raise NotAffineError(
        f"scheduler must use at most {LONGEST_HISTORY} earlier steps, got {solver.name}, which uses more than "
        f"{LONGEST_HISTORY} earlier steps{more}"
    )


def clipped_recurrences(solver: Solver) -> dict[int, Recurrence]:
    """The recurrence of every step of a scheduler that clips its predicted sample, measured and then verified.

    Without noise a step is odd and piecewise affine, so its slopes at zero and far out, and its value there, are all
    there is to it. Noise is added to the result.
    """
    refuse_by_config(solver, clipped=True)
    clip, tolerance = float(config(solver.scheduler, "clip_sample_range", 1.0)), _tolerance(solver)
    drawn, rules = drawn_noise(solver), {}
    count, probes = sum(map(len, drawn.values())), len(FAR_OUT[0])
    # The last of a probe's elements stands for the noise of a step.
    units = [torch.eye(probes + len(draws), dtype=torch.float64)[:, None, None, None] for draws in drawn.values()]
    with pass_with_noise(solver, (unit for of_step in units for unit in of_step[probes:]) if count else None) as run:
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
            rules[i] = Recurrence(a, b, {}, {}, scale, tuple(drawn[i]), noise, c, pred_x, pred_eps, clip)
    _verify(solver, rules, tolerance)
    return rules


def _verify(solver: Solver, rules: dict[int, Recurrence], tolerance: float) -> None:
    """NotAffineError unless the recurrences do as the scheduler does, on states of every size."""
    draw = torch.Generator().manual_seed(0)
    sizes = torch.logspace(-2, 2, 64, dtype=torch.float64)

    def random() -> Tensor:
        return torch.randn(1, 1, 1, 64, generator=draw, dtype=torch.float64)

    noises = [[random() for _ in rule.draws] for rule in rules.values()]
    flat = [noise for of_step in noises for noise in of_step]
    x = sizes * random()
    eps = [sizes * random() for _ in rules]
    with pass_with_noise(solver, flat or None) as run:
        for i, output, noise in zip(run.steps, eps, noises, strict=True):
            rule = rules[i]
            clamped = (rule.pred_x * x + rule.pred_eps * output).clamp(-clip, clip) if (clip := rule.clip) else 0.0
            following, expected = rule.a * x + rule.b * output + rule.c * clamped, run.step(output, i, x)
            following += sum(k * value for k, value in zip(rule.noise, noise, strict=True))
            if not (following - expected).norm() <= 100 * tolerance * expected.norm():
                raise NotAffineError(
                    f"scheduler must be affine up to clipping, got {solver.name}, which does more than to clip its "
                    "predicted sample"
                )
            x = expected


def clips(solver: Solver) -> bool:
    return any(config(solver.scheduler, flag, False) for flag in CLIPPING)


def _input_scale(run: Solver, x: Tensor, i: int, tolerance: float) -> float:
    model_input = run.scale_input(x, i)
    if torch.equal(model_input, x):
        return 1.0
    scale = (model_input.flatten() @ x.flatten() / x.square().sum()).item()
    if not torch.allclose(model_input, scale * x, rtol=tolerance):
        raise NotAffineError(f"scheduler must only scale the model's input, got {run.name}, which does more")
    return scale


def _tolerance(solver: Solver) -> float:
    """By whether the first step of a float64 state is less exact than float64 is."""
    draw = torch.Generator().manual_seed(0)
    x, output = torch.randn(2, 1, 1, 1, 64, generator=draw, dtype=torch.float64)
    factor = 1 + 2.0**-30
    results = []
    for k in (1.0, factor):
        with pass_with_noise(solver, repeat(torch.zeros_like(x))) as run:
            run.scale_input(k * x, solver.start)
            results.append(run.step(k * output, solver.start, k * x))
    atol = 1e-12 * results[0].abs().max().item()
    exact = torch.allclose(results[1], factor * results[0], rtol=1e-12, atol=atol)
    return TOLERANCE if exact else TOLERANCE_IN_FLOAT32
