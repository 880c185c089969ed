"""swformer_block: when a block is one op, and nothing in it is stale. What every op keeps is in test_contract.py."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from contract import KERNELS, device_of
from helpers import assert_close, perturb
from torch import Tensor, nn

import swformer_fast as sf
from swformer_fast import fusion, reference
from swformer_fast.parameters import BlockParameters, MixerParameters, flatten


def blocks(dim: int = 6) -> tuple[nn.Module, nn.Module]:
    """A fast block, in evaluation, and its reference in fp64."""
    fast = sf.SWFormerBlock(dim, scale_init=0.5).eval()
    perturb(fast)
    slow = reference.SWFormerBlock(dim).double().eval()
    slow.load_state_dict(fast.state_dict())
    return fast, slow


def ops_of(run: Callable[[], object]) -> set[str]:
    with torch.profiler.profile() as profile:
        run()
    names = {event.key for event in profile.key_averages()}
    return {name for name in names if name.startswith("swformer_fast::")}


def test_one_op_without_gradients() -> None:
    fast, slow = blocks()
    x = torch.randn(2, 6, 17, 22)
    with torch.no_grad():
        assert ops_of(lambda: fast(x)) == {"swformer_fast::swformer_block"}
        assert_close(fast(x), slow(x.double()))
    assert "swformer_fast::swformer_block" not in ops_of(lambda: fast(x))
    assert_close(fast(x), slow(x.double()))


@pytest.mark.parametrize("backend", KERNELS)
def test_a_size_seen_before(backend: str) -> None:
    """Launches are prepared once for each size: other numbers, layouts, widths and sizes are seen all the same."""
    slow = [reference.SWFormerBlock(4, scale_init=0.5, **options) for options in ({}, {"ffn_ratio": 6})]
    for block in slow:
        perturb(block.double().eval())
    bundles = [bundle(block, sf.MultiDomainMixer.arguments(block.mixer)[0]) for block in slow]  # type: ignore[arg-type]
    device = device_of(backend)

    def same(x: Tensor, parameters: BlockParameters, layout: Callable[[Tensor], Tensor], *eps: float) -> None:
        tensors = [layout(t.detach().float().to(device)) for t in flatten(parameters) if t is not None]
        with torch.no_grad(), sf.use_backend(backend):
            y = torch.ops.swformer_fast.swformer_block(x.to(device), *tensors, *eps)
            assert_close(y, reference.swformer_block(x.double(), parameters, *eps).to(device))

    def expanded(t: Tensor) -> Tensor:
        return t.repeat(2, *[1] * t.dim()).mT.contiguous().mT[0] if t.dim() > 1 else t.repeat_interleave(2)[::2]

    x = torch.randn(2, 4, 8, 12)
    same(x, bundles[0], Tensor.clone, 1e-5, 1e-5, 1e-5)
    same(x, bundles[0], Tensor.clone, 1e-1, 1e-2, 1e-3)
    same(x, bundles[0], expanded, 1e-5, 1e-5, 1e-5)
    same(x, bundles[1], Tensor.clone, 1e-5, 1e-5, 1e-5)
    same(x[:1, :, 1:], bundles[0], Tensor.clone, 1e-5, 1e-5, 1e-5)
    same(x.mT, bundles[0], Tensor.clone, 1e-5, 1e-5, 1e-5)


def test_function_is_the_module() -> None:
    _, slow = blocks()
    mixer, _, _, eps = sf.MultiDomainMixer.arguments(slow.mixer)  # type: ignore[arg-type]
    parameters = bundle(slow, mixer)
    x = torch.randn(2, 6, 9, 14, dtype=torch.float64)
    assert_close(reference.swformer_block(x, parameters, 1e-5, 1e-5, eps), slow(x), torch.float64)


def bundle(block: nn.Module, mixer: MixerParameters) -> BlockParameters:
    (ffn,) = block.ffn.arguments()
    norms = [reference.common.norm_parameters(norm) for norm in (block.norm1, block.norm2)]
    return BlockParameters(norms[0], mixer, block.beta, norms[1], ffn, block.gamma)


def change_data(block: nn.Module) -> None:
    for parameter in block.parameters():
        parameter.data.mul_(1.1)  # as averages of weights are written; no version counter sees it


def change_in_place(block: nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*block.parameters(), *block.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.1)


def load(block: nn.Module) -> None:
    state = {k: v * 1.1 if v.is_floating_point() else v for k, v in block.state_dict().items()}
    block.load_state_dict(state)


def assign(block: nn.Module) -> None:
    state = {k: v * 1.1 if v.is_floating_point() else v for k, v in block.state_dict().items()}
    block.load_state_dict(state, assign=True)


def step(block: nn.Module) -> None:
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    block(torch.ones(1, 6, 8, 8)).square().mean().backward()
    optimizer.step()


def train(block: nn.Module) -> None:
    """Running statistics move."""
    block.train()(torch.randn(2, 6, 8, 8))
    block.eval()


@pytest.mark.parametrize("change", [change_data, change_in_place, load, assign, step, train])
def test_nothing_is_stale_after_a_change(change: Callable[[nn.Module], None]) -> None:
    fast, slow = blocks()
    x = torch.randn(1, 6, 10, 12)
    with torch.no_grad():
        before = fast(x)
    change(fast)
    slow.load_state_dict(fast.state_dict())
    with torch.no_grad():
        after = fast(x)
        assert not torch.allclose(after, before)
        assert_close(after, slow(x.double()))


@pytest.mark.parametrize("part", ["norm1", "norm2", "gate_bn"])
def test_statistics_of_the_batch_in_one_part(part: str) -> None:
    """Frozen in part, or without running statistics: such a block is not one op, and right."""
    for freeze in (False, True):
        fast, slow = blocks()
        for block in (fast, slow):
            owner = block.mixer.fourier if part == "gate_bn" else block
            parts = [owner.gate_bn, owner.value_bn] if part == "gate_bn" else [getattr(owner, part)]
            for norm in parts:
                if freeze:
                    norm.train()
                else:
                    norm.running_mean = norm.running_var = None
        x = torch.randn(2, 6, 10, 12)
        with torch.no_grad():
            assert_close(fast(x), slow(x.double()))


def test_norms_without_a_weight() -> None:
    fast, slow = blocks()
    for block in (fast, slow):
        block.norm1 = nn.BatchNorm2d(6, affine=False).eval().to(block.beta.dtype)
    x = torch.randn(2, 6, 10, 12)
    with torch.no_grad():
        assert_close(fast(x), slow(x.double()))
    assert_close(fast(x), slow(x.double()))


def test_large_kernels_are_not_one_op() -> None:
    fast = sf.SWFormerBlock(4, spatial_kernel=5, scale_init=0.5).eval()
    perturb(fast)
    slow = copy.deepcopy(fast).double()
    x = torch.randn(1, 4, 12, 13)
    with torch.no_grad():
        assert "swformer_fast::swformer_block" not in ops_of(lambda: fast(x))
        assert_close(fast(x), slow(x.double()))


def test_errors_before_kernels() -> None:
    fast, _ = blocks()
    x = torch.randn(1, 6, 8, 8)
    with torch.no_grad():
        fast(x)
        for name, make in (
            ("mixer.conv_out.bias", lambda t: torch.zeros(7)),
            ("ffn.conv_in.weight", lambda t: t[:, :5]),
            ("norm1.running_var", lambda t: torch.ones(5)),
            ("beta", lambda t: torch.ones(6)),
        ):
            owner, attribute = name.rpartition(".")[::2]
            broken = copy.deepcopy(fast)
            module = broken.get_submodule(owner)
            value = make(getattr(module, attribute))
            if attribute in module._parameters:
                module._parameters[attribute] = nn.Parameter(value)
            else:
                module._buffers[attribute] = value
            with pytest.raises(ValueError, match=r"must have shape"):
                broken(x)
        with pytest.raises(TypeError, match="dtype"):
            fusion.block(x, bundle(fast.double(), fast.mixer.arguments()[0]), 1e-5, 1e-5, 1e-5)
