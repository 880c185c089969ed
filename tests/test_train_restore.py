"""The training example: it loses nothing, learns from folders and from photographs, on one process and on two."""

from __future__ import annotations

import argparse
import itertools
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import swformer_fast as sf

for package in ("accelerate", "matplotlib", "PIL", "safetensors", "skimage", "sklearn", "tqdm"):
    pytest.importorskip(package)

import photographs
import restore_tasks
import train_restore
from classical import CLASSICAL
from degradations import DEGRADATIONS, degrade
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

SCRIPT = Path(train_restore.__file__)


def test_split_is_fixed_and_held_out_photographs_are_never_seen() -> None:
    train, test = photographs.photographs("train"), photographs.photographs("test")
    assert (len(train), list(test)) == (14, ["chelsea", "coffee", "china"])
    for image in (*train.values(), *test.values()):
        assert image.shape[0] == 3
        assert image.min() >= 0
        assert 0.5 < image.max() <= 1
    thumbnails = [nn.functional.adaptive_avg_pool2d(image, 16).flatten() for image in (*test.values(), *train.values())]
    assert torch.cdist(torch.stack(thumbnails[:3]), torch.stack(thumbnails[3:])).min() > 2
    with pytest.raises(ValueError, match="split"):
        photographs.photographs("validation")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Two small pictures instead of the photographs, degraded anew every two steps."""
    generator = torch.Generator().manual_seed(0)
    pictures = {
        name: nn.functional.interpolate(torch.rand(1, 3, 6, 6, generator=generator), size, mode="bilinear")[0]
        for name, size in {"a": (80, 90), "b": (110, 76)}.items()
    }
    for module in (photographs, train_restore, restore_tasks):
        monkeypatch.setattr(module, "photographs", lambda split: pictures)
    monkeypatch.setattr(train_restore, "EPOCH", 2)
    monkeypatch.setattr(photographs, "WINDOW", 64)
    photographs.scenes.cache_clear()
    return pictures


def test_scenes_pair_a_view_with_its_degradation(small: dict[str, Tensor]) -> None:
    views = photographs.scenes("haze", 7)
    assert [view.shape[0] for view in views] == [6, 6]
    assert all(max(view.shape[1:]) <= 64 for view in views)
    for i, view in enumerate(views):
        assert torch.equal(view[:3], degrade(view[3:], "haze", 7 * 1009 + i))
    other = photographs.scenes("haze", 8)
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(views, other, strict=True))


def test_dead_leaves_are_scenes_in_the_colours_of_a_photograph() -> None:
    """A red palette gives red scenes, others with every generator; edges are where leaves meet, flat parts between."""
    palette = torch.tensor([0.8, 0.4, 0.2])[:, None, None].expand(3, 5, 7)
    scene, again, other = (
        photographs.dead_leaves(palette, 96, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    assert scene.shape == (3, 96, 96)
    assert torch.equal(scene, again)
    assert not torch.equal(scene, other)
    assert 0 <= scene.min() < 0.1 < 0.9 < scene.max() <= 1
    unclipped = scene[0] < 1
    assert (scene[:2, unclipped] * 0.5 - scene[1:, unclipped]).abs().mean() < 0.005
    colours = torch.stack((torch.zeros(3), torch.ones(3)), 1)[:, :, None]
    scene = photographs.dead_leaves(colours, 96, torch.Generator().manual_seed(2))[0]
    steps = (scene[1:] - scene[:-1]).abs()
    assert 0.02 < (steps > 0.5).float().mean() < 0.2
    assert (steps < 0.05).float().mean() > 0.5


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_scenes_hold_a_share_of_dead_leaves(
    share: float, small: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(photographs, "dead_leaves", lambda palette, side, generator: torch.zeros(3, side, side))
    leaves = [not view[3:].any() for seed in range(20) for view in photographs.scenes("snow", seed, False, share)]
    assert len(leaves) == 40
    assert abs(sum(leaves) / 40 - share) <= 0.2 * (0 < share < 1)


def test_crops_show_degraded_and_clean_at_the_same_place() -> None:
    clean = [torch.rand(3, 30, 41), torch.rand(3, 25, 20) + 2]

    def draw(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        image = clean[int(torch.randint(2, (), generator=generator))]
        return image + 10, image

    for turned in (False, True):
        crops = train_restore.Crops(draw, 3, turned)
        pairs = [crops[n, 16] for n in range(32)]
        assert all(torch.equal(degraded, target + 10) for degraded, target in pairs)
        target = torch.stack([t for _, t in pairs])
        assert target.shape == (32, 3, 16, 16)
        assert 0 < (target.amin((1, 2, 3)) > 1.5).sum() < 32  # both pictures
        assert all(torch.equal(a, b) for n in range(3) for a, b in zip(crops[n, 16], pairs[n], strict=True))
        windows = clean[0].unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
        ways = [lambda t, k=k: t.rot90(k, (-2, -1)) for k in range(4 if turned else 1)]
        seen = set()
        for crop in target[target.amax((1, 2, 3)) <= 1]:
            same = [
                (k, mirrored)
                for k, way in enumerate(ways)
                for mirrored in (False, True)
                if (windows - (way(crop).flip(-1) if mirrored else way(crop))).abs().amax((1, 2, 3)).min() == 0
            ]
            assert same
            seen.update(same)
        assert len(seen) > len(ways)
    with pytest.raises(ValueError, match="crops of 26 are larger than a picture of 25 x 20"):
        train_restore.Crops(lambda n, generator: (clean[1], clean[1]), 3, False)[0, 26]


def test_loss_is_l1_of_pixels_and_spectrum_at_every_scale() -> None:
    outputs = [torch.rand(2, 3, 8, 8), torch.rand(2, 12, 4, 4)]
    targets = [torch.rand_like(output) for output in outputs]
    expected = 0.0
    for output, target in zip(outputs, targets, strict=True):
        spectrum = torch.fft.rfft2(output) - torch.fft.rfft2(target)
        expected += (output - target).abs().mean() + 0.1 * (spectrum.real.abs() + spectrum.imag.abs()).mean() / 2
    torch.testing.assert_close(train_restore.loss_fn(outputs, targets), expected)
    assert train_restore.loss_fn(outputs, outputs) == 0


Run = Callable[..., int]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """The script's `main` on small settings, in a folder of `tmp_path`."""

    from accelerate.state import AcceleratorState

    def main(folder: str, *options: str, task: tuple[str, ...] = ("--task", "haze"), steps: int = 4) -> int:
        argv = [*task, "--out", str(tmp_path / folder), "--steps", str(steps), "--batch", "4", "--crop", "16"]
        AcceleratorState._reset_state(reset_partial_state=True)  # of the run before in this process
        return train_restore.main([*argv, "--progressive", "--ema", "0.5", *options])

    return main


