"""RewardTrainer: its update is plain autograd's, on any sampler, for any number of processes, and nothing is lost."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

for package in ("accelerate", "diffusers", "peft", "safetensors", "tqdm", "transformers"):
    pytest.importorskip(package)

import diffusers
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from reward_models import Critic, brightness, labels, small_source, small_trainer
from safetensors.torch import load_file
from sdo_models import tiny_conditional_unet, tiny_stable_diffusion, tiny_unet

import sdo_fast
from sdo_fast import paths
from sdo_fast.reference import path_loop
from sdo_fast.training.batches import Batches, generator_of, read_prompts
from sdo_fast.training.files import checkpoints
from sdo_fast.training.objective import diversity
from sdo_fast.training.trainer import NonFiniteRewardError

ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).with_name("reward_models.py")
RECIPES = [
    paths.full(),
    paths.sdo("random"),
    paths.refl(0.5),
    paths.draft(2),
    paths.draft_lv(),
    paths.drtune(2, 0.5),
    paths.leapalign(),
    paths.flowbp_sparse(2),
    paths.flowbp_bridge(2),
    paths.flowbp_lagrange(),
]


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


def weights(trainer: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.tuning.named().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def starting_noise(seeds: list[int], shape: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.randn((1, *shape), generator=generator_of(seed)) for seed in seeds]).double()


# The update


SCHEDULERS = {
    "ddim": diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "dpm++": diffusers.DPMSolverMultistepScheduler(),
    "flow euler": diffusers.FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_update_is_that_of_plain_autograd(scheduler: str, recipe: paths.Recipe) -> None:
    """AdamW on the clipped gradient of the mean reward through the reference's loop, from the same noise."""
    solver = SCHEDULERS[scheduler]
    source = sdo_fast.SamplerSource(
        sdo_fast.ShortcutSampler(tiny_unet().double(), solver, 4, path=recipe, fused=False), labels, (1, 8, 8)
    )
    trainer = small_trainer(source, steps=1, max_grad_norm=0.1)
    batch = trainer.batches.train(0, 0)
    trainer.train()
    drawn = source.drawn
    if drawn.noises:  # whose own noise the reference draws otherwise
        assert not equal(weights(trainer), {f"model.{k}": p for k, p in tiny_unet().double().named_parameters()})
        return
    model = tiny_unet().double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    latents = starting_noise(batch.seeds, (1, 8, 8))
    images = path_loop(model, solver, latents, 4, path=drawn, model_kwargs=labels(batch.prompts))
    (-Critic(1)(images, batch.prompts).mean()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(trainer.tuning.named()[f"model.{name}"], p, rtol=1e-6, atol=1e-8)


def test_accumulated_batches_are_one_large_batch() -> None:
    ours, theirs = (
        small_trainer(small_source(path=1), steps=2, batch_size=size, gradient_accumulation=4 // size)
        for size in (1, 4)
    )
    ours.train()
    theirs.train()
    for name, p in weights(ours).items():
        torch.testing.assert_close(p, weights(theirs)[name], rtol=1e-6, atol=1e-8)


def test_an_accelerator_of_the_user_accumulates_too() -> None:
    trainers = [small_trainer(accelerator=own, gradient_accumulation=2) for own in (None, Accelerator())]
    for trainer in trainers:
        trainer.update()
    assert equal(*map(weights, trainers))


def test_rewards_are_summed_with_their_weights(tmp_path: Path) -> None:
    rewards = {"critic": Critic(1), "light": brightness}
    trainer = small_trainer(reward=rewards, reward_weights={"light": -2.5}, steps=1, output=tmp_path)
    outcome = trainer.objective(trainer.batches.train(0, 0))
    critic, light = (outcome.rewards[name] for name in rewards)
    torch.testing.assert_close(light, outcome.images.mean((1, 2, 3)))
    torch.testing.assert_close(critic, Critic(1)(outcome.images, [0, 0]).detach())
    torch.testing.assert_close(outcome.loss.detach(), -critic.mean() + 2.5 * light.mean())
    trainer.train()
    line = json.loads((tmp_path / "log.jsonl").read_text())
    assert line["reward"] == pytest.approx(line["reward/critic"] - 2.5 * line["reward/light"])
    assert line["loss"] == pytest.approx(-line["reward"])


@pytest.mark.parametrize("train", ["lora", "all"])
@pytest.mark.parametrize("checkpoint", [False, True])
def test_distance_to_the_base_model(train: str, checkpoint: bool) -> None:
    """Of the outputs at the path's step, for the state that the tuned model came to."""
    trainer = small_trainer(small_source(path=2, checkpoint=checkpoint), train=train, kl_weight=1.5)
    for p in trainer.tuning.named().values():
        p.data += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).double()
    calls: list[Any] = []
    tuned, base = trainer.source.networks["model"], tiny_unet().double()
    handle = tuned.register_forward_hook(
        lambda m, args, kwargs, output: calls.append((args, kwargs, output.sample)), with_kwargs=True
    )
    outcome = trainer.objective(trainer.batches.train(0, 0))
    handle.remove()
    own = [call for call in calls if call[2].requires_grad]
    assert len(own) == 1
    args, kwargs, output = own[0]
    expected = (output - base(*args, **kwargs).sample).square().mean()
    assert expected > 1e-6
    torch.testing.assert_close(outcome.kl, expected.detach())
    reward = outcome.rewards["reward"].mean()
    torch.testing.assert_close(outcome.loss.detach(), 1.5 * outcome.kl - reward)
    named = list(trainer.tuning.named().values())
    ours = torch.autograd.grad(outcome.loss, named, retain_graph=True)
    with_reward = torch.autograd.grad(-Critic(1)(trainer_images(trainer), [0, 0]).mean(), named)
    with_kl = torch.autograd.grad(1.5 * expected, named)
    for one, a, b in zip(ours, with_reward, with_kl, strict=True):
        torch.testing.assert_close(one, a + b, rtol=1e-6, atol=1e-9)


def trainer_images(trainer: Any) -> Tensor:
    batch = trainer.batches.train(0, 0)
    return trainer.source(batch.prompts, [generator_of(s) for s in batch.seeds], generator_of(batch.path))


def test_the_distance_holds_the_model_back() -> None:
    free, held = (small_trainer(steps=6, train="lora", kl_weight=weight) for weight in (1e-9, 1e4))
    free.train()
    held.train()
    last = lambda trainer: trainer.objective(trainer.batches.train(9, 0)).kl  # noqa: E731
    assert last(held) < 0.1 * last(free)


def test_checkpointed_blocks_change_nothing() -> None:
    plain, blocks = (small_trainer(gradient_checkpointing=value, steps=1) for value in (False, True))
    plain.train()
    blocks.train()
    assert equal(weights(plain), weights(blocks))


@pytest.mark.parametrize("kind", ["sampler", "pipeline"])
def test_checkpoint_changes_calls_alone(kind: str) -> None:
    """A step's call is repeated in backward, or not; None leaves it to the source."""

    def trained(checkpoint: bool | None, own: bool = True) -> tuple[dict[str, Tensor], int]:
        if kind == "sampler":
            trainer = small_trainer(small_source(path=1, checkpoint=own), checkpoint=checkpoint, steps=1)
            planned = trainer.plan().calls
            trainer.source.sampler.model_calls = 0
            trainer.train()
            assert trainer.source.sampler.model_calls == planned
            return weights(trainer), trainer.source.sampler.model_calls
        pipe = sdo_fast.ShortcutPipeline(tiny_stable_diffusion(), 1, own)
        source = sdo_fast.PipelineSource(pipe, num_inference_steps=4, guidance_scale=1.0)
        trainer = small_trainer(source, Critic(3), ["a cat", "a dog"], checkpoint=checkpoint, steps=1)
        trainer.train()
        return weights(trainer), trainer.source.shortcut.model_calls

    (first, repeats), (second, once) = trained(True), trained(False)
    assert (repeats, once) == (5, 4)
    assert equal(first, second)
    assert (trained(None, False)[1], trained(None, True)[1], trained(True, False)[1]) == (4, 5, 5)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_keeps_weights_and_images_in_fp32(precision: str) -> None:
    seen = []

    def reward(images: Tensor, prompts: list[Any]) -> Tensor:
        seen.append((images.dtype, torch.is_autocast_enabled("cpu")))
        return Critic(1)(images, prompts)

    trainer = small_trainer(small_source(torch.float32), reward, mixed_precision=precision, train="lora", steps=2)
    before = weights(trainer)
    trainer.train()
    assert set(seen) == {(torch.float32, False)}
    assert {p.dtype for p in trainer.tuning.named().values()} == {torch.float32}
    assert not equal(before, weights(trainer))


# What is trained


def test_named_parameters_alone_change() -> None:
    source = small_source()
    before = copy.deepcopy(source.networks["model"].state_dict())
    trainer = small_trainer(source, train=["model.*.to_q.*", "model.conv_in.bias"], steps=1)
    trainer.train()
    changed = {k for k, t in source.networks["model"].state_dict().items() if not torch.equal(t, before[k])}
    assert changed == {name.removeprefix("model.") for name in trainer.tuning.named()}
    assert changed == {k for k in before if ".to_q." in k} | {"conv_in.bias"}


def test_lora_begins_as_the_model_itself() -> None:
    source = small_source()
    plain = trainer_images(small_trainer(small_source(), steps=1))
    trainer = small_trainer(source, train="lora", steps=1)
    torch.testing.assert_close(trainer_images(trainer), plain, rtol=0, atol=1e-12)
    assert all(".lora_" in name for name in trainer.tuning.named())
    frozen = {name: p.detach().clone() for name, p in source.networks["model"].named_parameters() if "lora" not in name}
    trainer.train()
    now = dict(source.networks["model"].named_parameters())
    assert all(torch.equal(p, now[name]) for name, p in frozen.items())
    assert all(t.any() for name, t in weights(trainer).items())


def test_averaged_weights(tmp_path: Path) -> None:
    """Are evaluated and saved; training goes on from the others."""
    trainer = small_trainer(steps=3, ema_decay=0.5, save_every=1, output=tmp_path, keep=9)
    average, plain = weights(trainer), small_trainer(steps=3)
    plain.train()
    trainer.train()
    assert equal(weights(trainer), weights(plain))
    for step in (1, 2, 3):
        decay = min(0.5, step / (9 + step)) if step > 1 else 0.0  # as diffusers warms up
        stored = load_file(tmp_path / f"checkpoint-{step:06d}" / "trained.safetensors")
        average = {name: decay * average[name] + (1 - decay) * stored[name] for name in average}
    saved = load_file(tmp_path / "weights" / "model" / "diffusion_pytorch_model.safetensors")
    for name, t in average.items():
        torch.testing.assert_close(saved[name.removeprefix("model.")], t)
    assert not torch.equal(saved["conv_in.bias"], stored["model.conv_in.bias"])


# Batches


def test_images_do_not_depend_on_the_number_of_processes() -> None:
    config = sdo_fast.RewardConfig(batch_size=6, images_per_prompt=3, gradient_accumulation=2, seed=4)
    small = sdo_fast.RewardConfig(batch_size=3, images_per_prompt=3, gradient_accumulation=2, seed=4)
    prompts = [{"prompt": name} for name in "abcde"]
    alone = Batches(prompts, config)
    shared = [Batches(prompts, small, 2, process) for process in range(2)]
    seen: list[str] = []
    for step in range(5):
        for part in range(2):
            whole, parts = alone.train(step, part), [batches.train(step, part) for batches in shared]
            assert whole.prompts == [prompt for batch in parts for prompt in batch.prompts]
            assert whole.seeds == [seed for batch in parts for seed in batch.seeds]
            assert {batch.path for batch in parts} == {whole.path}
            assert whole.prompts[::3] == whole.prompts[2::3]
            seen += whole.prompts[::3]
    assert [sorted(seen[i : i + 5]) for i in range(0, 20, 5)] == [list("abcde")] * 4
    assert len({tuple(seen[i : i + 5]) for i in range(0, 20, 5)}) > 1
    seeds = [seed for step in range(5) for part in range(2) for seed in alone.train(step, part).seeds]
    assert len(set(seeds)) == 60


def test_evaluation_is_shared_out() -> None:
    config = sdo_fast.RewardConfig(batch_size=2, evaluation_prompts=3, evaluation_images=3)
    alone = Batches(list("abcde"), config)
    whole = [pair for batch in alone.evaluation() for pair in zip(batch.prompts, batch.seeds, strict=True)]
    assert [prompt for prompt, _ in whole] == list("aaabbbccc")
    assert len({seed for _, seed in whole}) == 9
    parts = [Batches(list("abcde"), config, 2, process).evaluation() for process in range(2)]
    assert len(parts[0]) == len(parts[1])
    both = [pair for part in parts for batch in part for pair in zip(batch.prompts, batch.seeds, strict=True)]
    assert both[:9] == whole


def test_prompts_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dög \n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ["a cat", "a dög"]
    with pytest.raises(ValueError, match="no such file"):
        read_prompts("a cat")


def test_diversity_against_direct_sums() -> None:
    images = torch.randn(6, 2, 3, 3)
    rms = lambda a, b: (a - b).square().mean().sqrt()  # noqa: E731
    pairs = [(i, j) for i in range(6) for j in range(i) if i // 3 == j // 3]
    expected = torch.stack([rms(images[i], images[j]) for i, j in pairs]).mean()
    torch.testing.assert_close(diversity(images, 3), expected)
    assert diversity(images, 1).isnan()


# Evaluation, logs, stops


def test_what_a_run_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    from PIL import Image

    options = {"evaluate_every": 2, "evaluation_prompts": 2, "evaluation_images": 3, "log_with": "tensorboard"}
    trainer = small_trainer(output=tmp_path, keep=1, progress=True, **options)
    assert trainer.train()
    bar = capsys.readouterr().err
    assert all(word in bar for word in ("4/4", "reward=", "diversity=", "memory=", "images/s="))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 2, 3, 4, 4]
    assert lines[-1]["evaluation/reward"] > lines[0]["evaluation/reward"]
    assert lines[0]["evaluation/diversity"] > 0
    assert all(line["memory"] > 0 and line["images_per_second"] > 0 for line in lines if "memory" in line)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000004"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == ["000000.png", "000002.png", "000004.png"]
    with Image.open(tmp_path / "images" / "000000.png") as picture:
        assert picture.size == (24, 16)
    assert list(tmp_path.rglob("events.out.tfevents*"))
    record, images = trainer.evaluate()
    assert images.shape == (6, 1, 8, 8)
    assert record["evaluation/reward"] == pytest.approx(Critic(1)(images, [0] * 6).mean().item(), rel=1e-5)
    assert record["evaluation/reward"] == lines[-1]["evaluation/reward"]


def test_a_run_on_wandb_lies_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    trainer = small_trainer(output="out", log_with="wandb", evaluate_every=2, evaluation_prompts=2)
    assert trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (run,) = (tmp_path / "out" / "wandb").glob("offline-run-*/*.wandb")
    written = run.read_bytes()
    assert all(name.encode() in written for name in ("reward", "images_per_second", "evaluation/diversity"))
    assert len(list((tmp_path / "out" / "wandb").rglob("media/images/samples*.png"))) == 3 * 2 * 4


def test_early_stops(tmp_path: Path) -> None:
    for options in ({"stop_reward": -1e9}, {"stop_diversity": 1e9}):
        trainer = small_trainer(steps=9, evaluate_every=1, **options)
        assert trainer.train()
        assert trainer.progress.step == 0
    # Images that please by being alike.
    alike = lambda images, prompts: -(images - images.mean(0)).square().flatten(1).mean(1)  # noqa: E731
    options = {"steps": 40, "evaluate_every": 1, "stop_diversity": 0.8}
    trainer = small_trainer(reward=alike, output=tmp_path, **options)
    trainer.train()
    assert 0 < trainer.progress.step < 40
    # A run that stopped early has ended.
    resumed = small_trainer(reward=alike, output=tmp_path, **options)
    assert resumed.train(resume=True)
    assert resumed.progress.step == trainer.progress.step


def test_a_reward_that_is_not_finite_ends_the_run() -> None:
    trainer = small_trainer(reward=lambda images, prompts: images.mean((1, 2, 3)) * float("nan"))
    with pytest.raises(NonFiniteRewardError, match=r"rewards must be finite, .* step 1"):
        trainer.train()
    with pytest.raises(NonFiniteRewardError, match="nan} in the evaluation at 0"):
        trainer.evaluate()


def test_a_gradient_that_is_not_finite_reaches_no_weight(tmp_path: Path) -> None:
    def root_at_zero(images: Tensor, prompts: list[Any]) -> Tensor:
        return images.mean((1, 2, 3)) + (images - images.detach()).square().sum((1, 2, 3)).sqrt()

    trainer = small_trainer(reward=root_at_zero, output=tmp_path, save_every=1, gradient_accumulation=2)
    before = weights(trainer)
    with pytest.raises(NonFiniteRewardError, match="finite gradients, got a norm of nan at step 1"):
        trainer.train()
    assert equal(weights(trainer), before)
    assert not checkpoints(tmp_path)


# Interruptions


def interrupting(steps: set[int]) -> Any:
    critic, seen = Critic(1), []

    def reward(images: Tensor, prompts: list[Any]) -> Tensor:
        seen.append(1)
        if len(seen) in steps:
            signal.raise_signal(signal.SIGINT)
        return critic(images, prompts)

    return reward


LOGGED = ("step", "reward", "diversity", "loss", "gradient_norm", "learning_rate", "path")


def lines(folder: Path) -> list[dict[str, Any]]:
    logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{name: line[name] for name in LOGGED} for line in logged]


