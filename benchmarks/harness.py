"""Cases, interleaved timing, the correctness gate and records.

A suite is a module `bench_<name>.py` with `cases(options) -> list[Case]`. A case holds variants that compute the same
thing; the first is the baseline. The variants take turns, one call each a round, in rotated order; a ratio is the
median over rounds of the baseline's time over the variant's in the same round: drift of the machine's speed cancels.
"""

from __future__ import annotations

import gc
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .gpu import Gpu, Run, footprint, fractions

GRAPH = ", CUDA graph"
TOLERANCE = {torch.float32: 5e-6, torch.float64: 1e-12, torch.float16: 3e-3, torch.bfloat16: 1e-2}
BASELINE_SLACK = 20.0
"""Baselines and peers add up in one precision: their filter gradients may miss the kernels' tolerance this far."""
LAYOUTS = {"compile": True, "compile, no layout opt.": False}
"""torch.compile's variants, and whether it may choose the layout of images."""
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "autocast": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Of models and images: fp32 throughout; its products in tf32, as `torch.set_float32_matmul_precision("high")` allows;
autocast to bf16; bf16 and fp16 throughout, which the suites of models take."""
HALF = ("bf16", "fp16")
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
"""Layouts of models and images."""
ROUNDED = 0.2
"""Largest relative RMS error of a baseline in tf32 and autocast; ours may err twice as far as the baseline does."""
CAST = 1e-2
"""What ours may err in autocast whatever the baseline does: a block's input and its residual are cast to bf16."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    quick: bool = False
    full: bool = False
    compile: bool = False
    device: str = "cpu"
    dtype: str = "fp32"
    """One of DTYPES."""
    layout: str = "contiguous"
    """One of FORMATS."""
    budget: float = 2.0
    """Seconds of timing per case."""
    out: Path | None = None
    """Folder where a suite of hours keeps what it has of an unfinished case; None for nowhere."""
    gpu: Gpu | None = None
    """What times on `device`, a GPU or its rehearsal; None times by the clock."""
    peaks: Mapping[str, float] = field(default_factory=dict)
    """The GPU's measured rates."""

    @property
    def words(self) -> str:
        """What differs from fp32 and contiguous, as the names of cases end in it."""
        return "".join(f", {word}" for word in (self.dtype, self.layout) if word not in ("fp32", "contiguous"))


@dataclass
class Variant:
    """One way to compute a case's result; `run` is None where it cannot run here, and `note` says why."""

    run: Run | None
    ours: bool = False
    note: str = ""
    compared: bool = True
    """Whether the result must equal the expected one."""
    plain: bool = False
    """In fp32 and contiguous, whatever the options say."""
    metrics: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Work:
    """A case made ready: its variants (the first is the baseline) and the fp64 result they are compared with."""

    variants: dict[str, Variant]
    expected: Run | None = None
    targets: Mapping[str, float] = field(default_factory=dict)
    """Least ratio of our variants over the variant named; "compile" means the best of the compiled ones."""
    least_rounds: int = 5
    timed: bool = True
    """False where the variants' metrics, taken while the case was made ready, are all there is."""


@dataclass
class Case:
    name: str
    make: Callable[[], Work]


def relative_rms(actual: Any, expected: Any) -> float:
    """The largest relative RMS error over the tensors of a result; inf for NaN, missing tensors or wrong shapes."""
    ours, theirs = tree_leaves(actual), tree_leaves(expected)
    if len(ours) != len(theirs):
        return float("inf")
    worst = 0.0
    for a, e in zip(ours, theirs, strict=True):
        if a.shape != e.shape:
            return float("inf")
        difference = (a.detach().double().cpu() - e.detach().double().cpu()).norm().item()
        error = difference / max(e.detach().double().norm().item(), 1e-300)
        worst = max(worst, error if error == error else float("inf"))
    return worst


def compiled(function: Callable[..., Any], call: Callable[[Callable[..., Any]], Any]) -> dict[str, Variant]:
    """`call(function)` under torch.compile with both layout settings."""
    functions = {name: torch.compile(function, options={"layout_optimization": on}) for name, on in LAYOUTS.items()}
    return {name: Variant(partial(call, f)) for name, f in functions.items()}


