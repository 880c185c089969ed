"""`python -m benchmarks.inspection.static`: the GPU kernels' launches, read from their machine code, and their traffic.

Needs no GPU. What has not changed, source, arguments and compiler, is neither compiled nor counted again: `.cache/`,
which git ignores, keeps all that was measured, and the record the main launches.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import records, report
from ..progress import progress
from ..report import Table, groups, spread
from ..restart import INTERPRETED, restart
from .compilation import resources_of, triton_kernels
from .launches import LAUNCHES
from .machine_code import ROOT, TARGETS, Resources, cuda_kernels
from .traffic import traffic_rows

CACHE = ROOT / ".cache"
FAMILIES = [*LAUNCHES, "sdo"]
RECORDED = ("target", "family", "launch", "kernel", "registers", "spills", "shared", "occupancy")


def record(results: Iterable[Resources]) -> list[dict[str, Any]]:
    """A line a kernel, target and main launch, which may run the kernel more than once: its worst."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in results:
        if result.main:
            line = {name: getattr(result, name) for name in RECORDED}
            worst = lines.setdefault(tuple(line[name] for name in RECORDED[:4]), line)
            worst |= {name: max(worst[name], line[name]) for name in ("registers", "spills", "shared")}
            worst["occupancy"] = min(worst["occupancy"], line["occupancy"])
    return list(lines.values())


def tables(results: Sequence[Resources]) -> Iterator[Table]:
    rows = [asdict(result) for result in results]
    targets = list(groups(rows, "target"))
    columns = ["family", "kernel", "launches", *(f"{t}: registers, occupancy %" for (t,) in targets)]
    columns += ["spills", "shared KiB", "loads bits", "stores bits", "matrix instr.", "code KiB", "compile s"]
    cells = []
    for (family, kernel), group in groups(rows, "family", "kernel").items():
        by_target = groups(group, "target")
        texts = [
            f"{spread(r['registers'] for r in of)}, {spread(round(100 * r['occupancy']) for r in of)}"
            if (of := by_target.get(target))
            else "-"
            for target in targets
        ]
        widest = [spread(max(map(int, r[kind]), default=0) for r in group) for kind in ("loads", "stores")]
        seconds = [r["compile_s"] for r in group if r["compile_s"] is not None]
        texts += [str(max(r["spills"] for r in group)), spread((r["shared"] / 1024 for r in group), ".3g"), *widest]
        texts += [spread(r["tensor_core"] for r in group), spread((r["code_bytes"] / 1024 for r in group), ".3g")]
        launches = str(max(map(len, by_target.values())))
        cells.append([family, kernel, launches, *texts, spread(seconds, ".2g") if seconds else "-"])
    note = "Read from the machine code; each cell spans the launches and, from the spills on, the targets. Widths: of "
    note += "each launch's widest access. Occupancy: the bound by registers, shared memory and blocks."
    yield Table(note, columns, cells)
    worst = sorted(rows, key=lambda r: (-r["spills"], r["occupancy"], -r["registers"]))
    columns = ["kernel", "target", "launch", "registers", "spills", "shared", "threads", "occupancy"]
    firsts = [group[0] for group in groups(worst, "kernel", "target").values()]
    cells = [[str(first[name]) for name in columns] for first in firsts[:10]]
    yield Table("The launches with the most spills and the fewest warps in flight.", columns, cells)


def traffic_table(rows: Iterable[records.Record]) -> Table:
    cells, last = [], None
    for r in rows:
        cells.append(
            [
                "" if r["launch"] == last else r["launch"],
                r["kernel"],
                f"{r['programs']:,}",
                f"{r['compulsory'] / 1e6:.3g}",
                f"{r['ratio']:.3f}",
                f"{r['program_ratio']:.3f}",
                f"{r['flops'] / 1e6:.4g}",
                f"{r['flops'] / max(r['compulsory'], 1):.3g}",
            ]
        )
        last = r["launch"]
    columns = ["launch", "kernel", "programs", "compulsory MB", "every access", "once a program", "MFLOP", "FLOP/byte"]
    note = "Counted in the interpreter on some programs of each launch and scaled, masked lanes left out. Bytes over "
    note += "the compulsory ones, those of the kernel's tensors: of every access, and of each address once a program."
    return Table(note, columns, cells)


