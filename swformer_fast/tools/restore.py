"""Restore pictures and videos.

  swformer-restore rainy.jpg --task rain-streaks
  swformer-restore holiday/ "more/*.tif" --recursive --task haze --out restored/
  swformer-restore night.mp4 --task low-light --exit small

Pictures of any size, with 8 or 16 bits or floats in [0, 1], keep their bits (in PNG and TIFF), transparency, colour
profile and EXIF; they are turned upright. Videos keep their times and their sound, but no subtitles. What has the name
of an input's result is no input; no other one is ever overwritten, and each result is whole or absent. Ctrl-C and
SIGTERM keep what is done.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path

from ..reference import EXITS
from . import networks
from .files import PICTURES, VIDEOS

EXTRA = "pip install 'sdo-swformer-fast[restore]'"
STATUSES = """\
exit status:
  0 all is done; 1 some files could not be restored, which are listed; 2 nothing was begun; 130 interrupted
"""


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "swformer-restore",
        description=__doc__,
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="files, folders and patterns")
    parser.add_argument("--recursive", action="store_true", help="folders within folders too")
    networks.add_arguments(parser)
    parser.add_argument("--exit", choices=EXITS, help="where the network stops: speed against quality (its last)")
    results = parser.add_argument_group("results")
    results.add_argument("--out", type=Path, metavar="PATH", help="folder, or for one input a file (beside each input)")
    results.add_argument(
        "--suffix", default="_restored", metavar="TEXT", help="what is added to the names (%(default)s)"
    )
    results.add_argument(
        "--format",
        choices=sorted(suffix[1:] for suffix in (*PICTURES, *VIDEOS)),
        metavar="FORMAT",
        help="of pictures or of videos: %(choices)s (the input's; PNG and MKV for those that are read and not written)",
    )
    results.add_argument(
        "--quality", type=networks.positive, default=95, metavar="N", help="of JPEG, WebP and AVIF (%(default)s)"
    )
    existing = results.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace results that exist")
    existing.add_argument("--skip-existing", action="store_true", help="leave out inputs whose results exist")
    results.add_argument("--codec", metavar="NAME", help="of videos (libx264; for WebM libvpx-vp9, for AVI mpeg4)")
    results.add_argument(
        "--crf", type=int, metavar="N", help="constant rate factor of videos: less is better (by codec)"
    )
    parser.add_argument(
        "--max-pixels", type=networks.positive, metavar="N", help="of a picture; more are refused (178956970)"
    )
    return parser


def end_as_interrupt() -> None:
    """SIGTERM, by which batch systems and containers end a program, does what Ctrl-C does."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line()
    args = parser.parse_args(argv)
    end_as_interrupt()
    outcomes: dict[Path, str | None] = {}
    status = 0
    try:
        from . import batch

        jobs = batch.plan(args)
        if not jobs:
            print("nothing to do: every result exists")
            return 0
        load = cache(partial(networks.load, args, args.exit))
        first = load(False)  # what is wrong with it is told before any work
        another = args.dtype == "auto" and first.dtype.itemsize < 4
        batch.run(jobs, lambda image, deep: load(deep and another)(image), args, outcomes)
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is missing: {EXTRA}")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted: what is done is kept", file=sys.stderr)
        status = 130
    failures = {path: reason for path, reason in outcomes.items() if reason is not None}
    print(f"restored {len(outcomes) - len(failures)}, failed {len(failures)}")
    for path, reason in failures.items():
        print(f"{path} {reason}", file=sys.stderr)
    return status or min(1, len(failures))


if __name__ == "__main__":
    sys.exit(main())
