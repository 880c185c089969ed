"""The definitions in plain PyTorch: the loops that the fast sampler is compared with, and the operators."""

from .loops import full_backprop, path_loop
from .shortcut import shortcut_backward
from .step import sampler_step

__all__ = ["full_backprop", "path_loop", "sampler_step", "shortcut_backward"]
