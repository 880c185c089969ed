"""`python -m benchmarks.inspection.roofline`: estimates for GPUs that are not there.

Bytes, arithmetic and launches are counted, times are bounds from data sheets.

A `Ledger` runs the real code on the CPU and writes down what a GPU would run: PyTorch's operators one by one, and
our kernels, whose programs the interpreter runs a few of (`interpret.count_traffic`). An estimate is, for each launch,
the longest of its bytes over the memory's bandwidth, its bytes over the second-level cache's, and its arithmetic over
the peak, and never less than the gap between two launches: no kernel reaches its bound, ours or PyTorch's.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import swformer_fast as sf
from swformer_fast import backend

from .. import records, report
from ..harness import Case, Run, Variant, Work
from ..op_cases import forward_run, module_run, train_run
from ..progress import progress
from ..report import Table, groups, spread
from ..restart import INTERPRETED, restart
from .arguments import ARGUMENTS, functions
from .interpret import Counted, compulsory, count_traffic


@dataclass(frozen=True)
class Device:
    """Data-sheet figures: bytes and FLOP a second."""

    name: str
    memory: float
    cache: float
    """Of the second-level (AMD: Infinity) cache."""
    fp32: float
    tf32: float
    """Matrix products of fp32 numbers with reduced precision, dense."""


DEVICES = (
    Device("A100 80 GB SXM", 2.04e12, 7.2e12, 19.5e12, 156e12),
    Device("H100 SXM", 3.35e12, 5.5e12, 66.9e12, 494e12),
    Device("H200 SXM", 4.8e12, 5.5e12, 66.9e12, 494e12),
    Device("RTX 4090", 1.01e12, 5.0e12, 82.6e12, 82.6e12),
    Device("MI300X", 5.3e12, 17.2e12, 163.4e12, 653.7e12),
)
RANKED_ON = next(device for device in DEVICES if device.name == "H100 SXM")
"""By whose times the entries of a case are ranked."""
LAUNCH_SECONDS = 3e-6
"""From one kernel's start to the next one's, however little they do; a CUDA graph or enough work hides the CPU."""
ASSUMPTIONS = (
    ("memory and peak rates", "the vendors' data sheets, reached in full by every kernel"),
    (
        "second-level cache",
        "the vendors' peak (A100, MI300X), else published measurements; our kernels' re-reads hit it",
    ),
    (
        "least time of a launch",
        f"{LAUNCH_SECONDS * 1e6:.0f} us; launches of one stream follow one another, the CPU keeps up",
    ),
    ("an operator of PyTorch", "reads its inputs and writes its outputs once, in one launch, but for the next rows"),
    (
        "2-D FFT",
        "a launch and a pass over memory for each dimension, one for the scale if there is one; the inverse copies its "
        "input first",
    ),
    ("batch norm, training", "reads its input twice, backward input and gradient twice; two launches"),
    ("convolution, backward", "one launch for each gradient; a bias costs one more"),
    ("upsampling, pooling, backward", "two launches: the gradient is cleared, then added to"),
    ("precision", "products of fp32 numbers in fp32 on both sides; the tf32 columns: with tensor cores on both sides"),
)


@dataclass
class Entry:
    """What is launched for one operator or kernel."""

    name: str
    launches: int
    bytes: float
    """Inputs and outputs, each once."""
    cache_bytes: float
    """What the second-level cache serves."""
    flops: float = 0
    matrix_flops: float = 0
    ours: bool = False

    def seconds(self, device: Device, tf32: bool) -> float:
        compute = self.flops / device.fp32 + self.matrix_flops / (device.tf32 if tf32 else device.fp32)
        longest = max(self.bytes / device.memory, self.cache_bytes / device.cache, compute)
        return max(longest, self.launches * LAUNCH_SECONDS)


FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "lift_fresh",
    "_unsafe_view",
}
FREE |= {"_reshape_alias", "set_", "resize_", "is_same_size", "_local_scalar_dense"}
OVERWRITING = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
TWICE = {"native_batch_norm", "_native_batch_norm_legit", "native_batch_norm_backward"}
CLEARED = {"avg_pool2d_backward", "upsample_bilinear2d_backward", "max_pool2d_with_indices_backward"}


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _fft_passes(name: str, args: Sequence[Any], source: int, result: int) -> tuple[int, float, float]:
    """Launches, bytes and FLOP of a transform over some dimensions."""
    x, dims, normalization, *_ = args
    complex_bytes = max(source, result)
    count = math.prod(x.shape[d] for d in dims) or 1
    flops = 5 * x.numel() * math.log2(max(count, 2)) / (1 if x.is_complex() else 2)
    copies, scales = name == "_fft_c2r", normalization != 0
    passes = source + result + 2 * complex_bytes * (len(dims) - 1)
    return len(dims) + copies + scales, passes + copies * 2 * source + scales * 2 * result, flops


def aten_entry(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Entry | None:
    """What PyTorch's kernel for a call costs; None where nothing is launched."""
    name = func._schema.name.split("::")[1]
    if name in FREE or _is_view(func):
        return None
    of_list = name.startswith("_foreach_") and name.endswith("_")  # which returns nothing
    outputs = [t for t in tree_leaves(args[0] if of_list else result) if isinstance(t, Tensor)]
    if not any(t.numel() for t in outputs):
        return None
    source, stored = compulsory((args, kwargs), ())[0], compulsory((), outputs)[1]
    launches, moved, flops, matrix = 1, float(source + stored), float(sum(t.numel() for t in outputs)), 0.0
    if name in OVERWRITING:
        moved -= args[0].nbytes
    if name in ("_fft_r2c", "_fft_c2r", "_fft_c2c"):
        launches, moved, flops = _fft_passes(name, args, source, stored)
    elif func.overloadpacket in flop_registry:
        flops, matrix = 0.0, float(flop_registry[func.overloadpacket](*args, **kwargs, out_val=result))
        if name == "convolution_backward":
            launches = sum(bool(wanted) for wanted in args[-1])
        elif name == "convolution":
            launches = 1 + (args[2] is not None)
    elif name in TWICE:
        statistics = name.endswith("backward") or (args[5] if name == "native_batch_norm" else True)
        launches, moved = (2, moved + source) if statistics else (1, moved)
    elif name in CLEARED:
        launches, moved = 2, moved + stored
    return Entry(f"aten::{name}", launches, moved, moved, flops, matrix)


