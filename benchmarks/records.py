"""Records on disk: one CSV file a suite, a line a record, each with its date, commit, versions and device."""

from __future__ import annotations

import csv
import datetime
import io
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
"""The tracked records, which a run with --record updates."""
OUTPUT = Path(__file__).parent / "output"
"""Where a run writes; not tracked."""
PLACE = ("device", "capability", "threads", "variables", "rehearsal")
"""Records that differ in one of these stand side by side."""
SETTING = {"dtype": "fp32", "layout": "contiguous"}
"""Of models and images, and what records that do not say it were taken in."""
CASE = ("target", "launch", "case")
"""What a record is of; each suite has some of these."""
TEXT = {"date", "commit", "torch", "triton", "versions", "device", "capability", "variables"}
"""Columns that may look like numbers and are none."""
VARIABLES = (
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "SWFORMER_FAST_BACKEND", "SDO_FAST_BACKEND"),
    *("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_"),
)
PACKAGES = ("numpy", "diffusers", "ptwt", "pytorch_wavelets")

Record = Mapping[str, Any]


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git(*arguments: str) -> str | None:
    """What git prints; None where there is no git or no repository."""
    try:
        run = subprocess.run(("git", *arguments), cwd=RESULTS.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return None if run.returncode else run.stdout.strip()


def version_of_sources() -> tuple[str | None, bool | None]:
    """The commit, and whether there are changes beside it. Without git what COMMIT says; None where nobody says."""
    commit = git("rev-parse", "--short", "HEAD")
    if commit is None:
        words = os.environ.get("COMMIT", "").split()
        return (words[0], "dirty" in words) if words else (None, None)
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)benchmarks/results")
    return commit, None if changes is None else bool(changes)


def sources() -> dict[str, Any]:
    """The columns of every record: when, and of which sources and packages."""
    commit, dirty = version_of_sources()
    others = {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "dirty": dirty,
        "torch": version("torch"),
        "triton": version("triton"),
        "versions": ", ".join(f"{name} {number}" for name, number in others.items() if number),
    }


def environment(device: str) -> dict[str, Any]:
    """The columns of a timing beside its figures: `sources()` and where it was taken."""
    cuda = device == "cuda"
    capability = torch.cuda.get_device_capability() if cuda else torch.backends.cpu.get_cpu_capability()
    return sources() | {
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "capability": ".".join(map(str, capability)) if isinstance(capability, tuple) else capability,
        "threads": torch.get_num_threads(),
        "variables": " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ),
    }


def write_atomically(path: Path, text: str) -> None:
    """Write to a temporary name and rename, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    temporary.replace(path)


def _cell(value: Any) -> str:
    """Five digits of a number with a fraction; a mapping as "key:value key:value"."""
    if isinstance(value, Mapping):
        return " ".join(f"{k}:{v}" for k, v in value.items())
    return "" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)


def _value(column: str, cell: str) -> Any:
    if column in TEXT:
        return cell
    if cell in ("True", "False"):
        return cell == "True"
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def save(folder: Path, suite: str, records: Iterable[Record]) -> None:
    rows = [{column: _cell(value) for column, value in record.items()} for record in records]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(dict.fromkeys(c for row in rows for c in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(folder / f"{suite}.csv", buffer.getvalue())


def read(path: Path) -> list[Record]:
    """The records of a file, without the columns that are empty in them; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [{c: _value(c, cell) for c, cell in row.items() if cell} for row in csv.DictReader(file)]


def load(folder: Path) -> dict[str, list[Record]]:
    """The records of each suite."""
    return {path.stem: read(path) for path in sorted(folder.glob("*.csv"))}


def keep(suite: str, records: Iterable[Record], complete: bool, folder: Path | None = None) -> None:
    """Put the records in `folder`, the tracked one if None, in the place of those that were taken there and then.

    Those of other places, dtypes and layouts stay; so do those of cases that were not reached, unless the suite is
    complete.
    """

    def columns(record: Record, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(_cell(record.get(name, SETTING.get(name))) for name in names)

    path = (folder or RESULTS) / f"{suite}.csv"
    new = list(records)
    of_run = (*PLACE, *SETTING)
    of_case = (*of_run, *CASE)
    runs, reached = ({columns(r, names) for r in new} for names in (of_run, of_case))
    stay = [r for r in read(path) if columns(r, of_run) not in runs or not (complete or columns(r, of_case) in reached)]
    save(path.parent, suite, [*stay, *new])
