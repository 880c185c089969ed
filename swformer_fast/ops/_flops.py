"""FLOP formulas: torch's FlopCounterMode counts for an op what its definition takes, forward and backward.

torch.utils.flop_counter imports Triton, so it is not imported here: the formulas are registered when somebody does.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ._operator import CATALOGUE, Operator

_COUNTER = "torch.utils.flop_counter"


def register_when_counted() -> None:
    """Now if the counter is imported, else when it will be."""
    if _COUNTER in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds the counter as usual, once, and registers the formulas behind its import."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                _register()

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def _register() -> None:
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.swformer_fast
    for operator in CATALOGUE.values():
        register_flop_formula(getattr(ops, operator.name), get_raw=True)(_forward(operator))
        if operator.differentiable:
            register_flop_formula(getattr(ops, operator.backward_name), get_raw=True)(_backward(operator))


def _forward(operator: Operator) -> Callable[..., int]:
    return lambda *args, out_val=None, **kwargs: _count(operator.forward, args)


def _backward(operator: Operator) -> Callable[..., int]:
    def formula(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
        inputs = operator.backward_arguments(args).inputs
        return _count(operator.backward, args) - _count(operator.definition, inputs)

    return formula


def _count(function: Callable[..., Any], args: Sequence[Any]) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    on_meta = [a.detach().to("meta") if isinstance(a, Tensor) else a for a in args]
    with FlopCounterMode(display=False) as counter:
        function(*on_meta)
    return counter.get_total_flops()