IMPLICIT = torch._C.DispatchKey.CompositeImplicitAutograd


class Ledger(TorchDispatchMode):
    """Inside `recording()`, writes down the launches that a GPU would run for what runs on the CPU.

    sample: programs of each of our kernels that are interpreted; results are wrong, as few programs run.
    """

    def __init__(self, sample: int = 4, counted: Counted | None = None) -> None:
        super().__init__()
        self.sample = sample
        self.counted = {} if counted is None else counted
        self.entries: list[Entry] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "swformer_fast":
            with self:
                return backend.run(backend.OPS[name], (*args, *kwargs.values()))
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), IMPLICIT):
            # Below autograd, where our ops run, PyTorch hands on operators that are made of others.
            with self:
                return func._op_dk(IMPLICIT, *args, **kwargs)
        result = func(*args, **kwargs)
        if namespace == "sdo_fast":
            moved = float(sum(compulsory((args, kwargs), result)))
            self.entries.append(Entry(name, 1, moved, moved, ours=True))
        elif (entry := aten_entry(func, args, kwargs, result)) is not None:
            self.entries.append(entry)
        return result

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Ops take the kernels that they would take on a GPU."""
        with backend.as_on_gpu(), count_traffic(self.sample, self.counted) as traffic, self:
            yield
        for kernel in traffic.kernels:
            by_program = kernel.program_loaded + kernel.program_stored
            flops = kernel.simple + kernel.special
            self.entries.append(Entry(kernel.kernel, 1, kernel.compulsory, by_program, flops, kernel.dot, ours=True))


# cases ----------------------------------------------------------------------------------------------------------------


def pair(theirs: Run, ours: Run) -> Work:
    """The same in PyTorch and with our modules or ops."""
    return Work({"PyTorch": Variant(theirs), "ours": Variant(ours, ours=True)}, timed=False)


def _op_cases(shape: tuple[int, ...]) -> Iterator[Case]:
    def make(name: str, train: bool) -> Work:
        torch.manual_seed(0)
        args = ARGUMENTS[name](shape)
        fast, reference = functions(name)
        with torch.no_grad():
            grad = torch.randn_like(reference(*args))
        theirs, ours = (train_run(f, args, grad) if train else forward_run(f, args) for f in (reference, fast))
        return pair(theirs, ours)

    for name in ARGUMENTS:
        yield Case(f"{name} forward", partial(make, name, False))
        yield Case(f"{name} forward+backward", partial(make, name, True))


def _model_cases(block: tuple[int, ...], image: tuple[int, ...], preset: str) -> Iterator[Case]:
    def make(build: Callable[[Any], nn.Module], size: tuple[int, ...], train: bool) -> Work:
        models = [build(package).train(train) for package in (sf.reference, sf)]
        x = torch.randn(size, dtype=next(models[0].parameters()).dtype)
        return pair(*(module_run(model, x, train) for model in models))

    def build_block(package: Any) -> nn.Module:
        return package.SWFormerBlock(block[1])

    def build_bf16(package: Any) -> nn.Module:
        return build_block(package).bfloat16()

    def build_network(package: Any) -> nn.Module:
        return package.SWFormer.from_preset(preset, exit="small")

    yield Case("block eval", partial(make, build_block, block, False))
    yield Case("block training step", partial(make, build_block, block, True))
    yield Case("block eval bf16", partial(make, build_bf16, block, False))
    yield Case("block training step bf16", partial(make, build_bf16, block, True))
    yield Case(f"{preset}, small eval", partial(make, build_network, image, False))
    yield Case(f"{preset}, small training step", partial(make, build_network, image, True))


def _sdo_cases(shape: tuple[int, ...]) -> Iterator[Case]:
    """One guided step of a sampler, and the shortcut's cotangents."""
    import sdo_fast

    def make(backward: bool) -> Work:
        x, cond, uncond = (torch.randn(shape) for _ in range(3))
        ops = torch.ops.sdo_fast
        if backward:
            args = (x, 157.0, -12.5, 5.0, None, None, None, 0.0, 0.0, 0.0, None)
            return pair(
                lambda: sdo_fast.reference.shortcut_backward(*args),
                lambda: ops.shortcut_backward(*args, True, True, True),
            )
        step = (x, cond, uncond, 5.0, 0.9, 0.1, [x], [0.5], 0.0, 0.0, 0.0, None)
        return pair(lambda: sdo_fast.reference.sampler_step(*step), lambda: ops.sampler_step(*step))

    yield Case("sampler_step", partial(make, False))
    yield Case("shortcut_backward", partial(make, True))


