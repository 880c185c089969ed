"""Progress bars by tqdm, where it is installed."""

from __future__ import annotations

from typing import Any

from .arguments import check_flag


def bar(steps: range, description: str, show: bool) -> Any:
    """`steps` as a bar on stderr; silent where not wanted or without tqdm."""
    check_flag("progress", show)
    if show:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return steps
        return tqdm(steps, desc=description, dynamic_ncols=True)
    return steps
