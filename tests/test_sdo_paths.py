"""Gradient paths: recipes as published, gradients as defined, memory that does not grow."""

from __future__ import annotations

import itertools
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from helpers import rel_rms
from sdo_models import ConvModel, gradients
from torch import Tensor

from sdo_fast import NotAffineError, ShortcutSampler, TrajectoryCache, coefficients, paths
from sdo_fast.paths import Path, Schedule
from sdo_fast.reference import full_backprop, path_loop
from sdo_fast.schedulers import noise_level, posterior_mean
from sdo_fast.solver import Solver

diffusers = pytest.importorskip("diffusers")
STEPS = 8
flow = diffusers.FlowMatchEulerDiscreteScheduler


def ddim(**config: Any) -> Any:
    return diffusers.DDIMScheduler(**{"clip_sample": False, "timestep_spacing": "trailing", **config})


RECIPES = {
    "full": paths.full(),
    "first": paths.sdo("first"),
    "last": paths.sdo("last"),
    "random": paths.sdo("random"),
    "index": paths.sdo(3),
    "identity": paths.identity(),
    "refl": paths.refl(),
    "draft": paths.draft(3),
    "draft_lv": paths.draft_lv(3),
    "drtune": paths.drtune(),
    "leapalign": paths.leapalign(),
    "flowbp_sparse": paths.flowbp_sparse(3, rescale=0.5),
    "flowbp_bridge": paths.flowbp_bridge(),
    "flowbp_lagrange": paths.flowbp_lagrange(),
}
# How exactly each works in float64; some schedulers are in float32 inside.
SCHEDULERS = {
    ddim: 1e-12,
    flow: 1e-5,
    diffusers.EulerDiscreteScheduler: 1e-5,
    diffusers.DPMSolverMultistepScheduler: 1e-5,
}
EVERY = pytest.mark.parametrize("name", RECIPES)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def schedule(steps: int, start: int = 0) -> Schedule:
    """Of a flow with the steps of a shifted schedule in sigma."""
    sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    sigma = 3 * sigma / (1 + 2 * sigma)
    return Schedule(range(start, steps), lambda: (sigma[1:] - sigma[:-1]).tolist())


