"""Shortcut Diffusion Optimization: gradients through a sampler at the price of one step (arXiv 2505.07477)."""

from typing import Any

from . import functional, losses, paths, reference
from .backend import backends, use_backend, why_not
from .constraints import whitened
from .inversion import Inversion, invert
from .optimize import NonFiniteLossError, optimize_latents
from .pipelines import from_pipeline
from .reuse import TrajectoryCache
from .sampler import SamplerConfig, ShortcutSampler
from .schedulers import coefficients
from .score_function import ScoreFunction
from .shortcut_pipeline import ShortcutPipeline
from .solver import NotAffineError

__all__ = [
    "Inversion",
    "NonFiniteLossError",
    "NotAffineError",
    "SamplerConfig",
    "ScoreFunction",
    "ShortcutPipeline",
    "ShortcutSampler",
    "TrajectoryCache",
    "backends",
    "coefficients",
    "from_pipeline",
    "functional",
    "invert",
    "losses",
    "optimize_latents",
    "paths",
    "reference",
    "use_backend",
    "whitened",
    "why_not",
]

_TRAINING = ("PipelineSource", "RewardConfig", "RewardTrainer", "SamplerSource")


def __getattr__(name: str) -> Any:
    """What trains needs more than torch, and is imported when it is asked for."""
    if name in _TRAINING:
        from . import training

        return getattr(training, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
