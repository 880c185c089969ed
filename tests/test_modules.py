"""The fast modules and the network equal the reference's, with the same weights and state_dict keys."""

import copy
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, assert_close, fp64, num_threads, perturb, value_and_grads
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import swformer_fast as sf
from swformer_fast import reference

MODULES = {
    "HaarDWT2d": ((), (2, 6, 17, 24)),
    "HaarIDWT2d": ((), (2, 8, 9, 12)),
    "SpatialBranch": ((6,), (2, 6, 17, 24)),
    "WaveletBranch": ((6,), (2, 6, 17, 24)),
    "FourierBranch": ((6,), (2, 6, 17, 24)),
    "ChannelAttention": ((12,), (2, 12, 17, 24)),
    "MultiDomainMixer": ((8,), (2, 8, 17, 24)),
    "MultiScaleFFN": ((6,), (2, 6, 17, 24)),
    "SWFormerBlock": ((8,), (2, 8, 17, 24)),
}


def pair(name: str, *arguments: object) -> tuple[nn.Module, nn.Module]:
    """A fast module and the reference's in fp64, with the same weights."""
    expected = getattr(reference, name)(*arguments)
    perturb(expected)
    actual = getattr(sf, name)(*arguments)
    assert list(actual.state_dict()) == list(expected.state_dict())
    actual.load_state_dict(expected.state_dict())
    return actual, expected.double()


def assert_gradients_close(
    labels: list[str], actual: Sequence[Tensor | None], expected: Sequence[Tensor | None]
) -> None:
    """To 5e-6 of each gradient, or of a hundredth of the largest: some are zero up to rounding.

    That of a bias before a normalisation by batch statistics, for instance.
    """
    scale = max(g.norm().item() / g.numel() ** 0.5 for g in expected if g is not None)
    for label, a, e in zip(labels, actual, expected, strict=True):
        if a is None or e is None:
            assert a is e, label
            continue
        error = (a.double() - e).norm().item() / e.numel() ** 0.5
        size = e.norm().item() / e.numel() ** 0.5
        assert error <= 5e-6 * max(size, 1e-2 * scale), label


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_module_equals_reference(name: str, training: bool) -> None:
    arguments, shape = MODULES[name]
    actual, expected = (module.train(training) for module in pair(name, *arguments))
    x = torch.randn(shape, requires_grad=True)
    output = value_and_grads(lambda x, *_: actual(x), (x, *actual.parameters()))
    target = value_and_grads(lambda x, *_: expected(x), (fp64(x), *expected.parameters()))
    assert_close(output[0], target[0], torch.float32)
    assert_gradients_close(["x", *dict(actual.named_parameters())], output[1], target[1])
    for (label, a), (_, e) in zip(actual.named_buffers(), expected.named_buffers(), strict=True):
        assert_close(a, e.to(a.dtype) if not a.is_floating_point() else e, torch.float32, label)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("package", [sf, reference], ids=["fast", "reference"])
@pytest.mark.parametrize("name", [name for name in MODULES if hasattr(getattr(reference, name), "arguments")])
def test_arguments_only_read(name: str, package: Any, training: bool) -> None:
    module = getattr(package, name)(*MODULES[name][0]).train(training)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    first, second = module.arguments(), module.arguments()
    assert all(torch.equal(tensor, before[key]) for key, tensor in module.state_dict().items())
    assert all(a is b for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True) if isinstance(a, Tensor))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("package", [sf, reference], ids=["fast", "reference"])
def test_forward_counts_a_batch_once(package: Any, momentum: float | None) -> None:
    branch, norm = package.FourierBranch(6, momentum=momentum), nn.BatchNorm2d(12, momentum=momentum)
    assert branch.arguments()[2] == (momentum or 0.0)  # nothing is counted yet
    for training in (True, True, False, True):
        branch.train(training)
        norm.train(training)
        branch(torch.randn(2, 6, 5, 8))
        norm(torch.randn(2, 12, 5, 5))
        counts = [bn.num_batches_tracked for bn in (branch.gate_bn, branch.value_bn)]
        assert counts == [norm.num_batches_tracked] * 2
    assert branch.arguments()[1:3] == (True, 0.1 if momentum else 1 / 3)
    branch.eval().arguments()
    assert branch.gate_bn.num_batches_tracked == 3


