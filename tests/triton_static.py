"""Facts about the Triton kernels that need no GPU: compiled code for a GPU target, and traffic counted by interpreting.

`resources(families, targets)` compiles every kernel that the families' launchers launch (LAUNCHES) with Triton's own
launch path, for targets that are not there, in a subprocess without TRITON_INTERPRET. `count_traffic()` counts the
bytes that interpreted kernels load and store.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
SHARED_LIMIT = 99 * 1024


@dataclass(frozen=True)
class Resources:
    """What one kernel of one launch compiles to."""

    target: str
    launch: str
    width: int
    """What the launch declares."""
    needs_tensor_core: bool
    """What the launch declares."""
    kernel: str
    registers: int
    spills: int
    """Registers kept in memory: instructions on local memory (NVIDIA), bytes of scratch memory (AMD)."""
    shared: int
    threads: int
    loads: dict[int, int] = field(default_factory=dict)
    """Global loads by width in bits."""
    stores: dict[int, int] = field(default_factory=dict)
    """Global stores by width in bits."""
    tensor_core: int = 0
    """Matrix instructions."""


# launches -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A call of a launcher on meta tensors, which have sizes and strides but no memory."""

    name: str
    launcher: Callable[..., Any]
    args: tuple[Any, ...]
    main: bool = True
    """Whether it is compiled in every test run, or only in the slow one."""
    width: int = 128
    """Bits of the widest access that the layout and the registers allow."""
    tensor_core: bool = False
    """Whether an NVIDIA target must use its matrix instructions."""


def _image(*size: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=dtype, device="meta", memory_format=layout)


def _parameter(*size: int) -> Tensor:
    return torch.empty(size, device="meta")


IMAGES = (
    ("fp32", torch.float32, False),
    ("bf16", torch.bfloat16, False),
    ("fp32 channels_last", torch.float32, True),
    ("bf16 channels_last", torch.bfloat16, True),
)


def _haar() -> Iterator[Launch]:
    from swformer_kernels import haar

    taps = (_parameter(2), _parameter(2))
    for name, dtype, last in IMAGES:
        x = _image(2, 40, 256, 256, dtype=dtype, channels_last=last)
        y = _image(2, 160, 128, 128, dtype=dtype, channels_last=last)
        both = (True, True)
        yield Launch(f"haar_dwt2d {name}", haar.haar_dwt2d, (x, *taps), not last)
        yield Launch(f"haar_dwt2d_backward {name}", haar.haar_dwt2d_backward, (y, x, *taps, *both), not last)
        yield Launch(f"haar_idwt2d {name}", haar.haar_idwt2d, (y, *taps, 256, 256), not last)
        yield Launch(
            f"haar_idwt2d_backward {name}", haar.haar_idwt2d_backward, (x, y, *taps, 256, 256, *both), not last
        )


def _spatial() -> Iterator[Launch]:
    from swformer_kernels import spatial

    parameters = (_parameter(40, 1, 3, 3), _parameter(40))
    for name, dtype, last in IMAGES:
        x = _image(2, 40, 256, 256, dtype=dtype, channels_last=last)
        width = 8 * x.element_size() if last else 128
        yield Launch(f"depthwise_gelu {name}", spatial.depthwise_gelu, (x, *parameters), not last, width)
        backward = (x, x, *parameters, True, True)
        yield Launch(f"depthwise_gelu_backward {name}", spatial.depthwise_gelu_backward, backward, not last, width)


def _wavelet() -> Iterator[Launch]:
    from swformer_kernels import wavelet

    for size in (3, 5):
        parameters = (_parameter(160, 1, size, size), _parameter(160), *(_parameter(2) for _ in range(4)))
        for name, dtype, last in IMAGES:
            x = _image(2, 40, 256, 256, dtype=dtype, channels_last=last)
            label = f"{size}x{size} {name}"
            main, width = label == "3x3 fp32", 128 if size == 3 else 64
            width = 8 * x.element_size() if last else width
            yield Launch(f"wavelet_mix {label}", wavelet.wavelet_mix, (x, *parameters), main, width)
            backward, back = (x, x, *parameters, True), wavelet.wavelet_mix_backward
            yield Launch(f"wavelet_mix_backward {label}", back, (*backward, True), main, width)
            yield Launch(f"wavelet_mix_backward {label} x", back, (*backward, False), False, width)


def _fourier() -> Iterator[Launch]:
    from swformer_kernels import fourier

    for dim in (40, 64, 96):
        main = dim == 40
        spectrum = _parameter(2, dim, 256, 129, 2)
        mixing = (spectrum, _parameter(4 * dim, 2 * dim + 2), _parameter(dim, dim), 256)
        backward = (spectrum, *mixing, False, True, True)
        for precision in ("ieee", "tf32x3", "tf32"):
            label, wanted = f"{dim} channels {precision}", main and precision != "tf32x3"
            matrix = precision != "ieee"
            yield Launch(f"spectrum_mix {label}", fourier.spectrum_mix, (*mixing, precision), wanted, 128, matrix)
            wanted, back = main and precision == "ieee", fourier.spectrum_mix_backward
            yield Launch(f"spectrum_mix_backward {label}", back, (*backward, precision), wanted, 64, matrix)
        label = f"{dim} channels"
        yield Launch(f"spectrum_moments {label}", fourier.spectrum_moments, (spectrum,), main)
        moments = (spectrum, spectrum, _parameter(2, dim, dim + 1), 256)
        yield Launch(f"spectrum_moments_backward {label}", fourier.spectrum_moments_backward, moments, main)


LAUNCHES: dict[str, Callable[[], Iterator[Launch]]] = {
    "haar": _haar,
    "spatial": _spatial,
    "wavelet": _wavelet,
    "fourier": _fourier,
}
"""For each family, launches that together reach every kernel of its file."""


