"""The loss of a batch: sampling, rewards and the distance to the base model, as one module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .batches import Batch, generator_of
from .parameters import Tuning
from .sources import Source

Reward = Callable[[Tensor, list[Any]], Tensor]


class Outcome(NamedTuple):
    loss: Tensor
    """-sum_k weight_k mean(reward_k) + kl_weight kl, with the graph."""
    images: Tensor
    rewards: dict[str, Tensor]
    """(B,) each, without weights."""
    kl: Tensor


class Objective(nn.Module):
    """Samples a batch and judges it.

    All of it is one forward call of one module, so that what accelerate wraps it in (DistributedDataParallel, FSDP,
    autocast) sees one call and one backward pass, however often the denoiser runs in between.

    Args:
        rewards: `reward(images, prompts)` -> (B,), by name. They see float32 images outside of autocast.
        weights: of the rewards, 1 where left out.
        kl_weight: of the mean squared distance of the denoiser's outputs to the base model's.
    """

    def __init__(
        self,
        source: Source,
        tuning: Tuning,
        rewards: Mapping[str, Reward],
        weights: Mapping[str, float],
        kl_weight: float,
    ) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(tuning.networks)
        # Where accelerate shards unless it is told otherwise.
        blocks = (getattr(network, "_no_split_modules", None) or () for network in tuning.networks.values())
        self._no_split_modules = sorted({name for names in blocks for name in names})
        self._source, self._tuning = source, tuning
        self._rewards, self._weights, self._kl_weight = dict(rewards), weights, kl_weight
        self._pairs: list[tuple[Tensor, Tensor]] | None = None
        if kl_weight:
            for name, network in tuning.networks.items():
                network.register_forward_hook(self._compare(name), with_kwargs=True)

    def forward(self, batch: Batch) -> Outcome:
        pairs: list[tuple[Tensor, Tensor]] = []
        self._pairs = pairs
        try:
            noise = [generator_of(seed) for seed in batch.seeds]
            images = _single(self._source(batch.prompts, noise, generator_of(batch.path)))
        finally:
            self._pairs = None
        distances = [(_single(output) - _single(base)).square().mean() for output, base in pairs]
        kl = torch.stack(distances).mean() if distances else images.new_zeros(())
        with torch.autocast(images.device.type, enabled=False):
            rewards = {name: self._reward(name, images, batch.prompts) for name in self._rewards}
            loss = -sum((self._weights.get(name, 1.0) * r.mean() for name, r in rewards.items()), kl.new_zeros(()))
        loss = loss + self._kl_weight * kl
        return Outcome(loss, images.detach(), {name: r.detach() for name, r in rewards.items()}, kl.detach())

    def _reward(self, name: str, images: Tensor, prompts: list[Any]) -> Tensor:
        reward = self._rewards[name](images, prompts)
        if not isinstance(reward, Tensor) or reward.shape != (len(images),):
            got = tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
            raise ValueError(f"reward {name!r} must return a tensor of shape ({len(images)},), got {got}")
        if torch.is_grad_enabled() and not reward.requires_grad:
            raise ValueError(f"reward {name!r} must be differentiable in the images, got a result without a graph")
        return reward

    def _compare(self, name: str) -> Callable[..., None]:
        def hook(network: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            # Calls in backward, where a checkpoint repeats them, are not compared again.
            if self._pairs is None:
                return
            outputs = _tensors(output)
            if any(t.requires_grad for t in outputs):
                with torch.no_grad():
                    base = _tensors(self._tuning.base_call(name, args, kwargs))
                self._pairs.extend(zip(outputs, base, strict=True))

        return hook


def _tensors(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _single(t: Tensor) -> Tensor:
    """float32, or float64 as it is."""
    return t if t.dtype == torch.float64 else t.float()


def diversity(images: Tensor, group: int) -> Tensor:
    """Mean RMS distance between the images of a group, the groups one after the other; NaN for groups of one.

    Args:
        images: (B, ...), B a multiple of `group`.
    """
    flat = images.float().flatten(1).unflatten(0, (-1, group))
    pairs = group * (group - 1)
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.sum((1, 2)).mean() / pairs * flat.shape[-1] ** -0.5 if pairs else flat.new_tensor(float("nan"))
