"""The restoration examples: their training, which loses nothing, their weights, and pictures restored end to end."""

from __future__ import annotations

import math
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import swformer_fast as sf

for package in ("matplotlib", "PIL", "safetensors", "skimage", "sklearn", "tqdm"):
    pytest.importorskip(package)

import restore
import train_restore
from degradations import degrade
from PIL import Image, ImageCms
from safetensors import safe_open

SHIPPED = {"rain_streaks": 4.0, "haze": 3.0, "low_light": 3.0}
"""Tasks with weights in examples/assets, and the least gain in dB on each held-out photograph."""


def test_split_is_fixed_and_held_out_photographs_are_never_seen() -> None:
    train, test = train_restore.photographs("train"), train_restore.photographs("test")
    assert (len(train), list(test)) == (14, ["chelsea", "coffee", "china"])
    for image in (*train.values(), *test.values()):
        assert image.shape[0] == 3
        assert image.min() >= 0
        assert 0.5 < image.max() <= 1
    thumbnails = [nn.functional.adaptive_avg_pool2d(image, 16).flatten() for image in (*test.values(), *train.values())]
    assert torch.cdist(torch.stack(thumbnails[:3]), torch.stack(thumbnails[3:])).min() > 2
    with pytest.raises(ValueError, match="split"):
        train_restore.photographs("validation")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Two small pictures instead of the photographs, degraded anew every two steps."""
    generator = torch.Generator().manual_seed(0)
    pictures = {
        name: nn.functional.interpolate(torch.rand(1, 3, 6, 6, generator=generator), size, mode="bilinear")[0]
        for name, size in {"a": (40, 50), "b": (70, 36)}.items()
    }
    monkeypatch.setattr(train_restore, "photographs", lambda split: pictures)
    monkeypatch.setattr(train_restore, "EPOCH", 2)
    monkeypatch.setattr(train_restore, "WINDOW", 32)
    monkeypatch.setattr(train_restore, "HELD_OUT_SEEDS", range(2))
    return pictures


def test_scenes_pair_a_view_with_its_degradation(small: dict[str, Tensor]) -> None:
    views = train_restore.scenes("haze", 7)
    assert [view.shape[0] for view in views] == [6, 6]
    assert all(max(view.shape[1:]) <= 32 for view in views)
    for i, view in enumerate(views):
        assert torch.equal(view[:3], degrade(view[3:], "haze", 7 * 1009 + i))
    again, other = train_restore.scenes("haze", 7), train_restore.scenes("haze", 8)
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(views, other, strict=True))


def test_batches_show_degraded_and_clean_at_the_same_place() -> None:
    clean = [torch.rand(3, 30, 41), torch.rand(3, 25, 20) + 2]
    views = [torch.cat((view + 10, view)) for view in clean]
    degraded, target = train_restore.batch_of(views, 32, 16, seed=3)
    assert degraded.shape == target.shape == (32, 3, 16, 16)
    assert torch.equal(degraded, target + 10)
    assert 0 < (target.amin((1, 2, 3)) > 1.5).sum() < 32  # both photographs
    windows = clean[0].unfold(1, 16, 1).unfold(2, 16, 1).permute(1, 2, 0, 3, 4).reshape(-1, 3, 16, 16)
    for crop in target[target.amax((1, 2, 3)) <= 1]:
        assert (
            min((windows - crop).abs().amax((1, 2, 3)).min(), (windows - crop.flip(2)).abs().amax((1, 2, 3)).min()) == 0
        )
    other, _ = train_restore.batch_of(views, 32, 16, seed=4)
    assert not torch.equal(degraded, other)


def test_loss_is_l1_of_pixels_and_spectrum_at_every_scale() -> None:
    outputs = [torch.rand(2, 3, 8, 8), torch.rand(2, 12, 4, 4)]
    targets = [torch.rand_like(output) for output in outputs]
    expected = 0.0
    for output, target in zip(outputs, targets, strict=True):
        spectrum = torch.fft.rfft2(output) - torch.fft.rfft2(target)
        expected += (output - target).abs().mean() + 0.1 * (spectrum.real.abs() + spectrum.imag.abs()).mean() / 2
    torch.testing.assert_close(train_restore.loss_fn(outputs, targets), expected)
    assert train_restore.loss_fn(outputs, outputs) == 0


def run(checkpoint: Path, steps: int = 4, network: type[nn.Module] = sf.SWFormer, **options: int) -> nn.Module | None:
    settings = {"batch": 2, "crop": 16, "lr": 1e-3, "seed": 5, **options}
    return train_restore.train("rain_streaks", network, steps, checkpoint=checkpoint, **settings)


def assert_equal_states(left: Path, right: Path) -> None:
    states = [torch.load(path) for path in (left, right)]
    assert states[0].pop("seconds") > 0
    assert states[1].pop("seconds") > 0
    for a, b in zip(*map(tree_leaves, states), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


LOSS = train_restore.loss_fn


def interrupted_loss(*args: Tensor) -> Tensor:
    signal.raise_signal(signal.SIGINT)
    return LOSS(*args)


def test_interrupted_training_resumes_bit_for_bit(
    small: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Ctrl-C in every step, and by an end without warning in the third, after the save of the second."""
    uninterrupted = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(train_restore, "loss_fn", interrupted_loss)
        for step in (1, 2, 3):
            assert run(tmp_path / "resumed") is None
            assert torch.load(tmp_path / "resumed")["step"] == step
    resumed = run(tmp_path / "resumed")

    calls = []

    def killed(*args: object) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError
        return LOSS(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_restore, "loss_fn", killed)
        with pytest.raises(MemoryError):
            run(tmp_path / "killed")
    assert torch.load(tmp_path / "killed")["step"] == 2
    again = run(tmp_path / "killed")

    for name, value in uninterrupted.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
        assert torch.equal(again.state_dict()[name], value), name
    assert_equal_states(tmp_path / "whole", tmp_path / "resumed")
    assert_equal_states(tmp_path / "whole", tmp_path / "killed")
    torch.manual_seed(5)
    initial = sf.SWFormer.from_preset(restore.PRESET).state_dict()
    weights = {name: value for name, value in uninterrupted.state_dict().items() if value.ndim > 1}
    assert not any(torch.equal(value, initial[name]) for name, value in weights.items())


