"""ShortcutSampler(cuda_graph=True): what is captured when and copied where, with a stand-in for CUDA's capture."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sdo_models import ConvModel, gradients
from torch import Tensor, nn

from sdo_fast import ShortcutSampler, TrajectoryCache, graphs, invert
from sdo_fast.graphs import CapturedModel

diffusers = pytest.importorskip("diffusers")


def ddim(**config: Any) -> Any:
    return diffusers.DDIMScheduler(**{"clip_sample": False, **config})


class Tape:
    """In the place of a graph: a replay runs the same call again, on the buffers alone, into the same outputs."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def capture(self, run: Callable[[], tuple[Tensor, ...]], device: torch.device) -> Any:
        outputs = tuple(torch.full_like(output, torch.nan) for output in run())
        self.captures += 1

        def replay() -> None:
            assert not torch.is_grad_enabled()
            self.replays += 1
            for output, value in zip(outputs, run(), strict=True):
                output.copy_(value)

        return replay, outputs


def pair(*args: Any, **kwargs: Any) -> tuple[ShortcutSampler, ShortcutSampler, Tape]:
    """A sampler with and one without a graph."""
    eager, tape = ShortcutSampler(*args, **kwargs), Tape()
    graphed = ShortcutSampler(*args, cuda_graph=True, **kwargs)
    graphed._captured = CapturedModel(tape.capture, "cpu")
    return eager, graphed, tape


def assert_same(eager: ShortcutSampler, graphed: ShortcutSampler, x: Tensor, *inputs: Tensor, **call: Any) -> None:
    images = [sampler(x, **call) for sampler in (eager, graphed)]
    assert torch.equal(*images)
    if inputs:
        assert all(map(torch.equal, *(gradients(image, *inputs) for image in images)))


