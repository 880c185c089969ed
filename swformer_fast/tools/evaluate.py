"""Measure a network on a data set of degraded and clean pictures.

  swformer-eval --data Rain200L --layout rain200 --weights derain.pth --exit all --channel y
  swformer-eval --data LOL --layout lol --task low-light --gt-mean --json lol.json --markdown lol.md

Prints the means of PSNR and SSIM, degraded beside restored, and writes those of each picture. Restored pictures are
clipped to [0, 1] and not rounded. SSIM has the Gaussian window of its paper (11 pixels, sigma 1.5, inside the picture).
Ctrl-C and SIGTERM keep what is measured by then.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from ..reference import EXITS
from . import datasets, networks
from .files import check_writable
from .restore import EXTRA, end_as_interrupt

STATUSES = """\
exit status:
  0 all is measured; 1 some pairs could not be, which are listed, or a file not be written; 2 nothing was begun;
  130 interrupted
"""


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "swformer-eval", description=__doc__, epilog=STATUSES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, metavar="ROOT", help="folder of the data set")
    parser.add_argument("--layout", choices=datasets.LAYOUTS, required=True, help="how it lies there")
    parser.add_argument("--split", default="test", help="its part: test, train, indoor, outdoor ... (%(default)s)")
    networks.add_arguments(parser)
    parser.add_argument("--exit", choices=(*EXITS, "all"), help="where the network stops (its last)")
    parser.add_argument("--channel", choices=("rgb", "y"), default="rgb", help="y: BT.601's luma (%(default)s)")
    parser.add_argument(
        "--gt-mean", action="store_true", help="scale restored pictures to the clean ones' mean grey, as low-light does"
    )
    parser.add_argument(
        "--metric", nargs="+", default=[], metavar="NAME", help="others by pyiqa's names: lpips, niqe ..."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for all numbers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="file for tables")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_line()
    args = parser.parse_args(argv)
    end_as_interrupt()
    try:
        from . import measuring

        for path in filter(None, (args.json, args.markdown)):
            check_writable(path)
        pairs = datasets.pairs(args.data, args.layout, args.split)
        last = None if args.exit in (None, "all") else args.exit
        restorer = networks.load(args, last, deep=True)  # for figures that every machine gives
        others = {name: measuring.by_pyiqa(name, next(restorer.model.parameters()).device) for name in args.metric}
    except ModuleNotFoundError as error:
        parser.error(f"{error.name} is missing: {'pip install pyiqa' if error.name == 'pyiqa' else EXTRA}")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        return 130
    exits = EXITS[: EXITS.index(restorer.model.exit) + 1] if args.exit == "all" else (restorer.model.exit,)
    results = measuring.Results(args, exits)
    with contextlib.suppress(KeyboardInterrupt):
        results.measure(pairs, restorer, others)
    print(results.summary())
    for name, reason in results.failed.items():
        print(f"{name} {reason}", file=sys.stderr)
    if not results.complete:
        print(f"interrupted: {len(results.images)} of {len(pairs)} pairs are measured", file=sys.stderr)
    try:
        results.write()
    except OSError as error:
        print(f"not written: {error}", file=sys.stderr)
        return 1
    if not results.complete:
        return 130
    return 1 if results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
