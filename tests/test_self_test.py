"""The test of matrix products before their first use, interpreted: right ones pass, wrong ones are refused."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_close
from torch import Tensor

import swformer_fast as sf
from swformer_fast import backend, self_test
from swformer_fast.parameters import FfnParameters, FourierParameters, unflatten

pytest.importorskip("triton", reason="triton is not installed")

DIM = 5
Arguments = tuple[Any, ...]


def _pointwise() -> Arguments:
    maps = (torch.randn(3, DIM, 6, 7) for _ in range(2))
    return *maps, None, torch.randn(3, 4, 2 * DIM), torch.randn(4), torch.randn(3, 4, 6, 7)


def _fourier(batch_statistics: bool) -> Arguments:
    parts = 2 * DIM
    statistics = (None, None) if batch_statistics else (torch.randn(parts), torch.rand(parts) + 0.5)
    factor = (*statistics, torch.rand(parts), torch.randn(parts), torch.randn(parts, parts, 1, 1), torch.randn(parts))
    first = (torch.randn(2, DIM, 6, 7), torch.randn(parts, DIM, 1, 1), torch.randn(parts))
    return *first, *factor, *factor, torch.randn(4, DIM, 1, 1), torch.randn(4), 1e-5, True


def _ffn() -> Arguments:
    depthwise = (t for _ in range(3) for t in (torch.randn(DIM, 1, 3, 3), torch.randn(DIM)))
    first = (torch.randn(1, DIM, 9, 8), torch.randn(3 * DIM, DIM, 1, 1), torch.randn(3 * DIM))
    return *first, *depthwise, torch.randn(DIM, 3 * DIM, 1, 1), torch.randn(DIM), None


FORWARD: dict[str, Callable[[], Arguments]] = {
    "pointwise": _pointwise,
    "fourier_mix": lambda: _fourier(False),
    "fourier_mix, training": lambda: _fourier(True),
    "multiscale_ffn": _ffn,
}


def _backward(name: str, need: bool = True) -> Arguments:
    """Arguments of the backward op."""
    op, args = name.split(",")[0], FORWARD[name]()
    y = backend.OPS[op].reference(*args)
    if op != "fourier_mix":
        return torch.randn_like(y), *args[:-1], need, True
    return torch.randn_like(y[0]), torch.randn_like(y[1]), y[2], *args[:-1], need, True


CASES = [(name.split(",")[0], make) for name, make in FORWARD.items()]
CASES += [(f"{name.split(',')[0]}_backward", lambda name=name: _backward(name)) for name in FORWARD]
IDS = [*FORWARD, *(f"{name}, backward" for name in FORWARD)]


@pytest.fixture(autouse=True)
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU counts as a GPU whose products are doubtful."""
    monkeypatch.setattr(self_test, "doubtful", lambda device: True)
    monkeypatch.setattr(self_test, "_verdicts", {})
    with backend.as_on_gpu():
        yield


def _damage(monkeypatch: pytest.MonkeyPatch, name: str, damage: Callable[[Any], Any]) -> list[int]:
    """Put `damage` behind the kernels of op `name`; returns a list that grows with each run of them."""
    runs: list[int] = []
    original = backend._implementation

    def implementation(op: backend.Implementations, chosen: str) -> Callable[..., Any]:
        run = original(op, chosen)
        if op.name != name or chosen != "triton":
            return run

        def damaged(*args: Any) -> Any:
            runs.append(1)
            return damage(run(*args))

        return damaged

    monkeypatch.setattr(backend, "_implementation", implementation)
    return runs


def _call(name: str, args: Arguments) -> Any:
    return getattr(torch.ops.swformer_fast, name)(*args)


BUNDLES: dict[str, tuple[type, int]] = {"multiscale_ffn": (FfnParameters, 1), "fourier_mix": (FourierParameters, 2)}
"""Of the public functions, and how many arguments of the op are behind it."""


def _why_not(name: str, args: Arguments) -> str:
    if name not in BUNDLES:
        return sf.why_not(name, *args)
    kind, behind = BUNDLES[name]
    return sf.why_not(name, args[0], unflatten(kind, args[1:-behind]))