def saved_bytes(run: Callable[[], Any], parameters: Sequence[Tensor] = ()) -> int:
    """Bytes that autograd keeps after `run()` for backward, each storage once, without `parameters`."""
    kept: dict[int, int] = {}
    excluded = {p.untyped_storage().data_ptr() for p in parameters}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in excluded:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    total = sum(kept.values())
    del result
    return total


class LiveBytes(TorchDispatchMode):
    """`peak`: the largest number of bytes alive at a time, of the tensors made inside."""

    def __enter__(self) -> LiveBytes:
        self.live, self.peak = 0, 0
        self.storages: dict[int, weakref.ref[Any]] = {}
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), made=False)  # the result may be a view of a tensor from outside
        result = func(*args, **(kwargs or {}))
        self._note(result, made=True)
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, values: Any, made: bool) -> None:
        for tensor in tree_leaves(values):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes() if made else 0
                if key not in self.storages:
                    self.live += size
                    self.storages[key] = weakref.ref(storage, partial(self._release, key, size))

    def _release(self, key: int, size: int, reference: object) -> None:
        del self.storages[key]
        self.live -= size


def peak_bytes(run: Run) -> tuple[int, Any]:
    """The largest number of bytes alive at a time during `run()`, of tensors made by it, and its result."""
    gc.collect()
    with LiveBytes() as live:
        result = run()
    return live.peak, result


class Timer:
    """Seconds of one call: by the clock, or on a GPU by events, from a cold cache."""

    def __init__(self, gpu: Gpu | None = None) -> None:
        self.gpu = gpu

    def __call__(self, run: Run, repeats: int = 1) -> float:
        if self.gpu is not None:
            return self.gpu.seconds(run)
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats


def percentile(values: Sequence[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))]


@contextmanager
def products_in(dtype: str) -> Iterator[None]:
    """Inside, matrix products and convolutions of fp32 numbers are in tf32 if `dtype` is."""
    matrix, cudnn = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matrix)
        torch.backends.cudnn.allow_tf32 = cudnn


def autocast_to_bf16(run: Run, device: str) -> Run:
    """Each call enters autocast anew, as each step of a training does: no cast of a parameter is kept."""

    def run_under_autocast() -> Any:
        with torch.autocast(device, torch.bfloat16):
            return run()

    return run_under_autocast


def measure(case: Case, options: Options) -> list[dict[str, Any]]:
    """One record for each variant of the case."""
    with products_in(options.dtype):
        return _measure(case, options)


def _record(case: Case, name: str, variant: Variant, options: Options) -> dict[str, Any]:
    """What is known of a variant before it runs."""
    dtype, layout = ("fp32", "contiguous") if variant.plain else (options.dtype, options.layout)
    record = {"case": case.name + options.words, "variant": name, "dtype": dtype, "layout": layout}
    return record | {"ours": variant.ours, **variant.metrics}


def _measure(case: Case, options: Options) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    if options.dtype == "autocast":
        work = autocast_to_bf16(case.make, options.device)()
        for variant in work.variants.values():
            if variant.run is not None and not variant.plain:
                variant.run = autocast_to_bf16(variant.run, options.device)
    else:
        work = case.make()
    if not work.timed:
        return [
            _record(case, name, variant, options) | {"status": variant.note or "ok"}
            for name, variant in work.variants.items()
        ]
    names = list(work.variants)
    expected = None if work.expected is None else work.expected()
    records: dict[str, dict[str, Any]] = {}
    running: dict[str, Run] = {}

    def attempt(name: str, variant: Variant) -> None:
        baseline = records.get(names[0], {}).get("error", ROUNDED / 2)
        relative = options.dtype in ("tf32", "autocast") and not variant.plain
        ours = max(2 * baseline, CAST if options.dtype == "autocast" else 0.0)
        allowed = None if not relative else ours if variant.ours else ROUNDED
        records[name], run = try_variant(_record(case, name, variant, options), variant, expected, allowed)
        if run is not None:
            running[name] = run

    for name, variant in work.variants.items():
        attempt(name, variant)
    if options.gpu is not None:
        for name, variant in graphs(work, running, options.gpu).items():
            attempt(name, variant)
    times = interleave(running, Timer(options.gpu), options.budget, work.least_rounds)
    baseline = times.get(names[0])
    for name, values in times.items():
        record = records[name]
        record |= {f"p{q}_ms": percentile(values, q / 100) * 1e3 for q in (20, 50, 80)} | {"rounds": len(values)}
        if baseline:
            record["ratio"] = statistics.median(b / v for b, v in zip(baseline, values, strict=True))
    if options.gpu is not None and names[0] in running:
        moved, flops = footprint(running[names[0]])
        for name, values in times.items():
            if records[name]["dtype"] == options.dtype:
                records[name] |= fractions(statistics.median(values), moved, flops, options.peaks, options.dtype)
    else:
        add_targets(work, records, times)  # the targets are a CPU's
    return list(records.values())


