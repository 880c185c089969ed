"""A fixed share of the random calls of fuzz.py, and what it keeps."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fuzz
import pytest
import torch


@pytest.mark.filterwarnings("ignore:.*degrees of freedom is <= 0")  # of an image without pixels
@pytest.mark.parametrize("first", range(0, 500, 50))
def test_random_calls(first: int) -> None:
    problems = {seed: fuzz.problem(fuzz.case(seed)) for seed in range(first, first + 50)}
    assert not {seed: problem for seed, problem in problems.items() if problem}


def test_a_wrong_kernel_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    correct = fuzz.op_of

    def wrong(name: str) -> Callable[..., list[torch.Tensor]]:
        return lambda *args: [1.01 * t for t in fuzz.as_list(correct(name)(*args))]

    monkeypatch.setattr(fuzz, "op_of", wrong)
    layouts = ("contiguous", "contiguous")
    example = fuzz.RandomCall(0, "haar_dwt2d", (2, 5, 30, 40), "float32", *layouts, True, 3, 0.5, 1, 0)
    monkeypatch.setattr(fuzz, "case", lambda seed: replace(example, seed=seed))
    assert fuzz.main(["--seconds", "0.2", "--log", str(tmp_path / "log.json")]) == 1
    log = json.loads((tmp_path / "log.json").read_text())
    assert log["cases"] == len(log["failures"]) > 0
    assert log["failures"][0]["shape"] == [1, 1, 1, 1]
    assert "relative RMS error" in log["failures"][0]["problem"]
    assert fuzz.main(["--seconds", "0", "--log", str(tmp_path / "log.json")]) == 1
    assert torch.get_num_threads() == 1
