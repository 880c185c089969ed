"""`python -m benchmarks`: sets what must be set before torch loads, then `command.main`."""

from __future__ import annotations

import sys

from .restart import restart

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
TUNED_MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "2000000000",
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TOP_PAD_": "200000000",
}

if __name__ == "__main__":
    restart("benchmarks", ENVIRONMENT | (TUNED_MALLOC if "--tuned-malloc" in sys.argv else {}))

    from .command import main

    sys.exit(main())
