"""The errors of predictions: MAE, RMSE and R2, and the MAE of predicting the mean."""

import math
from typing import Any

import numpy as np

from crystalframer_jax.batching.targets import TargetStatistics


def mean_absolute_errors(
    predictions: np.ndarray, labels: np.ndarray, statistics: tuple[TargetStatistics, ...]
) -> dict[str, float]:
    """Returns the MAE of every target in label units, as `regression_metrics`, but NaN where no label is known."""
    metrics = regression_metrics(predictions, labels, statistics)
    return {name: math.nan if found["mae"] is None else found["mae"] for name, found in metrics.items()}


def mean_predictor_errors(
    labels: np.ndarray, statistics: tuple[TargetStatistics, ...], train_labels: np.ndarray
) -> dict[str, float]:
    """Returns the MAE of predicting the mean of the training labels for every crystal, both [C, T]."""
    mean = np.nanmean(train_labels, axis=0)
    return mean_absolute_errors(np.broadcast_to(mean, labels.shape), labels, statistics)


def regression_metrics(
    predictions: np.ndarray, labels: np.ndarray, statistics: tuple[TargetStatistics, ...]
) -> dict[str, dict[str, Any]]:
    """Returns the `errors` of every target, label units; predictions and labels [C, T]."""
    check_shapes(predictions, labels)
    return {s.name: errors(predictions[:, t], labels[:, t]) for t, s in enumerate(statistics)}


def errors(predictions: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Returns {"mae", "rmse", "r2"} of predictions of one target over its known (finite) labels, both [C].

    R^2 = 1 - sum (prediction - label)^2 / sum (label - mean label)^2: 1 is perfect, 0 as good as the mean of these
    labels. It is None where they do not vary, and everything is None where none is known. A prediction that is not
    finite makes the metrics not finite.
    """
    known = np.isfinite(labels)
    if not known.any():
        return {"mae": None, "rmse": None, "r2": None}
    values = np.asarray(labels[known], np.float64)
    difference = np.asarray(predictions[known], np.float64) - values
    r2 = None
    if np.ptp(values) > 0:
        r2 = float(1 - np.sum(difference**2) / np.sum((values - values.mean()) ** 2))
    return {"mae": float(np.abs(difference).mean()), "rmse": float(np.sqrt(np.mean(difference**2))), "r2": r2}


def with_baseline(
    metrics: dict[str, dict[str, Any]], baseline: dict[str, float], statistics: tuple[TargetStatistics, ...]
) -> dict[str, dict[str, Any]]:
    """Adds the MAE of predicting the mean, and the unit, to metrics by target, as summary.json has them."""
    return {s.name: {**metrics[s.name], "mean_predictor_mae": baseline[s.name], "unit": s.unit} for s in statistics}


def check_shapes(predictions: np.ndarray, labels: np.ndarray) -> None:
    """Raises ValueError unless every label has a prediction."""
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} differ in shape")
