"""What the kernels compile to, read from the machine code: no GPU is needed.

Triton's own launch path compiles what the launchers launch (`launches.LAUNCHES`) for targets that are not there, in a
subprocess without TRITON_INTERPRET; the CUDA kernels are read from the library that was built. `python -m benchmarks
static` measures every launch and keeps a record; a kernel whose source, arguments and compiler have not changed keeps
the row that it has.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
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


# machine code ---------------------------------------------------------------------------------------------------------


def tool(name: str) -> str | None:
    """A disassembler: from the path, else from triton's wheel."""
    found = shutil.which(name)
    if found is None:
        try:
            import triton
        except ImportError:
            return None
        found = shutil.which(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
    return found


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
        "loads": _widths(sass, r"\bLDG\.(\S+)", bits),
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


# Triton ---------------------------------------------------------------------------------------------------------------


class _Driver:
    """Stands for a GPU that is not there, so that a launch compiles for it."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def _key(target: str, kernel: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    import triton
    from torch import Tensor

    def describe(arg: Any) -> str:
        return f"{arg.dtype}{tuple(arg.shape)}{arg.stride()}" if isinstance(arg, Tensor) else repr(arg)

    parts = (triton.__version__, target, kernel.cache_key, *map(describe, args), repr(sorted(kwargs.items())))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(
    families: list[str], targets: list[str], everything: bool, fresh: bool, known: Mapping[str, dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each launch; runs in a process of its own."""
    import triton
    from swformer_kernels import _common
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from .launches import LAUNCHES, meta

    triton.knobs.compilation.always_compile = fresh
    launched: list[tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = []
    target = ""
    _common.architecture = lambda device: target  # before the families import it
    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: launched.append((kernel, grid, args, kwargs))

    def row(kernel: Any, grid: Any, args: Any, kwargs: Any) -> dict[str, Any]:
        key = _key(target, kernel, args, kwargs)
        if key in known:
            return known[key]
        begin = time.perf_counter()
        binary = kernel.run(*args, grid=grid, warmup=True, **kwargs)
        seconds = time.perf_counter() - begin
        code = read_amdgcn(binary.asm["amdgcn"]) if "amdgcn" in binary.asm else read_cubin(binary.asm["cubin"])
        threads = binary.metadata.num_warps * binary.metadata.target.warp_size
        return {
            "kernel": kernel.__name__,
            "shared": binary.metadata.shared,
            "threads": threads,
            "occupancy": round(occupancy(target, code["registers"], binary.metadata.shared, threads), 3),
            "compile_s": round(seconds, 2) if fresh else None,
            "key": key,
            **code,
        }

    plans = [
        (family, shape, launch)
        for family in families
        for shape in LAUNCHES[family].compiled[: None if everything else 1]
        for launch in LAUNCHES[family].launches(meta, shape)
        if launch.main or everything
    ]
    yield [{"total": len(plans) * len(targets)}]
    for target in targets:
        triton.runtime.driver.set_active(_Driver(GPUTarget(*TARGETS[target])))
        for family, shape, launch in plans:
            launched.clear()
            launch.launcher(*launch.args)
            declared = {
                "target": target,
                "family": family,
                "launch": f"{launch.name} {'x'.join(map(str, shape))}",
                "width": launch.width,
                "needs_tensor_core": launch.tensor_core,
            }
            yield [row(*call) | declared for call in launched]
        for module in {_common, *(sys.modules[f"swformer_kernels.{family}"] for family in families)}:
            for function in vars(module).values():
                if isinstance(function, JITFunction):
                    function.device_caches.clear()


def _resources(row: dict[str, Any]) -> Resources:
    widths = {key: {int(bits): count for bits, count in row[key].items()} for key in ("loads", "stores")}
    return Resources(**row | widths)


def triton_kernels(
    families: Sequence[str],
    targets: Sequence[str],
    everything: bool = False,
    fresh: bool = False,
    known: Sequence[Resources] = (),
    progress: Callable[[int, str], None] = lambda total, description: None,
) -> Iterator[Resources]:
    """What the launches of the families compile to on each target.

    everything: all launches at all shapes, not the main ones at the first. fresh: compile what the compiler's cache
    holds too, so that its time is known. known: earlier results, taken where nothing has changed. progress(total,
    description) is called for each launch.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    request = {
        "families": list(families),
        "targets": list(targets),
        "everything": everything,
        "fresh": fresh,
        "known": {r.key: asdict(r) for r in known},
    }
    command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.static"]
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps(request))
            process.stdin.close()
            total = json.loads(process.stdout.readline() or '[{"total": 0}]')[0]["total"]
            for line in process.stdout:
                found = [_resources(row) for row in json.loads(line)]
                progress(total, f"{found[0].target} {found[0].launch}" if found else "")
                yield from found
        except BaseException:
            process.kill()
            raise
        if process.wait():
            errors.seek(0)
            raise RuntimeError(f"compiling {', '.join(families)} failed:\n{errors.read()}")


@cache
def resources(families: tuple[str, ...], targets: tuple[str, ...], everything: bool = False) -> list[Resources]:
    """`triton_kernels` as a list, kept."""
    return list(triton_kernels(families, targets, everything))


if __name__ == "__main__":
    for results in _compile(**json.load(sys.stdin)):
        print(json.dumps(results), flush=True)
