"""Files and figures of labels and predictions."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.files import write_csv
from crystalframer_jax.reporting.metrics import check_shapes


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

    The units are those of the labels. Numbers have all their digits; an unknown label is an empty cell.
    """
    check_shapes(predictions, labels)
    ends = [f"_{s.name}" for s in statistics] if len(statistics) > 1 else [""]
    header = ["id", *(f"{kind}{end}" for end in ends for kind in ("target", "prediction"))]
    columns = [np.where(np.isfinite(labels), labels.astype(object), ""), predictions.astype(object)]
    rows = np.stack(columns, axis=2).reshape(len(labels), 2 * len(statistics))
    if spread is not None:
        header += [f"spread{end}" for end in ends]
        rows = np.concatenate([rows, spread.astype(object)], axis=1)
    write_csv(file, header, [[str(id), *row] for id, row in zip(ids, rows.tolist(), strict=True)])


def write_split(
    folder: Path,
    dataset: Dataset,
    split: str,
    predictions: np.ndarray,
    statistics: tuple[TargetStatistics, ...],
    spread: np.ndarray | None = None,
) -> None:
    """Writes predictions_SPLIT.csv and parity_SPLIT.png of a data set into a folder, which must exist."""
    rows = dataset.splits[split]
    ids, labels = dataset.table.ids[rows], dataset.labels[rows]
    write_predictions(folder / f"predictions_{split}.csv", ids, labels, predictions, statistics, spread)
    plot_parity(folder / f"parity_{split}.png", labels, predictions, statistics, split)


def plot_parity(
    file: Path, labels: np.ndarray, predictions: np.ndarray, statistics: tuple[TargetStatistics, ...], split: str
) -> None:
    """Plots predictions against labels, both [C, T], a panel for each target."""
    from crystalframer_jax.reporting import plots  # imports matplotlib

    names, units = [s.name for s in statistics], [s.unit for s in statistics]
    plots.write(plots.parity(labels, predictions, names, units, split), file)


def plot_calibration(
    file: Path, labels: np.ndarray, mean: np.ndarray, spread: np.ndarray, statistics: tuple[TargetStatistics, ...]
) -> tuple[list[Path], dict[str, dict[str, float]]]:
    """Plots how errors compare with the spread, all [C, T]: FILE, or one FILE_TARGET for each of several targets.

    Returns the files and, by target, the numbers of `plots.calibration`.
    """
    from crystalframer_jax.reporting import plots  # imports matplotlib

    several = len(statistics) > 1
    ends = [re.sub(r"[^\w.+-]", "_", s.name) for s in statistics]  # energy/atom is no name of a file
    files = [file.with_stem(f"{file.stem}_{end}") if several else file for end in ends]
    found = {}
    for t, s in enumerate(statistics):
        figure, found[s.name] = plots.calibration(labels[:, t], mean[:, t], spread[:, t], s.name, s.unit)
        plots.write(figure, files[t])
    return files, found