class TestGradients:
    """Against the plain loop over autograd, on the same draws."""

    @EVERY
    @pytest.mark.parametrize("make", [ddim, flow], ids=["ddim", "flow"])
    @pytest.mark.parametrize("guidance", [None, 3.0])
    @pytest.mark.parametrize("checkpoint", [True, False])
    def test_bit_for_bit(self, name, make, guidance, checkpoint):
        (ours, mine), (theirs, others) = self.both(name, make(), guidance, checkpoint, fused=False)
        assert torch.equal(ours, theirs)
        assert all(map(torch.equal, mine, others))

    @EVERY
    @pytest.mark.parametrize("make", SCHEDULERS)
    @pytest.mark.parametrize("guidance", [None, 3.0])
    def test_fused(self, name, make, guidance):
        (ours, mine), (theirs, others) = self.both(name, make(), guidance, True, fused=True, dtype=torch.float64)
        assert rel_rms(ours, theirs) < SCHEDULERS[make]
        for one, other in zip(mine, others, strict=True):
            assert rel_rms(one, other) < 10 * SCHEDULERS[make]

    @pytest.mark.parametrize("name", ["draft", "refl", "drtune", "flowbp_bridge"])
    @pytest.mark.parametrize("fused", [True, False])
    def test_clipping_and_a_learned_guidance(self, name, fused):
        recipe = paths.flowbp_bridge(rescale=0) if name == "flowbp_bridge" else RECIPES[name]
        for scheduler, guidance in ((ddim(clip_sample=True), 2.0), (ddim(), torch.tensor(2.0, requires_grad=True))):
            (ours, mine), (theirs, others) = self.both(
                recipe, scheduler, guidance, True, fused=fused, dtype=torch.float64
            )
            assert rel_rms(ours, theirs) < 1e-12
            for one, other in zip(mine, others, strict=True):
                assert rel_rms(one, other) < 1e-9

    @pytest.mark.parametrize("name", ["draft", "refl", "draft_lv"])
    def test_learned_variance(self, name):
        scheduler = diffusers.DDPMScheduler(variance_type="learned_range", clip_sample=False)
        (ours, mine), (theirs, others) = self.both(name, scheduler, 2.0, True, fused=True, channels=6)
        assert torch.equal(ours, theirs)
        assert all(map(torch.equal, mine, others))

    @staticmethod
    def both(
        name: Any,
        scheduler: Any,
        guidance: Any,
        checkpoint: bool,
        fused: bool,
        dtype: torch.dtype = torch.float32,
        channels: int = 3,
    ) -> Any:
        recipe = RECIPES[name] if isinstance(name, str) else name
        # Tame: what schedulers round to float32 inside is not amplified.
        model = ConvModel(out_channels=channels, scale=0.1).to(dtype)
        x, cond, uncond = (torch.randn(2, *s, dtype=dtype, requires_grad=True) for s in ((3, 7, 6), (5,), (5,)))
        inputs = [x, cond, *model.parameters(), *([] if guidance is None else [uncond])]
        inputs = [x] if name == "identity" else inputs
        if isinstance(guidance, Tensor):
            inputs.append(guidance)
        call = {"model_kwargs": {"cond": cond}, "uncond_kwargs": None if guidance is None else {"cond": uncond}}
        theirs = path_loop(model, scheduler, x, STEPS, path=recipe, guidance_scale=guidance, generator=seeded(), **call)
        sampler = ShortcutSampler(
            model, scheduler, STEPS, path=recipe, guidance_scale=guidance, checkpoint=checkpoint, fused=fused
        )
        ours = sampler(x, generator=seeded(), **call)
        return (ours, gradients(ours, *inputs)), (theirs, gradients(theirs, *inputs))

    def test_of_a_share_and_a_weight_by_hand(self):
        """x_2 = a_1 (a_0 x + b_0 o_0) + b_1 o_1 with o linear in x: the gradient is a polynomial."""
        weights = torch.randn(2, dtype=torch.float64)

        def model(x: Tensor, t: Tensor) -> Tensor:
            return x * torch.where(t > 600, *weights)[:, None, None, None]

        scheduler = ddim()
        x = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
        path = Path({0: 0.25, 1: 0.5}, {0: 3.0, 1: -2.0})
        (ours,) = torch.autograd.grad(ShortcutSampler(model, scheduler, 2, path=path)(x).sum(), x)
        alphas = scheduler.alphas_cumprod.double()
        (a0, b0), (a1, b1) = (
            ((after / now).sqrt(), (1 - after).sqrt() - (after * (1 - now) / now).sqrt())
            for now, after in ((alphas[999], alphas[499]), (alphas[499], scheduler.final_alpha_cumprod.double()))
        )
        first, second = weights.tolist()
        expected = (a0 + 3 * b0 * 0.25 * first) * (a1 - 2 * b1 * 0.5 * second)
        torch.testing.assert_close(ours, torch.full_like(ours, expected.item()), rtol=1e-5, atol=0)

    def test_values_are_those_of_sampling(self):
        model, x = ConvModel(), torch.randn(2, 3, 6, 6, requires_grad=True)
        with torch.no_grad():
            plain = ShortcutSampler(model, flow(), STEPS)(x)
        for name, recipe in RECIPES.items():
            sampler = ShortcutSampler(model, flow(), STEPS, path=recipe)
            with torch.no_grad():
                assert torch.equal(sampler(x), plain), name
            image = sampler(x)
            assert sampler.drawn.stop is not None or torch.equal(image, plain), name

    def test_full_is_full_backpropagation(self):
        model, x = ConvModel(), torch.randn(2, 3, 6, 6, requires_grad=True)
        inputs = (x, *model.first.parameters())
        ours = gradients(ShortcutSampler(model, ddim(), STEPS, path="full", fused=False)(x), *inputs)
        assert all(map(torch.equal, ours, gradients(full_backprop(model, ddim(), x, STEPS), *inputs)))

    def test_a_path_without_shares_takes_the_parts_of_each_step(self):
        """Parameters' gradients of cut inputs add up; of latents only the identity remains."""
        model, x = ConvModel().double(), torch.randn(2, 3, 6, 6, dtype=torch.float64, requires_grad=True)
        inputs = (x, *model.first.parameters())

        def of(path: Any) -> list[Tensor]:
            return gradients(ShortcutSampler(model, flow(), 5, path=path)(x), *inputs)

        whole, parts = of(Path(dict.fromkeys((1, 2, 4), 0.0))), [of(Path({i: 0.0})) for i in (1, 2, 4)]
        (identity,) = gradients(ShortcutSampler(model, flow(), 5, path="identity")(x), x)
        assert rel_rms(whole[0], identity) < 1e-12
        for k in (1, 2):
            assert rel_rms(whole[k], sum(part[k] for part in parts)) < 1e-12

    def test_noises_average_what_further_noises_give(self):
        """In the mean over draws; one call's noises differ from one another."""
        model, x = ConvModel().double(), torch.randn(1, 3, 6, 6, dtype=torch.float64)
        sampler = ShortcutSampler(model, diffusers.DDIMScheduler(clip_sample=False), 5, path=paths.draft_lv(4))
        one, other = (gradients(sampler(x, generator=seeded(k)), model.first.weight)[0] for k in (0, 1))
        last = gradients(sampler.with_options(path="last")(x), model.first.weight)[0]
        assert 1e-9 < rel_rms(one, other) < 0.2
        assert 1e-9 < rel_rms(one, last) < 0.2


