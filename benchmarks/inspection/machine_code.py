"""Registers, spills, access widths and occupancy of a GPU kernel, read from its machine code: no GPU is needed.

Of Triton's kernels as the compiler gives them, of the CUDA kernels from the library that was built.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = 99 * 1024
"""Bytes that a block may have on the smallest target, sm_86."""


@dataclass(frozen=True)
class Processor:
    """What a multiprocessor (NVIDIA) or compute unit (AMD) has for its blocks."""

    warps: int
    blocks: int
    shared: int
    """Bytes, what the driver keeps of them included."""
    reserved: int
    """Bytes of shared memory that the driver keeps for each block."""


PROCESSORS = {
    "sm_80": Processor(64, 32, 164 << 10, 1024),
    "sm_86": Processor(48, 16, 100 << 10, 1024),
    "sm_90": Processor(64, 32, 228 << 10, 1024),
    "sm_100": Processor(64, 32, 228 << 10, 1024),
    "gfx942": Processor(32, 16, 64 << 10, 0),
}


@dataclass(frozen=True)
class Resources:
    """What one kernel of one launch compiles to."""

    target: str
    family: str
    launch: str
    kernel: str
    width: int
    """What the launch declares."""
    needs_tensor_core: bool
    """What the launch declares."""
    registers: int
    spills: int
    """Registers kept in memory: instructions on local memory (NVIDIA), bytes of scratch memory (AMD)."""
    shared: int
    threads: int
    occupancy: float
    """The bound that registers, shared memory and blocks set on resident warps, over the warps of a processor."""
    loads: dict[int, int] = field(default_factory=dict)
    """Global loads by width in bits."""
    stores: dict[int, int] = field(default_factory=dict)
    """Global stores by width in bits."""
    tensor_core: int = 0
    """Matrix instructions."""
    code_bytes: int = 0
    compile_s: float | None = None
    """None where the compiler's cache answered, or the kernel was built with the library."""
    key: str = ""
    """Changes with all that decides the code."""
    main: bool = True
    """Whether it is of the launches that every test run compiles."""


