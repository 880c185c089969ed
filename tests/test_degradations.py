"""The synthetic degradations: repeatable, in range, harmful, and true to their formation models."""

import math
from pathlib import Path

import degradations
import numpy as np
import pytest
import torch
from degradations import DEGRADATIONS, GAMMA, degrade
from torch import Generator, Tensor

data = pytest.importorskip("skimage.data")

SIZE = (97, 130)


@pytest.fixture(scope="module")
def photograph() -> Tensor:
    pixels = torch.tensor(data.coffee()[100:197, 200:330], dtype=torch.float32)
    return (pixels / 255).permute(2, 0, 1).contiguous()


def grey(value: float, size: tuple[int, int] = SIZE) -> Tensor:
    return torch.full((3, *size), float(value))


def apply(task: str, image: Tensor, seed: int = 0) -> Tensor:
    """The degradation before it is clamped."""
    return DEGRADATIONS[task](image, Generator().manual_seed(seed))


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10((a - b).square().mean().item())


def test_the_papers_ten_tasks() -> None:
    assert list(DEGRADATIONS) == [
        "rain_streaks",
        "raindrops",
        "haze",
        "snow",
        "motion_blur",
        "defocus_blur",
        "cloud",
        "shadow",
        "underwater",
        "low_light",
    ]
    assert all("Model: " in f.__doc__ or "Lv et al." in f.__doc__ for f in DEGRADATIONS.values())


