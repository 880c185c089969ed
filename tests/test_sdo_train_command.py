"""python -m sdo_fast.train: what a file says is trained, flags win, a dry run trains nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("accelerate", "diffusers", "peft", "safetensors", "tqdm", "transformers"):
    pytest.importorskip(package)
if sys.version_info < (3, 11):
    pytest.importorskip("tomli")

from accelerate.state import AcceleratorState
from reward_models import small_trainer
from safetensors.torch import load_file
from sdo_models import tiny_stable_diffusion

from sdo_fast import paths, train


@pytest.fixture(autouse=True)
def fresh_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)


SAMPLER = """
prompts = ["1", "2", "5"]

[source]
factory = "reward_models:small_source"

[rewards]
reward = "reward_models:brightness"

[trainer]
steps = 2
batch_size = 2
train = ["model.conv_in.*", "model.conv_out.*"]
learning_rate = 0.01
progress = false
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    path.write_text(SAMPLER)
    return path


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_file_and_flags(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--output", str(out), "--steps", "3", "--path", "[0, 2]", "--lr-schedule", "linear"]
    assert train.main([str(config), *flags]) == 0
    lines = log(out)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["path"] for line in lines] == [[0, 2]] * 3
    assert [line["learning_rate"] for line in lines] == pytest.approx([0.02 / 3, 0.01 / 3, 0])
    from reward_models import brightness

    same = small_trainer(
        reward=brightness,
        prompts=["1", "2", "5"],
        train=["model.conv_in.*", "model.conv_out.*"],
        steps=3,
        path=[0, 2],
        lr_schedule="linear",
    )
    same.train()
    saved = load_file(out / "weights" / "model" / "diffusion_pytorch_model.safetensors")
    for name, p in same.tuning.named().items():
        assert torch.equal(saved[name.removeprefix("model.")], p)


def test_resume(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(config), "--output", str(tmp_path / "out")]
    assert train.main(arguments) == 0
    assert train.main(arguments) == 2
    assert "output must be a folder without checkpoints" in capsys.readouterr().err
    assert train.main([*arguments, "--resume"]) == 0
    assert [line["step"] for line in log(tmp_path / "out")] == [1, 2]


def test_pipeline_of_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """Rewards from a module beside the config, several of them, and a recipe with settings."""
    tiny_stable_diffusion().save_pretrained(tmp_path / "pipeline")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "judges_of_a_test.py").write_text("from reward_models import Critic, brightness\ncritic = Critic()\n")
    (tmp_path / "config.toml").write_text(
        'prompts = "prompts.txt"\n[source]\npipeline = "pipeline"\ndtype = "float32"\n'
        "[call]\nnum_inference_steps = 4\nguidance_scale = 2.0\n"
        '[rewards]\ncritic = "judges_of_a_test:critic"\nlight = "judges_of_a_test:brightness"\n'
        '[trainer]\nsteps = 1\nbatch_size = 2\noutput = "out"\npath = { recipe = "flowbp_sparse", steps = 2 }\n'
        "progress = false\nlora_rank = 4\n[trainer.reward_weights]\nlight = 0.5\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert train.main(["config.toml", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "lora_A" in told
    assert "an update: 2 images; 6 calls of the denoiser for a batch" in told
    assert not (tmp_path / "out").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    assert train.main(["config.toml"]) == 0
    (line,) = log(tmp_path / "out")
    assert len(line["path"]) == 2
    assert line["reward"] == pytest.approx(line["reward/critic"] + 0.5 * line["reward/light"])
    assert (tmp_path / "out" / "weights" / "pytorch_lora_weights.safetensors").exists()


def test_path_of_a_table() -> None:
    assert train.as_path({"recipe": "draft", "steps": 3}) == paths.draft(3)
    assert train.as_path(2) == 2
    with pytest.raises(ValueError, match=r"path must have a recipe of sdo_fast\.paths, got 'Path'"):
        train.as_path({"recipe": "Path"})


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('prompts = ["1", "2", "5"]', "", "config must have prompts"),
        ("[trainer]", "[training]", "config must have prompts, source, call, rewards, trainer, got ['training']"),
        ("steps = 2", "step = 2", "trainer must have options of RewardConfig, got ['step']"),
        ("steps = 2", "steps = 0", "steps must be an integer >= 1, got 0"),
        ("factory", "folder", "source must have either a pipeline or a factory"),
        ("reward_models:brightness", "brightness", "rewards.reward must be 'module:function', got 'brightness'"),
        ("reward_models:brightness", "reward_models:no", "rewards.reward must name something to import"),
        (
            "reward_models:brightness",
            "reward_models:",
            "rewards.reward must be 'module:function', got 'reward_models:'",
        ),
        ("reward_models:small_source", "reward_models:SETTINGS", "source.factory must name a function, got"),
        ("[rewards]\nreward = ", "[[rewards]]\nreward = ", "rewards must be a table, got [{'reward'"),
        (
            'factory = "reward_models:small_source"',
            'pipeline = "."\ndtype = "bf16"',
            "source.dtype must be the name of a",
        ),
        ("steps = 2", "steps = ", "config.toml: "),
    ],
)
def test_errors_are_told_in_a_line(
    old: str, new: str, message: str, config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config.write_text(SAMPLER.replace(old, new))
    assert train.main([str(config)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_errors_of_a_reward_have_their_traceback(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(images: Any, prompts: Any) -> Any:
        return images + None

    monkeypatch.setattr("reward_models.brightness", broken)
    with pytest.raises(TypeError, match="unsupported operand"):
        train.main([str(config)])


def test_files_that_begin_with_a_byte_order_mark(config: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("1\n2\n", encoding="utf-8-sig")
    prompts = json.dumps(str(tmp_path / "prompts.txt"))
    config.write_text(SAMPLER.replace('["1", "2", "5"]', prompts), encoding="utf-8-sig")
    assert train.main([str(config)]) == 0


def test_values_of_flags() -> None:
    assert train.value_of("1e-4") == 1e-4
    assert train.value_of("true") is True
    assert train.value_of("lora") == "lora"
    assert train.value_of('{ recipe = "draft" }') == {"recipe": "draft"}
