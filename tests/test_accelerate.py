"""`accelerate` inside somebody else's model: hooks, sharing, wrappers, parametrisations, optimizers, files."""

from __future__ import annotations

import copy
import gc
import os
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import assert_close, randomise
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import swformer_fast as sf
from swformer_fast import reference
from swformer_fast.replace import FAST_TYPES


class Pipeline(nn.Module):
    """Restores a picture, then classifies it by features of two resolutions. `shared` has two places in it."""

    def __init__(self) -> None:
        super().__init__()
        shared = reference.SWFormerBlock(8)
        self.restore = reference.SWFormer(widths=(4, 8, 8), depths=(1, 1, 1, 1, 1))
        self.features = nn.ModuleDict(
            {
                "fine": nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), shared, nn.GELU()),
                "coarse": nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), shared, reference.MultiScaleFFN(8)),
            }
        )
        self.head = nn.Linear(16, 5)

    def forward(self, image: Tensor, *, scale: float = 1.0) -> Tensor:
        image = self.restore(scale * image)
        return self.head(torch.cat([part(image).mean((2, 3)) for part in self.features.values()], dim=1))


def pipeline() -> Pipeline:
    model = Pipeline()
    return randomise(model)


def fast_types(model: nn.Module) -> set[type]:
    return {type(module) for module in model.modules()} & set(FAST_TYPES.values())


def assert_all_fast(model: nn.Module) -> None:
    types = {type(module) for module in model.modules()}
    assert not types & set(FAST_TYPES)
    assert types & set(FAST_TYPES.values())