def cases(quick: bool) -> list[Case]:
    shape, image, preset = (
        ((1, 4, 16, 16), (1, 3, 32, 32), "tiny") if quick else ((1, 40, 256, 256), (1, 3, 256, 256), "derain")
    )
    return [*_op_cases(shape), *_sdo_cases((4, 4, 128, 128)), *_model_cases(shape, image, preset)]


def _total(entries: Sequence[Entry]) -> dict[str, Any]:
    sums: dict[str, Any] = {"launches": sum(e.launches for e in entries)}
    for name in ("bytes", "cache_bytes", "flops", "matrix_flops"):
        sums[name] = round(sum(getattr(e, name) for e in entries))
    for device in DEVICES:
        for precision in ("fp32", "tf32"):
            seconds = sum(e.seconds(device, precision == "tf32") for e in entries)
            sums[f"us {device.name} {precision}"] = round(seconds * 1e6, 2)
    largest: dict[str, float] = {}
    for e in entries:
        largest[e.name] = largest.get(e.name, 0.0) + e.seconds(RANKED_ON, False) * 1e6
    ranked = sorted(largest.items(), key=lambda item: -item[1])[:6]
    return sums | {"largest_us": {name: round(us, 1) for name, us in ranked}}


def measure(case: Case, sample: int, counted: Counted) -> list[dict[str, Any]]:
    """One record for PyTorch and one for ours: counts, and the estimate for each device."""
    rows = []
    for name, variant in case.make().variants.items():
        assert variant.run is not None
        ledger = Ledger(sample, counted)
        with ledger.recording():
            variant.run()
        mine = sum(e.launches for e in ledger.entries if e.ours)
        rows.append({"case": case.name, "variant": name, **_total(ledger.entries), "our_kernels": mine})
    return rows


