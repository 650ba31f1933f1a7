"""Files of labels and predictions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.files import write_csv
from crystalframer_jax.reporting.metrics import _check_shapes


def write_predictions(
    file: str | Path,
    ids: Sequence[str] | np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    statistics: tuple[TargetStatistics, ...],
    spread: np.ndarray | None = None,
) -> None:
    """Write labels and predictions [C, T] as CSV: id,target,prediction, with several targets
    id,target_A,prediction_A,target_B,prediction_B, and after them the spreads, if given: spread or spread_A,spread_B.

    The units are those of the labels. Numbers have all their digits; an unknown label is an empty cell.
    """
    _check_shapes(predictions, labels)
    ends = [f"_{s.name}" for s in statistics] if len(statistics) > 1 else [""]
    header = ["id", *(f"{kind}{end}" for end in ends for kind in ("target", "prediction"))]
    columns = [np.where(np.isfinite(labels), labels.astype(object), ""), predictions.astype(object)]
    rows = np.stack(columns, axis=2).reshape(len(labels), 2 * len(statistics))
    if spread is not None:
        header += [f"spread{end}" for end in ends]
        rows = np.concatenate([rows, spread.astype(object)], axis=1)
    write_csv(file, header, [[str(id), *row] for id, row in zip(ids, rows.tolist(), strict=True)])
