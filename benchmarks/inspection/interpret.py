"""What Triton's kernels do, seen by running them in its interpreter (TRITON_INTERPRET=1 before triton is imported).

`count_traffic` counts the bytes that each kernel loads and stores and the arithmetic in between. `checked` runs every
launch among guard pages: an access outside the tensors is an error, and so is an element that is not written exactly
once; the programs of the grid run in any order, or each by itself.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Index = tuple[int, ...]
"""A program's place in its grid."""

SIMPLE: tuple[str, ...] = (
    "fadd",
    "fsub",
    "fmul",
    "fneg",
    "fabs",
    "minimumf",
    "minnumf",
    "maximumf",
    "maxnumf",
    "clampf",
)
SPECIAL: tuple[str, ...] = (
    "fdiv",
    "precise_divf",
    "approx_divf",
    "frem",
    "cos",
    "exp",
    "exp2",
    "floor",
    "ceil",
    "log",
    "log2",
)
SPECIAL += ("precise_sqrt", "sqrt", "sin", "erf", "rsqrt")


class Session:
    """What is told of each launch. The base class lets it run and looks at nothing."""

    def begin(self, kernel: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments to run with."""
        return arguments

    def order(self, programs: list[Index]) -> list[Index]:
        return programs

    def end_program(self, program: Index) -> None: ...

    def end(self) -> None: ...

    def access(self, kind: str, addresses: Any, itemsize: int) -> None:
        """kind: "load" or "store". Masked lanes are left out."""

    def arithmetic(self, kind: str, count: int) -> None:
        """kind: "simple", "special" (division, roots, exponentials) or "dot"."""


_sessions: list[Session] = []


@contextmanager
def watch(session: Session) -> Iterator[None]:
    """Inside, `session` is told of all that interpreted kernels do; contexts may be nested."""
    _sessions.append(session)
    try:
        if len(_sessions) > 1:
            yield
        else:
            with _watched_interpreter():
                yield
    finally:
        _sessions.remove(session)


def _executor(interpreter: Any) -> type:
    """The interpreter's executor of grids, which tells the sessions."""
    patch_language = interpreter._patch_lang

    class Executor(interpreter.GridExecutor):
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            signature = inspect.getfullargspec(self.fn)
            kwargs = {k: v for k, v in kwargs.items() if k in signature.args or k in signature.kwonlyargs}
            named = inspect.getcallargs(self.fn, *args, **kwargs)
            for session in _sessions:
                named = session.begin(self.fn.__name__, named)
            scopes: dict[tuple[bool, ...], Any] = {}

            def patch_once(fn: Any) -> None:
                """Every call of a function from a kernel would do it again, in half of the interpreter's time."""
                modules = tuple(m in fn.__globals__.values() for m in (interpreter.tl, interpreter.tl.core))
                if modules not in scopes:
                    scopes[modules] = patch_language(fn)

            patch_once(self.fn)
            interpreter._patch_lang = patch_once
            try:
                converted = {k: v if k in self.constexprs else interpreter._implicit_cvt(v) for k, v in named.items()}
                grid = ((*self.grid, 1, 1) if not callable(self.grid) else (*self.grid(converted), 1, 1))[:3]
                interpreter.interpreter_builder.set_grid_dim(*grid)
                programs = list(product(*map(range, grid)))
                for session in _sessions:
                    programs = session.order(programs)
                for program in programs:
                    interpreter.interpreter_builder.set_grid_idx(*program)
                    self.fn(**converted)
                    for session in _sessions:
                        session.end_program(program)
            finally:
                interpreter._patch_lang = patch_language
                for scope in reversed(scopes.values()):
                    scope.restore()
            for session in _sessions:
                session.end()

    return Executor


def _access(kind: str, original: Callable[..., Any], mask_at: int) -> Callable[..., Any]:
    def watched(self: Any, pointers: Any, *args: Any) -> Any:
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(args[mask_at].data, pointers.data.shape)]
        for session in _sessions:
            session.access(kind, addresses, itemsize)
        return original(self, pointers, *args)

    return watched


