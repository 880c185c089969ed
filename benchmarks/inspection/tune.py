"""Search of the kernels' static tables on a device: `python -m benchmarks.inspection.tune`.

A table stands in the file of its kernels and is chosen by architecture, so that no user waits for a search. This one
times the launches that a setting (a table, one row of it, or constants) decides over with each candidate, behind the
check that the results stay the same, and prints the new value; nobody's files are changed.
"""

from __future__ import annotations

import argparse
import importlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ..gpu import Gpu, Rehearsal
from ..harness import TOLERANCE, relative_rms
from ..progress import Tell, progress
from ..restart import INTERPRETED, restart
from .launches import LAUNCHES, Launch, Shape


@dataclass(frozen=True)
class Setting:
    """A table of a file of kernels, one row of it, or constants."""

    name: str
    family: str
    shapes: tuple[Shape, ...]
    """What it decides over."""
    current: Any
    candidates: tuple[Any, ...]
    use: Callable[[Any], None]
    """Puts a candidate in force."""
    launches: tuple[str, ...] = ()
    """Names of the launches it concerns; the main ones if none."""


def _attributes(module: ModuleType, names: Sequence[str]) -> tuple[Any, Callable[[Any], None]]:
    """The value of one name or the tuple of several, and what sets it."""

    def use(value: Any) -> None:
        for name, part in zip(names, value if len(names) > 1 else (value,), strict=True):
            setattr(module, name, part)

    values = tuple(getattr(module, name) for name in names)
    return values if len(names) > 1 else values[0], use


def _haar(device: torch.device) -> Iterator[Setting]:
    from swformer_kernels import _device, _haar

    target = _device.architecture(device)
    tiles: dict[str, Any] = _haar._TILES
    rows = list(tiles.get(target, tiles["default"]))
    shapes: tuple[Shape, ...] = ((1, 16, 256, 256), (2, 40, 256, 256))
    candidates = tuple(product((1024, 2048, 4096, 8192, 16384), (1, 2, 4, 8)))
    for family in ("haar_dwt2d", "haar_idwt2d"):
        for i, shape in enumerate(shapes):

            def use(candidate: Any, i: int = i) -> None:
                rows[i] = (rows[i][0], *candidate)
                tiles[target] = tuple(rows)

            name = f'_haar._TILES["{target}"][{i}] (bytes, warps) for {family}'
            yield Setting(name, family, (shape,), rows[i][1:], candidates, use)


SHAPES: tuple[Shape, ...] = ((1, 40, 256, 256), (4, 40, 128, 128))
ATTENTION_SHAPES: tuple[Shape, ...] = tuple((batch, 3 * dim, height, width) for batch, dim, height, width in SHAPES)
"""What channel attention sees in a block."""

FORWARD, BACKWARD, PARTIALS = "multiscale_ffn fp32", "multiscale_ffn_backward fp32", (512, 1024, 2048, 4096)
Constants = tuple[tuple[str, tuple[Any, ...], tuple[str, ...]], ...]
"""Names of a file's constants, candidates, and the launches concerned; the main ones if none."""

CONSTANTS: dict[str, tuple[tuple[Shape, ...], Constants]] = {
    "pointwise": (
        SHAPES,
        (
            ("_BYTES _CHANNELS", tuple(product((128, 256, 512), (32, 64, 128))), ("pointwise 3 maps fp32",)),
            (
                "_PARAMETER_CHANNELS _PARAMETER_BYTES",
                tuple(product((32, 64, 128), (64, 128))),
                ("pointwise_backward 3 maps fp32",),
            ),
            ("_PIXELS_A_PARTIAL", PARTIALS, ("pointwise_backward 3 maps fp32",)),
        ),
    ),
    "multiscale_ffn": (
        SHAPES,
        (
            ("_BAND _BAND_COLUMNS _HIDDEN_CHANNELS", tuple(product((4, 8), (16, 32), (32, 64))), (FORWARD,)),
            ("_OUT_ROWS _OUT_COLUMNS", ((8, 16), (4, 32), (4, 16), (8, 32)), (FORWARD,)),
            ("_OUT_CHANNELS", (32, 64, 128), (FORWARD, BACKWARD)),
            ("_LEVEL_ROWS _LEVEL_CHANNELS", tuple(product((4, 8, 16), (2, 4, 8))), (FORWARD, BACKWARD)),
            ("_OUT_BACKWARD_ROWS _OUT_BACKWARD_CHANNELS", tuple(product((1, 2), (16, 32, 64))), (BACKWARD,)),
            ("_INPUT_CHANNELS _PARAMETER_CHANNELS", tuple(product((32, 64), (16, 32, 64))), (BACKWARD,)),
            ("_PIXELS_A_PARTIAL", PARTIALS, (BACKWARD,)),
        ),
    ),
    "channel_attention": (
        ATTENTION_SHAPES,
        (
            ("_TILE _TILES_A_PARTIAL", tuple(product((1024, 2048, 4096), (4, 8, 16))), ()),
            ("_WEIGHTS", (1024, 2048, 4096), ()),
        ),
    ),
}


