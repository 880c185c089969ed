"""Shortcut Diffusion Optimization: gradients through a sampler at the price of one step (arXiv 2505.07477)."""

from . import reference
from .inversion import Inversion, invert
from .optimize import NonFiniteLossError, optimize_latents
from .pipelines import from_pipeline
from .reuse import TrajectoryCache
from .sampler import ShortcutSampler
from .schedulers import NotAffineError, coefficients

__all__ = [
    "Inversion",
    "NonFiniteLossError",
    "NotAffineError",
    "ShortcutSampler",
    "TrajectoryCache",
    "coefficients",
    "from_pipeline",
    "invert",
    "optimize_latents",
    "reference",
]
