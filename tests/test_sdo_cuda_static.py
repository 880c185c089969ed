"""The CUDA kernels of sdo_fast as they were built, no GPU needed: the code of every target, and what it links."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from benchmarks.inspection.machine_code import CUDA_TARGETS as TARGETS
from benchmarks.inspection.machine_code import (
    LIBRARY,
    CudaKernel,
    cuda_code,
    cuda_kernels,
    cuda_usage,
    output,
    read_sass,
    tool,
)

MAX_REGISTERS = 64  # 65,536 registers hold four blocks of 256 threads

pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA kernels were not built: no nvcc"),
    pytest.mark.skipif(tool("cuobjdump") is None, reason="no cuobjdump: neither on the path nor with triton"),
]


def element_bits(kernel: CudaKernel) -> int:
    return 64 if re.search(r"<d", kernel[0]) else 32 if re.search(r"<f", kernel[0]) else 16


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_built_for_every_target(target: str) -> None:
    # 4 dtypes; the step guided or not and clipped or not, the shortcut clipped or not; three walks.
    assert len(cuda_code(target)) == 4 * (2 * 2 + 2) * 3
    assert len({k for k in cuda_usage() if k[0] == target}) == 72


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_few_registers(target: str) -> None:
    for (of, kernel), used in cuda_usage().items():
        if of == target:
            assert used["REG"] <= MAX_REGISTERS, (kernel, used)
            assert used["STACK"] == used["LOCAL"] == used["SHARED"] == 0, (kernel, used)
    for result in cuda_kernels((target,)):
        assert result.spills == 0, result
        assert result.occupancy >= 0.5, result


@pytest.mark.parametrize("target", TARGETS)
def test_packs_are_128_bits_wide(target: str) -> None:
    for kernel, code in cuda_code(target).items():
        operator, width, _ = kernel
        loads, stores = (read_sass(code)[k] for k in ("loads", "stores"))
        expected = 128 if width > 1 else element_bits(kernel)
        assert width in (1, 128 // element_bits(kernel)), kernel
        assert loads, kernel
        assert set(loads) == {expected}, (kernel, loads)
        assert stores, kernel
        assert set(stores) == {expected}, (kernel, stores)
        if operator.startswith("Shortcut"):
            assert stores[expected] >= 3, (kernel, stores)


@pytest.mark.parametrize("target", TARGETS)
def test_dense_tensors_cost_no_division(target: str) -> None:
    """One run of memory needs no index arithmetic beyond a product: no integer is divided."""
    for kernel, code in cuda_code(target).items():
        if kernel[2] == 1:
            assert not re.search(r"\b(MUFU\.RCP|I2F)\b", code), kernel


@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf here")
def test_links_neither_torch_cuda_nor_python_nor_cudart() -> None:
    """So that one library loads with the CPU and the CUDA builds of torch, and with every Python."""
    needed = re.findall(r"NEEDED.*\[(.*)\]", output(shutil.which("readelf"), "-d", LIBRARY))
    assert not [n for n in needed if re.match(r"lib(cuda|cudart|torch_cuda|c10_cuda|torch_python|python)", n)], needed
    undefined = output(shutil.which("nm"), "-D", "--undefined-only", LIBRARY)
    assert "current_cuda_stream" not in undefined
    assert not re.search(r"\b(Py|_Py)[A-Z_]", undefined)


def test_loads_beside_the_cpu_kernels() -> None:
    code = (
        "import sys, torch, sdo_fast; sdo_fast.backends(); torch.ops.load_library(sys.argv[1])\n"
        "for name in ('sampler_step', 'shortcut_backward'):\n"
        "    print(torch._C._dispatch_has_kernel_for_dispatch_key(f'_sdo_fast_cuda::{name}', 'CUDA'))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(LIBRARY.parent.parent)}
    run = subprocess.run([sys.executable, "-c", code, LIBRARY], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True", "True"]
