"""Folders and files that are whole or absent, and interrupts that wait for a step to end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PREFIX = "checkpoint-"


@contextmanager
def replacing(folder: Path, write: bool = True) -> Iterator[Path]:
    """A folder to write to, whose files take the place of `folder` at the end; after an error it stays as it was.

    Args:
        write: whether this process is the one that makes and renames it.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    if write:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    yield partial
    if write:
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)


@contextmanager
def adding(folder: Path) -> Iterator[Path]:
    """A folder to write to, whose parts take the place of those of their names in `folder` at the end."""
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    for part in partial.iterdir():
        if (folder / part.name).is_dir():
            shutil.rmtree(folder / part.name)
        os.replace(part, folder / part.name)
    partial.rmdir()


def checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints, the oldest first."""
    found = {int(p.name.removeprefix(PREFIX)): p for p in output.glob(f"{PREFIX}*") if p.name[len(PREFIX) :].isdigit()}
    return [found[step] for step in sorted(found)]


def checkpoint_path(output: Path, step: int) -> Path:
    return output / f"{PREFIX}{step:06d}"


def prune(output: Path, keep: int) -> None:
    for old in checkpoints(output)[:-keep]:
        shutil.rmtree(old)


def cut_lines(path: Path, step: int) -> None:
    """Drop the lines of later steps, which are about to be written again."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
        partial = path.with_name(f".partial-{path.name}")
        partial.write_text("".join(kept))
        os.replace(partial, path)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lines:
        lines.write(json.dumps(record) + "\n")


@contextmanager
def delayed_interrupt() -> Iterator[Callable[[], bool]]:
    """Within the block Ctrl-C and SIGTERM only make the yielded function return True; a second Ctrl-C is at once."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    seen: list[int] = []

    def note(number: int, frame: Any) -> None:
        if seen and number == signal.SIGINT:
            raise KeyboardInterrupt
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(seen)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
