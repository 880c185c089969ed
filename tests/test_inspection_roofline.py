"""The ledger of launches and bytes, the estimates made from it, and how many launches each op costs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("triton", reason="triton is not installed")

import swformer_fast as sf
from benchmarks import records
from benchmarks.inspection import roofline
from benchmarks.inspection.roofline import DEVICES, LAUNCH_SECONDS, Entry, Ledger
from swformer_fast import fusion

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts what the interpreter does")


def ledger_of(run: Callable[[], Any]) -> list[Entry]:
    ledger = Ledger(1)
    with ledger.recording():
        run()
    return ledger.entries


def _recorded(run: Callable[[], Any]) -> dict[str, Entry]:
    return {entry.name.removeprefix("aten::"): entry for entry in ledger_of(run)}


def test_operators_and_their_bytes() -> None:
    x, weight = torch.randn(2, 3, 8, 8), torch.randn(5, 3, 1, 1)
    entries = _recorded(lambda: F.conv2d(x, weight).view(2, -1).relu_().add(x.new_zeros(1)))
    assert set(entries) == {"convolution", "relu_", "new_zeros", "add"}
    assert all(e.launches == 1 and not e.ours for e in entries.values())
    assert entries["convolution"].bytes == x.nbytes + weight.nbytes + 2 * 5 * 64 * 4
    assert entries["convolution"].matrix_flops == 2 * 2 * 64 * 5 * 3
    assert entries["relu_"].bytes == 2 * 2 * 5 * 64 * 4


def test_a_list_in_place_is_one_launch() -> None:
    a, b = [torch.randn(4), torch.randn(2)], [torch.randn(4), torch.randn(2)]
    entries = _recorded(lambda: torch._foreach_add_(a, b))
    assert [(e.launches, e.bytes) for e in entries.values()] == [(1, 3 * 6 * 4)]


def test_views_cost_nothing() -> None:
    x = torch.randn(4, 4)
    assert not _recorded(lambda: x.view(2, 8)[0].unsqueeze(0).expand(3, 8).t().detach())


@pytest.mark.parametrize(("norm", "scales"), [("ortho", 1), ("backward", 0)])
def test_transforms_pass_over_memory_once_a_dimension(norm: str, scales: int) -> None:
    x = torch.randn(2, 3, 8, 8)
    forward = _recorded(lambda: torch.fft.rfft2(x, norm=norm))["_fft_r2c"]
    half = 2 * 3 * 8 * 5 * 8
    assert forward.launches == 2 + scales
    assert forward.bytes == x.nbytes + half + 2 * half + scales * 2 * half
    z = torch.randn(2, 3, 8, 5, dtype=torch.complex64)
    inverse = _recorded(lambda: torch.fft.irfft2(z, norm="ortho" if scales else "forward"))["_fft_c2r"]
    assert inverse.launches == 3 + scales
    assert inverse.bytes == x.nbytes + half + 2 * half + 2 * half + scales * 2 * x.nbytes


def test_training_passes_over_memory_more_often() -> None:
    x, norm = torch.randn(2, 3, 8, 8, requires_grad=True), nn.BatchNorm2d(3)
    train = _recorded(lambda: torch.autograd.grad(norm(x).square().sum(), x))
    evaluate = _recorded(lambda: norm.eval()(x))
    assert train["native_batch_norm"].launches == train["native_batch_norm_backward"].launches == 2
    assert evaluate["native_batch_norm"].launches == 1
    assert train["native_batch_norm"].bytes > evaluate["native_batch_norm"].bytes


def test_an_estimate_is_the_longest_of_its_bounds() -> None:
    device = DEVICES[0]
    assert Entry("a", 1, device.memory, 0).seconds(device, False) == 1
    assert Entry("a", 1, 0, 2 * device.cache).seconds(device, False) == 2
    assert Entry("a", 1, device.memory, 0, flops=3 * device.fp32).seconds(device, False) == 3
    assert Entry("a", 1, 0, 0, matrix_flops=device.tf32).seconds(device, True) == 1
    assert Entry("a", 5, 1, 1).seconds(device, False) == 5 * LAUNCH_SECONDS


LAUNCHES = {
    "haar_dwt2d forward": 1,
    "haar_dwt2d forward+backward": 3,
    "haar_idwt2d forward": 1,
    "haar_idwt2d forward+backward": 3,
    "wavelet_mix forward": 1,
    "wavelet_mix forward+backward": 4,
    "depthwise_gelu forward": 1,
    "depthwise_gelu forward+backward": 3,
    "fourier_mix forward": 7,
    "fourier_mix forward+backward": 26,
    "multiscale_ffn forward": 3,
    "multiscale_ffn forward+backward": 13,
    "channel_attention forward": 3,
    "channel_attention forward+backward": 7,
    "sampler_step": 1,
    "shortcut_backward": 1,
    "block eval": 16,
    "block training step": 87,
    "block eval bf16": 16,
    "block training step bf16": 94,  # PyTorch's transforms know no bf16: 5 casts; the running statistics' are 2
}
"""Most launches of an op and of a block, those of PyTorch's own operators included."""


