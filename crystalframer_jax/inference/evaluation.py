"""Predictions for many crystals, and the errors they make."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from crystalframer_jax.batch import Batch, BatchShape, pack, shape_for
from crystalframer_jax.data.table import CrystalTable
from crystalframer_jax.training.state import TargetStatistics, to_label_units

Forward = Callable[[Any, Batch], jax.Array]
MAX_BATCH_ATOMS = 1024  # a larger crystal is a batch of its own
MAX_BATCH_CRYSTALS = 128


def predict_rows(
    forward: Forward,
    variables: Any,
    table: CrystalTable,
    groups: Iterable[np.ndarray],
    statistics: tuple[TargetStatistics, ...],
    shapes: Sequence[BatchShape] | None = None,
) -> np.ndarray:
    """Predictions [C, T] in label units for groups of table rows, in their order.

    Every group is one batch, of the first of `shapes` that holds it, or of a shape of its own.
    """
    results = [np.zeros((0, len(statistics)))]
    for group in groups:
        fitting = list(shapes) if shapes is not None else [shape_for(table, group)]
        batch = pack(table, group, fitting, num_targets=len(statistics))
        results.append(np.asarray(forward(variables, batch))[: len(group)])
    return to_label_units(np.concatenate(results), statistics)


def groups_of(indices: np.ndarray, size: int) -> list[np.ndarray]:
    """Consecutive groups of at most `size`."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def groups_by_atoms(table: CrystalTable) -> list[np.ndarray]:
    """Consecutive groups of all rows of a table, limited in atoms and crystals."""
    groups: list[list[int]] = []
    atoms = 0
    for row, size in enumerate(table.num_atoms):
        if not groups or atoms + size > MAX_BATCH_ATOMS or len(groups[-1]) == MAX_BATCH_CRYSTALS:
            groups.append([])
            atoms = 0
        groups[-1].append(row)
        atoms += size
    return [np.array(group) for group in groups]


def mean_absolute_errors(
    predictions: np.ndarray, labels: np.ndarray, statistics: tuple[TargetStatistics, ...]
) -> dict[str, float]:
    """MAE of every target over its known (finite) labels, in label units; predictions and labels [C, T].

    A prediction that is not finite makes the error not finite.
    """
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} differ in shape")
    known = np.isfinite(labels)
    errors = np.abs(predictions - labels)
    return {s.name: float(errors[known[:, t], t].mean()) for t, s in enumerate(statistics)}


def mean_predictor_errors(labels: np.ndarray, statistics: tuple[TargetStatistics, ...]) -> dict[str, float]:
    """MAE of predicting the mean of the training labels for every crystal, labels [C, T]."""
    return mean_absolute_errors(np.broadcast_to([s.mean for s in statistics], labels.shape), labels, statistics)
