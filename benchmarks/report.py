"""Tables and plots, made from the records alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import records

SHOWN = {"case", "variant", "ours", "status", "error", "p20_ms", "p50_ms", "p80_ms", "rounds", "ratio", "cold_start_s"}
COLUMNS = ("case", "variant", "median ms", "ratio", "rel. RMS error", "first call s", "remarks")
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#F0E442")
"""Okabe and Ito's palette: told apart with any kind of colour vision."""


def remarks(record: Mapping[str, Any]) -> str:
    parts = [] if record["status"] == "ok" else [record["status"]]
    for key, value in record.items():
        if key.startswith("over_"):
            target = record[f"target_{key}"]
            word = "met" if value >= target else "MISSED"
            parts.append(f"{value:.2f}x {key[5:]} (target {target:g}: {word})")
        elif key.startswith("of_"):
            parts.append(f"{100 * value:.3g} % of the measured {key[3:]} rate")
        elif key not in SHOWN and not key.startswith("target_"):
            parts.append(f"{key} {value:,.3g}" if isinstance(value, float) else f"{key} {value:,}")
    return "; ".join(parts)


def row(record: Mapping[str, Any]) -> tuple[str, ...]:
    def number(key: str, form: str) -> str:
        return format(record[key], form) if key in record else "-"

    return (
        record["case"],
        record["variant"],
        number("p50_ms", ".3f"),
        number("ratio", ".2f"),
        number("error", ".1e"),
        number("cold_start_s", ".2f"),
        remarks(record),
    )


@dataclass(frozen=True)
class Table:
    """Cells, and the words above them."""

    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    """The columns set to the right."""


def _timings(document: Mapping[str, Any]) -> Iterator[Table]:
    env = document["environment"]
    note = f"{env['threads']} thread(s), torch {env['packages']['torch']}"
    note += ". Ratio: the first variant's time over this one's, median over interleaved rounds."
    if "peaks" in env:
        note += " Measured peaks: " + ", ".join(f"{name} {value:,.4g}" for name, value in env["peaks"].items()) + "."
    if env.get("rehearsal"):
        note = f"REHEARSAL ON THE CPU, no figures of a GPU. {note}"
    rows, last = [], None
    for record in document["records"]:
        cells = list(row(record))
        cells[0], last = ("" if cells[0] == last else cells[0]), cells[0]
        rows.append(cells)
    yield Table(note, COLUMNS, rows, frozenset(range(2, 6)))


def _spread(values: Iterable[float], form: str = "g") -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:{form}}" if low == high else f"{low:{form}}-{high:{form}}"


