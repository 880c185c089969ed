r"""Gradient paths: which model outputs of a sampler keep their graph, how much of it, and what the loss sees.

    ShortcutSampler(unet, scheduler, 20, path=paths.flowbp_sparse())
    ShortcutPipeline(pipe, path=paths.draft(4))

Sampling runs x_{i+1} = S_i(x_i, o_i) with o_i = model(x_i, t_i). A `Path` changes no value of it, but its gradient:

    o_i = weight(model(share(x_i, alpha_i), t_i), w_i)     for an active step i
    o_i = model(x_i, t_i).detach()                         for the others
    share(x, alpha) = x.detach() + alpha (x - x.detach()),  weight(o, w) = o.detach() + w (o - o.detach())

Everything else, the scheduler's arithmetic and guidance, stays differentiable. For an affine scheduler
x_0 = A x_start + sum_i B_i o_i + constants (`sdo_fast.coefficients`), so B_i w_i is the weight of an active output.

A `Recipe` draws a path for every call. All published ones are members of this family (the table of arXiv 2606.11075):

| recipe | active steps | alpha | w | the loss sees |
| --- | --- | --- | --- | --- |
| `full` | all | 1 | 1 | x_0 |
| `sdo` | one | 1 | 1 | x_0 |
| `identity` | none | - | - | x_0 |
| `refl` | one late step, the last that runs | 0 | 1 | the posterior mean there |
| `draft` | the last K | 1 | 1 | x_0 |
| `draft_lv` | the last, at fresh noises as well | 1 | their mean | x_0 |
| `drtune` | K at even distances before an early stop | 0 | 1 | the posterior mean there |
| `leapalign` | k < j, which stand for all steps from them on | 0, alpha | Euler | x_0 |
| `flowbp_sparse` | K, late ones more often | 0 | 1 | x_0 |
| `flowbp_bridge` | K on both sides of a step j, j among them | alpha at j | 1 | x_0 |
| `flowbp_lagrange` | supports of the intervals from k to j and from j on | alpha at j | quadrature | x_0 |

The recipes' names, an index or a collection of indices stand for themselves where a path is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch

from .arguments import is_integer, number

__all__ = [
    "Path",
    "Recipe",
    "draft",
    "draft_lv",
    "drtune",
    "flowbp_bridge",
    "flowbp_lagrange",
    "flowbp_sparse",
    "full",
    "identity",
    "leapalign",
    "refl",
    "sdo",
]


@dataclass(frozen=True)
class Path:
    """The gradient path of one call.

    Raises:
        ValueError, TypeError: a step is no index, a share not in [0, 1], a weight not finite or of no active step, or
            `stop` before an active step.
    """

    shares: Mapping[int, float] = field(default_factory=dict)
    """alpha_i of every active step i: the share of the gradient that goes on through the model's input."""
    weights: Mapping[int, float] = field(default_factory=dict)
    """w_i of active steps, 1 where it is left out: the factor on the gradient of the model's output."""
    stop: int | None = None
    """The step at which sampling ends, for a loss on the posterior mean E[x_0 | x_stop] (Tweedie) that the model gives
    there, instead of x_0. Under `torch.no_grad()` it goes to the end."""
    noises: int = 0
    """For a path that has the last step n - 1 active: beside o_{n-1} its mean is over the outputs at so many
    x' = alpha_{n-1} x_0 + sigma_{n-1} noise of x_0's, which add a gradient and no value."""

    def __post_init__(self) -> None:
        for name in ("shares", "weights"):
            values = getattr(self, name)
            if not isinstance(values, Mapping):
                raise TypeError(f"{name} must be a mapping from steps to numbers, got {type(values).__name__}")
            if not all(is_integer(i) and i >= 0 for i in values):
                raise ValueError(f"{name} must be of steps from 0 on, got {list(values)}")
        for i, share in self.shares.items():
            if not 0 <= number(f"shares[{i}]", share) <= 1:
                raise ValueError(f"shares must lie in [0, 1], got {share!r} at step {i}")
        for i, weight in self.weights.items():
            number(f"weights[{i}]", weight)
        if not self.weights.keys() <= self.shares.keys():
            raise ValueError(f"weights must be of active steps, got {sorted(self.weights.keys() - self.shares.keys())}")
        latest = max(self.shares, default=0)
        if self.stop is not None and not (is_integer(self.stop) and self.stop >= latest):
            raise ValueError(f"stop must be None or a step from the last active one ({latest}) on, got {self.stop!r}")
        if not is_integer(self.noises) or self.noises < 0:
            raise ValueError(f"noises must be an integer >= 0, got {self.noises!r}")

    def weight(self, i: int) -> float:
        return self.weights.get(i, 1.0)


