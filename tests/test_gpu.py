"""What only a GPU can show: the kernels as compiled, at real sizes, in graphs, on streams, under autocast.

GPU_REHEARSAL=1 runs the same on the CPU, small and interpreted, so that it is known to work before a GPU is there.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TOLERANCE, assert_close, poisoned_memory, randomise, rel_rms
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import swformer_fast as sf
from benchmarks import harness
from benchmarks.gpu import Gpu, Rehearsal
from benchmarks.harness import Options
from benchmarks.inspection.interpret import same_bits
from benchmarks.inspection.launches import LAUNCHES
from swformer_fast import self_test

REHEARSAL = bool(os.environ.get("GPU_REHEARSAL")) and not torch.cuda.is_available()
GPU = Rehearsal() if REHEARSAL else Gpu()
SUITES = sorted(p.stem.removeprefix("bench_") for p in Path(harness.__file__).parent.glob("bench_*.py"))
pytestmark = [] if REHEARSAL else [pytest.mark.gpu]


@pytest.fixture(autouse=True)
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 means fp32 in PyTorch's convolutions too."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def _make(*size: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.randn(size, device=GPU.device).to(dtype).contiguous(memory_format=layout)


def _block(dim: int, train: bool) -> tuple[nn.Module, nn.Module]:
    """The fast block, and the reference with the same weights in fp64."""
    fast, reference = sf.SWFormerBlock(dim), sf.reference.SWFormerBlock(dim)
    reference.load_state_dict(randomise(fast).state_dict())
    return fast.to(GPU.device).train(train), reference.double().to(GPU.device).train(train)


def _size() -> tuple[int, int, int, int]:
    return (1, 8, 16, 18) if REHEARSAL else (2, 40, 130, 128)


@pytest.mark.parametrize("family", LAUNCHES)
def test_launches_repeat_bitwise_and_write_everything(family: str) -> None:
    shape = LAUNCHES[family].interpreted[1] if REHEARSAL else LAUNCHES[family].compiled[0]
    for launch in LAUNCHES[family].launches(_make, shape) if family.startswith("haar") or not REHEARSAL else ():
        if launch.main:
            with poisoned_memory():
                first, second = (launch.launcher(*launch.args) for _ in range(2))
            assert same_bits([t.cpu() for t in tree_leaves(first)], [t.cpu() for t in tree_leaves(second)]), launch.name
            assert all(t.isfinite().all() for t in tree_leaves(first)), launch.name


@pytest.mark.parametrize("suite", SUITES)
def test_suites_pass_their_gate(suite: str) -> None:
    options = Options(quick=True, device=GPU.device, budget=0.01, gpu=GPU, peaks=Rehearsal().peaks())
    for case in importlib.import_module(f"benchmarks.bench_{suite}").cases(options)[: 2 if REHEARSAL else None]:
        rows = harness.measure(case, options)
        assert not harness.failed(rows), [row["status"] for row in rows]
        # A sampler's loop asks its scheduler for numbers, which no graph can hold.
        if suite not in ("reuse", "sdo"):
            assert not [row["status"] for row in rows if "cannot be captured" in row["status"]]


@pytest.mark.parametrize("train", [False, True])
def test_block(train: bool) -> None:
    size = _size()
    fast, reference = _block(size[1], train)
    x, grad = _make(*size), _make(*size)
    leaf, in_fp64 = x.clone().requires_grad_(), x.double().requires_grad_()
    output, expected = fast(leaf), reference(in_fp64)
    assert_close(output, expected, what="output")
    names, parameters = zip(*fast.named_parameters(), strict=True)
    grads = torch.autograd.grad(output, (leaf, *parameters), grad)
    wanted = torch.autograd.grad(expected, (in_fp64, *reference.parameters()), grad.double())
    scale = max(w.norm().item() for w in wanted[1:])
    for name, ours, theirs in zip(("x", *names), grads, wanted, strict=True):
        # A bias before a normalisation has a gradient of rounding errors alone.
        if theirs.norm() > 1e-9 * scale:
            assert rel_rms(ours, theirs) <= 20 * TOLERANCE[torch.float32], name


def test_graph_of_the_block_takes_new_input() -> None:
    size = _size()
    fast, reference = _block(size[1], False)
    x = _make(*size)
    with torch.no_grad():
        replay = GPU.capture(lambda: fast(x))
        x.copy_(_make(*size))
        assert_close(replay(), reference(x.double()))


def test_graph_of_a_training_step() -> None:
    size = _size()
    fast, _ = _block(size[1], True)
    x = _make(*size).requires_grad_()

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(fast(x).square().sum(), (x, *fast.parameters()))

    captured = [t.clone() for t in GPU.capture(step)()]
    assert same_bits([t.cpu() for t in captured], [t.cpu() for t in step()])


@pytest.mark.parametrize("train", [False, True])
def test_graph_of_the_network(train: bool) -> None:
    """derain, evaluation and a training step with the losses of every scale: nothing in them needs the host."""
    size = (1, 3, 16, 18) if REHEARSAL else (2, 3, 64, 70)
    model = randomise(sf.SWFormer.from_preset("tiny" if REHEARSAL else "derain")).to(GPU.device).train(train)
    image = _make(*size)

    def run() -> tuple[Tensor, ...]:
        if train:
            outputs = model(image, all_scales=True)
            return torch.autograd.grad([o.square().sum() for o in outputs], list(model.parameters()))
        with torch.no_grad():
            return (model(image),)

    replay = GPU.capture(run)
    image.copy_(_make(*size))
    captured = [t.clone() for t in replay()]
    assert same_bits([t.cpu() for t in captured], [t.cpu() for t in run()])


@pytest.mark.skipif(REHEARSAL, reason="needs a GPU's products; tests/test_self_test.py rehearses it")
@pytest.mark.parametrize("precision", ["highest", "high"])
def test_products_pass_their_self_test(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In milliseconds once the kernels are compiled; with a warning nothing here would be a test of the kernels."""
    monkeypatch.setattr(self_test, "doubtful", lambda device: True)
    monkeypatch.setattr(self_test, "_verdicts", {})
    torch.set_float32_matmul_precision(precision)
    try:
        for train in (False, True):
            fast, _ = _block(40, train)
            x = _make(2, 40, 64, 64).requires_grad_()
            torch.autograd.grad(fast(x).sum(), x)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert self_test._verdicts
    assert not any(self_test._verdicts.values()), self_test._verdicts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    size = _size()
    fast, reference = _block(size[1], False)
    x = _make(*size)
    with torch.no_grad(), torch.autocast(GPU.device, dtype):
        output = fast(x)
    with torch.no_grad():
        expected = reference(x.double())
    assert rel_rms(output, expected) <= 2 * TOLERANCE[torch.bfloat16]