class Recorded:
    """The bytes that autograd saves, at their peak."""

    def __init__(self) -> None:
        self.kept = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        self.kept += tensor.nbytes
        self.peak = max(self.peak, self.kept)
        return tensor

    def __call__(self, run: Any) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor):
            run()
        return self.peak


def test_memory_of_checkpointed_steps_is_their_inputs():
    model, x = ConvModel(width=64), torch.randn(1, 3, 16, 16, requires_grad=True)
    peaks = {
        k: Recorded()(lambda k=k: ShortcutSampler(model, flow(), STEPS, path=paths.draft(k))(x)) for k in (1, 2, 4, 8)
    }
    assert peaks[4] - peaks[2] <= 2 * 1.2 * x.nbytes
    assert peaks[8] <= 8 * 1.2 * x.nbytes
    kept = Recorded()(lambda: ShortcutSampler(model, flow(), STEPS, path=paths.draft(4), checkpoint=False)(x))
    assert kept > 20 * peaks[4]


class TestRecipes:
    @EVERY
    def test_steps_lie_in_the_schedule_and_are_drawn_anew(self, name):
        drawn = [paths.draw(RECIPES[name], schedule(12, start=2), seeded(k)) for k in range(40)]
        assert all(2 <= i < 12 for path in drawn for i in (*path.shares, path.stop or 2))
        random = name in ("random", "refl", "drtune", "leapalign", "flowbp_sparse", "flowbp_bridge", "flowbp_lagrange")
        assert (len({str(path) for path in drawn}) > 1) is random
        assert drawn[3] == paths.draw(RECIPES[name], schedule(12, start=2), seeded(3))
        assert paths.draw(pickle.loads(pickle.dumps(RECIPES[name])), schedule(12, start=2), seeded(3)) == drawn[3]

    def test_refl_stops_in_the_last_quarter(self):
        stops = {paths.draw(paths.refl(), schedule(20), seeded(k)).stop for k in range(80)}
        assert stops == set(range(15, 20))
        path = paths.draw(paths.refl(), schedule(20), seeded())
        assert path.shares == {path.stop: 0.0}

    def test_drtune_is_evenly_spaced_before_an_early_stop(self):
        found = [paths.draw(paths.drtune(3, 0.4), schedule(20), seeded(k)) for k in range(200)]
        assert {path.stop for path in found} == set(range(12, 20))
        offsets = set()
        for path in found:
            first, second, third = path.shares
            assert second - first == third - second == (path.stop + 1) // 3
            assert set(path.shares.values()) == {0.0}
            offsets.add((path.stop, first))
        # Every offset that leaves room occurs.
        assert {first for stop, first in offsets if stop == 13} == {0, 1, 2, 3, 4, 5}

    def test_late_bias_is_a_power_law(self):
        count = np.zeros(6)
        for k in range(3000):
            (step,) = paths.draw(paths.flowbp_sparse(1, late_bias=2.0), schedule(6), seeded(k)).shares
            count[step] += 1
        expected = np.arange(1, 7) ** 2.0
        np.testing.assert_allclose(count / 3000, expected / expected.sum(), atol=0.035)

    def test_rescaling_restores_the_length_of_the_schedule(self):
        lengths = np.abs(schedule(10).coefficients)
        path = paths.draw(paths.flowbp_sparse(3, rescale=1.0), schedule(10), seeded(1))
        assert sum(path.weight(i) * lengths[i] for i in path.shares) == pytest.approx(lengths.sum())
        half = paths.draw(paths.flowbp_sparse(3, rescale=0.5), schedule(10), seeded(1))
        assert all(half.weight(i) == pytest.approx((1 + path.weight(i)) / 2) for i in path.shares)

    def test_leapalign_is_two_euler_leaps(self):
        """x_j = x_k + (sigma_j - sigma_k) v_k and x_0 = x_j - sigma_j v_j, of detached x_k."""
        sigma = torch.linspace(1, 0, 11, dtype=torch.float64)
        plan = Schedule(range(10), lambda: (sigma[1:] - sigma[:-1]).tolist())
        path = paths.draw(paths.leapalign(0.3), plan, seeded(2))
        k, j = path.shares
        assert path.shares == {k: 0.0, j: 0.3}
        assert path.weights[k] * plan.coefficients[k] == pytest.approx(float(sigma[j] - sigma[k]))
        assert path.weights[j] * plan.coefficients[j] == pytest.approx(float(-sigma[j]))

    def test_lagrange_integrates_polynomials_exactly(self):
        """With all supports active, sum_s W_s v(u_s) is the integral of any polynomial v of lower degree."""
        plan = schedule(14)
        u = np.concatenate([[0], np.cumsum(plan.coefficients)])
        recipe = paths.flowbp_lagrange(supports=3, active=3, further=1.0, rescale=0.0)
        for k in range(20):
            path = paths.draw(recipe, plan, seeded(k))
            (j,) = (i for i, share in path.shares.items() if share)
            for start, end in ((min(path.shares), j), (j, 14)):
                nodes = [i for i in path.shares if start <= i < end]
                assert nodes[0] == start
                assert len(nodes) == min(3, end - start)
                for degree in range(len(nodes)):
                    have = sum(path.weights[i] * plan.coefficients[i] * u[i] ** degree for i in nodes)
                    want = (u[end] ** (degree + 1) - u[start] ** (degree + 1)) / (degree + 1)
                    assert have == pytest.approx(want, rel=1e-9, abs=1e-12)

    def test_lagrange_defaults_are_active_at_the_first_two_supports(self):
        whole = paths.flowbp_lagrange(supports=3, active=3, further=1.0, rescale=0.0)
        for k in range(20):
            path, full = (paths.draw(r, schedule(14), seeded(k)) for r in (paths.flowbp_lagrange(), whole))
            (j,) = (i for i, share in path.shares.items() if share)
            integrals = {i: abs(w * schedule(14).coefficients[i]) for i, w in full.weights.items()}
            for inside in ([i for i in full.shares if i < j], [i for i in full.shares if i >= j]):
                total, kept = (sum(integrals[i] for i in some) for some in (inside, inside[:2]))
                factor = (1 + total / kept) / 2
                assert path.weights[inside[0]] == pytest.approx(factor * full.weights[inside[0]])
                for i in inside[1:2]:
                    assert path.weights[i] == pytest.approx(0.25 * factor * full.weights[i])
                assert not any(i in path.shares for i in inside[2:])

    def test_lagrange_of_two_equal_steps_has_nothing_to_make_up_by(self):
        """The quadrature from the first of them on is the second's alone: 1/2 = 0 * w_0 + 1/2 * w_1."""
        for noise in (0.0, 1e-8):
            equal = Schedule(range(9), lambda noise=noise: [-1 / 9 + noise * (i % 2) for i in range(9)])
            pairs = 0
            for k in range(60):
                path = paths.flowbp_lagrange(active=1).draw(equal, seeded(k))
                starts = sorted(path.shares)
                for start, end in itertools.pairwise([*starts, 9]):
                    pairs += end - start == 2
                    assert (abs(path.weights[start]) < 1e-6) == (end - start == 2)
            assert pairs > 3

    def test_bridge_shares_its_steps_out_by_length(self):
        for k in range(100):
            path = paths.draw(paths.flowbp_bridge(5, alpha=0.2), schedule(20), seeded(k))
            (j,) = (i for i, share in path.shares.items() if share)
            early = [i for i in path.shares if i < j]
            assert path.shares[j] == 0.2
            assert 1 <= len(path.shares) <= 5
            expected = min(max(round(5 * j / 20), 1), 4, j)
            assert len(early) == max(expected, 5 - (20 - j))

    def test_steps_that_do_not_reach_the_result_are_not_drawn(self):
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=True)
        sampler = ShortcutSampler(ConvModel(), scheduler, 6, path=paths.flowbp_sparse(2, late_bias=4.0))
        assert all(6 not in sampler.draw_path(seeded(k)).shares for k in range(40))


