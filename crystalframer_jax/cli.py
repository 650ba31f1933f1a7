"""The command lines of scripts/: arguments, tables, files of results, errors in one line."""

import argparse
import contextlib
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import platformdirs

from crystalframer_jax.config import ConfigError, target_names
from crystalframer_jax.crystal import Crystal, CrystalError
from crystalframer_jax.data.datasets import open_dataset
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.errors import UserError
from crystalframer_jax.files import write_csv
from crystalframer_jax.inference.ensemble import Ensemble, load_model, plot_calibration
from crystalframer_jax.inference.evaluation import (
    Predictions,
    batches_of,
    mean_predictor_errors,
    regression_metrics,
    write_predictions,
)
from crystalframer_jax.inference.predictor import WEIGHTS, Predictor
from crystalframer_jax.structure_files import read_crystals
from crystalframer_jax.training.logging import table
from crystalframer_jax.training.state import TargetStatistics

RUN_HELP = "run directory, of one model or of an ensemble, or a checkpoint (RUN/checkpoints/STEP)"
SAMPLES_HELP = "average K draws among equally good frames and show their spread; default: as configured for the run"
WEIGHTS_HELP = "default: those that the finished run selected by validation error, else best"


@contextlib.contextmanager
def reporting_errors(if_interrupted: str = "", leave_at_once: bool = True) -> Iterator[None]:
    """Print an error that the user can mend in one line and leave with status 1; with status 130 after Ctrl-C.

    To `leave_at_once` then is for commands with threads that would take minutes to wait for: what they are writing is
    dropped. Others clean up first.
    """
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        print(f"\ninterrupted{if_interrupted}", file=sys.stderr, flush=True)
        os._exit(130) if leave_at_once else sys.exit(130)


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that only the first run waits for the compiler."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(platformdirs.user_cache_path("crystalframer_jax") / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def model_parser(prog: str, description: str) -> argparse.ArgumentParser:
    """The arguments of every command that predicts: the run, its weights, draws of frames."""
    parser = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help=RUN_HELP)
    parser.add_argument("--weights", choices=WEIGHTS, help=WEIGHTS_HELP)
    parser.add_argument("--num_frame_samples", type=int, metavar="K", help=SAMPLES_HELP)
    return parser


def predict_main(argv: Sequence[str] | None = None) -> int:
    """Predict files; returns 1 if any of them could not be used (the others are predicted all the same)."""
    parser = model_parser("predict.py", "Predict structure files with a trained model or an ensemble.")
    parser.add_argument("files", metavar="FILE", nargs="+", help="CIF, POSCAR/CONTCAR or extended XYZ")
    parser.add_argument("--output", type=Path, help="write the predictions to this CSV file")
    arguments = parser.parse_args(argv)
    use_compilation_cache()
    with reporting_errors():
        model = load_model(arguments.run, arguments.weights)
        crystals, errors = read_all(arguments.files)
        if crystals:
            progress = len(crystals) > 100 and sys.stderr.isatty()
            predictions = model.predict_with_spread(crystals, arguments.num_frame_samples, progress)
            header = ["structure", "formula", "atoms", *(f"{t.name} ({t.unit})" for t in model.targets)]
            values = predictions.mean
            if over := model.spread_over(arguments.num_frame_samples):
                header += [f"{t.name} std over {over} ({t.unit})" for t in model.targets]
                values = np.concatenate(predictions, axis=1)
            rows = [
                [crystal.id, crystal.formula, crystal.num_atoms, *line]
                for crystal, line in zip(crystals, values.tolist(), strict=True)
            ]
            print(table(header, rows))
            finite = np.isfinite(predictions.mean).all(axis=1)
            errors += [f"{crystals[i].id}: the prediction is not finite" for i in np.flatnonzero(~finite)]
        for error in errors:
            print(f"error: {error}", file=sys.stderr)
        if crystals and arguments.output:
            write_csv(arguments.output, header, rows)
            print(f"wrote {arguments.output}")
    return 1 if errors else 0


