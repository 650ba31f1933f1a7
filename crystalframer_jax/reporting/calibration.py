"""How well predicted standard deviations tell errors: coverage of intervals, reliability in bins."""

import math

import numpy as np
from scipy.special import ndtri

COVERAGE_LEVELS = np.linspace(0.0, 1.0, 101)


def coverage(labels: np.ndarray, mean: np.ndarray, std: np.ndarray, levels: np.ndarray = COVERAGE_LEVELS) -> np.ndarray:
    """Returns the fraction of labels [C] in the central interval of N(mean, std²) of each probability in `levels`, [P].

    The interval of a deviation of 0 is the point `mean`.
    """
    error = np.abs(np.asarray(mean, float) - labels)
    with np.errstate(divide="ignore", invalid="ignore"):
        deviations = np.where(error == 0, 0.0, error / std)
    widths = ndtri((1 + np.asarray(levels)) / 2)
    return np.searchsorted(np.sort(deviations), widths, side="right") / len(deviations)


def miscalibration_area(labels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> float:
    """Returns the area between `coverage` and the diagonal: 0 for calibrated deviations, 0.5 for 0 or infinite ones."""
    observed = coverage(labels, mean, std)
    return float(np.trapezoid(np.abs(observed - COVERAGE_LEVELS), COVERAGE_LEVELS))


def reliability(
    labels: np.ndarray, mean: np.ndarray, std: np.ndarray, num_bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns rms deviation, RMSE and its standard error in `num_bins` bins of equal counts, 3 × [bins].

    Bins are in order of the deviations. The standard error is that of the mean squared error through the square root;
    a bin of one crystal has none (0).
    """
    bins = np.array_split(np.argsort(std, kind="stable"), num_bins)
    rms_std, rmse, standard_error = np.zeros((3, num_bins))
    for i, members in enumerate(bins):
        squares = (mean[members] - labels[members]) ** 2
        rms_std[i], rmse[i] = rms(std[members]), math.sqrt(np.mean(squares))
        if len(members) > 1 and rmse[i] > 0:
            standard_error[i] = np.std(squares, ddof=1) / math.sqrt(len(members)) / (2 * rmse[i])
    return rms_std, rmse, standard_error


def rms(values: np.ndarray) -> float:
    """Returns the root mean square."""
    return math.sqrt(np.mean(np.square(values, dtype=float)))


def comparable(labels: np.ndarray, mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Selects the crystals whose label is known, in float64; ValueError for what cannot be compared."""
    labels, mean, std = (np.asarray(values, float) for values in (labels, mean, std))
    if not labels.shape == mean.shape == std.shape or labels.ndim != 1:
        raise ValueError(f"labels {labels.shape}, mean {mean.shape} and std {std.shape} must be equally many numbers")
    known = np.isfinite(labels)
    if not known.any():
        raise ValueError("no label is known, so there is nothing to compare deviations with")
    labels, mean, std = labels[known], mean[known], std[known]
    if not np.isfinite(mean).all() or not np.isfinite(std).all() or std.min() < 0:
        raise ValueError("predictions and standard deviations must be finite, and deviations not negative")
    return labels, mean, std
