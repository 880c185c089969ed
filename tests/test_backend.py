"""Choosing a backend: `use_backend`, `backends`, `why_not` and the environment variable."""

import os
import subprocess
import sys

import pytest
import torch

import swformer_fast as sf

X, LOW, HIGH = torch.randn(1, 1, 4, 4), torch.randn(2), torch.randn(2)
EXTENSION = sf.backends()["cpp"] == "available"


def test_backends_names_each_with_a_reason() -> None:
    report = sf.backends()
    assert list(report) == ["reference", "cpp", "triton"]
    assert report["reference"] == "available"
    assert all(report.values())


def test_why_not_says_what_runs() -> None:
    answer = sf.why_not("haar_dwt2d", X, LOW, HIGH)
    assert answer == "cpp runs" if EXTENSION else answer.startswith("reference runs (not cpp: ")
    with sf.use_backend("reference"):
        assert sf.why_not("haar_dwt2d", X, LOW, HIGH) == "reference runs (backend 'reference' was asked for)"


def test_use_backend_nests_and_restores() -> None:
    before = sf.backend.default_backend()
    with sf.use_backend("reference"):
        with sf.use_backend("auto"):
            assert sf.backend.default_backend() == "auto"
        assert sf.backend.default_backend() == "reference"
    assert sf.backend.default_backend() == before


def test_a_named_backend_that_cannot_run_raises() -> None:
    with (
        sf.use_backend("triton"),
        pytest.raises(RuntimeError, match="cannot run haar_dwt2d: the Triton kernels take no"),
    ):
        sf.functional.haar_dwt2d(X.double(), LOW.double(), HIGH.double())
    with sf.use_backend("cpp"), pytest.raises(RuntimeError, match="cannot run haar_dwt2d: the tensors are on meta"):
        sf.why_not("haar_dwt2d", X.to("meta"), LOW, HIGH)


@pytest.mark.parametrize("name", ["cuda", "", "AUTO"])
def test_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match="must be one of auto, reference, cpp, triton"), sf.use_backend(name):
        pass


def test_why_not_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match="op_name must be one of"):
        sf.why_not("haar", X)
    with pytest.raises(TypeError, match="must hold the tensors"):
        sf.why_not("haar_dwt2d", 3)


def test_environment_variable_sets_the_default() -> None:
    code = "import swformer_fast as sf, torch; print(sf.why_not('haar_dwt2d', *(torch.ones(1, 1, 2, 2),) * 3))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SWFORMER_FAST_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "reference runs (backend 'reference' was asked for)"
