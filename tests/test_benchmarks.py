"""The benchmark harness: the correctness gate, interleaving, records, suites."""

import ast
import graphlib
import importlib
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
from benchmarks import bench_haar, command, gpu, harness, records, report
from benchmarks.harness import Case, Options, Timer, Variant, Work

ROOT = Path(__file__).parent.parent
QUICK = Options(quick=True, budget=0.01)


WITH_NUMBERS = ("fourier_mix", "haar", "paths", "reuse", "sdo")
"""Suites that read numbers, which the meta device has none of."""


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
    environment = {k: v for k, v in records.environment("cpu").items() if v not in (None, "")} | {"commit": "12345e6"}
    rows = [{**environment, **row} for row in rows]
    records.save(tmp_path, "add", rows)
    (kept,) = records.load(tmp_path).values()
    for before, after in zip(rows, kept, strict=True):
        assert {k: v if isinstance(v, str | bool) else pytest.approx(v, rel=1e-4) for k, v in before.items()} == after
    report.write_tables(tmp_path, "add", report.timings(kept))
    assert "not measured: no GPU" in (tmp_path / "add.md").read_text()
    assert (tmp_path / "add.csv").read_text().startswith("date,commit,dirty,torch,triton,versions,device,")
    assert not list(tmp_path.glob(".*"))


def timed(name: str, device: str, ratio: float, **columns: Any) -> dict[str, Any]:
    place = {"device": device, "capability": "AVX2", "threads": 1, "date": "2026-01-01", "commit": "abc1234"}
    return {
        **place,
        "dirty": False,
        "torch": "2.13.0",
        "case": name,
        "status": "ok",
        "p50_ms": 6 / ratio,
        "ratio": ratio,
    } | columns


def pair(name: str, device: str, ratio: float) -> list[dict[str, Any]]:
    variants = (("reference", 1.0), ("compile", 1.5), ("ours", ratio))
    return [timed(name, device, r, variant=v, ours=v == "ours") for v, r in variants]


def test_records_replace_those_of_their_place(tmp_path: Path) -> None:
    def kept() -> list[tuple[Any, ...]]:
        ours = [r for r in records.read(tmp_path / "add.csv") if r["ours"]]
        return sorted((r["device"], r["case"], r["ratio"]) for r in ours)

    records.keep("add", pair("add 2x2", "A", 2) + pair("add 4x4", "A", 4), True, tmp_path)
    records.keep("add", pair("add 2x2", "B", 3), True, tmp_path)
    assert kept() == [("A", "add 2x2", 2), ("A", "add 4x4", 4), ("B", "add 2x2", 3)]
    records.keep("add", pair("add 2x2", "A", 5), False, tmp_path)
    assert kept() == [("A", "add 2x2", 5), ("A", "add 4x4", 4), ("B", "add 2x2", 3)]
    records.keep("add", pair("add 4x4", "A", 6), True, tmp_path)
    assert kept() == [("A", "add 4x4", 6), ("B", "add 2x2", 3)]


def test_the_summary_is_short_and_says_what_came_out(tmp_path: Path) -> None:
    rows = pair("add 2x2", "A", 2) + pair("add 4x4", "A", 4) + pair("subtract 2x2", "A", 3)
    rows.append(timed("add 2x2", "A", 1, variant="peer", ours=False) | {"status": "not measured: peer: No module"})
    rows.append(timed("add 4x4", "A", 1, variant="other", ours=True) | {"status": "FAILED: relative RMS error"})
    text = report.summary({"add": rows}, tmp_path)
    assert "add: 3 (2-4); 2 over torch.compile" in text
    assert "subtract: 3; 2 over torch.compile" in text
    assert "not measured: peer: No module\n" in text
    assert "add 4x4, other: FAILED: relative RMS error" in text
    assert str(tmp_path) in text
    many = report.summary({f"suite{i}": rows[:6] for i in range(8)}, tmp_path)
    assert len(many.splitlines()) <= 12
    assert "suite7" in many
    assert "2 cases: 3 (2-4); 2 over torch.compile" in many


