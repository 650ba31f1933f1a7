"""Errors of a trained model on the splits of its dataset."""

import argparse
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crystalframer_jax.batching.table import table_of
from crystalframer_jax.batching.targets import TargetStatistics, check_transform
from crystalframer_jax.cli.arguments import DEFAULT_MODEL, evaluate_parser
from crystalframer_jax.cli.common import parsed, reporting_errors, tell
from crystalframer_jax.cli.inputs import read_all
from crystalframer_jax.cli.predict import label_fields, model_of
from crystalframer_jax.config import ConfigError
from crystalframer_jax.data.datasets import open_dataset, open_dataset_of_run, prepared_sets, target_names
from crystalframer_jax.data.records import DataError, Target
from crystalframer_jax.data.registry import TARGET_SETS
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.data.store import Dataset, data_folder
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import check_replaceable
from crystalframer_jax.inference.ensemble import Ensemble
from crystalframer_jax.inference.evaluation import Predictions
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.inference.pretraining import pretraining_of, starts_of
from crystalframer_jax.reporting.breakdown import breakdown, errors_by_element
from crystalframer_jax.reporting.metrics import mean_predictor_errors, metrics_for, target_metrics
from crystalframer_jax.reporting.predictions import figure_files, plot_calibration, plot_predictions, write_predictions
from crystalframer_jax.reporting.suspects import suspect_labels, write_suspects
from crystalframer_jax.runs.run_directory import warn
from crystalframer_jax.text import table

NO_LABEL = "-"  # in place of a field, for a target without labels


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """Is scripts/evaluate.py."""
    return run(parsed(evaluate_parser("evaluate.py", model_first=True), argv))


@reporting_errors()
def run(arguments: argparse.Namespace) -> int:
    """Prints the errors of a trained model or an ensemble on a split of its dataset."""
    for file, beginning in ((arguments.output, b"id,target"), (arguments.suspects, b"split,id,formula")):
        if file:
            check_replaceable(file.expanduser(), beginning)
    model = model_of(arguments)
    if arguments.suspects and not isinstance(model, Ensemble):
        raise ConfigError(f"--suspects needs the models of an ensemble to agree, and {arguments.model} is one model")
    dataset, given_errors = data_of(model, arguments)
    dataset = with_pretraining_leaks(model, dataset, arguments.split)
    if arguments.exclude_leaked:
        dataset = without_leaks(dataset, arguments.split)
    indices = dataset.splits[arguments.split]
    predictions = model.predict_dataset(dataset, indices, arguments.num_frame_samples)
    over = model.spread_over(arguments.num_frame_samples)
    print(model.origin)
    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # of targets without any label
        print(error_table(model.targets, dataset, arguments.split, predictions, over))
    if arguments.details:
        print("\n" + breakdown(dataset.table, indices, predictions.value, dataset.labels[indices], model.targets))
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
    if arguments.plot_elements:
        for file in plot_elements(arguments.plot_elements, model, dataset, arguments.split, predictions):
            print(f"wrote {file}")
    tell(given_errors)
    return 1 if given_errors else 0


def data_of(model: Predictor | Ensemble, arguments: argparse.Namespace) -> tuple[Dataset, list[str]]:
    """Opens the crystals to evaluate on, with a line for each that could not be used: see `arguments.data`.

    A set that is known or prepared, files with labels (which are in every split), or the data of the training.
    """
    fields, names = label_fields(model, arguments.labels), arguments.data
    errors: list[str] = []
    if not names:
        if not arguments.model:
            raise ConfigError(f"{DEFAULT_MODEL} comes without its data: name a target set, or files with labels")
        if arguments.labels:
            raise ConfigError("--labels is for other data than those of the training: name a target set or files")
        dataset = dataset_of(model, arguments.model, arguments.data_dir)
    elif len(names) == 1 and not Path(names[0]).exists() and is_set(names[0], arguments.data_dir):
        dataset = other_set(model, names[0], arguments)
    else:
        dataset, errors = dataset_of_files(model, names, fields)
    labelled = np.flatnonzero(np.isfinite(dataset.labels).any(axis=1))
    return dataclasses.replace(dataset, splits={**dataset.splits, "all": labelled}), errors


def other_set(model: Predictor | Ensemble, name: str, arguments: argparse.Namespace) -> Dataset:
    """Opens a target set that has labels of at least one target of a model; those of the others are unknown."""
    known = target_names(name, arguments.data_dir)
    fields = arguments.labels or tuple(s.name if s.name in known else NO_LABEL for s in model.targets)
    chosen = [t for t, field in enumerate(fields) if field != NO_LABEL]
    if not chosen:
        raise ConfigError(f"{name} has labels of none of the targets ({', '.join(known)}); name them by --labels")
    dataset = open_dataset(name, tuple(fields[t] for t in chosen), model.cutoff, arguments.data_dir)
    for t, target in zip(chosen, dataset.targets, strict=True):
        if target.unit != model.targets[t].unit and target.unit and model.targets[t].unit:
            raise ConfigError(f"{name} has {target.name} in {target.unit}, the model predicts {model.targets[t].unit}")
    labels = np.full((len(dataset.table), len(fields)), np.nan)
    labels[:, chosen] = dataset.labels
    targets = tuple(Target(field, field, s.unit) for field, s in zip(fields, model.targets, strict=True))
    return dataclasses.replace(dataset, labels=labels, targets=targets)