@pytest.mark.parametrize("task", DEGRADATIONS)
def test_depends_on_the_seed_alone(task: str, photograph: Tensor) -> None:
    before = photograph.clone()
    first = degrade(photograph, task, 5)
    torch.rand(7)
    assert torch.equal(first, degrade(photograph, task, 5))
    assert torch.equal(photograph, before)
    others = [degrade(photograph, task, seed) for seed in range(4)]
    assert all(not torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("size", [(1, 1), (1, 9), (17, 31), (40, 23)])
@pytest.mark.parametrize("task", DEGRADATIONS)
def test_any_size_stays_in_range(task: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    for image in (torch.rand(3, *size), grey(0, size), grey(1, size)):
        degraded = degrade(image.to(dtype), task, 1)
        assert degraded.shape == image.shape
        assert degraded.dtype == dtype
        assert degraded.min() >= 0
        assert degraded.max() <= 1  # False for NaN


def test_photographs_of_many_pixels(photograph: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.quantile takes no more than 2**24 numbers; of more a part stands for all."""
    whole = degrade(photograph, "defocus_blur", 1)
    quantile = torch.quantile

    def limited(numbers: Tensor, *others: Tensor) -> Tensor:
        assert numbers.numel() <= 10_000
        return quantile(numbers, *others)

    monkeypatch.setattr(torch, "quantile", limited)
    monkeypatch.setattr(degradations, "LARGEST_QUANTILE", 10_000)
    assert psnr(degrade(photograph, "defocus_blur", 1), whole) > 40
    assert degradations.LARGEST_QUANTILE < 2**24


@pytest.mark.parametrize("task", DEGRADATIONS)
def test_does_harm_but_no_more_than_a_network_can_undo(task: str, photograph: Tensor) -> None:
    ratios = [psnr(degrade(photograph, task, seed), photograph) for seed in range(8)]
    assert max(ratios) < 36
    assert min(ratios) > 5
    assert sum(ratios) / len(ratios) < 30


@pytest.mark.parametrize("task", DEGRADATIONS)
def test_memory_layout_does_not_matter(task: str, photograph: Tensor) -> None:
    strided = photograph.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    torch.testing.assert_close(degrade(strided, task, 2), degrade(photograph, task, 2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", ["rain_streaks", "haze", "snow", "cloud", "shadow", "underwater"])
def test_models_linear_in_the_scene(task: str, seed: int, photograph: Tensor) -> None:
    """`I = a * J + b` pixel by pixel: black gives b, white a + b, and a and b do not depend on the scene."""
    b = apply(task, grey(0), seed)
    a = apply(task, grey(1), seed) - b
    torch.testing.assert_close(apply(task, photograph, seed), a * photograph + b, rtol=0, atol=2e-6)
    assert a.min() + 1e-6 >= 0
    assert a.max() <= 1 + 1e-6
    assert b.min() >= -1e-6
    if task == "shadow":
        assert b.abs().max() == 0
    else:
        assert b.max() > 0.05


@pytest.mark.parametrize("seed", range(3))
def test_rain_is_brighter_than_the_scene_and_invisible_on_white(seed: int, photograph: Tensor) -> None:
    assert (apply("rain_streaks", photograph, seed) >= photograph - 1e-6).all()
    torch.testing.assert_close(apply("rain_streaks", grey(1), seed), grey(1))
    rain = apply("rain_streaks", grey(0), seed)
    assert torch.equal(rain[0], rain[1])  # colourless
    assert (rain[0] < 0.02).float().mean() > 0.3  # streaks, no veil
    along, across = ((rain[0].diff(dim=d)).square().mean() for d in (0, 1))
    assert along < 0.5 * across  # within half a radian of the vertical


@pytest.mark.parametrize("seed", range(3))
def test_haze_leaves_its_airlight_alone_and_grows_with_depth(seed: int) -> None:
    veil = apply("haze", grey(0), seed)
    t = apply("haze", grey(1), seed) - veil
    airlight = veil / (1 - t)
    torch.testing.assert_close(airlight, airlight.mean().expand_as(airlight), rtol=1e-4, atol=1e-4)
    assert 0.7 <= airlight.mean() <= 1
    value = airlight.mean().item()
    torch.testing.assert_close(apply("haze", grey(value), seed), grey(value), rtol=0, atol=1e-4)
    assert t[:, :20].mean() < t[:, -20:].mean()
    assert math.exp(-1.8 * 1.2) - 1e-6 <= t.min()


@pytest.mark.parametrize("seed", range(3))
def test_clouds_are_white_and_leave_gaps(seed: int) -> None:
    veil = apply("cloud", grey(0), seed)
    torch.testing.assert_close(apply("cloud", grey(1), seed), grey(1))
    assert veil.max() > 0.3
    assert veil.max() <= 0.7 + 1e-6
    assert veil.min() == 0


@pytest.mark.parametrize("seed", range(3))
def test_a_shadow_darkens_a_part_and_red_the_most(seed: int) -> None:
    light = apply("shadow", grey(1), seed) ** GAMMA
    lit = (light > 1 - 1e-4).all(0)
    assert 0.2 < lit.float().mean() < 0.8
    dark = light.amin((1, 2))
    assert dark[0] < dark[1] < dark[2] < 0.45
    assert dark[0] > 0.1


@pytest.mark.parametrize("seed", range(3))
def test_water_takes_red_first(seed: int) -> None:
    veil = apply("underwater", grey(0), seed)
    t = (apply("underwater", grey(1), seed) - veil).mean((1, 2))
    assert t[0] < t[1]
    assert t[0] < t[2]
    absorption = -(apply("underwater", grey(1), seed) - veil).log()
    beta = (absorption / absorption[:1]).mean((1, 2))  # relative to red, the same at every distance
    absorptions = torch.tensor([*degradations.JERLOV.values()])
    assert (absorptions / absorptions[:, :1] - beta).abs().amax(1).min() < 1e-3


@pytest.mark.parametrize("task", ["motion_blur", "defocus_blur"])
@pytest.mark.parametrize("seed", range(4))
def test_blurs_keep_even_light_and_take_detail(task: str, seed: int, photograph: Tensor) -> None:
    torch.testing.assert_close(apply(task, grey(0.4), seed), grey(0.4), rtol=0, atol=1e-4)
    blurred = apply(task, photograph, seed)
    for dim in (1, 2):
        assert blurred.diff(dim=dim).square().mean() < 0.8 * photograph.diff(dim=dim).square().mean()
    if task == "motion_blur":  # light is spread, not lost
        padded = torch.zeros(3, 80, 80)
        padded[:, 35:45, 35:45] = 1
        moved = apply(task, padded, seed) ** GAMMA
        torch.testing.assert_close(moved.sum((1, 2)), padded.sum((1, 2)), rtol=1e-3, atol=1e-2)


def test_convolution_is_the_sum_it_stands_for() -> None:
    image, kernel = torch.rand(2, 9, 13), torch.rand(5, 5)
    expected = torch.nn.functional.conv2d(image[:, None], kernel.flip(0, 1)[None, None])[:, 0]
    torch.testing.assert_close(degradations._convolve(image, kernel), expected, rtol=1e-5, atol=1e-5)
    assert degradations._blur(image, kernel / kernel.sum()).shape == image.shape


@pytest.mark.parametrize("seed", range(3))
def test_drops_hide_a_part_of_the_scene_and_nothing_else(seed: int, photograph: Tensor) -> None:
    changed = (apply("raindrops", photograph, seed) - photograph).abs().amax(0) > 1e-6
    assert 0.01 < changed.float().mean() < 0.6
    upside_down = degradations.raindrops(photograph.flip(1), Generator().manual_seed(seed))
    assert ((upside_down - photograph.flip(1)).abs().amax(0) > 1e-6)[~changed].float().mean() < 0.05


@pytest.mark.parametrize("seed", range(4))
def test_low_light_is_dark_with_noise_of_the_stated_variance(seed: int) -> None:
    ramp = torch.linspace(0.05, 1, 200).expand(3, 400, 200)
    dark = apply("low_light", ramp, seed)
    level, variance = dark.mean((0, 1)), dark.var((0, 1))
    assert (level <= ramp[0, 0] + 2e-3).all()
    assert level.diff().mean() > 0
    slope, offset = torch.linalg.lstsq(torch.stack((level, torch.ones_like(level)), 1), variance[:, None]).solution
    assert -1e-6 <= slope.item() < 1.1e-3
    assert 2e-6 < offset.item() < 1.3e-4
    fitted = slope * level + offset
    assert (variance / fitted - 1).abs().max() < 0.25


@pytest.mark.parametrize(
    ("image", "task", "error", "message"),
    [
        (torch.rand(3, 4, 4), "hail", ValueError, "task must be one of rain_streaks, .*'hail'"),
        (torch.rand(1, 4, 4), "haze", ValueError, r"shape \(3, H, W\).*\(1, 4, 4\)"),
        (torch.rand(3, 0, 4), "haze", ValueError, "H, W >= 1"),
        (torch.full((3, 4, 4), 255.0), "haze", ValueError, r"\[0, 1\], got values from 255"),
        (torch.full((3, 4, 4), math.nan), "haze", ValueError, r"\[0, 1\]"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), "haze", TypeError, "uint8"),
    ],
)
def test_errors(image: Tensor, task: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        degrade(image, task)


def test_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("imagecodecs")
    pytest.importorskip("tifffile")
    from PIL import Image

    pixels = (torch.rand(20, 30, 3) * 255).byte().numpy()
    Image.fromarray(pixels).save(tmp_path / "clean.png")
    argv = [str(tmp_path / "clean.png"), "--task", "haze", "--seed", "3", "--out"]
    assert degradations.main([*argv, str(tmp_path / "hazy.png")]) == 0
    written = torch.from_numpy(np.array(Image.open(tmp_path / "hazy.png"))).permute(2, 0, 1) / 255
    expected = degrade(torch.from_numpy(pixels).permute(2, 0, 1) / 255, "haze", 3)
    assert (written - expected).abs().max() <= 0.5 / 255 + 1e-6
    with pytest.raises(SystemExit):
        degradations.main([*argv, str(tmp_path / "hazy.docx")])
    assert "hazy.docx" in capsys.readouterr().err
