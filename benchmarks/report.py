"""Tables, a summary and plots, made from the records alone."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import records
from .records import Record

INSPECTED = ("roofline", "static", "traffic")
"""Suites of `benchmarks.inspection`, which have no times."""
UNLIKE = (*INSPECTED, "paths", "sdo", "reuse", "sampler_step")
"""Suites whose baseline is not plain PyTorch."""
SHOWN = {"case", "variant", "ours", "status", "error", "p20_ms", "p50_ms", "p80_ms", "rounds", "ratio", "cold_start_s"}
SHOWN |= {"date", "commit", "dirty", "torch", "triton", "versions", "peaks", *records.PLACE, *records.SETTING}
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
"""Okabe and Ito's palette: told apart with any kind of colour vision."""
NO_GPU = "not measured: no GPU"
ONE_STEP, FLOOR, FULL = "one step (checkpoint)", "sampling alone (floor)", "full backprop"
"""Variants of suite `sdo`."""


@dataclass(frozen=True)
class Table:
    """Cells, and the words above them."""

    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.note, "", f"| {' | '.join(self.columns)} |", "|" + " --- |" * len(self.columns)]
        return "\n".join([*lines, *(f"| {' | '.join(cells)} |" for cells in self.rows), ""])


def groups(rows: Iterable[Record], *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    result: dict[tuple[Any, ...], list[Record]] = {}
    for record in rows:
        result.setdefault(tuple(record.get(key) for key in keys), []).append(record)
    return result


def spread(values: Iterable[float], form: str = "g") -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:{form}}" if f"{low:{form}}" == f"{high:{form}}" else f"{low:{form}}-{high:{form}}"


