"""Plain PyTorch definitions: the loops that the fast sampler is compared with, the operators, and what all share."""

from .loops import full_backprop, sdo_loop
from .model import GuidedModel
from .shortcut import shortcut_backward
from .solver import Solver
from .step import sampler_step

__all__ = ["GuidedModel", "Solver", "full_backprop", "sampler_step", "sdo_loop", "shortcut_backward"]
