"""Regression tracking: `pytest benchmarks --benchmark-autosave`, later `--benchmark-compare`."""

from collections.abc import Callable

import pytest
import torch

import swformer_fast as sf

from .bench_haar import SHAPES, dwt_arguments

IMPLEMENTATIONS = {"reference": sf.reference.haar_dwt2d, "ours": sf.functional.haar_dwt2d}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_haar_dwt2d(benchmark: Callable[..., object], name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    args = dwt_arguments(shape)
    with torch.no_grad():
        benchmark(IMPLEMENTATIONS[name], *args)
