"""Records on disk: one JSON and one CSV file a suite, with the environment that they were taken in."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_")
VARIABLES += ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "SWFORMER_FAST_BACKEND", "SDO_FAST_BACKEND")


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
    """The commit, and whether there are changes beside it. Without git what COMMIT says; None is not known."""
    commit = git("rev-parse", "--short", "HEAD")
    if commit is None:
        given = os.environ.get("COMMIT", "").split()
        return (given[0], "dirty" in given) if given else (None, None)
    changes = git("status", "--porcelain", "--untracked-files=no", "--", ":(top,exclude)benchmarks/results")
    return commit, None if changes is None else bool(changes)


def environment(device: str) -> dict[str, Any]:
    cuda = device == "cuda"
    commit, dirty = version_of_sources()
    return {
        "commit": commit,
        "dirty": dirty,
        "device": torch.cuda.get_device_name() if cuda else processor(),
        "capability": torch.cuda.get_device_capability() if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {p: version(p) for p in ("torch", "triton", "numpy", "diffusers", "ptwt", "pytorch_wavelets")},
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def write_whole(path: Path, text: str) -> None:
    """Write to a temporary name and rename, so that no reader sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text)
    temporary.replace(path)


def flat(value: Any) -> Any:
    """A value for one cell: a mapping as "key:value key:value"."""
    return " ".join(f"{k}:{v}" for k, v in value.items()) if isinstance(value, Mapping) else value


def save(
    folder: Path,
    suite: str,
    device: str,
    records: Sequence[Mapping[str, Any]],
    complete: bool,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """extra: what else is to be known of the environment."""
    known = environment(device) | dict(extra or {})
    document = {"suite": suite, "complete": complete, "environment": known, "records": list(records)}
    write_whole(folder / f"{suite}.json", json.dumps(document, indent=1) + "\n")
    columns = list(dict.fromkeys(key for record in records for key in record))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: flat(value) for key, value in record.items()} for record in records)
    write_whole(folder / f"{suite}.csv", buffer.getvalue())


def load(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
