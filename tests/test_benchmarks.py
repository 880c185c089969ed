"""The benchmark harness: the correctness gate, interleaving, records, suites."""

import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

import swformer_fast as sf
from benchmarks import __main__ as command
from benchmarks import gpu, harness, records, report
from benchmarks.harness import Case, Options, Timer, Variant, Work

ROOT = Path(__file__).parent.parent
QUICK = Options(quick=True, budget=0.01)


def case(name: str = "add", **variants: Variant) -> Case:
    x = torch.randn(1000)

    def make() -> Work:
        base = {"reference": Variant(lambda: x + 1)}
        return Work(base | variants, lambda: x.double() + 1, {"reference": 0.001})

    return Case(name, make)


@pytest.mark.parametrize(
    "wrong", [torch.zeros(1000), torch.randn(1000), torch.ones(999), torch.full((1000,), float("nan"))]
)
def test_gate_refuses_a_wrong_variant(wrong: torch.Tensor) -> None:
    rows = harness.measure(case(ours=Variant(lambda: wrong, ours=True)), QUICK)
    assert rows[1]["status"].startswith("FAILED: relative RMS error")
    assert "ratio" not in rows[1]
    assert harness.failed(rows)


def test_gate_passes_a_right_variant_and_measures_it() -> None:
    x = torch.randn(1000)
    work = Work(
        {"reference": Variant(lambda: x + 1), "ours": Variant(lambda: x + 1, ours=True)}, lambda: x.double() + 1
    )
    rows = harness.measure(Case("add", lambda: work), QUICK)
    assert not harness.failed(rows)
    assert rows[0]["ratio"] == 1
    assert rows[1]["rounds"] >= 5
    assert 0 < rows[1]["p20_ms"] <= rows[1]["p50_ms"] <= rows[1]["p80_ms"]


def test_a_variant_that_raises_says_so() -> None:
    def broken() -> None:
        raise RuntimeError("no such kernel")

    rows = harness.measure(case(ours=Variant(broken, ours=True)), QUICK)
    assert rows[1]["status"] == "FAILED: RuntimeError: no such kernel"
    assert harness.failed(rows)


def test_rows_that_cannot_run_say_why() -> None:
    rows = harness.measure(case(ours=Variant(None, ours=True, note="no GPU")), QUICK)
    assert rows[1]["status"] == "not measured: no GPU"
    assert not harness.failed(rows)
    assert "not measured: no GPU" in report.row(rows[1])


def test_variants_take_turns_in_rotated_order(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    runs = {name: lambda name=name: calls.append(name) for name in "abc"}
    timer = Timer()
    monkeypatch.setattr(Timer, "__call__", lambda self, run, repeats=1: run() or 1.0)
    times = harness.interleave(runs, timer, budget=0)
    rounds = "".join(calls[6:])  # behind warm-up and calibration
    assert rounds == "abcbcacababcbca"
    assert all(len(values) == 5 for values in times.values())


def test_saved_bytes_counts_storages_once() -> None:
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    assert harness.saved_bytes(lambda: (x @ weight).sin(), [weight]) == x.nbytes + 8 * 4 * 4


def test_timer_counts_calls() -> None:
    calls: list[int] = []
    assert Timer()(lambda: calls.append(1), 3) > 0
    assert len(calls) == 3


def test_records_and_report_round_trip(tmp_path: Path) -> None:
    rows = harness.measure(case(ours=Variant(None, ours=True, note="no GPU")), QUICK)
    records.save(tmp_path, "add", "cpu", rows, complete=True)
    (document,) = records.load(tmp_path)
    assert document["records"] == json.loads(json.dumps(rows))
    assert {"commit", "dirty", "device", "threads", "packages", "variables"} <= document["environment"].keys()
    report.write(tmp_path)
    assert "not measured: no GPU" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "add.png").stat().st_size > 1000
    assert (tmp_path / "add.csv").read_text().startswith("case,variant,ours")
    assert not list(tmp_path.glob(".*"))


def test_interrupted_run_keeps_finished_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> Work:
        raise KeyboardInterrupt

    module = type("Suite", (), {"cases": staticmethod(lambda options: [case("first"), Case("second", interrupt)])})
    monkeypatch.setitem(sys.modules, "benchmarks.bench_haar", module)
    assert command.main(["haar", "--quick", "--out", str(tmp_path)]) == 130
    (document,) = records.load(tmp_path)
    assert not document["complete"]
    assert {record["case"] for record in document["records"]} == {"first"}


def test_a_failed_gate_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = case(ours=Variant(lambda: torch.zeros(1000), ours=True))
    module = type("Suite", (), {"cases": staticmethod(lambda options: [wrong])})
    monkeypatch.setitem(sys.modules, "benchmarks.bench_haar", module)
    assert command.main(["haar", "--quick", "--out", str(tmp_path)]) == 1


