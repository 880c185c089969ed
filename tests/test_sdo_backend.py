"""Choosing a backend of sdo_fast: `use_backend`, `backends`, `why_not` and the environment variable."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch

import sdo_fast

X = torch.randn(1, 2, 4, 4)
EXTENSION = sdo_fast.backends()["cpp"] == "available"
T = TypeVar("T")


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
    seven_dimensional = torch.ones((1,) * 7)
    assert sdo_fast.why_not(op, seven_dimensional, seven_dimensional).startswith("reference runs (not cpp: ")


def test_use_backend_nests_and_restores() -> None:
    before = sdo_fast.backend.default_backend()
    with sdo_fast.use_backend("reference"):
        with sdo_fast.use_backend("auto"):
            assert sdo_fast.backend.default_backend() == "auto"
        assert sdo_fast.backend.default_backend() == "reference"
    assert sdo_fast.backend.default_backend() == before


def in_a_thread(run: Callable[[], T]) -> T:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def test_a_thread_without_a_choice_takes_the_last_one_entered() -> None:
    """As autograd's threads do in a backward pass."""
    with sdo_fast.use_backend("reference"):
        assert in_a_thread(sdo_fast.backend.default_backend) == "reference"
        with sdo_fast.use_backend("cpp"):
            assert in_a_thread(sdo_fast.backend.default_backend) == "cpp"


def test_threads_leave_in_any_order_and_keep_their_own_choice() -> None:
    entered, leave = threading.Event(), threading.Event()
    seen: list[str] = []

    def other() -> None:
        with sdo_fast.use_backend("cpp"):
            entered.set()
            assert leave.wait(10)
            seen.append(sdo_fast.backend.default_backend())

    before = sdo_fast.backend.default_backend()
    thread = threading.Thread(target=other)
    with sdo_fast.use_backend("reference"):
        thread.start()
        assert entered.wait(10)
        assert sdo_fast.backend.default_backend() == "reference"
    assert sdo_fast.backend.default_backend() == "cpp"
    leave.set()
    thread.join()
    assert seen == ["cpp"]
    assert sdo_fast.backend.default_backend() == before


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
