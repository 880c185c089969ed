"""`accelerate`: turn the reference modules inside any model into fast ones."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from . import modules, network, reference

_MODULE = TypeVar("_MODULE", bound=nn.Module)

_PARTS = ("ImageConv2d", "Merge", "Resample", "Stage")
"""Modules that only a network holds."""
FAST_TYPES: dict[type[nn.Module], type[nn.Module]] = {
    getattr(reference, name): getattr(modules, name)
    for name in reference.__all__
    if isinstance(getattr(modules, name, None), type)
} | {reference.SWFormer: network.SWFormer, **{getattr(reference.network, n): getattr(network, n) for n in _PARTS}}
FAST_NAMES = {kind.__name__ for kind in FAST_TYPES}


def accelerate(model: _MODULE) -> _MODULE:
    """Turn every reference module in `model`, itself included, into its fast counterpart, in place.

    Only the modules' classes change: parameters, buffers, hooks, training flags, sharing and state_dict stay the very
    same objects, so optimizers, schedulers and wrappers (DataParallel, DDP) made before go on working. Modules of
    other classes, subclasses of the reference modules included, are left alone: they may override what the fast
    modules replace. Calling it again changes nothing.

    Raises:
        TypeError: model is no nn.Module.
        ValueError: a reference module has a parametrised parameter of its own (torch.nn.utils.parametrize); or the
            reference modules are sharded (FSDP2), compiled, scripted or traced: accelerate them first.

    Returns:
        model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    replaceable = []
    for name, module in model.named_modules():
        base = type(module).__mro__[1]
        if type(module) in FAST_TYPES:
            replaceable.append(module)
        elif nn.utils.parametrize.is_parametrized(module) and base in FAST_TYPES:
            raise ValueError(
                f"module {name or '(root)'!r} ({base.__name__}) has parametrised parameters: accelerate the model "
                "before registering them"
            )
        elif _sharded(module):
            raise ValueError(f"module {name or '(root)'!r} is sharded: call accelerate before fully_shard")
        elif hasattr(module, "_orig_mod") and any(type(m) in FAST_TYPES for m in module.modules()):
            raise ValueError(f"module {name or '(root)'!r} is compiled: call accelerate before torch.compile")
        elif isinstance(module, torch.jit.ScriptModule) and module.original_name in FAST_NAMES:
            raise ValueError(f"module {name or '(root)'!r} is scripted or traced: call accelerate before torch.jit")
    for module in replaceable:
        module.__class__ = FAST_TYPES[type(module)]
    return model


def _sharded(module: nn.Module) -> bool:
    """Whether fully_shard put a class of its own over a reference module's."""
    kinds = type(module).__mro__
    return any(kind.__name__ == "FSDPModule" for kind in kinds) and any(kind in FAST_TYPES for kind in kinds)