def number(value: float) -> str:
    """Three digits, and all those before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def place(record: Record) -> str:
    """Where a record was taken, in words."""
    words = [f"{record['device']} ({record['capability']})"]
    if record["threads"] != 1:
        words.append(f"{record['threads']} threads")
    if "MALLOC" in record.get("variables", ""):
        words.append("tuned malloc")
    return ("REHEARSAL ON THE CPU, no figures of a GPU: " if record.get("rehearsal") else "") + ", ".join(words)


def commit(record: Record) -> str:
    tree = {True: "with uncommitted changes", False: "clean", None: "changes unknown"}[record.get("dirty")]
    return f"commit {record.get('commit')} ({tree}), {record['date']}"


# every case -----------------------------------------------------------------------------------------------------------


def remarks(record: Record) -> str:
    parts = [] if record["status"] == "ok" else [record["status"]]
    for key, value in record.items():
        if key.startswith("over_"):
            target = record[f"target_{key}"]
            parts.append(f"{value:.2f}x {key[5:]} (target {target:.3g}: {'met' if value >= target else 'MISSED'})")
        elif key.startswith("of_"):
            parts.append(f"{100 * value:.3g} % of the measured {key[3:]} rate")
        elif key not in SHOWN and not key.startswith("target_"):
            parts.append(f"{key} {value:,.3g}" if isinstance(value, float) else f"{key} {value:,}")
    return "; ".join(parts)


def row(record: Record) -> tuple[str, ...]:
    def cell(key: str, form: str) -> str:
        return format(record[key], form) if key in record else "-"

    return (
        record["case"],
        record["variant"],
        cell("p50_ms", ".3f"),
        cell("ratio", ".2f"),
        cell("error", ".1e"),
        cell("cold_start_s", ".2f"),
        remarks(record),
    )


def timings(rows: Sequence[Record]) -> Iterator[Table]:
    """Every record, a table for each place."""
    for of_place in groups(rows, *records.PLACE).values():
        first, last, cells = of_place[0], None, []
        for record in of_place:
            case, *others = row(record)
            cells.append(["" if case == last else case, *others])
            last = case
        note = (
            f"{place(first)}, {first['threads']} thread(s), torch {first['torch']}, {commit(first)}. Ratio: the first "
        )
        note += "variant's time over this one's, median over interleaved rounds."
        if "peaks" in first:
            note += f" Measured peaks: {first['peaks']}."
        columns = ("case", "variant", "median ms", "ratio", "rel. RMS error", "first call s", "remarks")
        yield Table(note, columns, cells)


def write_tables(folder: Path, suite: str, tables: Iterable[Table]) -> None:
    records.write_atomically(folder / f"{suite}.md", "\n".join([f"# {suite}\n", *(t.markdown() for t in tables)]))


# headlines ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """How one case of ours did."""

    work: str
    """The case without its size."""
    case: str
    variants: Mapping[str, Record]
    ours: Record

    @property
    def reference(self) -> Record:
        return next(iter(self.variants.values()))

    @property
    def compiled(self) -> float | None:
        """Milliseconds under torch.compile, with its better layout setting."""
        names = [n for n in self.variants if n.startswith("compile") and not n.endswith("graph")]
        return min((self.variants[n]["p50_ms"] for n in names if "p50_ms" in self.variants[n]), default=None)

    @property
    def over_compiled(self) -> float | None:
        milliseconds = self.ours["p50_ms"]
        return self.ours.get("over_compile") or (self.compiled and self.compiled / milliseconds)

    @property
    def over_fp32(self) -> float | None:
        """Ours in fp32 and contiguous, timed beside another dtype or layout, over this."""
        plain = self.variants.get("ours, fp32", {})
        return plain["p50_ms"] / self.ours["p50_ms"] if "p50_ms" in plain else None


def speeds(rows: Iterable[Record]) -> list[Speed]:
    """The cases where the baseline and ours were timed."""
    result = []
    for (*_, case), group in groups(rows, *records.PLACE, "case").items():
        variants = {record["variant"]: record for record in group}
        ours = [r for n, r in variants.items() if r["ours"] and "p50_ms" in r and not n.endswith("graph")]
        if ours and "ratio" in ours[0]:
            result.append(Speed(re.sub(r" \d+(x\d+)+", "", case), case, variants, ours[0]))
    return result


def _ratio(of: Sequence[Speed]) -> str:
    """Median and spread over PyTorch, and over torch.compile and ours in fp32 where these were timed."""
    ratios = [speed.ours["ratio"] for speed in of]
    text = f"{statistics.median(ratios):.2g}"
    if len(ratios) > 1:
        text += f" ({spread(ratios, '.2g')})"
    compiled = [speed.over_compiled for speed in of if speed.over_compiled]
    plain = [speed.over_fp32 for speed in of if speed.over_fp32]
    for others, name in ((compiled, "torch.compile"), (plain, "ours in fp32, contiguous")):
        text += f"; {statistics.median(others):.2g} over {name}" if others else ""
    return text


def _by_work(of: Iterable[Speed]) -> dict[str, list[Speed]]:
    result: dict[str, list[Speed]] = {}
    for speed in of:
        result.setdefault(speed.work, []).append(speed)
    return result


def _sdo_lines(rows: Sequence[Record]) -> list[str]:
    """That of most steps first."""
    lines = []
    for (case,), group in groups(rows, "case").items():
        variants = {record["variant"]: record for record in group}
        if {FLOOR, FULL} <= variants.keys() and "ratio" in variants.get(ONE_STEP, ()):
            ours, full = variants[ONE_STEP], variants[FULL]
            lines.append(
                f"{case}: one step's gradient takes {1 / ours['ratio']:.3g} times sampling alone, "
                f"1/{full['peak_bytes'] / ours['peak_bytes']:.0f} of full backpropagation's peak bytes"
            )
    return lines[::-1]


def _reuse_lines(rows: Sequence[Record]) -> list[str]:
    """The default setting first."""
    return [
        f"{r['case'].split(',')[0]}, {r['variant']}: {r['times_fewer_calls']:.3g} times fewer model calls"
        for r in rows
        if r["ours"] and "least" in r
    ]


def _measures(record: Record) -> str:
    return f"{record['reward']:.2f}; {record['diversity']:.2f}; {record['accuracy']:.2f}; {record['distance']:.2f}"


def _paths_lines(rows: Sequence[Record]) -> list[str]:
    """A line for each recipe below the columns' names."""
    cases = [case for (case,) in groups(rows, "case")]
    lines = [" | ".join([f"{'reward; diversity; accuracy; distance':40s}", *(f"{case:24s}" for case in cases)])]
    for (variant,), group in groups(rows, "variant").items():
        by_case = {record["case"]: _measures(record) for record in group}
        lines.append(" | ".join([f"{variant:40s}", *(f"{by_case.get(case, '-'):24s}" for case in cases)]))
    return [line.rstrip() for line in lines]