@pytest.mark.parametrize("name", ["MultiDomainMixer", "SWFormerBlock"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_fused_forward_counts_a_batch_once(name: str, momentum: float | None) -> None:
    actual, expected = pair(name, 8)
    norms = [[m for m in module.modules() if isinstance(m, nn.BatchNorm2d)] for module in (actual, expected)]
    for norm in (*norms[0], *norms[1]):
        norm.momentum = momentum
    for training in (True, False, True):
        x = torch.randn(2, 8, 16, 24)
        actual.train(training)(x)
        expected.train(training)(x.double())
        counts = [[norm.num_batches_tracked for norm in of_one] for of_one in norms]
        assert counts[0] == counts[1]
    assert counts[0] == [2] * len(norms[0])
    for mine, theirs in zip(*norms, strict=True):
        assert_close((mine.running_mean, mine.running_var), (theirs.running_mean, theirs.running_var), torch.float32)


@pytest.mark.parametrize("options", [{"exits": sf.EXITS}, {"all_scales": True}])
@pytest.mark.parametrize("size", [(64, 64), (50, 70)])
def test_derain_equals_reference(size: tuple[int, int], options: dict[str, Any]) -> None:
    expected = reference.SWFormer.from_preset("derain").eval()
    perturb(expected)
    actual = sf.SWFormer.from_preset("derain").eval()
    actual.load_state_dict(expected.state_dict())
    image = torch.rand(1, 3, *size)
    with torch.no_grad():
        assert_close(actual(image, **options), expected.double()(image.double(), **options), torch.float32)


def networks(**options: Any) -> tuple[nn.Module, nn.Module]:
    """A small fast network and its reference in fp64, with the same random parameters."""
    options = {"widths": (8, 16, 32), "depths": (1, 1, 1, 1, 1), **options}
    actual, expected = sf.SWFormer(**options), reference.SWFormer(**options).double()
    perturb(actual)
    expected.load_state_dict(actual.state_dict())
    return actual, expected


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(32, 48), (17, 30), (33, 50)])
@pytest.mark.parametrize("exit", sf.EXITS)
def test_every_exit_equals_reference(exit: str, size: tuple[int, int], training: bool) -> None:
    """Output and the gradients of the image and of all parameters."""
    image = torch.rand(2, 3, *size)
    grad = torch.randn_like(image)
    outputs, grads = [], []
    for model, x in zip(networks(), (image, image.double()), strict=True):
        x = x.requires_grad_()
        outputs.append(model.train(training)(x, exit=exit))
        inputs = [x, *model.parameters()]
        grads.append(torch.autograd.grad(outputs[-1], inputs, grad.to(x.dtype), allow_unused=True))
    assert_close(*outputs)
    assert_gradients_close(["image", *dict(model.named_parameters())], *grads)


CALLS: list[dict[str, Any]] = [*({"exit": exit} for exit in sf.EXITS), {"exits": sf.EXITS}, {"all_scales": True}]


@torch.no_grad()
@pytest.mark.parametrize("options", CALLS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_exits_keep_dtype_and_layout(dtype: torch.dtype, options: dict[str, Any]) -> None:
    actual, expected = (model.eval() for model in networks())
    actual.to(dtype)
    expected.load_state_dict(actual.state_dict())
    image = torch.rand(2, 3, 33, 50).to(dtype)
    outputs = tree_leaves(actual(image, **options))
    assert {y.dtype for y in outputs} == {dtype}
    assert_close(outputs, tree_leaves(expected(image.double(), **options)))
    others = tree_leaves(actual(image.contiguous(memory_format=torch.channels_last), **options))
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in others)
    assert_close(others, tree_leaves(expected(image.double(), **options)))


