"""The errors of predictions: MAE, RMSE and R2, and the MAE of predicting the mean."""

import math

import numpy as np

from crystalframer_jax.batching.targets import TargetStatistics


def mean_absolute_errors(
    predictions: np.ndarray, labels: np.ndarray, statistics: tuple[TargetStatistics, ...]
) -> dict[str, float]:
    """MAE of every target over its known (finite) labels, in label units; predictions and labels [C, T].

    NaN where no label is known; a prediction that is not finite makes the error not finite.
    """
    _check_shapes(predictions, labels)
    known = np.isfinite(labels)
    errors = [np.abs(predictions - labels)[known[:, t], t] for t in range(len(statistics))]
    return {s.name: float(e.mean()) if e.size else math.nan for s, e in zip(statistics, errors, strict=True)}


def mean_predictor_errors(
    labels: np.ndarray, statistics: tuple[TargetStatistics, ...], train_labels: np.ndarray | None = None
) -> dict[str, float]:
    """MAE of predicting the mean of the training labels for every crystal, labels [C, T].

    Without training labels [C, T] their mean is taken from the statistics (which hold it unless `normalize_targets`
    leaves the targets where they are).
    """
    mean = [s.mean for s in statistics] if train_labels is None else np.nanmean(train_labels, axis=0)
    return mean_absolute_errors(np.broadcast_to(mean, labels.shape), labels, statistics)


def regression_metrics(
    predictions: np.ndarray, labels: np.ndarray, statistics: tuple[TargetStatistics, ...]
) -> dict[str, dict[str, float | None]]:
    """{target: {"mae", "rmse", "r2"}} over its known (finite) labels, label units; predictions and labels [C, T].

    R^2 = 1 - sum (prediction - label)^2 / sum (label - mean label)^2: 1 is perfect, 0 as good as the mean of these
    labels. It is None where they do not vary, and everything is None where none is known. A prediction that is not
    finite makes the metrics not finite.
    """
    _check_shapes(predictions, labels)
    return {s.name: _metrics(predictions[:, t], labels[:, t]) for t, s in enumerate(statistics)}


def _metrics(predictions: np.ndarray, labels: np.ndarray) -> dict[str, float | None]:
    """The metrics of one target, [C]."""
    known = np.isfinite(labels)
    if not known.any():
        return {"mae": None, "rmse": None, "r2": None}
    values = np.asarray(labels[known], np.float64)
    errors = np.asarray(predictions[known], np.float64) - values
    r2 = None
    if np.ptp(values) > 0:
        r2 = float(1 - np.sum(errors**2) / np.sum((values - values.mean()) ** 2))
    return {"mae": float(np.abs(errors).mean()), "rmse": float(np.sqrt(np.mean(errors**2))), "r2": r2}


def _check_shapes(predictions: np.ndarray, labels: np.ndarray) -> None:
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} differ in shape")