class Schedule:
    """What a recipe draws from: the steps that run, those whose output reaches x_0, and the outputs' weights."""

    def __init__(
        self,
        steps: range,
        coefficients: Callable[[], Sequence[float]],
        reaching: Sequence[int] | None = None,
        direct: bool = True,
    ) -> None:
        self.steps = steps
        self.reaching = list(steps if reaching is None else reaching)
        """Steps whose output reaches x_0."""
        self.direct = direct
        """Whether the latents reach x_0 without the model."""
        self.usable = self.reaching or list(steps)
        """Those to draw from."""
        self._coefficients = coefficients

    @cached_property
    def coefficients(self) -> Sequence[float]:
        """B_i of the steps, by index."""
        return self._coefficients()

    @cached_property
    def weighed(self) -> list[int]:
        """Those to draw from where weights are shares of B_i."""
        return [i for i in self.usable if self.coefficients[i] != 0]

    def length(self, steps: Collection[int]) -> float:
        """sum_i |B_i|: for flow matching the length of the steps in sigma."""
        return sum(abs(self.coefficients[i]) for i in steps)


@dataclass(frozen=True)
class Recipe:
    """A path drawn anew for each call: `draw(schedule, generator, **settings)`."""

    name: str
    draws: Callable[..., Path]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def draw(self, schedule: Schedule, generator: torch.Generator | None = None) -> Path:
        return self.draws(schedule, generator, **self.settings)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value!r}' for name, value in self.settings.items())})"


def _drawn(
    candidates: Sequence[int], generator: torch.Generator | None, count: int = 1, late_bias: float = 0.0
) -> list[int]:
    """So many different candidates, in order, the p-th with odds (p + 1)^late_bias.

    Takes nothing from the generator where there is nothing to choose.
    """
    if len(candidates) <= count:
        return list(candidates)
    device = "cpu" if generator is None else generator.device
    if count == 1 and late_bias == 0:
        return [candidates[int(torch.randint(len(candidates), (), generator=generator, device=device))]]
    odds = torch.arange(1, len(candidates) + 1, dtype=torch.float32, device=device) ** late_bias
    return [candidates[p] for p in sorted(torch.multinomial(odds, count, generator=generator).tolist())]


def _count(name: str, value: Any, least: int = 1) -> int:
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
    return int(value)


def _share(name: str, value: Any) -> float:
    if not 0 <= number(name, value) <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value!r}")
    return float(value)


def full() -> Recipe:
    """Full backpropagation: every model output keeps its graph."""
    return Recipe("full", _full)


def _full(schedule: Schedule, generator: torch.Generator | None) -> Path:
    return Path(dict.fromkeys(schedule.steps, 1.0))


def identity() -> Recipe:
    """No model backward at all: d x_0 / d latents = A_start I."""
    return Recipe("identity", _identity)


def _identity(schedule: Schedule, generator: torch.Generator | None) -> Path:
    return Path()


def sdo(step: str | int = "first") -> Recipe:
    """Shortcut Diffusion Optimization (arXiv 2505.07477): one step, "first", "last", "random" or an index."""
    if not (step >= 0 if is_integer(step) else step in ("first", "last", "random")):
        raise ValueError(f"step must be 'first', 'last', 'random' or an index from 0 on, got {step!r}")
    return Recipe("sdo", _sdo, {"step": step})


