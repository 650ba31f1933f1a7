"""Suspect labels: crystals on which all models of an ensemble agree against the label."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from crystalframer_jax.batching.table import amounts_of
from crystalframer_jax.batching.targets import TargetStatistics, to_learn
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.files import write_csv
from crystalframer_jax.structures.crystal import formula_of

SUSPECTS_FILE = "suspect_labels.csv"
FACTOR = 3.0  # of the two conditions of `are_suspect`
HEADER = ("split", "id", "formula", "target", "label", "prediction", "spread", "deviation", "median_errors")


def are_suspect(labels: np.ndarray, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tells which labels [C] of one target all models, samples [M, C], agree against, and how far each label is off.

    A label is suspect if it is above or below the predictions of all models, at least two, by more than 3 times the
    median absolute error of the split, and more than 3 times as far from their median as their standard deviation. How
    far it is off is the distance from the median in units of that error. Labels and predictions that are not finite are
    not suspect.
    """
    distance = np.abs(labels - np.median(samples, axis=0))
    known = np.isfinite(distance) & np.isfinite(samples).all(axis=0)
    if len(samples) < 2 or not known.any():
        return np.zeros(len(labels), bool), distance
    error = max(float(np.median(distance[known])), np.finfo(float).tiny)
    with np.errstate(invalid="ignore"):
        beyond = np.maximum(samples.min(axis=0) - labels, labels - samples.max(axis=0))
        spread = samples.std(axis=0, ddof=1)
    return known & (beyond > FACTOR * error) & (FACTOR * spread < distance), distance / error


def suspect_labels(
    dataset: Dataset, samples: Mapping[str, np.ndarray], statistics: tuple[TargetStatistics, ...]
) -> list[list[Any]]:
    """Lists the suspect labels of some splits in the columns of HEADER, those that are farthest off first.

    `samples` by split are the predictions of all models in label units, [M, C, T], as are label, prediction (their
    median), spread (their standard deviation) and deviation (label less prediction). What is suspect, and how far off
    in median absolute errors of its split, is judged by the logarithms of targets that are learned so. Of classes all
    models must find the other class more probable, too.
    """
    found: list[list[Any]] = []
    for split, predictions in samples.items():
        rows = dataset.splits[split]
        labels = dataset.labels[rows]
        judged, judged_by = (to_learn(values, statistics, None) for values in (labels, predictions))
        for t, target in enumerate(statistics):
            suspect, errors = are_suspect(judged[:, t], judged_by[:, :, t])
            if target.is_class:
                suspect &= (np.abs(predictions[:, :, t] - labels[:, t]) > 0.5).all(axis=0)
            for i in np.flatnonzero(suspect):
                of_crystal, label = predictions[:, i, t], float(labels[i, t])
                value, spread = float(np.median(of_crystal)), float(of_crystal.std(ddof=1))
                formula = formula_of(amounts_of(dataset.table, rows[[i]])[0])
                name = [split, str(dataset.table.ids[rows[i]]), formula, target.name]
                found.append([*name, label, value, spread, label - value, float(errors[i])])
    return sorted(found, key=lambda line: -line[-1])


def write_suspects(file: str | Path, suspects: Sequence[Sequence[Any]]) -> None:
    """Writes `suspect_labels` as CSV."""
    write_csv(file, HEADER, suspects)


def suspects_text(counts: Mapping[str, int]) -> str:
    """Tells in a line how many there are of each split."""
    return "labels that all models agree against: " + ", ".join(f"{n:,} in {split}" for split, n in counts.items())