def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    """By Ctrl-C in two steps, and by an end without warning in the fourth, after the checkpoint of the second."""
    options = {"ema_decay": 0.5, "gradient_accumulation": 2, "lr_schedule": "cosine", "warmup_steps": 1, "steps": 5}
    whole = small_trainer(output=tmp_path / "whole", **options)
    assert whole.train()

    for reward, done in ((interrupting({2}), False), (interrupting({3}), False), (Critic(1), True)):
        trainer = small_trainer(output=tmp_path / "stopped", reward=reward, **options)
        assert trainer.train(resume=True) is done

    class Killed(BaseException):
        pass

    def killing(images: Tensor, prompts: list[Any], seen: list[int] = []) -> Tensor:  # noqa: B006
        seen.append(1)
        if len(seen) == 8:
            raise Killed
        return Critic(1)(images, prompts)

    with pytest.raises(Killed):
        small_trainer(output=tmp_path / "killed", reward=killing, **options).train()
    assert [path.name for path in checkpoints(tmp_path / "killed")] == ["checkpoint-000002"]
    assert small_trainer(output=tmp_path / "killed", **options).train(resume=True)

    file = Path("weights", "model", "diffusion_pytorch_model.safetensors")
    for name in ("stopped", "killed"):
        for part in (Path("checkpoint-000005", "trained.safetensors"), file):
            assert equal(load_file(tmp_path / name / part), load_file(tmp_path / "whole" / part))
        assert lines(tmp_path / name) == lines(tmp_path / "whole")