def lines_of(suite: str, rows: Sequence[Record], short: bool) -> list[str]:
    """What came out of a suite, in a line or, unless `short`, a line for each kind of work."""
    own = {"sdo": _sdo_lines, "reuse": _reuse_lines, "paths": _paths_lines}
    if suite in own:
        lines = own[suite](rows)
        return lines[:1] if short else lines
    of = speeds(rows)
    kinds = {f"{len(of)} cases": of} if short and of else _by_work(of)
    return [f"{name}: {_ratio(cases)}" for name, cases in kinds.items()]


def _not_measured(rows: Iterable[Record]) -> list[str]:
    """Each reason once, behind the variants' names."""
    prefix, reasons = "not measured: ", dict[str, dict[str, None]]()
    for record in rows:
        if record["status"].startswith(prefix):
            variant = record["variant"]
            reason = record["status"].removeprefix(prefix).removeprefix(f"{variant}: ")
            reasons.setdefault(reason, {})[variant] = None
    return [f"{prefix}{', '.join(variants)}: {reason}" for reason, variants in reasons.items()]


def summary(measured: Mapping[str, Sequence[Record]], folder: Path) -> str:
    """What was measured, the ratios of each suite, and where the tables are, in about a dozen lines."""
    everything = [record for rows in measured.values() for record in rows]
    if not everything:
        return "nothing was measured"
    first = everything[0]
    lines = [f"{place(first)}, torch {first['torch']}, {commit(first)}"]
    lines += ["Time of plain PyTorch over ours: median (least-most) of the cases, whose results were compared first."]
    for suite, rows in measured.items():
        outcome = lines_of(suite, rows, short=len(measured) > 3) or ["nothing of ours was timed"]
        lines += [f"  {suite if i == 0 else '':18s} {line}" for i, line in enumerate(outcome)]
    failures = [r for r in everything if r["status"].startswith("FAILED")]
    lines += [f"  {record['case']}, {record['variant']}: {record['status']}" for record in failures]
    lines += [f"  {line}" for line in _not_measured(everything)]
    shown = os.path.relpath(folder) if folder.is_relative_to(Path.cwd()) else folder
    return "\n".join([*lines, f"Every case: {shown}/*.md; records: {shown}/*.csv"])


# README of the records ------------------------------------------------------------------------------------------------


def _places(rows: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(map(place, rows)))


def _overview(suites: Mapping[str, Sequence[Record]]) -> Iterator[Table]:
    timed = {suite: rows for suite, rows in suites.items() if suite not in (*INSPECTED, "sdo", "reuse", "paths")}
    everything = [record for rows in timed.values() for record in rows]
    places = _places(record for record in everything if "ratio" in record)
    gpu = any(re.match(r"\d", record["capability"]) for record in everything)
    cells = []
    for suite, rows in timed.items():
        for kind, of in _by_work(speeds(rows)).items():
            ratios = [[s for s in of if place(s.ours) == name] for name in places]
            sizes = str(max(map(len, ratios)))
            texts = [_ratio(ratio) if ratio else "not measured" for ratio in ratios]
            cells.append([suite, kind, sizes, *texts, *[NO_GPU] * (not gpu)])
    note = "Time of the first variant (plain PyTorch; the scheduler's step) over ours: median over the sizes, and "
    note += "the least and the most."
    yield Table(note, ["suite", "work", "sizes", *places, *["GPU"] * (not gpu)], cells)


def _megabytes(record: Record | None) -> str:
    size = record and (record.get("peak_bytes") or record.get("saved_bytes"))
    return number(size / 1e6) if size else "-"


def _models(suites: Mapping[str, Sequence[Record]]) -> Iterator[Table]:
    cells = []
    for speed in speeds([*suites.get("network", ()), *suites.get("block", ())]):
        compiled = (number(speed.compiled), f"{speed.over_compiled:.3g}") if speed.compiled else ("-", "-")
        theirs, ours = (number(r["p50_ms"]) for r in (speed.reference, speed.ours))
        ratio = f"{speed.ours['ratio']:.3g}"
        sizes = (_megabytes(speed.reference), _megabytes(speed.ours))
        cells.append([place(speed.ours), speed.case, theirs, compiled[0], ours, ratio, compiled[1], *sizes])
    columns = ("device", "case", "PyTorch ms", "torch.compile ms", "ours ms", "over PyTorch", "over torch.compile")
    note = "Network and block. Bytes: peak of the network's evaluation, kept for backward by the block."
    yield Table(note, (*columns, "MB, PyTorch", "MB, ours"), cells)


