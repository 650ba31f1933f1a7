"""The command lines of scripts/: arguments, tables, files of results, errors in one line."""

import argparse
import contextlib
import csv
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import platformdirs

from crystalframer_jax.config import ConfigError, neighbor_cutoff, target_names
from crystalframer_jax.crystal import Crystal, CrystalError
from crystalframer_jax.errors import UserError
from crystalframer_jax.structure_files import read_crystals

SAMPLES_HELP = "average K draws among equally good frames and show their spread; default: as configured for the run"
WEIGHTS_HELP = "default: those that the finished run selected by validation error, else best"


@contextlib.contextmanager
def reporting_errors(if_interrupted: str = "") -> Iterator[None]:
    """Print an error that the user can mend in one line and leave with status 1; with status 130 after Ctrl-C."""
    try:
        yield
    except (UserError, OSError) as error:
        sys.exit("error: " + " ".join(str(error).split()))
    except KeyboardInterrupt:
        print(f"\ninterrupted{if_interrupted}", file=sys.stderr, flush=True)
        os._exit(130)  # at once: a checkpoint half written is dropped, and waiting for its threads may take minutes


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, so that only the first run waits for the compiler."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(platformdirs.user_cache_path("crystalframer_jax") / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def predict_main(argv: Sequence[str] | None = None) -> int:
    """Predict files; returns 1 if any of them could not be used (the others are predicted all the same)."""
    parser = argparse.ArgumentParser(
        prog="predict.py", description="Predict structure files with a trained model.", allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="run directory, or one of its checkpoints (RUN/checkpoints/STEP)")
    parser.add_argument("files", metavar="FILE", nargs="+", help="CIF, POSCAR/CONTCAR or extended XYZ")
    parser.add_argument("--output", type=Path, help="write the predictions to this CSV file")
    parser.add_argument(
        "--weights",
        choices=("best", "last", "swa"),
        help=WEIGHTS_HELP,
    )
    parser.add_argument("--num_frame_samples", type=int, metavar="K", help=SAMPLES_HELP)
    arguments = parser.parse_args(argv)
    use_compilation_cache()
    from crystalframer_jax.inference.predictor import Predictor
    from crystalframer_jax.training.logging import table

    with reporting_errors():
        predictor = Predictor.load(arguments.run, arguments.weights)
        crystals, errors = read_all(arguments.files)
        if crystals:
            progress = len(crystals) > 100 and sys.stderr.isatty()
            predictions, spread = predictor.predict_with_spread(crystals, arguments.num_frame_samples, progress)
            header = ["structure", "formula", "atoms", *(f"{t.name} ({t.unit})" for t in predictor.targets)]
            values = predictions
            if predictor.draws(arguments.num_frame_samples) > 1:
                header += [f"{t.name} spread ({t.unit})" for t in predictor.targets]
                values = np.concatenate([predictions, spread], axis=1)
            rows = [
                [crystal.id, crystal.formula, crystal.num_atoms, *map(float, line)]
                for crystal, line in zip(crystals, values, strict=True)
            ]
            print(table(header, rows))
            finite = np.isfinite(predictions).all(axis=1)
            errors += [f"{crystals[i].id}: the prediction is not finite" for i in np.flatnonzero(~finite)]
        for error in errors:
            print(f"error: {error}", file=sys.stderr)
        if crystals and arguments.output:
            write_csv(arguments.output, header, rows)
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
    """Print the errors of a trained model on a split of its dataset."""
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description="Errors of a trained model on a split of its dataset.", allow_abbrev=False
    )
    parser.add_argument("run", metavar="RUN", help="run directory, or one of its checkpoints (RUN/checkpoints/STEP)")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test")
    parser.add_argument(
        "--weights",
        choices=("best", "last", "swa"),
        help=WEIGHTS_HELP,
    )
    parser.add_argument("--num_frame_samples", type=int, metavar="K", help=SAMPLES_HELP)
    parser.add_argument("--output", type=Path, help="write id, labels and predictions to this CSV file")
    arguments = parser.parse_args(argv)
    use_compilation_cache()
    from crystalframer_jax.data.loader import batch_shapes
    from crystalframer_jax.data.registry import target_set
    from crystalframer_jax.data.store import open_dataset
    from crystalframer_jax.inference.evaluation import (
        groups_of,
        mean_absolute_errors,
        mean_predictor_errors,
    )
    from crystalframer_jax.inference.predictor import Predictor
    from crystalframer_jax.training.logging import table

    with reporting_errors():
        predictor = Predictor.load(arguments.run, arguments.weights)
        config, statistics = predictor.config, predictor.targets
        if not config.target_set:
            raise ConfigError(
                f"{arguments.run} was imported without a dataset known here, so there is nothing to evaluate it on; "
                "predict structure files, or import it again with --target_set and --targets"
            )
        names = target_names(config)
        dataset = open_dataset(target_set(config.target_set), names, neighbor_cutoff(config), config.data_dir)
        indices = dataset.splits[arguments.split]
        groups = groups_of(indices, config.batch_size)
        shapes = batch_shapes(dataset, config.batch_size, predictor.parts)
        predictions, spread = predictor.predict_table(dataset.table, groups, shapes, arguments.num_frame_samples)
        labels = dataset.labels[indices]
        errors = mean_absolute_errors(predictions, labels, statistics)
        baseline = mean_predictor_errors(labels, statistics)
        print(predictor.origin)
        header = [f"{config.target_set}, {arguments.split}", "unit", "crystals", "MAE", "mean predictor"]
        rows = [[s.name, s.unit, len(indices), errors[s.name], baseline[s.name]] for s in statistics]
        kinds, values = ["label", "prediction"], [labels, predictions]
        draws = predictor.draws(arguments.num_frame_samples)
        if draws > 1:
            header.append(f"mean spread of {draws} draws")
            rows = [[*row, value] for row, value in zip(rows, spread.mean(axis=0).tolist(), strict=True)]
            kinds, values = [*kinds, "spread"], [*values, spread]
        print(table(header, rows))
        if arguments.output:
            columns = [f"{s.name} {kind} ({s.unit})" for kind in kinds for s in statistics]
            lines = np.concatenate(values, axis=1).tolist()
            ids = dataset.table.ids[indices]
            write_csv(arguments.output, ["id", *columns], [[i, *line] for i, line in zip(ids, lines, strict=True)])
    return 0


def write_csv(file: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table as CSV, creating its folder, and say so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
    print(f"wrote {file}")