@pytest.mark.parametrize("options", CALLS, ids=str)
def test_exits_under_autocast(options: dict[str, Any]) -> None:
    """The dtypes of the reference, and errors like its own."""
    actual, expected = (model.eval() for model in networks())
    image = torch.rand(2, 3, 33, 50)
    like = copy.deepcopy(expected).float()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        ours, theirs = (tree_leaves(model(image, **options)) for model in (actual, like))
    exact = tree_leaves(expected(image.double(), **options))
    for a, t, e in zip(ours, theirs, exact, strict=True):
        assert a.dtype == t.dtype
        assert (a - e).norm() <= 2 * (t - e).norm()


@pytest.mark.parametrize("options", CALLS, ids=str)
def test_exits_of_an_empty_batch(options: dict[str, Any]) -> None:
    models = networks()
    outputs = [tree_leaves(m(torch.rand(0, 3, 33, 50, dtype=next(m.parameters()).dtype), **options)) for m in models]
    assert [y.shape for y in outputs[0]] == [y.shape for y in outputs[1]]
    torch.stack([y.sum() for y in outputs[0]]).sum().backward()
    assert not any(p.grad.any() for p in models[0].parameters() if p.grad is not None)


@pytest.mark.parametrize("last", ["small", "medium"])
def test_a_smaller_network_is_a_part_of_the_larger_one(last: str) -> None:
    large, _ = networks()
    small, _ = networks(exit=last)
    state = large.state_dict()
    small.load_state_dict({name: state[name] for name in small.state_dict()})
    image = torch.rand(2, 3, 17, 30)
    for training in (False, True):
        assert torch.equal(small.train(training)(image), large.train(training)(image, exit=last))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["compile", "export", "trace"])