def _sampler(suites: Mapping[str, Sequence[Record]]) -> Iterator[Table]:
    for rows in groups(suites.get("sdo", ()), *records.PLACE).values():
        gradients = [r for r in rows if r["variant"] == FLOOR or "peak_bytes" in r]
        cases = list(groups(gradients, "case"))
        cells = []
        for (variant,), group in groups(gradients, "variant").items():
            by_case = {record["case"]: record for record in group}
            texts = [
                f"{1 / by_case[c]['ratio']:.3g}; {_megabytes(by_case[c])}" if c in by_case else "-" for (c,) in cases
            ]
            cosines = [r["cosine_with_full"] for r in group if "cosine_with_full" in r]
            cells.append([variant, *texts, spread(cosines, ".2f") if cosines else "-"])
        note = f"Gradients through a sampler, {place(rows[0])}: time over sampling alone; peak MB."
        yield Table(note, ["gradient", *(c for (c,) in cases), "cosine with the full one"], cells)


def _reuse(suites: Mapping[str, Sequence[Record]]) -> Iterator[Table]:
    columns = ("model", "variant", "settings", "times fewer model calls", "final loss over baseline")
    for rows in groups(suites.get("reuse", ()), *records.PLACE).values():
        cells = []
        for r in (r for r in rows if "least" in r):
            fewer = f"{r['times_fewer_calls']:.3g} ({r['least']:.3g}-{r['most']:.3g})"
            loss = f"{r['final_loss_over_baseline']:.3g}"
            cells.append([r["case"].split(",")[0], r["variant"], str(r["settings"]), fewer, loss])
        yield Table(f"Trajectory reuse, {place(rows[0])}: median (least-most) over settings.", columns, cells)


def _paths(suites: Mapping[str, Sequence[Record]]) -> Iterator[Table]:
    for rows in groups(suites.get("paths", ()), *records.PLACE).values():
        cases = [case for (case,) in groups(rows, "case")]
        cells = []
        for (variant,), group in groups(rows, "variant").items():
            by_case = {record["case"]: record for record in group}
            texts = []
            for record in map(by_case.get, cases):
                texts.append(_measures(record) if record else "-")
                texts.append(
                    f"{record['hypervolume']:.2f}; {record['learning_rate']:g}; {record['updates']:.0f}; "
                    f"{record['seconds']:.1f}; {record['peak_bytes'] / 1e6:.1f}; "
                    f"{record['peak_bytes_without_checkpoint'] / 1e6:.1f}"
                    if record and variant != "start"
                    else "-"
                )
            cells.append([variant, *texts])
        note = f"Gradient paths, {place(rows[0])}, at equal forward units: reward; diversity; accuracy; distance. "
        note += "Cost: hypervolume; learning rate; updates; seconds; peak MB with and without recomputation."
        yield Table(note, ["recipe", *(c for case in cases for c in (case, "cost"))], cells)


def _estimates(suites: Mapping[str, Sequence[Record]]) -> Iterator[Table]:
    cells = []
    for (case,), pair in groups(suites.get("roofline", ()), "case").items():
        if len(pair) == 2:
            theirs, ours = pair
            ratios = {
                precision: [theirs[k] / ours[k] for k in theirs if k.startswith("us ") and k.endswith(precision)]
                for precision in ("fp32", "tf32")
            }
            launches = f"{theirs['launches']:,} / {ours['launches']:,}"
            moved = f"{number(theirs['bytes'] / 1e6)} / {number(ours['bytes'] / 1e6)}"
            cells.append([case, launches, moved, *(spread(values, ".2g") for values in ratios.values())])
    columns = ("case", "launches", "MB", "times as fast in fp32 (ESTIMATE)", "with tf32 (ESTIMATE)")
    note = (
        "GPU kernels without a GPU, PyTorch / ours: launches and bytes are counted, times are ESTIMATED from them and "
    )
    note += "the data sheets of five GPUs (`benchmarks/inspection/roofline.py` has the assumptions). No measurements."
    yield Table(note, columns, cells)


