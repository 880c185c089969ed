"""No forward and no training step copies from the host, reads from the device or waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="triton is not installed")

import swformer_fast as sf
from benchmarks.inspection import host
from benchmarks.inspection.arguments import ARGUMENTS
from benchmarks.inspection.launching import HostWork, NoHostWork
from benchmarks.op_cases import moved
from swformer_fast import backend

SHAPE = (2, 8, 30, 34)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_functions(name: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x, *arguments = moved(tuple(ARGUMENTS[name](SHAPE)), "meta")
    x = x.detach().to(dtype).contiguous(memory_format=layout).requires_grad_()
    with NoHostWork() as spy:
        y = getattr(sf.functional, name)(x, *arguments)
        torch.autograd.grad(y, x, torch.empty_like(y))
    assert spy.kernels


@pytest.mark.parametrize("backend_name", ["auto", "reference"])
def test_default_filters_are_made_on_the_device(backend_name: str) -> None:
    x = torch.empty(1, 4, 6, 8, device="meta")
    with NoHostWork(), sf.use_backend(backend_name):
        sf.functional.haar_idwt2d(sf.functional.haar_dwt2d(x))
        sf.reference.haar_idwt2d(sf.reference.haar_dwt2d(x))


def _step(model: nn.Module, image: Tensor, train: bool, dtype: torch.dtype | None) -> None:
    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
        if train:
            outputs = model(image, all_scales=True) if isinstance(model, sf.reference.SWFormer) else (model(image),)
            torch.autograd.grad([o.sum() for o in outputs], list(model.parameters()), allow_unused=True)
        else:
            with torch.no_grad():
                model(image)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("kind", ["block", "derain", "tiny"])
def test_models(kind: str, fast: bool, train: bool) -> None:
    package = sf if fast else sf.reference
    with torch.device("meta"):
        model = package.SWFormerBlock(40) if kind == "block" else package.SWFormer.from_preset(kind)
        image = torch.empty(2, 40 if kind == "block" else 3, 33, 50)
    with NoHostWork() as spy:
        _step(model.train(train), image, train, None)
    assert bool(spy.kernels) == fast


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("options", [{"exit": "small"}, {"pyramid": "pixel_unshuffle", "fusion": "concat"}])
def test_options(options: dict[str, Any], train: bool) -> None:
    with torch.device("meta"):
        model, image = sf.SWFormer.from_preset("tiny", **options), torch.empty(1, 3, 48, 48)
    with NoHostWork():
        _step(model.train(train), image, train, None)


def test_every_op_with_a_triton_kernel_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that an op that somebody adds is looked at too."""
    called: set[str] = set()
    run = backend.run
    monkeypatch.setattr(backend, "run", lambda op, args: (called.add(op.name), run(op, args))[1])
    for name in ARGUMENTS:
        test_functions(name, torch.float32, torch.contiguous_format)
    for train in (False, True):
        test_models("block", True, train)
    assert called >= {name for name, op in backend.OPS.items() if backend._has_kernels(op.triton)}


@pytest.mark.parametrize(
    ("case", "most"), [("block eval", 310), ("block training step", 2900), ("derain, small eval", 8100)]
)
def test_calls_of_python_functions(case: str, most: int) -> None:
    """At batch 1 a GPU waits for the host: its time, in a unit that is the same on every machine."""
    assert 0 < host.measure(case, 1)[2] <= most


def _made_from_numbers(x: Tensor) -> Tensor:
    return x * torch.tensor([1.0, 2.0], device=x.device)


def _made_on_the_host(x: Tensor) -> Tensor:
    return x + torch.ones(())


def _read(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_made_from_numbers, "from numbers of the host"),
        (_made_on_the_host, "on the host, of shape"),
        (_read, "waits for the device|is_nonzero"),
        (lambda x: x + x.new_tensor([0.0]), "from numbers of the host"),
        (lambda x: x.cpu(), "no data"),
        (lambda x: x.nonzero(), "waits for the device"),
    ],
)
def test_host_work_is_seen(function: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises((HostWork, RuntimeError), match=message), NoHostWork():
        function(torch.empty(2, device="meta"))