def read_all(files: Sequence[str]) -> tuple[list[Crystal], list[str]]:
    """The crystals of all files that can be used, and one line for each file that cannot. Warnings go to stderr."""
    crystals: list[Crystal] = []
    errors: list[str] = []
    for file in files:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            try:
                crystals += read_crystals(file)
            except CrystalError as error:
                errors.append(str(error))
        for warning in caught:
            if issubclass(warning.category, UserWarning):
                print(f"warning: {warning.message}", file=sys.stderr)
    return crystals, errors


def evaluate_main(argv: Sequence[str] | None = None) -> int:
    """Print the errors of a trained model or an ensemble on a split of its dataset."""
    parser = model_parser("evaluate.py", "Errors of a trained model or an ensemble on a split of its dataset.")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument("--output", type=Path, help="write id, labels and predictions to this CSV file")
    parser.add_argument(
        "--plot",
        type=_png,
        metavar="FILE.png",
        help="draw predictions against labels or, of an ensemble, errors against standard deviations (a figure for "
        "each target, its name added to FILE)",
    )
    arguments = parser.parse_args(argv)
    use_compilation_cache()
    with reporting_errors():
        model = load_model(arguments.run, arguments.weights)
        dataset = dataset_of(model, arguments.run)
        indices = dataset.splits[arguments.split]
        batches = batches_of(dataset, indices, model.config.batch_size, model.parts, model.devices.count)
        predictions = model.predict_table(dataset.table, *batches, arguments.num_frame_samples)
        over = model.spread_over(arguments.num_frame_samples)
        print(model.origin)
        print(error_table(model.targets, dataset, arguments.split, predictions, over))
        if arguments.output:
            ids, labels = dataset.table.ids[indices], dataset.labels[indices]
            spread = predictions.spread if over else None
            write_predictions(arguments.output, ids, labels, predictions.mean, model.targets, spread)
            print(f"wrote {arguments.output}")
        if arguments.plot:
            for file in plot_errors(arguments.plot, model, dataset, arguments.split, predictions):
                print(f"wrote {file}")
    return 0


def dataset_of(model: Predictor | Ensemble, run: str) -> Dataset:
    """The dataset that a model was trained on; ConfigError if it is not known here."""
    config = model.config
    if not config.target_set:
        raise ConfigError(
            f"{run} was imported without a dataset known here, so there is nothing to evaluate it on; "
            "predict structure files, or import it again with --target_set and --targets"
        )
    return open_dataset(config.target_set, target_names(config), model.cutoff, config.data_dir)


def error_table(
    targets: tuple[TargetStatistics, ...], dataset: Dataset, split: str, predictions: Predictions, over: str
) -> str:
    """Errors of predictions for a split, a line for each target; `over` says what their spread is over, if any.

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
        metrics = regression_metrics(predictions.mean[chosen], labels, targets)
        baseline = mean_predictor_errors(labels, targets, dataset.labels[dataset.splits["train"]])
        for t, s in enumerate(targets):
            errors = [math.nan if value is None else value for value in metrics[s.name].values()]
            known = np.isfinite(labels[:, t])
            line = [s.name + kind, s.unit, int(known.sum()), *errors, baseline[s.name]]
            lines.append([*line, *([float(predictions.spread[chosen][known, t].mean())] if over else [])])
    return table(header, lines)


def plot_errors(
    file: Path, model: Predictor | Ensemble, dataset: Dataset, split: str, predictions: Predictions
) -> list[Path]:
    """Parity of a single model, calibration of an ensemble; returns the files written."""
    from crystalframer_jax.training import plots  # imports matplotlib

    file.parent.mkdir(parents=True, exist_ok=True)
    labels = dataset.labels[dataset.splits[split]]
    not_finite = int((~np.isfinite(predictions.mean)).any(axis=1).sum())
    if not_finite:
        raise UserError(f"{file} is not drawn: {not_finite} of {len(labels)} predictions are not finite")
    if isinstance(model, Ensemble):
        return plot_calibration(file, labels, predictions, model.targets)[0]
    names, units = [s.name for s in model.targets], [s.unit for s in model.targets]
    plots.parity(labels, predictions.mean, names, units, file, split)
    return [file]


def _png(text: str) -> Path:
    """The name of a figure."""
    if not text.lower().endswith(".png"):
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png")
    return Path(text)