def occupancy(target: str, registers: int, shared: int, threads: int) -> float:
    """The bound on resident warps, as a share of the processor's."""
    processor = PROCESSORS[target]
    if target.startswith("gfx"):
        warps = threads // 64
        granules = -(-max(registers, 1) // 8) * 8
        fitting = 4 * min(8, 512 // granules) // warps if granules <= 512 else 0
    else:
        warps = -(-threads // 32)
        each = -(-max(registers, 1) * 32 // 256) * 256
        # Each of the four schedulers has a quarter of the registers.
        fitting = 4 * (16384 // each) // warps
    blocks = min(processor.blocks, processor.warps // warps, fitting)
    if shared:
        blocks = min(blocks, processor.shared // (shared + processor.reserved))
    return blocks * warps / processor.warps


def tool(name: str) -> str | None:
    """A disassembler: from the path, else from triton's wheel."""
    path = shutil.which(name)
    if path is None:
        try:
            import triton
        except ImportError:
            return None
        path = shutil.which(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    return path


def output(*command: str | Path | None) -> str:
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{command[0]}: {run.stderr.strip()}")
    return run.stdout + run.stderr


def _widths(assembly: str, pattern: str, bits: Callable[[str], int]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for match in re.findall(pattern, assembly):
        counts[bits(match)] = counts.get(bits(match), 0) + 1
    return dict(sorted(counts.items()))


def read_sass(sass: str) -> dict[str, Any]:
    """Counts from NVIDIA's assembly."""

    def bits(suffixes: str) -> int:
        return next((int(s) for s in suffixes.split(".") if s in ("128", "64")), 32 if "16" not in suffixes else 16)

    offsets = [int(offset, 16) for offset in re.findall(r"/\*([0-9a-f]{4,5})\*/\s", sass)]
    return {
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        # To registers or, ahead of time, to shared memory.
        "loads": _widths(sass, r"\bLDG(?:STS)?\.(\S+)", bits),
        "stores": _widths(sass, r"\bSTG\.(\S+)", bits),
        "tensor_core": len(re.findall(r"\b(?:[HQI]MMA|HGMMA|UTC\w*MMA)\b", sass)),
        "code_bytes": max(offsets, default=-16) + 16,
    }


def read_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = output(tool("cuobjdump"), "-res-usage", path)
        sass = output(tool("nvdisasm"), path)
    return {"registers": int(re.findall(r"REG:(\d+)", usage)[0]), **read_sass(sass)}


def read_amdgcn(assembly: str) -> dict[str, Any]:
    def number(pattern: str) -> int:
        return int(re.findall(pattern, assembly)[0])

    def bits(suffix: str) -> int:
        return {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}.get(suffix, 8 if "byte" in suffix else 16)

    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)"),
        "spills": number(r"\.private_segment_fixed_size:\s+(\d+)"),
        "loads": _widths(assembly, r"\b(?:global|buffer|flat)_load_(\w+)", bits),
        "stores": _widths(assembly, r"\b(?:global|buffer|flat)_store_(\w+)", bits),
        "tensor_core": len(re.findall(r"\bv_mfma_", assembly)),
        "code_bytes": number(r"codeLenInByte = (\d+)"),
    }


# the CUDA library -----------------------------------------------------------------------------------------------------

LIBRARY = ROOT / "sdo_fast" / "_C_cuda.so"
CUDA_TARGETS = tuple(target for target in TARGETS if target.startswith("sm_"))

CudaKernel = tuple[str, int, int]
"""Operator and element type, elements of a pack, and dimensions that the index arithmetic provides for."""


def cuda_kernel(mangled: str) -> CudaKernel:
    width, rank = re.findall(r"ELi(\d+)ELi(\d+)EEEv", mangled)[0]
    operator, arguments = re.findall(r"\d+(Step|Shortcut)I(.*?)EELi\d+E", mangled)[0]
    return f"{operator}<{arguments}>", int(width), int(rank)


ELEMENT_BITS = {"BFloat16": 16, "Half": 16, "double": 64, "float": 32}


def _cuda_name(kernel: CudaKernel) -> tuple[str, str, list[str]]:
    """Operator, element type, and what else it is instantiated for."""
    name, arguments = kernel[0].rstrip(">").split("<")
    element = next(e for e in ELEMENT_BITS if e in arguments or arguments[0] == e[0])
    flags = ("guided", "clipped") if name == "Step" else ("clipped",)
    return name, element, [f for f, on in zip(flags, re.findall(r"Lb([01])E?", arguments), strict=True) if on == "1"]


@cache
def cuda_code(target: str) -> dict[CudaKernel, str]:
    """The assembly of each kernel of the library for a target."""
    sass = output(tool("cuobjdump"), "-arch", target, "-sass", LIBRARY)
    functions = re.split(r"\n\s*Function : (\S+)", sass)[1:]
    return {
        cuda_kernel(name): code
        for name, code in zip(functions[::2], functions[1::2], strict=True)
        if "elementwise" in name
    }


@cache
def cuda_usage() -> dict[tuple[str, CudaKernel], dict[str, int]]:
    """What the assembler says that each kernel takes: REG, STACK, LOCAL, SHARED."""
    usages = {}
    for part in re.split(r"\narch = ", output(tool("cuobjdump"), "-res-usage", LIBRARY))[1:]:
        for name, usage in re.findall(r"Function (\S+elementwise_kernel\S+):\s*\n\s*(.*)", part):
            usages[part.split()[0], cuda_kernel(name)] = {k: int(n) for k, n in re.findall(r"(\w+):(\d+)", usage)}
    return usages


def cuda_kernels(targets: Sequence[str]) -> Iterator[Resources]:
    """What the CUDA kernels were built to; none where they were not built."""
    for target in targets if LIBRARY.exists() else ():
        for kernel, sass in cuda_code(target).items() if target in CUDA_TARGETS else ():
            name, element, flags = _cuda_name(kernel)
            _, width, rank = kernel
            usage, threads = cuda_usage()[target, kernel], 256
            yield Resources(
                target,
                "sdo",
                f"{' '.join([name, element, *flags])}, packs of {width}, {'dense' if rank == 1 else 'strided'}",
                name,
                width * ELEMENT_BITS[element],
                False,
                usage["REG"],
                shared=usage["SHARED"],
                threads=threads,
                occupancy=round(occupancy(target, usage["REG"], usage["SHARED"], threads), 3),
                **read_sass(sass),
                main=element == "float" and width > 1 and rank == 1,
            )
