"""Choosing a backend of sdo_fast: `use_backend`, `backends`, `why_not` and the environment variable."""

import os
import subprocess
import sys

import pytest
import torch

import sdo_fast

X = torch.randn(1, 2, 4, 4)
EXTENSION = sdo_fast.backends()["cpp"] == "available"


def test_backends_names_each_with_a_reason() -> None:
    report = sdo_fast.backends()
    assert list(report) == ["reference", "cpp", "cuda"]
    assert report["reference"] == "available"
    assert all(report.values())
    if not torch.cuda.is_available():
        assert report["cuda"] != "available"


@pytest.mark.parametrize("op", ["sampler_step", "shortcut_backward"])
def test_why_not_says_what_runs(op: str) -> None:
    answer = sdo_fast.why_not(op, X, X)
    assert answer == "cpp runs" if EXTENSION else answer.startswith("reference runs (not cpp: ")
    with sdo_fast.use_backend("reference"):
        assert sdo_fast.why_not(op, X, X) == "reference runs (backend 'reference' was asked for)"
    wide = torch.ones((1,) * 7)
    assert sdo_fast.why_not(op, wide, wide).startswith("reference runs (not cpp: ")


def test_a_named_backend_that_cannot_run_raises() -> None:
    with (
        sdo_fast.use_backend("cuda"),
        pytest.raises(RuntimeError, match="cannot run sampler_step: the tensors are on cpu, not on a CUDA GPU"),
    ):
        sdo_fast.functional.sampler_step(X, X, a=1.0, b=1.0)
    with sdo_fast.use_backend("cpp"), pytest.raises(RuntimeError, match="the tensors are on meta, not on the CPU"):
        sdo_fast.why_not("sampler_step", X.to("meta"))


@pytest.mark.parametrize("name", ["triton", "", "AUTO"])
def test_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match="must be one of auto, reference, cpp, cuda"), sdo_fast.use_backend(name):
        pass


def test_why_not_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="op_name must be one of sampler_step, shortcut_backward"):
        sdo_fast.why_not("step", X)
    with pytest.raises(TypeError, match="must begin with the tensor"):
        sdo_fast.why_not("sampler_step", 3)


def test_environment_variable_sets_the_default() -> None:
    code = "import sdo_fast, torch; print(sdo_fast.why_not('sampler_step', torch.ones(2), torch.ones(2)))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SDO_FAST_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "reference runs (backend 'reference' was asked for)"
