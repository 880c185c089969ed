"""Random calls of every op against its definition in fp64: `make fuzz SECONDS=3600`.

A seed is a case. Failures and the number of cases done go to a log, from which the next run continues; a failure is
tried on smaller images until it passes, and the smallest is written.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from contract import CATALOGUE, arguments, as_list, detached, differentiable, gradients, op_of, random_grads
from helpers import LAYOUTS, TOLERANCE, fp64, poisoned_memory, rel_rms
from torch import Tensor

import swformer_fast as sf
from benchmarks.records import write_atomically

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
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


def case(seed: int) -> Case:
    rng = random.Random(seed)

    def side() -> int:
        return rng.choice((rng.randint(1, 9), rng.randint(1, 40), rng.randint(1, 140)))

    return Case(
        seed,
        rng.choice(list(CATALOGUE)),
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
    found = gradients(outputs, grads, args, places) if places else []
    return [t for t in (*outputs, *found) if t is not None]


def attempt(c: Case) -> tuple[str | None, int]:
    """What is wrong with this case, or None, and how many calls of ours it took.

    Random sums cancel now and then: twice the tolerance, then PyTorch's own largest error in this dtype, then what
    rounding the inputs to it does to the exact result; sums over runs of pixels in it are up to 32 times as far off.
    Normalised over a few values, what comes out hardly depends on what goes in: there the gradient is all cancellation.
    """
    torch.manual_seed(c.seed)
    operator, dtype = CATALOGUE[c.name], DTYPES[c.dtype]
    layout = "contiguous" if c.layout == "expanded" and c.shape[0] == 0 else c.layout
    args = arguments(c.name, *c.shape, dtype=dtype, layout=layout, optional=c.optional, kernel=c.kernel, mean=c.mean)
    args = detached(args, lambda i: operator.differentiable and i in operator.places and bool(c.needs >> i & 1))
    places = differentiable(operator, args) if any(isinstance(a, Tensor) and a.requires_grad for a in args) else []
    few = 100 * (c.name == "fourier_mix" and not c.optional and c.shape[0] * c.shape[2] * (c.shape[3] // 2 + 1) < 8)
    by_definition = sf.backend.choose(sf.backend.OPS[c.name], tuple(args)).backend == "reference"
    calls = 2 * (1 + bool(places))
    grads = random_grads(as_list(operator.fake_forward(*args)))
    if grads and grads[0].dim() == 4 and grads[0].numel():
        grads[0] = LAYOUTS[c.grad_layout](grads[0].to(dtype))

    def run(function: Any, args: Sequence[Any], threads: int = 1) -> list[Tensor]:
        torch.set_num_threads(threads)
        try:
            with poisoned_memory():
                return results(function, args, grads, places)
        finally:
            torch.set_num_threads(1)

    ours, definition = op_of(c.name), operator.forward
    try:
        exact = fp64(args)
        actual, again, expected = run(ours, args, c.threads), run(ours, args, c.threads % 3 + 1), run(definition, exact)
    except Exception as error:
        # That much PyTorch refuses too.
        return None if "more than 1 value per channel" in str(error) else f"{type(error).__name__}: {error}", calls
    for i, (a, same, e) in enumerate(zip(actual, again, expected, strict=True)):
        if not by_definition and not torch.equal(a.nan_to_num(), same.nan_to_num()):
            return f"result {i}: other bits with another number of threads", calls
        if not by_definition and not torch.equal(a.isfinite(), e.isfinite()):
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


def problem(c: Case) -> str | None:
    return attempt(c)[0]


def moved(args: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """The arguments, each number off by up to half a unit in the last place of `dtype`."""

    def one(t: Tensor) -> Tensor:
        off = (torch.rand(t.shape, dtype=t.dtype) - 0.5) * torch.finfo(dtype).eps
        return (t.detach() * (1 + off)).requires_grad_(t.requires_grad)

    return [one(a) if isinstance(a, Tensor) else a for a in args]


def smallest(c: Case) -> Case:
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
