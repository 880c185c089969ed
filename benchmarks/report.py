"""Tables and plots, made from the records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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


def markdown(document: Mapping[str, Any]) -> str:
    env = document["environment"]
    tree = "with uncommitted changes" if env["dirty"] else "clean"
    lines = [
        f"## {document['suite']}",
        "",
        f"{env['device']} ({env['capability']}), {env['threads']} thread(s), torch {env['packages']['torch']}, commit "
        f"{env['commit']} ({tree}){'' if document['complete'] else '; interrupted, the cases below were finished'}. "
        "Ratio: the first variant's time over this one's, median over interleaved rounds.",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    last = None
    for record in document["records"]:
        cells = list(row(record))
        cells[0], last = ("" if cells[0] == last else cells[0]), cells[0]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def plot(document: Mapping[str, Any], path: Path) -> None:
    """Ratios over the baseline, a group of bars for each case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured: dict[str, dict[str, float]] = {}
    for record in document["records"]:
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
    temporary = path.with_name(f".{path.stem}.part.png")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(path)


def console(document: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=document["suite"], title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="right" if column in COLUMNS[2:6] else "left", overflow="fold")
    last = None
    for record in document["records"]:
        cells = list(row(record))
        cells[0], last = ("" if cells[0] == last else cells[0]), cells[0]
        style = "red" if "FAILED" in cells[-1] or "MISSED" in cells[-1] else "bold" if record["ours"] else ""
        table.add_row(*cells, style=style)
    terminal = Console()
    (terminal if terminal.is_terminal else Console(width=180)).print(table)


def write(folder: Path, documents: Sequence[Mapping[str, Any]] | None = None) -> None:
    """README.md with every table, and a plot for each suite, from the records in `folder`."""
    documents = records.load(folder) if documents is None else documents
    head = "# Results\n\nWritten by `python -m benchmarks`; `python -m benchmarks report` does it again.\n\n"
    records.write_whole(folder / "README.md", head + "\n".join(markdown(d) for d in documents))
    for document in documents:
        plot(document, folder / f"{document['suite']}.png")