POSTERIOR = {
    "ddim": partial(diffusers.DDIMScheduler, clip_sample=False),
    "ddim v": partial(diffusers.DDIMScheduler, clip_sample=False, prediction_type="v_prediction"),
    "ddim sample": partial(diffusers.DDIMScheduler, clip_sample=False, prediction_type="sample"),
    "euler": diffusers.EulerDiscreteScheduler,
    "euler v": partial(diffusers.EulerDiscreteScheduler, prediction_type="v_prediction"),
    "euler ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "ddpm": partial(diffusers.DDPMScheduler, clip_sample=False),
}


@pytest.mark.parametrize("name", POSTERIOR)
def test_posterior_mean_is_the_schedulers_own(name):
    scheduler = POSTERIOR[name]()
    scheduler.set_timesteps(6)
    x = output = torch.randn(1, 1, 3, 3, dtype=torch.float64)
    solver = Solver(scheduler, 6)
    for i, t in enumerate(scheduler.timesteps):
        x, output = torch.randn(2, 1, 1, 3, 3, dtype=torch.float64)
        scheduler.scale_model_input(x, t)
        theirs = scheduler.step(output, t, x).pred_original_sample
        p, q = posterior_mean(solver, i)
        assert rel_rms(p * x + q * output, theirs) < 1e-5


