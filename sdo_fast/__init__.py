"""Shortcut Diffusion Optimization: gradients through a sampler at the price of one step (arXiv 2505.07477)."""

from . import reference
from .optimize import NonFiniteLossError, optimize_latents
from .reuse import TrajectoryCache
from .sampler import ShortcutSampler
from .schedulers import NotAffineError, coefficients

__all__ = [
    "NonFiniteLossError",
    "NotAffineError",
    "ShortcutSampler",
    "TrajectoryCache",
    "coefficients",
    "optimize_latents",
    "reference",
]
