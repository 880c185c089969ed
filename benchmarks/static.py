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
from functools import cache, partial
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


class Driver:
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
        if isinstance(arg, (tuple, list)):
            return f"({', '.join(map(describe, arg))})"
        if isinstance(arg, Tensor):
            return f"{arg.dtype}{tuple(arg.shape)}{arg.stride()}{arg.data_ptr() % 16}"
        return repr(arg)

    parts = (triton.__version__, target, kernel.cache_key, *map(describe, args), repr(sorted(kwargs.items())))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _compile(
    families: list[str],
    targets: list[str],
    everything: bool,
    fresh: bool,
    known: Mapping[str, dict[str, Any]],
    offset: int,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each launch; runs in a process of its own."""
    import triton
    from swformer_kernels import _device
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from .launches import LAUNCHES, meta

    triton.knobs.compilation.always_compile = fresh
    launched: list[tuple[Any, Any, tuple[Any, ...], dict[str, Any]]] = []
    target = ""
    _device.architecture = lambda device: target  # before the families import it
    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: launched.append((kernel, grid, args, kwargs))

    def row(kernel: Any, grid: Any, args: Any, kwargs: Any, wanted: bool) -> dict[str, Any] | None:
        key = _key(target, kernel, args, kwargs)
        if key in known or not wanted:
            return known.get(key)
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
        (family, shape, launch, everything or (launch.main and shape == LAUNCHES[family].compiled[0]))
        for family in families
        for shape in LAUNCHES[family].compiled
        for launch in LAUNCHES[family].launches(partial(meta, offset=offset), shape)
    ]
    if not known:
        plans = [plan for plan in plans if plan[-1]]
    yield [{"total": len(plans) * len(targets)}]
    for target in targets:
        triton.runtime.driver.set_active(Driver(GPUTarget(*TARGETS[target])))
        for family, shape, launch, wanted in plans:
            launched.clear()
            launch.launcher(*launch.args)
            declared = {
                "target": target,
                "family": family,
                "launch": f"{launch.name} {'x'.join(map(str, shape))}",
                "width": launch.width,
                "needs_tensor_core": launch.tensor_core,
            }
            rows = [row(*call, wanted) for call in launched]
            yield [found | declared for found in rows if found is not None]
        for module in [module for name, module in sys.modules.items() if name.startswith("swformer_kernels.")]:
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
    offset: int = 0,
) -> Iterator[Resources]:
    """What the launches of the families compile to on each target.

    everything: all launches at all shapes, not the main ones at the first. fresh: compile what the compiler's cache
    holds too, so that its time is known. known: earlier results, of any launches, taken where nothing has changed.
    progress(total, description) is called for each launch. offset: elements beyond a boundary of 16 bytes at which the
    given tensors begin.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    request = {
        "families": list(families),
        "targets": list(targets),
        "everything": everything,
        "fresh": fresh,
        "known": {r.key: asdict(r) for r in known},
        "offset": offset,
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


# CUDA -----------------------------------------------------------------------------------------------------------------

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
    found = {}
    for part in re.split(r"\narch = ", output(tool("cuobjdump"), "-res-usage", LIBRARY))[1:]:
        for name, usage in re.findall(r"Function (\S+elementwise_kernel\S+):\s*\n\s*(.*)", part):
            found[part.split()[0], cuda_kernel(name)] = {k: int(n) for k, n in re.findall(r"(\w+):(\d+)", usage)}
    return found


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
            )


@cache
def resources(
    families: tuple[str, ...], targets: tuple[str, ...], everything: bool = False, offset: int = 0
) -> list[Resources]:
    """`triton_kernels` as a list, kept."""
    return list(triton_kernels(families, targets, everything, offset=offset))


# the command ----------------------------------------------------------------------------------------------------------

SAMPLE = 8
"""Programs of each launch that the traffic is counted on."""


def _traffic_key(family: str, name: str) -> str:
    sources = [*sorted((ROOT / "kernels" / "swformer_kernels").glob("*.py")), Path(__file__).with_name("launches.py")]
    wanted = [p.read_bytes() for p in sources if p.stem.startswith("_") or p.stem in (family, "launches")]
    return hashlib.sha256(b"".join((*wanted, name.encode(), str(SAMPLE).encode()))).hexdigest()[:16]


def traffic_rows(
    families: Sequence[str],
    known: Mapping[str, list[dict[str, Any]]],
    progress: Callable[[int, str], None] = lambda total, description: None,
) -> Iterator[list[dict[str, Any]]]:
    """For each main launch at two sizes one row a kernel: bytes and arithmetic, interpreted on some programs."""
    from .interpret import count_traffic
    from .launches import LAUNCHES, Launch, Make, meta, random

    shapes = [(family, shape) for family in families for shape in LAUNCHES[family].compiled[:2]]

    def launches(make: Make) -> Iterator[tuple[str, str, Launch]]:
        for family, shape in shapes:
            for launch in LAUNCHES[family].launches(make, shape):
                if launch.main and "tf32" not in launch.name:  # the interpreter takes it for fp32
                    yield family, f"{launch.name} {'x'.join(map(str, shape))}", launch

    total = sum(1 for _ in launches(meta))
    for family, name, launch in launches(random):
        progress(total, name)
        key = _traffic_key(family, name)
        if key in known:
            yield known[key]
            continue
        with count_traffic(sample=SAMPLE) as traffic:
            launch.launcher(*launch.args)
        rows = []
        for kernel in traffic.kernels:
            numbers = {k: round(v) if isinstance(v, float) else v for k, v in vars(kernel).items()}
            ratio = (kernel.loaded + kernel.stored) / kernel.compulsory
            by_program = (kernel.program_loaded + kernel.program_stored) / kernel.compulsory
            rows.append(
                {"family": family, "launch": name, **numbers}
                | {"ratio": round(ratio, 4), "program_ratio": round(by_program, 4), "key": key}
            )
        yield rows


def main(argv: Sequence[str]) -> int:
    import argparse

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from . import records, report
    from .launches import LAUNCHES

    families = [*LAUNCHES, "sdo"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks static", description=__doc__)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"{', '.join(families)} (default: all)")
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--quick", action="store_true", help="the main launches only, at one shape")
    parser.add_argument("--out", type=Path, default=records.RESULTS, help="folder of the records")
    args = parser.parse_args(argv)
    wanted = args.families or families
    unknown = sorted(set(wanted) - set(families))
    if unknown:
        parser.error(f"unknown family {', '.join(unknown)}; there are {', '.join(families)}")
    before = {d["suite"]: d["records"] for d in records.load(args.out)}
    compiled = [_resources(row) for row in before.get("static", ())]
    kept = [r for r in compiled if r.family in families and (r.family not in wanted or r.target not in args.targets)]
    counted: dict[str, list[dict[str, Any]]] = {}
    for row in before.get("traffic", ()):
        counted.setdefault(row["key"], []).append(row)
    kept_traffic = [row for row in before.get("traffic", ()) if row["family"] in set(families) - set(wanted)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bars:

        def progress_of(what: str) -> Callable[[int, str], None]:
            bar = bars.add_task(what, total=None)

            def advance(total: int, description: str) -> None:
                bars.update(bar, total=total, advance=1, description=f"{what}: {description}")

            return advance

        def save(suite: str, rows: Sequence[dict[str, Any]], complete: bool) -> None:
            # What has not been reached yet keeps its earlier rows.
            reached = {(row.get("target"), row["launch"]) for row in rows}
            rest = [r for r in before.get(suite, ()) if (r.get("target"), r["launch"]) not in reached]
            records.save(args.out, suite, "cpu", [*rows, *([] if complete else rest)], complete)

        rows = list(kept)
        kernels = [family for family in wanted if family in LAUNCHES]
        try:
            last = time.monotonic()
            if "sdo" in wanted:
                rows += cuda_kernels(args.targets)
            for result in triton_kernels(
                kernels, args.targets, not args.quick, True, compiled, progress_of("compiling")
            ):
                rows.append(result)
                if time.monotonic() - last > 5:
                    save("static", [asdict(r) for r in rows], False)
                    last = time.monotonic()
            save("static", [asdict(r) for r in rows], True)
            moved = list(kept_traffic)
            for found in traffic_rows(kernels, counted, progress_of("counting")):
                moved += found
                save("traffic", moved, False)
            save("traffic", moved, True)
        except KeyboardInterrupt:
            save("static", [asdict(r) for r in rows], False)
            print("\ninterrupted: what was measured is kept, and will not be measured again", file=sys.stderr)
            return 130
    for document in records.load(args.out):
        if document["suite"] in ("static", "traffic"):
            report.console(document)
    report.write(args.out)
    print(f"records: {args.out}")
    return 0


if __name__ == "__main__":
    for results in _compile(**json.load(sys.stdin)):
        print(json.dumps(results), flush=True)
