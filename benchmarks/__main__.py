"""`python -m benchmarks`: sets what must be set before torch loads, then `command.main`."""

from __future__ import annotations

import os
import sys

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
TUNED_MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "200000000",
}


def reexecute(argv: list[str]) -> None:
    """Start again with the variables, unless they are set."""
    wanted = ENVIRONMENT | (TUNED_MALLOC if "--tuned-malloc" in argv else {})
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *argv], {**os.environ, **missing})


if __name__ == "__main__":
    reexecute(sys.argv[1:])

    from .command import main

    sys.exit(main())
