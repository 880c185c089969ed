"""The first quarter of an hour on a GPU: is it right, how fast is it. `benchmarks/gpu_day.sh` starts this.

    gpu_day.sh prepare             on any machine: fills .gpu/ with what the GPU's machine may lack
    gpu_day.sh run 1 OUT           there, at most 400 s: is it right?
    gpu_day.sh run 2 OUT           there, at most 330 s: how fast is it?
    gpu_day.sh records TAR ...     anywhere: OUT's tars into records and the README's rows

The GPU's machine needs Python, torch, triton and pytest; no network, no git, no install. All results so far lie in one
tar in OUT after every step. A step that fails or takes too long stops none of those after it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .records import Record

ROOT = Path(__file__).resolve().parent.parent
PREPARED = ROOT / ".gpu"
CACHE = Path(tempfile.gettempdir()) / "swformer_triton_cache"
"""Triton's cache holds absolute paths: the same where it is filled and where it serves."""
LARGEST = 50 << 20
"""Bytes that may travel."""
SECONDS = {1: 400, 2: 330}
WHEELS = ("diffusers", "importlib_metadata", "ptwt", "pytorch_wavelets", "PyWavelets")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
NOT_RUN = 3
"""The status of a command that has nothing to do here."""


# prepare --------------------------------------------------------------------------------------------------------------


def fingerprint() -> str:
    """Changes with every source that is carried or compiled."""
    folders = ("swformer_fast", "sdo_fast", "kernels", "benchmarks", "tests")
    sources = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]


def versions() -> dict[str, str]:
    return {name: metadata.version(name).split("+")[0] for name in ("torch", "triton")}


