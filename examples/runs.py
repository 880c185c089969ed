"""What the training scripts share: files that are whole or absent, and interrupts that wait for the step to end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

OUTPUT = Path(__file__).resolve().parent / "output"


def write_atomically(path: Path, save: Callable[[Path], None]) -> None:
    """Save under a temporary name, then rename: an interrupted write leaves the old file as it was and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        save(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def delayed_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C and SIGTERM only make the yielded function return True: no step is cut in two."""
    seen: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda number, frame: seen.append(number)) for number in numbers]
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
