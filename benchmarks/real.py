"""Accuracy on real defect photographs: fastbgad's methods beside a Gaussian and what a user would pick instead.

    python benchmarks/real.py --data DIR                      do the runs that --out lacks; one line per run
    python benchmarks/real.py --data DIR --dry-run            list what is missing
    python benchmarks/real.py --data DIR --convergence        accuracy against passes and seconds, for BGAD
    python benchmarks/real.py --page                          collect --out; write benchmarks/REAL.md and its plots
    python benchmarks/real.py --page --check                  exit status 1 if the page does not fit the kept figures

DIR holds categories in the layout of MVTec AD, itself or up to two folders deep. Every category is split once per seed,
for all contenders alike: 10 known anomalies (at most half of the anomalous images) leave the test. Peers are run by
anomalib on the same images and the same backbone. Results are files written whole: interrupt the command at any time
and start it again, or start several on the same --out. A run that fails is named at the end; exit status 1 then.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

FEATURES = ("gabor", "lite0")


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    from real_sets.grid import METHODS

    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = made.add_argument_group("what to run")
    what.add_argument("--data", type=Path, help="folder of the categories")
    what.add_argument("--out", type=Path, default=Path("runs/real"), help="folder of the results (%(default)s)")
    what.add_argument("--categories", nargs="+", metavar="NAME", help="some of the categories instead of all")
    what.add_argument("--methods", nargs="+", metavar="NAME", help=f"some of {', '.join(METHODS)}")
    what.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="of split and training (0 1 2; with --convergence 0)"
    )
    what.add_argument(
        "--features",
        nargs="+",
        default=list(FEATURES),
        metavar="NAME",
        help="gabor, lite0, lite2 or a timm backbone, whose features are whitened; with -channel standardized channel "
        "by channel, with -raw left as they are, with -sharp not averaged over neighbors (gabor lite0)",
    )
    what.add_argument("--image-size", nargs="+", type=int, default=[256], metavar="PIXELS", help="side (256)")
    what.add_argument(
        "--schedule",
        nargs="+",
        default=["demo"],
        choices=["demo", "short", "official"],
        help="of fastbgad's methods: a preset of 8 or of 24 passes, or the paper's 200 (demo)",
    )
    what.add_argument(
        "--peer-epochs",
        type=int,
        default=20,
        metavar="N",
        help="of CFA and SuperSimpleNet, whose authors take 30 and 300 (%(default)s)",
    )
    what.add_argument("--only", default="", metavar="TEXT", help="runs whose result's path contains this")
    how = made.add_argument_group("how")
    how.add_argument(
        "--weights",
        default="package",
        help="of timm backbones: package (those of a Python package), random, pretrained (the hub's) or a .safetensors "
        "file, in whose name {features} stands for lite0, lite2, ... (%(default)s)",
    )
    how.add_argument("--threads", type=int, help="threads of the arithmetic, one loader beside (PyTorch's choice)")
    how.add_argument("--dry-run", action="store_true", help="list the missing runs and end")
    how.add_argument("--convergence", action="store_true", help="instead: BGAD measured after every meta epoch")
    how.add_argument("--passes", type=int, default=16, metavar="N", help="of a convergence run (%(default)s)")
    page = made.add_argument_group("the page")
    page.add_argument("--page", action="store_true", help="collect the results of --out and write the page")
    page.add_argument("--check", action="store_true", help="with --page: write nothing, compare")
    page.add_argument("--name", default="accuracy", help="of the file of kept figures (%(default)s)")
    page.add_argument("--folder", type=Path, default=HERE, help="where REAL.md, plots/ and results/real/ belong")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 for failed runs or an old page, 2 for what the user has to change first."""
    options = parser().parse_args(arguments)
    if options.threads is not None:
        # Before torch is imported: its libraries read it once.
        os.environ["OMP_NUM_THREADS"] = str(options.threads)
    from real_sets.command import run_command, write_page

    from fastbgad.errors import FastBGADError, InterruptedTraining

    try:
        return write_page(options) if options.page else run_command(options)
    except (KeyboardInterrupt, InterruptedTraining):
        print(f"interrupted; results so far are kept in {options.out}: the same command resumes", file=sys.stderr)
        return 130
    except FastBGADError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