def test_compiled_block_without_graph_breaks() -> None:
    size = _size()
    fast, reference = _block(size[1], False)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager" if REHEARSAL else "inductor")
    x = _make(*size)
    with torch.no_grad():
        assert_close(compiled(x), reference(x.double()))


@pytest.mark.skipif(REHEARSAL, reason="needs streams")
def test_kernels_run_on_the_current_stream() -> None:
    side = torch.cuda.Stream()
    x, taps = _make(4, 40, 512, 512), torch.tensor([0.6, 0.8], device="cuda")
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        x.mul_(2)
        y = sf.functional.haar_dwt2d(x, taps, taps)
    torch.cuda.current_stream().wait_stream(side)
    assert_close(y, sf.reference.haar_dwt2d(x.double(), taps.double(), taps.double()))


def test_offsets_beyond_32_bits() -> None:
    """The last rows of an image of more than 2**31 elements are what a crop of them gives."""
    height, width = (66, 64) if REHEARSAL else ((1 << 16) + 66, 1 << 15)
    if not REHEARSAL and torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB")
    x = torch.zeros(1, 1, height, width, dtype=torch.bfloat16, device=GPU.device)
    x[..., -32:, :] = torch.randn(32, width, device=GPU.device)
    weight, bias = _make(1, 1, 3, 3), _make(1)
    taps = _make(2)
    with torch.no_grad():
        y = sf.functional.haar_dwt2d(x, taps, taps)
        assert torch.equal(y[..., -16:, :], sf.functional.haar_dwt2d(x[..., -32:, :].contiguous(), taps, taps))
        del y
        z = sf.functional.depthwise_gelu(x, weight, bias)
        crop = sf.functional.depthwise_gelu(x[..., -34:, :].contiguous(), weight, bias)
        assert torch.equal(z[..., -32:, :], crop[..., -32:, :])


@pytest.mark.skipif(REHEARSAL, reason="counts the GPU's memory")
def test_training_step_needs_less_memory_than_the_reference() -> None:
    def peak(model: nn.Module, x: Tensor) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(model(x).sum(), x)
        return torch.cuda.max_memory_allocated() - before

    fast, reference = sf.SWFormerBlock(40).cuda(), sf.reference.SWFormerBlock(40).cuda()
    x: Any = _make(4, 40, 256, 256).requires_grad_()
    for model in (fast, reference):
        peak(model, x)
    assert peak(fast, x) < peak(reference, x)