def test_the_readme_of_the_records_holds_headlines_of_each_place(tmp_path: Path) -> None:
    records.save(tmp_path, "add", pair("add 2x2", "A", 2) + pair("add 4x4", "A", 4) + pair("add 2x2", "B", 3))
    report.write(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "| add | add | 2 | 3 (2-4); 2 over torch.compile | 3; 2 over torch.compile | not measured: no GPU |" in text
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_the_tracked_records_are_slim_and_their_readme_is_theirs() -> None:
    files = subprocess.run(["git", "ls-files", records.RESULTS], cwd=ROOT, capture_output=True, text=True, check=False)
    if files.returncode or not files.stdout:
        pytest.skip("no repository here")
    names = {Path(name).name for name in files.stdout.split()}
    others = {name for name in names if not name.endswith(".csv")}
    assert others - {"gpu_day.txt"} == {"README.md", "paths.png", "sdo.png", "speed.png"}
    text = (records.RESULTS / "README.md").read_text()
    assert text == report.markdown(records.load(records.RESULTS))
    assert len(text.splitlines()) <= 170


def test_a_peer_that_fails_to_import_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(x: torch.Tensor) -> Any:
        raise ModuleNotFoundError("No module named 'pkg_resources'")

    monkeypatch.setitem(bench_haar.LIBRARIES, "pytorch_wavelets", fails)
    variants = bench_haar.peers([torch.randn(1, 1, 4, 4)])
    row, run = harness.try_variant({}, variants["pytorch_wavelets"], None)
    assert run is None
    assert row["status"] == "not measured: pytorch_wavelets: No module named 'pkg_resources'"


def imports(path: Path) -> set[str]:
    """The modules of benchmarks that a file imports, anywhere in it."""
    package = [*path.relative_to(ROOT).parent.parts]
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            names |= {".".join(module), *(".".join([*module, alias.name]) for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {name for name in names if name.startswith("benchmarks.")}


def test_imports_go_one_way() -> None:
    """No circle among the modules of benchmarks, and what is timed needs nothing of inspection but for the GPU day."""
    paths = (ROOT / "benchmarks").rglob("*.py")
    graph = {".".join(path.relative_to(ROOT).with_suffix("").parts): imports(path) for path in paths}
    edges = {name: modules & graph.keys() for name, modules in graph.items()}
    assert len(edges) > 25
    list(graphlib.TopologicalSorter(edges).static_order())  # raises CycleError
    inspecting = {name for name in edges if any(m.startswith("benchmarks.inspection") for m in edges[name])}
    assert {name for name in inspecting if not name.startswith("benchmarks.inspection")} == {"benchmarks.gpu_day"}


def test_interrupted_run_keeps_finished_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> Work:
        raise KeyboardInterrupt

    module = type("Suite", (), {"cases": staticmethod(lambda options: [case("first"), Case("second", interrupt)])})
    monkeypatch.setitem(sys.modules, "benchmarks.bench_haar", module)
    assert command.main(["haar", "--quick", "--out", str(tmp_path)]) == 130
    (rows,) = records.load(tmp_path).values()
    assert {record["case"] for record in rows} == {"first"}
    assert "first" in (tmp_path / "haar.md").read_text()


def test_a_run_leaves_the_tracked_records_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = type("Suite", (), {"cases": staticmethod(lambda options: [case("first")])})
    monkeypatch.setitem(sys.modules, "benchmarks.bench_haar", module)
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(records, "OUTPUT", tmp_path / "output")
    assert command.main(["haar", "--budget", "0.01"]) == 0
    assert {path.name for path in (tmp_path / "output").iterdir()} >= {"haar.csv", "haar.md"}
    assert not (tmp_path / "results").exists()
    assert command.main(["haar", "--budget", "0.01", "--record"]) == 0
    assert {path.name for path in (tmp_path / "results").iterdir()} >= {"haar.csv", "README.md"}


def test_records_are_of_full_size(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["haar", "--quick", "--record"])
    assert "--record keeps figures of full size" in capsys.readouterr().err


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
    (rows,) = records.load(tmp_path).values()
    ours = [r for r in rows if r["variant"] == "ours (cpp)"]
    assert len(ours) == 4
    assert all(r["status"] == "ok" or r["status"].startswith("not measured") for r in ours)
    triton = [r["status"] for r in rows if r["variant"] == "ours (triton)"]
    assert torch.cuda.is_available() or set(triton) == {"not measured: no GPU"}


def test_rehearsal_times_graphs_and_prints_fractions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["haar", "--device", "cuda", "--dry-run", "--out", str(tmp_path)]) == 0
    (haar,) = records.load(tmp_path).values()
    assert all(row["rehearsal"] for row in haar)
    assert re.match(r"copy GB/s .*, matmul fp32 TFLOP/s .*, matmul tf32 TFLOP/s .*", haar[0]["peaks"])
    assert {"reference", "reference, CUDA graph"} <= {row["variant"] for row in haar}
    for row in haar:
        if row["status"] == "ok":
            assert row["GB/s"] > 0, row
            assert row["of_copy"] > 0, row
    printed = capsys.readouterr().out
    assert "measured peaks: copy GB/s" in printed
    assert "REHEARSAL ON THE CPU" in printed
    assert "REHEARSAL ON THE CPU" in (tmp_path / "haar.md").read_text()
    assert "% of the measured copy rate" in (tmp_path / "haar.md").read_text()


@pytest.mark.parametrize("dtype", ["fp32", "tf32", "autocast"])
def test_products_of_a_case(dtype: str) -> None:
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
    rows = harness.measure(Case("product", make), replace(QUICK, dtype=dtype))
    wanted = {"fp32": ("highest", False, False), "tf32": ("high", True, False), "autocast": ("highest", False, True)}
    assert set(seen) == {wanted[dtype]}
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert {r["case"] for r in rows} == {"product" if dtype == "fp32" else f"product, {dtype}"}
    assert all(r["status"] == "ok" for r in rows)
    assert (rows[0]["error"] > 1e-4) == (dtype == "autocast")


def test_what_is_plain_stays_in_fp32_beside_autocast() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8, 8)

    def make() -> Work:
        variants = {
            "reference": Variant(lambda: x @ weight),
            "fp32": Variant(lambda: x @ weight, ours=True, plain=True),
        }
        return Work(variants, lambda: x.double() @ weight.double())

    rows = harness.measure(Case("product", make), replace(QUICK, dtype="autocast"))
    assert [(row["dtype"], row["status"], row["error"] < 5e-6) for row in rows] == [
        ("autocast", "ok", False),
        ("fp32", "ok", True),
    ]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("layout", list(harness.FORMATS))
def test_models_of_a_dtype_and_layout_have_fp32_beside_them(dtype: str, layout: str) -> None:
    """Each is compared with the definition in fp64 on the same rounded weights; a record says what it is of."""
    suite = importlib.import_module("benchmarks.bench_block")
    options = replace(QUICK, dtype=dtype, layout=layout)
    plain = {"reference, fp32", "ours, fp32"} if options.words else {"reference", "ours"}
    for each in suite.cases(options):
        rows = harness.measure(each, options)
        timed = {row["variant"]: row for row in rows if row["status"] == "ok"}
        assert timed.keys() == {"reference", "ours"} | plain, rows
        assert {(timed[name]["dtype"], timed[name]["layout"]) for name in plain} == {("fp32", "contiguous")}
        assert {(timed[name]["dtype"], timed[name]["layout"]) for name in ("reference", "ours")} == {(dtype, layout)}
        assert (timed["reference"]["error"] > 1e-4) == (dtype != "fp32")
        assert all(timed[name]["error"] < 5e-6 for name in plain)
        assert {row["case"] for row in rows} == {each.name + options.words}
        here = {"device": "A", "capability": "AVX2", "threads": 1, "torch": "2.13", "date": "2026-01-01"}
        text = report.summary({"block": [here | row for row in rows]}, ROOT)
        assert ("over ours in fp32, contiguous" in text) == bool(options.words)


def test_wrong_models_in_half_precision_fail_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    suite, options = importlib.import_module("benchmarks.bench_block"), replace(QUICK, dtype="bf16")
    forward = sf.SWFormerBlock.forward
    monkeypatch.setattr(sf.SWFormerBlock, "forward", lambda block, x: forward(block, x) * 1.02)
    rows = harness.measure(suite.cases(options)[0], options)
    assert [row["status"][:6] for row in rows if row["ours"]] == ["FAILED", "FAILED"]


def test_half_precision_and_layouts_are_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (["--dtype", "bf16"], ["--layout", "channels_last"]):
        with pytest.raises(SystemExit):
            command.main(["block", "haar", *asked])
        assert "are of block and network, not of haar" in capsys.readouterr().err


def test_records_of_another_dtype_or_layout_stay(tmp_path: Path) -> None:
    def of(dtype: str, layout: str) -> list[dict[str, Any]]:
        return [row | {"dtype": dtype, "layout": layout} for row in pair(f"add, {dtype}, {layout}", "A", 2)]

    def cases_kept() -> list[str]:
        return sorted({r["case"] for r in records.read(tmp_path / "add.csv")})

    records.keep("add", pair("add", "A", 2), True, tmp_path)  # in fp32 and contiguous, which old records do not say
    records.keep("add", of("bf16", "channels_last"), True, tmp_path)
    records.keep("add", of("bf16", "contiguous"), True, tmp_path)
    assert cases_kept() == ["add", "add, bf16, channels_last", "add, bf16, contiguous"]
    records.keep("add", of("fp32", "contiguous"), True, tmp_path)
    assert cases_kept() == ["add, bf16, channels_last", "add, bf16, contiguous", "add, fp32, contiguous"]


def test_ours_may_err_twice_as_far_as_the_baseline() -> None:
    x = torch.randn(1000)

    def off(by: float) -> torch.Tensor:
        return x * (1 + by)

    def make() -> Work:
        variants = {"reference": Variant(lambda: off(0.01)), "ours": Variant(lambda: off(0.019), ours=True)}
        return Work(variants | {"ours, worse": Variant(lambda: off(0.021), ours=True)}, lambda: x.double())

    rows = harness.measure(Case("off", make), replace(QUICK, dtype="tf32"))
    assert [r["status"][:6] for r in rows] == ["ok", "ok", "FAILED"]


def test_a_suite_without_its_packages_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.bench_sampler_step", None)
    module = type("Suite", (), {"cases": staticmethod(lambda options: [case("first")])})
    monkeypatch.setitem(sys.modules, "benchmarks.bench_haar", module)
    assert command.main(["sampler_step", "haar", "--quick", "--out", str(tmp_path)]) == 1
    assert "sampler_step: not measured:" in capsys.readouterr().err
    assert list(records.load(tmp_path)) == ["haar"]


def test_sources_are_known_or_said_not_to_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")  # no repository
    assert records.version_of_sources() == (None, None)
    monkeypatch.setenv("COMMIT", "abc1234 dirty")
    assert records.version_of_sources() == ("abc1234", True)
    monkeypatch.setenv("PATH", "")  # no git
    assert records.version_of_sources() == ("abc1234", True)
    monkeypatch.setenv("COMMIT", "abc1234")
    assert records.version_of_sources() == ("abc1234", False)
    monkeypatch.delenv("COMMIT")
    records.save(tmp_path, "add", [{**records.environment("cpu"), **row} for row in harness.measure(case(), QUICK)])
    (table,) = report.timings(records.load(tmp_path)["add"])
    assert "commit None (changes unknown)" in table.note


def test_what_falls_back_is_not_timed_as_ours() -> None:
    """On a GPU ours is what the Triton kernels do; an op that cannot take its input fails its row."""
    from benchmarks.op_cases import on_device

    x, taps = torch.randn(1, 1, 4, 4, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    fallen = on_device("cuda")(lambda: sf.functional.haar_dwt2d(x, taps, taps))
    rows = harness.measure(case(ours=Variant(fallen, ours=True)), QUICK)
    assert rows[1]["status"].startswith("FAILED: RuntimeError: backend 'triton' was asked for")


def test_every_public_function_has_arguments() -> None:
    from benchmarks.inspection.arguments import ARGUMENTS, functions

    assert set(ARGUMENTS) == set(sf.functional.__all__)
    for name, make in ARGUMENTS.items():
        args = tuple(make((1, 4, 6, 8)))
        with torch.no_grad():
            ours, theirs = (function(*args) for function in functions(name))
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["multiscale_ffn", "haar_dwt2d"])
def test_correct_finds_a_wrong_kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks.inspection import correct

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
    command = [sys.executable, "-m", "benchmarks.inspection.prefill", "sm_90", "--quick"]
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


@pytest.mark.parametrize("suite", [name for name in command.SUITES if name not in WITH_NUMBERS])
def test_suites_keep_their_tensors_on_the_device(suite: str) -> None:
    """On the meta device, where nothing is computed, a tensor left on the CPU is an error as it is on a GPU."""
    if suite == "network":
        pytest.importorskip("sklearn", reason="scikit-learn, which has the photograph, is not installed")
    module = importlib.import_module(f"benchmarks.bench_{suite}")
    for each in module.cases(Options(quick=True, device="meta")):
        baseline = next(iter(each.make().variants.values()))
        assert baseline.run is not None
        assert all(leaf.is_meta for leaf in tree_leaves(baseline.run()))


def path_point(reward: float, diversity: float, accuracy: float = 1.0) -> Any:
    paths = pytest.importorskip("benchmarks.bench_paths")
    return paths.Point(1, 1, 1.0, reward, diversity, 0.1, accuracy)


def test_hypervolume_is_the_area_that_a_run_dominates() -> None:
    paths = pytest.importorskip("benchmarks.bench_paths")
    for _ in range(8):
        values = torch.rand(4, 3, dtype=torch.float64).tolist()
        points = [path_point(2.0, 0.5, 0.8), *(path_point(1.5 + 3 * r, d, a) for r, d, a in values)]
        gains = [p.reward / 2.0 - 1 for p in points]
        shares = [min(1.0, p.diversity / 0.5, p.accuracy / 0.8) for p in points]
        grid = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
        gain, share = torch.meshgrid(1.5 * grid, grid, indexing="ij")
        below = torch.stack([(gain < g) & (share < s) for g, s in zip(gains, shares, strict=True)]).any(0)
        assert paths.hypervolume(points) == pytest.approx(1.5 * below.double().mean().item(), abs=0.02)
    assert paths.hypervolume([path_point(2.0, 0.5), path_point(1.0, 0.5)]) == 0


def test_finished_runs_are_kept_and_not_made_again(tmp_path: Path) -> None:
    paths = pytest.importorskip("benchmarks.bench_paths")
    points, made = [path_point(2.5, 0.25), path_point(3.25, 0.125)], []

    def make() -> Any:
        made.append(1)
        return points

    key = {"setting": "LoRA", "recipe": "draft 4", "rate": 3e-4, "seed": 0}
    for _ in range(2):
        assert paths.Kept(tmp_path).points(key, make) == points
    assert len(made) == 1
    kept = paths.Kept(tmp_path)
    for other in ({"rate": 6e-4}, {"seed": 1}, {"recipe": "draft 1"}, {"setting": "latents"}):
        kept.points(key | other, make)
    assert len(made) == 5
    kept.remove()
    assert not list(tmp_path.rglob("*.csv"))
    paths.Kept(None).points(key, make)
    assert len(made) == 6


@pytest.mark.parametrize("name", ["all parameters", "LoRA", "latents"])
def test_a_path_is_tuned_by_what_its_setting_says(name: str) -> None:
    """Within its budget, towards thicker strokes; latents stay on their sphere."""
    paths = pytest.importorskip("benchmarks.bench_paths")
    setting = next(setting for setting in paths.SETTINGS if setting.name == name)
    tuning = paths.Tuning(setting, "sdo first", 0, 3, "cpu")
    every = sum(p.numel() for p in tuning.sampler.model.parameters())
    tuned = sum(tensor.numel() for tensor in tuning.tuned)
    assert {"all parameters": tuned == every, "LoRA": tuned < every / 5, "latents": tuned == 8 * 256}[name]
    tuning.gradient()
    assert all(tensor.grad is not None for tensor in tuning.tuned)
    if name == "latents":
        with torch.no_grad():
            image = tuning.images(tuning.latents)
            tuning.latents *= 2
            torch.testing.assert_close(tuning.images(tuning.latents), image)
    scale = paths.Scale(budget=14, num_steps=3)
    start, half, end = paths.run(setting, "sdo first", max(setting.rates), 0, scale, "cpu")
    assert [(p.units, p.updates) for p in (start, half, end)] == [(0, 0), (4, 1), (12, 3)]
    assert start.reward < end.reward


def test_every_path_of_a_setting_has_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = pytest.importorskip("benchmarks.bench_paths")
    rates: list[tuple[int, float]] = []

    def run(setting: Any, recipe: str, rate: float, seed: int, *others: Any) -> Any:
        """The second rate is the best: larger ones leave no diversity."""
        rates.append((seed, rate))
        kept = 0.5 if rate <= setting.rates[1] else 0.0
        return [path_point(1.0, 0.5), path_point(1.0, 0.5), path_point(1.0 + 100 * rate + 0.1 * seed, kept)]

    monkeypatch.setattr(paths, "run", run)
    scale, kept = paths.Scale(num_steps=3, recipes=("sdo first", "identity")), paths.Kept(tmp_path)
    suite = [
        Case(
            setting.name, lambda setting=setting: paths.compare(setting, scale, "cpu", kept, setting.name == "latents")
        )
        for setting in paths.SETTINGS
    ]
    rows = [row for each in suite for row in harness.measure(each, QUICK)]
    assert not list(tmp_path.rglob("*.csv"))
    names = [(row["case"], row["variant"]) for row in rows]
    assert len(names) == 7  # without a model's gradient parameters have none
    assert [variant for case, variant in names if case == "latents"] == ["start", "sdo first", "identity"]
    for row in rows:
        if row["variant"] != "start":
            best = next(setting.rates[1] for setting in paths.SETTINGS if setting.name == row["case"])
            assert row["learning_rate"] == best
            assert row["reward"] == pytest.approx(1.0 + 100 * best + 0.1)  # the median of three seeds
            assert row["reward_most"] - row["reward_least"] == pytest.approx(0.2)
            assert row["peak_bytes"] > 0
    assert {seed for seed, _ in rates} == {0, 1, 2, scale.tuning_seed}
    here = {"device": "A", "capability": "AVX2", "threads": 1, "torch": "2.13", "date": "2026-01-01"}
    rows = [here | row for row in rows]
    text = report.markdown({"paths": rows})
    assert "| recipe | all parameters | cost | LoRA | cost | latents | cost |" in text
    assert "| identity | - | - | - | - | " in text
    (line,) = [line for line in report.summary({"paths": rows}, ROOT).splitlines() if line.lstrip().startswith("sdo")]
    assert line.count("; 0.50; 1.00; 0.10") == 3
    report.plots(tmp_path, {"paths": rows})
    assert 1000 < (tmp_path / "paths.png").stat().st_size < 150_000


def test_quick_pipeline_has_its_gradients() -> None:
    sdo = pytest.importorskip("benchmarks.bench_sdo")
    (each,) = [each for each in sdo.cases(QUICK) if each.name.startswith("pipeline")]
    rows = {row["variant"]: row for row in harness.measure(each, QUICK)}
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert rows["one step (checkpoint)"]["over_sampling and one step (peak bytes)"] > 0
    assert rows["full, checkpointed"]["cosine_with_full"] == pytest.approx(1, abs=1e-6)
    assert rows["one step (checkpoint)"]["cosine_with_full"] < 0.9999
    assert rows["identity"]["peak_bytes"] < rows["one step (checkpoint)"]["peak_bytes"]
    assert rows["one step (checkpoint)"]["peak_bytes"] < rows["full backprop"]["peak_bytes"]
