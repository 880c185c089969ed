"""ShortcutSampler inside training code: parameters, adapters, scaling, compilation, sharding, memory."""

from __future__ import annotations

import copy
import os
import socket

import pytest
import torch
from sdo_models import ConvModel, gradients, tiny_unet
from torch import nn

from benchmarks.harness import peak_bytes, saved_bytes
from sdo_fast import NonFiniteLossError, ShortcutSampler, TrajectoryCache, optimize_latents
from sdo_fast.reference import full_backprop, path_loop

diffusers = pytest.importorskip("diffusers")


def ddim(**config):
    return diffusers.DDIMScheduler(**{"clip_sample": False, "prediction_type": "v_prediction", **config})


def tiny_transformer():
    """A Stable Diffusion 3 transformer and its conditions."""
    torch.manual_seed(0)
    network = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=12, out_channels=4,
    ).eval()  # fmt: skip
    return network, {"encoder_hidden_states": torch.randn(1, 3, 16), "pooled_projections": torch.randn(1, 12)}


def reward(image):
    return (image - 0.5).pow(2).mean()


def tune(sampler, model, x, steps):
    """The loss of each step, and whether its image was exact."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses, exact = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = reward(sampler(x))
        losses.append(loss.item())
        exact.append(sampler.reuse is None or sampler.reuse.exact)
        loss.backward()
        optimizer.step()
    return losses, exact


@pytest.mark.parametrize("path", ["first", "last", "random"])
def test_parameter_tuning_descends(path):
    torch.manual_seed(0)
    model, x = ConvModel(scale=0.15), torch.randn(4, 3, 6, 6)
    losses, _ = tune(ShortcutSampler(model, ddim(), 6, path=path), model, x, 30)
    assert losses[-1] < 0.7 * losses[0]


def test_parameter_tuning_with_reuse_and_fixed_latents():
    torch.manual_seed(0)
    model, x = ConvModel(scale=0.15), torch.randn(4, 3, 6, 6)
    cache = TrajectoryCache(refresh=0.2, exact_every=5, cache="eps")
    losses, exact = tune(ShortcutSampler(model, ddim(), 10, reuse=cache), model, x, 31)
    exact_losses = [loss for loss, is_exact in zip(losses, exact, strict=True) if is_exact]
    assert len(exact_losses) == 7
    assert exact_losses[-1] < 0.7 * exact_losses[0]


def test_lora_adapters():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    unet = tiny_unet()
    peft.inject_adapter_in_model(config, unet)
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora" in name for name in trained)
    x, labels = torch.randn(2, 1, 8, 8), {"class_labels": torch.tensor([1, 2])}
    ours = ShortcutSampler(unet, ddim(), 5, fused=False)(x, labels)
    theirs = path_loop(unet, ddim(), x, 5, model_kwargs=labels)
    reward(ours).backward()
    mine = {name: p.grad.clone() for name, p in trained.items()}
    unet.zero_grad()
    reward(theirs).backward()
    assert all(torch.equal(mine[name], p.grad) for name, p in trained.items())
    assert sum(gradient.abs().sum() for gradient in mine.values()) > 0
    assert all(p.grad is None for name, p in unet.named_parameters() if name not in trained)


def test_peft_model_around_a_transformer_that_takes_its_timestep_by_name():
    peft = pytest.importorskip("peft")
    network, cond = tiny_transformer()
    model = peft.get_peft_model(network, peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    x = torch.randn(1, 4, 8, 8)
    reward(ShortcutSampler(model, diffusers.FlowMatchEulerDiscreteScheduler(), 3)(x, cond)).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_adapters_added_by_diffusers():
    peft = pytest.importorskip("peft")
    network, cond = tiny_transformer()
    network.requires_grad_(False)
    network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    reward(
        ShortcutSampler(network, diffusers.FlowMatchEulerDiscreteScheduler(), 3, path="last")(
            torch.randn(1, 4, 8, 8), cond
        )
    ).backward()
    assert {p.grad is not None for name, p in network.named_parameters() if "lora" in name} == {True}
    assert {p.grad is None for name, p in network.named_parameters() if "lora" not in name} == {True}


@pytest.mark.parametrize("inference_mode", [False, True])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("path", ["first", "last"])
def test_autocast_does_not_lose_parameter_gradients(path, checkpoint, inference_mode):
    """Autocast keeps cast weights; those of the calls without gradients must not serve the one with them."""
    model, x = ConvModel(scale=0.15), torch.randn(2, 3, 6, 6)
    grads = []
    for autocast in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            sampler = ShortcutSampler(model, ddim(), 4, path=path, checkpoint=checkpoint, inference_mode=inference_mode)
            loss = reward(sampler(x))
        loss.backward()
        grads.append([p.grad.clone() for p in [*model.first.parameters(), *model.second.parameters()]])
    for exact, mixed in zip(*grads, strict=True):
        assert (exact - mixed).norm() < 0.1 * exact.norm()
        assert not torch.equal(exact, mixed)


def test_grad_scaler():
    model, x = ConvModel(scale=0.15), torch.randn(2, 3, 6, 6)
    sampler = ShortcutSampler(model, ddim(), 4)
    reward(sampler(x)).backward()
    exact = [p.grad.clone() for p in model.second.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.float16):
        loss = reward(sampler(x))
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for p, gradient in zip(model.second.parameters(), exact, strict=True):
        assert (p.grad - gradient).norm() < 0.02 * gradient.norm()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(before["second.weight"], model.second.weight)


def compiled_equals_eager(backend):
    torch._dynamo.reset()
    model = ConvModel(scale=0.15)
    model.calls = None
    plain = lambda x, t, cond=None: model.second(torch.tanh(model.first(x) + t[:, None, None, None] / 1000))  # noqa: E731
    compiled = torch.compile(plain, backend=backend, fullgraph=True)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    inputs = (x, *model.first.parameters())
    for checkpoint in (False, True):
        for path in ("first", "last"):
            theirs = path_loop(plain, ddim(), x, 4, path=path)
            ours = ShortcutSampler(compiled, ddim(), 4, path=path, checkpoint=checkpoint)(x)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
            for a, b in zip(gradients(ours, *inputs), gradients(theirs, *inputs), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_compiled_model():
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        compiled_equals_eager("aot_eager")


@pytest.mark.slow
def test_model_compiled_by_inductor():
    compiled_equals_eager("inductor")


def test_compiled_transformer_that_takes_its_timestep_by_name():
    torch._dynamo.reset()
    network, cond = tiny_transformer()
    compiled = torch.compile(network, backend="eager")
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    ours, theirs = (ShortcutSampler(m, scheduler, 3)(x, cond) for m in (compiled, network))
    torch.testing.assert_close(gradients(ours, x), gradients(theirs, x), rtol=1e-4, atol=1e-4)


def test_conditions_made_under_inference_mode():
    """What diffusers' encoders return under torch.inference_mode cannot be saved for backward as it is."""
    model, sampled = ConvModel(), ShortcutSampler(ConvModel(), ddim(), 3)
    with torch.inference_mode():
        x, cond = torch.randn(2, 3, 6, 6), torch.randn(2, 5)
        plain = sampled(x, {"cond": cond})
    image = ShortcutSampler(model, ddim(), 3)(x, {"cond": cond})
    assert torch.equal(image, plain)
    reward(image).backward()
    assert model.condition.weight.grad.abs().sum() > 0
    result = optimize_latents(sampled, x, reward, steps=2, progress=False, model_kwargs={"cond": cond})
    assert len(result.history) == 3
    with torch.inference_mode():  # in which what is optimised has its gradients all the same
        within = optimize_latents(sampled, x, reward, steps=2, progress=False, model_kwargs={"cond": cond})
    assert torch.equal(within.latents, result.latents)
    assert not torch.equal(within.latents, x)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e4], ids=["vanishing", "plain", "overflowing"])
