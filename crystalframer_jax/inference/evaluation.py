"""Predictions for many crystals, and the errors they make."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from crystalframer_jax.batch import BatchShape, pack, shape_for
from crystalframer_jax.config import NO_PARTS, BatchParts
from crystalframer_jax.data.table import CrystalTable
from crystalframer_jax.training.state import TargetStatistics, to_label_units
from crystalframer_jax.training.step import Forward

MAX_BATCH_ATOMS = 1024  # a larger crystal is a batch of its own
MAX_BATCH_CRYSTALS = 128


class Predictions(NamedTuple):
    """Predictions in label units, in the order of the crystals."""

    mean: np.ndarray  # [C, T] over the draws of frames
    spread: np.ndarray  # [C, T] standard deviation over the draws; 0 without draws


def predict_rows(
    forward: Forward,
    variables: Any,
    table: CrystalTable,
    groups: Iterable[np.ndarray],
    statistics: tuple[TargetStatistics, ...],
    shapes: Sequence[BatchShape] | BatchParts = NO_PARTS,
    num_frame_samples: int = 1,
) -> Predictions:
    """Predictions for groups of table rows, in their order.

    Every group is one batch, of the first of `shapes` that holds it, or of a shape of its own with the parts given.
    With `num_frame_samples` above 1 the mean is over as many draws among equally good frames, always the same draws
    for the same crystal; otherwise the first of them in canonical order are taken.
    """
    keys: list[jax.Array | None] = [None]
    if num_frame_samples > 1:
        keys = [jax.random.fold_in(jax.random.key(0), sample) for sample in range(num_frame_samples)]
    results = [np.zeros((len(keys), 0, len(statistics)))]
    for group in groups:
        fitting = [shape_for(table, group, shapes)] if isinstance(shapes, BatchParts) else list(shapes)
        batch = jax.device_put(pack(table, group, fitting, num_targets=len(statistics)))
        draws = [np.asarray(forward(variables, batch, key), np.float64)[: len(group)] for key in keys]
        results.append(np.stack(draws))
    samples = to_label_units(np.concatenate(results, axis=1), statistics)
    return Predictions(samples.mean(axis=0), samples.std(axis=0, ddof=min(1, len(keys) - 1)))


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