def test_an_interrupted_write_leaves_the_checkpoints_that_were(tmp_path: Path, monkeypatch: Any) -> None:
    trainer = small_trainer(output=tmp_path, save_every=1)

    def full_disk(state: Any, folder: Path) -> None:
        (Path(folder) / "half").write_text("")
        raise OSError("no space left")

    trainer.train()
    monkeypatch.setattr(trainer.accelerator, "save_state", lambda folder: full_disk(None, folder))
    with pytest.raises(OSError, match="no space"):
        trainer._checkpoint()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-000003", "checkpoint-000004"]
    assert not list(tmp_path.glob("checkpoint-*/half"))


def test_checkpoints_of_other_settings_are_refused(tmp_path: Path) -> None:
    small_trainer(output=tmp_path, steps=2).train()
    with pytest.raises(ValueError, match="output must be a folder without checkpoints"):
        small_trainer(output=tmp_path, steps=2).train()
    with pytest.raises(ValueError, match=r"learning_rate 0\.01, now 0\.02"):
        small_trainer(output=tmp_path, steps=2, learning_rate=0.02).train(resume=True)


def test_a_run_goes_on_for_more_steps_where_no_learning_rate_depends_on_them(tmp_path: Path) -> None:
    options = {"lr_schedule": "constant_with_warmup", "warmup_steps": 3}
    whole, parts = small_trainer(steps=4, **options), small_trainer(output=tmp_path / "constant", steps=2, **options)
    assert whole.train()
    assert parts.train()
    parts = small_trainer(output=tmp_path / "constant", steps=4, **options)
    assert parts.train(resume=True)
    assert equal(*map(weights, (whole, parts)))
    small_trainer(output=tmp_path / "cosine", steps=2, lr_schedule="cosine").train()
    with pytest.raises(ValueError, match="steps 2, now 4"):
        small_trainer(output=tmp_path / "cosine", steps=4, lr_schedule="cosine").train(resume=True)


