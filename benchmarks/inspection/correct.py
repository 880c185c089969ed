"""`python -m benchmarks.inspection.correct`: every op on Triton against its reference in fp64.

Output and all gradients; those with matrix products first, where a compiler's fault would show. Exits with 1 if one is
wrong or cannot run.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

import swformer_fast as sf

from ..harness import DTYPES, TOLERANCE, products_in, relative_rms
from ..op_cases import as_fp64, moved, train_run
from .arguments import ARGUMENTS, functions

LIMITS = {"fp32": 20 * TOLERANCE[torch.float32], "tf32": 1e-2, "bf16": 5e-2}
"""Sums of gradients over 65,536 pixels may miss a kernel's tolerance."""


def errors(name: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[float]:
    """Relative RMS errors of the output and of each gradient; `dtype` is the image's."""
    torch.manual_seed(0)
    x, *parameters = moved(tuple(ARGUMENTS[name](shape)), device)
    args = (x.detach().to(dtype).requires_grad_(), *parameters)
    fast, reference = functions(name)
    exact = as_fp64(args)
    with torch.no_grad():
        grad = torch.randn_like(reference(*exact)).to(dtype)
    with sf.use_backend("triton"):
        results = train_run(fast, args, grad)()
    expected = train_run(reference, exact, grad.double())()
    return [relative_rms(ours, theirs) for ours, theirs in zip(results, expected, strict=True)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.inspection.correct", description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="small, on the CPU; with TRITON_INTERPRET=1")
    options = parser.parse_args(argv)
    device, shape = ("cpu", (1, 4, 16, 16)) if options.dry_run else ("cuda", (1, 40, 256, 256))
    wrong = 0
    for name in ARGUMENTS:
        for dtype, limit in LIMITS.items():
            try:
                with products_in(dtype):
                    output, *gradients = errors(name, shape, DTYPES[dtype], device)
                text = f"output {output:.1e}, gradients {max(gradients):.1e}"
                bad = max(output, *gradients) > limit
            except Exception as error:
                text, bad = f"{type(error).__name__}: {str(error)[:200]}", True
            wrong += bad
            print(f"{name:18s} {dtype}  {text}{'  WRONG' if bad else ''}", flush=True)
    print(f"{wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
