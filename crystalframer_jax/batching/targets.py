"""The targets of a model: what standardises their labels, and the way back to label units."""

import dataclasses
from typing import Any

import jax
import numpy as np

from crystalframer_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class TargetStatistics:
    """A target with what standardises its labels: mean and population standard deviation, in label units."""

    name: str
    unit: str
    mean: float
    std: float

    @classmethod
    def of(cls, name: str, unit: str, labels: np.ndarray, normalize_targets: str = "scale_bias") -> "TargetStatistics":
        """Computes the statistics of the known training labels [C]; ConfigError if they do not vary.

        As `normalize_targets` says, mean and standard deviation ("scale_bias"), the mean alone with 1 ("bias"), 0 with
        the root mean square ("scale"), or 0 and 1 ("no").
        """
        known = labels[np.isfinite(labels)]
        if not known.size or known.std() == 0:
            raise ConfigError(f"targets={name!r}: {known.size} training labels that do not vary")
        mean = known.mean() if "bias" in normalize_targets else 0.0
        std = np.sqrt(np.mean((known - mean) ** 2)) if "scale" in normalize_targets else 1.0
        return cls(name, unit, float(mean), float(std))


def standardise(labels: jax.Array | np.ndarray, statistics: tuple[TargetStatistics, ...]) -> Any:
    """Returns (labels - mean) / std [..., T], in the type of the labels."""
    mean, std = _mean_and_std(statistics, labels.dtype)
    return (labels - mean) / std


def to_label_units(predictions: np.ndarray, statistics: tuple[TargetStatistics, ...]) -> np.ndarray:
    """Returns model output [..., T] times std plus mean, float64."""
    mean, std = _mean_and_std(statistics, np.float64)
    return np.asarray(predictions, np.float64) * std + mean


def _mean_and_std(statistics: tuple[TargetStatistics, ...], dtype: Any) -> np.ndarray:
    """Returns means and standard deviations, [2, T]."""
    return np.array([[s.mean for s in statistics], [s.std for s in statistics]], dtype)