# the command ----------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[records.Record]) -> Iterator[Table]:
    yield Table("ESTIMATES, no measurements: counts are exact, times are bounds. Assumptions:", ("", ""), ASSUMPTIONS)
    note = "Data-sheet figures: GB/s of memory and second-level cache, TFLOP/s of fp32 and of tf32 matrix products."
    sheets = [(d.name, f"{d.memory / 1e9:,.0f}", f"{d.cache / 1e9:,.0f}", f"{d.fp32 / 1e12:g}", f"{d.tf32 / 1e12:g}")
              for d in DEVICES]  # fmt: skip
    yield Table(note, ("GPU", "memory", "cache", "fp32", "tf32"), sheets)
    counts, estimates, shares = [], [], []
    for (case,), (theirs, ours) in groups(rows, "case").items():
        both = (theirs, ours)
        launches = [f"{r['launches']:,}" for r in both]
        moved = [f"{r['bytes'] / 1e6:,.4g}" for r in both]
        flops = [f"{(r['flops'] + r['matrix_flops']) / 1e9:.3g}" for r in both]
        ratio = f"{theirs['bytes'] / ours['bytes']:.2f}"
        counts.append((case, *launches, str(ours["our_kernels"]), *moved, ratio, *flops))
        keys = [key for key in theirs if key.startswith("us ")]
        cells = (f"{theirs[k]:,.0f} / {ours[k]:,.0f} = {theirs[k] / ours[k]:.2f}" for k in keys if k.endswith("fp32"))
        tf32 = (theirs[k] / ours[k] for k in keys if k.endswith("tf32"))
        estimates.append((case, *cells, spread(tf32, ".2f")))
        shares.append((case, *("; ".join(f"{n} {us:g}" for n, us in r["largest_us"].items()) for r in both)))
    columns = ["case", "launches, PyTorch", "ours", "of our kernels", "MB, PyTorch", "ours", "ratio"]
    columns += ["GFLOP, PyTorch", "ours"]
    yield Table("Counted: every input and output of a launch once.", columns, counts)
    columns = ["case", *(d.name for d in DEVICES), "with tf32, all GPUs"]
    yield Table("ESTIMATE: microseconds, PyTorch / ours = ratio, in fp32.", columns, estimates)
    yield Table(f"ESTIMATE: where the time goes, us on {RANKED_ON.name}.", ("case", "PyTorch", "ours"), shares)


def summary(rows: Sequence[records.Record], out: Path) -> str:
    lines = ["ESTIMATES, no measurements. PyTorch / ours: launches, MB (counted); times as fast in fp32 on five GPUs"]
    for (case,), (theirs, ours) in groups(rows, "case").items():
        counts = f"{theirs['launches']:6,} / {ours['launches']:5,} {theirs['bytes'] / 1e6:8,.0f} / "
        ratios = spread((theirs[f"us {d.name} fp32"] / ours[f"us {d.name} fp32"] for d in DEVICES), ".2g")
        lines.append(f"  {case:34s} {counts}{ours['bytes'] / 1e6:6,.0f} {ratios:>8s}")
    return "\n".join([*lines, f"Every case: {out}/roofline.md; records: {out}/roofline.csv"])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspection.roofline", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes")
    parser.add_argument("--sample", type=int, default=4, help="programs of a launch that are interpreted (default 4)")
    parser.add_argument("--out", type=Path, default=records.OUTPUT, help="folder of records and tables")
    parser.add_argument("--record", action="store_true", help="update the tracked records, benchmarks/results, too")
    args = parser.parse_args(argv)
    if args.record and args.quick:
        parser.error("--record keeps figures of full size, not --quick ones")
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    work, counted, sources = cases(args.quick), Counted(), records.sources()
    interrupted = False
    with progress(len(work)) as tell:
        try:
            for case in work:
                tell(case.name)
                rows += [sources | row for row in measure(case, args.sample, counted)]
                records.save(args.out, "roofline", rows)
        except KeyboardInterrupt:
            interrupted = True
            print("\ninterrupted: the finished cases are kept", file=sys.stderr)
    report.write_tables(args.out, "roofline", tables(rows))
    if args.record:
        records.keep("roofline", rows, not interrupted)
        report.write(records.RESULTS)
    print(summary(rows, args.out))
    return 130 if interrupted else 0


if __name__ == "__main__":
    restart("benchmarks.inspection.roofline", INTERPRETED)
    sys.exit(main())
