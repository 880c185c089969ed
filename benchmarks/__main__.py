"""`python -m benchmarks [SUITE ...]`: run suites, print tables, write records and plots.

`report` renders the records again; `static` reads the kernels' machine code and counts their traffic and `roofline`
estimates times, both without a GPU; `tune` searches the kernels' tables on one.
"""

from __future__ import annotations

import os
import sys

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
TUNED_MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


COMMANDS = ("roofline", "static", "tune")
"""Modules with a `main(argv)` of their own."""


def main(argv: list[str] | None = None) -> int:
    import argparse
    import importlib
    import tempfile
    from dataclasses import replace
    from pathlib import Path

    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        if argv[0] != "tune" or "--dry-run" in argv:
            os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
        return importlib.import_module(f"{__package__}.{argv[0]}").main(argv[1:])

    from . import records, report
    from .harness import PRECISIONS, Case, Options, failed, measure

    folder = Path(__file__).parent
    suites = sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"{', '.join(suites)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="one small case a suite, no torch.compile")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile too, where it takes seconds (minutes in all)"
    )
    parser.add_argument("--full", action="store_true", help="torch.compile and the largest sizes everywhere")
    parser.add_argument(
        "--precision", nargs="+", choices=PRECISIONS, default=["fp32"],
        help="fp32 (default), its products in tf32, autocast to bf16",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dry-run", action="store_true", help="rehearse --device cuda on the CPU, no figures kept")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of timing for each case (default 1)")
    parser.add_argument(
        "--out", type=Path, help="folder of the records (default: benchmarks/results, of a GPU gpu in it)"
    )
    parser.add_argument("--list", action="store_true", help="name the suites and stop")
    parser.add_argument("--tuned-malloc", action="store_true", help="run with glibc keeping freed memory")
    args = parser.parse_args(argv)
    rehearsal = args.dry_run and args.device == "cuda"
    if args.out is None:
        kept = records.RESULTS / "gpu" if args.device == "cuda" else records.RESULTS
        args.out = Path(tempfile.mkdtemp(prefix="rehearsal-")) if rehearsal else kept
    if args.list:
        print("\n".join(suites))
        return 0
    if args.suites == ["report"]:
        report.write(args.out)
        return 0
    unknown = sorted(set(args.suites) - set(suites))
    if unknown:
        parser.error(f"unknown suite {', '.join(unknown)}; there are {', '.join(suites)}")

    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .gpu import Gpu, Rehearsal

    gpu, extra = None, {}
    if args.dry_run and not rehearsal:
        parser.error("--dry-run rehearses --device cuda")
    if args.device == "cuda":
        if not (rehearsal or torch.cuda.is_available()):
            parser.error("--device cuda: not measured: no GPU (--dry-run rehearses it on the CPU)")
        gpu = Rehearsal() if rehearsal else Gpu()
        torch.backends.cudnn.benchmark = True
        extra = {"peaks": gpu.peaks(), "rehearsal": rehearsal}
        print("measured peaks: " + ", ".join(f"{name} {value:,.4g}" for name, value in extra["peaks"].items()))
    torch.set_num_threads(args.threads)
    quick, device = args.quick or rehearsal, gpu.device if gpu else "cpu"
    budget = 0.01 if rehearsal else 0.1 if quick else args.budget
    options = Options(quick, args.full, args.compile, device, args.precision[0], budget, gpu, extra.get("peaks", {}))

    def work_of(suite: str) -> list[tuple[Case, Options]]:
        """Its cases in every precision; none where a package that it needs is not installed."""
        try:
            module = importlib.import_module(f"{__package__}.bench_{suite}")
        except ModuleNotFoundError as error:
            print(f"{suite}: not measured: {error}", file=sys.stderr)
            return []
        wanted = [replace(options, precision=precision) for precision in args.precision]
        return [(case, options) for options in wanted for case in module.cases(options)]

    work = {suite: work_of(suite) for suite in args.suites or suites}
    wrong, interrupted = not all(work.values()), False
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as progress:
        bar = progress.add_task("benchmarks", total=sum(map(len, work.values())))
        for suite, cases in work.items():
            rows: list[dict[str, object]] = []
            try:
                for i, (case, case_options) in enumerate(cases, 1):
                    progress.update(bar, description=f"{suite}: {case.name}, {case_options.precision}")
                    rows += measure(case, case_options)
                    records.save(args.out, suite, device, rows, complete=i == len(cases), extra=extra)
                    progress.advance(bar)
            except KeyboardInterrupt:
                interrupted = True
                print("\ninterrupted: the finished cases are kept", file=sys.stderr)
            wrong |= failed(rows)
            if interrupted:
                break
    for document in records.load(args.out):
        if document["suite"] in work:
            report.console(document)
    report.write(args.out)
    print(f"records and plots: {args.out}")
    return 130 if interrupted else int(wrong)


def reexecute(argv: list[str]) -> None:
    """Start again with the variables that must be set before torch loads, unless they are."""
    wanted = ENVIRONMENT | (TUNED_MALLOC if "--tuned-malloc" in argv else {})
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *argv], {**os.environ, **missing})


if __name__ == "__main__":
    reexecute(sys.argv[1:])
    sys.exit(main())
