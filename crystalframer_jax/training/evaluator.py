"""Predictions for the splits of the data set of a training, by all of its devices."""

from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict

from crystalframer_jax.data.loader import TrainingBatches
from crystalframer_jax.errors import UserError
from crystalframer_jax.inference.evaluation import groups_of, mean_absolute_errors, predict_rows
from crystalframer_jax.model.regressor import CrystalFramer
from crystalframer_jax.training.report import mean_loss
from crystalframer_jax.training.state import TargetStatistics, Tree
from crystalframer_jax.training.step import make_forward


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says where and why."""


class Evaluator:
    """Predicts crystals of the data set of a training, in batches like those of the training."""

    def __init__(
        self,
        config: ConfigDict,
        model: CrystalFramer,
        batches: TrainingBatches,
        statistics: tuple[TargetStatistics, ...],
        report: Callable[[str], None],
    ):
        self.config, self.batches, self.statistics, self.report = config, batches, statistics, report
        self.dataset = batches.dataset
        self.forward = make_forward(model, batches.devices)

    def predict(self, weights: Tree, rows: np.ndarray, num_frame_samples: int = 1) -> np.ndarray:
        """Predictions [C, T] in label units for rows of the table."""
        return predict_rows(
            self.forward,
            weights,
            self.dataset.table,
            self._groups(rows),
            self.statistics,
            self.batches.shapes,
            num_frame_samples,
            self.batches.device_table,
            self.batches.devices,
        ).mean

    def _groups(self, rows: np.ndarray) -> Iterator[np.ndarray]:
        """Batches of crystals."""
        groups = groups_of(rows, self.batches.batch_size)
        for number, group in enumerate(groups, 1):
            self.report(f"prediction of batch {number} of {len(groups)}")
            yield group

    def validate(self, weights: Tree, epoch: int) -> tuple[float, dict[str, float]]:
        """Validation loss, and MAE of every target in label units; TrainingError if the loss is not finite."""
        share, size = self.config.val_percent_check, self.batches.batch_size
        rows = self.dataset.splits["val"]
        rows = rows[: size * max(1, int(share * -(-len(rows) // size)))]
        predictions = self.predict(weights, rows)
        labels = self.dataset.labels[rows]
        loss = mean_loss(self.config.loss_func, predictions, labels, self.statistics)
        if not np.isfinite(loss):
            bad = self.dataset.table.ids[rows[~np.isfinite(predictions).all(axis=1)]]
            raise TrainingError(
                f"the validation loss is not finite after epoch {epoch + 1} ({len(bad)} of {len(rows)} predictions are "
                f"not, {', '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}); the checkpoint before it is kept, try a "
                "smaller lr"
            )
        return loss, mean_absolute_errors(predictions, labels, self.statistics)
