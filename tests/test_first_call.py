"""How many kernels a first call compiles, and that a call at another size compiles hardly any."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks.inspection.machine_code import ROOT
from benchmarks.inspection.variants import PHOTOS

pytest.importorskip("triton", reason="triton is not installed")

FIRST = {
    "derain, small eval float32": 17,
    "block training float32": 35,
    "derain, small training float32": 49,
    "derain, small eval bfloat16": 22,
    "block training bfloat16": 36,
    "derain, small training bfloat16": 52,
}
"""Most variants that the first call of a sequence may need."""
NEXT = {
    # Many coefficients: the Haar transform and its inverse take larger tiles.
    ("derain, small eval float32", "1x3x1024x1024"): 2,
    ("derain, small eval bfloat16", "1x3x1024x1024"): 2,
    # Rows that begin at boundaries of 8 bytes but not of 16, and other numbers of lanes.
    ("derain, small eval bfloat16", "1x3x250x301"): 6,
    ("derain, small eval bfloat16", "1x3x333x517"): 2,
    ("block training bfloat16", "3x40x192x160"): 4,
    ("derain, small training bfloat16", "2x3x160x192"): 4,
    ("derain, small training bfloat16", "1x3x112x144"): 10,
}
"""Most variants that a later call may add, where it may add any."""


@pytest.fixture(scope="module")
def added() -> dict[str, dict[str, int]]:
    """In a process without the interpreter, which has no variants."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.inspection.variants"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    result: dict[str, dict[str, int]] = json.loads(run.stdout)
    return result


@pytest.mark.parametrize("sequence", FIRST)
def test_variants(sequence: str, added: dict[str, dict[str, int]]) -> None:
    (_, first), *others = added[sequence].items()
    assert 0 < first <= FIRST[sequence]
    for size, count in others:
        assert count <= NEXT.get((sequence, size), 0), size


def test_a_new_size_of_photo_compiles_nothing(added: dict[str, dict[str, int]]) -> None:
    for height, width in PHOTOS[1:4]:
        assert added["derain, small eval float32"][f"1x3x{height}x{width}"] == 0
