"""Which backends can run here, which one an op takes, and why: `use_backend`, `backends`, `why_not`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import self_test

PACKAGE = __package__ or "swformer_fast"
BACKENDS = ("auto", "reference", "cpp", "triton")
_ENVIRONMENT = f"{PACKAGE.upper()}_BACKEND"
_chosen: list[str] = []
_as_on_gpu = False


@dataclass(frozen=True)
class Op:
    """One operator and its implementations, all with the same signature."""

    name: str
    family: str
    reference: Callable[..., Any]
    limits: Callable[..., str | None]
    """limits(backend, *args): why that backend cannot take these arguments, or None."""
    kernel: str = ""
    """What the C++ kernel is called, where not like the op."""
    compose: Callable[..., Any] | None = None
    """compose(kernels, *args): the op on the C++ kernels, where these are not the op itself."""
    sample: Callable[[torch.Generator, tuple[Any, ...]], tuple[Any, ...]] | None = None
    """sample(generator, args): small random arguments like `args`, on the CPU in fp64, for `self_test`. None where the
    Triton kernels hold no matrix product."""


OPS: dict[str, Op] = {}


@cache
def _extension() -> str | None:
    """Load the compiled extension for this CPU, once; why it cannot be used, or None."""
    capability = torch.backends.cpu.get_cpu_capability()
    sets = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(capability, ("neon",))
    folder = Path(__file__).parent
    for instruction_set in sets:
        library = folder / f"_C_{instruction_set}.so"
        if library.exists():
            torch.ops.load_library(str(library))
            return None
    if any(folder.glob("_C_*.so")):
        return f"the compiled extension has no variant for this CPU (torch reports {capability})"
    return "the compiled extension was not built (install with a C++ compiler and pip install --no-build-isolation)"


@cache
def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def _has_kernels(family: str) -> bool:
    try:
        return importlib.util.find_spec(f"swformer_kernels.{family}") is not None
    except ModuleNotFoundError:
        return False


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _kernels(family: str) -> ModuleType:
    return importlib.import_module(f"swformer_kernels.{family}")


def _implementation(op: Op, backend: str) -> Callable[..., Any]:
    if backend == "reference":
        return op.reference
    if backend == "triton":
        return getattr(_kernels(op.family), op.name)
    kernels = torch.ops._swformer_fast
    return getattr(kernels, op.name) if op.compose is None else partial(op.compose, kernels)


def _problem(op: Op, backend: str, args: tuple[Any, ...]) -> str | None:
    """Why `backend` cannot run `op` on `args`, in words, or None."""
    if backend == "reference":
        return None
    device = next(a for a in args if isinstance(a, Tensor)).device.type
    if backend == "cpp":
        if device != "cpu":
            return f"the tensors are on {device}, not on the CPU"
        reason = _extension()
        if reason is None and not hasattr(torch.ops._swformer_fast, op.kernel or op.name):
            reason = f"{op.name} has no C++ kernel"
    else:
        reason = _triton_problem()
        if reason is None and device != "cuda" and not (_as_on_gpu or (device == "cpu" and _interpreting())):
            reason = (
                f"the tensors are on {device}: no GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly)"
            )
        if reason is None and not _has_kernels(op.family):
            reason = f"{op.name} has no Triton kernel"
    reason = reason or op.limits(backend, *args)
    return self_test.problem(op, args) if reason is None and backend == "triton" else reason


def default_backend() -> str:
    """The backend asked for by `use_backend`, else by the environment variable, else "auto"."""
    name = _chosen[-1] if _chosen else os.environ.get(_ENVIRONMENT, "auto")
    if name not in BACKENDS:
        raise ValueError(f"{_ENVIRONMENT} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _choose(op: Op, args: tuple[Any, ...]) -> tuple[str, str | None]:
    """The backend that runs `op` on `args`, and why the fast one of this device does not (None if it does)."""
    asked = default_backend()
    if asked != "auto":
        reason = _problem(op, asked, args)
        if reason is not None:
            raise RuntimeError(f"backend {asked!r} was asked for, but it cannot run {op.name}: {reason}")
        return asked, f"backend {asked!r} was asked for" if asked == "reference" else None
    device = next(a for a in args if isinstance(a, Tensor)).device.type
    fast = "cpp" if device == "cpu" and not _as_on_gpu else "triton"
    reason = _problem(op, fast, args)
    return (fast, None) if reason is None else ("reference", f"not {fast}: {reason}")


def has_cpp(device: str) -> bool:
    """Whether the C++ kernels run on tensors of this device type; under torch.compile, whether they may."""
    if device != "cpu" or _as_on_gpu or torch.compiler.is_compiling():
        return device == "cpu" and not _as_on_gpu
    return default_backend() in ("auto", "cpp") and _extension() is None


def run(op: Op, args: tuple[Any, ...]) -> Any:
    """Run `op` on `args` with the backend that `_choose` picks."""
    return _implementation(op, _choose(op, args)[0])(*args)


def empty_cache() -> None:
    """Give back the memory that the C++ kernels keep for their next large results.

    Results of 4 MiB and more come from a pool that keeps at most 128 MiB of what was freed: fresh pages would cost
    more than most operators' arithmetic. (torch 2.10 lacks the means for it; there nothing is kept.)
    """
    if _extension() is None:
        torch.ops._swformer_fast.empty_cache()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside, every op runs on backend `name`: "auto", "reference", "cpp" or "triton".

    An op that the named backend cannot run raises RuntimeError that says why; "auto" falls back to the reference
    instead. The setting holds for the whole process, backward threads included; a backward pass takes the backend in
    force while it runs. The environment variable SWFORMER_FAST_BACKEND sets the default.
    """
    if name not in BACKENDS:
        raise ValueError(f"name must be one of {', '.join(BACKENDS)}, got {name!r}")
    _chosen.append(name)
    try:
        yield
    finally:
        _chosen.pop()


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Inside, ops take the backend that they would take on a GPU, wherever their tensors are.

    For tools that count, compile or rehearse the kernels' launches.
    """
    global _as_on_gpu
    before, _as_on_gpu = _as_on_gpu, True
    try:
        yield
    finally:
        _as_on_gpu = before


def backends() -> dict[str, str]:
    """Each backend and whether it can run here: "available", or the reason why not. Loads the extension."""
    triton = _triton_problem()
    if triton is None and not torch.cuda.is_available():
        triton = "available (interpreted)" if _interpreting() else "no GPU (TRITON_INTERPRET=1 interprets the kernels)"
    return {"reference": "available", "cpp": _extension() or "available", "triton": triton or "available"}


def why_not(op_name: str, *args: Any) -> str:
    """Which backend would run op `op_name` on `args` (as given to the op), and why not a faster one.

    >>> why_not("haar_dwt2d", x, dec_lo, dec_hi)
    'cpp runs'
    """
    if op_name not in OPS:
        raise ValueError(f"op_name must be one of {', '.join(sorted(OPS))}, got {op_name!r}")
    if not any(isinstance(a, Tensor) for a in args):
        raise TypeError(f"args must hold the tensors that {op_name} takes, got {args!r}")
    backend, reason = _choose(OPS[op_name], args)
    return f"{backend} runs" if reason is None else f"{backend} runs ({reason})"
