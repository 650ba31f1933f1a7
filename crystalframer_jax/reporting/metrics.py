"""The metrics of predictions, of numbers and of classes, and those of predicting the mean."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from crystalframer_jax.batching.targets import TargetStatistics


@dataclasses.dataclass(frozen=True)
class Metrics:
    """How predictions of one kind of targets are judged.

    Attributes:
      task: the kind, as in the configuration.
      of: computes the metrics of predictions of one target over its known labels, both [C]; None where undefined.
      titles: words in tables for each, by its name in summary.json. The first is the main one: by it models are
        compared with each other and with predicting the mean.
      followed: the one that a training shows after every epoch.
      figure: beginning of the name of the figure that shows the predictions.
    """

    task: str
    of: Callable[[np.ndarray, np.ndarray], dict[str, Any]]
    titles: dict[str, str]
    followed: str
    figure: str

    @property
    def main(self) -> str:
        """Name of the first metric."""
        return next(iter(self.titles))


def metrics_for(statistics: tuple[TargetStatistics, ...]) -> Metrics:
    """Returns how these targets are judged, which are all numbers or all classes."""
    return METRICS["classification" if statistics[0].is_class else "regression"]


def target_metrics(
    predictions: np.ndarray, labels: np.ndarray, statistics: tuple[TargetStatistics, ...]
) -> dict[str, dict[str, Any]]:
    """Returns the metrics of every target, label units; predictions and labels [C, T]."""
    check_shapes(predictions, labels)
    of = metrics_for(statistics).of
    return {s.name: of(predictions[:, t], labels[:, t]) for t, s in enumerate(statistics)}


def one_metric(
    name: str, predictions: np.ndarray, labels: np.ndarray, statistics: tuple[TargetStatistics, ...]
) -> dict[str, float]:
    """Returns the metric of that name of every target, as `target_metrics`, but NaN where it is undefined."""
    metrics = target_metrics(predictions, labels, statistics)
    return {target: math.nan if found[name] is None else found[name] for target, found in metrics.items()}


def main_metrics(
    predictions: np.ndarray, labels: np.ndarray, statistics: tuple[TargetStatistics, ...]
) -> dict[str, float]:
    """Returns the MAE of every target in label units, the log loss of classes; NaN where no label is known."""
    return one_metric(metrics_for(statistics).main, predictions, labels, statistics)


def mean_predictor_errors(
    labels: np.ndarray, statistics: tuple[TargetStatistics, ...], train_labels: np.ndarray
) -> dict[str, float]:
    """Returns the main metric of predicting the mean of the training labels for every crystal, both [C, T]."""
    mean = np.nanmean(train_labels, axis=0)
    return main_metrics(np.broadcast_to(mean, labels.shape), labels, statistics)


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


def class_metrics(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Returns the metrics of probabilities of class 1 over the known labels, 0 and 1, both [C].

    log_loss: mean of -log of the probability of the class. roc_auc: the share of pairs of both classes in which the
    crystal of class 1 has the larger probability (half a pair if they are equal). balanced_accuracy: mean of the shares
    of each class that are on its side of 0.5. positives: share of class 1, what predicting it always gets right. Those
    that compare the classes are None where there is but one, all are None where no label is known. A probability that
    is NaN makes them NaN.
    """
    known = np.isfinite(labels)
    found: dict[str, Any] = dict.fromkeys(("log_loss", "roc_auc", "balanced_accuracy", "positives"))
    if not known.any():
        return found
    is_one, values = labels[known] == 1, np.asarray(probabilities[known], np.float64)
    of_class = np.where(is_one, values, 1 - values)
    found["log_loss"] = float(np.mean(-np.log(np.maximum(of_class, np.finfo(np.float64).eps))))
    found["positives"] = float(is_one.mean())
    if is_one.all() or not is_one.any():
        return found
    if np.isnan(values).any():
        return found | {"roc_auc": math.nan, "balanced_accuracy": math.nan}
    false_rate, true_rate = roc_curve(values, is_one)
    found["roc_auc"] = float(np.trapezoid(true_rate, false_rate))
    is_called_one = values >= 0.5
    found["balanced_accuracy"] = float((is_called_one[is_one].mean() + (~is_called_one[~is_one]).mean()) / 2)
    return found


def roc_curve(probabilities: np.ndarray, is_one: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the shares of class 0 and of class 1 that are above a threshold, as it falls; both from 0 to 1.

    Crystals of the same probability pass the threshold together, so that the area below does not depend on their order.
    """
    order = np.argsort(-probabilities, kind="stable")
    last_of_equal = np.append(np.flatnonzero(np.diff(probabilities[order])), len(order) - 1)
    ones = np.cumsum(is_one[order])[last_of_equal]
    zeros = last_of_equal + 1 - ones
    return np.append(0, zeros / zeros[-1]), np.append(0, ones / ones[-1])


def with_baseline(
    metrics: dict[str, dict[str, Any]], baseline: dict[str, float], statistics: tuple[TargetStatistics, ...]
) -> dict[str, dict[str, Any]]:
    """Adds the main metric of predicting the mean, and the unit, to metrics by target, as summary.json has them."""
    name = f"mean_predictor_{metrics_for(statistics).main}"
    return {s.name: {**metrics[s.name], name: baseline[s.name], "unit": s.unit} for s in statistics}


def check_shapes(predictions: np.ndarray, labels: np.ndarray) -> None:
    """Raises ValueError unless every label has a prediction."""
    if predictions.shape != labels.shape:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} differ in shape")


CLASS_TITLES = {
    "log_loss": "log loss",
    "roc_auc": "ROC-AUC",
    "balanced_accuracy": "balanced accuracy",
    "positives": "positives",
}
METRICS = {
    kind.task: kind
    for kind in (
        Metrics("regression", errors, {"mae": "MAE", "rmse": "RMSE", "r2": "R2"}, "mae", "parity"),
        Metrics("classification", class_metrics, CLASS_TITLES, "roc_auc", "roc"),
    )
}
