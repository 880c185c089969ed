"""Search of the kernels' static tables on a device: `python -m benchmarks tune`.

A table stands in the file of its kernels and is chosen by architecture, so that no user waits for a search. This one
times the launches that a table decides over with each candidate, behind the check that the results stay the same, and
prints the new table; nobody's files are changed.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .gpu import Gpu, Rehearsal
from .harness import TOLERANCE, relative_rms
from .launches import LAUNCHES, Launch, Shape


@dataclass(frozen=True)
class Table:
    """A table of a file of kernels, or one row of it."""

    name: str
    family: str
    shapes: tuple[Shape, ...]
    """What it decides over."""
    current: Any
    candidates: tuple[Any, ...]
    use: Callable[[Any], None]
    """Puts a candidate in force."""
    launches: tuple[str, ...] = ()
    """Beginnings of the names of the launches it concerns; all if none."""


def _attribute(module: ModuleType, name: str) -> Callable[[Any], None]:
    return lambda value: setattr(module, name, value)


def _haar(device: torch.device) -> Iterator[Table]:
    from swformer_kernels import _common, haar

    target = _common.architecture(device)
    rows = list(haar._TILES.get(target, haar._TILES["default"]))
    shapes: tuple[Shape, ...] = ((1, 16, 256, 256), (2, 40, 256, 256))
    for i, shape in enumerate(shapes):

        def use(candidate: Any, i: int = i) -> None:
            rows[i] = (rows[i][0], *candidate)
            haar._TILES[target] = tuple(rows)

        candidates = tuple(product((1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8)))
        name = f'haar._TILES["{target}"][{i}] (bytes, warps)'
        yield Table(name, "haar", (shape,), rows[i][1:], candidates, use)


def _stream(device: torch.device) -> Iterator[Table]:
    from swformer_kernels import _stream

    strips = ((64, 32, 16), (32, 16), (16,), (128, 64, 32, 16), (64, 32, 16, 8))
    shapes: tuple[Shape, ...] = ((1, 40, 256, 256), (4, 40, 128, 128))
    for family in ("spatial", "wavelet"):
        for name, candidates in (("_STRIP_ROWS", strips), ("_ENOUGH_PROGRAMS", (256, 512, 1024, 2048))):
            current = getattr(_stream, name)
            yield Table(f"_stream.{name} for {family}", family, shapes, current, candidates, _attribute(_stream, name))


def _fourier(device: torch.device) -> Iterator[Table]:
    from swformer_kernels import fourier

    for name, launch, candidates in (
        ("_GRADIENT_FREQUENCIES", "spectrum_mix_backward", (16, 32, 64)),
        ("_PARAMETER_CHANNELS", "spectrum_mix_backward", (16, 32, 64)),
    ):
        table = getattr(fourier, name)
        for precision in table:

            def use(value: Any, table: dict[str, int] = table, precision: str = precision) -> None:
                table[precision] = value

            shapes: tuple[Shape, ...] = ((1, 40, 256, 256), (1, 64, 128, 128))
            launches = (f"{launch} {precision}",)
            yield Table(
                f'fourier.{name}["{precision}"]', "fourier", shapes, table[precision], candidates, use, launches
            )


TABLES: dict[str, Callable[[torch.device], Iterator[Table]]] = {"haar": _haar, "stream": _stream, "fourier": _fourier}


@dataclass
class Trial:
    """A candidate, and its time or why it has none."""

    candidate: Any
    seconds: float = math.inf
    problem: str = ""


def _work(table: Table, shapes: Sequence[Shape], gpu: Gpu) -> list[Launch]:
    def make(*size: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return torch.randn(size, device=gpu.device).to(dtype).contiguous(memory_format=layout)

    launches = [launch for shape in shapes for launch in LAUNCHES[table.family].launches(make, shape) if launch.main]
    return [launch for launch in launches if not table.launches or launch.name in table.launches]


def _seconds(launches: Sequence[Launch], gpu: Gpu, repeats: int) -> float:
    """The geometric mean of the launches' median times."""
    logarithms = []
    for launch in launches:
        times = [gpu.seconds(lambda launch=launch: launch.launcher(*launch.args)) for _ in range(repeats)]
        logarithms.append(math.log(statistics.median(times)))
    return math.exp(statistics.fmean(logarithms))