@pytest.mark.parametrize("name", LAUNCHES)
def test_launches(name: str) -> None:
    case = next(case for case in roofline.cases(quick=True) if case.name == name)
    theirs, ours = roofline.measure(case, 1, {})
    assert 0 < ours["our_kernels"] <= ours["launches"] <= LAUNCHES[name] < theirs["launches"]
    assert theirs["our_kernels"] == 0
    assert ours["bytes"] < theirs["bytes"]
    for device in DEVICES:
        assert 0 < ours[f"us {device.name} fp32"] < theirs[f"us {device.name} fp32"]


def test_launches_of_a_network() -> None:
    network, image = sf.SWFormer.from_preset("derain", exit="small").eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        entries = ledger_of(lambda: network(image))
    assert sum(e.launches for e in entries) <= 427


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("shape", [(1, 40, 16, 16), (2, 16, 48, 48)])
def test_fused_before_op_by_op_before_the_reference(shape: tuple[int, ...], train: bool) -> None:
    """Launches, bytes and estimates of a block: so there is one plan, whatever the size."""

    def totals(package: Any, fused: bool) -> dict[str, Any]:
        block = package.SWFormerBlock(shape[1]).train(train)
        run = roofline.module_run(block, torch.randn(shape), train)
        with pytest.MonkeyPatch.context() as patch:
            if not fused:
                patch.setattr(fusion, "foldable", lambda x: False)
            return roofline._total(ledger_of(run))

    plans = [totals(sf, True), totals(sf, False), totals(sf.reference, True)]
    for name in ("launches", "bytes", *(f"us {device.name} fp32" for device in DEVICES)):
        values = [plan[name] for plan in plans]
        assert values == sorted(values), name


def test_counted_launches_are_not_interpreted_again() -> None:
    case = next(case for case in roofline.cases(quick=True) if case.name == "haar_dwt2d forward")
    counted: dict[Any, Any] = {}
    first = roofline.measure(case, 2, counted)
    assert len(counted) == 1
    counted[next(iter(counted))].program_loaded += 1e6
    assert roofline.measure(case, 2, counted)[1]["cache_bytes"] == first[1]["cache_bytes"] + 1e6


def test_command_writes_record_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [case for case in roofline.cases(quick=True) if case.name.startswith(("haar_dwt2d", "sampler"))]
    monkeypatch.setattr(roofline, "cases", lambda quick: chosen)
    assert roofline.main(["--quick", "--sample", "1", "--out", str(tmp_path)]) == 0
    assert [r["variant"] for r in records.load(tmp_path)["roofline"]] == ["PyTorch", "ours"] * 3
    text = (tmp_path / "roofline.md").read_text()
    assert "ESTIMATES, no measurements" in text
    assert all(device.name in text for device in DEVICES)
    assert "ESTIMATES, no measurements" in capsys.readouterr().out