@pytest.mark.parametrize("exit", sf.EXITS)
def test_an_exit_is_captured(how: str, exit: str) -> None:
    class Fixed(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Any:
            return self.model(x, exit=exit)

    model, image = Fixed(networks()[0]).eval(), torch.rand(1, 3, 20, 33)
    with torch.no_grad():
        expected = model(image)
        if how == "compile":
            captured: Any = torch.compile(model.model, backend="aot_eager", fullgraph=True)
            assert_close(captured(image, exit=exit), expected)
            return
        captured = (
            torch.export.export(model, (image,)).module() if how == "export" else torch.jit.trace(model, (image,))
        )
        assert_close(captured(image), expected)


@pytest.mark.parametrize("name", sf.PRESETS)
def test_every_preset_is_made_of_fast_modules(name: str) -> None:
    with torch.device("meta"):
        model = sf.SWFormer.from_preset(name)
    ours = {type(m) for m in model.modules()} & {getattr(reference, n) for n in MODULES}
    assert not ours


@pytest.mark.parametrize(
    "name", ["", "norm1", "norm2", "mixer", "mixer.conv_in", "mixer.attention", "mixer.wavelet", "ffn"]
)
def test_fused_block_still_calls_hooks(name: str) -> None:
    actual, expected = pair("SWFormerBlock", 8)
    calls: list[int] = []
    actual.eval().get_submodule(name).register_forward_hook(lambda module, args, output: calls.append(1) or output * 2)
    expected.eval().get_submodule(name).register_forward_hook(lambda module, args, output: output * 2)
    x = torch.randn(2, 8, 16, 24)
    assert_close(actual(x), expected(x.double()), torch.float32)
    assert len(calls) == 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_block_layouts_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    actual, expected = pair("SWFormerBlock", 8)
    x = LAYOUTS[layout](torch.randn(2, 8, 16, 24, dtype=dtype))
    output = actual.eval().to(dtype)(x)
    assert_close(output, expected.eval()(x.double()), torch.float32)


def test_block_on_the_meta_device() -> None:
    block = sf.SWFormerBlock(8).to("meta")
    assert block(torch.randn(1, 8, 20, 24, device="meta")).shape == (1, 8, 20, 24)


def results(model: nn.Module, x: Tensor, record: bool) -> list[Tensor]:
    """Output and, recorded, all gradients."""
    x = x.detach().requires_grad_(record)
    with torch.set_grad_enabled(record):
        y = model(x)
        weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
        tensors = [x, *(p for name, p in model.named_parameters() if not name.startswith(("heads.0", "heads.1")))]
        return [y, *(torch.autograd.grad((y * weights).sum(), tensors) if record else ())]


def results_and_ops(model: nn.Module, x: Tensor, record: bool) -> tuple[list[Tensor], set[str]]:
    """And the ops that were called."""
    with torch.profiler.profile() as profile:
        tensors = results(model, x, record)
    names = {event.key.removeprefix("swformer_fast::") for event in profile.key_averages()}
    return tensors, names & {"swformer_block", "fold_attention", "channel_attention"}


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "channels"), [("SWFormerBlock", 8), ("tiny", 3)])
@pytest.mark.parametrize("model_format", [torch.contiguous_format, torch.channels_last])
def test_channels_last_runs_the_fused_block(
    model_format: torch.memory_format, name: str, channels: int, training: bool, record: bool
) -> None:
    """Of the input, and of the model too, as people call `model.to(memory_format=torch.channels_last)`."""

    def make(package: Any) -> nn.Module:
        return package.SWFormerBlock(8) if name == "SWFormerBlock" else package.SWFormer.from_preset(name)

    fast, slow = make(sf), make(reference).double()
    perturb(fast)
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(2, channels, 24, 32)
    actual, ops = results_and_ops(
        fast.train(training).to(memory_format=model_format), x.contiguous(memory_format=torch.channels_last), record
    )
    expected = results(slow.train(training), x.double(), record)
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    assert ops == {"fold_attention" if record or training else "swformer_block"}
    assert_close(actual[0], expected[0])
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert (a - e).norm() <= 1e-4 * e.norm() + 1e-4


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "channels"), [("SWFormerBlock", 8), ("tiny", 3)])
def test_autocast_runs_the_fused_block(name: str, channels: int, dtype: torch.dtype, record: bool) -> None:
    """On a CPU without products of bf16 in fp32; the network's 3x3 convolutions are autocast's as ever."""
    fast = sf.SWFormerBlock(8) if name == "SWFormerBlock" else sf.SWFormer.from_preset(name)
    perturb(fast)
    slow = getattr(reference, "SWFormerBlock" if name == "SWFormerBlock" else "SWFormer")
    slow = slow(8) if name == "SWFormerBlock" else slow.from_preset(name)
    slow.load_state_dict(fast.state_dict())
    x = torch.randn(2, channels, 24, 32).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        actual, ops = results_and_ops(fast.eval(), x, record)
        likes = results(slow.eval(), x, record)
    expected = results(slow.double(), x.double(), record)
    assert ops == {"fold_attention" if record else "swformer_block"}
    assert [a.dtype for a in actual] == [like.dtype for like in likes]
    if name == "SWFormerBlock" and dtype == torch.float32 and not sf.backend.multiplies_bf16():
        for a, e in zip(actual, expected, strict=True):
            assert (a - e).norm() <= 1e-5 * e.norm() + 1e-5
        return

    def error(tensors: list[Tensor]) -> float:
        return sum(
            (t - e).square().sum().item() / e.square().sum().item() for t, e in zip(tensors, expected, strict=True)
        )

    if sf.backend.multiplies_bf16():  # then the residual is of bf16 too
        assert error(actual) < 4 * error(likes) + 1e-4
    else:
        assert error(actual) < error(likes)


class Wrapper(nn.Module):
    """Somebody's model: a shared reference block, a hook, and a subclass that overrides its parent."""

    class Custom(reference.SpatialBranch):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    def __init__(self) -> None:
        super().__init__()
        self.first = reference.SWFormerBlock(8)
        self.second = self.first
        self.custom = self.Custom(8)
        self.tail = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.custom(self.second(self.first(x))))


def test_accelerate_swaps_classes_and_keeps_everything_else() -> None:
    model = Wrapper()
    perturb(model)
    model.train()
    calls = []
    model.first.mixer.wavelet.register_forward_hook(lambda *_: calls.append(1))
    parameters = list(model.parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, 8, 16, 16)
    expected = model.eval()(x)
    calls.clear()
    model.train()

    assert sf.accelerate(model) is model
    assert type(model.first) is sf.SWFormerBlock
    assert model.first is model.second
    assert type(model.first.mixer.fourier) is sf.FourierBranch
    assert type(model.custom) is Wrapper.Custom
    assert model.training
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert_close(model.eval()(x), expected.double(), torch.float32)
    assert len(calls) == 2
    assert sf.accelerate(model) is model


