"""Which files are pictures and videos, and what a command line names."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple


class Format(NamedTuple):
    name: str
    """Pillow's."""
    dtypes: tuple[str, ...]
    """Of the pixels that it holds."""
    alpha: bool


PICTURES = {
    ".png": Format("PNG", ("uint8", "uint16"), True),
    ".tif": Format("TIFF", ("uint8", "uint16", "float32"), True),
    ".tiff": Format("TIFF", ("uint8", "uint16", "float32"), True),
    ".jpg": Format("JPEG", ("uint8",), False),
    ".jpeg": Format("JPEG", ("uint8",), False),
    ".webp": Format("WEBP", ("uint8",), True),
    ".avif": Format("AVIF", ("uint8",), True),
    ".bmp": Format("BMP", ("uint8",), False),
    ".ppm": Format("PPM", ("uint8",), False),
}
"""Pictures that are written, by suffix."""

READ = {*PICTURES, ".apng", ".gif", ".jfif", ".jp2", ".jpe", ".pbm", ".pgm", ".pnm", ".tga"}
"""Suffixes that are looked for in folders. A picture that is named itself may have any that Pillow reads."""

VIDEOS = {".mp4": "libx264", ".mov": "libx264", ".mkv": "libx264", ".avi": "mpeg4", ".webm": "libvpx-vp9"}
"""Videos that are written, and the codec of each."""

READ_VIDEOS = {*VIDEOS, ".3gp", ".flv", ".m2ts", ".m4v", ".mpeg", ".mpg", ".mts", ".vob", ".wmv"}


class Found(NamedTuple):
    path: Path
    below: Path
    """Its folder relative to the folder that was named."""


def is_video(path: Path) -> bool:
    return path.suffix.lower() in READ_VIDEOS


def expand(names: Iterable[str], recursive: bool = False) -> list[Found]:
    """The files that names of files, folders and patterns stand for, each once, in order.

    Raises FileNotFoundError for a name or a pattern that nothing has.
    """
    found: dict[Path, Found] = {}
    for name in names:
        for path in _matches(name):
            for file in _within(path, recursive) if path.is_dir() else [Found(path, Path())]:
                found.setdefault(file.path.resolve(), file)
    return list(found.values())


def _matches(name: str) -> list[Path]:
    if os.path.exists(name):
        return [Path(name)]
    matches = sorted(glob.glob(name, recursive=True))
    if not matches:
        kind = "no file matches the pattern" if glob.has_magic(name) else "there is no file or folder"
        raise FileNotFoundError(f"{kind} {name}")
    return [Path(match) for match in matches]


def _within(folder: Path, recursive: bool) -> list[Found]:
    files = sorted(folder.rglob("*") if recursive else folder.iterdir())
    known = {*READ, *READ_VIDEOS}
    return [
        Found(file, file.relative_to(folder).parent)
        for file in files
        if file.suffix.lower() in known and not is_hidden(file, folder) and file.is_file()
    ]


def is_hidden(file: Path, folder: Path) -> bool:
    """Whether its name or that of a folder on the way to it begins with a dot."""
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def check_writable(path: Path) -> None:
    """Make the folder of a file to write; raises ValueError or OSError where the file cannot be."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{path.parent} is not writable")
