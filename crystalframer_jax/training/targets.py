"""What a training learns of the labels of its data set."""

from pathlib import Path

import numpy as np

from crystalframer_jax.batching.table import compositions_of
from crystalframer_jax.batching.targets import TargetStatistics, check_transform, compositions_for, to_learn
from crystalframer_jax.config import TrainConfig
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.parallel.processes import is_first_process, json_from_first_process
from crystalframer_jax.runs.checkpoints import newest_meta

References = dict[tuple[str, str], tuple[float, ...]]  # by name and transform of the target


def kept_references(config: TrainConfig, workdir: Path) -> References:
    """Returns the element references that a training takes from the run it starts from; `()`: that one has none.

    A training that goes on has its own. The first of several processes reads them.
    """
    if not config.pretrained_model:
        return {}
    found = None
    if is_first_process():
        stored = newest_meta(workdir).get("targets")
        targets = (TargetStatistics(**s) for s in stored) if stored else Predictor.load(config.pretrained_model).targets
        found = [[s.name, s.transform, s.references] for s in targets]
    return {(name, transform): tuple(references) for name, transform, references in json_from_first_process(found)}


def statistics_of(
    config: TrainConfig, dataset: Dataset, rows: np.ndarray, kept: References | None = None
) -> tuple[TargetStatistics, ...]:
    """Computes the statistics of the targets on the crystals to train on, `rows` of the table.

    Targets have the element references `kept` or, if there are none for them, those that `config` asks for. Raises
    ConfigError if labels do not vary, or if one of any split has no logarithm where that is learned.
    """
    kept, table = kept or {}, dataset.table
    used = np.sort(np.concatenate(list(dataset.splits.values())))
    compositions = compositions_of(table, rows) if config.element_references or any(kept.values()) else None
    found = []
    for target, labels, transform in zip(dataset.targets, dataset.labels.T, config.transforms, strict=True):
        check_transform(target.name, transform, table.ids[used], labels[used])
        references = kept.get((target.name, transform), None if config.element_references else ())
        statistics = TargetStatistics.of(
            target.name, target.unit, labels[rows], config.normalize_targets, transform, compositions, references
        )
        found.append(statistics)
    return tuple(found)


def labels_to_learn(statistics: tuple[TargetStatistics, ...], dataset: Dataset) -> np.ndarray:
    """Returns what is learned of all labels of a data set, before it is standardised: [C, T], NaN where unknown."""
    rows = np.arange(len(dataset.table))
    return to_learn(dataset.labels, statistics, compositions_for(statistics, dataset.table, rows))
