"""Files and figures of labels and predictions."""

import contextlib
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.files import is_disk_full, write_csv
from crystalframer_jax.reporting.metrics import check_shapes, metrics_for
from crystalframer_jax.text import escaped


def write_predictions(
    file: str | Path,
    ids: Sequence[str] | np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    statistics: tuple[TargetStatistics, ...],
    spread: np.ndarray | None = None,
) -> None:
    """Writes labels and predictions [C, T] as CSV: id,target,prediction, with several targets
    id,target_A,prediction_A,target_B,prediction_B, and after them the spreads, if given: spread or spread_A,spread_B.
    Predictions of classes are named probability.

    The units are those of the labels. Numbers have all their digits; an unknown label is an empty cell.
    """
    check_shapes(predictions, labels)
    ends = [f"_{s.name}" for s in statistics] if len(statistics) > 1 else [""]
    predicted = "probability" if statistics[0].is_class else "prediction"
    header = ["id", *(f"{kind}{end}" for end in ends for kind in ("target", predicted))]
    columns = [np.where(np.isfinite(labels), labels.astype(object), ""), predictions.astype(object)]
    rows = np.stack(columns, axis=2).reshape(len(labels), 2 * len(statistics))
    if spread is not None:
        header += [f"spread{end}" for end in ends]
        rows = np.concatenate([rows, spread.astype(object)], axis=1)
    write_csv(file, header, [[str(id), *row] for id, row in zip(ids, rows.tolist(), strict=True)])


@contextlib.contextmanager
def reporting(file: Path, not_written: list[str]) -> Iterator[None]:
    """Makes any failure to write a file of a report a warning, and lists it: a training is worth more than its figures.

    A full disk stays an error: what comes after this file would fail as well.
    """
    try:
        yield
    except Exception as error:  # of many libraries
        if isinstance(error, OSError) and is_disk_full(error):
            raise
        not_written.append(file.name)
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        later = "the same command tries again, and crystalframer evaluate with --output or --plot writes such files"
        tqdm.write(f"warning: {file} could not be written ({escaped(reason)}); {later}", file=sys.stderr)


def write_split(
    folder: Path,
    dataset: Dataset,
    split: str,
    predictions: np.ndarray,
    statistics: tuple[TargetStatistics, ...],
    not_written: list[str],
    spread: np.ndarray | None = None,
) -> None:
    """Writes predictions_SPLIT.csv and parity_SPLIT.png, of classes roc_SPLIT.png, into a folder, which must exist.

    What cannot be written is added to `not_written`.
    """
    rows = dataset.splits[split]
    ids, labels = dataset.table.ids[rows], dataset.labels[rows]
    file, figure = folder / f"predictions_{split}.csv", folder / f"{metrics_for(statistics).figure}_{split}.png"
    with reporting(file, not_written):
        write_predictions(file, ids, labels, predictions, statistics, spread)
    with reporting(figure, not_written):
        plot_predictions(figure, labels, predictions, statistics, split)


def plot_predictions(
    file: Path, labels: np.ndarray, predictions: np.ndarray, statistics: tuple[TargetStatistics, ...], split: str
) -> None:
    """Plots predictions against labels, both [C, T], or the ROC curves of classes, a panel for each target."""
    from crystalframer_jax.reporting import plots  # imports matplotlib

    names, units = [s.name for s in statistics], [s.unit for s in statistics]
    if statistics[0].is_class:
        figure = plots.roc(labels, predictions, names, split)
    else:
        figure = plots.parity(labels, predictions, names, units, split)
    plots.write(figure, file)


def figure_files(file: Path, statistics: tuple[TargetStatistics, ...]) -> list[Path]:
    """Names the figures of one or several targets: FILE, or FILE_TARGET for each."""
    if len(statistics) == 1:
        return [file]
    return [file.with_stem(f"{file.stem}_{re.sub('[^-+. 0-9A-Za-z_]', '_', s.name)}") for s in statistics]


def plot_calibration(
    file: Path, labels: np.ndarray, mean: np.ndarray, spread: np.ndarray, statistics: tuple[TargetStatistics, ...]
) -> tuple[list[Path], dict[str, dict[str, float]]]:
    """Plots how errors compare with the spread, all [C, T]: FILE, or one FILE_TARGET for each of several targets.

    Targets without a known label are left out. Returns the files and, by target, the numbers of `plots.calibration`.
    """
    from crystalframer_jax.reporting import plots  # imports matplotlib

    files, found = [], {}
    for t, (s, of_target) in enumerate(zip(statistics, figure_files(file, statistics), strict=True)):
        if np.isfinite(labels[:, t]).any():
            figure, found[s.name] = plots.calibration(labels[:, t], mean[:, t], spread[:, t], s.name, s.unit)
            plots.write(figure, of_target)
            files.append(of_target)
    return files, found
