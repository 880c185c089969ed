"""The bytes that each main launch moves and the arithmetic it does, counted in the interpreter on some programs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .interpret import count_traffic
from .launches import LAUNCHES, random
from .machine_code import ROOT

SAMPLE = 8
"""Programs of each launch that the traffic is counted on."""


def _key(family: str, name: str) -> str:
    sources = [*sorted((ROOT / "kernels" / "swformer_kernels").glob("*.py")), Path(__file__).with_name("launches.py")]
    wanted = [p.read_bytes() for p in sources if p.stem.startswith("_") or p.stem in (family, "launches")]
    return hashlib.sha256(b"".join((*wanted, name.encode(), str(SAMPLE).encode()))).hexdigest()[:16]


def traffic_rows(
    families: Sequence[str],
    cached: Mapping[str, list[dict[str, Any]]],
    tell: Callable[[str], None] = lambda description: None,
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """For each main launch at two sizes its key and one row a kernel. A key changes with all that decides the rows."""
    launches = (
        (family, shape, launch)
        for family in families
        for shape in LAUNCHES[family].compiled[:2]
        for launch in LAUNCHES[family].launches(random, shape)
        if launch.main and "tf32" not in launch.name  # the interpreter takes it for fp32
    )
    for family, shape, launch in launches:
        name = f"{launch.name} {'x'.join(map(str, shape))}"
        tell(f"counting {name}")
        key = _key(family, name)
        if key in cached:
            yield key, cached[key]
            continue
        with count_traffic(sample=SAMPLE) as traffic:
            launch.launcher(*launch.args)
        rows = []
        for kernel in traffic.kernels:
            by_program = kernel.program_loaded + kernel.program_stored
            rows.append(
                {
                    "family": family,
                    "launch": name,
                    "kernel": kernel.kernel,
                    "programs": kernel.programs,
                    "compulsory": kernel.compulsory,
                    "ratio": (kernel.loaded + kernel.stored) / kernel.compulsory,
                    "program_ratio": by_program / kernel.compulsory,
                    "flops": round(kernel.simple + kernel.special + kernel.dot),
                }
            )
        yield key, rows
