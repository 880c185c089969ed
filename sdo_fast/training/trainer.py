"""The loop."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .batches import Batches, read_prompts
from .config import RewardConfig, check_active
from .files import adding, checkpoint_path, checkpoints, delayed_interrupt, prune, replacing
from .objective import Objective, Outcome, Reward, diversity
from .parameters import Tuning
from .plan import Plan, plan_of
from .records import Records, finite, peak_memory
from .sources import Source, as_source

OnEvaluation = Callable[[dict[str, Any], Tensor], None]


class NonFiniteRewardError(FloatingPointError):
    """A reward, the loss or its gradient became inf or NaN; the weights are those of the update before."""


class Progress:
    """What goes on after an interruption beside weights and optimiser."""

    def __init__(self) -> None:
        self.step = 0
        self.stopped = False
        """Early."""
        self.first_diversity: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)


class RewardTrainer:
    r"""Fine-tunes a diffusion model so that a reward of its images rises, by the gradient of the reward.

    Every step samples fresh images with the graph of a gradient path (`sdo_fast.paths`, by default one random step of
    the sampler, arXiv 2505.07477) and minimises

        loss = -sum_k weight_k mean(reward_k(images, prompts)) + kl_weight mean |o - o_base|^2

    over LoRA or other parameters theta with AdamW. o are the denoiser's outputs at the path's steps. Memory is that of
    sampling and one call of the denoiser, whatever the number of steps, beside the decoder's and the reward's graphs.

    Args:
        source: a diffusers pipeline, `PipelineSource(pipe, num_inference_steps=20, ...)` with arguments of its call, or
            `SamplerSource(sampler, conditions, shape)`. All its modules are frozen but for what is trained, and in eval
            mode.
        reward: `reward(images, prompts)` -> (B,) with gradients, or several by name. Images are float32, (B, C, H, W)
            in [0, 1] of a pipeline. A reward that is an nn.Module is moved to the device, frozen and put in eval mode.
        prompts: a list, the path of a text file with a prompt a line, or a dataset whose rows are prompts or hold a
            "prompt". For a SamplerSource whatever its `conditions` takes.
        config: the options.
        accelerator: one of yours; None for one that does what `accelerate launch` or `torchrun` say.

    Runs on many processes with DistributedDataParallel or FSDP2 as accelerate is told to. Which images a step sees
    depends on the seed and their number alone, so two processes train the model that one trains with twice the batch.
    Deterministic where the model and the rewards are; an interrupted run goes on bit for bit.

    Raises:
        ValueError, TypeError: an argument is wrong, or a reward returns something else.
        NonFiniteRewardError: in `train`, `update` and `evaluate`.
    """

    def __init__(
        self,
        source: Any,
        reward: Reward | Mapping[str, Reward],
        prompts: Any,
        config: RewardConfig | None = None,
        *,
        accelerator: Accelerator | None = None,
    ) -> None:
        self.config = config = RewardConfig() if config is None else config
        if not isinstance(config, RewardConfig):
            raise TypeError(f"config must be a RewardConfig, got {type(config).__name__}")
        self.source: Source = as_source(source)
        rewards = _as_rewards(reward, config)
        prompts = read_prompts(prompts)
        self.output = None if config.output is None else Path(config.output)
        self.accelerator = accelerator = (
            _accelerator(config, len(self.source.networks)) if accelerator is None else accelerator
        )
        self.source.take(config.path, config.checkpoint)
        check_active(self.source.path)
        self.source.to(accelerator.device)
        halves = any(p.dtype == torch.float16 for module in self.source.modules() for p in module.parameters())
        if halves and accelerator.scaler is None:
            warnings.warn(
                "source is float16, in which small gradients vanish: mixed_precision='fp16' scales them (on a GPU), "
                "bfloat16 holds them",
                stacklevel=2,
            )
        for module in rewards.values():
            if isinstance(module, nn.Module):
                module.requires_grad_(False).eval().to(accelerator.device)
        self.tuning = Tuning(self.source, config)
        self.batches = Batches(prompts, config, accelerator.num_processes, accelerator.process_index)
        self._prepare(Objective(self.source, self.tuning, rewards, config.reward_weights, config.kl_weight))
        self.progress = Progress()
        if config.ema_decay and accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("ema_decay must be 0 with FSDP, whose averaged shards no checkpoint would hold")
        self.ema = EMAModel(self.parameters, config.ema_decay) if config.ema_decay else None
        accelerator.register_for_checkpointing(self.progress, *([] if self.ema is None else [self.ema]))
        accelerator.register_save_state_pre_hook(self._save_trained)
        accelerator.register_load_state_pre_hook(self._load_trained)
        self.records = Records(config, accelerator, self.output)

    def _prepare(self, objective: Objective) -> None:
        config = self.config
        optimizer = torch.optim.AdamW(
            list(self.tuning.named().values()), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        schedule = get_scheduler(
            config.lr_schedule, optimizer, num_warmup_steps=config.warmup_steps, num_training_steps=config.steps
        )
        self.objective, self.optimizer, self.schedule = self.accelerator.prepare(objective, optimizer, schedule)
        # Sharding puts others in their place.
        self.parameters = [p for p in self.objective.parameters() if p.requires_grad]

    def train(self, resume: bool = False, on_evaluation: OnEvaluation | None = None) -> bool:
        """Run to the end, an early stop (True) or an interruption by Ctrl-C or SIGTERM (False); save all the same.

        Args:
            resume: go on from the last checkpoint in `config.output`, or begin where there is none. With another number
                of `steps` too, if the learning rate does not depend on it.
            on_evaluation: called with what `evaluate` returns, every time.

        Writes to `config.output`: `weights`, what was trained as diffusers reads it; `checkpoint-...`;
        `images/....png`; `log.jsonl`, a line a step.
        """
        self._resume(resume)
        config, progress = self.config, self.progress
        self.records.begin(progress.step)
        try:
            with delayed_interrupt() as interrupted:
                if config.evaluate_every and progress.step == 0:
                    self._evaluate_and_judge(on_evaluation)
                while progress.step < config.steps and not progress.stopped:
                    self.records.step(self.update())
                    if config.evaluate_every and progress.step % config.evaluate_every == 0:
                        self._evaluate_and_judge(on_evaluation)
                    interruption = self._anywhere(interrupted())
                    last = progress.stopped or progress.step == config.steps
                    if interruption or last or progress.step % config.save_every == 0:
                        self._checkpoint()
                    if interruption:
                        return False
            if self.output is not None:
                self.save(self.output / "weights")
        finally:
            self.records.end()
        return True

    def save(self, folder: str | Path) -> None:
        """Write what is trained (averaged, with EMA), for plain diffusers: LoRA for `pipe.load_lora_weights(folder)`,
        whole networks in subfolders of their names for `from_pretrained`. LoRA of a second transformer lies in
        `transformer_2`, for `pipe.load_lora_weights(folder / "transformer_2", load_into_transformer_2=True)`, that of
        a network for which the pipeline loads none, or there is no pipeline, in a subfolder of its name, for
        `network.load_lora_adapter(folder / name, prefix=None, use_safetensors=True)`, or for peft where the network has
        no such method (`set_peft_model_state_dict`; the `LoraConfig` is in the file's metadata). Other files in the
        folder stay. All processes must call it."""
        with self._averaged():
            state = self.accelerator.get_state_dict(self.objective)
        if self.accelerator.is_main_process:
            state = {key.removeprefix("module.").removeprefix("networks."): t for key, t in state.items()}
            states: dict[str, dict[str, Tensor]] = {name: {} for name in self.tuning.networks}
            for key, t in state.items():
                name, _, rest = key.partition(".")
                states[name][rest] = t.detach()
            with adding(Path(folder)) as partial, self._averaged():
                self.tuning.save(partial, getattr(self.source, "pipe", None), states)
        self.accelerator.wait_for_everyone()

    def plan(self) -> Plan:
        """What is trained, the memory to expect and the calls of an update; calls the denoiser once."""
        return plan_of(self)

    @torch.no_grad()
    def evaluate(self) -> tuple[dict[str, Any], Tensor]:
        """Reward and diversity of the images of fixed prompts and noise, and the images."""
        images, rewards = [], []
        with self._averaged():
            for batch in self.batches.evaluation():
                outcome = self.objective(batch)
                images.append(outcome.images)
                rewards.append(torch.stack(list(outcome.rewards.values()), 1))
        count = min(self.config.evaluation_prompts, len(self.batches.prompts)) * self.config.evaluation_images
        gathered = self.accelerator.gather_for_metrics(torch.cat(images))[:count]
        means = self.accelerator.gather_for_metrics(torch.cat(rewards))[:count].mean(0).tolist()
        values = dict(zip(outcome.rewards, means, strict=True))
        if not all(map(math.isfinite, means)):
            raise NonFiniteRewardError(
                f"rewards must be finite, got {values} in the evaluation at {self.progress.step}"
            )
        group = self.config.evaluation_images if self.config.evaluation_images > 1 else count
        record = {
            "step": self.progress.step,
            "evaluation/reward": self._weighted(values),
            "evaluation/diversity": finite(diversity(gathered, group).item()),
        }
        named = {f"evaluation/{name}": value for name, value in values.items()}
        return record | (named if len(named) > 1 else {}), gathered

    def _evaluate_and_judge(self, tell: OnEvaluation | None) -> None:
        """Evaluate, tell, and decide whether to stop."""
        record, images = self.evaluate()
        if tell is not None:
            tell(record, images)
        self.records.evaluation(record, images, self.config.evaluation_images)
        reward, spread = record["evaluation/reward"], record["evaluation/diversity"]
        if self.progress.step == 0:
            self.progress.first_diversity = spread
        config, first = self.config, self.progress.first_diversity
        enough = config.stop_reward is not None and reward >= config.stop_reward
        alike = config.stop_diversity is not None and first is not None and spread < config.stop_diversity * first
        self.progress.stopped = enough or alike

    def update(self) -> dict[str, Any]:
        """One update, for loops of one's own; what log.jsonl has of it."""
        begin, config, accelerator = time.perf_counter(), self.config, self.accelerator
        outcomes: list[Outcome] = []
        told: dict[str, Any] = {}
        accelerator.gradient_accumulation_steps = config.gradient_accumulation  # whoever made it
        for part in range(config.gradient_accumulation):
            with accelerator.accumulate(self.objective):
                outcome = self.objective(self.batches.train(self.progress.step, part))
                accelerator.backward(outcome.loss)
                outcomes.append(outcome._replace(loss=outcome.loss.detach()))
                if accelerator.sync_gradients:
                    norm = float(accelerator.clip_grad_norm_(self.parameters, config.max_grad_norm))
                    told = self._told(outcomes, norm)
                self.optimizer.step()
                if accelerator.sync_gradients:
                    self.schedule.step()
                self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.parameters)
        self.progress.step += 1
        images = config.batch_size * config.gradient_accumulation * accelerator.num_processes
        return {
            "step": self.progress.step,
            **told,
            "learning_rate": self.schedule.get_last_lr()[0],
            "path": sorted(self.source.drawn.shares),
            "images_per_second": images / (time.perf_counter() - begin),
            "memory": peak_memory(),
        }

    def _told(self, outcomes: list[Outcome], norm: float) -> dict[str, Any]:
        """Of all processes; raises before the weights take in what is not finite."""
        config, step = self.config, self.progress.step + 1
        names = list(outcomes[0].rewards)
        group = config.images_per_prompt if config.images_per_prompt > 1 else config.batch_size
        rows = [
            torch.stack([*(o.rewards[n].mean() for n in names), o.kl, o.loss, diversity(o.images, group)]).float()
            for o in outcomes
        ]
        values = self.accelerator.gather_for_metrics(torch.stack(rows)).mean(0).tolist()
        rewards, (kl, loss, spread) = dict(zip(names, values, strict=False)), values[len(names) :]
        if not all(map(math.isfinite, values[: len(names) + 2])):
            raise NonFiniteRewardError(f"rewards must be finite, got {rewards}, kl {kl} at step {step}")
        # GradScaler leaves such steps out.
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            raise NonFiniteRewardError(
                f"rewards must have finite gradients, got a norm of {norm} at step {step}: a root or a quotient at 0?"
            )
        return {
            "reward": self._weighted(rewards),
            **({f"reward/{name}": value for name, value in rewards.items()} if len(names) > 1 else {}),
            "diversity": finite(spread),
            **({"kl": kl} if config.kl_weight else {}),
            "loss": loss,
            "gradient_norm": finite(norm),
        }

    def _weighted(self, rewards: Mapping[str, float]) -> float:
        return sum(self.config.reward_weights.get(name, 1.0) * value for name, value in rewards.items())

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place of the present ones."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def _anywhere(self, happened: bool) -> bool:
        """Whether it happened in any process, so that all stop at one step."""
        if self.accelerator.num_processes == 1:
            return happened
        flag = torch.tensor(float(happened), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, "sum") > 0)

    def _settings(self) -> dict[str, Any]:
        """What must be the same for a run to go on bit for bit."""
        free = ["output", "progress", "log_with", "save_every", "keep", "checkpoint", "gradient_checkpointing"]
        if self.config.lr_schedule.startswith("constant"):
            free.append("steps")
        settings = {name: value for name, value in self.config.as_json().items() if name not in free}
        shapes = {name: list(p.shape) for name, p in self.tuning.named().items()}
        return settings | {"processes": self.accelerator.num_processes, "parameters": shapes}

    def _checkpoint(self) -> None:
        if self.output is None:
            return
        accelerator = self.accelerator
        with replacing(checkpoint_path(self.output, self.progress.step), accelerator.is_main_process) as partial:
            accelerator.wait_for_everyone()
            accelerator.save_state(str(partial))
            if accelerator.is_main_process:
                (partial / "settings.json").write_text(json.dumps(self._settings(), indent=1))
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            prune(self.output, self.config.keep)
        accelerator.wait_for_everyone()

    def _resume(self, resume: bool) -> None:
        found = [] if self.output is None else checkpoints(self.output)
        if not found:
            return
        if not resume:
            raise ValueError(
                f"output must be a folder without checkpoints, or train(resume=True) go on from them, got {found[-1]}"
            )
        settings, ours = json.loads((found[-1] / "settings.json").read_text()), self._settings()
        differing = {name: (settings.get(name), ours[name]) for name in ours if settings.get(name) != ours[name]}
        if differing:
            told = ", ".join(f"{name} {was!r}, now {now!r}" for name, (was, now) in differing.items())
            raise ValueError(f"config must be that of {found[-1]} to go on from it, got another: {told}")
        self.accelerator.load_state(str(found[-1]))
        if self.ema is not None:
            self.ema.to(self.accelerator.device)

    def _save_trained(self, models: list[nn.Module], weights: list[Any], folder: str) -> None:
        """For accelerate: of what is not sharded, write what is trained alone."""
        if weights and self.accelerator.is_main_process:
            tensors = {name: p.detach().contiguous() for name, p in self.tuning.named().items()}
            save_file(tensors, Path(folder) / "trained.safetensors")
        weights.clear()

    @torch.no_grad()
    def _load_trained(self, models: list[nn.Module], folder: str) -> None:
        if models:
            stored = load_file(Path(folder) / "trained.safetensors")
            for name, p in self.tuning.named().items():
                p.copy_(stored[name])
        models.clear()


