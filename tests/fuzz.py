"""Random calls of every op and module against its definition in fp64: `make fuzz SECONDS=3600`.

A seed is a case. Failures and the number of cases done go to a log, from which the next run continues; a failure is
tried on smaller images until it passes, and the smallest is written.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from contract import CATALOGUE, arguments, as_list, detached, differentiable, gradients, op_of, random_grads
from helpers import LAYOUTS, TOLERANCE, fp64, num_threads, perturb, poisoned_memory, rel_rms
from torch import Tensor, nn

import sdo_fast
import swformer_fast as sf
from benchmarks.records import write_atomically
from swformer_fast import reference

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RandomCall:
    seed: int
    name: str
    shape: tuple[int, int, int, int]
    dtype: str
    layout: str
    grad_layout: str
    optional: bool
    kernel: int
    mean: float
    threads: int
    needs: int
    """Bits: which inputs need a gradient."""


MODULES: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "HaarDWT2d": lambda dim, kernel: {},
    "HaarIDWT2d": lambda dim, kernel: {},
    "SpatialBranch": lambda dim, kernel: {"dim": dim, "kernel_size": kernel},
    "WaveletBranch": lambda dim, kernel: {"dim": dim, "kernel_size": kernel},
    "FourierBranch": lambda dim, kernel: {"dim": dim, "track_running_stats": kernel != 5},
    "ChannelAttention": lambda dim, kernel: {"dim": dim, "reduction": kernel},
    "MultiScaleFFN": lambda dim, kernel: {"dim": dim, "kernel_size": kernel},
    "MultiDomainMixer": lambda dim, kernel: {"dim": dim, "wavelet_kernel": kernel},
    "SWFormerBlock": lambda dim, kernel: {
        "dim": dim,
        "scale_init": 0.5,
        "spatial_kernel": kernel,
        "norm_position": "post" if kernel == 5 else "pre",
    },
}
"""Options of each module for a number of channels and a side of kernels."""
NAMES = (*CATALOGUE, *MODULES, "sampler_step")


def case(seed: int) -> RandomCall:
    rng = random.Random(seed)

    def side() -> int:
        return rng.choice((rng.randint(1, 9), rng.randint(1, 40), rng.randint(1, 140)))

    return RandomCall(
        seed,
        rng.choice(NAMES),
        (rng.randint(0, 3), rng.choice((rng.randint(1, 6), rng.randint(1, 40))), side(), side()),
        rng.choice(("float32", "float32", *DTYPES)),
        rng.choice(list(LAYOUTS)),
        rng.choice(list(LAYOUTS)),
        rng.random() < 0.5,
        rng.choice((3, 3, 5, 7, 9)),
        rng.choice((0.0, 0.5, 0.5, 3.0)),
        rng.randint(1, 3),
        rng.choice((-1, rng.getrandbits(20))),
    )


def results(function: Any, args: Sequence[Any], grads: Sequence[Tensor], places: list[int]) -> list[Tensor]:
    outputs = as_list(function(*args))
    grad_inputs = gradients(outputs, grads, args, places) if places else []
    return [t for t in (*outputs, *grad_inputs) if t is not None]


@dataclass(frozen=True)
class Subject:
    """A function of ours, its definition, and arguments for both."""

    ours: Callable[..., Any]
    definition: Callable[..., Any]
    args: Sequence[Any]
    places: list[int]
    """Of the results that have a gradient."""
    is_kernel: bool
    """Whether one kernel runs: the same bits for every number of threads, and the definition's numbers are finite."""
    values: float = math.inf
    """Over how many the batch is normalised."""


