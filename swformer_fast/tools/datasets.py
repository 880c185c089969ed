"""Where data sets keep degraded pictures and their clean ones.

    pairs("RESIDE/SOTS", "sots", "outdoor")  # [(degraded path, clean path), ...]

Layouts, below a root that may end at the split itself; any suffix of a picture will do, and any case:

- "pairs": `[split/]input` and `target`, or `degraded` and `clean`, or `lq` and `gt`; equal names.
- "rain200": Rain200H, Rain200L and their kin, at any depth of `[split/]` or of a folder whose name holds the split
  (`rain_data_test_Heavy`): `norain-12x2.png` or `rain-12.png` and `norain-12.png`; in folders `rain` (`rainy`, `input`)
  and `norain` (`target`, `gt`) any names whose first number is the same.
- "sots": RESIDE's `[indoor|outdoor/]hazy/1400_1.png` and `clear` (or `gt`) `/1400.png`.
- "gopro": `train|test/SEQUENCE/blur/NAME.png` and `sharp/NAME.png`.
- "lol": `our485` (split "train") or `eval15` (split "test"), in it `low` and `high`; equal names.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import Tensor

from .files import READ, is_hidden

Pairs = list[tuple[Path, Path]]

FOLDERS = (("input", "target"), ("degraded", "clean"), ("lq", "gt"))
RAIN, CLEAN = {"rain", "rainy", "input"}, {"norain", "target", "gt"}
LOL = {"train": "our485", "test": "eval15"}


def pairs(root: str | os.PathLike[str], layout: str, split: str = "test") -> Pairs:
    """Paths of degraded and of clean pictures, in the order of the degraded ones' names.

    Raises ValueError in words: for an unknown layout, a root where nothing lies as it says, degraded pictures that have
    no clean one, and clean ones of one name.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"there is no folder {root}")
    return LAYOUTS[layout](root, split)


def aligned(clean: Tensor, degraded: Tensor, layout: str) -> Tensor:
    """A clean picture (..., H, W) as large as its degraded one.

    RESIDE's clean pictures have a margin around the hazy ones, which goes; any other difference raises ValueError.
    """
    (height, width), sizes = degraded.shape[-2:], clean.shape[-2:]
    margins = (sizes[0] - height, sizes[1] - width)
    if layout == "sots" and margins[0] == margins[1] >= 0 and margins[0] % 2 == 0:
        return clean[..., margins[0] // 2 :, margins[1] // 2 :][..., :height, :width]
    if margins != (0, 0):
        raise ValueError(f"has {width} x {height} pixels, its clean picture {sizes[1]} x {sizes[0]}")
    return clean


# the layouts


def _pairs(root: Path, split: str) -> Pairs:
    tried = [(base / a, base / b) for base in (root / split, root) for a, b in FOLDERS]
    return _matched(*_folders(tried, split), _stem)


def _rain200(root: Path, split: str) -> Pairs:
    named = sorted(path for path in root.glob(f"*{split}*") if path.is_dir())
    base = root / split if (root / split).is_dir() else named[0] if len(named) == 1 else root
    files = _pictures(base, recursive=True)
    rainy = [file for file in files if _is_rainy(file, base)]
    clean = [file for file in files if file not in set(rainy) and _is_clean(file, base)]
    if not rainy or not clean:
        looked = "norain-12x2.png or rain-12.png and norain-12.png, or folders rain and norain"
        raise ValueError(f"{base} holds no pairs: looked for {looked}")
    return _matched(rainy, clean, _number)


def _sots(root: Path, split: str) -> Pairs:
    bases = [root / split, root]
    tried = [(base / "hazy", base / clean) for base in bases for clean in ("clear", "gt")]
    return _matched(*_folders(tried, split), lambda file: _stem(file).partition("_")[0])


def _gopro(root: Path, split: str) -> Pairs:
    base = root / split if (root / split).is_dir() else root
    found: Pairs = []
    for sequence in sorted(path for path in base.iterdir() if path.is_dir()):
        blur, sharp = sequence / "blur", sequence / "sharp"
        if blur.is_dir() and sharp.is_dir():
            found += _matched(_pictures(blur), _pictures(sharp), _stem)
    if not found:
        raise ValueError(f"{base} holds no pairs: looked for SEQUENCE/blur and SEQUENCE/sharp")
    return found


def _lol(root: Path, split: str) -> Pairs:
    bases = [root / LOL.get(split, split), root]
    return _matched(*_folders([(base / "low", base / "high") for base in bases], split), _stem)


LAYOUTS: dict[str, Callable[[Path, str], Pairs]] = {
    "pairs": _pairs,
    "rain200": _rain200,
    "sots": _sots,
    "gopro": _gopro,
    "lol": _lol,
}


# what they share


def _folders(tried: list[tuple[Path, Path]], split: str) -> tuple[list[Path], list[Path]]:
    """The pictures of the first two folders that there are."""
    for degraded, clean in tried:
        if degraded.is_dir() and clean.is_dir():
            return _pictures(degraded), _pictures(clean)
    looked = "; ".join(f"{a} and {b}" for a, b in tried)
    raise ValueError(f"there are no pairs of split {split!r}: looked for {looked}")


def _pictures(folder: Path, recursive: bool = False) -> list[Path]:
    files = folder.rglob("*") if recursive else folder.iterdir()
    return sorted((file for file in files if file.suffix.lower() in READ and not is_hidden(file, folder)), key=_natural)


def _natural(file: Path) -> list[tuple[int, str]]:
    """2.png before 10.png."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", str(file)) if part]


def _matched(degraded: Iterable[Path], clean: Iterable[Path], key: Callable[[Path], str]) -> Pairs:
    partners: dict[str, Path] = {}
    for file in clean:
        other = partners.setdefault(key(file), file)
        if other != file:
            raise ValueError(f"{other} and {file} could both be the clean picture {key(file)!r}")
    files = list(degraded)
    alone = [file for file in files if key(file) not in partners]
    if alone:
        names = ", ".join(str(file) for file in alone[:3]) + (f" and {len(alone) - 3} more" if len(alone) > 3 else "")
        raise ValueError(f"there is no clean picture for {names}")
    if not files:
        raise ValueError("there is no degraded picture")
    return [(file, partners[key(file)]) for file in files]


def _stem(file: Path) -> str:
    return file.stem


def _number(file: Path) -> str:
    """The first number of a name, without leading zeros."""
    numbers = re.findall(r"\d+", file.stem)
    return str(int(numbers[0])) if numbers else file.stem


def _is_rainy(file: Path, base: Path) -> bool:
    if re.fullmatch(r"(norain|rain)-?\d+x\d+|rain-?\d+", file.stem, re.IGNORECASE):
        return True
    return not re.fullmatch(r"norain-?\d+", file.stem, re.IGNORECASE) and _below(file, base, RAIN)


def _is_clean(file: Path, base: Path) -> bool:
    return bool(re.fullmatch(r"norain-?\d+", file.stem, re.IGNORECASE)) or _below(file, base, CLEAN)


def _below(file: Path, base: Path, names: set[str]) -> bool:
    return any(part.lower() in names for part in file.relative_to(base).parts[:-1])
