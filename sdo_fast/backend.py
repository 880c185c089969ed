"""Which backends can run here, which one an op takes, and why: `use_backend`, `backends`, `why_not`."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PACKAGE = __package__ or "sdo_fast"
BACKENDS = ("auto", "reference", "cpp", "cuda")
_ENVIRONMENT = f"{PACKAGE.upper()}_BACKEND"


@dataclass(frozen=True, eq=False)
class _Choice:
    """One `use_backend` that is in force, and the thread that entered it."""

    name: str
    thread: int


# A thread takes its own innermost choice; one without any, as autograd's are, the last that any thread has entered.
_chosen: tuple[_Choice, ...] = ()
_lock = threading.Lock()


@dataclass(frozen=True)
class Op:
    """One operator and its implementations, all with the same signature; its first argument is a tensor."""

    name: str
    reference: Callable[..., Any]
    limits: Callable[..., str | None]
    """limits(*args): why the kernels cannot take these arguments, or None."""


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
    if any(library.name != "_C_cuda.so" for library in folder.glob("_C_*.so")):
        return f"the compiled extension has no variant for this CPU (torch reports {capability})"
    return "the compiled extension was not built (install with a C++ compiler and pip install --no-build-isolation)"


@cache
def _cuda_extension() -> str | None:
    """Load the CUDA kernels, once; why they cannot be used, or None."""
    library = Path(__file__).parent / "_C_cuda.so"
    if not library.exists():
        return "the CUDA kernels were not built (install with nvcc and pip install --no-build-isolation)"
    if torch.version.cuda is None:
        return "this torch was built without CUDA"
    torch.ops.load_library(str(library))
    return None


@cache
def _kernel(name: str, backend: str) -> Callable[..., Any]:
    return getattr(torch.ops._sdo_fast if backend == "cpp" else torch.ops._sdo_fast_cuda, name).default


def _implementation(op: Op, backend: str) -> Callable[..., Any]:
    return op.reference if backend == "reference" else _kernel(op.name, backend)


def _problem(op: Op, backend: str, device: str, args: tuple[Any, ...]) -> str | None:
    """Why `backend` cannot run `op` on `args`, in words, or None."""
    if backend == "reference":
        return None
    if backend == "cpp":
        reason = f"the tensors are on {device}, not on the CPU" if device != "cpu" else _extension()
    else:
        reason = f"the tensors are on {device}, not on a CUDA GPU" if device != "cuda" else _cuda_extension()
    return reason or op.limits(*args)


def default_backend() -> str:
    """The backend asked for by `use_backend`, else by the environment variable, else "auto"."""
    chosen = _chosen  # one look, for other threads replace it
    if len(chosen) > 1:
        thread = threading.get_ident()
        return next((choice for choice in reversed(chosen) if choice.thread == thread), chosen[-1]).name
    if chosen:
        return chosen[0].name
    name = os.environ.get(_ENVIRONMENT, "auto")
    if name not in BACKENDS:
        raise ValueError(f"{_ENVIRONMENT} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _choose(op: Op, args: tuple[Any, ...]) -> tuple[str, str | None]:
    """The backend that runs `op` on `args`, and why the fast one of this device does not (None if it does)."""
    asked, device = default_backend(), args[0].device.type
    if asked != "auto":
        reason = _problem(op, asked, device, args)
        if reason is not None:
            raise RuntimeError(f"backend {asked!r} was asked for, but it cannot run {op.name}: {reason}")
        return asked, f"backend {asked!r} was asked for" if asked == "reference" else None
    fast = "cpp" if device == "cpu" else "cuda"
    reason = _problem(op, fast, device, args)
    return (fast, None) if reason is None else ("reference", f"not {fast}: {reason}")


def kernel(op: Op, args: tuple[Any, ...]) -> Callable[..., Any]:
    """What runs `op` on `args`, by the backend that `_choose` picks."""
    return _implementation(op, _choose(op, args)[0])


def run(op: Op, args: tuple[Any, ...]) -> Any:
    return kernel(op, args)(*args)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside, every op runs on backend `name`: "auto", "reference", "cpp" or "cuda".

    An op that the named backend cannot run raises RuntimeError that says why; "auto" falls back to the reference
    instead. The setting holds for this thread, and for threads without a setting of their own, backward threads
    included, until another thread enters one; a backward pass takes the backend in force while it runs. The environment
    variable SDO_FAST_BACKEND sets the default.
    """
    global _chosen
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"name must be one of {', '.join(BACKENDS)}, got {name!r}")
    mine = _Choice(name, threading.get_ident())
    with _lock:
        _chosen = (*_chosen, mine)
    try:
        yield
    finally:
        with _lock:
            _chosen = tuple(choice for choice in _chosen if choice is not mine)


def backends() -> dict[str, str]:
    """Each backend and whether it can run here: "available", or the reason why not. Loads the extension."""
    cuda = _cuda_extension()
    if cuda is None and not torch.cuda.is_available():
        cuda = "no GPU"
    return {"reference": "available", "cpp": _extension() or "available", "cuda": cuda or "available"}


def why_not(op_name: str, *args: Any) -> str:
    """Which backend would run op `op_name` on `args` (as given to the op), and why not a faster one.

    >>> why_not("sampler_step", x, cond)
    'cpp runs'
    """
    if not isinstance(op_name, str) or op_name not in OPS:
        raise ValueError(f"op_name must be one of {', '.join(sorted(OPS))}, got {op_name!r}")
    if not args or not isinstance(args[0], Tensor):
        raise TypeError(f"args must begin with the tensor that {op_name} takes first, got {args!r}")
    backend, reason = _choose(OPS[op_name], args)
    return f"{backend} runs" if reason is None else f"{backend} runs ({reason})"