def op(c: RandomCall) -> Subject:
    operator = CATALOGUE[c.name]
    layout = "contiguous" if c.layout == "expanded" and c.shape[0] == 0 else c.layout
    options = {"layout": layout, "optional": c.optional, "kernel": c.kernel, "mean": c.mean}
    args = arguments(c.name, *c.shape, dtype=DTYPES[c.dtype], **options)
    args = detached(args, lambda i: operator.differentiable and i in operator.places and bool(c.needs >> i & 1))
    chosen = sf.backend.choose(sf.backend.OPS[c.name], tuple(args)).backend
    b, _, h, w = c.shape
    values = b * h * (w // 2 + 1) if c.name == "fourier_mix" and not c.optional else math.inf
    places = differentiable(operator, args)
    return Subject(op_of(c.name), operator.forward, args, places, chosen != "reference", values)


def module(c: RandomCall) -> Subject:
    """As a function of the image, the parameters and the buffers: the output and the buffers afterwards."""
    dtype, (b, dim, h, w) = DTYPES[c.dtype], c.shape
    options = MODULES[c.name](dim, c.kernel)
    expected, actual = getattr(reference, c.name)(**options), getattr(sf, c.name)(**options)
    perturb(expected)
    actual.load_state_dict(expected.state_dict())
    channels = 4 * dim if c.name == "HaarIDWT2d" else dim
    tensors = {name: t.detach() for name, t in expected.named_parameters()}
    buffers = {name: t for name, t in expected.named_buffers() if t.is_floating_point()}
    image = LAYOUTS[c.layout if b else "contiguous"]((torch.randn(b, channels, h, w) + c.mean).to(dtype))

    def call(module: nn.Module) -> Callable[..., list[Tensor]]:
        module.train(c.optional)

        def run(x: Tensor, *args: Tensor) -> list[Tensor]:
            values = dict(zip((*tensors, *buffers), args, strict=True))
            values |= {name: values[name].detach().clone() for name in buffers}
            y = torch.func.functional_call(module, values, (x,))
            return [y, *(values[name] for name in buffers)]

        return run

    leaves = [t.detach().to(dtype).requires_grad_(bool(c.needs >> i & 1)) for i, t in enumerate(tensors.values())]
    args = [image.detach().requires_grad_(c.needs < 0), *leaves, *(t.to(dtype) for t in buffers.values())]
    statistics = c.optional or c.kernel == 5
    return Subject(call(actual), call(expected), args, [0], False, b * h * (w // 2 + 1) if statistics else math.inf)


def step(c: RandomCall) -> Subject:
    count, guided = c.kernel % 5, c.optional
    scales = [0.3, -1.5, 0.7, 2.0][:count]

    def call(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, cond: Tensor, *others: Tensor) -> Tensor:
            uncond, terms = (others[0], others[1:]) if guided else (None, others)
            return function(x, cond, uncond, 3.5, a=1.25, b=-0.75, terms=terms, scales=scales)

        return run

    layout = LAYOUTS[c.layout if c.shape[0] else "contiguous"]
    tensors = (layout((torch.randn(c.shape) + c.mean).to(DTYPES[c.dtype])) for _ in range(2 + guided + count))
    args = [t.detach().requires_grad_(bool(c.needs >> i & 1)) for i, t in enumerate(tensors)]
    return Subject(call(sdo_fast.functional.sampler_step), call(sdo_fast.reference.sampler_step), args, [0], True)


def attempt(c: RandomCall) -> tuple[str | None, int]:
    """What is wrong with this case, or None, and how many calls of ours it took.

    Random sums cancel now and then: twice the tolerance, then PyTorch's own largest error in this dtype, then what
    rounding the inputs to it does to the exact result; sums over runs of pixels in it are up to 32 times as far off.
    Normalised over a few values, what comes out hardly depends on what goes in: there the gradient is all cancellation.
    """
    torch.manual_seed(c.seed)
    dtype = DTYPES[c.dtype]
    subject = op(c) if c.name in CATALOGUE else module(c) if c.name in MODULES else step(c)
    args, ours, definition = subject.args, subject.ours, subject.definition
    places = subject.places if any(isinstance(a, Tensor) and a.requires_grad for a in args) else []
    few = 2000 if subject.values < 16 else 1
    calls = 2 * (1 + bool(places))

    def run(function: Any, args: Sequence[Any], threads: int = 1) -> list[Tensor]:
        with num_threads(threads), poisoned_memory():
            return results(function, args, grads, places)

    try:
        exact = fp64(args)
        grads = random_grads(as_list(definition(*args)))
        if grads[0].dim() == 4 and grads[0].numel():
            grads[0] = LAYOUTS[c.grad_layout](grads[0].to(dtype))
        actual, again, expected = run(ours, args, c.threads), run(ours, args, c.threads % 3 + 1), run(definition, exact)
    except Exception as error:
        # That much PyTorch refuses too.
        return None if "1 value per channel" in str(error) else f"{type(error).__name__}: {error}", calls
    for i, (a, same, e) in enumerate(zip(actual, again, expected, strict=True)):
        if subject.is_kernel and not torch.equal(a.nan_to_num(), same.nan_to_num()):
            return f"result {i}: other bits with another number of threads", calls
        if subject.is_kernel and not torch.equal(a.isfinite(), e.isfinite()):
            return f"result {i}: other numbers are finite", calls
        a, e = (t.where(t.isfinite(), 0) for t in (a, e))
        error, limit = rel_rms(a, e), max(2, few) * TOLERANCE[dtype]
        if error <= limit or (a.double() - e).abs().max() < 1e-7:
            continue
        in_dtype = zip(run(definition, args, c.threads), expected, strict=True)
        limit = max(limit, *(4 * rel_rms(t.where(t.isfinite(), 0), e.where(e.isfinite(), 0)) for t, e in in_dtype))
        near = (run(definition, moved(exact, dtype))[i] for _ in range(4))
        limit = max(limit, *(32 * rel_rms(t.where(t.isfinite(), 0), e) for t in near))
        if not error <= limit:
            return f"result {i}: relative RMS error {error:.1e} > {limit:.1e}", calls
    return None, calls


def problem(c: RandomCall) -> str | None:
    return attempt(c)[0]


def moved(args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """The arguments, each number off by up to half a unit in the last place of `dtype`."""

    def one(t: Tensor) -> Tensor:
        off = (torch.rand(t.shape, dtype=t.dtype) - 0.5) * torch.finfo(dtype).eps
        return (t.detach() * (1 + off)).requires_grad_(t.requires_grad)

    return [one(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def smallest(c: RandomCall) -> RandomCall:
    """The smallest image, with the rest of the case, that still fails."""
    for i in range(4):
        low, high = (0 if i == 0 else 1), c.shape[i]
        while low < high:
            middle = (low + high) // 2
            smaller = replace(c, shape=(*c.shape[:i], middle, *c.shape[i + 1 :]))
            low, high = (low, middle) if problem(smaller) else (middle + 1, high)
        c = replace(c, shape=(*c.shape[:i], high, *c.shape[i + 1 :]))
    return c


def summary(log: dict[str, Any]) -> str:
    return f"{log['calls']} calls in {log['cases']} cases, {len(log['failures'])} failures"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--log", type=Path, default=Path(".cache/fuzz.json"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    log = json.loads(options.log.read_text()) if options.log.exists() else {"cases": 0, "calls": 0, "failures": []}
    end, saved = time.monotonic() + options.seconds, time.monotonic()

    def save() -> None:
        write_atomically(options.log, json.dumps(log, indent=1))

    try:
        while time.monotonic() < end:
            failed, calls = attempt(c := case(log["cases"]))
            log["cases"] += 1
            log["calls"] += calls
            if failed:
                log["failures"].append({**asdict(smallest(c)), "problem": failed})
                print(f"seed {c.seed}: {failed}", flush=True)
            if time.monotonic() - saved > 5:
                save()
                saved = time.monotonic()
                print(summary(log), flush=True)
    except KeyboardInterrupt:
        pass
    save()
    print(f"{summary(log)}: {options.log}")
    return int(bool(log["failures"]))


if __name__ == "__main__":
    raise SystemExit(main())