def prepare(target: str, python: str, quick: bool) -> int:
    """Fill PREPARED with wheels, the SDO library and Triton's cache for `target`."""
    from . import records

    shutil.rmtree(PREPARED, ignore_errors=True)
    (PREPARED / "wheels").mkdir(parents=True)
    library = ROOT / "sdo_fast" / "_C_cuda.so"
    if library.exists():
        shutil.copy(library, PREPARED)
    else:
        print("sdo_fast/_C_cuda.so was not built (nvcc, then `make build`): the SDO tests will not run on the GPU")
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    pip += ["--python-version", python, "-d", str(PREPARED / "wheels")]
    pip += [argument for platform in PLATFORMS for argument in ("--platform", platform)]
    subprocess.run([*pip, *WHEELS], check=True)
    shutil.rmtree(CACHE, ignore_errors=True)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(CACHE), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "benchmarks.inspection.prefill", target, *["--quick"] * quick]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    with tarfile.open(PREPARED / "cache.tar.xz", "w:xz") as tar:
        # What a launch reads; the intermediate codes stay here.
        tar.add(CACHE, ".", filter=lambda m: m if m.isdir() or m.name.endswith((".json", ".cubin", ".so")) else None)
    commit, dirty = records.version_of_sources()
    manifest = {"commit": commit, "dirty": dirty, "target": target, "fingerprint": fingerprint(), **versions()}
    records.write_atomically(PREPARED / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    size = sum(path.stat().st_size for path in PREPARED.rglob("*") if path.is_file())
    print(f"{PREPARED}: {size / 1e6:.1f} MB, for {target}, torch {manifest['torch']}, triton {manifest['triton']}")
    if size > LARGEST:
        print(f"that is more than {LARGEST / 1e6:.0f} MB")
    return int(size > LARGEST)


# run ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Commands that run side by side; arguments of Python."""

    name: str
    seconds: int
    commands: Sequence[Sequence[str]]
    environment: Mapping[str, str] = field(default_factory=dict)


def pytest(*arguments: str, workers: int = 12) -> list[str]:
    command = ["-m", "pytest", "-p", "no:cacheprovider", "--no-header", "--tb=short"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(workers), "--max-worker-restart", "40"]
    if importlib.util.find_spec("pytest_timeout"):
        command += ["--timeout", "150"]
    return [*command, *arguments]


def suite(name: str, folder: Path, dry: bool, *arguments: str) -> list[str]:
    common = ["--device", "cuda", *["--dry-run"] * dry, "--budget", "0.2", "--out", str(folder)]
    return ["-m", "benchmarks", name, *common, *arguments]


def is_it_right(dry: bool, scratch: Path) -> list[Step]:
    from .inspection.launches import LAUNCHES

    kernels, contract = "tests/test_triton_{}.py", "tests/test_contract.py"
    launches = ["-m", "benchmarks.inspection.launches"]
    if dry:
        return [
            Step("correct", 90, [["-m", "benchmarks.inspection.correct", "--dry-run"]]),
            Step(
                "launches", 60, [[*launches, "--dry-run", "haar_dwt2d"], [*launches, "--dry-run", "channel_attention"]]
            ),
            Step("block", 90, [pytest("tests/test_gpu.py", "-k", "(block or graph) and not suites", workers=2)]),
            Step("products", 60, [pytest(contract, "-k", "triton and pointwise and layouts", workers=2)]),
            Step("others", 60, [pytest(contract, "-k", "triton and haar and half", workers=2)]),
            Step("sdo", 30, [pytest("tests/test_step.py", "-k", "names", workers=1)]),
            Step("repeat", 60, [pytest("tests/test_gpu.py", "-k", "launches and haar", workers=1)]),
            Step("baselines", 60, [suite("block", scratch, dry)]),
        ]
    products = ("multiscale_ffn", "fourier_mix", "pointwise")
    folds = ("fold_norm", "fold_attention", "swformer_block")  # whose own file is for every backend
    others = ("haar", "depthwise_gelu", "wavelet_mix", "channel_attention")
    tests = [
        [
            pytest(contract, "-k", f"triton and ({' or '.join(group + more)})"),
            pytest(*(kernels.format(op) for op in group), *files, "-m", "not slow"),
        ]
        for group, more, files in ((products, folds, [f"tests/test_{op}.py" for op in folds]), (others, (), []))
    ]
    baselines = [
        suite(name, scratch / name / dtype, dry, "--compile", "--dtype", dtype)
        for name in ("block", "network")
        for dtype in ("fp32", "tf32", "autocast")
    ]
    return [
        Step("correct", 70, [["-m", "benchmarks.inspection.correct"]]),
        Step("launches", 60, [[*launches, "--real", family] for family in LAUNCHES]),
        Step(
            "block",
            70,
            [
                pytest(
                    "tests/test_gpu.py",
                    "tests/test_half_precision.py",
                    "-m",
                    "gpu",
                    "-k",
                    "not suites and not launches",
                )
            ],
        ),
        Step("products", 110, tests[0]),
        Step("others", 80, tests[1]),
        Step(
            "sdo", 45, [pytest("tests/test_step.py", "tests/test_shortcut.py", "tests/test_sdo_graphs.py", "-m", "gpu")]
        ),
        Step("graphs", 45, [pytest("tests/test_graphed.py", "-m", "gpu", workers=1)]),
        Step("repeat", 60, [pytest("tests/test_gpu.py", "-m", "gpu", "-k", "launches")]),
        # Their times are thrown away; torch.compile's code is kept for the second part.
        Step("baselines", 120, baselines),
    ]


def how_fast(dry: bool, records: Path) -> list[Step]:
    dtypes = ("--dtype", "fp32", "tf32", "autocast")
    if dry:
        names = ("block", "network", "haar", "channel_attention", "sampler_step")
        return [
            *(Step(f"time-{name}", 90, [suite(name, records, dry, *dtypes)]) for name in names),
            Step("memcheck", 30, [["-m", "benchmarks.inspection.launches", "--dry-run", "haar_dwt2d"]]),
        ]
    ops = ("fourier_mix", "multiscale_ffn", "wavelet_mix", "depthwise_gelu", "channel_attention", "haar")
    sanitizer = ["-m", "benchmarks.gpu_day", "memcheck", "multiscale_ffn", "fourier_mix", "pointwise"]
    return [
        Step("time-block", 100, [suite("block", records, dry, "--compile", *dtypes)]),
        Step("time-network", 110, [suite("network", records, dry, "--compile", *dtypes)]),
        # One after the other: they time. Each by itself: one that fails takes no other along.
        *(Step(f"time-{name}", 40, [suite(name, records, dry)]) for name in ops),
        Step("time-sampler_step", 30, [suite("sampler_step", records, dry)]),
        Step("memcheck", 60, [sanitizer], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    ]


def memcheck(families: Sequence[str]) -> int:
    """The launches of some families under compute-sanitizer, in this process's place."""
    places = [shutil.which("compute-sanitizer"), *Path("/usr/local").glob("cuda*/bin/compute-sanitizer")]
    tool = next((str(place) for place in places if place), None)
    if tool is None:
        print("not run: no compute-sanitizer")
        return NOT_RUN
    options = ["--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "1"]
    os.execv(tool, [tool, *options, sys.executable, "-m", "benchmarks.inspection.launches", *families])


class Day:
    """One part: its folder, its clock and its tar."""

    def __init__(self, part: int, out: Path, dry: bool, work: Path) -> None:
        self.part, self.out, self.dry, self.work = part, out, dry, work
        self.end = time.monotonic() + SECONDS[part] * (3 if dry else 1)
        self.failures = 0
        out.mkdir(parents=True, exist_ok=True)
        (work / "logs").mkdir(parents=True, exist_ok=True)
        site = work / "site"
        path = [str(site), str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "CUDA_MODULE_LOADING": "LAZY",
            "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        }
        if dry:
            self.environment |= {"TRITON_INTERPRET": "1", "GPU_REHEARSAL": "1", "CUDA_VISIBLE_DEVICES": ""}
        else:
            self.environment["TRITON_CACHE_DIR"] = str(CACHE)

    def tell(self, line: str) -> None:
        print(line, flush=True)
        with open(self.work / "summary.txt", "a") as file:
            file.write(line + "\n")

    def save(self) -> None:
        """Every result so far, under its name only when it is complete."""
        part = self.out / ".gpu_day.part"
        with tarfile.open(part, "w:gz") as tar:
            for name in ("summary.txt", "logs", "records"):
                if (self.work / name).exists():
                    tar.add(self.work / name, name)
        part.replace(self.out / f"gpu_day_{self.part}.tgz")

    def set_up(self) -> None:
        """Unpack what was prepared, once a machine."""
        begin = time.monotonic()
        manifest = PREPARED / "manifest.json"
        prepared = json.loads(manifest.read_text()) if manifest.exists() else {}
        here = versions()
        self.tell(f"part {self.part}: torch {here['torch']}, triton {here['triton']}, {self.device()}")
        if not prepared:
            self.tell("nothing was prepared (gpu_day.sh prepare): kernels compile here, wheels may be missing")
            return
        if any(prepared[name] != version for name, version in here.items()):
            self.tell(
                f"prepared for torch {prepared['torch']} and triton {prepared['triton']}: the kernels compile here"
            )
        changed = prepared["fingerprint"] != fingerprint()
        if changed:
            self.tell("sources have changed since it was prepared: kernels whose files did compile here")
        if prepared["commit"]:
            self.environment["COMMIT"] = f"{prepared['commit']}{' dirty' if prepared['dirty'] or changed else ''}"
        site = self.work / "site"
        if not site.exists():
            site.mkdir()
            missing = [w for w in (PREPARED / "wheels").glob("*.whl") if not importable(w)]
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile"]
            if missing:
                subprocess.run([*pip, "--target", str(site), *map(str, missing)], check=False, timeout=60)
            if not self.dry and not CACHE.exists():
                CACHE.mkdir()
                with tarfile.open(PREPARED / "cache.tar.xz") as tar:
                    tar.extractall(CACHE, filter="data")
        library = ROOT / "sdo_fast" / "_C_cuda.so"
        if (PREPARED / library.name).exists() and not library.exists():
            shutil.copy(PREPARED / library.name, library)
        self.tell(f"{'set-up':14s} {time.monotonic() - begin:4.0f} s")

    def device(self) -> str:
        import torch

        if self.dry:
            return "REHEARSAL ON THE CPU"
        if not torch.cuda.is_available():
            raise SystemExit("no GPU here (--dry-run rehearses it on the CPU)")
        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.multi_processor_count} multiprocessors"

    def run(self, step: Step) -> None:
        left = self.end - time.monotonic()
        if left < 5:
            self.tell(f"{step.name:14s} no time left")
            self.failures += 1
            self.save()
            return
        begin, log = time.monotonic(), self.work / "logs" / f"{self.part}-{step.name}.txt"
        limit = min(left, step.seconds * (3 if self.dry else 1))
        with open(log, "w") as file:
            processes = [
                # Sessions of their own, so that what a command starts ends with it.
                subprocess.Popen(
                    [sys.executable, *command], cwd=ROOT, env=self.environment | dict(step.environment),
                    stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                )
                for command in step.commands
            ]  # fmt: skip
            statuses = [wait(process, begin + limit) for process in processes]
        words = {0: "ok", NOT_RUN: "not run", None: "out of time"}
        worst = max(statuses, key=lambda status: (status not in (0, NOT_RUN), status is None, status or 0))
        self.failures += worst not in (0, NOT_RUN)
        last = next((line for line in reversed(log.read_text().splitlines()) if line.strip()), "")
        word = words.get(worst, f"FAILED ({worst})")
        self.tell(f"{step.name:14s} {time.monotonic() - begin:4.0f} s  {word:12s} {last.strip()[:150]}")
        for line in log.read_text().splitlines():
            if line.startswith(("FAILED", "ERROR")) or line.endswith("WRONG"):
                self.tell(f"    {line[:200]}")
        self.save()


def importable(wheel: Path) -> bool:
    """Whether this Python has the distribution already."""
    try:
        metadata.distribution(wheel.name.split("-")[0])
    except metadata.PackageNotFoundError:
        return False
    return True


def wait(process: subprocess.Popen[bytes], end: float) -> int | None:
    """Its status, None if it had to be ended: first as by Ctrl-C, on which finished results are kept."""
    try:
        return process.wait(max(0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        for kind, patience in ((signal.SIGINT, 4), (signal.SIGKILL, 4)):
            try:
                os.killpg(process.pid, kind)
                process.wait(patience)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it left behind


def run(part: int, out: Path, dry: bool, work: Path | None, only: Sequence[str]) -> int:
    work = work or Path(tempfile.gettempdir()) / f"swformer_gpu_day{'_rehearsal' * dry}"
    begin, day = time.monotonic(), Day(part, out, dry, work)
    day.set_up()
    day.save()
    steps = is_it_right(dry, work / "scratch") if part == 1 else how_fast(dry, work / "records")
    for step in steps:
        if not only or step.name in only:
            day.run(step)
    day.tell(f"part {part}: {time.monotonic() - begin:.0f} s, {day.failures} steps failed or had no time")
    day.save()
    return int(day.failures > 0)


# records --------------------------------------------------------------------------------------------------------------

BEGIN, END = "<!-- GPU figures: begin -->", "<!-- GPU figures: end -->"


def _cells(variants: Mapping[str, Record], graph: str) -> list[str]:
    """Our milliseconds, and how many times longer eager PyTorch and torch.compile take; `graph` ends the names."""
    times = {name: record.get("p50_ms") for name, record in variants.items() if name.endswith("graph") == bool(graph)}
    ours = times.get(f"ours{graph}")
    compiled = [t for name, t in times.items() if name.startswith("compile") and t]
    rivals = (times.get(f"reference{graph}"), min(compiled, default=None))
    status = str(variants.get(f"ours{graph}", {}).get("status", "not measured"))
    return [f"{ours:.3f}" if ours else status, *(f"{rival / ours:.2f}" if rival and ours else "-" for rival in rivals)]


def figures(suites: Mapping[str, Sequence[Record]]) -> list[str]:
    """The README's rows, of the block and the network."""
    rows = [record for suite in ("block", "network") for record in suites.get(suite, ())]
    if not rows:
        return []
    first = rows[0]
    note = "REHEARSAL ON THE CPU, no figures of a GPU: " if first.get("rehearsal") else "Measured on "
    where = f"{first['device']}, torch {first['torch']}, triton {first['triton']}, commit {first.get('commit')}"
    lines = [
        f"{note}{where}; medians; CUDA graphs on both sides in the last columns (`benchmarks/gpu_day.sh run 2`):",
        "",
        "| work | ours, ms | eager | torch.compile | ours in a graph, ms | eager | torch.compile |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    cases: dict[str, dict[str, Record]] = {}
    for record in rows:
        cases.setdefault(record["case"], {})[record["variant"]] = record
    for case, variants in cases.items():
        lines.append(f"| {case} | {' | '.join([*_cells(variants, ''), *_cells(variants, ', CUDA graph')])} |")
    return lines


def records_of(tars: Sequence[Path], out: Path, readme: Path) -> int:
    """Put the tars' records into `out`, draw its tables and plots, and put the rows into the README."""
    from . import records, report

    with tempfile.TemporaryDirectory() as folder:
        for path in tars:
            with tarfile.open(path) as tar:
                tar.extractall(folder, filter="data")
        suites = records.load(Path(folder) / "records")
        if not suites:
            print("the tars hold no records (they are of `run 2`)", file=sys.stderr)
            return 1
        for suite, rows in suites.items():
            records.keep(suite, rows, complete=True, folder=out)
        shutil.copy(Path(folder) / "summary.txt", out / "gpu_day.txt")
    report.write(out)
    text = readme.read_text()
    if BEGIN in text and END in text:
        before, after = text.split(BEGIN)[0], text.split(END)[1]
        records.write_atomically(readme, "\n".join([before + BEGIN, *figures(suites), END]) + after)
    print(f"records: {out}; rows: {readme}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    from . import records

    parser = argparse.ArgumentParser(
        prog="gpu_day.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="run it with a Python that has the GPU machine's torch and triton")
    one.add_argument("--target", default="sm_90")
    one.add_argument("--python", default="3.12", help="the GPU machine's, for wheels")
    one.add_argument("--quick", action="store_true", help="only a few kernels, to try it out")
    one = commands.add_parser("run")
    one.add_argument("part", type=int, choices=list(SECONDS))
    one.add_argument("out", type=Path)
    one.add_argument("--dry-run", action="store_true", help="rehearse it on the CPU, small")
    one.add_argument("--work", type=Path, help="folder of logs, records and caches (default: a temporary one, kept)")
    one.add_argument("--only", nargs="+", default=[], metavar="STEP")
    one = commands.add_parser("records")
    one.add_argument("tars", nargs="+", type=Path, metavar="TAR")
    one.add_argument("--out", type=Path, default=records.RESULTS)
    one.add_argument("--readme", type=Path, default=ROOT / "README.md")
    one = commands.add_parser("memcheck")
    one.add_argument("families", nargs="+")
    args = parser.parse_args(argv)
    if args.command == "prepare":
        return prepare(args.target, args.python, args.quick)
    if args.command == "run":
        return run(args.part, args.out, args.dry_run, args.work, args.only)
    if args.command == "records":
        return records_of(args.tars, args.out, args.readme)
    return memcheck(args.families)


if __name__ == "__main__":
    sys.exit(main())
