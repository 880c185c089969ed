"""Trajectory reuse: estimates, refreshing, safeguards, and optimisation with it."""

from __future__ import annotations

import warnings

import pytest
import torch
from sdo_models import ConvModel

from sdo_fast import NotAffineError, ShortcutSampler, TrajectoryCache, optimize_latents

diffusers = pytest.importorskip("diffusers")

SCHEDULERS = {
    "ddim epsilon": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "ddim v": lambda: diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "dpm++ epsilon": lambda: diffusers.DPMSolverMultistepScheduler(),
    "dpm++ sample": lambda: diffusers.DPMSolverMultistepScheduler(prediction_type="sample"),
    "dpm++ flow": lambda: diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "euler epsilon": lambda: diffusers.EulerDiscreteScheduler(),
    "euler v": lambda: diffusers.EulerDiscreteScheduler(prediction_type="v_prediction"),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "flow euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


class Exact:
    """The exact model of Gaussian data of variance s^2 around a mean, or of constant noise, for one scheduler."""

    def __init__(self, name, scheduler, n, kind):
        self.name, self.kind, self.calls = name, kind, 0
        scheduler.set_timesteps(n)
        t = [float(t) for t in scheduler.timesteps]
        if name == "flow euler" or name == "dpm++ flow":
            levels = {t: (1 - s, s) for t, s in zip(t, scheduler.sigmas.tolist(), strict=False)}
        elif hasattr(scheduler, "sigmas"):
            levels = {t: (1.0, s) for t, s in zip(t, scheduler.sigmas.tolist(), strict=False)}
            if name.startswith("dpm++"):
                levels = {t: (1 / (1 + s * s) ** 0.5, s / (1 + s * s) ** 0.5) for t, (_, s) in levels.items()}
        else:
            bars = scheduler.alphas_cumprod.double()
            levels = {k: (bars[int(k)].sqrt().item(), (1 - bars[int(k)]).sqrt().item()) for k in t}
        self.levels = levels
        self.scaled = name.startswith(("euler", "heun"))

    def __call__(self, x, t):
        self.calls += 1
        levels = torch.tensor([self.levels[float(k)] for k in t], dtype=torch.float64)
        alpha, sigma = levels[:, :, None, None, None].unbind(1)
        if self.scaled:
            x = x * (1 + sigma * sigma) ** 0.5
        mean = 0.3
        if self.kind == "v":
            x0 = mean + alpha * (x - alpha * mean) / (alpha**2 + sigma**2)
        elif self.kind == "x0":
            x0 = torch.full_like(x, mean)
        else:
            x0 = (x - sigma * mean) / alpha
        noise = (x - alpha * x0) / sigma
        if "flow" in self.name:
            return noise - x0
        if "sample" in self.name:
            return x0
        norm = (alpha**2 + sigma**2) ** 0.5
        return (alpha * noise - sigma * x0) / norm if " v" in self.name else noise


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kind", ["v", "eps", "x0"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_estimate_is_exact_where_its_assumption_holds(name, kind, batched):
    scheduler = SCHEDULERS[name]()
    if name.endswith("flow euler") and kind == "eps":
        with pytest.raises(ValueError, match="pure noise"):
            ShortcutSampler(ConvModel(), scheduler, 20, path="identity", reuse=TrajectoryCache(cache=kind))
        return
    model = Exact(name, SCHEDULERS[name](), 20, kind)
    cache = TrajectoryCache(refresh=0.1, cache=kind, batched=batched)
    path = "last" if "sample" in name else "identity"
    sampler = ShortcutSampler(model, scheduler, 20, path=path, reuse=cache)
    plain = ShortcutSampler(model, scheduler, 20, path=path)
    x = torch.randn(1, 2, 3, 3, dtype=torch.float64) * getattr(sampler.solver.scheduler, "init_noise_sigma", 1.0)
    torch.testing.assert_close(sampler(x), plain(x), rtol=0, atol=0)
    assert cache.exact
    moved = x + torch.randn_like(x) * x.std()
    model.calls = 0
    estimate = sampler(moved)
    assert not cache.exact
    refreshed = round(0.1 * len(sampler.timesteps))
    assert model.calls == (1 if batched else refreshed) + (path == "last")
    exact = plain(moved)
    assert (estimate - exact).abs().max() <= 2e-5 * exact.abs().max()
    assert (exact - plain(x)).abs().max() > 1e-3 * exact.abs().max() or kind == "x0"


def make(n=20, **kwargs):
    model = ConvModel(scale=0.15)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    return model, ShortcutSampler(model, scheduler, n, **{"path": "identity", **kwargs})


def test_steps_are_refreshed_in_turn_and_every_kth_call_is_exact():
    cache = TrajectoryCache(refresh=0.15, exact_every=4)
    model, sampler = make(reuse=cache)
    stored = []
    cache.store = lambda i, x, output, store=cache.store: (stored.append(i), store(i, x, output))
    x, history = torch.randn(1, 3, 4, 4), []
    for _ in range(9):
        sampler(x)
        history.append((cache.exact, list(stored)))
        stored.clear()
    every = list(range(20))
    assert [exact for exact, _ in history] == [True, False, False, False, True, False, False, False, True]
    assert [steps for exact, steps in history if exact] == [every] * 3
    assert [i for exact, steps in history if not exact for i in steps] == list(range(18))
    assert cache.gap is not None
    assert len(model.calls) == 3 * 20 + 6 * 3


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("guidance", [None, 2.0, torch.tensor([1.5, 3.0]).view(2, 1, 1, 1)])
@pytest.mark.parametrize("path", ["identity", "first", 1])
def test_batched_refresh_calls_the_model_once(path, guidance, joined):
    """What it keeps are the model's outputs at the states that the cache gave."""
    cache = TrajectoryCache(refresh=0.2, batched=True)
    model, sampler = make(10, path=path, guidance_scale=guidance, reuse=cache)
    x, cond, other = torch.randn(2, 3, 4, 4), torch.randn(2, 5), torch.randn(2, 5)
    uncond = None if guidance is None else {"cond": other} if joined else {}
    sampler(x, {"cond": cond}, uncond)
    model.calls.clear()
    kept, calls = dict(cache._entries), sampler.model_calls
    sampler(x + 0.1 * torch.randn_like(x), {"cond": cond}, uncond)
    changed = {i for i in kept if cache._entries[i][0] is not kept[i][0]}
    of_gradient = {"identity": set(), "first": {0}, 1: {1}}[path]
    assert changed == {0, 1} | of_gradient
    per_step = 1 if guidance is None else 2
    assert sampler.model_calls - calls == 2 * per_step
    passes = (2 if guidance is not None and not joined else 1) * (1 + bool(of_gradient))
    assert len(model.calls) == passes
    eps = sampler.guided(x, {"cond": cond}, uncond)
    for i in changed:
        output, state = cache._entries[i]
        assert output.shape == state.shape == x.shape
        torch.testing.assert_close(output, eps(state, sampler.timesteps[i]).detach(), rtol=1e-5, atol=1e-5)


def test_batched_refresh_keeps_the_states_that_it_called_the_model_at():
    """Not what later steps write over them."""
    x, other, entries = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4), []
    for fused in (False, True):
        cache = TrajectoryCache(refresh=0.4, batched=True)
        _, sampler = make(10, reuse=cache, fused=fused)
        for latents in (x, other, other):
            sampler(latents)
        entries.append(cache._entries)
    for plain, fused in zip(*(each.values() for each in entries), strict=True):
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)