def dataset_of_files(
    model: Predictor | Ensemble, files: Sequence[str], fields: tuple[str, ...]
) -> tuple[Dataset, list[str]]:
    """Makes a data set of the crystals with labels that files hold; all of them are in every split."""
    found, errors = read_all(files, [model.cutoff], fields)
    read = [one for one in found if np.isfinite(one.labels).any()]
    if not read:
        first = f" ({errors[0]})" if errors else ""
        raise DataError(f"no crystal has a label {' or '.join(fields)}; name the fields by --labels{first}")
    rows = np.arange(len(read))
    dataset = Dataset(
        name=files[0] if len(files) == 1 else f"{len(files)} files",
        table=table_of([one.crystal for one in read], model.cutoff),
        targets=tuple(Target(name, name, s.unit) for name, s in zip(fields, model.targets, strict=True)),
        labels=np.array([one.labels for one in read]),
        splits=dict.fromkeys(SPLITS, rows),
        leaked=np.zeros(0, int),
        digest="",
    )
    return dataset, errors


def is_set(name: str, data_dir: str) -> bool:
    """Tells whether a target set of that name is known or prepared."""
    return name in TARGET_SETS or name in prepared_sets(data_folder(data_dir))


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


def with_pretraining_leaks(model: Predictor | Ensemble, dataset: Dataset, split: str) -> Dataset:
    """Adds the crystals of a split to the leaks that a model of the package was trained on; tells how many."""
    rows = dataset.splits[split]
    found = pretraining_of(starts_of(model), dataset, rows, f"{split} crystals of {dataset.name}")
    if found.told:
        warn(f"{found.told}: errors on them are those of training; --exclude_leaked leaves them out")
    return dataclasses.replace(dataset, leaked=np.union1d(dataset.leaked, rows[found.seen]))


def without_leaks(dataset: Dataset, split: str) -> Dataset:
    """Leaves the leaks out of a split; DataError if nothing else is in it."""
    rows = dataset.splits[split]
    kept = rows[~np.isin(rows, dataset.leaked)]
    print(f"{len(rows) - len(kept):,} of {len(rows):,} {split} crystals are left out: they were also in training")
    if not len(kept):
        raise DataError(
            f"{dataset.name}: no {split} crystal is left; evaluate on other data, or without --exclude_leaked"
        )
    return dataclasses.replace(dataset, splits=dataset.splits | {split: kept})


def error_table(
    targets: tuple[TargetStatistics, ...], dataset: Dataset, split: str, predictions: Predictions, over: str
) -> str:
    """Tells the errors of predictions for a split, a line for each target; `over`: what their spread is over, if any.

    If crystals of the split are also in training, further lines are without them.
    """
    rows = dataset.splits[split]
    for s, column in zip(targets, dataset.labels[rows].T, strict=True):
        if s.is_class:  # as those that it was trained on
            check_transform(s.name, s.transform, dataset.table.ids[rows], column)
    kinds = {"": np.ones(len(rows), bool)}
    leaked = np.isin(rows, dataset.leaked)
    if leaked.any():
        kinds[", without leaks"] = ~leaked
    header = [f"{dataset.name}, {split}", "unit", "crystals", *metrics_for(targets).titles.values(), "mean predictor"]
    header += [f"mean std over {over}"] if over else []
    lines = []
    for kind, chosen in kinds.items():
        labels = dataset.labels[rows[chosen]]
        metrics = target_metrics(predictions.value[chosen], labels, targets)
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
    """Plots the parity of a single model, the calibration of an ensemble, or ROC curves; returns the files written."""
    is_calibration = isinstance(model, Ensemble) and metrics_for(model.targets).task == "regression"
    for figure in figure_files(file, model.targets) if is_calibration else [file]:
        check_replaceable(figure, b"\x89PNG")
    file.parent.mkdir(parents=True, exist_ok=True)
    labels = dataset.labels[dataset.splits[split]]
    not_finite = int((~np.isfinite(predictions.value)).any(axis=1).sum())
    if not_finite:
        raise UserError(f"{file} is not drawn: {not_finite} of {len(labels)} predictions are not finite")
    if is_calibration:
        return plot_calibration(file, labels, *predictions, model.targets)[0]
    plot_predictions(file, labels, predictions.value, model.targets, split)
    return [file]


def plot_elements(
    file: Path, model: Predictor | Ensemble, dataset: Dataset, split: str, predictions: Predictions
) -> list[Path]:
    """Draws the errors by element, a figure for each target with labels; returns the files written."""
    from crystalframer_jax.reporting.element_figures import periodic_table  # imports matplotlib
    from crystalframer_jax.reporting.plots import write

    rows, written = dataset.splits[split], []
    off = np.abs(predictions.value - dataset.labels[rows])
    for s, column, figure in zip(model.targets, off.T, figure_files(file, model.targets), strict=True):
        if errors := errors_by_element(dataset.table, rows, column):
            check_replaceable(figure, b"\x89PNG")
            figure.parent.mkdir(parents=True, exist_ok=True)
            title = f"{dataset.name}, {split}: {int(np.isfinite(column).sum()):,} crystals"
            write(periodic_table(errors, f"mean absolute error of {s.title}", title), figure)
            written.append(figure)
    return written