def _cached(name: str) -> Any:
    path = CACHE / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


class Inspection:
    """What is measured, and where it is kept."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.families = args.families or FAMILIES
        self.sources = records.sources()
        self.results: list[Resources] = []
        self.traffic: list[dict[str, Any]] = []
        self.compiled: dict[str, Any] = _cached("static")
        self.counted: dict[str, Any] = _cached("traffic")

    def compile(self) -> None:
        if "sdo" in self.families:
            self.results += cuda_kernels(self.args.targets)
        kernels = [family for family in self.families if family in LAUNCHES]
        everything, earlier = not self.args.quick, [resources_of(row) for row in self.compiled.values()]
        last = time.monotonic()
        with progress() as tell:
            for result in triton_kernels(kernels, self.args.targets, everything, True, earlier, tell):
                self.results.append(result)
                if time.monotonic() - last > 5:
                    self.save_cache()
                    last = time.monotonic()

    def count(self) -> None:
        with progress() as tell:
            kernels = [family for family in self.families if family in LAUNCHES]
            for key, rows in traffic_rows(kernels, self.counted, tell):
                self.traffic += rows
                self.counted[key] = rows
                self.save_cache()

    def save_cache(self) -> None:
        self.compiled |= {result.key: asdict(result) for result in self.results if result.key}
        for name, content in (("static", self.compiled), ("traffic", self.counted)):
            records.write_atomically(CACHE / f"{name}.json", json.dumps(content))

    def save(self, complete: bool) -> None:
        """Tables, records, and with --record the tracked ones, of which those that were not reached stay."""
        self.save_cache()
        complete = complete and not self.args.quick and set(self.families) == set(FAMILIES)
        complete &= set(self.args.targets) == set(TARGETS)
        written = {"static": record(self.results), "traffic": self.traffic}
        report.write_tables(self.args.out, "static", tables(self.results))
        report.write_tables(self.args.out, "traffic", [traffic_table(self.traffic)])
        for suite, lines in written.items():
            rows = [self.sources | line for line in lines]
            records.save(self.args.out, suite, rows)
            if self.args.record and rows:
                records.keep(suite, rows, complete)
        if self.args.record:
            report.write(records.RESULTS)

    def summary(self) -> str:
        lines = ["Read from the machine code, no GPU: launches, most registers, most spills, least occupancy (a bound)"]
        for (family,), group in groups([asdict(r) for r in self.results], "family").items():
            launches, occupancy = len(groups(group, "launch")), min(r["occupancy"] for r in group)
            numbers = [max(r[name] for r in group) for name in ("registers", "spills")]
            lines.append(f"  {family:18s} {launches:4d} {numbers[0]:6d} {numbers[1]:6d} {100 * occupancy:6.0f} %")
        return "\n".join([*lines, f"Every kernel: {self.args.out}/static.md, traffic.md; records: *.csv beside them"])


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspection.static", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"{', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="the main launches only, at one shape")
    parser.add_argument("--out", type=Path, default=records.OUTPUT, help="folder of records and tables")
    parser.add_argument("--record", action="store_true", help="update the tracked records, benchmarks/results, too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line()
    args = parser.parse_args(argv)
    unknown = sorted(set(args.families) - set(FAMILIES))
    if unknown:
        parser.error(f"unknown family {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    inspection = Inspection(args)
    try:
        inspection.compile()
        inspection.count()
    except KeyboardInterrupt:
        inspection.save(complete=False)
        print("\ninterrupted: what was measured is kept, and will not be measured again", file=sys.stderr)
        return 130
    inspection.save(complete=True)
    print(inspection.summary())
    return 0


if __name__ == "__main__":
    restart("benchmarks.inspection.static", INTERPRETED)
    sys.exit(main())
