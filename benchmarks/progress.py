"""What is being done: a bar on a terminal, elsewhere a line for each piece of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

Tell = Callable[[str], None]


@contextmanager
def progress(total: int | None = None) -> Iterator[Tell]:
    """Inside, what is called with a description as each of `total` pieces of work begins."""
    console, begun = Console(), 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        bar = bars.add_task("", total=total)

        def tell(description: str) -> None:
            nonlocal begun
            bars.update(bar, description=description, completed=begun)
            begun += 1
            if not console.is_terminal:
                print(f"[{begun}/{total or '?'}] {description}", flush=True)

        yield tell
