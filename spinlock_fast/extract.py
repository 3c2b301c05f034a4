"""`python -m spinlock_fast.extract FILE... --output FEATURES.h5`: trajectories of any simulation to features."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spinlock_fast.commands.arguments import parser
from spinlock_fast.commands.exit_status import exit_with

_LAYOUTS = ("auto", "well", "pdebench", "pypde", "array")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("extract", "Describes trajectories of any simulation; see docs/trajectories.md.")
    options.add_argument("files", nargs="+", metavar="FILE", help="HDF5, netCDF-4, .npy or Zarr, or globs")
    options.add_argument("--output", required=True, metavar="FEATURES.h5", help="the file of features")
    options.add_argument("--layout", default="auto", choices=_LAYOUTS, help="how the files are arranged (auto)")
    options.add_argument("--dataset", metavar="PATH", help="plain arrays: path of the array in the file or store")
    options.add_argument("--axes", help="plain arrays: letters of the axes, n m t c z y x, e.g. 'n t c y x'")
    options.add_argument("--fields", metavar="A,B", help="fields to read (default: all that change in time)")
    options.add_argument("--spacing", metavar="DX[,DY[,DZ]]", help="distance of neighbouring points")
    options.add_argument("--time-step", type=float, metavar="DT", help="time between states")
    options.add_argument("--periodic", metavar="AXES", help="periodic axes, e.g. xy; '' for none")
    options.add_argument("--parameters", metavar="PATH", help="parameters: dataset of the files, or .csv or .npy file")
    options.add_argument("--initial-fields", action="store_true", help="keep the first states, for predict")
    options.add_argument("--memory-budget", default="1.25GB", help="bytes of decoded fields (1.25GB)")
    options.add_argument("--shard", default="0/1", metavar="I/N", help="only part I (from 0) of N")
    options.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    options.add_argument("--overwrite", action="store_true", help="replace the file, or an unfinished extraction")
    options.add_argument("--resume", action="store_true", help="go on with an unfinished extraction")
    options.add_argument("--quiet", action="store_true", help="print errors and the last line only")
    chosen = options.parse_args(arguments)
    if chosen.overwrite and chosen.resume:
        options.error("--overwrite and --resume exclude each other")
    exit_with(lambda: _extract(chosen), distributed=True)


def _extract(chosen: argparse.Namespace) -> None:
    from spinlock_fast.commands.extract import run_extract

    path = run_extract(chosen)
    sys.stdout.write(f"features: {Path(path)}\n")


if __name__ == "__main__":
    main()
