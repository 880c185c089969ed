"""Which backends can run here, which one an op takes, and why: `use_backend`, `backends`, `why_not`."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import self_test

PACKAGE = __package__ or "swformer_fast"
_ENVIRONMENT = f"{PACKAGE.upper()}_BACKEND"
_log = logging.getLogger(PACKAGE)


@dataclass(frozen=True)
class Implementations:
    """What the backends run for one op; all have its signature."""

    name: str
    triton: str
    """The module of the Triton kernels, named as the op, as its launcher is; that of the backward op is there too."""
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    """Results like the reference's, empty."""
    limits: Callable[..., str | None]
    """limits(backend, *args): why that backend cannot take these arguments, or None."""
    sample: Callable[[torch.Generator, tuple[Any, ...]], tuple[Any, ...]] | None = None
    """sample(generator, args): small random arguments like `args`, on the CPU in fp64, for `self_test`. None where the
    Triton kernels hold no matrix product."""


OPS: dict[str, Implementations] = {}
"""Every op, backward ops included, by name."""


class Backend(Protocol):
    """One way to run the ops."""

    name: str

    def unavailable(self) -> str | None:
        """Why it cannot run here at all, or None."""

    def problem(self, op: Implementations, device: torch.device, args: tuple[Any, ...]) -> str | None:
        """Why it cannot run `op` on `args`, in words, or None."""

    def implementation(self, op: Implementations) -> Callable[..., Any]: ...


class Reference:
    """Plain PyTorch; takes everything."""

    name = "reference"

    def unavailable(self) -> str | None:
        return None

    def problem(self, op: Implementations, device: torch.device, args: tuple[Any, ...]) -> str | None:
        return None

    def implementation(self, op: Implementations) -> Callable[..., Any]:
        return op.reference


_multiplies_bf16 = False
"""Known when the extension is loaded."""


@cache
def _extension() -> str | None:
    """Load the compiled extension for this CPU, once; why it cannot be used, or None."""
    global _multiplies_bf16
    capability = torch.backends.cpu.get_cpu_capability()
    sets = {"AVX512": ("avx512", "avx2"), "AVX2": ("avx2",)}.get(capability, ("neon",))
    folder = Path(__file__).parent
    for instruction_set in sets:
        library = folder / f"_C_{instruction_set}.so"
        if library.exists():
            torch.ops.load_library(str(library))
            _multiplies_bf16 = torch.ops._swformer_fast.multiply_in_pairs()
            return None
    if any(folder.glob("_C_*.so")):
        return f"the compiled extension has no variant for this CPU (torch reports {capability})"
    return "the compiled extension was not built (install with a C++ compiler and pip install --no-build-isolation)"


class Cpp:
    """The compiled extension, on the CPU."""

    name = "cpp"

    def unavailable(self) -> str | None:
        return _extension()

    def problem(self, op: Implementations, device: torch.device, args: tuple[Any, ...]) -> str | None:
        if device.type != "cpu":
            return f"the tensors are on {device.type}, not on the CPU"
        reason = _extension()
        if reason is None and not hasattr(torch.ops._swformer_fast, op.name):
            reason = f"{op.name} has no C++ kernel"
        return reason or op.limits(self.name, *args)

    def implementation(self, op: Implementations) -> Callable[..., Any]:
        return getattr(torch.ops._swformer_fast, op.name)


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _without_triton() -> str | None:
    return "triton is not installed" if importlib.util.find_spec("triton") is None else None


@cache
def _has_kernels(file: str) -> bool:
    try:
        return importlib.util.find_spec(f"swformer_kernels.{file}") is not None
    except ModuleNotFoundError:
        return False


@cache
def _kernels(file: str) -> Any:
    return importlib.import_module(f"swformer_kernels.{file}")