def try_variant(
    record: dict[str, Any], variant: Variant, expected: Any, allowed: float | None = None
) -> tuple[dict[str, Any], Run | None]:
    """The record with what its variant's first call adds, and what to time unless it cannot run or is wrong.

    allowed: the largest relative RMS error; None: what goes with the result's dtype.
    """
    if variant.run is None:
        return record | {"status": f"not measured: {variant.note}"}, None
    begin = time.perf_counter()
    try:
        result = variant.run()
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else ""
        return record | {"status": f"FAILED: {type(error).__name__}: {reason}"}, None
    record["cold_start_s"] = time.perf_counter() - begin
    if expected is not None and variant.compared:
        record["error"] = relative_rms(result, expected)
        dtype = next(leaf.dtype for leaf in tree_leaves(result))
        limit = TOLERANCE[dtype] * (1.0 if variant.ours else BASELINE_SLACK) if allowed is None else allowed
        if not record["error"] <= limit:
            return record | {"status": f"FAILED: relative RMS error {record['error']:.1e} > {limit:.0e}"}, None
    return record | {"status": variant.note or "ok"}, variant.run


def graphs(work: Work, running: Mapping[str, Run], gpu: Gpu) -> dict[str, Variant]:
    """For each variant that runs, its CUDA graph, which pays for no launch."""
    captures = {}
    for name, run in running.items():
        if not any(isinstance(leaf, Tensor) and leaf.device.type == gpu.device for leaf in tree_leaves(run())):
            continue
        original = work.variants[name]
        try:
            captured = gpu.capture(run)
        except Exception as error:
            gpu.synchronize()
            reason = str(error).splitlines()[0][:80] if str(error) else ""
            captures[name + GRAPH] = Variant(None, note=f"cannot be captured: {type(error).__name__}: {reason}")
        else:
            captures[name + GRAPH] = replace(original, run=captured, metrics={})
    return captures


def interleave(runs: Mapping[str, Run], timer: Timer, budget: float, least_rounds: int = 5) -> dict[str, list[float]]:
    """Times of each run, in rounds; each round calls every run, beginning one further than the last."""
    repeats = {}
    for name, run in runs.items():
        run()
        # On a GPU each call is timed by itself, from a cold cache.
        repeats[name] = 1 if timer.gpu else max(1, min(100, int(1e-3 / max(timer(run), 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    order, begin, rounds = list(runs), time.perf_counter(), 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while order and (rounds < least_rounds or (time.perf_counter() - begin < budget and rounds < 1000)):
            for name in order:
                times[name].append(timer(runs[name], repeats[name]))
            order.append(order.pop(0))
            rounds += 1
    finally:
        if collecting:
            gc.enable()
    return times


def add_targets(work: Work, records: dict[str, dict[str, Any]], times: Mapping[str, list[float]]) -> None:
    """Write beside our records the ratio over each baseline that has a target, and whether the target is met."""
    for name, variant in work.variants.items():
        if not variant.ours or name not in times:
            continue
        record = records[name]
        for rival, target in work.targets.items():
            rivals = [n for n in times if n == rival or (rival == "compile" and n.startswith("compile"))]
            if not rivals:
                continue
            ratios = [statistics.median(r / o for r, o in zip(times[n], times[name], strict=True)) for n in rivals]
            record[f"over_{rival}"], record[f"target_over_{rival}"] = min(ratios), target


def failed(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether one of our variants failed the gate."""
    return any(record["ours"] and record["status"].startswith("FAILED") for record in records)
