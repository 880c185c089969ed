"""The script of a GPU's first minutes, as far as a CPU can rehearse it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks import gpu_day, records
from benchmarks.gpu_day import Day, Step

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu_day.sh"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="rehearses on the CPU")


def script(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.fixture
def day(tmp_path: Path) -> Day:
    return Day(1, tmp_path / "out", True, tmp_path / "work")


def python(code: str) -> list[str]:
    return ["-c", code]


def summary(day: Day) -> str:
    """As the tar holds it."""
    with tarfile.open(day.out / "gpu_day_1.tgz") as tar:
        member = tar.extractfile("summary.txt")
        assert member is not None
        return member.read().decode()


def test_each_step_is_told_and_kept(day: Day) -> None:
    day.run(Step("first", 20, [python("print('all is well')")]))
    assert re.search(r"first +\d+ s  ok +all is well", summary(day))
    day.run(Step("second", 20, [python("print('FAILED tests/test_x.py::test_y'); raise SystemExit(2)")]))
    day.run(Step("third", 20, [python("raise SystemExit(3)"), python("print('side by side')")]))
    assert day.failures == 1
    text = summary(day)
    assert "FAILED (2)" in text
    assert "    FAILED tests/test_x.py::test_y" in text
    assert re.search(r"third +\d+ s  not run", text)
    with tarfile.open(day.out / "gpu_day_1.tgz") as tar:
        assert {"logs/1-first.txt", "logs/1-second.txt", "logs/1-third.txt"} <= set(tar.getnames())
    assert not list(day.out.glob(".*"))


def test_a_step_out_of_time_ends_with_all_that_it_started(day: Day, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    code = "import os, subprocess, sys, time; child = subprocess.Popen(['sleep', '600']);"
    code += f"open({str(pid)!r}, 'w').write(str(child.pid)); time.sleep(600)"
    day.end = time.monotonic() + 6
    begin = time.monotonic()
    day.run(Step("endless", 600, [python(code), python("print('quick')")]))
    assert time.monotonic() - begin < 20
    assert re.search(r"endless +\d+ s  out of time", summary(day))
    child = Path(f"/proc/{pid.read_text()}/stat")

    def gone() -> bool:
        try:
            return child.read_text().split()[2] == "Z"
        except (FileNotFoundError, ProcessLookupError):
            return True

    for _ in range(50):  # what is killed still runs for a moment
        if gone():
            break
        time.sleep(0.1)
    assert gone()
    day.run(Step("late", 600, [python("print('never')")]))
    assert "late           no time left" in summary(day)
    assert day.failures == 2


def test_the_parts_have_their_limits() -> None:
    assert gpu_day.SECONDS == {1: 400, 2: 330}
    for part, steps in ((1, gpu_day.is_it_right(False, ROOT)), (2, gpu_day.how_fast(False, ROOT))):
        assert len({step.name for step in steps}) == len(steps)
        assert all(step.seconds <= gpu_day.SECONDS[part] / 2 for step in steps)
    assert next(iter(gpu_day.is_it_right(False, ROOT))).name == "correct"


def test_the_products_come_first() -> None:
    from benchmarks.inspection.arguments import ARGUMENTS

    assert list(ARGUMENTS)[:2] == ["multiscale_ffn", "fourier_mix"]


@pytest.mark.parametrize("dry", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_the_steps_find_their_tests(dry: bool) -> None:
    """On a GPU's machine there is no time to find out that a name has changed."""
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    pytest.importorskip("pytest_timeout", reason="pytest-timeout is not installed")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["GPU_REHEARSAL"] = "1" if dry else ""
    for step in gpu_day.is_it_right(dry, ROOT):
        for command in step.commands:
            if "pytest" in command:
                collect = [sys.executable, *command, "--collect-only", "-q", "-n", "0"]
                run = subprocess.run(collect, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
                assert run.returncode == 0, (step.name, run.stdout[-2000:])


def test_the_steps_name_modules_and_suites_that_exist() -> None:
    suites = {path.stem.removeprefix("bench_") for path in (ROOT / "benchmarks").glob("bench_*.py")}
    for dry in (False, True):
        for step in (*gpu_day.is_it_right(dry, ROOT), *gpu_day.how_fast(dry, ROOT)):
            for flag, module, *options in step.commands:
                assert flag == "-m"
                if module == "benchmarks":
                    assert options[0] in suites
                elif module != "pytest":
                    assert (ROOT / f"{module.replace('.', '/')}.py").exists()


def test_memcheck_without_the_sanitizer(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu_day.shutil, "which", lambda name: None)
    monkeypatch.setattr(gpu_day.Path, "glob", lambda self, pattern: iter(()))
    assert gpu_day.memcheck(["haar_dwt2d"]) == gpu_day.NOT_RUN
    assert "no compute-sanitizer" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    run = script("run", "1", tmp_path)
    assert run.returncode != 0
    assert "no GPU here (--dry-run rehearses it on the CPU)" in run.stderr


def test_prepared_versions_are_compared(day: Day, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_day, "PREPARED", tmp_path)
    day.set_up()
    assert "nothing was prepared" in (day.work / "summary.txt").read_text()
    manifest = {"commit": "abc1234", "dirty": False, "target": "sm_90", "torch": "2.0", "triton": "3.0"}
    (tmp_path / "wheels").mkdir()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "other"}))
    day.set_up()
    text = (day.work / "summary.txt").read_text()
    assert "prepared for torch 2.0 and triton 3.0" in text
    assert "sources have changed since it was prepared" in text
    assert day.environment["COMMIT"] == "abc1234 dirty"