def run_worker(output: Path, processes: int, code: int = 0, **options: Any) -> None:
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command += [str(WORKER), str(output), json.dumps(options)]
    here = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": here}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert (done.returncode != 0) == (code != 0), done.stderr[-3000:]


def trained(output: Path) -> dict[str, Tensor]:
    (file,) = (output / "weights").rglob("*.safetensors")
    return load_file(file)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sharded", "options"),
    [
        (False, {}),
        (False, {"train": "lora", "kl_weight": 1.0, "gradient_accumulation": 2, "ema_decay": 0.5}),
        (True, {"train": "lora", "kl_weight": 1.0, "gradient_accumulation": 2}),
    ],
    ids=["ddp, all", "ddp, lora", "fsdp2, lora"],
)
def test_two_processes_train_what_one_does(tmp_path: Path, sharded: bool, options: dict[str, Any]) -> None:
    """With twice the batch; killed after the checkpoint of the second step they go on bit for bit."""
    small_trainer(output=tmp_path / "one", batch_size=4, **options).train()
    run_worker(tmp_path / "two", 2, fsdp=sharded, **options)
    one, two = trained(tmp_path / "one"), trained(tmp_path / "two")
    assert one.keys() == two.keys()
    for name, t in one.items():
        torch.testing.assert_close(two[name], t, rtol=0, atol=1e-9)
    batches = options.get("gradient_accumulation", 1)
    run_worker(tmp_path / "killed", 2, code=1, fsdp=sharded, kill=3 * batches, **options)
    assert [path.name for path in checkpoints(tmp_path / "killed")] == ["checkpoint-000002"]
    run_worker(tmp_path / "killed", 2, fsdp=sharded, resume=True, **options)
    assert equal(trained(tmp_path / "killed"), two)
    assert lines(tmp_path / "killed") == lines(tmp_path / "two")


