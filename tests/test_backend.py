"""Choosing a backend: `use_backend`, `backends`, `why_not` and the environment variable."""

import inspect
import logging
import os
import subprocess
import sys
import threading
from typing import Any, NoReturn

import pytest
import torch

import swformer_fast as sf
from benchmarks.inspection.arguments import ARGUMENTS

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
        sf.why_not("haar_dwt2d", X.to("meta"))


@pytest.mark.parametrize("name", ["cuda", "", "AUTO"])
def test_unknown_backend(name: str) -> None:
    with pytest.raises(ValueError, match="must be one of auto, reference, cpp, triton"), sf.use_backend(name):
        pass


def test_why_not_checks_its_arguments() -> None:
    with pytest.raises(ValueError, match=r"function must be one of .* got 'haar'"):
        sf.why_not("haar", X)
    with pytest.raises(ValueError, match=r"function must be one of .* got 'haar_dwt2d'"):
        sf.why_not(sf.reference.haar_dwt2d, X)
    with pytest.raises(ValueError, match=r"function must be one of .* got 3"):
        sf.why_not(3, X)
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, got int"):
        sf.why_not("haar_dwt2d", 3)
    with pytest.raises(TypeError, match="must hold the tensors"):
        sf.why_not("pointwise", 3)
    with pytest.raises(TypeError, match="must hold the tensors"):
        sf.why_not("pointwise", X, weight=X)


def test_environment_variable_sets_the_default() -> None:
    code = "import swformer_fast as sf, torch; print(sf.why_not('haar_dwt2d', torch.ones(1, 1, 2, 2)))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "SWFORMER_FAST_BACKEND": "reference"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "reference runs (backend 'reference' was asked for)"


def test_threads_keep_their_own_entry() -> None:
    """Two that overlap: whoever leaves first takes away its own backend, not the other's."""
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with sf.use_backend("cpp"):
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    before = sf.backend.default_backend()
    with sf.use_backend("reference"):
        thread.start()
        entered.wait()
        assert sf.backend.default_backend() == "cpp"
    assert sf.backend.default_backend() == "cpp"
    leave.set()
    thread.join()
    assert sf.backend.default_backend() == before


def test_entries_of_one_name_are_told_apart() -> None:
    """Left in the order in which they were entered: the middle one counts until it is left itself."""
    before = sf.backend.default_backend()
    entries = [sf.use_backend(name) for name in ("reference", "auto", "reference")]
    for entry in entries:
        entry.__enter__()
    entries[2].__exit__(None, None, None)
    assert sf.backend.default_backend() == "auto"
    entries[0].__exit__(None, None, None)
    assert sf.backend.default_backend() == "auto"
    entries[1].__exit__(None, None, None)
    assert sf.backend.default_backend() == before


def test_fallbacks_are_logged_once_for_each_op_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    sf.backend._log_fallback.cache_clear()
    caplog.set_level(logging.INFO, "swformer_fast")
    in_fp64 = tuple(t.double() for t in (X, LOW, HIGH))
    with sf.backend.as_on_gpu(), sf.use_backend("auto"):
        for _ in range(2):
            y = sf.functional.haar_dwt2d(*in_fp64)
            sf.functional.haar_idwt2d(y, *in_fp64[1:])
        sf.functional.depthwise_gelu(X.double(), torch.ones(1, 1, 5, 5).double(), torch.ones(1).double())
        sf.functional.depthwise_gelu(X.double(), torch.ones(1, 1, 3, 3).double(), torch.ones(1).double())
    assert [(r.name, r.levelname) for r in caplog.records] == [("swformer_fast", "INFO")] * 4
    ops = [r.getMessage().split()[0] for r in caplog.records]
    assert ops == ["haar_dwt2d", "haar_idwt2d", "depthwise_gelu", "depthwise_gelu"]
    assert all(" runs on the reference: not triton: " in r.getMessage() for r in caplog.records)


@pytest.mark.skipif(not EXTENSION, reason="the extension is not built")
def test_what_runs_fast_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    sf.backend._log_fallback.cache_clear()
    caplog.set_level(logging.DEBUG, "swformer_fast")
    sf.functional.haar_dwt2d(X, LOW, HIGH)
    sf.why_not("haar_dwt2d", X.double(), LOW.double(), HIGH.double())
    assert not caplog.records


# why_not --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(op: sf.backend.Implementations, name: str) -> NoReturn:
        raise AssertionError(f"{op.name} runs on {name}")

    monkeypatch.setattr(sf.backend, "_implementation", refuse)