class Triton:
    """The Triton kernels, on a GPU; with TRITON_INTERPRET=1 interpreted on the CPU."""

    name = "triton"

    def unavailable(self) -> str | None:
        reason = _without_triton()
        if reason is None and not torch.cuda.is_available() and not _interpreting():
            reason = "no GPU (TRITON_INTERPRET=1 interprets the kernels)"
        return reason

    def problem(self, op: Implementations, device: torch.device, args: tuple[Any, ...]) -> str | None:
        here = device.type == "cuda" or _as_on_gpu or (device.type == "cpu" and _interpreting())
        reason = _without_triton()
        if reason is None and not here:
            reason = f"the tensors are on {device.type}: no GPU (TRITON_INTERPRET=1 interprets the kernels on the CPU,"
            reason += " slowly)"
        if reason is None and not _has_kernels(op.triton):
            reason = f"{op.name} has no Triton kernel"
        return (
            reason
            or op.limits(self.name, *args)
            or self_test.problem(op, args, lambda op: _implementation(op, self.name))
        )

    def implementation(self, op: Implementations) -> Callable[..., Any]:
        return getattr(_kernels(op.triton), op.name)


_BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Reference(), Cpp(), Triton())}
BACKENDS = ("auto", *_BACKENDS)
LARGEST = 2**40
"""Elements of an image, far more than memory holds."""


# the chooser ----------------------------------------------------------------------------------------------------------


class _Asked:
    """An entry of `use_backend`. Each is removed by identity: threads that use it at a time never take each other's."""

    def __init__(self, name: str) -> None:
        self.name = name


_asked: list[_Asked] = []
_as_on_gpu = False


@dataclass(frozen=True)
class Choice:
    backend: str
    reason: str | None
    """Why the fast backend of this device does not run; None if it does."""

    def __str__(self) -> str:
        return f"{self.backend} runs" if self.reason is None else f"{self.backend} runs ({self.reason})"