# Pipelines, and the files that diffusers reads


def tiny_flux() -> Any:
    from test_sdo_shortcut_families import flux

    pipe, arguments, _ = flux()
    embeds = {name: arguments[name] for name in ("prompt_embeds", "pooled_prompt_embeds")}
    repeat = lambda prompts: {k: t.repeat(len(prompts), *[1] * (t.ndim - 1)) for k, t in embeds.items()}  # noqa: E731
    return sdo_fast.PipelineSource(pipe, repeat, height=16, width=16, num_inference_steps=3)


def tiny_sd(scheduler: Any = None) -> Any:
    pipe = tiny_stable_diffusion()
    pipe.scheduler = scheduler or pipe.scheduler
    return sdo_fast.PipelineSource(pipe, num_inference_steps=3, guidance_scale=3.0)


SOURCES = {
    "stable diffusion": tiny_sd,
    "stable diffusion, dpm++": lambda: tiny_sd(diffusers.DPMSolverMultistepScheduler()),
    "flux": tiny_flux,
}


def sampled(source: Any) -> Tensor:
    with torch.no_grad():
        return source(["a cat", "b"], [generator_of(5), generator_of(6)], generator_of(0))


@pytest.mark.parametrize("name", SOURCES)
def test_lora_weights_load_into_a_plain_pipeline(name: str, tmp_path: Path) -> None:
    source = SOURCES[name]()
    before = sampled(source)
    options = {"lora_rank": 4, "lora_alpha": 7.0, "learning_rate": 0.05, "kl_weight": 0.1}
    trainer = small_trainer(source, Critic(), ["a cat", "b"], train="lora", steps=2, output=tmp_path, **options)
    trainer.train()
    after = sampled(source)
    assert (after - before).abs().max() > 1e-3
    fresh = SOURCES[name]()
    torch.testing.assert_close(sampled(fresh), before)
    fresh.pipe.load_lora_weights(tmp_path / "weights")
    torch.testing.assert_close(sampled(fresh), after, rtol=0, atol=1e-6)


