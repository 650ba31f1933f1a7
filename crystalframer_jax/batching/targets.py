"""The targets of a model: what standardises their labels, and the way back to label units."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.config import ConfigError


@dataclasses.dataclass(frozen=True)
class TargetStatistics:
    """A target with what standardises its labels: a transform, then mean and population standard deviation.

    Mean and standard deviation are those of the transformed labels: in label units without a transform.
    """

    name: str
    unit: str
    mean: float
    std: float
    transform: str = "none"  # or "log10"

    @classmethod
    def of(
        cls, name: str, unit: str, labels: np.ndarray, normalize_targets: str = "scale_bias", transform: str = "none"
    ) -> "TargetStatistics":
        """Computes the statistics of the known training labels [C]; ConfigError if they do not vary.

        As `normalize_targets` says, mean and standard deviation ("scale_bias"), the mean alone with 1 ("bias"), 0 with
        the root mean square ("scale"), or 0 and 1 ("no").
        """
        known = labels[np.isfinite(labels)]
        if not known.size or known.std() == 0:
            raise ConfigError(f"targets={name!r}: {known.size} training labels that do not vary")
        known = np.log10(known) if transform == "log10" else known
        mean = known.mean() if "bias" in normalize_targets else 0.0
        std = np.sqrt(np.mean((known - mean) ** 2)) if "scale" in normalize_targets else 1.0
        return cls(name, unit, float(mean), float(std), transform)


def check_transform(name: str, transform: str, ids: np.ndarray, labels: np.ndarray) -> None:
    """Raises ConfigError, with the count and the first id, if known labels [C] of a target have no logarithm."""
    wrong = np.flatnonzero(labels <= 0)
    if transform == "log10" and wrong.size:
        raise ConfigError(
            f"target_transform='log10': {len(wrong):,} of {np.isfinite(labels).sum():,} labels of {name} are not "
            f"positive and have no logarithm, the first is {labels[wrong[0]]:g} of {ids[wrong[0]]}; leave such "
            "crystals out of the data, or train with target_transform='none'"
        )


def standardise(labels: jax.Array | np.ndarray, statistics: tuple[TargetStatistics, ...]) -> Any:
    """Returns (transformed labels - mean) / std [..., T], in the type of the labels."""
    mean, std = _mean_and_std(statistics, labels.dtype)
    if (is_log := _is_log(statistics)).any():
        xp: Any = jnp if isinstance(labels, jax.Array) else np
        # An unknown label is 0 in a batch; a prediction that is not finite stays so.
        labels = xp.where(is_log, xp.log10(xp.where(labels <= 0, xp.ones_like(labels), labels)), labels)
    return (labels - mean) / std


def to_label_units(predictions: np.ndarray, statistics: tuple[TargetStatistics, ...]) -> np.ndarray:
    """Returns model output [..., T] times std plus mean, its transform undone, float64."""
    mean, std = _mean_and_std(statistics, np.float64)
    values = np.asarray(predictions, np.float64) * std + mean
    is_log = _is_log(statistics)
    with np.errstate(over="ignore"):  # a prediction that is not finite is reported as such
        values[..., is_log] = 10 ** values[..., is_log]
    return values


def _mean_and_std(statistics: tuple[TargetStatistics, ...], dtype: Any) -> np.ndarray:
    """Returns means and standard deviations, [2, T]."""
    return np.array([[s.mean for s in statistics], [s.std for s in statistics]], dtype)


def _is_log(statistics: tuple[TargetStatistics, ...]) -> np.ndarray:
    return np.array([s.transform == "log10" for s in statistics], bool)
