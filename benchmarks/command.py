"""`python -m benchmarks [SUITE ...]`: time suites, print a summary, write records and tables.

`report` renders the tracked records again. What needs no clock is in `benchmarks.inspection`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import records, report
from .gpu import Gpu, Rehearsal
from .harness import DTYPES, FORMATS, HALF, Case, Options, failed, measure
from .progress import progress

SUITES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
MODELS = ("block", "network")
"""Suites of models, which take every dtype and layout."""

Plan = Mapping[str, Sequence[tuple[Case, Options]]]
"""The cases of each suite."""


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} (default: all)")
    add("--quick", action="store_true", help="one small case a suite, no torch.compile")
    add("--compile", action="store_true", help="torch.compile too, where it takes seconds (minutes in all)")
    add("--full", action="store_true", help="torch.compile and the largest sizes everywhere")
    dtypes = "fp32 (default), products in tf32, autocast to bf16; of block and network bf16 and fp16 too"
    add("--dtype", nargs="+", choices=DTYPES, default=["fp32"], help=dtypes)
    add("--layout", nargs="+", choices=FORMATS, default=["contiguous"], help="of block and network (contiguous)")
    add("--threads", type=int, default=1)
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--dry-run", action="store_true", help="rehearse --device cuda on the CPU, no figures kept")
    add("--budget", type=float, default=1.0, help="seconds of timing for each case (default 1)")
    add("--out", type=Path, help="folder of records and tables (default: benchmarks/output, which git ignores)")
    add("--record", action="store_true", help="update the tracked records, benchmarks/results, too")
    add("--list", action="store_true", help="name the suites and stop")
    add("--tuned-malloc", action="store_true", help="run with glibc keeping freed memory")
    return parser


def check(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Ends with an error where the arguments do not go together or cannot be met here."""
    unknown = sorted(set(args.suites) - set(SUITES))
    if unknown:
        parser.error(f"unknown suite {', '.join(unknown)}; there are {', '.join(SUITES)}")
    half, others = {*HALF} & {*args.dtype}, [suite for suite in args.suites or SUITES if suite not in MODELS]
    if others and (half or args.layout != ["contiguous"]):
        parser.error(f"half precision and layouts are of {' and '.join(MODELS)}, not of {', '.join(others)}")
    if args.dry_run and args.device != "cuda":
        parser.error("--dry-run rehearses --device cuda")
    if args.record and (args.quick or args.dry_run):
        parser.error("--record keeps figures of full size, neither --quick nor --dry-run ones")
    if args.device == "cuda" and not (args.dry_run or torch.cuda.is_available()):
        parser.error("--device cuda: not measured: no GPU (--dry-run rehearses it on the CPU)")


def prepare(args: argparse.Namespace, out: Path) -> tuple[Options, dict[str, Any]]:
    """The options of the cases, and the columns that every record has."""
    torch.set_num_threads(args.threads)
    gpu: Gpu | None = None
    device, peaks = "cpu", dict[str, float]()
    extra: dict[str, Any] = {}
    if args.device == "cuda":
        gpu = Rehearsal() if args.dry_run else Gpu()
        device, peaks = gpu.device, gpu.peaks()
        torch.backends.cudnn.benchmark = True
        extra = {"peaks": ", ".join(f"{name} {value:,.4g}" for name, value in peaks.items())}
        extra |= {"rehearsal": True} if args.dry_run else {}
        print(f"measured peaks: {extra['peaks']}")
    budget = 0.01 if args.dry_run else 0.1 if args.quick else args.budget
    quick = args.quick or args.dry_run
    options = Options(quick, args.full, args.compile, device, budget=budget, out=out, gpu=gpu, peaks=peaks)
    return options, records.environment(device) | extra


def cases_of(suite: str, options: Options, dtypes: Sequence[str], layouts: Sequence[str]) -> list[tuple[Case, Options]]:
    """Its cases in every dtype and layout; none where a package that it needs is not installed."""
    try:
        module = importlib.import_module(f"{__package__}.bench_{suite}")
    except ModuleNotFoundError as error:
        print(f"{suite}: not measured: {error}", file=sys.stderr)
        return []
    settings = [replace(options, dtype=dtype, layout=layout) for dtype in dtypes for layout in layouts]
    return [(case, setting) for setting in settings for case in module.cases(setting)]


def run(work: Plan, environment: Mapping[str, Any], out: Path, record: bool) -> tuple[dict[str, Any], bool]:
    """The records of each suite begun, on disk too from case to case, and whether Ctrl-C ended it."""
    results: dict[str, list[records.Record]] = {}
    with progress(sum(map(len, work.values()))) as tell:
        for suite, cases in work.items():
            rows = results.setdefault(suite, [])
            try:
                for i, (case, options) in enumerate(cases, 1):
                    tell(f"{suite}: {case.name}{options.words}")
                    rows += [{**environment, **row} for row in measure(case, options)]
                    records.save(out, suite, rows)
                    if record:
                        records.keep(suite, rows, complete=i == len(cases))
            except KeyboardInterrupt:
                return results, True
    return results, False


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line()
    args = parser.parse_args(argv)
    if args.list:
        print("\n".join(SUITES))
        return 0
    if args.suites == ["report"]:
        report.write(args.out or records.RESULTS)
        return 0
    check(args, parser)
    out = args.out or (Path(tempfile.mkdtemp(prefix="rehearsal-")) if args.dry_run else records.OUTPUT)
    options, environment = prepare(args, out)
    work = {suite: cases_of(suite, options, args.dtype, args.layout) for suite in args.suites or SUITES}
    results, interrupted = run(work, environment, out, args.record)
    if interrupted:
        print("\ninterrupted: the finished cases are kept", file=sys.stderr)
    measured = {suite: rows for suite, rows in results.items() if rows}
    for suite, rows in measured.items():
        report.write_tables(out, suite, report.timings(rows))
    report.plots(out, measured)
    if args.record:
        report.write(records.RESULTS)
    print(report.summary(measured, out))
    wrong = not all(work.values()) or any(failed(rows) for rows in measured.values())
    return 130 if interrupted else int(wrong)
