"""What a training learns of the labels of its data set."""

import numpy as np

from crystalframer_jax.batching.table import compositions_of
from crystalframer_jax.batching.targets import TargetStatistics, check_transform, compositions_for, to_learn
from crystalframer_jax.config import TrainConfig
from crystalframer_jax.data.store import Dataset


def statistics_of(config: TrainConfig, dataset: Dataset, rows: np.ndarray) -> tuple[TargetStatistics, ...]:
    """Computes the statistics of the targets on the crystals to train on, `rows` of the table.

    Raises ConfigError if labels do not vary, or if one of any split has no logarithm where that is learned.
    """
    table = dataset.table
    used = np.sort(np.concatenate(list(dataset.splits.values())))
    compositions = compositions_of(table, rows) if config.element_references else None
    found = []
    for target, labels, transform in zip(dataset.targets, dataset.labels.T, config.transforms, strict=True):
        check_transform(target.name, transform, table.ids[used], labels[used])
        found.append(
            TargetStatistics.of(
                target.name, target.unit, labels[rows], config.normalize_targets, transform, compositions
            )
        )
    return tuple(found)


def labels_to_learn(statistics: tuple[TargetStatistics, ...], dataset: Dataset) -> np.ndarray:
    """Returns what is learned of all labels of a data set, before it is standardised: [C, T], NaN where unknown."""
    rows = np.arange(len(dataset.table))
    with np.errstate(divide="ignore", invalid="ignore"):  # crystals of no split may have labels without a logarithm
        return to_learn(dataset.labels, statistics, compositions_for(statistics, dataset.table, rows))
