"""The training state, and the statistics that standardise the targets."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from crystalframer_jax.config import ConfigError
from crystalframer_jax.data.records import Target

Tree = Any  # nested dict of arrays


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes during training."""

    step: jax.Array  # [] int32 optimizer steps taken
    params: Tree
    calibration: Tree  # of the Gaussian widths; set by the first batch
    batch_stats: Tree  # running averages of BatchNorm
    opt_state: Tree
    swa_params: Tree  # equal average over the steps of the last epochs
    swa_batch_stats: Tree  # of the averaged weights; zeros before the end of the training
    swa_steps: jax.Array  # [] int32 weights in that average
    ema_params: Tree  # exponential moving average; empty without ema_decay
    ema_batch_stats: Tree  # of the averaged weights; zeros before the end of the training
    skipped_steps: jax.Array  # [] int32 steps whose loss or gradient was not finite


@dataclasses.dataclass(frozen=True)
class TargetStatistics:
    """A target with what standardises its labels: mean and population standard deviation, in label units."""

    name: str
    unit: str
    mean: float
    std: float

    @classmethod
    def of(cls, target: Target, labels: np.ndarray, normalize_targets: str = "scale_bias") -> "TargetStatistics":
        """Statistics of the known training labels [C]; ConfigError if they do not vary.

        As `normalize_targets` says, mean and standard deviation ("scale_bias"), the mean alone with 1 ("bias"), 0 with
        the root mean square ("scale"), or 0 and 1 ("no").
        """
        known = labels[np.isfinite(labels)]
        if not known.size or known.std() == 0:
            raise ConfigError(f"targets={target.name!r}: {known.size} training labels that do not vary")
        mean = known.mean() if "bias" in normalize_targets else 0.0
        std = np.sqrt(np.mean((known - mean) ** 2)) if "scale" in normalize_targets else 1.0
        return cls(target.name, target.unit, float(mean), float(std))


def standardise(labels: jax.Array, statistics: tuple[TargetStatistics, ...]) -> jax.Array:
    """(labels - mean) / std, [B, T]."""
    mean = jnp.array([s.mean for s in statistics], labels.dtype)
    std = jnp.array([s.std for s in statistics], labels.dtype)
    return (labels - mean) / std


def to_label_units(predictions: np.ndarray, statistics: tuple[TargetStatistics, ...]) -> np.ndarray:
    """Model output [..., T] times std plus mean, float64."""
    mean = np.array([s.mean for s in statistics])
    std = np.array([s.std for s in statistics])
    return np.asarray(predictions, np.float64) * std + mean