def _groups(records: Iterable[Mapping[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[Mapping[str, Any]]]:
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def _static(document: Mapping[str, Any]) -> Iterator[Table]:
    targets = list(dict.fromkeys(record["target"] for record in document["records"]))
    columns = ["family", "kernel", "launches", *(f"{t}: registers, occupancy %" for t in targets)]
    columns += ["spills", "shared KiB", "loads bits", "stores bits", "matrix instr.", "code KiB", "compile s"]
    rows = []
    for (family, kernel), group in _groups(document["records"], "family", "kernel").items():
        by_target = _groups(group, "target")
        cells = [family, kernel, str(max(len(g) for g in by_target.values()))]
        for target in targets:
            of = by_target.get((target,), [])
            cells.append(
                f"{_spread(r['registers'] for r in of)}, {_spread(round(100 * r['occupancy']) for r in of)}"
                if of
                else "-"
            )
        widest = {kind: [max(map(int, r[kind]), default=0) for r in group] for kind in ("loads", "stores")}
        seconds = [r["compile_s"] for r in group if r["compile_s"] is not None]
        rows.append(
            [
                *cells,
                str(max(r["spills"] for r in group)),
                _spread((r["shared"] / 1024 for r in group), ".3g"),
                _spread(widest["loads"]),
                _spread(widest["stores"]),
                _spread(r["tensor_core"] for r in group),
                _spread((r["code_bytes"] / 1024 for r in group), ".3g"),
                _spread(seconds, ".2g") if seconds else "-",
            ]
        )
    note = "Read from the machine code; each cell spans the launches and, from the spills on, the targets. Widths: of "
    note += "each launch's widest access. Occupancy: the bound by registers, shared memory and blocks."
    yield Table(note, columns, rows, frozenset(range(2, len(columns))))
    worst = sorted(document["records"], key=lambda r: (-r["spills"], r["occupancy"], -r["registers"]))
    ranked = list(_groups(worst, "kernel", "target").values())[:10]
    yield Table(
        "The launches with the fewest warps in flight.",
        ("kernel", "target", "launch", "registers", "shared KiB", "threads", "occupancy %"),
        [
            (
                r["kernel"],
                r["target"],
                r["launch"],
                str(r["registers"]),
                f"{r['shared'] / 1024:.3g}",
                str(r["threads"]),
                f"{100 * r['occupancy']:.0f}",
            )
            for r, *_ in ranked
        ],
        frozenset(range(3, 7)),
    )


def _traffic(document: Mapping[str, Any]) -> Iterator[Table]:
    columns = (
        "launch",
        "kernel",
        "programs",
        "compulsory MB",
        "every access",
        "once a program",
        "MFLOP",
        "FLOP a byte",
    )
    rows, last = [], None
    for r in document["records"]:
        flops = r["simple"] + r["special"] + r["dot"]
        cells = (
            "" if r["launch"] == last else r["launch"],
            r["kernel"],
            f"{r['programs']:,}",
            f"{r['compulsory'] / 1e6:.3g}",
            f"{r['ratio']:.3f}",
            f"{r['program_ratio']:.3f}",
            f"{flops / 1e6:.4g}",
            f"{flops / max(r['compulsory'], 1):.3g}",
        )
        last = r["launch"]
        rows.append(cells)
    note = (
        "Counted in the interpreter on some programs of each launch and scaled, masked lanes left out. Bytes over the "
    )
    note += "compulsory ones, those of the kernel's tensors: of every access, and of each address once a program."
    yield Table(note, columns, rows, frozenset(range(2, 8)))


def _roofline(document: Mapping[str, Any]) -> Iterator[Table]:
    from .roofline import ASSUMPTIONS, DEVICES

    yield Table("ESTIMATES, no measurements: counts are exact, times are bounds. Assumptions:", ("", ""), ASSUMPTIONS)
    note = "Data-sheet figures: GB/s of memory and second-level cache, TFLOP/s of fp32 and of tf32 matrix products."
    columns = ("GPU", "memory", "cache", "fp32", "tf32")
    rows = [(d.name, f"{d.memory / 1e9:,.0f}", f"{d.cache / 1e9:,.0f}", f"{d.fp32 / 1e12:g}", f"{d.tf32 / 1e12:g}")
            for d in DEVICES]  # fmt: skip
    yield Table(note, columns, rows, frozenset(range(1, 5)))
    counted, estimated, shares = [], [], []
    for (case,), pair in _groups(document["records"], "case").items():
        if len(pair) < 2:
            continue
        theirs, ours = pair
        counted.append(
            (
                case,
                *(f"{r['launches']:,}" for r in pair),
                str(ours["our_kernels"]),
                *(f"{r['bytes'] / 1e6:,.4g}" for r in pair),
                f"{theirs['bytes'] / ours['bytes']:.2f}",
                *(f"{(r['flops'] + r['matrix_flops']) / 1e9:.3g}" for r in pair),
            )
        )
        keys = [key for key in theirs if key.startswith("us ")]
        cells = (f"{theirs[k]:,.0f} / {ours[k]:,.0f} = {theirs[k] / ours[k]:.2f}" for k in keys if k.endswith("fp32"))
        tf32 = (theirs[k] / ours[k] for k in keys if k.endswith("tf32"))
        estimated.append((case, *cells, _spread(tf32, ".2f")))
        shares.append((case, *("; ".join(f"{n} {us:g}" for n, us in r["largest_us"].items()) for r in pair)))
    columns = (
        "case",
        "launches, PyTorch",
        "ours",
        "of our kernels",
        "MB, PyTorch",
        "ours",
        "ratio",
        "GFLOP, PyTorch",
        "ours",
    )
    yield Table("Counted: every input and output of a launch once.", columns, counted, frozenset(range(1, 9)))
    columns = ("case", *(d.name for d in DEVICES), "with tf32, all GPUs")
    note = "ESTIMATE: microseconds, PyTorch / ours = ratio, in fp32."
    yield Table(note, columns, estimated, frozenset(range(1, 7)))
    yield Table(f"ESTIMATE: where the time goes, us on {DEVICES[1].name}.", ("case", "PyTorch", "ours"), shares)


TABLES: dict[str, Callable[[Mapping[str, Any]], Iterator[Table]]] = {
    "roofline": _roofline,
    "static": _static,
    "traffic": _traffic,
}
"""How the records of a suite are shown; those of the others are timings."""


def tables(document: Mapping[str, Any]) -> list[Table]:
    return list(TABLES.get(document["suite"], _timings)(document))


def markdown(document: Mapping[str, Any]) -> str:
    env = document["environment"]
    tree = {True: "with uncommitted changes", False: "clean"}.get(env["dirty"], "changes unknown")
    place = f"{env['device']} ({env['capability']}), " if document["suite"] not in TABLES else "No GPU; "
    head = f"{place}commit {env['commit']} ({tree})"
    if not document["complete"]:
        head += "; interrupted, what is below was finished"
    lines = [f"## {document['suite']}", "", f"{head}."]
    for table in tables(document):
        lines += ["", table.note, "", "| " + " | ".join(table.columns) + " |", "|" + " --- |" * len(table.columns)]
        lines += ["| " + " | ".join(cells) + " |" for cells in table.rows]
    return "\n".join([*lines, ""])


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    temporary = path.with_name(f".{path.stem}.part.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)


def plot_roofline(document: Mapping[str, Any], path: Path) -> None:
    """Bytes and launches, PyTorch's and ours, and the estimated ratios of the times."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from .roofline import DEVICES

    pairs = {case: pair for (case,), pair in _groups(document["records"], "case").items() if len(pair) == 2}
    figure, axes = plt.subplots(1, 3, figsize=(15, 1.5 + 0.42 * len(pairs)), sharey=True, layout="constrained")
    for panel, key, scale, label in (
        (axes[0], "bytes", 1e6, "MB that launches read and write (counted)"),
        (axes[1], "launches", 1, "launches (counted)"),
    ):
        for i, variant in enumerate(("PyTorch", "ours")):
            values = [pair[i][key] / scale for pair in pairs.values()]
            bars = panel.barh(
                [y + 0.4 * i - 0.2 for y in range(len(pairs))], values, 0.4, label=variant, color=COLOURS[i]
            )
            panel.bar_label(bars, fmt="%.4g", padding=2, fontsize=7)
        panel.set_xscale("log")
        panel.margins(x=0.15)
        panel.set_xlabel(label)
        panel.legend(fontsize=8)
    height = 0.8 / len(DEVICES)
    for i, device in enumerate(DEVICES):
        key = f"us {device.name} fp32"
        ratios = [theirs[key] / ours[key] for theirs, ours in pairs.values()]
        ys = [y + (i - (len(DEVICES) - 1) / 2) * height for y in range(len(pairs))]
        axes[2].barh(ys, ratios, height, label=device.name, color=COLOURS[i])
    axes[2].axvline(1, color="black", linewidth=0.8)
    axes[2].set_xlabel("time of PyTorch over ours, fp32 (ESTIMATED)")
    axes[2].legend(fontsize=8)
    axes[0].set_yticks(range(len(pairs)), list(pairs), fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle("Counted bytes and launches; times estimated from them and data sheets, not measured")
    _save(figure, path)


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Ratios over the baseline, a group of bars for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured: dict[str, dict[str, float]] = {}
    for record in document["records"] if document["suite"] not in TABLES else ():
        if "ratio" in record:
            measured.setdefault(record["case"], {})[record["variant"]] = record["ratio"]
    if not measured:
        return
    variants = list(dict.fromkeys(v for ratios in measured.values() for v in ratios))
    height = 0.8 / len(variants)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(variants) * len(measured)), layout="constrained")
    for i, variant in enumerate(variants):
        places = [(y, ratios[variant]) for y, ratios in enumerate(measured.values()) if variant in ratios]
        ys, widths = [y + (i - (len(variants) - 1) / 2) * height for y, _ in places], [w for _, w in places]
        bars = axes.barh(ys, widths, height, label=variant, color=COLOURS[i % len(COLOURS)])
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(measured)), list(measured), fontsize=8)
    axes.invert_yaxis()
    env = document["environment"]
    axes.set_xlabel(f"speed over {variants[0]} (longer is faster); {env['device']}, {env['threads']} thread(s)")
    axes.set_title(document["suite"])
    axes.legend(fontsize=8, loc="best")
    _save(figure, path)


def console(document: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable

    terminal = Console()
    for content in tables(document):
        table = RichTable(title=f"{document['suite']}: {content.note}", title_justify="left")
        for i, column in enumerate(content.columns):
            table.add_column(column, justify="right" if i in content.numbers else "left", overflow="fold")
        for cells in content.rows:
            bad = "FAILED" in cells[-1] or "MISSED" in cells[-1]
            ours = any(cell.startswith("ours") for cell in cells[1:2])
            table.add_row(*cells, style="red" if bad else "bold" if ours else "")
        (terminal if terminal.is_terminal else Console(width=180)).print(table)


def write(folder: Path, documents: Sequence[Mapping[str, Any]] | None = None) -> None:
    """README.md with every table, and a plot for each suite, from the records in `folder`."""
    documents = records.load(folder) if documents is None else documents
    head = "# Results\n\nWritten by `python -m benchmarks`; `python -m benchmarks report` does it again.\n\n"
    records.write_whole(folder / "README.md", head + "\n".join(markdown(d) for d in documents))
    for document in documents:
        draw = plot_roofline if document["suite"] == "roofline" else plot
        draw(document, folder / f"{document['suite']}.png")
