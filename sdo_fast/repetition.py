"""Calls that are repeated for the backward pass instead of keeping their activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint as run_checkpointed
from torch.utils.checkpoint import set_checkpoint_early_stop

CACHES = (
    "model must do the same when its call is repeated for the backward pass, got something else: one that keeps "
    "activations between calls (DeepCache and its like) takes a sampler with checkpoint=False"
)


def repeated(call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """call(*args, **kwargs), checkpointed; what the repeated call gives is compared with what the first one gave.

    Raises:
        RuntimeError: at the repetition, in backward, where the call gave something else.
    """
    first: list[list[Tensor]] = []

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        outputs = call(*args, **kwargs)
        tensors = [t.detach() for t in tree_leaves(outputs) if isinstance(t, Tensor)]
        if first:
            _check_repetition(first[0], tensors)
        else:
            first.append(tensors)
        return outputs

    with set_checkpoint_early_stop(False):  # the output too is computed again
        # Keywords too among the positions: of tensors there the devices' generators are kept.
        return run_checkpointed(run, args, kwargs, use_reentrant=False)


def _check_repetition(first: list[Tensor], again: list[Tensor]) -> None:
    """Raise where a model gave other outputs, beyond what kernels that sum in any order do, for the same inputs."""
    if first[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return
    for one, other in zip(first, again, strict=True):
        tolerance = 5e-2 if one.dtype in (torch.float16, torch.bfloat16) else 1e-3
        if (other - one).norm() > tolerance * one.norm():
            raise RuntimeError(CACHES)