def _constants(family: str, device: torch.device) -> Iterator[Setting]:
    module = importlib.import_module(f"swformer_kernels.{family}")
    shapes, rows = CONSTANTS[family]
    for names, candidates, launches in rows:
        current, use = _attributes(module, names.split())
        yield Setting(f"{family}.{names.replace(' ', ', ')}", family, shapes, current, candidates, use, launches)


def _stream(device: torch.device) -> Iterator[Setting]:
    from swformer_kernels import _stream

    strips = ((64, 32, 16), (32, 16), (16,), (128, 64, 32, 16), (64, 32, 16, 8))
    for family, op in (("depthwise_gelu", "depthwise_gelu{} fp32"), ("wavelet_mix", "wavelet_mix{} 3x3 fp32")):
        launches = (op.format(""), op.format("_backward"))
        for name, candidates in (("_STRIP_ROWS", strips), ("_ENOUGH_PROGRAMS", (256, 512, 1024, 2048))):
            current, use = _attributes(_stream, [name])
            yield Setting(f"_stream.{name} for {family}", family, SHAPES, current, candidates, use, launches)


def _fourier_mix(device: torch.device) -> Iterator[Setting]:
    from swformer_kernels import _spectrum

    shapes: tuple[Shape, ...] = ((1, 40, 256, 256), (1, 64, 128, 128))
    for name in ("_GRADIENT_FREQUENCIES", "_PARAMETER_CHANNELS"):
        table = getattr(_spectrum, name)
        for precision in table:

            def use(value: Any, table: dict[str, int] = table, precision: str = precision) -> None:
                table[precision] = value

            label = f'_spectrum.{name}["{precision}"]'
            concerned = (f"spectrum_mix_backward {precision}",)
            yield Setting(label, "fourier_mix", shapes, table[precision], (16, 32, 64), use, concerned)
    current, use_constant = _attributes(_spectrum, ["_FREQUENCIES_A_PARTIAL"])
    launches = ("spectrum_mix_backward ieee", "spectrum_moments")
    yield Setting("_spectrum._FREQUENCIES_A_PARTIAL", "fourier_mix", shapes, current, PARTIALS, use_constant, launches)


TABLES: dict[str, Callable[[torch.device], Iterator[Setting]]] = {
    "fourier_mix": _fourier_mix,
    **{family: partial(_constants, family) for family in CONSTANTS},
    "haar": _haar,
    "stream": _stream,
}
"""In the order in which they are searched: those that take longest to compile at the end."""


@dataclass
class Trial:
    """A candidate, and its time or why it has none."""

    candidate: Any
    seconds: float = math.inf
    problem: str = ""


