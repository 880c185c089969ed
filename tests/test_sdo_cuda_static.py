"""The CUDA kernels of sdo_fast as they were built, no GPU needed: the code of every target, and what it links."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

import sdo_fast

LIBRARY = Path(sdo_fast.__file__).parent / "_C_cuda.so"
TARGETS = ("sm_80", "sm_86", "sm_90", "sm_100")
MAX_REGISTERS = 64  # 65,536 registers hold four blocks of 256 threads

pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA kernels were not built: no nvcc")


def tool(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip("triton", reason=f"no {name}: neither on the path nor with triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    if not shutil.which(found):
        pytest.skip(f"no {name} here")
    return found


def output(*command: str | Path) -> str:
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout


def kernel_name(mangled: str) -> tuple[str, int, int]:
    """Operator and element type, width of a pack and number of dimensions."""
    width, rank = re.search(r"ELi(\d+)ELi(\d+)EEEv", mangled).groups()
    operator, arguments = re.search(r"\d+(Step|Shortcut)I(.*?)EELi\d+E", mangled).groups()
    return f"{operator}<{arguments}>", int(width), int(rank)


@cache
def machine_code(target: str) -> dict[tuple[str, int, int], str]:
    """The assembly of each kernel for a target."""
    functions = re.split(r"\n\s*Function : (\S+)", output(tool("cuobjdump"), "-arch", target, "-sass", LIBRARY))[1:]
    return {kernel_name(n): code for n, code in zip(functions[::2], functions[1::2], strict=True) if "elementwise" in n}


@cache
def resources() -> dict[tuple[str, str], str]:
    """Target and mangled name of each kernel, and what the assembler says that it takes."""
    text = output(tool("cuobjdump"), "-res-usage", LIBRARY)
    found = {}
    for part in re.split(r"\narch = ", text)[1:]:
        for name, usage in re.findall(r"Function (\S+elementwise_kernel\S+):\s*\n\s*(.*)", part):
            found[part.split()[0], name] = usage
    return found


def element_bits(kernel: tuple[str, int, int]) -> int:
    return 64 if re.search(r"<d", kernel[0]) else 32 if re.search(r"<f", kernel[0]) else 16


def accesses(code: str, instruction: str) -> Counter[int]:
    """Widths in bits of all global loads or stores."""

    def bits(suffix: str) -> int:
        words = suffix.split(".")
        return next((int(w) for w in ("128", "64") if w in words), 16 if "U16" in words or "S16" in words else 32)

    return Counter(bits(suffix) for suffix in re.findall(rf"\b{instruction}\.(\S+)", code))


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_is_built_for_every_target(target: str) -> None:
    # 4 dtypes; the step guided or not and clipped or not, the shortcut clipped or not; three walks.
    assert len(machine_code(target)) == 4 * (2 * 2 + 2) * 3
    assert len({k for k in resources() if k[0] == target}) == 72


@pytest.mark.parametrize("target", TARGETS)
def test_no_spills_and_few_registers(target: str) -> None:
    for (of, name), usage in resources().items():
        if of == target:
            used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
            assert used["REG"] <= MAX_REGISTERS, (name, usage)
            assert used["STACK"] == used["LOCAL"] == used["SHARED"] == 0, (name, usage)
    for kernel, code in machine_code(target).items():
        assert not re.search(r"\b(LDL|STL)\b", code), kernel


@pytest.mark.parametrize("target", TARGETS)
def test_packs_are_128_bits_wide(target: str) -> None:
    for kernel, code in machine_code(target).items():
        operator, width, _ = kernel
        loads, stores = accesses(code, "LDG"), accesses(code, "STG")
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
    for kernel, code in machine_code(target).items():
        if kernel[2] == 1:
            assert not re.search(r"\b(MUFU\.RCP|I2F)\b", code), kernel


def test_links_neither_torch_cuda_nor_python_nor_cudart() -> None:
    """So that one library loads with the CPU and the CUDA builds of torch, and with every Python."""
    needed = re.findall(r"NEEDED.*\[(.*)\]", output(tool("readelf"), "-d", LIBRARY))
    assert not [n for n in needed if re.match(r"lib(cuda|cudart|torch_cuda|c10_cuda|torch_python|python)", n)], needed
    undefined = output(tool("nm"), "-D", "--undefined-only", LIBRARY)
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
