"""What a run is to do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..arguments import check_choice, check_flag, check_mapping, is_integer, number
from ..paths import AnyPath, as_path, identity
from ..paths import Path as GradientPath

COUNTS = {
    "steps": 1,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "images_per_prompt": 1,
    "warmup_steps": 0,
    "lora_rank": 1,
    "evaluate_every": 0,
    "evaluation_prompts": 1,
    "evaluation_images": 1,
    "save_every": 1,
    "keep": 1,
    "seed": 0,
}
LR_SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
NUMBERS = ("learning_rate", "weight_decay", "max_grad_norm", "ema_decay", "kl_weight")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The options of a `RewardTrainer`.

    Raises:
        ValueError, TypeError: an option is of the wrong type or out of range.
    """

    steps: int = 500
    """Updates of the parameters."""
    batch_size: int = 4
    """Images sampled at once by each process. An update sees `batch_size` x `gradient_accumulation` x processes."""
    gradient_accumulation: int = 1
    """Batches an update, one after the other."""
    images_per_prompt: int = 1
    """Images of each prompt in a batch; of two or more diversity is that between images of one prompt."""
    learning_rate: float = 1e-4
    """Of AdamW, betas (0.9, 0.999). Published runs take 1e-4 to 3e-4 for LoRA, a tenth or less for all parameters."""
    lr_schedule: str = "constant"
    """Of `diffusers.optimization.get_scheduler`: "constant", "constant_with_warmup", "linear", "cosine",
    "cosine_with_restarts" or "polynomial"."""
    warmup_steps: int = 0
    """Updates in which the learning rate rises from 0; all schedules but "constant" have them."""
    weight_decay: float = 0.0
    """AdamW's, towards zero: of LoRA weights that is towards the base model."""
    max_grad_norm: float = 1.0
    """The gradient's norm is clipped to this, a number greater than 0."""
    path: AnyPath | None = None
    """Of `sdo_fast.paths`: which steps of the sampler keep their gradient. None takes that of the ShortcutPipeline or
    ShortcutSampler that is given, and for a bare pipeline "random", one step drawn anew for each batch."""
    train: str | Sequence[str] = "lora"
    """"lora", "all", or patterns (`fnmatch`) of parameter names, which begin with the component's: "unet.*attn2*"."""
    lora_rank: int = 8
    lora_alpha: float | None = None
    """LoRA adds alpha / rank B A x; None for alpha = rank."""
    lora_targets: str | Sequence[str] = ("to_q", "to_k", "to_v", "to_out.0")
    """`target_modules` of `peft.LoraConfig`: ends of module names, or one regular expression."""
    mixed_precision: str | None = None
    """"no", "bf16" or "fp16": autocast of the sampler, not of the rewards. None for what `accelerate launch` says. A
    float16 pipeline takes "fp16", which scales the loss: else small gradients vanish."""
    checkpoint: bool | None = None
    """Call the denoiser of the path's steps again in backward, instead of keeping what one call keeps beside the
    decoder's and the rewards' graphs. None takes the source's, True for a bare pipeline."""
    gradient_checkpointing: bool = False
    """Recompute block by block in the denoiser too (its `enable_gradient_checkpointing`)."""
    ema_decay: float = 0.0
    """Decay of averaged weights, which then are evaluated and saved; 0 for none."""
    kl_weight: float = 0.0
    """Weight in the loss of mean |o - o_base|^2 over the outputs o of the denoiser at the path's steps: up to a factor
    the KL divergence between these steps of both samplers. One more call of the denoiser a step of the path."""
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    """Of several rewards, by name; 1 where it is left out."""
    evaluate_every: int = 0
    """Updates between evaluations: images of fixed prompts and noise, as a grid, with reward and diversity. 0 for
    none."""
    evaluation_prompts: int = 4
    """So many, the first ones."""
    evaluation_images: int = 4
    """Of each of them."""
    stop_reward: float | None = None
    """Stop when the reward of an evaluation reaches this."""
    stop_diversity: float | None = None
    """Stop when the diversity of an evaluation falls below this share of that before the first update."""
    output: str | Path | None = None
    """Folder of weights, checkpoints, images and log.jsonl; None writes nothing."""
    save_every: int = 100
    """Updates between checkpoints."""
    keep: int = 2
    """Checkpoints kept."""
    log_with: str | None = None
    """"tensorboard" or "wandb"."""
    seed: int = 0
    """Of LoRA's first weights, of prompts' order, of noise and of paths."""
    progress: bool = True
    """Show a bar."""

    def __post_init__(self) -> None:
        for name, least in COUNTS.items():
            value = getattr(self, name)
            if not is_integer(value) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        for name in NUMBERS:
            number(name, getattr(self, name), 0)
        for name in ("lora_alpha", "stop_reward", "stop_diversity"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name))
        if self.checkpoint is not None:
            check_flag("checkpoint", self.checkpoint)
        check_flag("gradient_checkpointing", self.gradient_checkpointing)
        check_flag("progress", self.progress)
        for name in ("train", "lora_targets"):
            value = getattr(self, name)
            many = [value] if isinstance(value, str) else value if isinstance(value, (list, tuple)) else []
            if not many or not all(isinstance(one, str) for one in many):
                raise TypeError(f"{name} must be a string or a list of strings, got {value!r}")
        if self.output is not None and not isinstance(self.output, (str, Path)):
            raise TypeError(f"output must be a folder or None, got {self.output!r}")
        check_mapping("reward_weights", self.reward_weights)
        for name, weight in self.reward_weights.items():
            number(f"reward_weights[{name!r}]", weight)
        if self.mixed_precision is not None:
            check_choice("mixed_precision", self.mixed_precision, ("no", "bf16", "fp16"))
        check_choice("lr_schedule", self.lr_schedule, LR_SCHEDULES)
        if self.log_with is not None:
            check_choice("log_with", self.log_with, ("tensorboard", "wandb"))
        self._check_together()

    def _check_together(self) -> None:
        if self.path is not None:
            check_active(self.path)
        if self.max_grad_norm == 0:
            raise ValueError("max_grad_norm must be greater than 0, got 0, of which no gradient remains")
        if self.warmup_steps and self.lr_schedule == "constant":
            raise ValueError(
                f"warmup_steps must be 0 with lr_schedule='constant', got {self.warmup_steps}; "
                "'constant_with_warmup' has them"
            )
        if self.ema_decay >= 1:
            raise ValueError(f"ema_decay must be below 1, got {self.ema_decay}")
        if self.batch_size % self.images_per_prompt:
            raise ValueError(
                f"batch_size must be a multiple of images_per_prompt ({self.images_per_prompt}), got {self.batch_size}"
            )
        if not self.evaluate_every and (self.stop_reward is not None or self.stop_diversity is not None):
            raise ValueError("evaluate_every must be positive to stop by reward or diversity, got 0")
        if self.stop_diversity is not None and self.evaluation_images * self.evaluation_prompts < 2:
            raise ValueError("evaluation_images must be 2 or more to stop by diversity, got 1")
        if self.output is None and self.log_with is not None:
            raise ValueError(f"output must be a folder with log_with={self.log_with!r}, got None")

    def as_json(self) -> dict[str, Any]:
        """The options as JSON holds them."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        plain = (bool, int, float, str, type(None))
        return {name: value if isinstance(value, plain) else repr(value) for name, value in values.items()}


def check_active(path: AnyPath) -> None:
    """Raise where no model output keeps its graph."""
    known = as_path(path)
    if known == identity() or (isinstance(known, GradientPath) and not known.shares):
        raise ValueError(f"path must have an active step, for parameters have no other gradient, got {path!r}")