def _as_rewards(reward: Any, config: RewardConfig) -> dict[str, Reward]:
    rewards = dict(reward) if isinstance(reward, Mapping) else {"reward": reward}
    if not rewards:
        raise ValueError("reward must be a function or a mapping of names to functions, got an empty one")
    for name, function in rewards.items():
        if not callable(function):
            raise TypeError(f"reward {name!r} must be a function (images, prompts), got {type(function).__name__}")
    if unknown := config.reward_weights.keys() - rewards.keys():
        raise ValueError(f"reward_weights must be of {', '.join(map(repr, rewards))}, got {sorted(unknown)}")
    return rewards


def _accelerator(config: RewardConfig, networks: int) -> Accelerator:
    if config.log_with is not None and find_spec(config.log_with) is None:
        raise ImportError(f"log_with={config.log_with!r} needs it installed: pip install {config.log_with}")
    # A path may leave a denoiser out, and a denoiser parameters; LoRA's layers all run.
    find_unused = config.train != "lora" or networks > 1
    return Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.gradient_accumulation,
        log_with=config.log_with,
        project_dir=None if config.output is None else str(config.output),
        # Schedules count updates, not processes.
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused)],
        # Without a GPU it would not take torchrun's processes for its own.
        cpu=not torch.accelerator.is_available(),
    )
