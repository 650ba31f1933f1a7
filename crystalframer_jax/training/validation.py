"""Predictions and errors on the splits of the data set of a training, by all of its devices."""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from crystalframer_jax.batching.targets import TargetStatistics, compositions_for, standardise, to_outputs
from crystalframer_jax.config import TrainConfig
from crystalframer_jax.data.loader import TrainingBatches, batch_shapes
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.inference.evaluation import frame_draws, groups_of, predict_rows
from crystalframer_jax.inference.forward import make_forward
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.reporting.metrics import (
    mean_predictor_errors,
    metrics_for,
    one_metric,
    target_metrics,
    with_baseline,
)
from crystalframer_jax.reporting.predictions import write_split
from crystalframer_jax.training.errors import TrainingError
from crystalframer_jax.training.logging import announced
from crystalframer_jax.training.loss import loss_per_crystal
from crystalframer_jax.training.state import Tree

PREFERRED = ("swa", "ema", "last", "best")  # weights, by how little chance has to do with which they are


def selected(losses: Mapping[str, np.ndarray]) -> str:
    """Chooses among weights by their losses on the validation crystals [C]: averaged ones unless others are better.

    Among the weights in the order PREFERRED, later ones take the place of earlier ones only if their mean loss is
    smaller by more than two standard errors of the difference, crystal by crystal: with few crystals, which of several
    nearly equal weights has the smallest is chance, and the best epoch was picked by this loss. Weights whose loss is
    not finite are not chosen, if there are others.
    """
    first, *others = sorted(losses, key=lambda name: (not np.isfinite(losses[name]).all(), PREFERRED.index(name)))
    for name in others:
        gain = losses[first] - losses[name]
        if len(gain) > 1 and np.mean(gain) > 2 * np.std(gain, ddof=1) / math.sqrt(len(gain)):
            first = name
    return first


class Evaluator:
    """Predicts crystals of the data set of a training, in batches as large as those of the training."""

    def __init__(
        self,
        config: TrainConfig,
        model: CrystalFramer,
        batches: TrainingBatches,
        statistics: tuple[TargetStatistics, ...],
        report: Callable[[str], None],
    ):
        self.config, self.batches, self.statistics, self.report = config, batches, statistics, report
        self.dataset = batches.dataset
        self.shapes = batch_shapes(self.dataset, batches.batch_size, batches.parts, batches.devices.count)
        self.forward = announced("the prediction", make_forward(model, batches.devices))

    def predict(self, weights: Tree, rows: np.ndarray, num_frame_samples: int = 1) -> np.ndarray:
        """Predicts rows of the table, [C, T] in label units."""
        return predict_rows(
            self.forward,
            weights,
            self.dataset.table,
            self._groups(rows),
            self.statistics,
            self.shapes,
            num_frame_samples,
            self.batches.device_table,
            self.batches.devices,
        ).value

    def _groups(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Makes batches of crystals, and reports each."""
        groups = groups_of(rows, self.batches.batch_size)
        for number, group in enumerate(groups, 1):
            self.report(f"prediction of batch {number} of {len(groups)}")
            yield group

    def validate(self, weights: Tree, epoch: int) -> tuple[float, dict[str, float]]:
        """Returns validation loss and MAE (of classes: ROC-AUC) of every target; TrainingError if it is not finite."""
        fraction, size = self.config.val_percent_check, self.batches.batch_size
        rows = self.dataset.splits["val"]
        rows = rows[: size * max(1, int(fraction * -(-len(rows) // size)))]
        predictions = self.predict(weights, rows)
        loss = float(np.mean(self._losses(predictions, rows)))
        if not np.isfinite(loss):
            bad = self.dataset.table.ids[rows[~np.isfinite(predictions).all(axis=1)]]
            raise TrainingError(
                f"the validation loss is not finite after epoch {epoch + 1} ({len(bad)} of {len(rows)} predictions are "
                f"not, {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}); the checkpoint before it is kept, try a "
                "smaller lr"
            )
        followed = metrics_for(self.statistics).followed
        return loss, one_metric(followed, predictions, self.dataset.labels[rows], self.statistics)

    def _losses(self, predictions: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Returns the loss of predictions [C, T] in label units, that of standardised targets, of each crystal [C]."""
        targets = self.batches.labels[rows]  # what is learned of them
        compositions = compositions_for(self.statistics, self.dataset.table, rows)
        found = to_outputs(predictions, self.statistics, compositions)
        expected = standardise(targets, self.statistics)
        return np.asarray(loss_per_crystal(self.config.loss, found, expected, np.isfinite(targets)))

    def compare(
        self, candidates: Mapping[str, Tree], before: Callable[[str], None], folder: Path | None, not_written: list[str]
    ) -> dict[str, Any]:
        """Makes the part of summary.json about errors, in label units, of several weights of one model.

        The test predictions of those weights that are `selected` become predictions_test.csv and a figure in
        `folder`, if given; adds to `not_written` what cannot be written. Calls `before` the predictions of every split.
        """
        dataset, statistics, judged = self.dataset, self.statistics, metrics_for(self.statistics)
        labels = {split: dataset.labels[dataset.splits[split]] for split in SPLITS}

        def predict(name: str, split: str) -> np.ndarray:
            before(split)
            return self.predict(candidates[name], dataset.splits[split], frame_draws(self.config))

        predictions = {name: {split: predict(name, split) for split in ("val", "test")} for name in candidates}
        losses = {name: self._losses(found["val"], dataset.splits["val"]) for name, found in predictions.items()}
        chosen = selected(losses)
        predictions[chosen] = {"train": predict(chosen, "train"), **predictions[chosen]}
        errors = {
            name: {split: target_metrics(values, labels[split], statistics) for split, values in by_split.items()}
            for name, by_split in predictions.items()
        }
        baseline = {split: mean_predictor_errors(labels[split], statistics, labels["train"]) for split in SPLITS}
        if folder:
            write_split(folder, dataset, "test", predictions[chosen]["test"], statistics, not_written)
        by_metric = {
            metric: {
                name: {split: {t: found[metric] for t, found in of.items()} for split, of in by_split.items()}
                for name, by_split in errors.items()
            }
            for metric in judged.titles
        }
        return {
            "test": with_baseline(errors[chosen]["test"], baseline["test"], statistics),
            "selected_weights": chosen,
            "val_loss": {name: float(np.mean(found)) for name, found in losses.items()},
            **by_metric,
            f"mean_predictor_{judged.main}": baseline,
            "task": judged.task,
            "units": {s.name: s.unit for s in statistics},
        }
