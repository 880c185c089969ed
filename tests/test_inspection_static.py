"""The readers of machine code, the bound on occupancy, and the record that the command keeps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import records
from benchmarks.inspection import machine_code, static
from benchmarks.inspection.machine_code import Resources, occupancy, read_amdgcn, read_sass

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/                   LDG.E.64 R8, desc[UR4][R2.64] ;
        /*0030*/                   LDG.E R9, desc[UR4][R2.64] ;
        /*0040*/                   LDG.E.U16 R10, desc[UR4][R2.64] ;
        /*0050*/              @!P0 STG.E.128 desc[UR4][R2.64], R4 ;
        /*0060*/                   HMMA.1688.F32.TF32 R4, R8, R10, R4 ;
        /*0070*/                   STL [R1], R9 ;
        /*0080*/                   LDL R9, [R1] ;
        /*0090*/                   EXIT ;
"""
AMDGCN = """
	global_load_dwordx4 v[4:7], v[0:1], off
	buffer_load_dword v8, v2, s[0:3], 0 offen
	global_store_dwordx2 v[0:1], v[4:5], off
	global_store_short v[0:1], v4, off
	v_mfma_f32_16x16x4_f32 v[0:3], v4, v5, v[0:3]
; codeLenInByte = 1234
    .private_segment_fixed_size: 8
    .vgpr_count:     96
"""
ROW = Resources(
    "sm_80",
    "haar_dwt2d",
    "haar_dwt2d fp32",
    "analysis_kernel",
    128,
    False,
    72,
    0,
    4096,
    128,
    0.438,
    {32: 4, 128: 8},
    {128: 8},
)


def test_sass_is_read() -> None:
    assert read_sass(SASS) == {
        "spills": 2,
        "loads": {16: 1, 32: 1, 64: 1, 128: 1},
        "stores": {128: 1},
        "tensor_core": 1,
        "code_bytes": 0xA0,
    }


def test_amdgcn_is_read() -> None:
    assert read_amdgcn(AMDGCN) == {
        "registers": 96,
        "spills": 8,
        "loads": {32: 1, 128: 1},
        "stores": {16: 1, 64: 1},
        "tensor_core": 1,
        "code_bytes": 1234,
    }


@pytest.mark.parametrize(
    ("target", "registers", "shared", "threads", "warps"),
    [
        ("sm_80", 32, 0, 128, 64),  # warps
        ("sm_80", 72, 4096, 128, 28),  # registers: 7 warps on each scheduler
        ("sm_80", 255, 0, 256, 8),
        ("sm_90", 32, 100 << 10, 256, 16),  # shared memory: two blocks
        ("sm_86", 32, 99 << 10, 256, 8),  # all of the shared memory
        ("sm_86", 16, 0, 32, 16),  # blocks
        ("gfx942", 64, 0, 256, 32),
        ("gfx942", 129, 0, 256, 12),  # 136 registers: three waves a SIMD
        ("gfx942", 64, 40 << 10, 256, 4),
    ],
)
def test_occupancy_is_the_tightest_bound(target: str, registers: int, shared: int, threads: int, warps: int) -> None:
    assert occupancy(target, registers, shared, threads) == warps / machine_code.PROCESSORS[target].warps


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """What the compiler will give; a row of None interrupts it."""
    results: list[Any] = [ROW, replace(ROW, target="gfx942", registers=90), replace(ROW, launch="bf16", main=False)]

    def kernels(*args: Any, **kwargs: Any) -> Iterator[Resources]:
        for row in results:
            if row is None:
                raise KeyboardInterrupt
            yield row

    monkeypatch.setattr(static, "triton_kernels", kernels)
    monkeypatch.setattr(static, "traffic_rows", lambda *args, **kwargs: iter(()))
    monkeypatch.setattr(static, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    return results


def test_command_keeps_main_launches_and_shows_all(
    compiled: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert static.main(["haar_dwt2d", "--out", str(tmp_path)]) == 0
    lines = records.load(tmp_path)["static"]
    assert [(row["target"], row["registers"], row["occupancy"]) for row in lines] == [
        ("sm_80", 72, 0.438),
        ("gfx942", 90, 0.438),
    ]
    assert "bf16" not in (tmp_path / "static.csv").read_text()
    assert not (tmp_path / "results").exists()
    assert re.search(r"haar_dwt2d +2 +90 +0 +44 %", capsys.readouterr().out)
    text = (tmp_path / "static.md").read_text()
    assert "72, 44" in text
    assert "90, 44" in text


def test_a_kernel_that_a_launch_runs_twice_is_one_line_with_its_worst() -> None:
    (line,) = static.record([ROW, replace(ROW, registers=60, spills=2, occupancy=0.25)])
    assert (line["registers"], line["spills"], line["occupancy"]) == (72, 2, 0.25)


def test_interruption_keeps_what_was_measured_before_and_now(compiled: list[Any], tmp_path: Path) -> None:
    assert static.main(["haar_dwt2d", "--out", str(tmp_path), "--record"]) == 0
    compiled[:] = [replace(ROW, registers=64), None]
    assert static.main(["haar_dwt2d", "--out", str(tmp_path), "--record"]) == 130
    rows = records.load(tmp_path / "results")["static"]
    assert sorted((row["target"], row["registers"]) for row in rows) == [("gfx942", 90), ("sm_80", 64)]


def test_what_has_not_changed_is_not_measured_again(
    compiled: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled[:] = [replace(ROW, key="abc")]
    assert static.main(["haar_dwt2d", "--out", str(tmp_path)]) == 0
    earlier: list[Any] = []

    def kernels(families: Any, targets: Any, everything: bool, fresh: bool, cached: Any, tell: Any) -> Iterator[Any]:
        earlier.extend(cached)
        return iter(cached)

    monkeypatch.setattr(static, "triton_kernels", kernels)
    assert static.main(["haar_dwt2d", "--out", str(tmp_path)]) == 0
    assert earlier == [replace(ROW, key="abc")]


def test_unknown_family_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        static.main(["no-such-family"])
    assert "unknown family no-such-family" in capsys.readouterr().err