def test_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What travels: codes and what describes them, no intermediate ones; and not too much of it."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        if "benchmarks.inspection.prefill" in command:
            folder = Path(options["env"]["TRITON_CACHE_DIR"]) / "KEY"
            folder.mkdir(parents=True)
            for name in ("kernel.cubin", "kernel.json", "kernel.ttir", "kernel.ptx"):
                (folder / name).write_text(name)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(gpu_day, "PREPARED", tmp_path / ".gpu")
    monkeypatch.setattr(gpu_day, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(records, "version_of_sources", lambda: ("abc1234", True))
    monkeypatch.setattr(gpu_day.subprocess, "run", run)
    assert gpu_day.main(["prepare", "--quick"]) == 0
    assert [c[2] for c in commands] == ["pip", "benchmarks.inspection.prefill"]
    assert set(gpu_day.WHEELS) <= set(commands[0])
    assert commands[1][-2:] == ["sm_90", "--quick"]
    with tarfile.open(tmp_path / ".gpu" / "cache.tar.xz") as tar:
        assert {Path(name).suffix for name in tar.getnames()} == {"", ".cubin", ".json"}
    manifest = json.loads((tmp_path / ".gpu" / "manifest.json").read_text())
    assert {"commit", "dirty", "target", "fingerprint", "torch", "triton"} == set(manifest)
    monkeypatch.setattr(gpu_day, "LARGEST", 10)
    assert gpu_day.main(["prepare", "--quick"]) == 1
    assert "more than" in capsys.readouterr().out


def timings(suite: str, rehearsal: bool) -> list[dict[str, Any]]:
    rows = []
    for case in (f"{suite} eval", f"{suite} eval, bf16"):
        times = {"reference": 8.0, "compile": 4.0, "compile, no layout opt.": 3.0, "ours": 2.0}
        for graph, scale in (("", 1.0), (", CUDA graph", 0.5)):
            for name, ms in times.items():
                rows.append({"case": case, "variant": name + graph, "ours": name == "ours", "status": "ok"})
                rows[-1] |= {"p50_ms": ms * scale, "ratio": 8.0 / ms}
    rows[-1] = {**rows[-1], "status": "not measured: cannot be captured"}
    del rows[-1]["p50_ms"]
    environment = {**records.environment("cpu"), "device": "NVIDIA H100", "capability": "9.0", "commit": "abc1234"}
    return [environment | {"rehearsal": rehearsal or None} | row for row in rows]


def test_records_become_rows_of_the_readme(tmp_path: Path) -> None:
    folder, out, readme = tmp_path / "work", tmp_path / "out", tmp_path / "README.md"
    (folder / "records").mkdir(parents=True)
    (folder / "summary.txt").write_text("part 2\n")
    records.save(folder / "records", "block", timings("block", False))
    cpu = [row | {"device": "a CPU", "capability": "AVX2"} for row in timings("block", False)]
    records.save(out, "block", cpu)
    with tarfile.open(tmp_path / "day.tgz", "w:gz") as tar:
        tar.add(folder, ".")
    readme.write_text(f"# Title\n\n{gpu_day.BEGIN}\nnot measured: no GPU\n{gpu_day.END}\n\nThe end.\n")
    arguments = ["records", str(tmp_path / "day.tgz"), "--out", str(out), "--readme", str(readme)]
    assert gpu_day.main(arguments) == 0
    text = readme.read_text()
    assert text.startswith("# Title\n\n")
    assert text.endswith(f"{gpu_day.END}\n\nThe end.\n")
    assert "not measured: no GPU" not in text
    assert "Measured on NVIDIA H100" in text
    assert "commit abc1234" in text
    assert "| block eval | 2.000 | 4.00 | 1.50 | 1.000 | 4.00 | 1.50 |" in text
    assert "| block eval, bf16 | 2.000 | 4.00 | 1.50 | not measured: cannot be captured | - | - |" in text
    assert {row["device"] for row in records.read(out / "block.csv")} == {"a CPU", "NVIDIA H100"}
    assert "| a CPU (AVX2) | NVIDIA H100 (9.0) |" in (out / "README.md").read_text()
    assert (out / "gpu_day.txt").read_text() == "part 2\n"
    assert gpu_day.main(arguments) == 0
    assert readme.read_text() == text


def test_a_rehearsal_is_called_one() -> None:
    assert "REHEARSAL ON THE CPU, no figures of a GPU" in gpu_day.figures({"network": timings("network", True)})[0]


def test_the_readme_has_a_place_for_the_figures() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count(gpu_day.BEGIN) == text.count(gpu_day.END) == 1
    assert text.index(gpu_day.BEGIN) < text.index(gpu_day.END)


def test_a_lasting_error_ends_its_worker_alone(tmp_path: Path) -> None:
    pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    code = "import pytest\nerrors = {2: 'an illegal memory access was encountered', 3: 'out of memory'}\n"
    code += "@pytest.mark.parametrize('i', range(6))\ndef test(i):\n"
    code += "    if i in errors: raise RuntimeError(f'CUDA error: {errors[i]}')\n"
    (tmp_path / "test_lasting.py").write_text(code)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", str(tmp_path)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}  # this may be a worker's own
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "worker 'gw0' crashed while running" in run.stdout
    assert "worker 'gw1' crashed" not in run.stdout
    assert re.search(r"[23] failed, 4 passed", run.stdout), run.stdout[-500:]


def test_the_script_has_no_syntax_errors() -> None:
    assert os.access(SCRIPT, os.X_OK)
    run = subprocess.run(["bash", "-n", SCRIPT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.slow
def test_dry_run_of_the_day(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for part in ("1", "2"):
        run = script("run", part, tmp_path, "--dry-run", "--work", work)
        assert run.returncode == 0, run.stdout
    text = (work / "summary.txt").read_text()
    steps = [*gpu_day.is_it_right(True, work), *gpu_day.how_fast(True, work)]
    assert len(re.findall(r" s  ok ", text)) == len(steps), text
    readme = tmp_path / "README.md"
    readme.write_text(f"{gpu_day.BEGIN}\n{gpu_day.END}\n")
    out = tmp_path / "records"
    assert gpu_day.main(["records", str(tmp_path / "gpu_day_2.tgz"), "--out", str(out), "--readme", str(readme)]) == 0
    assert "REHEARSAL ON THE CPU" in readme.read_text()
    assert {"block", "network", "haar", "channel_attention", "sampler_step"} == set(records.load(out))
