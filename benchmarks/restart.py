"""Variables that must be set before torch and Triton load."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

INTERPRETED = {"TRITON_INTERPRET": "1"}
"""Triton reads it when it is imported, as torch may do by itself."""


def restart(module: str, variables: Mapping[str, str]) -> None:
    """Start `python -m module` again with the variables, unless they are set."""
    missing = {name: value for name, value in variables.items() if name not in os.environ}
    if missing:
        os.execve(sys.executable, [sys.executable, "-m", module, *sys.argv[1:]], {**os.environ, **missing})