def test_float16_keeps_small_gradients_and_large_ones(factor):
    """Against float64, one step of SGD; the loss's own float16 takes the scale as well."""
    torch.manual_seed(0)
    z = torch.randn(2, 3, 8, 8).half()
    model, reference = ConvModel().half(), ConvModel().double()
    weight = torch.randn(z.shape)

    def updated(network, latents, loss):
        sampler = ShortcutSampler(network, diffusers.FlowMatchEulerDiscreteScheduler(), 3)
        sgd = lambda tensors: torch.optim.SGD(tensors, lr=1e-2 / factor)  # noqa: E731
        done = optimize_latents(sampler, latents, loss, steps=1, optimizer=sgd, progress=False)
        return done.latents.double() - latents.double(), done

    wanted, _ = updated(reference, z.double(), lambda image: factor * (image * weight).sum())
    for whole in (torch.Tensor.float, torch.Tensor.half) if factor == 1 else (torch.Tensor.float,):
        ours, done = updated(model, z, lambda image, whole=whole: factor * (whole(image) * whole(weight)).sum())
        assert (ours - wanted).norm() < 0.02 * wanted.norm()
        assert [record.iteration for record in done.history] == [0, 1]
    with pytest.raises(NonFiniteLossError, match="finite gradient, got one of nan at iteration 0"):
        optimize_latents(lambda latents: latents, z, lambda image: (image - image).square().sum().sqrt(), steps=1)


