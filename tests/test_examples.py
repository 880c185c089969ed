"""The examples: their weights, their training script and the pictures they draw."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from pathlib import Path

import common
import digits_model
import pytest
import sdo_digits
import torch
import train_digits
from matplotlib.image import imread
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sdo_fast import coefficients


def test_split_is_fixed_and_disjoint() -> None:
    (train, train_labels), (test, test_labels) = digits_model.digits("train"), digits_model.digits("test")
    assert train.shape == (1500, 1, 16, 16)
    assert test.shape == (297, 1, 16, 16)
    assert train.min() >= -1
    assert train.max() <= 1
    assert train.std() > 0.5
    assert set(train_labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    assert test_labels[:8].tolist() == [7, 3, 1, 3, 0, 3, 4, 7]
    assert torch.cdist(test.flatten(1), train.flatten(1)).min() > 0.1
    with pytest.raises(ValueError, match="split"):
        digits_model.digits("validation")


def test_weights_are_small_and_right() -> None:
    files = [digits_model.ASSETS / digits_model.UNET_FILE, digits_model.ASSETS / digits_model.CLASSIFIER_FILE]
    assert sum(file.stat().st_size for file in files) < 3e6
    for file in files:
        with safe_open(file, "pt") as stored:
            assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F16"}  # noqa: SIM118
    unet, classifier = digits_model.load_digits_unet(), digits_model.load_digits_classifier()
    assert sum(p.numel() for p in unet.parameters()) == 652_449
    for model in (unet, classifier):
        assert not model.training
        assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, False)}
    assert train_digits.classifier_accuracy(classifier) >= 0.99


def test_samples_show_the_class_asked_for() -> None:
    unet, classifier = digits_model.load_digits_unet(), digits_model.load_digits_classifier()
    labels = torch.arange(10).repeat(2)
    generator = torch.Generator().manual_seed(0)
    images = digits_model.sample(unet, labels, num_inference_steps=20, generator=generator)
    probability = classifier(images.clamp(-1, 1)).softmax(1)
    assert (probability.gather(1, labels[:, None]) > 0.9).sum() >= 19
    assert torch.cdist(images[:10].flatten(1), images[10:].flatten(1)).diag().min() > 1, (
        "two samples of a class are alike"
    )


def test_scheduler_starts_from_pure_noise() -> None:
    a, _ = coefficients(digits_model.scheduler(), 10)
    assert a[0].item() == pytest.approx(157, abs=1)


Loss = Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor]


@pytest.mark.parametrize(
    ("make", "loss_fn"),
    [
        (digits_model.digits_unet, train_digits.unet_loss),
        (digits_model.digits_classifier, train_digits.classifier_loss),
    ],
    ids=["unet", "classifier"],
)
def test_interrupted_training_resumes_bit_for_bit(make: Callable[[], nn.Module], loss_fn: Loss, tmp_path: Path) -> None:
    def run(checkpoint: Path, loss_fn: Loss = loss_fn) -> nn.Module | None:
        return train_digits.train("test", make, loss_fn, 3, batch=4, seed=5, checkpoint=checkpoint)

    def interrupted(*args: object) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return loss_fn(*args)

    whole = run(tmp_path / "whole")
    for step in (1, 2):
        assert run(tmp_path / "resumed", interrupted) is None
        assert torch.load(tmp_path / "resumed")["step"] == step
    resumed = run(tmp_path / "resumed")

    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    torch.manual_seed(5)
    initial = make().state_dict()
    assert not any(torch.equal(value, initial[name]) for name, value in whole.state_dict().items() if value.ndim > 1)
    states = (tree_leaves(torch.load(tmp_path / name)) for name in ("whole", "resumed"))
    for left, right in zip(*states, strict=True):
        assert torch.equal(left, right) if isinstance(left, Tensor) else left == right


def test_training_refuses_a_checkpoint_of_other_settings(tmp_path: Path) -> None:
    make, loss_fn = digits_model.digits_classifier, train_digits.classifier_loss
    train_digits.train("test", make, loss_fn, 2, batch=4, seed=0, checkpoint=tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"'steps': 2.*'steps': 3.*remove the file"):
        train_digits.train("test", make, loss_fn, 3, batch=4, seed=0, checkpoint=tmp_path / "checkpoint")


def test_exported_weights_are_the_model_in_half_precision(tmp_path: Path) -> None:
    model = digits_model.digits_classifier()
    train_digits.export(model, tmp_path / "weights.safetensors")
    loaded = digits_model.load_digits_classifier(tmp_path / "weights.safetensors").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded[name], value.half().float()), name


def test_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    def fail(path: Path) -> None:
        path.write_text("half of the n")
        raise KeyboardInterrupt

    common.write_whole(tmp_path / "a.txt", lambda path: path.write_text("old"))
    with pytest.raises(KeyboardInterrupt):
        common.write_whole(tmp_path / "a.txt", fail)
    assert (tmp_path / "a.txt").read_text() == "old"


def losses(output: str) -> list[tuple[float, float]]:
    """The first and the last loss of each optimisation, as the examples print them."""
    return [(float(a), float(b)) for a, b in re.findall(r"loss, .*: ([-.\d]+) -> ([-.\d]+)", output)]


def assert_picture(path: Path) -> None:
    picture = imread(path)
    assert min(picture.shape[:2]) >= 400
    assert picture[..., :3].std() > 0.1


@pytest.mark.parametrize("grad_step", ["first", "identity", "2"])
def test_sdo_digits(grad_step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "sdo.png"
    assert sdo_digits.main(["--quick", "--steps", "4", "--grad-step", grad_step, "--out", str(out)]) == 0
    found = losses(capsys.readouterr().out)
    assert len(found) == 2
    assert all(after < 0.9 * before for before, after in found), found
    assert_picture(out)
    assert [file.name for file in out.parent.iterdir()] == ["sdo.png"]


def test_sdo_digits_is_repeatable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--quick", "--steps", "1", "--task", "image", "--out", str(tmp_path / "sdo.png")]
    seen = []
    for seed in ("3", "3", "4"):
        sdo_digits.main([*options, "--seed", seed])
        seen.append(losses(capsys.readouterr().out))
    assert seen[0] == seen[1] != seen[2]
