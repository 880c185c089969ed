"""Set-up shared by all tests; it runs before any test module imports Triton."""

import importlib.util
import os
import signal
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this once, when a kernel is decorated.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells start what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
# A checkout that is not installed; subprocesses too.
for package, folder in (("benchmarks", ROOT), ("swformer_kernels", ROOT / "kernels")):
    if importlib.util.find_spec(package) is None:
        sys.path.append(str(folder))
        os.environ["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(folder)])


def round_to_nearest() -> None:
    """Triton's interpreter cuts fp32 numbers off where a GPU rounds them to bf16: let it round."""
    from torch.utils._python_dispatch import _disable_current_modes
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(numbers: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source.name, target.name) == ("fp32", "bf16"):
            with _disable_current_modes():  # that count operators
                return torch.from_numpy(numbers.copy()).bfloat16().view(torch.uint16).numpy()
        return convert(numbers, source, target, mode)

    interpreter._convert_float = rounding


if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    round_to_nearest()


LONGEST = ("test_contract", "test_gpu_day", "test_triton", "test_packaging", "test_inspection", "test_accelerate")
LONGEST += ("test_avx2", "test_benchmarks", "test_half_precision", "test_swformer_block")
"""Files that take a minute and more: begun first, so that no core waits for another at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.path.name.startswith(LONGEST))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


LASTING = ("illegal memory access", "misaligned address", "unspecified launch failure", "illegal instruction")
LASTING += ("device-side assert",)
"""CUDA errors after which a process can do nothing more on the GPU."""


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Such an error ends its worker of pytest-xdist, which begins a new one: the tests after it are not blamed."""
    error = str(report.longrepr or "")
    lasting = report.failed and "CUDA error" in error and any(word in error for word in LASTING)
    if lasting and os.environ.get("PYTEST_XDIST_WORKER"):
        sys.stderr.write(f"{report.nodeid}: {error[-600:]}\n")
        sys.stderr.flush()
        os._exit(3)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed torch's global generator from the test's name: every test has its own input, whatever runs before it."""
    value = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(value)
    return value


@pytest.fixture
def rng(seed: int) -> torch.Generator:
    """A CPU generator of the test's own, for `torch.randn(..., generator=rng)`."""
    return torch.Generator().manual_seed(seed)
