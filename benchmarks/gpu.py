"""The GPU that the harness times on: events, cache flushes, graphs and measured peaks, and a rehearsal on the CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Run = Callable[[], Any]
WARM_UP = 3
"""Calls before a graph is captured: they load kernels and libraries, which no capture may."""


class Gpu:
    """torch.cuda, as far as the harness needs it."""

    device = "cuda"
    flush_bytes = 256 << 20
    """More than any second-level cache holds."""
    copy_bytes = 1 << 30
    matrix_side = 8192

    def __init__(self) -> None:
        self._flush: Tensor | None = None

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def flush(self) -> None:
        """Writes over the second-level cache. The launches that follow queue up behind it."""
        if self._flush is None:
            self._flush = torch.empty(self.flush_bytes, dtype=torch.int8, device=self.device)
        self._flush.zero_()

    def seconds(self, run: Run) -> float:
        """Of one call, from a cold cache, between events."""
        self.flush()
        begin, end = self.event(), self.event()
        begin.record()
        run()
        end.record()
        self.synchronize()
        return begin.elapsed_time(end) / 1e3

    def capture(self, run: Run) -> Run:
        """`run` as a CUDA graph: what returns is the first result, computed anew in the same memory."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def peaks(self) -> dict[str, float]:
        """Measured: GB/s of a large copy, reads and writes counted, and TFLOP/s of large products by precision."""
        source, target = (torch.empty(self.copy_bytes, dtype=torch.int8, device=self.device) for _ in range(2))
        rates = {"copy GB/s": 2 * self.copy_bytes / self._best(lambda: target.copy_(source)) / 1e9}
        side = self.matrix_side
        for name, dtype, precision in (
            ("fp32", torch.float32, "highest"),
            ("tf32", torch.float32, "high"),
            ("bf16", torch.bfloat16, "highest"),
        ):
            before = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision(precision)
            try:
                a, b = (torch.randn(side, side, device=self.device).to(dtype) for _ in range(2))
                rates[f"matmul {name} TFLOP/s"] = 2 * side**3 / self._best(partial(torch.matmul, a, b)) / 1e12
            finally:
                torch.set_float32_matmul_precision(before)
        return {name: round(value, 3) for name, value in rates.items()}

    def _best(self, run: Run) -> float:
        for _ in range(WARM_UP):
            run()
        return min(self.seconds(run) for _ in range(10))


class _Clock:
    """Stands for an event."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: _Clock) -> float:
        return (end.time - self.time) * 1e3


class Rehearsal(Gpu):
    """The same on the CPU, small: every line runs but those that need a GPU."""

    device = "cpu"
    flush_bytes = 1 << 16
    copy_bytes = 1 << 20
    matrix_side = 64

    def event(self) -> Any:
        return _Clock()

    def synchronize(self) -> None: ...

    def capture(self, run: Run) -> Run:
        for _ in range(WARM_UP):
            run()
        return run


class Footprint(TorchDispatchMode):
    """Counts the least that a computation must do: bytes read that it has not made itself, and FLOP of its products."""

    def __init__(self) -> None:
        super().__init__()
        # Weak references: they keep an address from serving another storage, but no memory.
        self.made: set[StorageWeakRef] = set()
        self.read: dict[StorageWeakRef, int] = {}
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and tensor.numel():
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage not in self.made:
                    self.read[storage] = max(self.read.get(storage, 0), tensor.nbytes)
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                if storage not in self.read:
                    self.made.add(storage)
        if func.overloadpacket in flop_registry:
            self.flops += flop_registry[func.overloadpacket](*args, **kwargs, out_val=result)
        return result


def footprint(run: Run) -> tuple[int, int]:
    """Compulsory bytes, inputs and results once each, and FLOP of matrix products and convolutions of `run()`."""
    with Footprint() as counter:
        result = run()
    written = {t.untyped_storage()._cdata: t.nbytes for t in tree_leaves(result) if isinstance(t, Tensor)}
    return sum(counter.read.values()) + sum(written.values()), counter.flops


def fractions(
    seconds: float, moved: int, flops: int, peaks: Mapping[str, float], dtype: str = "fp32"
) -> dict[str, float]:
    """Achieved rates and their shares of the measured peaks, that of matrix products in `dtype`."""
    bandwidth, rate = moved / seconds / 1e9, flops / seconds / 1e12
    shares = {"GB/s": bandwidth, "of_copy": bandwidth / peaks["copy GB/s"]}
    if flops:
        products = dtype if dtype in ("fp32", "tf32") else "bf16"  # autocast's, and as fast as fp16's
        shares |= {"TFLOP/s": rate, "of_matmul": rate / peaks[f"matmul {products} TFLOP/s"]}
    return shares