def peak(function):
    def run():
        image = function()
        if image.requires_grad:
            image.sum().backward()

    return peak_bytes(run)[0]


@pytest.mark.parametrize("scheduler", [ddim(), diffusers.DPMSolverMultistepScheduler()], ids=["ddim", "dpm++"])
def test_memory_does_not_grow_with_the_number_of_steps(scheduler):
    unet, x = tiny_unet(), torch.randn(1, 1, 16, 16, requires_grad=True)
    labels = {"class_labels": torch.tensor([3])}

    def sample(n, **kwargs):
        sampler = ShortcutSampler(unet, scheduler, n, **kwargs)
        return lambda: sampler(x, labels)

    def full(n):
        return lambda: full_backprop(unet, scheduler, x, n, model_kwargs=labels)

    few, many = (saved_bytes(sample(n, checkpoint=False)) for n in (3, 12))
    one_call = saved_bytes(lambda: unet(x, torch.tensor([1]), **labels).sample)
    assert many <= 1.02 * few
    assert few <= 1.1 * one_call
    assert saved_bytes(full(12)) > 8 * many
    assert saved_bytes(sample(12)) < 0.05 * many, "the checkpoint keeps its inputs only"

    with torch.no_grad():
        plain = peak(sample(8))
    assert peak(sample(8, path="identity")) <= 1.1 * plain
    assert peak(sample(8)) <= 1.1 * peak(sample(3))
    assert peak(full(8)) > 3 * peak(sample(8))


def worker(rank, port, failures):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        generator = torch.Generator().manual_seed(0)
        x, cond = torch.randn(2, 3, 6, 6, generator=generator), torch.randn(2, 5, generator=generator)
        mine = slice(rank, rank + 1)
        mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
        for path in ("first", 2):
            single = ConvModel(scale=0.15)
            reward(path_loop(single, ddim(), x, 4, path=path, model_kwargs={"cond": cond})).backward()
            for kind in ("ddp", "fsdp2"):
                for checkpoint in (False, True):
                    model = ConvModel(scale=0.15)
                    wrapped = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
                    if kind == "fsdp2":
                        fully_shard(model.first, mesh=mesh)
                        fully_shard(model, mesh=mesh)
                    sampler = ShortcutSampler(wrapped, ddim(), 4, path=path, checkpoint=checkpoint)
                    for _ in range(2):
                        wrapped.zero_grad()
                        reward(sampler(x[mine], {"cond": cond[mine]})).backward()
                    for (name, p), q in zip(model.named_parameters(), single.parameters(), strict=True):
                        grad = p.grad.full_tensor() if kind == "fsdp2" else p.grad
                        if not torch.allclose(grad, q.grad, rtol=1e-4, atol=1e-6):
                            failures.put(f"{kind} {path} checkpoint={checkpoint} {name}")
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_and_sharded_models():
    """Two gloo processes with one sample each give the gradient of one process with both."""
    if not torch.distributed.is_available():
        pytest.skip("torch.distributed is not built in")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    failures = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(worker, (port, failures), nprocs=2)
    assert failures.empty(), failures.get()