SCHEDULERS = {
    "ddim": ddim,
    "clipping": lambda: ddim(clip_sample=True),
    "unipc": diffusers.UniPCMultistepScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "flow": diffusers.FlowMatchEulerDiscreteScheduler,
}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("guidance", [None, 3.0, "tensor"])
@pytest.mark.parametrize("path", ["first", 2, "identity"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_values_and_gradients_are_those_of_the_eager_loop(name, path, guidance, fused):
    w = torch.tensor(3.0, requires_grad=True) if guidance == "tensor" else guidance
    model = ConvModel()
    eager, graphed, tape = pair(
        model, SCHEDULERS[name](), 4, path=path, guidance_scale=w, fused=fused, inference_mode=True
    )
    x, cond, uncond = (torch.randn(2, *s, requires_grad=True) for s in ((3, 6, 6), (5,), (5,)))
    call = {"model_kwargs": {"cond": cond}, "uncond_kwargs": {"cond": uncond} if guidance else None}
    inputs = [x, *([w] if guidance == "tensor" else []), *([] if path == "identity" else [cond])]
    for _ in range(2):
        assert_same(eager, graphed, x, *inputs, **call)
    assert (tape.captures, tape.replays) == (1, 2 * (len(eager.timesteps) - (path != "identity")))
    assert graphed.model_calls == eager.model_calls
    assert graphed.why_not() == eager.why_not()


def test_new_values_are_copied_and_not_captured():
    model, generator = ConvModel(), torch.Generator().manual_seed(1)
    eager, graphed, tape = pair(model, ddim(), 4, path="random", guidance_scale=2.0)
    for k in range(4):
        x, cond, uncond = torch.randn(2, 3, 6, 6), torch.randn(2, 5), torch.randn(2, 5)
        eager.guidance_scale = graphed.guidance_scale = 2.0 + k
        call = {"model_kwargs": {"cond": cond}, "uncond_kwargs": {"cond": uncond}}
        state = generator.get_state()
        image = eager(x, generator=generator, **call)
        generator.set_state(state)
        assert torch.equal(graphed(x, generator=generator, **call), image)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.1)
    assert tape.captures == 1


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = ConvModel(dropout=0.5)
        self.register_buffer("shift", torch.ones(()))

    def forward(self, x: Tensor, t: Tensor, scales: Any = (1.0,), extra: Any = None, power: float = 1.0) -> Tensor:
        output = self.inner(x, t) * scales[0] + self.shift
        if extra is not None:
            output = output * extra["a"] + extra["b"]
        return output * power


def test_keyword_trees_are_copied_by_name():
    eager, graphed, tape = pair(Nested().eval(), ddim(), 3, path="identity")
    x, (a, b, s) = torch.randn(2, 3, 6, 6), torch.randn(3, 2, 1, 1, 1)
    assert_same(eager, graphed, x, model_kwargs={"scales": (s,), "extra": {"a": a, "b": b}})
    assert_same(eager, graphed, x, model_kwargs={"extra": {"b": a, "a": s}, "scales": (b,)})
    a.add_(1)
    assert_same(eager, graphed, x, model_kwargs={"scales": (s,), "extra": {"a": a, "b": b}})
    assert tape.captures == 1


def change_parameter(model: Nested) -> None:
    model.inner.first.weight = nn.Parameter(2 * model.inner.first.weight.detach())


def change_buffer(model: Nested) -> None:
    model.shift = torch.zeros(())


@pytest.mark.parametrize(
    ("change", "kwargs", "size"),
    [
        (None, {"power": 3.0}, (2, 3, 6, 6)),
        (None, {"scales": [torch.tensor(0.5)]}, (2, 3, 6, 6)),
        (None, {"scales": (torch.tensor(0.5), 1)}, (2, 3, 6, 6)),
        (None, {"scales": (torch.tensor([0.5]),)}, (2, 3, 6, 6)),
        (None, {"scales": (torch.tensor(0.5, dtype=torch.bfloat16),)}, (2, 3, 6, 6)),
        (None, {}, (1, 3, 6, 6)),
        (None, {}, (2, 3, 6, 8)),
        (change_parameter, {}, (2, 3, 6, 6)),
        (change_buffer, {}, (2, 3, 6, 6)),
    ],
)
def test_captures_anew_where_the_call_is_another(change, kwargs, size):
    model = Nested().eval()
    eager, graphed, tape = pair(model, ddim(), 3)
    first = {"scales": (torch.tensor(0.7),)}
    assert_same(eager, graphed, torch.randn(2, 3, 6, 6), model_kwargs=first)
    if change is not None:
        change(model)
    for _ in range(2):
        x = torch.randn(*size, requires_grad=True)
        assert_same(eager, graphed, x, x, model_kwargs={**first, **kwargs})
        assert tape.captures == 2


def test_captures_anew_for_dtype_layout_modes_autocast_and_model():
    model = Nested().eval()
    sampler, tape = pair(model, ddim(), 3)[1:]
    x = torch.randn(2, 3, 6, 6)
    sampler(x)
    sampler(torch.randn(2, 3, 6, 12)[..., ::2])  # a dense tensor's layout is what counts
    assert tape.captures == 1
    sampler(x.to(memory_format=torch.channels_last))
    assert tape.captures == 2
    model.inner.dropout.train()
    sampler(x.to(memory_format=torch.channels_last))
    assert tape.captures == 3
    sampler.model = Nested().eval()
    sampler(x)
    assert tape.captures == 4
    sampler.model.double()
    sampler(x.double())
    assert tape.captures == 5
    torch.set_autocast_enabled("cuda", True)
    try:
        sampler(x.double())
    finally:
        torch.set_autocast_enabled("cuda", False)
    assert tape.captures == 6


def test_a_schedule_is_not_part_of_the_graph():
    """Another start, another number of steps and an inversion use the graph that is there."""
    eager, graphed, tape = pair(ConvModel(), ddim(), 6, start=2)
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(graphed.warm_up(x), eager.warm_up(x))
    assert_same(eager, graphed, x)
    ours, theirs = (invert(sampler, x, 3) for sampler in (graphed, eager))
    assert torch.equal(ours.latents, theirs.latents)
    assert torch.equal(ours.reconstruction, theirs.reconstruction)
    assert tape.captures == 1


@pytest.mark.parametrize("batched", [False, True])
def test_reuse(batched):
    caches = [TrajectoryCache(refresh=0.3, exact_every=3, batched=batched) for _ in range(2)]
    eager = ShortcutSampler(ConvModel(), ddim(), 8, reuse=caches[0])
    graphed, tape = ShortcutSampler(ConvModel(), ddim(), 8, reuse=caches[1], cuda_graph=True), Tape()
    graphed._captured = CapturedModel(tape.capture, "cpu")
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    for _ in range(7):
        assert_same(eager, graphed, x, x)
    assert tape.captures == 1
    assert graphed.model_calls == eager.model_calls


def test_outputs_are_not_the_graphs_memory():
    """A multistep scheduler keeps outputs while later replays overwrite the graph's."""
    _, graphed, _ = pair(ConvModel(), ddim(), 3)
    x = torch.randn(2, 3, 6, 6)
    eps = graphed.guided(x, None, None)
    first = graphed.evaluate(eps, x, torch.tensor(500))[0]
    kept = first.clone()
    graphed.evaluate(eps, 2 * x, torch.tensor(100))
    assert torch.equal(first, kept)


def test_inference_mode_of_the_caller():
    eager, graphed, tape = pair(ConvModel(), ddim(), 3)
    x, cond = torch.randn(2, 3, 6, 6), torch.randn(2, 5)
    with torch.inference_mode():
        assert_same(eager, graphed, x, model_kwargs={"cond": cond + 1})
    assert_same(eager, graphed, x.requires_grad_(), x, model_kwargs={"cond": cond})
    assert tape.captures == 1


def test_a_failed_capture_leaves_nothing_behind():
    _, graphed, tape = pair(ConvModel(), ddim(), 3)
    x = torch.randn(2, 3, 6, 6)
    graphed(x)

    def fail(run: Any, device: torch.device) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    graphed._captured._capture = fail
    with pytest.raises(RuntimeError, match="capturing"):
        graphed(x[:1])
    graphed._captured._capture = tape.capture
    graphed(x)
    assert tape.captures == 2


def test_arguments_do_not_outlive_the_call():
    _, graphed, _ = pair(ConvModel(), ddim(), 3)
    graphed(torch.randn(2, 3, 6, 6))
    assert graphed._captured._bound() is None


def test_refuses_what_is_not_on_a_gpu():
    model, x = ConvModel(), torch.randn(2, 3, 6, 6)
    sampler = ShortcutSampler(model, ddim(), 3, cuda_graph=True)
    for run in (sampler, sampler.warm_up, lambda x: invert(sampler, x, 1)):
        with pytest.raises(ValueError, match="latents must be on a CUDA GPU with cuda_graph, got cpu"):
            run(x)
    assert not model.calls
    assert "sampler_step" in sampler.why_not()
    assert sampler.with_steps(2).cuda_graph
    sampler._captured = CapturedModel(device="meta")
    with pytest.raises(ValueError, match="model_kwargs must be on a CUDA GPU with cuda_graph, got cpu"):
        sampler(x.to("meta"), {"cond": [torch.ones(1)]})


@pytest.mark.parametrize("name", ["ddpm", "ddpm learned", "ddim eta", "euler ancestral"])
def test_refuses_fresh_noise(name):
    scheduler, step_kwargs = {
        "ddpm": (diffusers.DDPMScheduler(), {}),
        "ddpm learned": (diffusers.DDPMScheduler(variance_type="learned_range"), {}),
        "ddim eta": (ddim(), {"eta": 1.0}),
        "euler ancestral": (diffusers.EulerAncestralDiscreteScheduler(), {}),
    }[name]
    with pytest.raises(ValueError, match=r"scheduler must be deterministic for cuda_graph, got .* adds fresh noise"):
        ShortcutSampler(ConvModel(), scheduler, 4, step_kwargs=step_kwargs, cuda_graph=True)


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_capture_warms_up_on_the_stream_it_captures_on(monkeypatch):
    events: list[Any] = []
    streams = [SimpleNamespace(name=n, wait_stream=lambda s, n=n: events.append((n, s.name))) for n in ("side", "main")]
    replaced = {
        "device": nullcontext,
        "Stream": lambda: streams[0],
        "current_stream": lambda: streams[1],
        "stream": lambda stream: nullcontext(events.append(stream.name)),
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph": lambda graph, stream: nullcontext(events.append(("graph", stream.name))),
    }
    for name, value in replaced.items():
        monkeypatch.setattr(torch.cuda, name, value)

    def run() -> str:
        assert not torch.is_autocast_cache_enabled()
        events.append("run")
        return "result"

    _, result = graphs.capture(run, torch.device("cuda"))
    assert result == "result"
    assert torch.is_autocast_cache_enabled()
    order = [("side", "main"), "side", *["run"] * graphs.WARM_UP, ("main", "side"), ("graph", "side"), "run"]
    assert events == order


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize("path", ["first", 3, "identity"])
@pytest.mark.parametrize("name", ["ddim", "clipping", "unipc"])
def test_graph_and_eager_agree_on_a_gpu(name, path, guidance, autocast, dtype):
    model, tolerance = ConvModel().to("cuda", dtype), 1e-4 if dtype == torch.float32 and not autocast else 2e-2
    samplers = [
        ShortcutSampler(model, SCHEDULERS[name](), 6, path=path, guidance_scale=guidance, cuda_graph=graph)
        for graph in (False, True)
    ]
    for _ in range(3):
        x, cond, uncond = (torch.randn(2, *s, device="cuda").to(dtype) for s in ((3, 16, 16), (5,), (5,)))
        x.requires_grad_()
        inputs = [x, *([] if path == "identity" else model.parameters())]
        results = []
        for sampler in samplers:
            with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
                image = sampler(x, {"cond": cond}, {"cond": uncond} if guidance else None)
            results.append((image, *gradients(image, *inputs)))
        for eager, graphed in zip(*results, strict=True):
            assert eager.isfinite().all()
            torch.testing.assert_close(graphed, eager, rtol=tolerance, atol=tolerance * eager.abs().max().item())
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.01)


@pytest.mark.gpu
def test_a_graph_costs_memory_once():
    model = ConvModel().cuda()
    sampler = ShortcutSampler(model, ddim(), 6, cuda_graph=True)
    x = torch.randn(2, 3, 64, 64, device="cuda", requires_grad=True)
    gradients(sampler(x), x)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(5):
        gradients(sampler(x), x)
    assert torch.cuda.memory_allocated() <= before
