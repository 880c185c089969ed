"""Which file each input becomes, and the work."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from PIL import features
from torch import Tensor
from tqdm.auto import tqdm

from .._files import replacing
from . import pictures
from .files import PICTURES, VIDEOS, Found, check_writable, expand, is_video


class Job(NamedTuple):
    source: Path
    target: Path


def plan(args: argparse.Namespace) -> list[Job]:
    """What the command line asks for, checked before any work.

    Raises ValueError or OSError in words: for an input that is missing, a result that cannot be written, would be
    another's too, or would replace an input or, unless asked for, a file.
    """
    found = expand(args.inputs, args.recursive)
    if not found:
        raise ValueError(f"there is no picture or video in {', '.join(args.inputs)}")
    if args.quality > 100:
        raise ValueError(f"--quality must be at most 100, got {args.quality}")
    as_file = args.out is not None and args.out.suffix.lower() in (*PICTURES, *VIDEOS) and not args.out.is_dir()
    if as_file:
        if len(found) > 1:
            raise ValueError(f"--out {args.out} is one file for {len(found)} inputs: give a folder")
        jobs = [Job(found[0].path, args.out)]
    else:
        if args.out is not None and args.out.suffix and len(found) == 1 and not args.out.is_dir():
            raise ValueError(f"--out {args.out} must end in {', '.join((*PICTURES, *VIDEOS))}, or be a folder")
        jobs = _without_results([Job(file.path, _target(file, args)) for file in found], args)
    _check(jobs, args)
    return [job for job in jobs if not (args.skip_existing and job.target.exists())]


def _target(file: Found, args: argparse.Namespace) -> Path:
    folder = file.path.parent if args.out is None else args.out / file.below
    return folder / f"{file.path.stem}{args.suffix}{_suffix(file.path, args.format)}"


def _suffix(path: Path, asked: str | None) -> str:
    """That of the result: what is asked for, if it is of this kind, or the input's own where that is written."""
    kind, other = (VIDEOS, ".mkv") if is_video(path) else (PICTURES, ".png")
    if asked is not None and f".{asked}" in kind:
        return f".{asked}"
    return path.suffix if path.suffix.lower() in kind else other


def _without_results(jobs: list[Job], args: argparse.Namespace) -> list[Job]:
    """An earlier run's results are no inputs, where they lie among them."""
    places = [(job.source.resolve(), job.target.resolve()) for job in jobs]
    results = {
        target
        for source, target in places
        # Beside its source and without a suffix a picture may as well be another one, which is not replaced.
        if target != source and (args.suffix or args.skip_existing or target.parent != source.parent)
    }
    return [job for job, (source, _) in zip(jobs, places, strict=True) if source not in results]


def _check(jobs: list[Job], args: argparse.Namespace) -> None:
    sources: dict[Path, Path] = {}
    for source, target in jobs:
        if is_video(source) != is_video(target):
            raise ValueError(f"{source} cannot become {target}: the one is a video, the other a picture")
        if target.suffix.lower() == ".avif" and not features.check("avif"):
            raise ValueError(f"this Pillow writes no AVIF, as {target} would be")
        if target.exists() and target.samefile(source):
            raise ValueError(f"{target} would replace an input: give --suffix or --out")
        other = sources.setdefault(target.resolve(), source)
        if other != source:
            raise ValueError(f"{other} and {source} would both become {target}: restore one in a run of its own")
    inputs = {source.resolve() for source, _ in jobs}
    for target in sources:
        if target in inputs:
            raise ValueError(f"{target} would replace an input: give --suffix or --out")
    existing = [job.target for job in jobs if job.target.exists()]
    if existing and not (args.overwrite or args.skip_existing):
        more = f" and {len(existing) - 1} more" if len(existing) > 1 else ""
        raise ValueError(f"{existing[0]}{more} exist: --overwrite replaces them, --skip-existing leaves them")
    for _, target in jobs:
        check_writable(target)
        if is_video(target):
            from .video import codec_for

            codec_for(target, args.codec)


def run(
    jobs: Iterable[Job],
    restore: Callable[[Tensor, bool], Tensor],
    args: argparse.Namespace,
    outcomes: dict[Path, str | None],
) -> None:
    """Restore one after another, and say of each input why it could not be; None: it is done.

    `restore` takes an image (3, H, W) and whether it has more than eight bits.
    """
    bar = tqdm(jobs, unit="file", disable=None)
    for source, target in bar:
        bar.set_postfix_str(source.name)
        try:
            with replacing(target) as partial:
                if is_video(source):
                    from .video import restore_video

                    restore_video(restore, source, partial, args.codec, args.crf)
                else:
                    picture = pictures.read(source, args.max_pixels or pictures.MAX_PIXELS)
                    pictures.check_alpha(picture, target)
                    restored = restore(picture.rgb(), picture.dtype != "uint8")
                    pictures.write(picture.restored(restored), partial, args.quality)
            outcomes[source] = None
        except Exception as error:  # whatever a library says of a damaged file
            outcomes[source] = _sentence(error)


def _sentence(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return "needs more memory than there is: give a smaller --tile"
    if type(error) is ValueError and lines:
        return lines[0]
    return f"cannot be restored: {lines[0] if lines else type(error).__name__}"
