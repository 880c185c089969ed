"""Races, bounds and single writes of every Triton kernel, checked in the interpreter, and what the checks catch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.inspection.interpret import KernelError, checked, compulsory, count_traffic, same_bits
from benchmarks.inspection.launches import LAUNCHES, Launch, random

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")
stream = pytest.importorskip("swformer_kernels._stream")

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="checks what the interpreter does")


def _launches(family: str, quick: bool, which: int) -> Iterator[Launch]:
    """Those of the small shapes: quick the main ones in fp32, else the rest. The interpreter knows no tf32."""
    for launch in LAUNCHES[family].launches(random, LAUNCHES[family].interpreted[which]):
        first = next(a for a in launch.args if isinstance(a, Tensor))
        if (launch.main and first.dtype == torch.float32 and "tf32" not in launch.name) == quick:
            yield launch


def _check_order(launch: Launch) -> None:
    with checked("random"), count_traffic() as traffic:
        shuffled = launch.launcher(*launch.args)
    with checked("alone"):
        alone = launch.launcher(*launch.args)
    assert any(tensor.count_nonzero() for tensor in tree_leaves(shuffled)), launch.name
    assert same_bits(shuffled, alone), launch.name
    assert max(kernel.programs for kernel in traffic.kernels) > 1, launch.name


def _check_traffic(family: str, launch: Launch) -> None:
    with count_traffic() as traffic:
        outputs = launch.launcher(*launch.args)
    assert traffic.stored == traffic.distinct_stored > 0, launch.name
    limit = LAUNCHES[family].traffic
    if limit is not None:
        loads, stores = compulsory(launch.args, outputs)
        # The gradient by x alone of what is linear in x reads no x.
        assert launch.name.endswith(" x") or traffic.distinct_loaded >= loads, launch.name
        assert traffic.stored >= stores, launch.name
        assert traffic.total <= limit * (loads + stores), (launch.name, traffic)


@pytest.fixture
def short_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small image has several."""
    monkeypatch.setattr(stream, "_STRIP_ROWS", (4,))


@pytest.mark.usefixtures("short_strips")
@pytest.mark.parametrize("family", LAUNCHES)
def test_order_and_bounds(family: str) -> None:
    for launch in _launches(family, True, 1):
        _check_order(launch)


@pytest.mark.slow
@pytest.mark.usefixtures("short_strips")
@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("family", LAUNCHES)
def test_order_and_bounds_of_all_launches(family: str, quick: bool) -> None:
    for launch in _launches(family, quick, 0 if quick else 1):
        _check_order(launch)


@pytest.mark.parametrize("family", LAUNCHES)
def test_traffic(family: str) -> None:
    for launch in _launches(family, True, 0):
        _check_traffic(family, launch)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("family", LAUNCHES)
def test_traffic_of_all_launches(family: str, which: int) -> None:
    for quick in (False, True)[: 1 + which]:
        for launch in _launches(family, quick, which):
            _check_traffic(family, launch)


# what the checks catch ------------------------------------------------------------------------------------------------

BLOCK = 16