def _sdo(schedule: Schedule, generator: torch.Generator | None, step: str | int) -> Path:
    steps = schedule.steps
    if is_integer(step):
        return Path({int(step): 1.0})
    named = {"first": list(steps[:1]), "last": list(steps[-1:])}
    return Path(dict.fromkeys(named.get(str(step)) or _drawn(schedule.usable, generator), 1.0))


def refl(last: float = 0.25) -> Recipe:
    """ReFL (arXiv 2304.05977): sampling ends at a random one of this share of the steps, the last ones."""
    return Recipe("refl", _refl, {"last": _share("last", last)})


def _refl(schedule: Schedule, generator: torch.Generator | None, last: float) -> Path:
    (stop,) = _drawn(_tail(schedule.steps, last), generator)
    return Path({stop: 0.0}, stop=stop)


def _tail(steps: range, share: float) -> range:
    return steps[-max(1, round(share * len(steps))) :]


def draft(steps: int = 1) -> Recipe:
    """DRaFT-K (arXiv 2309.17400): the last K = `steps` steps."""
    return Recipe("draft", _draft, {"steps": _count("steps", steps)})


def _draft(schedule: Schedule, generator: torch.Generator | None, steps: int) -> Path:
    if steps > len(schedule.steps):
        raise ValueError(f"path draft must have at most {len(schedule.steps)} steps, those that run, got {steps}")
    return Path(dict.fromkeys(schedule.steps[-steps:], 1.0))


def draft_lv(noises: int = 2) -> Recipe:
    """DRaFT-LV (arXiv 2309.17400): the last step, its gradient averaged over further noises.

    The paper takes the loss's gradient at each noise's own posterior mean; here it is taken once, at x_0, from which
    they differ by what the last step still removes, so the loss is called as for any other path.
    """
    return Recipe("draft_lv", _draft_lv, {"noises": _count("noises", noises)})


def _draft_lv(schedule: Schedule, generator: torch.Generator | None, noises: int) -> Path:
    last = schedule.steps[-1]
    return Path({last: 1.0}, {last: 1 / (noises + 1)}, noises=noises)


def drtune(steps: int = 3, last: float = 0.4) -> Recipe:
    """DRTune (arXiv 2405.00760): sampling ends at a random one of the `last` share of the steps; K at even distances
    with a random offset are active, their inputs cut off."""
    return Recipe("drtune", _drtune, {"steps": _count("steps", steps), "last": _share("last", last)})


def _drtune(schedule: Schedule, generator: torch.Generator | None, steps: int, last: float) -> Path:
    (stop,) = _drawn(_tail(schedule.steps, last), generator)
    before = range(schedule.steps.start, stop + 1)
    count = min(steps, len(before))
    stride = len(before) // count
    (offset,) = _drawn(range(len(before) - (count - 1) * stride), generator)
    return Path(dict.fromkeys(before[offset::stride][:count], 0.0), stop=stop)


def leapalign(alpha: float = 0.3) -> Recipe:
    """LeapAlign: two random steps k < j, of which k stands for the outputs of k..j-1 and j for those from j on.

    That is two Euler leaps of a flow, w_k = sum_{k <= i < j} B_i / B_k and w_j = sum_{i >= j} B_i / B_j, whose value is
    kept (arXiv 2606.11075, section 3). Its weights of samples by the leaps' error (`tau`) are the loss's business.
    """
    return Recipe("leapalign", _leapalign, {"alpha": _share("alpha", alpha)})


def _leapalign(schedule: Schedule, generator: torch.Generator | None, alpha: float) -> Path:
    k, j = _two(schedule.weighed, generator, "leapalign")
    leaps = {i: sum(schedule.coefficients[i:end]) / schedule.coefficients[i] for i, end in ((k, j), (j, None))}
    return Path({k: 0.0, j: alpha}, leaps)


def _two(candidates: Sequence[int], generator: torch.Generator | None, recipe: str) -> list[int]:
    two = _drawn(candidates, generator, 2)
    if len(two) < 2:
        raise ValueError(f"path {recipe} must have two steps to draw from, got {len(two)} that reach x_0")
    return two