# compiled code --------------------------------------------------------------------------------------------------------


def _tool(name: str) -> str:
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _widths(assembly: str, pattern: str, bits: Callable[[str], int]) -> dict[int, int]:
    counts: dict[int, int] = {}
    for match in re.findall(pattern, assembly):
        counts[bits(match)] = counts.get(bits(match), 0) + 1
    return dict(sorted(counts.items()))


def _inspect_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run([_tool("cuobjdump"), "-res-usage", path], capture_output=True, text=True, check=True)
        sass = subprocess.run([_tool("nvdisasm"), path], capture_output=True, text=True, check=True).stdout

    def bits(suffixes: str) -> int:
        return next((int(s) for s in suffixes.split(".") if s in ("128", "64")), 32 if "16" not in suffixes else 16)

    return {
        "registers": int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr).group(1)),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "loads": _widths(sass, r"\bLDG\.(\S+)", bits),
        "stores": _widths(sass, r"\bSTG\.(\S+)", bits),
        "tensor_core": len(re.findall(r"\b(?:[HQI]MMA|HGMMA|UTC\w*MMA)\b", sass)),
    }


def _inspect_amdgcn(assembly: str) -> dict[str, Any]:
    def number(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", assembly).group(1))

    def bits(suffix: str) -> int:
        return {"dwordx4": 128, "dwordx3": 96, "dwordx2": 64, "dword": 32}.get(suffix, 8 if "byte" in suffix else 16)

    return {
        "registers": number("vgpr_count"),
        "spills": number("private_segment_fixed_size"),
        "loads": _widths(assembly, r"\b(?:global|buffer|flat)_load_(\w+)", bits),
        "stores": _widths(assembly, r"\b(?:global|buffer|flat)_store_(\w+)", bits),
        "tensor_core": len(re.findall(r"\bv_mfma_", assembly)),
    }


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


def _compile(families: list[str], targets: list[str], everything: bool) -> Iterator[Resources]:
    import triton
    from swformer_kernels import _common
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    compiled: list[tuple[str, Any]] = []
    target = ""
    _common.architecture = lambda device: target  # before the families import it
    JITFunction.__getitem__ = lambda kernel, grid: (
        lambda *args, **kwargs: compiled.append((kernel.__name__, kernel.run(*args, grid=grid, warmup=True, **kwargs)))
    )
    for target in targets:
        triton.runtime.driver.set_active(_Driver(GPUTarget(*TARGETS[target])))
        for family in families:
            for launch in LAUNCHES[family]():
                if not launch.main and not everything:
                    continue
                compiled.clear()
                launch.launcher(*launch.args)
                for kernel, binary in compiled:
                    inspect = _inspect_amdgcn if "amdgcn" in binary.asm else _inspect_cubin
                    code = binary.asm.get("amdgcn") or binary.asm["cubin"]
                    threads = binary.metadata.num_warps * binary.metadata.target.warp_size
                    yield Resources(
                        target,
                        launch.name,
                        launch.width,
                        launch.tensor_core,
                        kernel,
                        shared=binary.metadata.shared,
                        threads=threads,
                        **inspect(code),
                    )
        for value in vars(_common), *(vars(sys.modules[f"swformer_kernels.{f}"]) for f in families):
            for function in value.values():
                if isinstance(function, JITFunction):
                    function.device_caches.clear()


@cache
def resources(families: tuple[str, ...], targets: tuple[str, ...], everything: bool = False) -> list[Resources]:
    """What the main launches of the families, or all, compile to on each target."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", __file__, ",".join(families), ",".join(targets)]
    command += ["everything"] * everything
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr

    def parse(row: dict[str, Any]) -> Resources:
        for key in ("loads", "stores"):
            row[key] = {int(bits): count for bits, count in row[key].items()}
        return Resources(**row)

    return [parse(json.loads(line)) for line in run.stdout.splitlines()]


# traffic --------------------------------------------------------------------------------------------------------------


@dataclass
class Traffic:
    """Bytes that interpreted kernels moved, masked lanes left out: every access, and each address once."""

    loaded: int = 0
    stored: int = 0
    distinct_loaded: int = 0
    distinct_stored: int = 0

    @property
    def total(self) -> int:
        return self.loaded + self.stored


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count the bytes of all kernels that are interpreted inside."""
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    traffic = Traffic()
    touched: dict[tuple[str, int], list[Any]] = {}
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def note(kind: str, pointers: Any, mask: Any) -> int:
        itemsize = pointers.get_element_ty().primitive_bitwidth // 8
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        touched.setdefault((kind, itemsize), []).append(addresses)
        return addresses.size * itemsize

    def distinct(kind: str) -> int:
        return sum(size * np.unique(np.concatenate(lists)).size for (k, size), lists in touched.items() if k == kind)

    def counting_load(self: Any, pointers: Any, mask: Any, *args: Any) -> Any:
        traffic.loaded += note("load", pointers, mask)
        return load(self, pointers, mask, *args)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *args: Any) -> Any:
        traffic.stored += note("store", pointers, mask)
        return store(self, pointers, value, mask, *args)

    Builder.create_masked_load, Builder.create_masked_store = counting_load, counting_store
    try:
        yield traffic
    finally:
        Builder.create_masked_load, Builder.create_masked_store = load, store
        traffic.distinct_loaded, traffic.distinct_stored = distinct("load"), distinct("store")


if __name__ == "__main__":
    for result in _compile(sys.argv[1].split(","), sys.argv[2].split(","), len(sys.argv) > 3):
        print(json.dumps(asdict(result)), flush=True)