def test_training_refuses_a_checkpoint_of_other_settings(small: dict[str, Tensor], tmp_path: Path) -> None:
    run(tmp_path / "checkpoint", steps=1)
    with pytest.raises(ValueError, match=r"'steps': 1.*'steps': 2.*remove the file"):
        run(tmp_path / "checkpoint", steps=2)
    with pytest.raises(ValueError, match="remove the file"):
        run(tmp_path / "checkpoint", steps=1, network=sf.reference.SWFormer)


def test_fast_and_reference_modules_train_alike(small: dict[str, Tensor], tmp_path: Path) -> None:
    fast = run(tmp_path / "fast", steps=2)
    plain = run(tmp_path / "plain", steps=2, network=sf.reference.SWFormer)
    assert type(plain) is sf.reference.SWFormer
    image = small["a"][None]
    with torch.no_grad():
        change = (plain(image) - image).norm()
        assert change > 1e-3
        assert (fast(image) - plain(image)).norm() < 0.02 * change


def table_rows(output: str) -> dict[str, float]:
    return {name: float(gain) for name, gain in re.findall(r"^\| (\w+) \|.*\| ([-+.\d]+) dB \|$", output, re.MULTILINE)}


def test_training_script(
    small: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted and run again it ends with weights that load, and reports what they are worth."""
    argv = ["--task", "haze", "--out", str(tmp_path), "--steps", "2", "--batch", "2", "--crop", "16"]
    with monkeypatch.context() as patch:
        patch.setattr(train_restore, "loss_fn", interrupted_loss)
        assert train_restore.main(argv) == 130
    assert "The same command goes on" in capsys.readouterr().out
    weights = tmp_path / "restore_haze.safetensors"
    assert not weights.exists()
    assert train_restore.main(argv) == 0
    output = capsys.readouterr().out
    assert re.search(r"2 steps in \d+ s", output)
    rows = table_rows(output)
    assert list(rows) == ["a", "b", "mean"]
    assert rows["mean"] == pytest.approx((rows["a"] + rows["b"]) / 2, abs=0.011)

    model = restore.load_model(weights)
    assert not model.training
    assert weights.stat().st_size < 1e6
    trained = torch.load(tmp_path / "restore_haze.checkpoint")["model"]
    for name, value in model.state_dict().items():
        expected = trained[name].half().float() if trained[name].is_floating_point() else trained[name]
        assert torch.equal(value, expected), name
    clean = small["a"]
    degraded = [degrade(clean, "haze", seed) for seed in range(2)]
    gains = [restore.quality(model(d[None])[0], clean)[0] - restore.quality(d, clean)[0] for d in degraded]
    assert rows["a"] == pytest.approx(sum(gains) / 2, abs=0.006)


def test_quality() -> None:
    clean = torch.rand(3, 40, 50)
    noisy = clean + 0.1 * torch.randn_like(clean)
    error = (noisy.clamp(0, 1) - clean).double().square().mean().item()
    psnr, ssim = restore.quality(noisy, clean)
    assert psnr == pytest.approx(-10 * math.log10(error), abs=1e-4)
    assert 0.5 < ssim < 0.99
    assert restore.quality(clean / 2, clean)[1] < restore.quality(0.9 * clean, clean)[1] < 1


@pytest.mark.parametrize("task", SHIPPED)
def test_shipped_weights_are_small_and_restore_held_out_photographs(task: str) -> None:
    path = restore.ASSETS / restore.weights_file(task)
    assert path.stat().st_size < 1e6
    with safe_open(path, "pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F16", "I64"}  # noqa: SIM118
    model = restore.load_model(path)
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    for name, photograph in train_restore.photographs("test").items():
        clean = photograph[:, 50:274, 60:284]
        degraded = degrade(clean, task, 77)
        before, after = restore.quality(degraded, clean), restore.quality(model(degraded[None])[0], clean)
        assert after[0] - before[0] >= SHIPPED[task] - 1, name
        assert after[1] > before[1], name


@pytest.mark.parametrize("task", SHIPPED)
def test_shipped_weights_in_half_precision(task: str) -> None:
    """As good to a twentieth of a dB."""
    model = restore.load_model(restore.ASSETS / restore.weights_file(task))
    photographs = [photograph[:, 50:242, 60:252] for photograph in train_restore.photographs("test").values()]

    def gain(dtype: torch.dtype) -> float:
        degraded = [degrade(clean, task, 77) for clean in photographs]
        restored = [model.to(dtype)(image[None].to(dtype))[0].float() for image in degraded]
        return sum(restore.quality(*pair)[0] for pair in zip(restored, photographs, strict=True)) / len(photographs)

    with torch.no_grad():
        losses = {dtype: gain(torch.float32) - gain(dtype) for dtype in (torch.float16, torch.bfloat16)}
    assert max(map(abs, losses.values())) < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("task", SHIPPED)
def test_shipped_weights_gain_what_is_promised(task: str) -> None:
    table = train_restore.measure(restore.load_model(restore.ASSETS / restore.weights_file(task)), task)
    for name, (before, _, after, _) in table.items():
        assert after - before >= SHIPPED[task], name


@pytest.fixture
def photograph(tmp_path: Path) -> Path:
    pixels = (train_restore.photographs("test")["coffee"][:, 100:153, 200:277] * 255).round().byte()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "cup.png")
    return tmp_path / "cup.png"


def test_restore_a_degraded_photograph(photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "restored.png"
    argv = [str(photograph), "--task", "rain_streaks", "--degrade", "3", "--dtype", "bf16", "--out", str(out)]
    assert restore.main(argv) == 0
    output = capsys.readouterr().out
    (before, _), (after, _) = [(float(p), float(s)) for p, s in re.findall(r"PSNR ([.\d]+) dB, SSIM ([.\d]+)", output)]
    assert after > before + 2
    clean = restore.read_image(photograph)
    assert before == pytest.approx(restore.quality(degrade(clean, "rain_streaks", 3), clean)[0], abs=0.006)
    assert restore.quality(restore.read_image(out), clean)[0] == pytest.approx(after, abs=0.05)
    assert sorted(path.name for path in out.parent.iterdir()) == ["restored.png", "restored_comparison.png"]
    picture = restore.read_image(out.with_name("restored_comparison.png"))
    assert picture.shape[2] > 2.5 * picture.shape[1]
    assert picture.std() > 0.1


def test_restore_against_a_clean_picture_in_tiles(
    photograph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clean = restore.read_image(photograph)
    hazy = tmp_path / "hazy.png"
    restore.write_image(degrade(clean, "haze", 1), hazy)
    weights = restore.ASSETS / restore.weights_file("haze")
    argv = [str(hazy), "--task", "haze", "--weights", str(weights), "--clean", str(photograph), "--out"]
    assert restore.main([*argv, str(tmp_path / "whole.jpg")]) == 0
    assert restore.main([*argv, str(tmp_path / "tiles.png"), "--tile", "48"]) == 0
    assert capsys.readouterr().out.count("before: PSNR") == 2
    at_once, tiles = (restore.read_image(tmp_path / name) for name in ("whole.jpg", "tiles.png"))
    assert at_once.shape == tiles.shape == clean.shape
    expected = sf.restore_tiled(restore.load_model(weights), restore.read_image(hazy), tile=48, overlap=12).clamp(0, 1)
    assert (tiles - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert not torch.allclose(tiles, at_once, atol=0.01)


def test_restore_by_each_exit(photograph: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = sf.SWFormer.from_preset(restore.PRESET).eval().requires_grad_(False)
    train_restore.export(model, tmp_path / "weights.safetensors")
    model = restore.load_model(tmp_path / "weights.safetensors")
    for exit in sf.EXITS:
        out = tmp_path / f"{exit}.png"
        argv = [str(photograph), "--task", "haze", "--weights", str(tmp_path / "weights.safetensors"), "--exit", exit]
        assert restore.main([*argv, "--out", str(out)]) == 0
        expected = model(restore.read_image(photograph)[None], exit=exit)[0].clamp(0, 1)
        assert (restore.read_image(out) - expected).abs().max() <= 0.5 / 255 + 1e-6
    assert not torch.equal(*(restore.read_image(tmp_path / f"{exit}.png") for exit in ("small", "large")))


def test_pictures_of_every_kind_are_read_upright(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    colour = torch.from_numpy(pixels).permute(2, 0, 1) / 255
    Image.fromarray(pixels).save(tmp_path / "colour.png")
    torch.testing.assert_close(restore.read_image(tmp_path / "colour.png"), colour)
    Image.fromarray(np.dstack((pixels, pixels[..., :1]))).save(tmp_path / "alpha.png")
    torch.testing.assert_close(restore.read_image(tmp_path / "alpha.png"), colour)
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    torch.testing.assert_close(restore.read_image(tmp_path / "grey.png"), colour[:1].expand(3, -1, -1))
    deep = pixels[..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    torch.testing.assert_close(restore.read_image(tmp_path / "deep.png"), colour[:1].expand(3, -1, -1))
    turned = Image.fromarray(pixels).getexif()
    turned[0x0112] = 6  # to be rotated by a quarter clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=turned)
    torch.testing.assert_close(restore.read_image(tmp_path / "turned.png"), colour.rot90(-1, (1, 2)))


def test_pictures_of_many_bits(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((20, 30), np.float32)
    expected = torch.from_numpy(values).expand(3, -1, -1)
    Image.fromarray(values).save(tmp_path / "float.tiff")
    torch.testing.assert_close(restore.read_image(tmp_path / "float.tiff"), expected)
    Image.fromarray((values * 65535).astype(np.int32)).save(tmp_path / "integer.tiff")
    torch.testing.assert_close(restore.read_image(tmp_path / "integer.tiff"), expected, atol=2e-5, rtol=0)
    for name, wrong in (("large", 2 * values), ("negative", (values * 65535).astype(np.int32) - 32640)):
        Image.fromarray(wrong).save(tmp_path / f"{name}.tiff")
        with pytest.raises(ValueError, match="must have pixels from 0 to"):
            restore.read_image(tmp_path / f"{name}.tiff")


def test_pictures_are_brought_to_srgb(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(60, 200, (20, 30, 3), np.uint8)
    plain = Image.fromarray(pixels)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain.save(tmp_path / "srgb.png", icc_profile=srgb)
    torch.testing.assert_close(
        restore.read_image(tmp_path / "srgb.png"), torch.from_numpy(pixels).permute(2, 0, 1) / 255, atol=0.01, rtol=0
    )
    swapped = srgb.replace(b"rXYZ", b"____").replace(b"gXYZ", b"rXYZ").replace(b"____", b"gXYZ")
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "swapped.png", icc_profile=swapped)
    red, green, blue = restore.read_image(tmp_path / "swapped.png").mean((1, 2))
    assert green > 0.9
    assert max(red, blue) < 0.1
    plain.save(tmp_path / "broken.png", icc_profile=b"no profile")
    assert restore.read_image(tmp_path / "broken.png").shape == (3, 20, 30)


def test_weights_of_other_files(tmp_path: Path) -> None:
    weights = restore.ASSETS / restore.weights_file("haze")
    state = restore.load_model(weights).state_dict()
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, tmp_path / "model.pth")
    loaded = restore.load_model(tmp_path / "model.pth").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "cut.pth").write_bytes((tmp_path / "model.pth").read_bytes()[:1000])
    torch.save({"weight": torch.ones(3)}, tmp_path / "other.pth")
    for name in ("cut.safetensors", "cut.pth", "other.pth"):
        with pytest.raises(ValueError, match=f"{name} holds no weights of the preset"):
            restore.load_model(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--task", "haze", "--out", "x.psd"], "has no suffix of a picture that Pillow writes"),
        (["--task", "haze", "--weights", "note.txt"], "note.txt holds no weights of the preset"),
        (["--task", "hail"], "invalid choice: 'hail'"),
        (["--task", "cloud"], r"no weights in .*restore_cloud.*train_restore.py --task cloud"),
        (["--task", "haze", "--tile", "50"], "multiple of 16"),
        (["--task", "haze", "--clean", "small.png"], r"--clean has shape \(3, 9, 8\), the image \(3, 53, 77\)"),
        (["--task", "haze", "--clean", "missing.png"], "cannot read the input.*missing"),
        (["--task", "haze", "--clean", "note.txt"], "cannot read the input.*note"),
        (["--task", "haze", "--out", "picture.docx"], r"picture\.docx has no suffix"),
        (["--task", "haze", "--clean", "x.png", "--degrade", "1"], "not allowed with"),
    ],
)
def test_errors_are_told_in_a_line(
    options: list[str],
    message: str,
    photograph: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photograph.parent)
    Image.new("RGB", (8, 9)).save("small.png")
    Path("note.txt").write_text("no picture")
    with pytest.raises(SystemExit) as stopped:
        restore.main([photograph.name, *options])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_pictures_that_are_too_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (15, 40)).save(tmp_path / "small.png")
    with pytest.raises(SystemExit):
        restore.main([str(tmp_path / "small.png"), "--task", "haze", "--out", str(tmp_path / "out.png")])
    assert "H, W >= 16, got (1, 3, 40, 15)" in capsys.readouterr().err