@pytest.mark.parametrize("make", [flow, diffusers.UniPCMultistepScheduler, diffusers.DPMSolverMultistepScheduler])
def test_posterior_mean_of_the_best_model_is_the_sample(make):
    """Of one image as the data: every output points to it."""
    image, scheduler = torch.randn(1, 3, 4, 4, dtype=torch.float64), make()
    solver = Solver(scheduler, 6)
    for i in range(6):
        (p, q), (alpha, sigma), noise = posterior_mean(solver, i), noise_level(solver, i), torch.randn_like(image)
        output = noise - image if make is flow else noise
        assert rel_rms(p * (alpha * image + sigma * noise) + q * output, image) < 1e-6


class TestErrors:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (({-1: 0.5},), "shares must be of steps"),
            (({1: 1.5},), r"shares must lie in \[0, 1\]"),
            (({1: 0.5}, {2: 1.0}), "weights must be of active steps"),
            (({1: 0.5}, {1: float("nan")}), r"weights\[1\] must be"),
            (({3: 0.5}, {}, 2), "stop must be None or a step from"),
            (({3: 0.5}, {}, None, -1), "noises must be"),
        ],
    )
    def test_values(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            Path(*arguments)
        with pytest.raises(TypeError, match="shares must be a mapping"):
            Path([1, 2])

    @pytest.mark.parametrize(
        "make",
        [
            lambda: paths.draft(0),
            lambda: paths.refl(2),
            lambda: paths.drtune(1.5),
            lambda: paths.leapalign(-1),
            lambda: paths.flowbp_sparse(late_bias=-1),
            lambda: paths.flowbp_bridge(1),
            lambda: paths.flowbp_lagrange(0),
            lambda: paths.draft_lv(0),
            lambda: paths.sdo("middle"),
            lambda: paths.sdo(-1),
        ],
    )
    def test_settings(self, make):
        with pytest.raises(ValueError, match="must"):
            make()

    @pytest.mark.parametrize("path", ["middle", 2.5, None, [-1], -3, {1: 0.5}])
    def test_what_is_no_path(self, path):
        with pytest.raises(ValueError, match="path must be one of sdo_fast"):
            ShortcutSampler(ConvModel(), ddim(), 5, path=path)

    @pytest.mark.parametrize("path", [5, [1, 7], paths.draft(6), Path({1: 0.0}, stop=9), paths.sdo(6)])
    def test_beyond_the_schedule(self, path):
        with pytest.raises(ValueError, match=r"path .*must"):
            ShortcutSampler(ConvModel(), ddim(), 5, path=path)

    def test_weights_need_an_affine_scheduler(self):
        clipped = ddim(clip_sample=True)
        for recipe in (
            paths.leapalign(),
            paths.flowbp_lagrange(),
            paths.flowbp_bridge(),
            paths.flowbp_sparse(rescale=1),
        ):
            with pytest.raises(NotAffineError, match="must be affine"):
                ShortcutSampler(ConvModel(), clipped, 5, path=recipe)
        ShortcutSampler(ConvModel(), clipped, 5, path=paths.flowbp_sparse())

    def test_stops_and_noises(self):
        model = ConvModel()
        with pytest.raises(ValueError, match="must tell whether"):
            ShortcutSampler(model, diffusers.EDMEulerScheduler(), 5, path="refl")
        for path in ("refl", "draft_lv"):
            with pytest.raises(ValueError, match="reuse must be None"):
                ShortcutSampler(model, ddim(), 5, path=path, reuse=TrajectoryCache())
            with pytest.raises(ValueError, match="reuse must be None"):
                ShortcutSampler(model, ddim(), 5, reuse=TrajectoryCache()).sample(torch.randn(1, 3, 6, 6), path)
        with pytest.raises(ValueError, match="no stop for its noises"):
            ShortcutSampler(model, ddim(), 5, path=Path({1: 1.0}, noises=2))
        terminal = ddim(rescale_betas_zero_snr=True, clip_sample=True)
        with pytest.raises(ValueError, match="more than noise"):
            ShortcutSampler(model, terminal, 5, path=Path({0: 0.0}, stop=0))

    def test_reuse_takes_paths_of_several_steps(self):
        model, x = ConvModel(), torch.randn(1, 3, 6, 6, requires_grad=True)
        cached = ShortcutSampler(model, ddim(), STEPS, path=[1, 3], reuse=TrajectoryCache(0.25, 3))
        plain = ShortcutSampler(model, ddim(), STEPS, path=[1, 3])
        ours, theirs = (gradients(s(x), x, model.first.weight) for s in (cached, plain))
        for one, other in zip(ours, theirs, strict=True):
            assert rel_rms(one, other) < 1e-5
        estimate = cached(x + 0.01)
        assert not cached.reuse.exact
        assert gradients(estimate, model.first.weight)[0].abs().sum() > 0


def test_coefficients_are_the_weights():
    """B_i w_i is what an active output weighs in the result."""
    scheduler, x = ddim(), torch.randn(1, 1, 4, 4, dtype=torch.float64)
    _, b = coefficients(scheduler, 6)
    level = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for i, weight in itertools.product((0, 3, 5), (1.0, -0.5)):
        sampler = ShortcutSampler(lambda x, t: 0 * x + level, scheduler, 6, path=Path({i: 0.0}, {i: weight}))
        (gradient,) = torch.autograd.grad(sampler(x).sum(), level)
        assert gradient.item() == pytest.approx(16 * weight * b[i].item())
