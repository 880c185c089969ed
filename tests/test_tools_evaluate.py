"""`swformer-eval`: the metrics, and what it measures of a network on a data set."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import swformer_fast as sf

for package in ("PIL", "tifffile", "imagecodecs", "safetensors", "skimage", "tqdm"):
    pytest.importorskip(package)

from PIL import Image
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from swformer_fast.tools import measuring, metrics, networks
from swformer_fast.tools.evaluate import main

RNG = np.random.default_rng(0)


def smooth(height: int, width: int) -> Tensor:
    coarse = torch.from_numpy(RNG.random((1, 3, 5, 5), np.float32))
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear")[0]


def array(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).double().numpy()


@pytest.mark.parametrize("channels", [1, 3])
def test_metrics_are_those_of_scikit_image(channels: int) -> None:
    clean = smooth(33, 47)[:channels]
    noisy = (clean + 0.1 * torch.randn_like(clean)).clamp(0, 1)
    a, b = array(clean), array(noisy)
    expected = structural_similarity(
        a, b, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert metrics.ssim(noisy, clean) == pytest.approx(expected, abs=1e-9)
    assert metrics.psnr(noisy, clean) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=1), abs=1e-9)
    assert metrics.ssim(clean, clean) == pytest.approx(1)
    assert metrics.psnr(clean, clean) == math.inf
    with pytest.raises(ValueError, match=r"sides of at least 11, got \(10, 47\)"):
        metrics.ssim(noisy[:, :10], clean[:, :10])


def test_luma_is_that_of_matlab() -> None:
    image = smooth(12, 13).double()
    expected = rgb2ycbcr(array(image))[..., 0] / 255
    assert np.allclose(metrics.luma(image)[0].numpy(), expected, atol=1e-9)
    assert metrics.luma(torch.ones(3, 1, 1)).item() == pytest.approx(235 / 255)


def test_scaled_to_the_clean_mean() -> None:
    clean = smooth(12, 13) / 2
    assert torch.allclose(metrics.as_bright_as(clean / 3, clean), clean, atol=1e-6)
    assert metrics.as_bright_as(torch.zeros(3, 4, 4), clean).isfinite().all()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three pairs; input is the target with less light."""
    for i in range(3):
        clean = (smooth(24 + 8 * i, 40) * 255).byte().permute(1, 2, 0).numpy()
        for folder, pixels in (("input", clean // 2), ("target", clean)):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "data" / folder / f"{i}.png")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    torch.manual_seed(0)
    sf.pretrained.save_weights(sf.SWFormer.from_preset("tiny"), path, dtype=None)
    return str(path)


def tensor(path: Path) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255


@pytest.mark.parametrize("channel", ["rgb", "y"])
@pytest.mark.parametrize("gt_mean", [False, True])
def test_scores_of_every_exit(channel: str, gt_mean: bool, data: Path, weights: str, tmp_path: Path) -> None:
    argv = ["--data", str(data), "--layout", "pairs", "--weights", weights, "--exit", "all", "--channel", channel]
    argv += ["--json", str(tmp_path / "new" / "x.json"), *(["--gt-mean"] if gt_mean else [])]
    assert main(argv) == 0
    written = json.loads((tmp_path / "new" / "x.json").read_text())
    assert written["complete"] is True
    assert (written["channel"], written["gt_mean"], written["dtype"]) == (channel, gt_mean, "float32")
    assert written["tile"] in networks.TILES
    assert list(written["images"]) == ["input/0.png", "input/1.png", "input/2.png"]
    assert list(written["mean"]) == ["degraded", "small", "medium", "large"]
    model = sf.SWFormer.from_pretrained(weights)
    degraded, clean = (tensor(data / folder / "1.png") for folder in ("input", "target"))
    for column, scores in written["images"]["input/1.png"].items():
        image = degraded
        if column != "degraded":
            with torch.no_grad():
                image = model(degraded[None], exit=column)[0].clamp(0, 1)
            image = metrics.as_bright_as(image, clean) if gt_mean else image
        channel_of = metrics.luma if channel == "y" else torch.Tensor.double
        a, b = channel_of(image.double()), channel_of(clean.double())
        assert scores["psnr"] == pytest.approx(metrics.psnr(a, b), abs=1e-3)
        assert scores["ssim"] == pytest.approx(metrics.ssim(a, b), abs=1e-5)
    values = [row["small"]["psnr"] for row in written["images"].values()]
    assert written["mean"]["small"]["psnr"] == pytest.approx(sum(values) / 3)


def test_tables(data: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--data", str(data), "--layout", "pairs", "--weights", weights, "--exit", "small"]
    assert main([*argv, "--markdown", str(tmp_path / "x.md")]) == 0
    printed, table = capsys.readouterr().out, (tmp_path / "x.md").read_text()
    assert re.search(r"\| mean of 3 \| PSNR \| SSIM \|\n\| --- \| ---: \| ---: \|\n\| degraded \| [\d.]+ ", printed)
    assert printed.strip() in table
    assert "| picture | PSNR degraded | PSNR small | SSIM degraded | SSIM small |" in table
    assert len(re.findall(r"^\| input/\d.png \|( [\d.]+ \|){4}$", table, re.MULTILINE)) == 3
    assert "(pairs, test): RGB.\n" in table


def test_bad_pairs_are_named(data: Path, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (50, 60)).save(data / "target" / "0.png")
    (data / "input" / "1.png").write_bytes(b"no picture")
    argv = ["--data", str(data), "--layout", "pairs", "--weights", weights, "--json", str(tmp_path / "x.json")]
    assert main([*argv, "--markdown", str(tmp_path / "x.md")]) == 1
    errors = capsys.readouterr().err
    assert "input/0.png has 40 x 24 pixels, its clean picture 50 x 60" in errors
    assert "input/1.png cannot identify" in errors
    written = json.loads((tmp_path / "x.json").read_text())
    assert list(written["images"]) == ["input/2.png"]
    assert list(written["failed"]) == ["input/0.png", "input/1.png"]
    assert "- input/0.png has 40 x 24" in (tmp_path / "x.md").read_text()


def test_equal_pictures_have_no_number_in_json(data: Path, weights: str, tmp_path: Path) -> None:
    for i in range(3):
        (data / "input" / f"{i}.png").write_bytes((data / "target" / f"{i}.png").read_bytes())
    argv = ["--data", str(data), "--layout", "pairs", "--weights", weights, "--json", str(tmp_path / "x.json")]
    assert main([*argv, "--markdown", str(tmp_path / "x.md")]) == 0
    assert json.loads((tmp_path / "x.json").read_text())["mean"]["degraded"] == {"psnr": None, "ssim": 1.0}
    assert "| degraded | inf | 1.0000 |" in (tmp_path / "x.md").read_text()


def test_interrupt_keeps_what_is_measured(
    data: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def interrupted(self: networks.Restorer, image: Tensor, exit: str) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return image

    monkeypatch.setattr(networks.Restorer, "__call__", interrupted)
    argv = ["--data", str(data), "--layout", "pairs", "--weights", weights, "--json", str(tmp_path / "x.json")]
    assert main(argv) == 130
    assert "interrupted: 2 of 3 pairs are measured" in capsys.readouterr().err
    written = json.loads((tmp_path / "x.json").read_text())
    assert written["complete"] is False
    assert list(written["images"]) == ["input/0.png", "input/1.png"]
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["x.json"]


def test_names_that_no_encoding_has(data: Path, weights: str, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xe6\x97\xa5 \xff.png")
    for folder in ("input", "target"):
        (data / folder / "0.png").rename(data / folder / name)
    argv = ["--data", str(data), "--layout", "pairs", "--weights", weights, "--exit", "small"]
    assert main([*argv, "--json", str(tmp_path / "x.json"), "--markdown", str(tmp_path / "x.md")]) == 0
    assert f"input/{name}" in json.loads((tmp_path / "x.json").read_text())["images"]
    assert "| input/日 \\udcff.png |" in (tmp_path / "x.md").read_text("utf-8")


def test_a_full_disk_loses_no_means(
    data: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    argv = ["--data", str(data), "--layout", "pairs", "--weights", weights, "--exit", "small"]
    assert main([*argv, "--json", str(tmp_path / "x.json")]) == 1
    printed = capsys.readouterr()
    assert "| mean of 3 | PSNR | SSIM |" in printed.out
    assert printed.err.endswith("not written: [Errno 28] No space left on device\n")
    assert not list(tmp_path.glob("*.json"))


def test_metrics_of_pyiqa(
    data: Path, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--data", str(data), "--layout", "pairs", "--weights", weights, "--metric", "lpips", "niqe"]
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(SystemExit):
        main(argv)
    assert "pyiqa is missing: pip install pyiqa" in capsys.readouterr().err

    class Metric:
        def __init__(self, name: str) -> None:
            self.metric_mode = "NR" if name == "niqe" else "FR"

        def __call__(self, *images: Tensor) -> Tensor:
            assert all(image.shape[:2] == (1, 3) for image in images)
            return torch.tensor(float(len(images)))

    module: Any = SimpleNamespace(
        list_models=lambda: ["lpips", "niqe"], create_metric=lambda name, device: Metric(name), __spec__=None
    )
    monkeypatch.setitem(sys.modules, "pyiqa", module)
    assert main([*argv, "--json", str(tmp_path / "x.json")]) == 0
    mean = json.loads((tmp_path / "x.json").read_text())["mean"]["large"]
    assert (mean["lpips"], mean["niqe"]) == (2, 1)
    assert "| PSNR | SSIM | lpips | niqe |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*argv, "ssimulacra"])
    assert "pyiqa has no metric 'ssimulacra'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--data": "missing"}, "there is no folder missing"),
        ({"--layout": "sots"}, "looked for"),
        ({"--weights": "missing.pth"}, "name_or_path must be"),
        ({"--json": "."}, r"\. is a folder"),
    ],
)
def test_what_is_refused_before_any_work(
    change: dict[str, str], words: str, data: Path, weights: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--data": str(data), "--layout": "pairs", "--weights": weights, **change}
    with pytest.raises(SystemExit) as stopped:
        main([word for option in options.items() for word in option])
    assert stopped.value.code == 2
    assert re.search(words, capsys.readouterr().err)


def test_nothing_measured_is_said() -> None:
    assert measuring.Results(SimpleNamespace(), ("large",)).summary() == "nothing is measured"
