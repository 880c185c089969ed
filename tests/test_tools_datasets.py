"""Where data sets keep their pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from swformer_fast.tools import datasets


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def found(root: Path, layout: str, split: str = "test") -> list[tuple[str, str]]:
    return [tuple(str(p.relative_to(root)) for p in pair) for pair in datasets.pairs(root, layout, split)]


@pytest.mark.parametrize("split", ["", "test/"])
@pytest.mark.parametrize(("degraded", "clean"), datasets.FOLDERS)
def test_pairs_of_equal_names(degraded: str, clean: str, split: str, tmp_path: Path) -> None:
    names = [f"{split}{folder}/{name}" for folder in (degraded, clean) for name in ("10.png", "2.png")]
    make(tmp_path, *names, f"{split}{degraded}/notes.txt", f"{split}{clean}/3.png", f"{split}{degraded}/.hidden.png")
    expected = [(f"{split}{degraded}/{name}", f"{split}{clean}/{name}") for name in ("2.png", "10.png")]
    assert found(tmp_path, "pairs") == expected


def test_pairs_may_differ_in_suffix(tmp_path: Path) -> None:
    make(tmp_path, "input/a.JPG", "target/a.png")
    assert found(tmp_path, "pairs") == [("input/a.JPG", "target/a.png")]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["norain-1x2.png", "norain-1.png"], ("norain-1x2.png", "norain-1.png")),
        (["test/rain/X2/norain-001x2.png", "test/norain/norain-1.png"],) * 2,
        (["rain_data_test_Heavy/rain/X2/norain-7x2.png", "rain_data_test_Heavy/norain/norain-7.png"],) * 2,
        (["test/rain-012.png", "test/norain-012.png"],) * 2,
        (["rainy/12.png", "gt/12.png"],) * 2,
        (["test/input/3.png", "test/target/3.png"],) * 2,
        (["test/rain/norain-3.png", "test/norain/norain-3x.png"], None),
    ],
)
def test_rain200(files: list[str], expected: tuple[str, str] | None, tmp_path: Path) -> None:
    make(tmp_path, *files)
    if expected is None:
        with pytest.raises(ValueError, match="looked for"):
            found(tmp_path, "rain200")
    else:
        assert found(tmp_path, "rain200") == [tuple(expected)]


def test_rain200_in_the_order_of_numbers(tmp_path: Path) -> None:
    for n in (10, 2, 1):
        make(tmp_path, f"test/rain/X2/norain-{n}x2.png", f"test/norain/norain-{n}.png", f"train/norain-{n}.png")
    make(tmp_path, "test/.thumbnails/norain-3x2.png")
    assert [clean for _, clean in found(tmp_path, "rain200")] == [f"test/norain/norain-{n}.png" for n in (1, 2, 10)]


@pytest.mark.parametrize("clean", ["clear", "gt"])
def test_sots(clean: str, tmp_path: Path) -> None:
    make(tmp_path, *(f"indoor/hazy/1400_{i}.png" for i in (1, 2, 10)), f"indoor/{clean}/1400.png")
    make(tmp_path, "outdoor/hazy/0001_0.8_0.2.jpg", "outdoor/gt/0001.png")
    expected = [(f"indoor/hazy/1400_{i}.png", f"indoor/{clean}/1400.png") for i in (1, 2, 10)]
    assert found(tmp_path, "sots", "indoor") == expected
    assert found(tmp_path / "outdoor", "sots") == [("hazy/0001_0.8_0.2.jpg", "gt/0001.png")]


def test_gopro(tmp_path: Path) -> None:
    for sequence in ("GOPR0384_11_00", "GOPR0385_11_01"):
        make(tmp_path, *(f"test/{sequence}/{kind}/000001.png" for kind in ("blur", "blur_gamma", "sharp")))
    make(tmp_path, "train/GOPR0372_07_00/blur/000047.png", "train/GOPR0372_07_00/sharp/000047.png")
    pair = ("test/GOPR0384_11_00/blur/000001.png", "test/GOPR0384_11_00/sharp/000001.png")
    assert found(tmp_path, "gopro") == [pair, tuple(name.replace("0384_11_00", "0385_11_01") for name in pair)]
    assert len(found(tmp_path, "gopro", "train")) == 1


def test_lol(tmp_path: Path) -> None:
    make(tmp_path, "our485/low/2.png", "our485/high/2.png", "eval15/low/1.png", "eval15/high/1.png")
    assert found(tmp_path, "lol") == [("eval15/low/1.png", "eval15/high/1.png")]
    assert found(tmp_path, "lol", "train") == [("our485/low/2.png", "our485/high/2.png")]
    assert found(tmp_path, "lol", "our485") == found(tmp_path, "lol", "train")
    assert found(tmp_path / "eval15", "lol") == [("low/1.png", "high/1.png")]


@pytest.mark.parametrize(
    ("layout", "files", "words"),
    [
        (
            "pairs",
            ["input/a.png"],
            "there are no pairs of split 'test': looked for .*input and .*target; ",
        ),
        ("pairs", ["input/a.png", "target/b.png"], "there is no clean picture for .*a.png"),
        ("pairs", ["lq/1.png", "lq/2.png", "lq/3.png", "lq/4.png", "lq/5.png", "gt/6.png"], "3.png and 2 more"),
        ("pairs", ["input/a.txt", "target/a.png"], "there is no degraded picture"),
        ("pairs", ["input/a.png", "target/a.png", "target/a.jpg"], "could both be the clean picture 'a'"),
        ("rain200", ["x.png"], "looked for norain-12x2.png"),
        ("sots", ["hazy/1_1.png"], "looked for .*hazy and .*clear"),
        ("gopro", ["test/x/blur/1.png"], "looked for SEQUENCE/blur and SEQUENCE/sharp"),
        ("lol", ["low/1.png"], "looked for .*eval15/low and .*eval15/high"),
        ("lsun", [], "layout must be one of pairs, rain200, sots, gopro, lol, got 'lsun'"),
    ],
)
def test_errors_say_what_was_looked_for(layout: str, files: list[str], words: str, tmp_path: Path) -> None:
    make(tmp_path, *files)
    with pytest.raises(ValueError, match=words):
        datasets.pairs(tmp_path, layout)
    with pytest.raises(ValueError, match=r"layout|there is no folder"):
        datasets.pairs(tmp_path / "missing", layout)


def test_margins_of_clean_pictures() -> None:
    degraded, clean = torch.rand(3, 20, 30), torch.rand(3, 40, 50)
    assert torch.equal(datasets.aligned(clean, degraded, "sots"), clean[:, 10:30, 10:40])
    assert datasets.aligned(degraded, degraded, "pairs") is degraded
    with pytest.raises(ValueError, match="has 30 x 20 pixels, its clean picture 50 x 40"):
        datasets.aligned(clean, degraded, "pairs")
    with pytest.raises(ValueError, match="its clean picture 30 x 40"):
        datasets.aligned(clean[..., :30], degraded, "sots")
