"""Plain PyTorch definitions: the loops that the fast sampler is compared with, and the parts that both share."""

from .loops import full_backprop, sdo_loop
from .model import GuidedModel
from .solver import Solver

__all__ = ["GuidedModel", "Solver", "full_backprop", "sdo_loop"]