def test_unknown_suite_and_missing_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["no-such-suite"])
    assert "unknown suite no-such-suite" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            command.main(["haar", "--device", "cuda"])
        assert "no GPU" in capsys.readouterr().err


def test_suites_are_found_by_name() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--list"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {"haar", "network", "sdo"} <= set(run.stdout.split())


def test_quick_haar_suite(tmp_path: Path) -> None:
    assert command.main(["haar", "--quick", "--out", str(tmp_path)]) == 0
    (document,) = records.load(tmp_path)
    ours = [r for r in document["records"] if r["variant"] == "ours (cpp)"]
    assert len(ours) == 4
    assert all(r["status"] == "ok" or r["status"].startswith("not measured") for r in ours)
    triton = [r["status"] for r in document["records"] if r["variant"] == "ours (triton)"]
    assert torch.cuda.is_available() or set(triton) == {"not measured: no GPU"}


def test_rehearsal_times_graphs_and_prints_fractions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["haar", "--device", "cuda", "--dry-run", "--out", str(tmp_path)]) == 0
    (haar,) = records.load(tmp_path)
    assert haar["environment"]["rehearsal"]
    assert {"copy GB/s", "matmul fp32 TFLOP/s", "matmul tf32 TFLOP/s"} <= haar["environment"]["peaks"].keys()
    rows = {r["variant"]: r for r in haar["records"]}
    assert {"reference", "reference, CUDA graph"} <= rows.keys()
    for row in haar["records"]:
        if row["status"] == "ok":
            assert row["GB/s"] > 0, row
            assert row["of_copy"] > 0, row
    printed = capsys.readouterr().out
    assert "measured peaks: copy GB/s" in printed
    assert "REHEARSAL ON THE CPU" in (tmp_path / "README.md").read_text()
    assert "% of the measured copy rate" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("precision", harness.PRECISIONS)
def test_precision_of_a_case(precision: str) -> None:
    x, weight = torch.randn(4, 8), torch.randn(8, 8)
    seen: list[tuple[str, bool, bool]] = []

    def product() -> torch.Tensor:
        cudnn = torch.backends.cudnn.allow_tf32
        seen.append((torch.get_float32_matmul_precision(), cudnn, torch.is_autocast_enabled("cpu")))
        return x @ weight

    def make() -> Work:
        return Work(
            {"reference": Variant(product), "ours": Variant(product, ours=True)}, lambda: x.double() @ weight.double()
        )

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    rows = harness.measure(Case("product", make), replace(QUICK, precision=precision))
    wanted = {"fp32": ("highest", False, False), "tf32": ("high", True, False), "bf16": ("highest", False, True)}
    assert set(seen) == {wanted[precision]}
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert {r["case"] for r in rows} == {"product" if precision == "fp32" else f"product, {precision}"}
    assert all(r["status"] == "ok" for r in rows)
    assert (rows[0]["error"] > 1e-4) == (precision == "bf16")


def test_ours_may_err_twice_as_far_as_the_baseline() -> None:
    x = torch.randn(1000)

    def off(by: float) -> torch.Tensor:
        return x * (1 + by)

    def make() -> Work:
        variants = {"reference": Variant(lambda: off(0.01)), "ours": Variant(lambda: off(0.019), ours=True)}
        return Work(variants | {"ours, worse": Variant(lambda: off(0.021), ours=True)}, lambda: x.double())

    rows = harness.measure(Case("off", make), replace(QUICK, precision="tf32"))
    assert [r["status"][:6] for r in rows] == ["ok", "ok", "FAILED"]


def test_a_suite_without_its_packages_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.bench_step", None)
    module = type("Suite", (), {"cases": staticmethod(lambda options: [case("first")])})
    monkeypatch.setitem(sys.modules, "benchmarks.bench_haar", module)
    assert command.main(["step", "haar", "--quick", "--out", str(tmp_path)]) == 1
    assert "step: not measured:" in capsys.readouterr().err
    assert [d["suite"] for d in records.load(tmp_path)] == ["haar"]


def test_sources_are_known_or_said_not_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")  # no repository
    assert records.version_of_sources() == (None, None)
    monkeypatch.setenv("COMMIT", "abc1234 dirty")
    assert records.version_of_sources() == ("abc1234", True)
    monkeypatch.setenv("PATH", "")  # no git
    assert records.version_of_sources() == ("abc1234", True)
    monkeypatch.setenv("COMMIT", "abc1234")
    assert records.version_of_sources() == ("abc1234", False)
    rows = harness.measure(case(), QUICK)
    monkeypatch.delenv("COMMIT")
    records.save(tmp_path, "add", "cpu", rows, complete=True)
    assert "commit None (changes unknown)" in report.markdown(records.load(tmp_path)[0])