def flowbp_sparse(steps: int = 4, late_bias: float = 2.0, rescale: float = 0.0) -> Recipe:
    """FlowBP-Sparse (arXiv 2606.11075): K different steps, the p-th with odds (p + 1)^late_bias, inputs cut off.

    `rescale` in [0, 1] makes up for the others: w = 1 + rescale (sum_i |B_i| / sum_active |B_i| - 1).
    """
    settings = {
        "steps": _count("steps", steps),
        "late_bias": number("late_bias", late_bias, 0),
        "rescale": _share("rescale", rescale),
    }
    return Recipe("flowbp_sparse", _flowbp_sparse, settings)


def _flowbp_sparse(
    schedule: Schedule, generator: torch.Generator | None, steps: int, late_bias: float, rescale: float
) -> Path:
    active = _drawn(schedule.weighed if rescale else schedule.usable, generator, steps, late_bias)
    return Path(dict.fromkeys(active, 0.0), _rescaled(schedule, active, rescale))


def _rescaled(schedule: Schedule, active: Sequence[int], rescale: float) -> dict[int, float]:
    if rescale == 0:
        return {}
    return dict.fromkeys(active, 1 + rescale * (schedule.length(schedule.steps) / schedule.length(active) - 1))


def flowbp_bridge(steps: int = 5, late_bias: float = 2.0, alpha: float = 0.1, rescale: float = 1.0) -> Recipe:
    """FlowBP-Bridge (arXiv 2606.11075): K steps shared out over both sides of a random step j by their lengths.

    j is active, and alone has a share, alpha, of its input's gradient: a bridge to the steps before it. Defaults: the
    published ones for FLUX.1.
    """
    settings = {
        "steps": _count("steps", steps, 2),
        "late_bias": number("late_bias", late_bias, 0),
        "alpha": _share("alpha", alpha),
        "rescale": _share("rescale", rescale),
    }
    return Recipe("flowbp_bridge", _flowbp_bridge, settings)


def _flowbp_bridge(
    schedule: Schedule, generator: torch.Generator | None, steps: int, late_bias: float, alpha: float, rescale: float
) -> Path:
    usable = schedule.weighed if rescale else schedule.usable
    _, j = _two(usable, generator, "flowbp_bridge")
    before, after = ([i for i in usable if (i < j) == early] for early in (True, False))
    steps = min(steps, len(usable))
    # At least one on either side, and no more than there are.
    share = round(steps * len(before) / len(usable))
    early = min(max(share, 1, steps - len(after)), len(before), steps - 1)
    active = [
        *_drawn(before, generator, early, late_bias),
        j,
        *(_drawn(after[1:], generator, steps - early - 1, late_bias) if steps - early > 1 else ()),
    ]
    return Path(dict.fromkeys(active, 0.0) | {j: alpha}, _rescaled(schedule, active, rescale))


def flowbp_lagrange(
    supports: int = 3, active: int = 2, alpha: float = 0.1, further: float = 0.25, rescale: float = 0.5
) -> Recipe:
    """FlowBP-Lagrange (arXiv 2606.11075): LeapAlign's intervals, from k to j and from j on, by quadrature.

    In each, up to `supports` steps at even distances, the first of the interval among them, carry the interpolant
    whose integral stands for all outputs: w_s = W_s / B_s with

        W_s = integral over the interval of l_s(u) du,   l_s Lagrange's polynomials,   u_i = sum_{m < i} B_m,

    which for flow matching is an integral over sigma. Of the supports the first `active` have a gradient, those after
    the first times `further`; `rescale` makes up for the rest as in `flowbp_sparse`, by |W|. Defaults: the published
    ones for FLUX.1.
    """
    settings = {
        "supports": _count("supports", supports),
        "active": _count("active", active),
        "alpha": _share("alpha", alpha),
        "further": _share("further", further),
        "rescale": _share("rescale", rescale),
    }
    return Recipe("flowbp_lagrange", _flowbp_lagrange, settings)


