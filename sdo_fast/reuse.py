"""Model outputs kept from one optimisation step to the next (experimental)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .arguments import check_choice, check_flag, is_integer, number
from .schedulers import affine_sensitivities, output_jacobians, refuse_stochastic
from .solver import Solver

LARGEST_GAP = 0.5


class TrajectoryCache:
    r"""Reuse of a trajectory's model outputs while its latents move little: `ShortcutSampler(..., reuse=...)`.

    Experimental: the evidence is one tiny model (digits, 0.65 M parameters), where it needed 2.5 to 3.6 times fewer
    model evaluations, for final losses of 0.5 to 2.4 times those without it.

    Most steps of most calls use an estimate instead of the model,

        output_i = output_i,cached + J_i (x_i - x_i,cached),

    with the scalar J_i that the output would have if the data were Gaussian with variance s^2,
    d E[noise | x] / d x = sigma / (alpha^2 s^2 + sigma^2), converted to what the model predicts. `cache="v"` is
    s^2 = 1, which freezes the v-prediction; "eps" (s^2 = infinity) freezes the noise, whose error grows by 1 / alpha;
    "x0" (s^2 = 0) freezes the sample. The estimate is a constant for autograd, as every other step's output is.

    The first call and every `exact_every`-th is exact: all steps call the model. Between them each call refreshes a
    share `refresh` of the steps (at least two), in turn, besides the step of the gradient. Before an exact call the
    result is also estimated from the cache alone, at no model call; `gap` is ||estimate - x_0|| / ||x_0||. Above 0.5
    the reuse is halved (`refresh` doubled, `exact_every` halved) with a warning. A change of the arguments, guidance,
    shape, dtype or device drops the cache. It holds two latents a step, and belongs to one sampler and one set of
    latents.

    `batched` refreshes all steps of a call in one model call on a batch of their states, as the cache gives them: as
    many evaluations, less depth, for GPUs that one state does not fill. Arguments with the batch in front are repeated.

    `exact` tells whether the last call was exact: only then is its result x_0. `require_exact()` makes the next one so.
    """

    def __init__(self, refresh: float = 0.1, exact_every: int = 10, cache: str = "v", batched: bool = False) -> None:
        if not 0 < number("refresh", refresh) <= 1:
            raise ValueError(f"refresh must be a share of the steps in (0, 1], got {refresh!r}")
        if not is_integer(exact_every) or exact_every < 1:
            raise ValueError(f"exact_every must be a positive integer, got {exact_every!r}")
        check_choice("cache", cache, ("v", "eps", "x0"))
        check_flag("batched", batched)
        self.refresh = refresh
        self.exact_every = exact_every
        self.cache = cache
        self.batched = batched
        self.exact = False
        self.gap: float | None = None
        self._jacobians: list[float] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the trajectory; the next call is exact."""
        self._entries: dict[int, tuple[Tensor, Tensor]] = {}
        self._conditions: Any = None
        self._next = 0
        self._calls_since_exact = 0
        self._exact_required = True
        self.complete = False  # whether there is a whole trajectory

    def require_exact(self) -> None:
        self._exact_required = True

    def attach(self, solver: Solver) -> None:
        """Take a sampler's schedule; ValueError for stochastic ones, NotAffineError for those that are not affine."""
        if self._jacobians is not None:
            raise ValueError("reuse must be a new TrajectoryCache for each sampler, got that of another sampler")
        affine_sensitivities(solver)
        refuse_stochastic(solver, "reuse")
        self._jacobians = output_jacobians(solver, {"v": 1.0, "eps": math.inf, "x0": 0.0}[self.cache])

    def begin(self, latents: Tensor, conditions: Mapping[str, Any]) -> None:
        """Begin a call with these arguments; drops the trajectory of others."""
        conditions = {**conditions, "like": (tuple(latents.shape), latents.dtype, latents.device)}
        if self._conditions is None or not same(self._conditions, conditions):
            self.clear()
            self._conditions = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), conditions)

    def plan(self, steps: range) -> set[int]:
        """The steps that call the model this time; all of them make the call exact."""
        if self._exact_required or self._calls_since_exact + 1 >= self.exact_every:
            return set(steps)
        count = min(len(steps), max(2, round(self.refresh * len(steps))))
        return {steps[(self._next + k) % len(steps)] for k in range(count)}

    def done(self, steps: range, planned: set[int]) -> None:
        """Note that a call with this plan is complete."""
        self.exact = len(planned) == len(steps)
        if self.exact:
            self.complete, self._exact_required, self._calls_since_exact = True, False, 0
        else:
            self._calls_since_exact += 1
            self._next = (self._next + len(planned)) % len(steps)

    def estimate(self, i: int, x: Tensor) -> Tensor:
        assert self._jacobians is not None
        output, x_cached = self._entries[i]
        return torch.add(output, x.detach() - x_cached, alpha=self._jacobians[i])

    def store(self, i: int, x: Tensor, output: Tensor) -> None:
        # Clones, for an optimiser changes the first x in place.
        self._entries[i] = output.detach().clone(), x.detach().clone()

    def judge(self, estimate: Tensor, image: Tensor) -> None:
        """Compare an estimated result with the exact one, and reuse less where they differ too much."""
        self.gap = ((estimate - image).norm() / image.norm().clamp_min(torch.finfo(image.dtype).tiny)).item()
        if not self.gap <= LARGEST_GAP:
            self.refresh, self.exact_every = min(1.0, 2 * self.refresh), max(1, self.exact_every // 2)
            warnings.warn(
                f"the reused trajectory was off by {self.gap:.2g} of x_0: reuse halved to refresh={self.refresh:.2g}, "
                f"exact_every={self.exact_every}",
                stacklevel=4,
            )


def same(a: Any, b: Any) -> bool:
    """Whether two trees hold equal tensors and plain values, and otherwise the very same objects."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and type(a) is type(b):
        return len(a) == len(b) and all(map(same, a, b))
    return a is b or (
        type(a) is type(b) and isinstance(a, (bool, int, float, str, torch.dtype, torch.device)) and a == b
    )
