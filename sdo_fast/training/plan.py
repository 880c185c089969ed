"""What a run would train, hold and call, told before it begins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..paths import Path, Schedule, as_path
from .batches import Batch, generator_of

if TYPE_CHECKING:
    from .trainer import RewardTrainer


@dataclass(frozen=True)
class Plan:
    """Bytes are those of one process; of sharded weights those of its share."""

    parameters: dict[str, int]
    """Numbers of what is trained, by name."""
    weights: int
    """Bytes of all modules of the source, and of the copy that `kl_weight` needs without LoRA."""
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    averaged: int
    """EMA's weights."""
    activations: int | None
    """Bytes that one call of the denoiser on a batch keeps for backward; None where its weights are sharded."""
    images: int
    """An update, of all processes."""
    calls: int | None
    """Of the denoiser, forward, for one batch: sampling, and for each of the path's steps its repetition in backward
    (with `checkpoint`) and the base model's for `kl_weight`. None where the number of steps is unknown."""
    graph_calls: int | None
    """Those of them that keep a graph."""

    def __str__(self) -> str:
        count = sum(self.parameters.values())
        names = list(self.parameters)
        shown = [*names[:3], *(["..."] if len(names) > 3 else [])]
        lines = [
            f"trained: {count:,} parameters in {len(names)} tensors ({', '.join(shown)})",
            f"memory: weights {_size(self.weights)}, gradients {_size(self.gradients)}, optimiser "
            f"{_size(self.optimizer)}" + (f", averaged weights {_size(self.averaged)}" if self.averaged else ""),
        ]
        if self.activations is not None:
            lines.append(f"        one call of the denoiser keeps {_size(self.activations)} for backward")
        lines.append("        beside these: the decoder's and the rewards' graphs")
        if self.calls is not None:
            lines.append(
                f"an update: {self.images} images; {self.calls} calls of the denoiser for a batch, {self.graph_calls} "
                "with a graph"
            )
        return "\n".join(lines)


def plan_of(trainer: RewardTrainer) -> Plan:
    config, named = trainer.config, trainer.tuning.named()
    modules = [*trainer.source.modules(), *trainer.tuning.bases.values()]
    trained = sum(map(_bytes, named.values()))
    steps, calls, graph_calls = trainer.source.steps, None, None
    if steps is not None:
        path = as_path(trainer.source.path)
        if not isinstance(path, Path):
            path = path.draw(Schedule(range(steps), lambda: [1.0] * steps), generator_of(0))
        active = len(path.shares) + path.noises
        sampled = (steps if path.stop is None else path.stop + 1) + path.noises
        calls = sampled + active * (trainer.source.checkpoint + bool(config.kl_weight))
        graph_calls = active
    return Plan(
        parameters={name: p.numel() for name, p in named.items()},
        weights=_distinct(p for module in modules for p in module.parameters()),
        gradients=trained,
        optimizer=2 * trained,
        averaged=trained if config.ema_decay else 0,
        activations=_activations(trainer),
        images=config.batch_size * config.gradient_accumulation * trainer.accelerator.num_processes,
        calls=calls,
        graph_calls=graph_calls,
    )


def _bytes(tensor: Tensor) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.numel() * local.element_size()


def _distinct(tensors: Iterable[Tensor]) -> int:
    return sum({id(t): _bytes(t) for t in tensors}.values())


def _size(count: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.4g} GiB"


class _Call(Exception):
    """The first call of a denoiser, which ends there."""

    def __init__(self, args: Any, kwargs: Any) -> None:
        super().__init__()
        self.call = args, kwargs


def _activations(trainer: RewardTrainer) -> int | None:
    network = next(iter(trainer.tuning.networks.values()))
    if any(type(p) is not nn.Parameter for p in network.parameters()):
        return None
    args, kwargs = _first_call(trainer, network, trainer.batches.train(0, 0))
    own = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with trainer.accelerator.autocast(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = network(*args, **kwargs)
    del output
    return sum(kept.values())


def _first_call(trainer: RewardTrainer, network: nn.Module, batch: Batch) -> tuple[Any, Any]:
    def leave(module: nn.Module, args: Any, kwargs: Any) -> None:
        raise _Call(args, kwargs)

    handle = network.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        with torch.no_grad():
            trainer.accelerator.unwrap_model(trainer.objective)(batch)
    except _Call as first:
        return first.call
    finally:
        handle.remove()
    raise RuntimeError(f"source must call its {type(network).__name__}, and did not")