def _flowbp_lagrange(
    schedule: Schedule,
    generator: torch.Generator | None,
    supports: int,
    active: int,
    alpha: float,
    further: float,
    rescale: float,
) -> Path:
    k, j = _two(schedule.weighed, generator, "flowbp_lagrange")
    weights: dict[int, float] = {}
    for start, end in ((k, j), (j, schedule.steps.stop)):
        inside = [i for i in schedule.weighed if start <= i < end]
        nodes = [inside[p] for p in _spread(len(inside), supports)]
        integrals = _quadrature(schedule, nodes, start, end)
        chosen = nodes[:active]
        total, kept = sum(map(abs, integrals)), sum(map(abs, integrals[: len(chosen)]))
        # Of two equal steps the first carries nothing: there is nothing to make up by.
        factor = 1 + rescale * (total / kept - 1) if kept > 1e-4 * total else 1.0
        for p, (i, integral) in enumerate(zip(chosen, integrals, strict=False)):
            weights[i] = factor * (further if p else 1.0) * integral / schedule.coefficients[i]
    return Path(dict.fromkeys(weights, 0.0) | {j: alpha}, weights)


def _spread(length: int, count: int) -> list[int]:
    """At most so many positions of 0..length-1, evenly, the first among them."""
    return list(
        dict.fromkeys(torch.linspace(0, length - 1, min(count, length), dtype=torch.float64).round().int().tolist())
    )


def _quadrature(schedule: Schedule, nodes: Sequence[int], start: int, end: int) -> list[float]:
    """The integrals W_s over the interval: sum_s W_s u_s^p = integral of u^p for every p below their number."""
    whole = sum(schedule.coefficients[start:end])
    # On [0, 1], where the moments are 1 / (p + 1).
    places = torch.tensor([sum(schedule.coefficients[start:i]) / whole for i in nodes], dtype=torch.float64)
    powers = torch.arange(len(nodes), dtype=torch.float64)
    return (whole * torch.linalg.solve(places ** powers[:, None], 1 / (powers + 1))).tolist()


AnyPath = str | int | Collection[int] | Path | Recipe
_BY_NAME: dict[str, Recipe] = {name: sdo(name) for name in ("first", "last", "random")}
_BY_NAME |= {
    recipe.name: recipe
    for recipe in (
        identity(),
        full(),
        refl(),
        draft(),
        draft_lv(),
        drtune(),
        leapalign(),
        flowbp_sparse(),
        flowbp_bridge(),
        flowbp_lagrange(),
    )
}


def as_path(path: AnyPath) -> Path | Recipe:
    """A path or recipe by what stands for it."""
    if isinstance(path, (Path, Recipe)):
        return path
    if isinstance(path, str) and path in _BY_NAME:
        return _BY_NAME[path]
    steps = [path] if is_integer(path) else path
    collection = isinstance(steps, (list, tuple, range, set, frozenset)) and len(steps) > 0
    if collection and all(is_integer(i) and i >= 0 for i in cast(Collection[Any], steps)):
        return Path(dict.fromkeys(sorted(map(int, cast(Collection[Any], steps))), 1.0))
    raise ValueError(
        f"path must be one of sdo_fast.paths, a name ({', '.join(map(repr, _BY_NAME))}), the index of a step from 0 on "
        f"or a collection of them, got {path!r}"
    )


def draw(path: Path | Recipe, schedule: Schedule, generator: torch.Generator | None) -> Path:
    """The path of one call, all of whose steps run."""
    drawn = path if isinstance(path, Path) else path.draw(schedule, generator)
    steps, last = schedule.steps, schedule.steps.stop - 1
    beyond = [i for i in (*drawn.shares, *([] if drawn.stop is None else [drawn.stop])) if i not in steps]
    if beyond:
        raise ValueError(f"path must hold steps from {steps.start} to {last} of this schedule, got {max(beyond)}")
    if drawn.noises and (last not in drawn.shares or drawn.stop is not None):
        raise ValueError(f"path must have the last step, {last}, active and no stop for its noises, got {drawn}")
    return drawn
