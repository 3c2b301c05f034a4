"""`python -m spinlock_fast.predict train|eval|apply ...`: tokens from parameters and initial fields."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from spinlock_fast.commands.arguments import add_device, add_quiet, parser
from spinlock_fast.commands.exit_status import exit_with


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options = parser("predict", "Predicts tokens from the parameters and initial fields of simulations.")
    actions = options.add_subparsers(dest="action", required=True, metavar="train|eval|apply")
    train = actions.add_parser("train", help="train a predictor of the tokens of a checkpoint")
    train.add_argument("checkpoint", help="checkpoint directory of the tokenizer")
    train.add_argument("data", help="HDF5 file or glob with features, parameters and initial fields")
    train.add_argument("--output", required=True, metavar="DIR", help="directory of the predictor")
    train.add_argument("--config", metavar="YAML", help="settings; see --set")
    train.add_argument(
        "--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help="e.g. num_epochs=5"
    )
    kept = train.add_mutually_exclusive_group()
    kept.add_argument("--resume", action="store_true", help="continue an interrupted training in DIR")
    kept.add_argument("--overwrite", action="store_true", help="replace an earlier predictor in DIR")
    evaluate = actions.add_parser("eval", help="measure a predictor on a file with features")
    apply = actions.add_parser("apply", help="write the predicted tokens of a file without features")
    for action in (evaluate, apply):
        action.add_argument("predictor", help="directory of the predictor")
        action.add_argument("data", help="HDF5 file or glob")
    evaluate.add_argument("--json", metavar="FILE", help="write the metrics")
    apply.add_argument("--output", required=True, metavar="FILE", help=".csv, .npy, .parquet or HDF5 (other endings)")
    for action in (train, evaluate, apply):
        add_device(action)
        add_quiet(action)
    chosen = options.parse_args(arguments)
    exit_with(lambda: _predict(chosen))


def _predict(chosen: argparse.Namespace) -> None:
    from spinlock_fast.commands import prediction

    {"train": prediction.train, "eval": prediction.measure, "apply": prediction.apply}[chosen.action](chosen)


if __name__ == "__main__":
    main()