@pytest.mark.parametrize("name", sf.functional.__all__)
def test_why_not_takes_what_the_function_takes(name: str, nothing_runs: None) -> None:
    args = tuple(ARGUMENTS[name]((1, 4, 6, 8)))
    expected = "cpp runs" if EXTENSION else "reference runs (not cpp: "
    function = getattr(sf.functional, name)
    keywords = dict(zip(inspect.signature(function).parameters, args, strict=False))
    with sf.use_backend("auto"):
        for asked in (function, name):
            assert sf.why_not(asked, *args).startswith(expected)
            assert sf.why_not(asked, args[0], **dict(list(keywords.items())[1:])).startswith(expected)
            assert sf.why_not(asked, **keywords).startswith(expected)
    with pytest.raises(AssertionError, match=f"{name} runs on"):
        function(*args)


def test_why_not_takes_defaults_and_options(nothing_runs: None) -> None:
    assert sf.why_not(sf.functional.haar_dwt2d, X) == sf.why_not("haar_dwt2d", X, LOW, HIGH)
    y = torch.randn(1, 4, 2, 2)
    assert sf.why_not(sf.functional.haar_idwt2d, y, output_size=(3, 4)) == sf.why_not("haar_idwt2d", y)
    with pytest.raises(ValueError, match="output_size must be"):
        sf.why_not(sf.functional.haar_idwt2d, y, output_size=(1, 4))


def test_why_not_changes_nothing(nothing_runs: None) -> None:
    branch = sf.FourierBranch(4)
    before = {key: tensor.clone() for key, tensor in branch.state_dict().items()}
    assert sf.why_not(sf.functional.fourier_mix, torch.randn(2, 4, 6, 8), *branch.arguments())
    assert all(torch.equal(tensor, before[key]) for key, tensor in branch.state_dict().items())


@pytest.mark.parametrize(
    ("name", "args", "keywords"),
    [
        ("haar_dwt2d", (3,), {}),
        ("haar_dwt2d", (X[0],), {}),
        ("haar_dwt2d", (X,), {"dec_lo": torch.ones(3)}),
        ("haar_dwt2d", (X,), {"taps": LOW}),
        ("haar_dwt2d", (), {}),
        ("depthwise_gelu", (X, torch.ones(1, 1, 2, 2), torch.ones(1)), {}),
        ("multiscale_ffn", (X, (LOW, HIGH)), {}),
        ("channel_attention", (X,), {"parameters": None}),
        ("fourier_mix", (X, *(LOW,) * 10), {}),
    ],
)
def test_why_not_raises_as_the_function_does(
    name: str, args: tuple[Any, ...], keywords: dict[str, Any], nothing_runs: None
) -> None:
    function = getattr(sf.functional, name)
    with pytest.raises((TypeError, ValueError)) as expected:
        function(*args, **keywords)
    for asked in (function, name):
        with pytest.raises(type(expected.value)) as error:
            sf.why_not(asked, *args, **keywords)
        assert str(error.value) == str(expected.value)
    # and what is asked next is answered
    assert sf.why_not("haar_dwt2d", X, LOW, HIGH)


def test_why_not_of_other_ops_takes_their_flat_arguments(nothing_runs: None) -> None:
    args = (X, None, None, torch.ones(1, 2, 1), torch.ones(2), None)
    expected = "cpp runs" if EXTENSION else "reference runs (not cpp: "
    assert sf.why_not("pointwise", *args).startswith(expected)
    assert sf.why_not("haar_dwt2d_backward", torch.ones(1, 4, 2, 2), X, LOW, HIGH, True, True).startswith(expected)
    assert "float64" in sf.why_not("multiscale_ffn_backward", *[X.double()] * 2, *[X] * 10, True, True)


@pytest.mark.skipif(not EXTENSION, reason="the extension is not built")
def test_why_not_of_a_model(nothing_runs: None) -> None:
    network, image = sf.SWFormer.from_preset("tiny").eval(), torch.rand(1, 3, 32, 32)
    with sf.use_backend("auto"):
        with torch.no_grad():
            assert sf.why_not(network, image).splitlines() == [
                "2 x haar_dwt2d: cpp runs",
                "6 x swformer_block: cpp runs",
                "6 x pointwise: cpp runs",
            ]
            assert sf.why_not(network, image, exit="small").splitlines() == [
                "2 x haar_dwt2d: cpp runs",
                "4 x swformer_block: cpp runs",
                "2 x pointwise: cpp runs",
                "2 x haar_idwt2d: cpp runs",
            ]
            assert "6 x swformer_block: cpp runs" in sf.why_not(network.half(), image.half())
        network.float().train()
        before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
        answer = sf.why_not(network, image, all_scales=True)
        assert all(torch.equal(tensor, before[key]) for key, tensor in network.state_dict().items())
        assert "6 x fold_attention: cpp runs" in answer
        assert "swformer_block" not in answer
        assert sf.why_not(torch.nn.Linear(3, 3), torch.ones(3)) == "Linear calls no op of swformer_fast here"


def test_functions_run_again_after_why_not() -> None:
    expected = sf.functional.haar_dwt2d(X, LOW, HIGH)
    sf.why_not(sf.functional.haar_dwt2d, X, LOW, HIGH)
    assert torch.equal(sf.functional.haar_dwt2d(X, LOW, HIGH), expected)