def tiny_wan() -> Any:
    """With two denoisers."""
    from test_sdo_shortcut_families import wan_two_denoisers

    pipe, arguments, _ = wan_two_denoisers()
    embeds = {name: arguments.pop(name).detach() for name in ("prompt_embeds", "negative_prompt_embeds")}
    del arguments["latents"]
    repeat = lambda prompts: {k: t.repeat(len(prompts), 1, 1) for k, t in embeds.items()}  # noqa: E731
    return sdo_fast.PipelineSource(pipe, repeat, **{**arguments, "num_inference_steps": 4})


def test_lora_weights_of_two_denoisers_load_into_a_plain_pipeline(tmp_path: Path) -> None:
    source = tiny_wan()
    reward = lambda frames, prompts: frames.mean((1, 2, 3, 4))  # noqa: E731
    options = {"lora_rank": 4, "lora_alpha": 7.0, "learning_rate": 0.05, "path": "full", "steps": 2}
    small_trainer(source, reward, ["a"], train="lora", output=tmp_path, **options).train()
    after, fresh = sampled(source), tiny_wan()
    fresh.pipe.load_lora_weights(tmp_path / "weights")
    assert (sampled(fresh) - after).abs().max() > 1e-3
    fresh.pipe.load_lora_weights(tmp_path / "weights" / "transformer_2", load_into_transformer_2=True)
    torch.testing.assert_close(sampled(fresh), after, rtol=0, atol=1e-6)


def test_lora_weights_of_a_samplers_network_load_into_a_plain_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    unet, text = tiny_conditional_unet(), torch.randn(1, 3, 16)
    plain = copy.deepcopy(unet)
    sampler = sdo_fast.ShortcutSampler(unet, diffusers.DDIMScheduler(clip_sample=False), 3, path="random")
    conditions = lambda prompts: {"encoder_hidden_states": text.repeat(len(prompts), 1, 1)}  # noqa: E731
    source = sdo_fast.SamplerSource(sampler, conditions, (4, 8, 8))
    small_trainer(source, Critic(4), [""], train="lora", output=tmp_path, lora_rank=4, lora_alpha=7.0).train()
    call = torch.randn(1, 4, 8, 8), 3, text
    with torch.no_grad():
        after = unet(*call).sample
        assert (plain(*call).sample - after).abs().max() > 1e-3
        plain.load_lora_adapter(tmp_path / "weights" / "model", prefix=None, use_safetensors=True)
        torch.testing.assert_close(plain(*call).sample, after, rtol=0, atol=1e-6)


def test_a_pipeline_with_lora_takes_it_into_its_weights_first(tmp_path: Path) -> None:
    small_trainer(tiny_sd(), Critic(), ["a"], train="lora", learning_rate=0.05, output=tmp_path).train()
    source = tiny_sd()
    source.pipe.load_lora_weights(tmp_path / "weights")
    loaded = sampled(source)
    with pytest.raises(ValueError, match=r"source must have no LoRA yet .* got unet with 'default_0'"):
        small_trainer(source, Critic(), ["a"], train="lora")
    source.pipe.fuse_lora()
    source.pipe.unload_lora_weights()
    small_trainer(source, Critic(), ["a"], train="lora")
    torch.testing.assert_close(sampled(source), loaded, rtol=0, atol=1e-5)