def test_batched_refresh_optimises_as_well():
    x, target = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    results = []
    for batched in (False, True):
        _, sampler = make(reuse=TrajectoryCache(batched=batched))
        results.append(
            optimize_latents(sampler, x, lambda image: (image - target).pow(2).mean(), 25, 0.1, progress=False)
        )
    plain, batched = results
    assert sum(r.model_calls for r in batched.history) == sum(r.model_calls for r in plain.history)
    assert batched.best.loss <= 1.1 * plain.best.loss < 0.5 * plain.history[0].loss


def test_the_same_latents_give_the_same_result():
    _, sampler = make(reuse=TrajectoryCache())
    x = torch.randn(1, 3, 4, 4)
    exact = sampler(x)
    torch.testing.assert_close(sampler(x), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:the reused trajectory was off")
def test_full_refresh_is_plain_sampling():
    _, sampler = make(reuse=TrajectoryCache(refresh=1.0))
    plain = make()[1]
    for _ in range(3):
        x = torch.randn(1, 3, 4, 4)
        assert torch.equal(sampler(x), plain(x))
        assert sampler.reuse.exact


def test_latents_changed_in_place_are_noticed():
    """An optimiser's update must not reach into the cache, at a call that does not refresh the first step."""
    x = torch.randn(1, 3, 4, 4)
    moved = x + 0.3 * torch.randn_like(x)
    results = []
    for in_place in (True, False):
        _, sampler = make(reuse=TrajectoryCache(exact_every=100, cache="eps"), path=5)
        z = x.clone()
        sampler(z)
        sampler(z)
        results.append(sampler(z.copy_(moved) if in_place else moved.clone()))
    assert torch.equal(*results)


@pytest.mark.parametrize("path", ["first", 7, "last"])
def test_the_step_of_the_gradient_is_always_called(path):
    cache = TrajectoryCache(exact_every=100)
    model, sampler = make(reuse=cache, path=path)
    x = torch.randn(1, 3, 4, 4, requires_grad=True)
    sampler(x)
    model.calls.clear()
    image = sampler(x)
    assert sum(grad for _, grad in model.calls) == 1
    parameter = model.first.weight
    assert torch.autograd.grad(image.sum(), parameter)[0].abs().sum() > 0


def test_the_identity_gradient_does_not_depend_on_the_plan():
    cache = TrajectoryCache()
    _, sampler = make(reuse=cache)
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    sampler.model.double()
    gradients = [torch.autograd.grad(sampler(x).sum(), x)[0] for _ in range(3)]
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_a_change_of_the_arguments_drops_the_cache():
    cache = TrajectoryCache(exact_every=100)
    model, sampler = make(reuse=cache)
    cond, x = torch.randn(1, 5), torch.randn(1, 3, 4, 4)
    for call, exact in (
        ((x, {"cond": cond}), True),
        ((x, {"cond": cond}), False),
        ((x, {"cond": cond.clone()}), False),
        ((x, {"cond": cond + 1}), True),
        ((x,), True),
        ((torch.cat([x, x]),), True),
        ((torch.cat([x, x]),), False),
    ):
        sampler(*call)
        assert cache.exact is exact
    cond_in_place = cond.clone()
    sampler(x, {"cond": cond_in_place})
    cond_in_place.add_(1)
    sampler(x, {"cond": cond_in_place})
    assert cache.exact
    model.double()
    sampler(x.double())
    assert cache.exact
    sampler(x.double())
    assert not cache.exact
    cache.clear()
    sampler(x.double())
    assert cache.exact
    cache.require_exact()
    sampler(x.double())
    assert cache.exact
    guided, sampler.guidance_scale = {"model_kwargs": {}, "uncond_kwargs": {}}, 2.0
    sampler(x.double(), **guided)
    assert cache.exact
    sampler.guidance_scale = 3.0
    sampler(x.double(), **guided)
    assert cache.exact


def test_a_large_gap_halves_the_reuse():
    cache = TrajectoryCache(refresh=0.1, exact_every=4)
    _, sampler = make(reuse=cache)
    sampler.model.second.weight.data *= 30
    sampler(torch.randn(1, 3, 4, 4))
    cache.require_exact()
    with pytest.warns(UserWarning, match="reuse halved"):
        sampler(10 * torch.randn(1, 3, 4, 4))
    assert cache.gap > 0.5
    assert (cache.refresh, cache.exact_every) == (0.2, 2)


def test_an_interrupted_first_call_leaves_nothing_behind():
    cache = TrajectoryCache()
    model, sampler = make(reuse=cache)
    x, forward, count = torch.randn(1, 3, 4, 4), model.forward, iter(range(99))

    def interrupt(*args):
        if next(count) == 5:
            raise KeyboardInterrupt
        return forward(*args)

    model.forward = interrupt
    with pytest.raises(KeyboardInterrupt):
        sampler(x)
    model.forward = forward
    assert torch.equal(sampler(x), make()[1](x))
    assert cache.exact


def test_what_is_refused():
    model = ConvModel()
    for scheduler, kwargs, error, match in (
        (diffusers.DDIMScheduler(), {}, NotAffineError, "clip_sample"),
        (diffusers.DDPMScheduler(variance_type="learned", clip_sample=False), {}, NotAffineError, "variance"),
        (diffusers.DDPMScheduler(clip_sample=False), {}, ValueError, "noise"),
        (diffusers.DDIMScheduler(clip_sample=False), {"step_kwargs": {"eta": 1.0}}, ValueError, "noise"),
        (diffusers.EulerAncestralDiscreteScheduler(), {}, ValueError, "noise"),
        (diffusers.EDMEulerScheduler(), {}, ValueError, "must tell whether"),
    ):
        with pytest.raises(error, match=match):
            ShortcutSampler(model, scheduler, 5, reuse=TrajectoryCache(), **kwargs)
    cache = TrajectoryCache()
    make(reuse=cache)
    with pytest.raises(ValueError, match="another sampler"):
        make(reuse=cache)
    for kwargs, match in (({"refresh": 0}, "refresh"), ({"exact_every": 0}, "exact_every"), ({"cache": "w"}, "cache")):
        with pytest.raises(ValueError, match=match):
            TrajectoryCache(**kwargs)


def target_loss(target):
    return lambda image: (image - target).pow(2).mean()


def test_optimising_with_reuse_selects_and_ends_on_exact_passes():
    torch.manual_seed(0)
    x, target = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    _, plain = make(reuse=None)
    _, sampler = make(reuse=TrajectoryCache(refresh=0.1, exact_every=10))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = optimize_latents(sampler, x, target_loss(target), steps=45, lr=0.1, progress=False)
    exact = [record.iteration for record in result.history if record.exact]
    assert exact == [0, 10, 20, 30, 40, 45]
    assert [record.model_calls for record in result.history] == [20 if i in exact else 2 for i in range(46)]
    assert torch.equal(plain(result.latents).detach(), result.image)
    assert target_loss(target)(result.image).item() == result.history[-1].loss
    assert result.best.iteration in exact
    assert torch.equal(plain(result.best.latents).detach(), result.best.image)
    reference = optimize_latents(plain, x, target_loss(target), steps=45, lr=0.1, progress=False)
    assert result.history[-1].loss < 0.5 * result.history[0].loss
    calls = sum(record.model_calls for record in result.history)
    affordable = calls // 20
    assert affordable < 12
    assert result.history[-1].loss < 0.5 * reference.history[affordable].loss


def test_stopping_waits_for_an_exact_pass():
    _, sampler = make(reuse=TrajectoryCache(exact_every=50))
    x = torch.randn(1, 3, 4, 4)
    stop = lambda record, latents, image: record.iteration >= 3  # noqa: E731
    result = optimize_latents(sampler, x, target_loss(0), steps=30, progress=False, callback=stop)
    assert [record.exact for record in result.history] == [True, False, False, False, True]


def test_coarse_to_fine():
    torch.manual_seed(0)
    x, target = torch.randn(1, 3, 4, 4), torch.randn(1, 3, 4, 4)
    _, sampler = make(path="first")
    result = optimize_latents(sampler, x, target_loss(target), steps=20, lr=0.1, progress=False, coarse_steps=5)
    assert [record.exact for record in result.history] == [False] * 16 + [True] * 5
    assert [record.model_calls for record in result.history] == [6] * 16 + [21] * 4 + [20]
    assert result.history[-1].loss < result.history[0].loss
    assert result.best.iteration >= 16
    with pytest.raises(ValueError, match="coarse_steps"):
        optimize_latents(make(start=1)[1], x, target_loss(target), progress=False, coarse_steps=5)