def test_accelerate_refuses_what_it_cannot_keep() -> None:
    with pytest.raises(TypeError, match=r"must be an nn\.Module, got dict"):
        sf.accelerate({})
    block = reference.SWFormerBlock(4)
    nn.utils.parametrize.register_parametrization(block.mixer.wavelet, "dec_lo", nn.Identity())
    with pytest.raises(ValueError, match=r"wavelet.*parametrised"):
        sf.accelerate(block)
    with pytest.raises(ValueError, match=r"before torch\.compile"):
        sf.accelerate(torch.compile(reference.SWFormerBlock(4)))


def test_accelerated_weights_load_into_the_reference() -> None:
    model = sf.accelerate(reference.SWFormer.from_preset("tiny"))
    reference.SWFormer.from_preset("tiny").load_state_dict(model.state_dict())


@pytest.mark.parametrize("last", sf.EXITS)
@torch.no_grad()
def test_accelerate_keeps_the_exits(last: str) -> None:
    model, image = reference.SWFormer.from_preset("tiny", exit=last).eval(), torch.rand(1, 3, 17, 30)
    perturb(model)
    exits = sf.EXITS[: 1 + sf.EXITS.index(last)]
    expected = copy.deepcopy(model).double()(image.double(), exits=exits)
    assert sf.accelerate(model).exit == last
    assert not {type(m) for m in model.modules()} & {getattr(reference, name) for name in MODULES}
    assert_close(model(image, exits=exits), expected)
    assert torch.equal(model(image), model(image, exit=last))


@pytest.mark.parametrize("first", ["swformer_fast", "torch.utils.flop_counter"])
def test_flops_of_a_network(first: str) -> None:
    """Whichever is imported first. The fused block takes fewer: two 1x1 convolutions in a row are one."""
    code = (
        f"import {first}, torch, swformer_fast as sf\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "counts = []\n"
        "for kind in (sf, sf.reference):\n"
        "    with torch.device('meta'):\n"
        "        model = kind.SWFormer.from_preset('derain', exit='small').eval()\n"
        "        with FlopCounterMode(display=False) as counter, torch.no_grad():\n"
        "            model(torch.empty(1, 3, 64, 64))\n"
        "    counts.append(counter.get_total_flops())\n"
        "print(counts[0] / counts[1])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.85 < float(run.stdout) <= 1


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("grad", [True, False])
def test_jit_trace(grad: bool) -> None:
    """Traced with gradients or without, for other sizes, and used with them."""
    block, x = sf.SWFormerBlock(4, scale_init=0.5).eval(), torch.randn(1, 4, 12, 13)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(block, (torch.randn(2, 4, 8, 9),))
    expected, actual = block(x), traced(x)
    torch.testing.assert_close(actual, expected)
    grads = [torch.autograd.grad(y.square().sum(), list(block.parameters())) for y in (actual, expected)]
    assert_close(*grads)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("width", [16, 40, 48])
def test_a_block_gives_the_same_bits_for_every_number_of_threads(width: int, training: bool) -> None:
    """Output, with and without gradients, gradients and running statistics, at widths of the presets, in every run."""
    block, x = sf.SWFormerBlock(width, scale_init=0.5), torch.randn(2, width, 16, 18)
    state = copy.deepcopy(block.state_dict())

    def run() -> list[Tensor]:
        block.load_state_dict(state)
        y = block.train(training)(x)
        with torch.no_grad():
            without = block(x)
        return [
            y,
            without,
            *torch.autograd.grad(y.square().sum(), list(block.parameters())),
            *(b.clone() for b in block.buffers()),
        ]

    expected = run()
    for threads in (1, 2, 3, 4, 8):
        with num_threads(threads):
            pairs = zip(run(), expected, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