@pytest.mark.parametrize(("name", "make"), CASES, ids=IDS)
def test_right_products_pass_once(name: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _damage(monkeypatch, name, lambda result: result)
    args = make()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="swformer_fast")
        _call(name, args)
        _call(name, args)
    assert len(runs) == 3
    assert _why_not(name, args) == "triton runs"


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize(("name", "make"), CASES, ids=IDS)
def test_wrong_products_are_refused(name: str, make: Any, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(result: Any) -> Any:
        """Two rows of one result change places, as when a register goes to the wrong lane."""
        tensors = result if isinstance(result, tuple) else (result,)
        tensor = tensors[0]
        tensor[..., [0, 1], :] = tensor[..., [1, 0], :]
        return result

    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    runs = _damage(monkeypatch, name, swap)
    args = make()
    with pytest.warns(UserWarning, match=f"{name} runs on the reference, .*: its self-test found"):
        result = _call(name, args)
    assert_close(result, backend.OPS[name].reference(*args))
    assert len(runs) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="swformer_fast")
        _call(name, args)
    assert len(runs) == 1
    assert "a fault of the compiler (triton" in _why_not(name, args)
    with sf.use_backend("triton"), pytest.raises(RuntimeError, match="its self-test found a relative error"):
        _call(name, args)


def test_nan_and_failures_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    args = FORWARD["pointwise"]()
    _damage(monkeypatch, "pointwise", lambda result: result.fill_(float("nan")))
    with pytest.warns(UserWarning, match="relative error of inf"):
        _call("pointwise", args)

    def fail(result: Any) -> Any:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(self_test, "_verdicts", {})
    _damage(monkeypatch, "pointwise", fail)
    with pytest.warns(UserWarning, match="its self-test failed: RuntimeError: out of resources"):
        _call("pointwise", args)


def test_each_dtype_and_number_of_channels_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = _damage(monkeypatch, "pointwise", lambda result: result)
    args = FORWARD["pointwise"]()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _call("pointwise", tuple(a.to(dtype) if isinstance(a, Tensor) and a.dim() == 4 else a for a in args))
    x, weight = torch.randn(1, 3, 6, 7), torch.randn(1, 4, 3)
    _call("pointwise", (x, None, None, weight, args[4], None))
    assert len(runs) == 2 * 4


def test_gradients_and_modes_reach_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the caller's state is: recording, inference mode, autocast. No generator of theirs is drawn from."""
    runs = _damage(monkeypatch, "pointwise", lambda result: result)
    args = list(FORWARD["pointwise"]())
    before = torch.get_rng_state()
    with torch.inference_mode():
        _call("pointwise", tuple(args))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        _call("pointwise", tuple(args))
    args[3].requires_grad_()
    _call("pointwise", tuple(args)).sum().backward()
    assert torch.equal(before, torch.get_rng_state())
    assert len(runs) == 5


def test_ops_without_products_and_other_devices_are_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    def kernels(op: backend.Implementations) -> Callable[..., Any]:
        raise AssertionError(f"{op.name} was tested")

    taps = torch.randn(2)
    assert self_test.problem(backend.OPS["haar_dwt2d"], (torch.randn(1, 1, 4, 4), taps, taps), kernels) is None
    monkeypatch.undo()
    assert not self_test.doubtful(torch.device("cpu"))
    assert self_test.problem(backend.OPS["multiscale_ffn"], _ffn(), kernels) is None


def test_the_sample_keeps_what_the_code_depends_on() -> None:
    like = torch.empty(8, 40, 130, 96)
    assert self_test.image(torch.Generator(), like).shape == (2, 40, 34, 32)
    assert self_test.image(torch.Generator(), torch.empty(1, 3, 5, 47)).shape == (1, 3, 5, 47)
    weights = self_test.parameter(torch.Generator().manual_seed(0), torch.empty(8, 50, 400))
    assert weights.shape == (2, 50, 400)
    assert abs(weights.std().item() * 20 - 1) < 0.05


@pytest.mark.slow
def test_it_takes_milliseconds() -> None:
    """The reference's part of it, at the widest level of the presets; compiling and running the kernels come on top."""
    dim = 96
    depthwise = [t for _ in range(3) for t in (torch.randn(dim, 1, 3, 3), torch.randn(dim))]
    args = (torch.randn(4, dim, 64, 64), torch.randn(3 * dim, dim, 1, 1), torch.randn(3 * dim), *depthwise)
    args = (*args, torch.randn(dim, 3 * dim, 1, 1), torch.randn(dim))
    op = backend.OPS["multiscale_ffn_backward"]
    assert op.sample is not None
    begin = time.perf_counter()
    op.reference(*op.sample(torch.Generator(), (args[0], *args, True, True)))
    assert time.perf_counter() - begin < 0.5