@triton.jit
def copy_kernel(x, y, count, FIRST: tl.constexpr, LAST: tl.constexpr, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """y = x, broken by how far the mask reaches and where it reads."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + place + SHIFT, mask=(place + SHIFT < count + LAST) & (place + SHIFT >= FIRST))
    tl.store(y + place, value, mask=place < count)


@triton.jit
def overwriting_kernel(x, y, count, BEYOND: tl.constexpr, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """y = x, broken by a mask that reaches too far, or by programs too close together or too far apart."""
    place = tl.program_id(0) * STEP + tl.arange(0, BLOCK)
    value = tl.load(x + place, mask=place < count, other=0.0)
    tl.store(y + place, value, mask=place < count + BEYOND)


@triton.jit
def running_kernel(x, y, count, BLOCK: tl.constexpr):
    """Reads what the program before has written: right only where they run in order, one after the other."""
    program = tl.program_id(0)
    before = tl.load(y + program * BLOCK - 1, mask=program > 0, other=0.0)
    place = program * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + place, tl.load(x + place, mask=place < count) + before, mask=place < count)


def _run(kernel: Any, x: Tensor, **constants: int) -> Tensor:
    y = torch.zeros(len(x))
    kernel[(triton.cdiv(len(x), BLOCK),)](x, y, len(x), BLOCK=BLOCK, **constants)
    return y


COPY = {"FIRST": 0, "LAST": 0, "SHIFT": 0}
OVERWRITE = {"BEYOND": 0, "STEP": BLOCK}


@pytest.mark.parametrize("order", ["forward", "random", "alone"])
def test_right_kernels_pass(order: str) -> None:
    x = torch.randn(41)
    with checked(order):
        assert torch.equal(_run(copy_kernel, x, **COPY), x)
        assert torch.equal(_run(overwriting_kernel, x, **OVERWRITE), x)


@pytest.mark.parametrize(
    ("kernel", "constants", "message"),
    [
        (copy_kernel, COPY | {"LAST": 1, "SHIFT": 1}, "load out of bounds of x: 1 elements"),
        (copy_kernel, COPY | {"FIRST": -2, "SHIFT": -2}, "load out of bounds of x: 2 elements"),
        (copy_kernel, COPY | {"SHIFT": 1 << 20, "LAST": 1 << 30}, "load far outside every tensor"),
        (overwriting_kernel, OVERWRITE | {"BEYOND": 3}, "store out of bounds of y: 3 elements"),
        (overwriting_kernel, OVERWRITE | {"STEP": BLOCK - 1}, "of y, 0 elements are not written and 2 more than once"),
        (overwriting_kernel, OVERWRITE | {"STEP": BLOCK + 2}, "of y, 4 elements are not written and 0 more than once"),
    ],
)
def test_broken_kernel_is_caught(kernel: Any, constants: dict[str, int], message: str) -> None:
    with pytest.raises(KernelError, match=message), checked():
        _run(kernel, torch.randn(41), **constants)


def test_gaps_of_a_strided_tensor_are_out_of_bounds() -> None:
    x, y = torch.randn(82)[::2], torch.zeros(41)
    with pytest.raises(KernelError, match="load out of bounds of x"), checked():
        copy_kernel[(3,)](x, y, 41, BLOCK=BLOCK, **COPY)


def test_unmasked_poison_reaches_the_result() -> None:
    """Memory beside a tensor is NaN, so that reading it cannot go unseen where the check of addresses is off."""
    from benchmarks.inspection.interpret import GUARD, _Memory

    memory = _Memory(torch.zeros(3), "x")
    guarded = memory.guarded.view(torch.float32)
    assert guarded[: GUARD // 4].isnan().all()
    assert guarded[GUARD // 4 + 3 :].isnan().all()


@pytest.mark.parametrize("other", ["random", "alone"])
def test_race_is_caught(other: str) -> None:
    x = torch.randn(50)
    with checked():
        forward = _run(running_kernel, x)
    with checked(other, seed=1):
        changed = _run(running_kernel, x)
    assert not same_bits(forward, changed)


def test_order_is_checked() -> None:
    with pytest.raises(ValueError, match="order must be"), checked("backward"):
        pass


def test_sampled_traffic_is_scaled() -> None:
    x = torch.randn(1 << 11)
    with count_traffic() as unsampled:
        _run(copy_kernel, x, **COPY)
    with count_traffic(sample=4) as sampled:
        _run(copy_kernel, x, **COPY)
    (all_programs,), (some,) = unsampled.kernels, sampled.kernels
    assert (all_programs.programs, all_programs.counted) == (1 << 7, 1 << 7)
    assert (some.programs, some.counted) == (1 << 7, 4)
    assert all_programs.loaded == some.loaded == some.program_loaded == x.nbytes
    assert all_programs.distinct_stored == x.nbytes


def test_arithmetic_is_counted() -> None:
    @triton.jit
    def kernel(x, y, BLOCK: tl.constexpr):
        row = tl.arange(0, BLOCK)
        a = tl.load(x + row[:, None] * BLOCK + row[None, :])
        product = tl.dot(a, a) * 2.0 + tl.exp(a)
        tl.store(y + row, tl.sum(product, 1))

    x = torch.randn(BLOCK, BLOCK)
    with count_traffic() as traffic:
        y = torch.empty(BLOCK)
        kernel[(1,)](x, y, BLOCK=BLOCK)
    (counted,) = traffic.kernels
    assert (counted.dot, counted.special) == (2 * BLOCK**3, BLOCK**2)
    assert counted.simple == 3 * BLOCK**2