def gradients(model: nn.Module, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients by name, of a loss whose gradient differs from channel to channel."""
    model.zero_grad()
    output = model(image)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output).to(output)).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Biases before a normalisation have gradient zero up to rounding, so errors are relative to the typical size."""
    assert actual.keys() == expected.keys()
    typical = sum(g.square().mean().sqrt().item() for g in expected.values()) / len(expected)
    assert typical > 0
    for name, gradient in actual.items():
        error = (gradient.double() - expected[name]).square().mean().sqrt().item()
        assert error <= 2e-5 * max(expected[name].square().mean().sqrt().item(), typical), name


@pytest.mark.parametrize("training", [False, True])
def test_a_larger_model_computes_the_same(training: bool) -> None:
    model = pipeline().train(training)
    expected_model = copy.deepcopy(model).double()
    before = copy.deepcopy(model.state_dict())
    objects = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert sf.accelerate(model) is model
    assert_all_fast(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert objects == {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert model.features["fine"][1] is model.features["coarse"][1]

    image = torch.rand(2, 3, 37, 50)
    output, grads = gradients(model, image)
    expected, expected_grads = gradients(expected_model, image.double())
    assert_close(output, expected)
    assert_same_gradients(grads, expected_grads)
    for (name, a), e in zip(model.named_buffers(), expected_model.buffers(), strict=True):
        assert_close(a, e.to(a.dtype) if not a.is_floating_point() else e, torch.float32, name)
    assert_close(model(image, scale=0.5), expected_model(image.double(), scale=0.5))


def test_tied_parameters_stay_tied() -> None:
    model = nn.Sequential(reference.SWFormerBlock(4), reference.SWFormerBlock(4))
    randomise(model)
    model[1].mixer.spatial.conv.weight = model[0].mixer.spatial.conv.weight
    model[1].beta = model[0].beta
    expected_model = copy.deepcopy(model).double()
    sf.accelerate(model)
    assert model[1].mixer.spatial.conv.weight is model[0].mixer.spatial.conv.weight
    image = torch.randn(2, 4, 16, 16)
    output, grads = gradients(model, image)
    expected, expected_grads = gradients(expected_model, image.double())
    assert_close(output, expected)
    assert_same_gradients(grads, expected_grads)


def test_flags_and_frozen_parts_are_kept() -> None:
    model = pipeline().train()
    model.restore.requires_grad_(False).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    flags = [module.training for module in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]
    expected_model = copy.deepcopy(model).double()
    sf.accelerate(model)
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == needs
    before = {name: value.clone() for name, value in model.named_buffers()}
    image = torch.rand(2, 3, 32, 48)
    output, grads = gradients(model, image)
    expected, expected_grads = gradients(expected_model, image.double())
    assert_close(output, expected)
    assert_same_gradients(grads, expected_grads)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


Record = list[tuple[str, str]]


def hook_everything(model: nn.Module) -> Record:
    """Hooks of every kind on every module; the list fills with (kind, module) as they are called."""
    calls: Record = []

    def note(kind: str, name: str) -> Callable[..., None]:
        return lambda *_: calls.append((kind, name))

    for name, module in model.named_modules():
        module.register_forward_pre_hook(note("before", name))
        module.register_forward_hook(note("after", name))
        module.register_full_backward_pre_hook(note("backward before", name))
        module.register_full_backward_hook(note("backward after", name))
        module.register_state_dict_pre_hook(note("save", name))
        module.register_load_state_dict_post_hook(note("load", name))
    return calls


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_every_hook_is_called_as_before() -> None:
    model = pipeline().train()
    expected_model = copy.deepcopy(model)
    calls, expected_calls = hook_everything(sf.accelerate(model)), hook_everything(expected_model)
    assert_all_fast(model)
    image = torch.rand(2, 3, 32, 48)
    results = [gradients(m, image) for m in (model, expected_model)]
    for m in (model, expected_model):
        m.load_state_dict(m.state_dict())
    assert_close(results[0][0], results[1][0], torch.float32)
    assert_same_gradients(*(grads for _, grads in results))
    forward = [call for call in calls if "backward" not in call[0]]
    assert forward == [call for call in expected_calls if "backward" not in call[0]]
    assert sorted(calls) == sorted(expected_calls)  # the order of backward is autograd's
    assert ("after", "features.fine.1.mixer.fourier") in calls


def test_hooks_made_before_still_change_the_result() -> None:
    model = pipeline().eval()
    names = ("features.fine.1.mixer.conv_in", "features.coarse.2", "restore.stages.2.0.ffn")
    for i, name in enumerate(names):
        model.get_submodule(name).register_forward_hook(lambda m, args, output, i=i: output * (1.5 + i))
        model.get_submodule(name).register_full_backward_hook(
            lambda m, into, out, i=i: tuple((2 + i) * g for g in into)
        )
    plain = copy.deepcopy(model).double()
    changed = [plain.get_submodule(name) for name in names]
    sf.accelerate(model)
    image = torch.rand(2, 3, 32, 48)
    output, grads = gradients(model, image)
    expected, expected_grads = gradients(plain, image.double())
    assert_close(output, expected)
    assert_same_gradients(grads, expected_grads)
    for module in changed:
        module._forward_hooks.clear()
    assert not torch.allclose(plain(image.double()), expected, rtol=1e-3)


def test_modules_of_other_classes_are_left_alone() -> None:
    class Louder(reference.SWFormerBlock):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Network(reference.SWFormer):
        block_type = Louder

    model = Network(widths=(4, 8, 8), depths=(1, 1, 1, 1, 1))
    randomise(model).eval()
    expected_model = copy.deepcopy(model).double()
    sf.accelerate(model)
    assert type(model) is Network
    assert type(model.stages[0][0]) is Louder
    assert type(model.stages[0][0].mixer) is sf.MultiDomainMixer
    image = torch.rand(1, 3, 32, 32)
    assert_close(model(image), expected_model(image.double()))


class Adapter(nn.Module):
    """Somebody's low-rank addition to a convolution, as LoRA puts it in the convolution's place."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv, self.low_rank = conv, nn.Conv2d(conv.in_channels, conv.out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.low_rank(x)


REPLACED = {
    "mixer": lambda mixer: nn.Conv2d(8, 8, 3, padding=1),
    "mixer.conv_in": Adapter,
    "mixer.conv_out": Adapter,
    "mixer.attention": lambda attention: nn.Identity(),
    "mixer.wavelet": lambda branch: nn.Sequential(branch, nn.Tanh()),
    "mixer.fourier": lambda branch: nn.Sequential(branch, nn.Tanh()),
    "norm1": lambda norm: nn.Conv2d(8, 8, 1),
    "norm2": lambda norm: nn.Sequential(norm, nn.Tanh()),
    "ffn": lambda ffn: nn.Conv2d(8, 8, 3, padding=1),
}


@pytest.mark.parametrize("name", REPLACED)
def test_replaced_parts_are_used(name: str) -> None:
    block = randomise(reference.SWFormerBlock(8)).eval()
    parent = block.get_submodule(name.rpartition(".")[0])
    plain = copy.deepcopy(block)
    setattr(parent, name.rpartition(".")[2], REPLACED[name](block.get_submodule(name)))
    expected_block = copy.deepcopy(block).double()
    sf.accelerate(block)
    x = torch.randn(2, 8, 16, 24)
    output, grads = gradients(block, x)
    expected, expected_grads = gradients(expected_block, x.double())
    assert_close(output, expected)
    assert_same_gradients(grads, expected_grads)
    assert not torch.allclose(plain(x), output, rtol=1e-3)


class Standardised(nn.Conv2d):
    """Weight standardisation, by one of the ways to subclass a convolution."""

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean((1, 2, 3), keepdim=True)) / (self.weight.norm() + 1e-3)
        return self._conv_forward(x, weight, self.bias)


def standardised(conv: nn.Conv2d) -> nn.Conv2d:
    conv.__class__ = Standardised
    return conv


def circular(conv: nn.Conv2d) -> nn.Conv2d:
    options = {"padding": conv.padding, "groups": conv.groups, "padding_mode": "circular"}
    return nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, **options)


def dilated(conv: nn.Conv2d) -> nn.Conv2d:
    side = conv.kernel_size[0]
    options = {"padding": 2 * (side // 2), "dilation": 2, "groups": conv.groups}
    return nn.Conv2d(conv.in_channels, conv.out_channels, side, **options)


def hooked(conv: nn.Conv2d) -> nn.Conv2d:
    conv.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    return conv


ADAPTED: dict[str, Callable[[nn.Conv2d], nn.Module]] = {
    "LoRA": Adapter,
    "pruned": lambda conv: prune.random_unstructured(conv, "weight", 0.5),
    "weight norm of old": nn.utils.weight_norm,
    "spectral norm of old": nn.utils.spectral_norm,
    "no bias": lambda conv: nn.Conv2d(
        conv.in_channels, conv.out_channels, conv.kernel_size, 1, conv.padding, 1, conv.groups, False
    ),
    "circular padding": circular,
    "dilated": dilated,
    "subclass": standardised,
    "hooked": hooked,
}
READ = [
    *("mixer.spatial.conv", "mixer.wavelet.conv", "mixer.fourier.conv_in", "mixer.fourier.gate_conv"),
    *("mixer.fourier.conv_out", "mixer.attention.conv1", "mixer.attention.conv2", "mixer.conv_in", "mixer.conv_out"),
    *("ffn.conv_in", "ffn.dw.0", "ffn.dw.2", "ffn.conv_out"),
]


def adapt(block: nn.Module, place: str, adaptation: Callable[[nn.Conv2d], nn.Module]) -> None:
    parent, _, name = place.rpartition(".")
    setattr(block.get_submodule(parent), name, adaptation(block.get_submodule(place)))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("place", "name"),
    [
        *((place, "LoRA") for place in READ),
        *product(("mixer.wavelet.conv", "mixer.fourier.gate_conv", "mixer.conv_in", "ffn.dw.2"), ADAPTED),
    ],
)
def test_layers_that_are_more_than_their_parameters_are_called(place: str, name: str, seed: int) -> None:
    """The second training step too, in the reference and after `accelerate`."""

    def build(adaptation: Callable[[nn.Conv2d], nn.Module]) -> nn.Module:
        torch.manual_seed(seed)
        block = randomise(reference.SWFormerBlock(8))
        adapt(block, place, adaptation)
        return block

    if name in ("circular padding", "dilated") and build(lambda conv: conv).get_submodule(place).kernel_size == (1, 1):
        pytest.skip("nothing else of a kernel of one pixel")
    plain, block, expected_block = build(lambda conv: conv), build(ADAPTED[name]), build(ADAPTED[name]).double()
    fast = sf.accelerate(build(ADAPTED[name]))
    for _ in range(2):
        x = torch.randn(2, 8, 12, 14)
        expected, expected_grads = gradients(expected_block, x.double())
        for module in (block, fast):
            output, grads = gradients(module, x)
            assert_close(output, expected)
            assert_same_gradients(grads, expected_grads)
        # At the start the old weight norm gives the weight that it was given.
        assert name == "weight norm of old" or not torch.allclose(plain(x), output, rtol=1e-3)
        for module in (block, fast, expected_block):
            torch.optim.SGD(module.parameters(), 1e-3).step()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("place", READ)
def test_calling_layers_is_the_same_as_reading_them(place: str, training: bool) -> None:
    block = randomise(reference.SWFormerBlock(8)).train(training)
    called = copy.deepcopy(block)
    called.get_submodule(place).register_forward_hook(lambda module, inputs, output: output)
    x = torch.randn(2, 8, 12, 14)
    for kind in (lambda module: module, sf.accelerate):
        assert_close(kind(called)(x), copy.deepcopy(block).double()(x.double()))
    assert_close(called.state_dict()["mixer.fourier.gate_bn.running_mean"], called.mixer.fourier.gate_bn.running_mean)


@pytest.mark.parametrize("convert", [nn.SyncBatchNorm, nn.GroupNorm])
def test_other_normalisations_are_called(convert: type[nn.Module]) -> None:
    block = randomise(reference.SWFormerBlock(8)).eval()
    for factor in ("gate_bn", "value_bn"):
        norm = nn.SyncBatchNorm(16) if convert is nn.SyncBatchNorm else nn.GroupNorm(4, 16)
        setattr(block.mixer.fourier, factor, norm.eval())
    x, expected = torch.randn(2, 8, 12, 14), copy.deepcopy(block).double()
    assert_close(sf.accelerate(block)(x), expected(x.double()))


@pytest.mark.parametrize("training", [False, True])
def test_sync_batch_norm_with_nothing_to_synchronise_is_batch_norm(training: bool) -> None:
    """The same ops, the same numbers, the same statistics."""
    block = sf.accelerate(randomise(reference.SWFormerBlock(8))).train(training)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert not any(type(module) is nn.BatchNorm2d for module in converted.modules())
    x = torch.randn(2, 8, 12, 14)
    with torch.no_grad():
        assert torch.equal(converted(x), block(x))
        assert sf.why_not(converted, x) == sf.why_not(block, x)
    for name, tensor in block.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name


def test_lora_of_peft_trains_and_merges() -> None:
    peft = pytest.importorskip("peft")
    model = randomise(sf.SWFormer(widths=(8, 8, 8), depths=(1, 1, 1, 1, 1))).eval()
    names = ["conv_in", "conv_out", "gate_conv", "value_conv", "conv1", "conv2"]
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=4, target_modules=names))
    x, target = torch.rand(1, 3, 32, 32), torch.rand(1, 3, 32, 32)
    assert_close(adapted(x), model.double()(x.double()))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], 0.1)
    losses = []
    for _ in range(5):
        loss = (adapted(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for n, p in adapted.named_parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted.eval()
    y = adapted(x)
    merged = adapted.merge_and_unload()
    assert type(merged) is sf.SWFormer
    assert (merged(x) - y).abs().max() < 1e-4


PARAMETRISED = {
    "weight norm": (parametrizations.weight_norm, "mixer.conv_in"),
    "orthogonal": (parametrizations.orthogonal, "mixer.conv_out"),
    "spectral norm": (parametrizations.spectral_norm, "mixer.fourier.gate_conv"),
    "depthwise": (parametrizations.weight_norm, "mixer.wavelet.conv"),
    "pyramid": (parametrizations.weight_norm, "ffn.dw.2"),
    "attention": (parametrizations.weight_norm, "mixer.attention.conv1"),
}


@pytest.mark.parametrize("name", PARAMETRISED)
def test_parametrised_layers_inside_are_handled(name: str) -> None:
    """Their weights are read where they are used; gradients reach the original parameters."""
    register, place = PARAMETRISED[name]
    block = randomise(reference.SWFormerBlock(8))
    register(block.get_submodule(place))
    block.eval()
    expected_block = copy.deepcopy(block).double()
    before = copy.deepcopy(block.state_dict())
    sf.accelerate(block)
    assert type(block) is sf.SWFormerBlock
    assert parametrize.is_parametrized(block.get_submodule(place))
    assert_close(block.state_dict(), before)
    x = torch.randn(2, 8, 16, 24)
    output, grads = gradients(block, x)
    expected, expected_grads = gradients(expected_block, x.double())
    assert_close(output, expected)
    assert_same_gradients(grads, expected_grads)
    assert any("parametrizations" in name for name in grads)


@pytest.mark.parametrize(
    ("place", "parameter"), [("features.fine.1", "beta"), ("restore.stages.2.0.mixer.wavelet", "rec_hi")]
)
def test_parametrised_modules_are_refused_and_nothing_is_changed(place: str, parameter: str) -> None:
    model = pipeline()
    parametrize.register_parametrization(model.get_submodule(place), parameter, nn.Tanh())
    with pytest.raises(ValueError, match=rf"'{place}'.*parametrised parameters: accelerate the model before"):
        sf.accelerate(model)
    assert not fast_types(model)
    accelerated = sf.accelerate(pipeline())
    parametrize.register_parametrization(accelerated.get_submodule(place), parameter, nn.Tanh())
    assert torch.isfinite(accelerated(torch.rand(2, 3, 32, 32))).all()


def test_sharded_modules_are_refused() -> None:
    """As fully_shard leaves them; it asks for a process group."""

    class FSDPModule:
        pass

    model = pipeline()
    block = model.get_submodule("features.fine.1")
    block.__class__ = type("FSDPSWFormerBlock", (FSDPModule, reference.SWFormerBlock), {})
    with pytest.raises(ValueError, match=r"'features\.fine\.1' is sharded: call accelerate before fully_shard"):
        sf.accelerate(model)
    assert not fast_types(model)


def test_compiled_and_traced_modules_are_refused() -> None:
    model = nn.Sequential(reference.SpatialBranch(4), torch.compile(reference.SpatialBranch(4)))
    with pytest.raises(ValueError, match=r"module '1' is compiled.*before torch\.compile"):
        sf.accelerate(model)
    assert not fast_types(model)
    traced = torch.jit.trace(nn.Sequential(reference.SpatialBranch(4)), torch.rand(1, 4, 8, 8), check_trace=False)
    with pytest.raises(ValueError, match=r"'1\.0' is scripted or traced.*before torch\.jit"):
        sf.accelerate(nn.Sequential(reference.SpatialBranch(4), traced))


def test_other_compiled_and_traced_modules_do_not_matter() -> None:
    traced = torch.jit.trace(nn.Conv2d(4, 4, 1), torch.rand(1, 4, 8, 8), check_trace=False)
    compiled = torch.compile(nn.Conv2d(4, 4, 1), backend="eager")
    model = sf.accelerate(nn.Sequential(traced, reference.SpatialBranch(4), compiled))
    assert type(model[1]) is sf.SpatialBranch
    assert model(torch.rand(1, 4, 8, 8)).shape == (1, 4, 8, 8)
    done = torch.compile(model, backend="eager")
    assert sf.accelerate(done) is done


def test_a_model_without_reference_modules_is_returned_as_it_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.ReLU())
    assert sf.accelerate(model) is model
    assert [type(layer) for layer in model] == [nn.Conv2d, nn.ReLU]


def test_accelerated_in_the_middle_of_training() -> None:
    """The optimizer and its state go on as if nothing had happened."""

    def train(model: nn.Module, accelerate_at: int | None) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        generator, losses = torch.Generator().manual_seed(0), []
        for step in range(4):
            if step == accelerate_at:
                sf.accelerate(model)
            loss = model(torch.rand(2, 3, 32, 32, generator=generator)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    model = pipeline().train()
    expected = train(copy.deepcopy(model), None)
    assert train(model, 2) == pytest.approx(expected, rel=1e-3)
    assert_all_fast(model)
    assert len(set(expected)) == 4


@pytest.mark.parametrize("when", ["before", "after"])
def test_in_data_parallel(when: str) -> None:
    model = pipeline().eval()
    expected_model = copy.deepcopy(model).double()
    if when == "before":
        sf.accelerate(model)
    wrapped = DataParallel(model)
    assert sf.accelerate(wrapped) is wrapped
    assert_all_fast(wrapped.module)
    image = torch.rand(2, 3, 32, 32)
    assert_close(wrapped(image), expected_model(image.double()))


def distributed_gradients(rank: int, world: int, folder: str, errors: list[str] | None = None) -> None:
    """One of `world` gloo processes: the same gradients before and after `accelerate`, wrapped before or after."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        compare_gradients(rank, world)  # what is wrapped goes before the group: gloo's threads may wait for it
    finally:
        gc.collect()
        dist.destroy_process_group()


def compare_gradients(rank: int, world: int) -> None:
    torch.manual_seed(0)
    model = pipeline().train()
    image = torch.rand(world, 2, 3, 32, 32)[rank]
    wrapped = [
        DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True),
        DistributedDataParallel(sf.accelerate(copy.deepcopy(model)), find_unused_parameters=True),
    ]
    expected_output, expected = gradients(wrapped[0], image)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    wrapped[0].module.load_state_dict(model.state_dict())
    wrapped[0] = sf.accelerate(wrapped[0])
    for ddp in wrapped:
        assert_all_fast(ddp)
        output, grads = gradients(ddp, image)
        assert_close(output, expected_output)
        assert_same_gradients(grads, expected)
    total = torch.stack([gradient.norm() for gradient in grads.values()])
    everywhere = [torch.empty_like(total) for _ in range(world)]
    dist.all_gather(everywhere, total)
    assert all(torch.equal(each, total) for each in everywhere), "the processes have different gradients"


needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch is built without gloo"
)


@needs_gloo
def test_in_distributed_data_parallel(tmp_path: Path) -> None:
    distributed_gradients(0, 1, str(tmp_path))


@needs_gloo
@pytest.mark.slow
def test_in_two_processes(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(distributed_gradients, (2, str(tmp_path)), nprocs=2)


def test_copies_averages_and_pickles(tmp_path: Path) -> None:
    model = sf.accelerate(pipeline().eval())
    image = torch.rand(1, 3, 32, 32)
    expected = model(image)
    averaged = AveragedModel(model)
    averaged.update_parameters(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    for other in (copy.deepcopy(model), averaged.module, loaded):
        assert_all_fast(other)
        assert torch.equal(other.eval()(image), expected)


def test_under_activation_checkpointing() -> None:
    model = sf.accelerate(randomise(reference.SWFormerBlock(8)).eval())
    x = torch.randn(2, 8, 16, 24, requires_grad=True)
    (plain,) = torch.autograd.grad(model(x).square().sum(), x)
    (recomputed,) = torch.autograd.grad(checkpoint(model, x, use_reentrant=False).square().sum(), x)
    assert torch.equal(plain, recomputed)


def test_compiles_in_a_larger_model() -> None:
    model = sf.accelerate(pipeline().eval())
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert_close(torch.compile(model, backend="eager", fullgraph=True)(image), model(image), torch.float32)


@pytest.mark.parametrize("exit", sf.EXITS)
def test_weights_load_both_ways_from_files(exit: str, tmp_path: Path) -> None:
    plain, fast = (network.from_preset("tiny", exit=exit).eval() for network in (reference.SWFormer, sf.SWFormer))
    image = torch.rand(1, 3, 32, 48)
    for source, target in ((plain, fast), (fast, plain)):
        for tensor in source.parameters():
            tensor.data.add_(torch.randn_like(tensor), alpha=0.05)
        torch.save(randomise(source).state_dict(), tmp_path / "weights.pt")
        target.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True), strict=True)
        assert all(
            torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
        )
        with torch.no_grad():
            assert_close(fast(image), copy.deepcopy(plain).double()(image.double()))