def _coarser(launch: Launch, result: Tensor) -> torch.dtype:
    """The coarser of a launch's dtype and its result's."""
    first = next(a.dtype for a in launch.args if isinstance(a, Tensor))
    return max((first, result.dtype), key=lambda dtype: TOLERANCE[dtype])


def _try(table: Table, candidate: Any, launches: Sequence[Launch], expected: Sequence[Any], gpu: Gpu) -> Trial:
    table.use(candidate)
    try:
        for launch, result in zip(launches, expected, strict=True):
            for ours, theirs in zip(tree_leaves(launch.launcher(*launch.args)), tree_leaves(result), strict=True):
                # Sums in another order, on both sides.
                if theirs.numel() and relative_rms(ours, theirs) > 10 * TOLERANCE[_coarser(launch, theirs)]:
                    return Trial(candidate, problem=f"wrong result of {launch.name}")
        gpu.synchronize()
        return Trial(candidate, _seconds(launches, gpu, 2 if gpu.device == "cpu" else 10))
    except Exception as error:
        return Trial(
            candidate, problem=f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"
        )
    finally:
        table.use(table.current)


def search(table: Table, gpu: Gpu, shapes: Sequence[Shape], budget: float) -> list[Trial]:
    """Trials of the table's own value and then of each candidate until `budget` seconds have passed."""
    begin = time.perf_counter()
    launches = _work(table, shapes, gpu)
    expected = [launch.launcher(*launch.args) for launch in launches]
    trials = [_try(table, table.current, launches, expected, gpu)]
    for candidate in table.candidates:
        if time.perf_counter() - begin > budget:
            break
        if candidate != table.current:
            trials.append(_try(table, candidate, launches, expected, gpu))
    return trials


def main(argv: Sequence[str]) -> int:
    import argparse

    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table as RichTable

    parser = argparse.ArgumentParser(prog="python -m benchmarks tune", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="rehearse it on the CPU: small shapes, two candidates")
    parser.add_argument("--seconds", type=float, default=120, help="for all tables together (default 120)")
    args = parser.parse_args(argv)
    unknown = sorted(set(args.tables) - set(TABLES))
    if unknown:
        parser.error(f"unknown table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    if not (args.dry_run or torch.cuda.is_available()):
        parser.error("not tuned: no GPU (--dry-run rehearses it on the CPU)")
    gpu = Rehearsal() if args.dry_run else Gpu()
    tables = [table for name in args.tables or TABLES for table in TABLES[name](torch.device(gpu.device))]
    shown = RichTable("table", "now", "best", "times as fast", "tried", "did not run", title_justify="left")
    shown.title = "REHEARSAL ON THE CPU, no figures of a GPU" if args.dry_run else torch.cuda.get_device_name()
    found = []
    with Progress(transient=True) as progress:
        bar = progress.add_task("tuning", total=len(tables))
        try:
            for table in tables:
                progress.update(bar, description=table.name)
                shapes = table.shapes
                if args.dry_run:
                    table = replace(table, candidates=table.candidates[:2])
                    shapes = LAUNCHES[table.family].interpreted[1:]
                trials = search(table, gpu, shapes, args.seconds / len(tables))
                best, failures = min(trials, key=lambda t: t.seconds), [t for t in trials if t.problem]
                found.append(f"{table.name} = {best.candidate}")
                gain = trials[0].seconds / best.seconds
                tried = f"{len(trials)} of {len({table.current, *table.candidates})}"
                problems = "; ".join(f"{t.candidate}: {t.problem}" for t in failures) or "-"
                shown.add_row(table.name, str(table.current), str(best.candidate), f"{gain:.2f}", tried, problems)
                progress.advance(bar)
        except KeyboardInterrupt:
            print("\ninterrupted: the finished tables are below", file=sys.stderr)
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(shown)
    print("\n".join(found))
    return 0 if len(found) == len(tables) else 130