def default_backend() -> str:
    """The backend asked for by `use_backend`, else by the environment variable, else "auto"."""
    name = _asked[-1].name if _asked else os.environ.get(_ENVIRONMENT, "auto")
    if name not in BACKENDS:
        raise ValueError(f"{_ENVIRONMENT} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def choose(op: Implementations, args: tuple[Any, ...]) -> Choice:
    """The backend that runs `op` on `args`."""
    first = next(a for a in args if isinstance(a, Tensor))
    if first.numel() > LARGEST:  # an expanded view: it would end as an allocation's failure in C++
        raise ValueError(f"the image must have at most {LARGEST} elements, got shape {tuple(first.shape)}")
    device = first.device
    asked = default_backend()
    fast = asked if asked != "auto" else "cpp" if device.type == "cpu" and not _as_on_gpu else "triton"
    reason = _BACKENDS[fast].problem(op, device, args)
    if asked == "auto":
        return Choice(fast, None) if reason is None else Choice("reference", f"not {fast}: {reason}")
    if reason is not None:
        raise RuntimeError(f"backend {asked!r} was asked for, but it cannot run {op.name}: {reason}")
    return Choice(asked, f"backend {asked!r} was asked for" if asked == "reference" else None)


@cache
def _log_fallback(name: str, reason: str) -> None:
    """Once for each op and reason."""
    _log.info("%s runs on the reference: %s", name, reason)


def _implementation(op: Implementations, backend: str) -> Callable[..., Any]:
    return _BACKENDS[backend].implementation(op)


def run(op: Implementations, args: tuple[Any, ...]) -> Any:
    """Run `op` on `args` with the backend that `choose` picks."""
    choice = choose(op, args)
    if choice.reason is not None:
        _log_fallback(op.name, choice.reason)
    return _implementation(op, choice.backend)(*args)


def has_cpp(device: str) -> bool:
    """Whether the C++ kernels run on tensors of this device type; under torch.compile, whether they may."""
    if device != "cpu" or _as_on_gpu:
        return False
    return torch.compiler.is_compiling() or (default_backend() in ("auto", "cpp") and _extension() is None)


def multiplies_bf16() -> bool:
    """Whether this processor has products of bf16 that the C++ kernels take: twice as many at a time as of fp32."""
    if not torch.compiler.is_compiling():  # which takes what is known by then
        _extension()
    return default_backend() in ("auto", "cpp") and _multiplies_bf16


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Inside, every op runs on backend `name`: "auto", "reference", "cpp" or "triton".

    An op that the named backend cannot run raises RuntimeError that says why; "auto" falls back to the reference
    instead. The setting holds for the whole process, backward threads included; of several threads' the last one
    entered and not yet left counts. A backward pass takes the backend in force while it runs. The environment variable
    SWFORMER_FAST_BACKEND sets the default.
    """
    if not isinstance(name, str) or name not in BACKENDS:
        raise ValueError(f"name must be one of {', '.join(BACKENDS)}, got {name!r}")
    entry = _Asked(name)
    _asked.append(entry)
    try:
        yield
    finally:
        _asked.remove(entry)


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


def empty_cache() -> None:
    """Give back the memory that the C++ kernels keep for their next large results.

    Results of 4 MiB and more come from a pool that keeps at most 128 MiB of what was freed: fresh pages would cost
    more than most operators' arithmetic. Such a result cannot be resized to more than it has (clone it first): its
    memory is not its allocator's. (torch 2.10 lacks the means for it; there nothing is kept.)
    """
    if _extension() is None:
        torch.ops._swformer_fast.empty_cache()


def backends() -> dict[str, str]:
    """Each backend and whether it can run here: "available", or the reason why not. Loads the extension."""
    state = {name: backend.unavailable() or "available" for name, backend in _BACKENDS.items()}
    if state["triton"] == "available" and not torch.cuda.is_available():
        state["triton"] = "available (interpreted)"
    return state


class _Answer(Exception):
    def __init__(self, choice: Choice) -> None:
        self.choice = choice


class _Asking(TorchDispatchMode):
    """Ends a call of a public function where it reaches its op, with what would run; on the meta device too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace != PACKAGE:
            return func(*args, **(kwargs or {}))
        raise _Answer(choose(OPS[name], args))


class _Watching(TorchDispatchMode):
    """Our ops give empty results; how often each is called, and what would run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        if namespace != PACKAGE:
            return func(*args, **(kwargs or {}))
        self.calls[f"{name}: {choose(OPS[name], args)}"] += 1
        return OPS[name].fake(*args)


def _of_model(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}  # in training they would move
    with _Watching() as watching:
        torch.func.functional_call(model, buffers, args, kwargs)
    lines = [f"{count} x {call}" for call, count in watching.calls.items()]
    return "\n".join(lines) or f"{type(model).__name__} calls no op of {PACKAGE} here"


def why_not(function: Callable[..., Any] | nn.Module | str, *args: Any, **kwargs: Any) -> str:
    """Which backend would run `function` on these arguments, and why not a faster one. None of our ops runs.

    function: one of `functional`, or its name, with what it takes; or the name of another op, with what that takes. Or
    a module with what it takes: then the ops that it calls in the present mode (gradients, training), a line each; what
    else it does is done, on empty results.

    >>> why_not(F.haar_dwt2d, x, dec_lo, dec_hi)
    'cpp runs'
    >>> with torch.no_grad():
    ...     print(why_not(model, image, exit="small"))
    2 x haar_dwt2d: cpp runs
    25 x swformer_block: cpp runs
    2 x pointwise: cpp runs
    2 x haar_idwt2d: cpp runs
    """
    from . import functional

    if isinstance(function, nn.Module):
        return _of_model(function, args, kwargs)
    name: Any = getattr(function, "__name__", function)
    public = getattr(functional, name) if isinstance(name, str) and name in functional.__all__ else None
    exists = name in OPS if isinstance(function, str) else public is not None and function is public
    if not exists:
        names = ", ".join(sorted({*functional.__all__, *OPS}))
        raise ValueError(
            f"function must be one of swformer_fast.functional's, a module or a name of {names}, got {name!r}"
        )
    if public is None:
        if kwargs or not any(isinstance(a, Tensor) for a in args):
            raise TypeError(f"args must hold the tensors that {name} takes, in order, got {args!r} and {kwargs!r}")
        return str(choose(OPS[name], args))
    try:
        with torch.no_grad(), _Asking():
            public(*args, **kwargs)
    except _Answer as answer:
        return str(answer.choice)
    raise RuntimeError(f"{name} reached no op")
