"""What the tests of RewardTrainer train, and a run of it for `torchrun`: python reward_models.py OUTPUT OPTIONS."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import diffusers
import torch
from sdo_models import tiny_unet
from torch import Tensor, nn

import sdo_fast

SETTINGS = {"steps": 4, "batch_size": 2, "learning_rate": 1e-2, "train": "all", "progress": False, "save_every": 2}


def labels(prompts: Any) -> dict[str, Tensor]:
    return {"class_labels": torch.tensor([int(prompt) for prompt in prompts])}


def brightness(images: Tensor, prompts: list[Any]) -> Tensor:
    return images.mean((1, 2, 3))


class Critic(nn.Module):
    """A small random network as a judge."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(torch.randn(8, channels, 3, 3, generator=generator))
        self.head = nn.Parameter(torch.randn(8, generator=generator))

    def forward(self, images: Tensor, prompts: list[Any]) -> Tensor:
        assert len(images) == len(prompts)
        return torch.tanh(nn.functional.conv2d(images, self.weight.to(images))).mean((2, 3)) @ self.head.to(images)


def small_source(dtype: torch.dtype = torch.float64, **options: Any) -> sdo_fast.SamplerSource:
    """A class-conditional UNet of 8 x 8 pixels."""
    scheduler = diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    sampler = sdo_fast.ShortcutSampler(tiny_unet().to(dtype), scheduler, 4, **{"path": "random", **options})
    return sdo_fast.SamplerSource(sampler, labels, (1, 8, 8))


def small_trainer(
    source: Any = None, reward: Any = None, prompts: Any = (1, 2, 5), accelerator: Any = None, **options: Any
) -> Any:
    config = sdo_fast.RewardConfig(**{**SETTINGS, **options})
    source, reward = source or small_source(), reward or Critic(1)
    return sdo_fast.RewardTrainer(source, reward, prompts, config, accelerator=accelerator)


def killed_after(calls: int) -> Any:
    """A judge that ends its process in the call after so many."""
    critic, seen = Critic(1), []

    def reward(images: Tensor, prompts: list[Any]) -> Tensor:
        seen.append(1)
        if len(seen) > calls:
            os._exit(9)
        return critic(images, prompts)

    return reward


def sharded_on_cpu() -> Any:
    """An Accelerator with FSDP2 over gloo: accelerate itself offers it on accelerators alone."""
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, PartialState

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, step_scheduler_with_optimizer=False)
    os.environ["ACCELERATE_USE_FSDP"] = "true"
    for state in (AcceleratorState, PartialState):
        state._shared_state["distributed_type"] = DistributedType.FSDP
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Attention", "ResnetBlock2D"],
        reshard_after_forward=True,
        state_dict_type="FULL_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    return accelerator


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = json.loads(sys.argv[2])
    kill, resume, fsdp = (options.pop(name, None) for name in ("kill", "resume", "fsdp"))
    trainer = small_trainer(
        reward=None if kill is None else killed_after(kill),
        output=sys.argv[1],
        accelerator=sharded_on_cpu() if fsdp else None,
        **options,
    )
    trainer.train(bool(resume))