def _work(setting: Setting, shapes: Sequence[Shape], gpu: Gpu) -> list[Launch]:
    def make(*size: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return torch.randn(size, device=gpu.device).to(dtype).contiguous(memory_format=layout)

    launches = (launch for shape in shapes for launch in LAUNCHES[setting.family].launches(make, shape))
    return [launch for launch in launches if (launch.name in setting.launches if setting.launches else launch.main)]


def _seconds(launches: Sequence[Launch], gpu: Gpu, repeats: int) -> float:
    """The geometric mean of the launches' median times."""
    logarithms = []
    for launch in launches:
        times = [gpu.seconds(partial(launch.launcher, *launch.args)) for _ in range(repeats)]
        logarithms.append(math.log(statistics.median(times)))
    return math.exp(statistics.fmean(logarithms))


def _coarser(launch: Launch, result: Tensor) -> torch.dtype:
    """The coarser of a launch's dtype and its result's."""
    first = next(a.dtype for a in launch.args if isinstance(a, Tensor))
    return max((first, result.dtype), key=lambda dtype: TOLERANCE[dtype])


def _try(setting: Setting, candidate: Any, launches: Sequence[Launch], expected: Sequence[Any], gpu: Gpu) -> Trial:
    setting.use(candidate)
    try:
        for launch, result in zip(launches, expected, strict=True):
            for ours, theirs in zip(tree_leaves(launch.launcher(*launch.args)), tree_leaves(result), strict=True):
                # Sums in another order, on both sides.
                if theirs.numel() and relative_rms(ours, theirs) > 10 * TOLERANCE[_coarser(launch, theirs)]:
                    return Trial(candidate, problem=f"wrong result of {launch.name}")
        gpu.synchronize()
        return Trial(candidate, _seconds(launches, gpu, 2 if gpu.device == "cpu" else 10))
    except Exception as error:
        return Trial(
            candidate, problem=f"{type(error).__name__}: {str(error).splitlines()[0][:60] if str(error) else ''}"
        )
    finally:
        setting.use(setting.current)


def search(setting: Setting, gpu: Gpu, shapes: Sequence[Shape], budget: float) -> list[Trial]:
    """Trials of the setting's present value and then of each candidate until `budget` seconds have passed."""
    begin = time.perf_counter()
    launches = _work(setting, shapes, gpu)
    expected = [launch.launcher(*launch.args) for launch in launches]
    trials = [_try(setting, setting.current, launches, expected, gpu)]
    for candidate in setting.candidates:
        if time.perf_counter() - begin > budget:
            break
        if candidate != setting.current:
            trials.append(_try(setting, candidate, launches, expected, gpu))
    return trials


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspection.tune", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(TABLES)} (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="rehearse it on the CPU: small shapes, two candidates")
    parser.add_argument("--seconds", type=float, default=120, help="for all tables together (default 120)")
    return parser


def search_all(
    settings: Sequence[Setting], gpu: Gpu, seconds: float, tell: Tell
) -> Iterator[tuple[Setting, list[Trial]]]:
    """The trials of each setting that there is time for; a rehearsal takes two candidates and small shapes."""
    end = time.perf_counter() + seconds
    for place, setting in enumerate(settings):
        budget = (end - time.perf_counter()) / (len(settings) - place)
        if budget < 0:
            return
        tell(setting.name)
        shapes = setting.shapes
        if gpu.device == "cpu":
            setting = replace(setting, candidates=setting.candidates[:2])
            shapes = LAUNCHES[setting.family].interpreted[1:]
        yield setting, search(setting, gpu, shapes, budget)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line()
    args = parser.parse_args(argv)
    unknown = sorted(set(args.tables) - set(TABLES))
    if unknown:
        parser.error(f"unknown table {', '.join(unknown)}; there are {', '.join(TABLES)}")
    if not (args.dry_run or torch.cuda.is_available()):
        parser.error("not tuned: no GPU (--dry-run rehearses it on the CPU)")
    gpu = Rehearsal() if args.dry_run else Gpu()
    settings = [setting for name in args.tables or TABLES for setting in TABLES[name](torch.device(gpu.device))]
    shown = RichTable("table", "now", "best", "times as fast", "tried", "did not run", title_justify="left")
    shown.title = "REHEARSAL ON THE CPU, no figures of a GPU" if args.dry_run else torch.cuda.get_device_name()
    chosen, status = [], 0
    with progress(len(settings)) as tell:
        try:
            for setting, trials in search_all(settings, gpu, args.seconds, tell):
                best, failures = min(trials, key=lambda t: t.seconds), [t for t in trials if t.problem]
                chosen.append(f"{setting.name} = {best.candidate}")
                gain = trials[0].seconds / best.seconds
                tried = f"{len(trials)} of {len({setting.current, *setting.candidates})}"
                problems = "; ".join(f"{t.candidate}: {t.problem}" for t in failures) or "-"
                shown.add_row(setting.name, str(setting.current), str(best.candidate), f"{gain:.2f}", tried, problems)
        except KeyboardInterrupt:
            print("\ninterrupted: the finished tables are below", file=sys.stderr)
            status = 130
    console = Console()
    (console if console.is_terminal else Console(width=180)).print(shown)
    print("\n".join(chosen))
    if len(chosen) < len(settings):
        print(f"not reached in {args.seconds:g} s: {', '.join(setting.name for setting in settings[len(chosen) :])}")
    return status


if __name__ == "__main__":
    if "--dry-run" in sys.argv:
        restart("benchmarks.inspection.tune", INTERPRETED)
    sys.exit(main())