def _machine_code(suites: Mapping[str, Sequence[Record]]) -> Iterator[Table]:
    rows = suites.get("static", ())
    targets = list(groups(rows, "target"))
    traffic = groups(suites.get("traffic", ()), "family")
    cells = []
    for (family,), group in groups(rows, "family").items():
        by_target = groups(group, "target")
        texts = [
            f"{max(r['registers'] for r in of)}, {100 * min(r['occupancy'] for r in of):.0f} %"
            if (of := by_target.get(target))
            else "-"
            for target in targets
        ]
        moved = [r["ratio"] for r in traffic.get((family,), ())]
        kernels = str(len(groups(group, "kernel")))
        spills = str(max(r["spills"] for r in group))
        cells.append([family, kernels, *texts, spills, f"{max(moved):.3g}" if moved else "-"])
    note = (
        "Main launches of the GPU kernels, read from the machine code: most registers and least occupancy (a bound); "
    )
    note += "counted in the interpreter: most bytes moved over compulsory ones."
    yield Table(note, ["family", "kernels", *(t for (t,) in targets), "spills", "traffic"], cells)


def markdown(suites: Mapping[str, Sequence[Record]]) -> str:
    """The headlines of all records."""
    lines = ["# Results", ""]
    lines += [
        "Written by `python -m benchmarks report` from the CSV files here, which hold every case; a run with `--record`"
    ]
    lines += [
        "updates them. One thread, medians of interleaved calls, after a comparison with the reference in fp64.",
        "",
    ]
    for (name,), group in groups(
        [{**r, "at": place(r)} for rows in suites.values() for r in rows if "device" in r], "at"
    ).items():
        takes = groups(group, "commit", "dirty", "date")
        lines.append(f"- {name}: {'; '.join(commit(of[0]) for of in takes.values())}")
    lines += [f"- {suite}: {commit(rows[0])}" for suite, rows in suites.items() if suite in INSPECTED]
    lines += [""]
    for make in (_overview, _models, _sampler, _reuse, _paths, _estimates, _machine_code):
        lines += [table.markdown() for table in make(suites) if table.rows]
    return "\n".join(lines)


def write(folder: Path) -> None:
    """README.md and the plots, from the records in `folder`."""
    suites = records.load(folder)
    records.write_atomically(folder / "README.md", markdown(suites))
    plots(folder, suites)


# plots ----------------------------------------------------------------------------------------------------------------


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    temporary = path.with_name(f".{path.stem}.part.png")
    figure.savefig(temporary, dpi=100)
    plt.close(figure)
    temporary.replace(path)


