"""Errors of a trained model on the splits of its dataset."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.cli.arguments import evaluate_parser
from crystalframer_jax.cli.common import parsed, reporting_errors
from crystalframer_jax.config import ConfigError
from crystalframer_jax.data.datasets import open_dataset, open_dataset_of_run
from crystalframer_jax.data.records import DataError
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import check_replaceable
from crystalframer_jax.inference.ensemble import Ensemble, load_model
from crystalframer_jax.inference.evaluation import Predictions
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.reporting.metrics import mean_predictor_errors, regression_metrics
from crystalframer_jax.reporting.predictions import figure_files, plot_calibration, plot_parity, write_predictions
from crystalframer_jax.reporting.suspects import suspect_labels, write_suspects
from crystalframer_jax.runs.run_directory import warn
from crystalframer_jax.text import table


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """Is scripts/evaluate.py."""
    return run(parsed(evaluate_parser("evaluate.py", model_first=True), argv))


@reporting_errors()
def run(arguments: argparse.Namespace) -> int:
    """Prints the errors of a trained model or an ensemble on a split of its dataset."""
    for file, beginning in ((arguments.output, b"id,target"), (arguments.suspects, b"split,id,formula")):
        if file:
            check_replaceable(file.expanduser(), beginning)
    model = load_model(arguments.model, arguments.weights)
    if arguments.suspects and not isinstance(model, Ensemble):
        raise ConfigError(f"--suspects needs the models of an ensemble to agree, and {arguments.model} is one model")
    dataset = dataset_of(model, arguments.model, arguments.data_dir)
    indices = dataset.splits[arguments.split]
    predictions = model.predict_dataset(dataset, indices, arguments.num_frame_samples)
    over = model.spread_over(arguments.num_frame_samples)
    print(model.origin)
    print(error_table(model.targets, dataset, arguments.split, predictions, over))
    if arguments.output:
        ids, labels = dataset.table.ids[indices], dataset.labels[indices]
        spread = predictions.spread if over else None
        write_predictions(arguments.output, ids, labels, predictions.value, model.targets, spread)
        print(f"wrote {arguments.output}")
    if arguments.suspects and isinstance(model, Ensemble):
        samples = model.predict_splits(dataset, arguments.num_frame_samples)
        suspects = suspect_labels(dataset, samples, model.targets)
        write_suspects(arguments.suspects, suspects)
        print(f"wrote {arguments.suspects}, {len(suspects):,} labels that all models agree against")
    if arguments.plot:
        for file in plot_errors(arguments.plot, model, dataset, arguments.split, predictions):
            print(f"wrote {file}")
    return 0


def dataset_of(model: Predictor | Ensemble, run: str, data_dir: str = "") -> Dataset:
    """Opens the dataset that a model was trained on; ConfigError if it is not known here.

    What is missing is computed in `data_dir` or, without it, in the user's cache folder, never where the run says.
    Other data under that name, whose test crystals may have been in training, are a warning if they are of `data_dir`,
    a DataError otherwise.
    """
    config = model.config
    if not config.target_set:
        raise ConfigError(
            f"{run} was imported without a dataset known here, so there is nothing to evaluate it on; "
            "predict structure files, or import it again with --target_set and --targets"
        )
    if data_dir:
        dataset = open_dataset(config.target_set, config.targets, model.cutoff, data_dir)
    else:
        dataset = open_dataset_of_run(config.target_set, config.targets, model.cutoff, config.data_dir)
    members = model.members if isinstance(model, Ensemble) else (model,)
    if others := {member.data_digest for member in members} - {"", dataset.digest}:
        what = (
            f"{run} was trained on other data under the name {dataset.name} ({', '.join(sorted(others))}, here "
            f"{dataset.digest}), so crystals of a split may have been in its training"
        )
        if not data_dir:
            raise DataError(f"{what}; name the folder of its data, or of those to evaluate it on anyway, by --data_dir")
        warn(what)
    return dataset


def error_table(
    targets: tuple[TargetStatistics, ...], dataset: Dataset, split: str, predictions: Predictions, over: str
) -> str:
    """Tells the errors of predictions for a split, a line for each target; `over`: what their spread is over, if any.

    If crystals of the split are also in training, further lines are without them.
    """
    rows = dataset.splits[split]
    kinds = {"": np.ones(len(rows), bool)}
    leaked = np.isin(rows, dataset.leaked)
    if leaked.any():
        kinds[", without leaks"] = ~leaked
    header = [f"{dataset.name}, {split}", "unit", "crystals", "MAE", "RMSE", "R2", "mean predictor"]
    header += [f"mean std over {over}"] if over else []
    lines = []
    for kind, chosen in kinds.items():
        labels = dataset.labels[rows[chosen]]
        metrics = regression_metrics(predictions.value[chosen], labels, targets)
        baseline = mean_predictor_errors(labels, targets, dataset.labels[dataset.splits["train"]])
        for t, s in enumerate(targets):
            known = np.isfinite(labels[:, t])
            line = [s.name + kind, s.unit or None, int(known.sum()), *metrics[s.name].values(), baseline[s.name]]
            spread = predictions.spread[chosen][known, t]
            lines.append([*line, *([float(spread.mean()) if spread.size else None] if over else [])])
    return table(header, lines)


def plot_errors(
    file: Path, model: Predictor | Ensemble, dataset: Dataset, split: str, predictions: Predictions
) -> list[Path]:
    """Plots the parity of a single model, the calibration of an ensemble; returns the files written."""
    for figure in figure_files(file, model.targets) if isinstance(model, Ensemble) else [file]:
        check_replaceable(figure, b"\x89PNG")
    file.parent.mkdir(parents=True, exist_ok=True)
    labels = dataset.labels[dataset.splits[split]]
    not_finite = int((~np.isfinite(predictions.value)).any(axis=1).sum())
    if not_finite:
        raise UserError(f"{file} is not drawn: {not_finite} of {len(labels)} predictions are not finite")
    if isinstance(model, Ensemble):
        return plot_calibration(file, labels, *predictions, model.targets)[0]
    plot_parity(file, labels, predictions.value, model.targets, split)
    return [file]
