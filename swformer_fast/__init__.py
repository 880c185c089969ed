"""Fast SWFormer modules for PyTorch."""

from . import functional, reference
from .backend import backends, use_backend, why_not

__all__ = ["backends", "functional", "reference", "use_backend", "why_not"]
