"""Set-up shared by all tests; it runs before any test module imports Triton."""

import os
import zlib

import pytest
import torch

if not torch.cuda.is_available():
    # Triton reads this once, when a kernel is decorated.
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


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