def _arithmetic(kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
    def watched(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        count = result.data.size * (2 * args[0].data.shape[-1] if kind == "dot" else 1)
        for session in _sessions:
            session.arithmetic(kind, count)
        return result

    return watched


@contextmanager
def _watched_interpreter() -> Iterator[None]:
    from triton.runtime import interpreter

    builder, reduce_sum = interpreter.InterpreterBuilder, interpreter.ReduceOps.sum

    def watched_sum(self: Any, operand: Any) -> Any:
        for session in _sessions:
            session.arithmetic("simple", operand.handle.data.size)
        return reduce_sum(self, operand)

    patches: dict[str, Callable[..., Any]] = {
        "create_masked_load": _access("load", builder.create_masked_load, 0),
        "create_masked_store": _access("store", builder.create_masked_store, 1),
        "create_dot": _arithmetic("dot", builder.create_dot),
    }
    for kind, names in (("simple", SIMPLE), ("special", SPECIAL)):
        for name in (f"create_{n}" for n in names):
            if hasattr(builder, name):  # Triton 3.6 has no create_fneg
                patches[name] = _arithmetic(kind, getattr(builder, name))
    with ExitStack() as stack:
        for name, patch in patches.items():
            stack.enter_context(mock.patch.object(builder, name, patch))
        stack.enter_context(mock.patch.object(interpreter.ReduceOps, "sum", watched_sum))
        stack.enter_context(mock.patch.object(interpreter, "GridExecutor", _executor(interpreter)))
        yield


# traffic --------------------------------------------------------------------------------------------------------------


@dataclass
class KernelTraffic:
    """Bytes that one launch of a kernel moved, masked lanes left out, and its arithmetic.

    `loaded` and `stored` count every access; `program_...` each address once a program, what a perfect first-level
    cache would let through; `distinct_...` each address once, what a perfect last-level cache would.
    """

    kernel: str
    programs: int = 0
    counted: int = 0
    """Programs that ran; the figures are scaled from them to all."""
    compulsory: int = 0
    """Bytes of the tensors that the kernel takes."""
    loaded: float = 0
    stored: float = 0
    program_loaded: float = 0
    program_stored: float = 0
    distinct_loaded: float = 0
    distinct_stored: float = 0
    simple: float = 0
    special: float = 0
    dot: float = 0


@dataclass
class Traffic:
    """The launches counted, and sums over them."""

    kernels: list[KernelTraffic] = field(default_factory=list)

    def _sum(self, name: str) -> float:
        return sum(getattr(kernel, name) for kernel in self.kernels)

    @property
    def loaded(self) -> float:
        return self._sum("loaded")

    @property
    def stored(self) -> float:
        return self._sum("stored")

    @property
    def total(self) -> float:
        return self.loaded + self.stored

    @property
    def program_total(self) -> float:
        return self._sum("program_loaded") + self._sum("program_stored")

    @property
    def distinct_loaded(self) -> float:
        return self._sum("distinct_loaded")

    @property
    def distinct_stored(self) -> float:
        return self._sum("distinct_stored")


Counted = dict[tuple[Any, ...], KernelTraffic]
"""Launches counted before, by the kernel and its arguments."""


def _signature(value: Any) -> Any:
    return (value.dtype, value.shape, value.stride()) if isinstance(value, Tensor) else value


class _Counter(Session):
    def __init__(self, sample: int | None, counted: Counted | None) -> None:
        self.sample = sample
        self.counted = counted
        self.traffic = Traffic()

    def begin(self, kernel: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self.key = (kernel, *(tree_map(_signature, value) for value in arguments.values()))
        self.kernel = KernelTraffic(kernel, compulsory=sum(compulsory(arguments, ())))
        self.touched: dict[tuple[str, int], list[Any]] = {}
        self.seen: dict[tuple[str, int], list[Any]] = {}
        return arguments

    def order(self, programs: list[Index]) -> list[Index]:
        if self.counted is not None and self.key in self.counted:
            return []
        self.kernel.programs = len(programs)
        if self.sample is not None and self.sample < len(programs):
            # Multiples of the golden ratio: even over the grid, and over the remainders of any small number.
            places = (np.arange(1, self.sample + 1) * 0.6180339887498949 % 1 * len(programs)).astype(int)
            programs = [programs[i] for i in places]
        self.kernel.counted = len(programs)
        return programs

    def access(self, kind: str, addresses: Any, itemsize: int) -> None:
        name = "loaded" if kind == "load" else "stored"
        setattr(self.kernel, name, getattr(self.kernel, name) + addresses.size * itemsize)
        self.touched.setdefault((name, itemsize), []).append(addresses)

    def arithmetic(self, kind: str, count: int) -> None:
        setattr(self.kernel, kind, getattr(self.kernel, kind) + count)

    def _add(self, prefix: str, lists: dict[tuple[str, int], list[Any]]) -> dict[tuple[str, int], Any]:
        unique = {key: np.unique(np.concatenate(parts)) for key, parts in lists.items()}
        for (kind, itemsize), addresses in unique.items():
            name = f"{prefix}_{kind}"
            setattr(self.kernel, name, getattr(self.kernel, name) + addresses.size * itemsize)
        return unique

    def end_program(self, program: Index) -> None:
        for key, addresses in self._add("program", self.touched).items():
            self.seen.setdefault(key, []).append(addresses)
        self.touched = {}

    def end(self) -> None:
        if self.counted is not None and self.key in self.counted:
            self.traffic.kernels.append(self.counted[self.key])
            return
        self._add("distinct", self.seen)
        scale = self.kernel.programs / max(self.kernel.counted, 1)
        for name, value in vars(self.kernel).items():
            if name not in ("kernel", "programs", "counted", "compulsory"):
                setattr(self.kernel, name, value * scale)
        self.traffic.kernels.append(self.kernel)
        if self.counted is not None:
            self.counted[self.key] = self.kernel


@contextmanager
def count_traffic(sample: int | None = None, counted: Counted | None = None) -> Iterator[Traffic]:
    """Count the bytes and the arithmetic of the kernels that are interpreted inside.

    sample: run only so many programs of each launch, evenly spread over its grid, and scale what they do to all. The
    results of the launches are then wrong, and `distinct_...` is an upper bound. counted: launches counted before,
    which do not run at all; those counted now are added.
    """
    counter = _Counter(sample, counted)
    # What programs that do not run have not written overflows.
    with np.errstate(all="ignore" if sample is not None else None), watch(counter):
        yield counter.traffic


def compulsory(arguments: Any, outputs: Any) -> tuple[int, int]:
    """Bytes that must be loaded and stored: every input once, every output once. What is returned as it came is neither
    stored nor counted twice.
    """
    sizes: list[dict[int, int]] = []
    for nest in (arguments, outputs):
        tensors = [t for t in tree_leaves(nest) if isinstance(t, Tensor) and t.numel()]
        sizes.append({t.untyped_storage()._cdata: t.nbytes for t in tensors})
    inputs, results = sizes
    return sum(inputs.values()), sum(size for key, size in results.items() if key not in inputs)


# checks ---------------------------------------------------------------------------------------------------------------

GUARD = 1 << 16
"""Bytes of poison before and behind every tensor: a multiple of any alignment."""


class KernelError(AssertionError):
    """An interpreted kernel did what none may do."""


class _Memory:
    """The storage of one or more tensors, moved among guard pages."""

    def __init__(self, original: Tensor, name: str) -> None:
        self.name = name
        self.itemsize = original.element_size()
        storage = original.untyped_storage()
        self.original = torch.empty(0, dtype=torch.uint8).set_(storage)
        count = storage.nbytes()
        # Of all ones: NaN in every floating dtype.
        self.guarded = torch.full((GUARD + -(-count // GUARD) * GUARD + GUARD,), 255, dtype=torch.uint8)
        self.body = self.guarded[GUARD : GUARD + count]
        self.body.copy_(self.original)
        self.first = self.body.data_ptr() if count else self.guarded.data_ptr() + GUARD
        self.valid = torch.zeros(count // self.itemsize, dtype=torch.bool)
        self.tensors: list[tuple[str, Tensor]] = []
        unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[self.itemsize]
        self.elements = self.body[: len(self.valid) * self.itemsize].numpy().view(unsigned)
        self.before = self.elements.copy()
        self.writes = np.zeros(len(self.valid), np.int64)
        self.journal: list[Any] = []
        self.results: list[tuple[Any, Any]] = []

    def add(self, name: str, tensor: Tensor) -> Tensor:
        self.tensors.append((name, tensor))
        torch.as_strided(self.valid, tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
        offset = GUARD // self.itemsize + tensor.storage_offset()
        return torch.as_strided(self.guarded.view(tensor.dtype), tensor.shape, tensor.stride(), offset)


class _Checker(Session):
    def __init__(self, order: str, seed: int) -> None:
        self.alone = order == "alone"
        self.shuffle = random.Random(seed).shuffle if order == "random" else lambda programs: None

    def begin(self, kernel: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self.kernel, self.program = kernel, (0, 0, 0)
        self.memories: dict[int, _Memory] = {}

        def guard(name: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            memory = self.memories.setdefault(value.untyped_storage()._cdata, _Memory(value, name))
            return memory.add(name, value)

        return {name: tree_map(lambda v, name=name: guard(name, v), value) for name, value in arguments.items()}

    def order(self, programs: list[Index]) -> list[Index]:
        self.shuffle(programs)
        return programs

    def access(self, kind: str, addresses: Any, itemsize: int) -> None:
        left = addresses.astype(np.int64)
        for memory in self.memories.values():  # one access may reach several tensors
            inside = (left >= memory.first - GUARD) & (left < memory.first + len(memory.body) + GUARD)
            if inside.any():
                self._access(kind, memory, (left[inside] - memory.first) // itemsize)
                left = left[~inside]
        if left.size:
            raise KernelError(f"{self.kernel}: {kind} far outside every tensor")

    def _access(self, kind: str, memory: _Memory, places: Any) -> None:
        outside = (places < 0) | (places >= len(memory.valid))
        outside[~outside] = ~memory.valid.numpy()[places[~outside]]
        if outside.any():
            where = int(places[outside][0])
            raise KernelError(
                f"{self.kernel}: {kind} out of bounds of {memory.name}: {int(outside.sum())} elements, the first at "
                f"{where} of a storage of {len(memory.valid)}"
            )
        if kind == "store":
            np.add.at(memory.writes, places, 1)
            memory.journal.append(places)

    def end_program(self, program: Index) -> None:
        for memory in self.memories.values():
            if self.alone and memory.journal:
                places = np.concatenate(memory.journal)
                memory.results.append((places, memory.elements[places]))
                memory.elements[places] = memory.before[places]
            memory.journal.clear()

    def end(self) -> None:
        for memory in self.memories.values():
            for places, values in memory.results:
                memory.elements[places] = values
            for name, tensor in memory.tensors:
                writes = torch.as_strided(
                    torch.from_numpy(memory.writes), tensor.shape, tensor.stride(), tensor.storage_offset()
                )
                if writes.any() and not (writes == 1).all():
                    raise KernelError(
                        f"{self.kernel}: of {name}, {int((writes == 0).sum())} elements are not written and "
                        f"{int((writes > 1).sum())} more than once"
                    )
            if memory.writes.any():
                memory.original.copy_(memory.body)


@contextmanager
def checked(order: str = "forward", seed: int = 0) -> Iterator[None]:
    """Interpreted kernels raise KernelError where they touch memory beyond their tensors' elements or do not write each
    element of what they write exactly once.

    order: of a grid's programs, "forward", "random" (from `seed`) or "alone": every program finds memory as it was
    before the launch, and what they all wrote is put together at the end.
    """
    if order not in ("forward", "random", "alone"):
        raise ValueError(f"order must be forward, random or alone, got {order!r}")
    with watch(_Checker(order, seed)):
        yield


def same_bits(first: Any, second: Any) -> bool:
    """Whether two nests of tensors are equal bit for bit, NaN included."""
    ours, theirs = tree_leaves(first), tree_leaves(second)
    return len(ours) == len(theirs) and all(
        a.dtype == b.dtype
        and a.shape == b.shape
        and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))
        for a, b in zip(ours, theirs, strict=True)
    )