def assert_equal_states(left: Path, right: Path) -> None:
    states = [torch.load(path) for path in (left, right)]
    assert states[0].pop("seconds") > 0
    assert states[1].pop("seconds") > 0
    for a, b in zip(*map(tree_leaves, states), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


LOSS = train_restore.loss_fn


SIGNALS = itertools.cycle((signal.SIGINT, signal.SIGTERM))


def interrupted_loss(*args: Any) -> Tensor:
    signal.raise_signal(next(SIGNALS))
    return LOSS(*args)


def test_interrupted_training_resumes_bit_for_bit(
    small: dict[str, Tensor], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """By Ctrl-C and SIGTERM in every step, and by an end without warning in the third, after the save of the second."""
    assert run("whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(train_restore, "loss_fn", interrupted_loss)
        for step in (1, 2, 3):
            assert run("resumed", *["--resume"][: step - 1]) == 130
            assert torch.load(tmp_path / "resumed" / "tiny-haze.checkpoint")["step"] == step
    assert "--resume goes on from there" in capsys.readouterr().out
    assert not (tmp_path / "resumed" / "tiny-haze.safetensors").exists()
    assert run("resumed", "--resume") == 0

    calls = []

    def killed(*args: Any) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return LOSS(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_restore, "loss_fn", killed)
        with pytest.raises(MemoryError):
            run("killed")
    assert torch.load(tmp_path / "killed" / "tiny-haze.checkpoint")["step"] == 2
    assert run("killed", "--resume") == 0
    for other in ("resumed", "killed"):
        assert_equal_states(*(tmp_path / name / "tiny-haze.checkpoint" for name in ("whole", other)))
        first, second = (load_file(tmp_path / name / "tiny-haze.safetensors") for name in ("whole", other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_trained_weights(
    small: dict[str, Tensor], tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the average, which load by their file's name and give what the table says."""
    assert run("out", "--validate", "2", steps=2) == 0
    output = capsys.readouterr()
    gains = {name: float(gain) for name, gain in re.findall(r"^\| (\w+) \|.*\| ([-+.\d]+) dB \|$", output.out, re.M)}
    assert list(gains) == ["degraded", *sf.EXITS]
    assert "step 2: degraded" in output.out + output.err
    path = tmp_path / "out" / "tiny-haze.safetensors"
    state = torch.load(tmp_path / "out" / "tiny-haze.checkpoint")
    model = sf.SWFormer.from_pretrained(path)
    for name, value in model.state_dict().items():
        averaged = state["ema"][f"module.{name}"]
        assert torch.equal(value, averaged.half().float() if averaged.is_floating_point() else averaged), name
        if averaged.is_floating_point() and averaged.ndim > 1:
            assert not torch.equal(averaged, state["model"][name])
    with safe_open(path, "pt") as stored:
        metadata = stored.metadata()
    assert metadata["task"] == "haze"
    values = []
    for clean in small.values():
        degraded = degrade(clean, "haze", photographs.HELD_OUT_SEEDS[0])
        values.append(train_restore.psnr(model(degraded[None])[0].detach(), clean))
    assert float(metadata["psnr_large"]) == pytest.approx(sum(values) / 2, abs=0.02)


def folder_of_pairs(root: Path) -> None:
    for split, count in (("train", 3), ("test", 2)):
        for i in range(count):
            clean = torch.rand(3, 40 + i, 50, generator=torch.Generator().manual_seed(i))
            for side, image in (("input", clean * 0.5), ("target", clean)):
                path = root / split / side / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((image * 255).byte().permute(1, 2, 0).numpy()).save(path)


def test_training_on_files(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorboard")
    folder_of_pairs(tmp_path / "data")
    data = ("--data", str(tmp_path / "data"), "--layout", "pairs")
    assert run("out", "--exit", "medium", "--mixed-precision", "bf16", "--log", "tensorboard", task=data, steps=2) == 0
    assert "| large |" not in capsys.readouterr().out
    assert sf.SWFormer.from_pretrained(tmp_path / "out" / "data.safetensors").exit == "medium"
    assert list((tmp_path / "out" / "data").rglob("events.out.tfevents*"))
    # Reading in other processes changes nothing.
    assert run("one", task=data, steps=2) == run("two", "--workers", "1", task=data, steps=2) == 0
    assert_equal_states(*(tmp_path / name / "data.checkpoint" for name in ("one", "two")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--resume",), "checkpoint does not exist"),
        (("--batch", "6"), "--batch must be a multiple of 4, got 6"),
        (("--dead-leaves", "50"), "--dead-leaves must be from 0 to 1, got 50.0"),
        (("--crop", "100"), "crops of 100 are larger than a picture"),
    ],
)
def test_errors_are_told_in_a_line(
    options: tuple[str, ...], message: str, small: dict[str, Tensor], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("out", *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_of_other_settings_is_refused(
    small: dict[str, Tensor], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("out", steps=1) == 0
    assert run("out", steps=1) == 2
    assert "exists: --resume goes on from it, or remove it" in capsys.readouterr().err
    assert run("out", "--resume", steps=2) == 2
    assert re.search(r"'steps': 1.*'steps': 2", capsys.readouterr().err)


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    """Their share of one batch each, over gloo; interrupted by a kill of both, they go on bit for bit."""
    folder_of_pairs(tmp_path / "data")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = [*command[:-2], "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(SCRIPT)]
    command += ["--data", str(tmp_path / "data"), "--batch", "4", "--crop", "16", "--steps", "4"]

    def train(folder: str, *options: str) -> Path:
        done = subprocess.run(
            [*command, "--out", str(tmp_path / folder), *options], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("steps in") == 1
        return tmp_path / folder / "data.checkpoint"

    first, second = torch.load(train("one")), torch.load(train("two"))
    assert first["step"] == 4
    assert first["settings"]["processes"] == 2
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name


def test_gradients_of_two_processes_are_averaged(tmp_path: Path, run: Run) -> None:
    """A step's crops do not depend on the number of processes."""
    arguments = argparse.Namespace(batch=8, crop=16, steps=4, progressive=True, workers=0)

    class Process:
        def __init__(self, index: int, count: int) -> None:
            self.process_index, self.num_processes = index, count

    def drawn(index: int, count: int) -> list[Any]:
        training = train_restore.Training.__new__(train_restore.Training)
        training.args, training.accelerator, training.step = arguments, Process(index, count), 0  # type: ignore
        items: list[Any] = []

        class Recorder:
            def __getitem__(self, item: tuple[int, int]) -> Tensor:
                items.append(item)
                return torch.zeros(())

        list(training.batches(Recorder()))  # type: ignore[arg-type]
        return items

    alone, both = drawn(0, 1), [drawn(index, 2) for index in range(2)]
    assert sorted(alone) == sorted(both[0] + both[1])
    assert [side for _, side in alone] == [16] * 24 + [32] * 2
    assert len(set(alone)) == len(alone)


@pytest.mark.parametrize("task", DEGRADATIONS)
def test_classical_methods_keep_shape_and_range(task: str) -> None:
    clean = photographs.photographs("test")["coffee"][:, 100:181, 200:297]
    for image in (degrade(clean, task, 3), torch.zeros(3, 17, 20), torch.ones(3, 17, 20)):
        restored = CLASSICAL[task][1](image)
        assert restored.shape == image.shape
        assert restored.isfinite().all()
        assert restored.min() >= 0
        assert restored.max() <= 1


@pytest.mark.parametrize("task", ["haze", "low_light"])
def test_classical_methods_help(task: str) -> None:
    gains = []
    for clean in photographs.photographs("test").values():
        degraded = degrade(clean, task, 3)
        gains.append(restore_tasks.psnr(CLASSICAL[task][1](degraded), clean) - restore_tasks.psnr(degraded, clean))
    assert sum(gains) / len(gains) > 1