def test_saving_leaves_other_files_alone(tmp_path: Path) -> None:
    trainer = small_trainer(steps=2, output=tmp_path / "out")
    trainer.train()
    trainer.save(tmp_path / "out")
    trainer.save(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "checkpoint-000002",
        "log.jsonl",
        "model",
        "weights",
    }
    file = Path("model", "diffusion_pytorch_model.safetensors")
    assert equal(load_file(tmp_path / "out" / file), load_file(tmp_path / "out" / "weights" / file))


@pytest.mark.parametrize(("name", "part"), [("stable diffusion", "unet"), ("flux", "transformer")])
def test_whole_weights_load_into_a_plain_pipeline(name: str, part: str, tmp_path: Path) -> None:
    source = SOURCES[name]()
    before = sampled(source)
    pattern = f"{part}.*to_k*"
    trainer = small_trainer(source, Critic(), ["a cat", "b"], train=pattern, steps=2, output=tmp_path)
    trainer.train()
    after = sampled(source)
    assert (after - before).abs().max() > 1e-3
    network = type(getattr(source.pipe, part)).from_pretrained(tmp_path / "weights", subfolder=part)
    fresh = SOURCES[name]()
    setattr(fresh.pipe, part, network.eval())
    fresh = sdo_fast.PipelineSource(fresh.pipe, source.conditions, **source.arguments)
    torch.testing.assert_close(sampled(fresh), after, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.name != "draft_lv"], ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("name", ["stable diffusion, dpm++", "flux"])
def test_every_recipe_trains_a_pipeline(name: str, recipe: paths.Recipe) -> None:
    trainer = small_trainer(SOURCES[name](), Critic(), ["a cat", "b"], train="lora", path=recipe, steps=1)
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) >= len(before) // 2  # LoRA's B; its A has no gradient while B is zero
    assert all(t.isfinite().all() for t in after.values())


def test_half_precision_pipeline_has_lora_in_fp32() -> None:
    source = tiny_sd()
    source.pipe.to(torch.bfloat16)
    trainer = small_trainer(source, Critic(), ["a cat", "b"], train="lora", steps=2)
    before = weights(trainer)
    assert {p.dtype for p in before.values()} == {torch.float32}
    trainer.train()
    assert not equal(before, weights(trainer))
    with pytest.raises(ValueError, match=r"train must be 'lora' for a pipeline in torch\.bfloat16"):
        small_trainer(source, Critic(), ["a cat", "b"], train="all")


def test_a_float16_pipeline_without_loss_scaling_is_told() -> None:
    source = tiny_sd()
    source.pipe.to(torch.float16)
    with pytest.warns(UserWarning, match="source is float16, in which small gradients vanish"):
        small_trainer(source, Critic(), ["a cat"], train="lora")


def test_unconditional_pipeline() -> None:
    unet = tiny_unet(in_channels=3, out_channels=3, num_class_embeds=None)
    pipe = diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler())
    source = sdo_fast.PipelineSource(pipe, lambda prompts: {"batch_size": len(prompts)}, num_inference_steps=3)
    trainer = small_trainer(source, Critic(), [""], path="last")
    before = weights(trainer)
    trainer.train()
    assert not equal(before, weights(trainer))


def test_plan() -> None:
    trainer = small_trainer(tiny_sd(), Critic(), ["a cat"], path=paths.draft(2), kl_weight=1.0, ema_decay=0.9)
    plan = trainer.plan()
    unet = trainer.source.pipe.unet
    count = sum(p.numel() for p in unet.parameters())
    assert sum(plan.parameters.values()) == count
    assert (plan.gradients, plan.optimizer, plan.averaged) == (4 * count, 8 * count, 4 * count)
    others = [part for part in (trainer.source.pipe.vae, trainer.source.pipe.text_encoder)]
    assert plan.weights == 8 * count + 4 * sum(p.numel() for part in others for p in part.parameters())
    assert (plan.images, plan.calls, plan.graph_calls) == (2, 3 + 2 + 2, 2)
    scheduler = diffusers.HeunDiscreteScheduler()  # of 5 steps, where the pipeline is told 3
    assert small_trainer(tiny_sd(scheduler), Critic(), ["a"], path=4).plan().graph_calls == 1
    seen: list[int] = []
    batch = torch.randn(4, 4, 8, 8), 1, torch.randn(4, 16, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t.untyped_storage().nbytes()), lambda t: t):
        unet(*batch)
    assert 0.3 * sum(seen) < plan.activations <= sum(seen)
    assert f"trained: {count:,} parameters" in str(plan)