def test_what_falls_back_is_not_timed_as_ours() -> None:
    """On a GPU ours is what the Triton kernels do; an op that cannot take its input fails its row."""
    from benchmarks.families import on_device

    x, taps = torch.randn(1, 1, 4, 4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    fallen = on_device("cuda")(lambda: sf.functional.haar_dwt2d(x, taps, taps))
    rows = harness.measure(case(ours=Variant(fallen, ours=True)), QUICK)
    assert rows[1]["status"].startswith("FAILED: RuntimeError: backend 'triton' was asked for")


def test_every_public_function_has_arguments() -> None:
    from benchmarks.arguments import ARGUMENTS, functions

    assert set(ARGUMENTS) == set(sf.functional.__all__)
    for name, make in ARGUMENTS.items():
        args = tuple(make((1, 4, 6, 8)))
        with torch.no_grad():
            ours, theirs = (function(*args) for function in functions(name))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["multiscale_ffn", "haar_dwt2d"])
def test_correct_finds_a_wrong_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks import correct

    monkeypatch.setattr(correct, "ARGUMENTS", {name: correct.ARGUMENTS[name]})
    assert correct.main(["--dry-run"]) == 0
    implementation = sf.backend._implementation

    def damaged(op: sf.backend.Implementations, backend: str) -> Any:
        run = implementation(op, backend)
        return (lambda *args: run(*args).roll(1, -1)) if (op.name, backend) == (name, "triton") else run

    monkeypatch.setattr(sf.backend, "_implementation", damaged)
    assert correct.main(["--dry-run"]) == 1


def test_prefill_compiles_for_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "benchmarks.prefill", "sm_90", "--quick"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert len(list(tmp_path.rglob("*.cubin"))) == int(re.findall(r"(\d+) kernels", run.stdout)[-1]) >= 8


def test_dry_run_is_of_the_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["haar", "--dry-run"])
    assert "--dry-run rehearses --device cuda" in capsys.readouterr().err


def test_footprint_counts_what_must_be_moved() -> None:
    x, weight = torch.randn(8, 16), torch.randn(16, 4)
    moved, flops = gpu.footprint(lambda: (x @ weight).relu() + x.sum())
    assert (moved, flops) == (x.nbytes + weight.nbytes + 8 * 4 * 4, 2 * 8 * 16 * 4)
    assert gpu.fractions(1e-3, 10**9, 0, {"copy GB/s": 2000}) == {"GB/s": 1000, "of_copy": 0.5}


def test_a_run_that_cannot_be_captured_says_so() -> None:
    class Refusing(gpu.Rehearsal):
        def capture(self, run: gpu.Run) -> gpu.Run:
            raise RuntimeError("operation not permitted when stream is capturing")

    options = Options(quick=True, budget=0.01, gpu=Refusing(), peaks=gpu.Rehearsal().peaks())
    rows = harness.measure(case(ours=Variant(lambda: torch.ones(1000), ours=True, compared=False)), options)
    assert [r["variant"] for r in rows] == ["reference", "ours", "reference, CUDA graph", "ours, CUDA graph"]
    assert rows[2]["status"].startswith("not measured: cannot be captured: RuntimeError: operation not permitted")
    assert not harness.failed(rows)


def test_what_runs_beside_the_gpu_is_not_captured() -> None:
    options = Options(quick=True, budget=0.01, gpu=gpu.Rehearsal(), peaks=gpu.Rehearsal().peaks())
    rows = harness.measure(case(numpy=Variant(lambda: [1.0], compared=False)), options)
    assert [r["variant"] for r in rows] == ["reference", "numpy", "reference, CUDA graph"]


def test_captured_runs_pass_the_gate() -> None:
    class Wrong(gpu.Rehearsal):
        def capture(self, run: gpu.Run) -> gpu.Run:
            return lambda: torch.zeros(1000)

    x = torch.randn(1000)
    work = Work({"reference": Variant(lambda: x + 1, ours=True)}, lambda: x.double() + 1)
    options = Options(quick=True, budget=0.01, gpu=Wrong(), peaks=gpu.Rehearsal().peaks())
    rows = harness.measure(Case("add", lambda: work), options)
    assert rows[1]["status"].startswith("FAILED: relative RMS error")
    assert harness.failed(rows)


@pytest.mark.parametrize("suite", ["attention", "ffn", "norm", "spatial", "step", "wavelet"])
def test_suites_keep_their_tensors_on_the_device(suite: str) -> None:
    """On the meta device, where nothing is computed, a tensor left on the CPU is an error as it is on a GPU."""
    module = importlib.import_module(f"benchmarks.bench_{suite}")
    for each in module.cases(Options(quick=True, device="meta")):
        baseline = next(iter(each.make().variants.values()))
        assert baseline.run is not None
        assert all(leaf.is_meta for leaf in tree_leaves(baseline.run()))