def plot_speeds(suites: Mapping[str, Sequence[Record]], path: Path) -> None:
    """Times as fast as PyTorch, a bar for each place and a mark for torch.compile, at one size of each kind of work."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    order = dict.fromkeys(suite for suite in ("network", "block", *suites) if suite not in UNLIKE)
    timed = _by_work(speed for suite in order for speed in speeds(suites.get(suite, ())))
    if not timed:
        return
    cases = [next((s for s in of if s.compiled), of[0]).case for of in timed.values()]
    of_cases = [speed for of in timed.values() for speed in of if speed.case in cases]
    places = _places(speed.ours for speed in of_cases)
    height = 0.8 / len(places)
    figure, axes = plt.subplots(figsize=(9, 1.4 + 0.11 * (1 + len(places)) * len(cases)), layout="constrained")
    for i, name in enumerate(places):
        here = [speed for speed in of_cases if place(speed.ours) == name]
        ys = [cases.index(speed.case) + (i - (len(places) - 1) / 2) * height for speed in here]
        ratios = [speed.ours["ratio"] for speed in here]
        bars = axes.barh(ys, [r - 1 for r in ratios], height, 1, label=f"ours, {name}", color=COLOURS[i % len(COLOURS)])
        axes.bar_label(bars, [f"{ratio:.1f}" for ratio in ratios], padding=6, fontsize=7)
        marks = [(s.reference["p50_ms"] / s.compiled, y) for s, y in zip(here, ys, strict=True) if s.compiled]
        if marks:
            label = "torch.compile" if i == 0 else None
            axes.plot(*zip(*marks, strict=True), "D", color="black", markeredgecolor="white", markersize=5, label=label)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(cases)), cases, fontsize=8)
    axes.set_ylim(len(cases) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.margins(x=0.08)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.set_xlabel("times as fast as plain PyTorch")
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    _save(figure, path)


def plot_sampler(rows: Sequence[Record], path: Path) -> None:
    """Time over sampling alone and peak bytes of each gradient, at the most steps of each model, at the last place."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    last = list(groups(rows, *records.PLACE).values())[-1] if rows else []
    with_peaks = groups((r for r in last if "peak_bytes" in r and "ratio" in r), "case")
    cases = {case.rsplit(",", 1)[0]: (case, of) for (case,), of in with_peaks.items()}
    if not cases:
        return
    variants = list(dict.fromkeys(r["variant"] for _, of in cases.values() for r in of))
    height = 0.8 / len(cases)
    figure, panels = plt.subplots(
        1, 2, figsize=(10, 1.8 + 0.3 * len(variants) * len(cases) / 2), sharey=True, layout="constrained"
    )
    for i, (case, of) in enumerate(cases.values()):
        ys = [variants.index(r["variant"]) + (i - (len(cases) - 1) / 2) * height for r in of]
        for panel, values in zip(
            panels, ([1 / r["ratio"] for r in of], [r["peak_bytes"] / 1e6 for r in of]), strict=True
        ):
            bars = panel.barh(ys, values, height, label=case if panel is panels[0] else None, color=COLOURS[i])
            panel.bar_label(bars, fmt="%.3g", padding=3, fontsize=7)
    panels[0].axvline(1, color="black", linewidth=0.8)
    panels[0].set_xlabel("time over sampling alone")
    panels[1].set_xscale("log")
    panels[1].set_xlabel("peak MB of the gradient")
    panels[0].set_yticks(range(len(variants)), variants, fontsize=8)
    panels[0].invert_yaxis()
    for panel in panels:
        panel.margins(x=0.12)
    figure.legend(fontsize=8, loc="outside lower center", ncols=len(cases))
    _save(figure, path)


def plot_paths(rows: Sequence[Record], path: Path) -> None:
    """Reward against diversity, from the start by half of the budget to its end, at the last place.

    Bars reach from the least to the most of the seeds; a marker is hollow where a quarter of the accuracy is gone.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    last = list(groups(rows, *records.PLACE).values())[-1] if rows else []
    cases = groups(last, "case")
    if not cases:
        return
    recipes = [variant for (variant,) in groups(last, "variant") if variant != "start"]
    figure, panels = plt.subplots(1, len(cases), figsize=(3.7 * len(cases), 4.4), squeeze=False, layout="constrained")
    for panel, ((case,), of) in zip(panels[0], cases.items(), strict=True):
        start = next(record for record in of if record["variant"] == "start")
        for record in of:
            if record is start:
                continue
            i = recipes.index(record["variant"])
            x, y = ([start[name], record[f"{name}_at_half"], record[name]] for name in ("diversity", "reward"))
            colour = COLOURS[i % len(COLOURS)]
            kept = record["accuracy"] >= 0.75 * start["accuracy"]
            panel.plot(x, y, "-" if i < len(COLOURS) else "--", color=colour, linewidth=1)
            panel.errorbar(
                x[-1],
                y[-1],
                [[y[-1] - record["reward_least"]], [record["reward_most"] - y[-1]]],
                [[x[-1] - record["diversity_least"]], [record["diversity_most"] - x[-1]]],
                fmt="osD^vP*"[i % 7],
                color=colour,
                markerfacecolor=colour if kept else "white",
                elinewidth=0.5,
                label=record["variant"],
            )
        panel.plot(start["diversity"], start["reward"], "kx")
        panel.set_title(case)
        panel.set_xlabel("diversity")
    panels[0][0].set_ylabel("reward (estimated thickness)")
    handles = {label: h for panel in panels[0] for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside lower center", ncols=5)
    _save(figure, path)


def plots(folder: Path, suites: Mapping[str, Sequence[Record]]) -> None:
    plot_speeds(suites, folder / "speed.png")
    plot_sampler(suites.get("sdo", ()), folder / "sdo.png")
    plot_paths(suites.get("paths", ()), folder / "paths.png")