def test_reward_of_digits_rises() -> None:
    """As much as in examples/sdo_finetune.py, of which these are the settings."""
    for needed in ("skimage", "sklearn"):
        pytest.importorskip(needed)
    from digits_model import ThicknessScore, load_digits_classifier, load_digits_unet, scheduler

    sampler = sdo_fast.ShortcutSampler(load_digits_unet(), scheduler(), 5, path="first")
    score = ThicknessScore(load_digits_classifier())
    trainer = small_trainer(
        sdo_fast.SamplerSource(sampler, labels, (1, 16, 16)),
        lambda images, prompts: score(images),
        [0, 3, 4, 7],
        **{"train": "lora", "learning_rate": 2e-4, "steps": 10, "batch_size": 8, "images_per_prompt": 2},
        lora_targets=["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"],
    )
    before, _ = trainer.evaluate()
    trainer.train()
    after, _ = trainer.evaluate()
    assert after["evaluation/reward"] > before["evaluation/reward"] + 0.5
    assert after["evaluation/diversity"] > 0.8 * before["evaluation/diversity"]


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer >= 1, got 0"),
        ({"batch_size": 3, "images_per_prompt": 2}, "batch_size must be a multiple of images_per_prompt"),
        ({"learning_rate": -1}, "learning_rate must be a finite number, 0 or more"),
        ({"path": "identity"}, "path must have an active step"),
        ({"path": "nowhere"}, "path must be one of sdo_fast.paths"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of"),
        ({"stop_reward": 1.0}, "evaluate_every must be positive"),
        ({"log_with": "tensorboard"}, "output must be a folder with log_with"),
        ({"reward_weights": {"other": 1.0}}, "reward_weights must be of 'reward', got"),
        ({"train": "unet.*"}, "train must be 'lora', 'all' or patterns of parameter names like 'model"),
        ({"ema_decay": 1.0}, "ema_decay must be below 1"),
        ({"max_grad_norm": 0}, "max_grad_norm must be greater than 0"),
        ({"warmup_steps": 5}, "warmup_steps must be 0 with lr_schedule='constant', got 5"),
        ({"lr_schedule": "piecewise_constant"}, "lr_schedule must be one of 'constant'"),
        ({"path": paths.Path(stop=1)}, "path must have an active step"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_trainer(**options)


def test_arguments_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = small_source().sampler
    with pytest.raises(TypeError, match=r"source must be SamplerSource\(sampler"):
        small_trainer(sampler)
    with pytest.raises(TypeError, match="source must be a diffusers pipeline"):
        small_trainer(3)
    for options in ({"train": []}, {"train": 3}, {"lora_targets": []}, {"output": 3}):
        with pytest.raises(TypeError, match=f"{next(iter(options))} must be a"):
            sdo_fast.RewardConfig(**options)
    with pytest.raises(ValueError, match=r"path must have an active step, .* got 'identity'"):
        small_trainer(small_source(path="identity"))
    with pytest.raises(ValueError, match="shape must be that of one latent"):
        sdo_fast.SamplerSource(sampler, labels)
    reusing = sampler.with_options(reuse=sdo_fast.TrajectoryCache())
    with pytest.raises(ValueError, match="reuse must be None"):
        sdo_fast.SamplerSource(reusing, labels, (1, 8, 8))
    monkeypatch.setattr("sdo_fast.training.trainer.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="log_with='wandb' needs it installed"):
        small_trainer(log_with="wandb", output=tmp_path)
    with pytest.raises(TypeError, match="reward 'reward' must be a function"):
        small_trainer(reward=[3])
    with pytest.raises(ValueError, match=r"reward 'reward' must return a tensor of shape \(2,\), got \(\)"):
        small_trainer(reward=lambda images, prompts: images.mean()).train()
    with pytest.raises(ValueError, match="reward 'reward' must be differentiable in the images"):
        small_trainer(reward=lambda images, prompts: images.detach().mean((1, 2, 3))).train()
    for prompts, message in (
        ([], "one prompt or more"),
        (3, "a list, a dataset or a text file"),
        ([{"text": ""}], 'rows with a "prompt"'),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            small_trainer(prompts=prompts)


def test_import_stays_light_and_a_missing_package_is_named() -> None:
    code = (
        "import sys, sdo_fast\n"
        "assert not {'accelerate', 'peft', 'diffusers', 'sdo_fast.training'} & set(sys.modules)\n"
        "sys.modules['peft'] = None\n"
        "try:\n    sdo_fast.RewardTrainer\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "RewardTrainer needs peft" in done.stdout
    assert "pip install 'sdo-swformer-fast[train]'" in done.stdout
    assert sdo_fast.RewardTrainer is sdo_fast.training.RewardTrainer
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = sdo_fast.Nothing
