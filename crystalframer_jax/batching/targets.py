"""The targets of a model: what it learns of their labels, and the way back to label units.

A number is transformed, loses the part that the composition explains (element references), and is standardised. A
class, 0 or 1, is left as it is: the model gives the logit of its probability.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from scipy.special import expit, logit

from crystalframer_jax.batching.table import CrystalTable, compositions_of
from crystalframer_jax.config import ConfigError
from crystalframer_jax.config.hyperparameters import LOGIT
from crystalframer_jax.structures.crystal import MAX_ATOMIC_NUMBER
from crystalframer_jax.text import with_unit

RIDGE = 0.5  # of the element references: as if half a crystal of each pure element had the mean label


@dataclasses.dataclass(frozen=True)
class TargetStatistics:
    """A target with what a model learns of its labels: (transform(label) - references . composition - mean) / std.

    Mean and population standard deviation are those of what is left of the labels, in label units without a transform.
    """

    name: str
    unit: str
    mean: float
    std: float
    transform: str = "none"  # or "log10"; "logit": a class, 0 or 1, of which the probability is predicted
    references: tuple[float, ...] = ()  # of the elements 1 to 98, for a crystal of that element; empty: none

    def __post_init__(self) -> None:
        object.__setattr__(self, "references", tuple(self.references))  # JSON has lists

    @property
    def is_class(self) -> bool:
        """Whether labels are 0 and 1, and predictions the probability of 1."""
        return self.transform == LOGIT

    @property
    def title(self) -> str:
        """What is predicted, as a column is named: "gap (eV)", "is_metal probability"."""
        return f"{self.name} probability" if self.is_class else with_unit(self.name, self.unit)

    @classmethod
    def of(
        cls,
        name: str,
        unit: str,
        labels: np.ndarray,
        normalize_targets: str = "scale_bias",
        transform: str = "none",
        compositions: np.ndarray | None = None,
        references: tuple[float, ...] | None = None,
    ) -> "TargetStatistics":
        """Computes the statistics of the known training labels [C]; ConfigError if they do not vary.

        Given the `compositions` [C, 98] of the crystals, with element references: the `references` given, or (None)
        those that fit best, which are 0 for elements that are in no crystal. As `normalize_targets` says, mean and
        standard deviation ("scale_bias"), the mean alone with 1 ("bias"), 0 with the root mean square ("scale"), or 0
        and 1 ("no"). Classes have no unit, mean 0 and standard deviation 1.
        """
        known = labels[np.isfinite(labels)]
        if not known.size or known.std() == 0:
            all_are = f", all are {known[0]:g}" if known.size else ""
            raise ConfigError(f"targets={name!r}: {known.size} training labels that do not vary{all_are}")
        if transform == LOGIT:
            return cls(name, "", 0.0, 1.0, transform)
        known = np.log10(known) if transform == "log10" else known
        if compositions is not None and references != ():
            composition = compositions[np.isfinite(labels)]
            references = references or tuple(element_references(known, composition).tolist())
            known = known - composition @ np.array(references)
        mean = known.mean() if "bias" in normalize_targets else 0.0
        std = np.sqrt(np.mean((known - mean) ** 2)) if "scale" in normalize_targets else 1.0
        return cls(name, unit, float(mean), float(std), transform, references or ())


def element_references(labels: np.ndarray, compositions: np.ndarray) -> np.ndarray:
    """Fits labels [C] by their mean and what the elements add to it, for crystals of these elements alone: [98].

    Ridge regression: those w with the least sum of (label - mean - w . composition)^2 + RIDGE |w|^2.
    """
    square = compositions.T @ compositions + RIDGE * np.eye(compositions.shape[1])
    return np.linalg.solve(square, compositions.T @ (labels - labels.mean()))


def check_transform(name: str, transform: str, ids: np.ndarray, labels: np.ndarray) -> None:
    """Raises ConfigError, with the count and the first id, if known labels [C] have no logarithm, or are no classes."""
    if transform == LOGIT and (other := np.flatnonzero(np.isfinite(labels) & (labels != 0) & (labels != 1))).size:
        raise ConfigError(
            f"task='classification': {len(other):,} of {np.isfinite(labels).sum():,} labels of {name} are neither 0 "
            f"nor 1 (False nor True), the first is {labels[other[0]]:g} of {ids[other[0]]}; correct them in the "
            "source and prepare it again, or train with task='regression'"
        )
    wrong = np.flatnonzero(labels <= 0)
    if transform == "log10" and wrong.size:
        raise ConfigError(
            f"target_transform='log10': {len(wrong):,} of {np.isfinite(labels).sum():,} labels of {name} are not "
            f"positive and have no logarithm, the first is {labels[wrong[0]]:g} of {ids[wrong[0]]}; leave such "
            "crystals out of the data, or train with target_transform='none'"
        )


def to_learn(
    labels: np.ndarray, statistics: tuple[TargetStatistics, ...], compositions: np.ndarray | None
) -> np.ndarray:
    """Returns the transform of labels [..., C, T] less what the composition [C, 98] explains; NaN stays NaN.

    `compositions` are those of `compositions_for`. What has no logarithm becomes minus infinity or NaN.
    """
    values, is_log = np.array(labels, np.float64), _is_log(statistics)
    with np.errstate(divide="ignore", invalid="ignore"):  # of crystals in no split, of predictions that are too small
        values[..., is_log] = np.log10(values[..., is_log])
    return values if compositions is None else values - compositions @ _references(statistics)


def standardise(values: jax.Array | np.ndarray, statistics: tuple[TargetStatistics, ...]) -> Any:
    """Returns (values - mean) / std [..., T] of what `to_learn` leaves, in their type."""
    mean, std = _mean_and_std(statistics, values.dtype)
    return (values - mean) / std


def to_label_units(
    outputs: np.ndarray, statistics: tuple[TargetStatistics, ...], compositions: np.ndarray | None = None
) -> np.ndarray:
    """Returns labels, float64, for model outputs [..., C, T]: the way back from `to_learn` and `standardise`."""
    mean, std = _mean_and_std(statistics, np.float64)
    values = np.asarray(outputs, np.float64) * std + mean
    if compositions is not None:
        values += compositions @ _references(statistics)
    is_log, is_class = _is_log(statistics), _is_class(statistics)
    with np.errstate(over="ignore"):  # a prediction that is not finite is reported as such
        values[..., is_log] = 10 ** values[..., is_log]
    values[..., is_class] = expit(values[..., is_class])
    return values


def to_outputs(
    predictions: np.ndarray, statistics: tuple[TargetStatistics, ...], compositions: np.ndarray | None = None
) -> np.ndarray:
    """Returns the model outputs [..., C, T] of predictions in label units; probabilities of 0 and 1 are kept apart."""
    values, is_class = to_learn(predictions, statistics, compositions), _is_class(statistics)
    smallest = np.finfo(np.float64).eps
    values[..., is_class] = logit(np.clip(values[..., is_class], smallest, 1 - smallest))
    return standardise(values, statistics)


def compositions_for(
    statistics: tuple[TargetStatistics, ...], table: CrystalTable, rows: np.ndarray
) -> np.ndarray | None:
    """Returns the compositions [C, 98] of rows of a table if a target has element references."""
    return compositions_of(table, rows) if any(s.references for s in statistics) else None


def _mean_and_std(statistics: tuple[TargetStatistics, ...], dtype: Any) -> np.ndarray:
    """Returns means and standard deviations, [2, T]."""
    return np.array([[s.mean for s in statistics], [s.std for s in statistics]], dtype)


def _is_log(statistics: tuple[TargetStatistics, ...]) -> np.ndarray:
    return np.array([s.transform == "log10" for s in statistics], bool)


def _is_class(statistics: tuple[TargetStatistics, ...]) -> np.ndarray:
    return np.array([s.is_class for s in statistics], bool)


def _references(statistics: tuple[TargetStatistics, ...]) -> np.ndarray:
    """Returns the references of all targets, 0 without any, [98, T]."""
    return np.array([s.references or (0.0,) * MAX_ATOMIC_NUMBER for s in statistics]).T
