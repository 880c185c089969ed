"""What Triton's kernels compile to, for GPUs that are not there.

Triton's launch path compiles what the launchers launch (`launches.LAUNCHES`), in a subprocess without
TRITON_INTERPRET, which is this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, astuple
from functools import cache, partial
from typing import Any

from .launching import launches
from .machine_code import ROOT, TARGETS, Resources, occupancy, read_amdgcn, read_cubin


class Driver:
    """Stands for a GPU that is not there, so that a launch compiles for it."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.name = next(name for name, values in TARGETS.items() if values == astuple(target))

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def pretend(target: str) -> None:
    """From here on launches compile for this target. The first call comes before the kernels' modules are imported."""
    import triton
    from swformer_kernels import _device
    from triton.backends.compiler import GPUTarget

    _device.architecture = lambda device: triton.runtime.driver.active.name
    triton.runtime.driver.set_active(Driver(GPUTarget(*TARGETS[target])))


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


def _compiled(target: str, kernel: Any, grid: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What one launch of a kernel compiles to."""
    begin = time.perf_counter()
    binary = kernel.run(*args, grid=grid, warmup=True, **kwargs)
    seconds = time.perf_counter() - begin
    code = read_amdgcn(binary.asm["amdgcn"]) if "amdgcn" in binary.asm else read_cubin(binary.asm["cubin"])
    threads, shared = binary.metadata.num_warps * binary.metadata.target.warp_size, binary.metadata.shared
    resident = round(occupancy(target, code["registers"], shared, threads), 3)
    sizes = {"shared": shared, "threads": threads, "occupancy": resident, "compile_s": round(seconds, 2)}
    return {"kernel": kernel.__name__, **sizes, **code}


def _compile(
    families: list[str],
    targets: list[str],
    everything: bool,
    fresh: bool,
    cached: Mapping[str, dict[str, Any]],
    offset: int,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of each launch; runs in a separate process."""
    import triton
    from triton.runtime.jit import JITFunction

    pretend(targets[0])
    from .launches import LAUNCHES, meta

    triton.knobs.compilation.always_compile = fresh
    launched: list[tuple[Any, Any, tuple[Any, ...], Mapping[str, Any]]] = []
    wanted = [
        (family, shape, launch, launch.main and shape == LAUNCHES[family].compiled[0])
        for family in families
        for shape in LAUNCHES[family].compiled
        for launch in LAUNCHES[family].launches(partial(meta, offset=offset), shape)
    ]
    for target in targets:
        pretend(target)
        for family, shape, launch, main in wanted:
            if not (main or everything or cached):
                continue
            launched.clear()
            with launches(lambda *call: launched.append(call)):
                launch.launcher(*launch.args)
            name = f"{launch.name} {'x'.join(map(str, shape))}"
            declared = {"target": target, "family": family, "launch": name, "main": main, "width": launch.width}
            declared["needs_tensor_core"] = launch.tensor_core
            rows = []
            for kernel, grid, args, kwargs in launched:
                key = _key(target, kernel, args, kwargs)
                if key in cached:
                    rows.append(cached[key] | declared)
                elif main or everything:
                    row = _compiled(target, kernel, grid, args, kwargs) | declared | {"key": key}
                    rows.append(row if fresh else row | {"compile_s": None})
            yield rows
        for module in [module for name, module in sys.modules.items() if name.startswith("swformer_kernels.")]:
            for function in vars(module).values():
                if isinstance(function, JITFunction):
                    function.device_caches.clear()


def resources_of(row: dict[str, Any]) -> Resources:
    widths = {key: {int(bits): count for bits, count in row[key].items()} for key in ("loads", "stores")}
    return Resources(**row | widths)


def triton_kernels(
    families: Sequence[str],
    targets: Sequence[str],
    everything: bool = False,
    fresh: bool = False,
    cached: Sequence[Resources] = (),
    tell: Callable[[str], None] = lambda description: None,
    offset: int = 0,
) -> Iterator[Resources]:
    """What the launches of the families compile to on each target.

    everything: all launches at all shapes, not the main ones at the first. fresh: compile what the compiler's cache
    holds too, so that its time is measured. cached: earlier results, of any launches, taken where nothing has changed.
    tell(description) is called for each launch. offset: elements beyond a boundary of 16 bytes at which the tensors
    begin.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    request = {
        "families": list(families),
        "targets": list(targets),
        "everything": everything,
        "fresh": fresh,
        "cached": {r.key: asdict(r) for r in cached},
        "offset": offset,
    }
    command = [sys.executable, "-W", "ignore", "-m", f"{__package__}.compilation"]
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
            for line in process.stdout:
                results = [resources_of(row) for row in json.loads(line)]
                if results:
                    tell(f"compiling {results[0].target} {results[0].launch}")
                yield from results
        except BaseException:
            process.kill()
            raise
        if process.wait():
            errors.seek(0)
            raise RuntimeError(f"compiling {', '.join(families)} failed:\n{errors.read()}")


@cache
def resources(
    families: tuple[str, ...], targets: tuple[str, ...], everything: bool = False, offset: int = 0
) -> list[Resources]:
    """`triton_kernels` as a list, kept."""
    return list(triton_kernels(families, targets, everything, offset=offset))


if __name__ == "__main__":
    for results in _compile(**json.load(sys.stdin)):
        print(json.dumps(results), flush=True)
