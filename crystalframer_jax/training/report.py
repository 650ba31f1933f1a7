"""What a training says of itself: the model at its start, the errors, files and figures at its end."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from crystalframer_jax.config import neighbor_cutoff
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.inference.evaluation import mean_predictor_errors, regression_metrics, write_predictions
from crystalframer_jax.training import plots
from crystalframer_jax.training.logging import duration, table
from crystalframer_jax.training.loss import loss_per_crystal
from crystalframer_jax.training.state import TargetStatistics, Tree

METRICS = ("mae", "rmse", "r2")
WINDOW, BEST = 50, 10  # of the score history: epochs in a running mean, epochs in the mean of the best
Predict = Callable[[Tree, str], np.ndarray]  # variables, split -> predictions [C, T] in label units


def describe(config: ConfigDict) -> str:
    """What model a configuration is, in a line."""
    frames = f"{config.frame_method} frames" if config.value_pe_angle_real else "no frames (Crystalformer)"
    cutoff = neighbor_cutoff(config)
    reach = (
        f"within {cutoff:.2f} Å" if isinstance(cutoff, float) else f"in a box of {2 * cutoff.lattice_range + 1}^3 cells"
    )
    start = f", starting from {config.pretrained_model}" if config.pretrained_model else ""
    return (
        f"{config.num_layers} blocks of {config.head_num} heads, {frames}, domain {config.domain}, neighbors {reach}, "
        f"{config.precision}{start}"
    )


def mean_loss(
    name: str, predictions: np.ndarray, labels: np.ndarray, statistics: tuple[TargetStatistics, ...]
) -> float:
    """The loss `name` of predictions [C, T] in label units: mean over the crystals, of standardised targets."""
    mean, std = (np.array([getattr(s, part) for s in statistics]) for part in ("mean", "std"))
    standard, target = ((np.asarray(values) - mean) / std for values in (predictions, labels))
    return float(np.mean(loss_per_crystal(name, standard, target, np.isfinite(labels))))


def score_history(val_losses: list[float]) -> dict[str, float]:
    """Figures of the validation losses of all epochs (none: none), those that the official code logs (its hp/...).

    The last, the smallest, the mean over the last 50 epochs, the smallest such mean, and the mean of the 10 smallest.
    """
    losses = np.array(val_losses)
    if not losses.size:
        return {}
    running = [losses[max(0, end - WINDOW) : end].mean() for end in range(1, len(losses) + 1)]
    return {
        "val": float(losses[-1]),
        "min": float(losses.min()),
        f"avr{WINDOW}": float(running[-1]),
        f"min_avr{WINDOW}": float(min(running)),
        f"mean_min{BEST}": float(np.sort(losses)[:BEST].mean()),
    }


def evaluate_candidates(
    candidates: Mapping[str, Tree],
    predict: Predict,
    dataset: Dataset,
    statistics: tuple[TargetStatistics, ...],
    loss: str,
    workdir: Path | None,
) -> dict[str, Any]:
    """The part of summary.json about errors, in label units, of several weights of one model.

    Those with the smallest validation loss are selected: their test predictions become predictions_test.csv and
    parity_test.png in `workdir`, if that is given.
    """
    labels = {split: dataset.labels[dataset.splits[split]] for split in SPLITS}
    predictions = {name: {s: predict(weights, s) for s in ("val", "test")} for name, weights in candidates.items()}
    val_loss = {name: mean_loss(loss, p["val"], labels["val"], statistics) for name, p in predictions.items()}
    selected = min(val_loss, key=lambda name: (math.isnan(val_loss[name]), val_loss[name]))
    predictions[selected] = {"train": predict(candidates[selected], "train"), **predictions[selected]}
    errors = {
        name: {split: regression_metrics(values, labels[split], statistics) for split, values in by_split.items()}
        for name, by_split in predictions.items()
    }
    baseline = {split: mean_predictor_errors(labels[split], statistics, labels["train"]) for split in SPLITS}
    if workdir:
        on_test = predictions[selected]["test"]
        ids = dataset.table.ids[dataset.splits["test"]]
        write_predictions(workdir / "predictions_test.csv", ids, labels["test"], on_test, statistics)
        names, units = [s.name for s in statistics], [s.unit for s in statistics]
        plots.parity(labels["test"], on_test, names, units, workdir / "parity_test.png", split="test")
    return {
        "test": {
            s.name: {
                **errors[selected]["test"][s.name],
                "mean_predictor_mae": baseline["test"][s.name],
                "unit": s.unit,
            }
            for s in statistics
        },
        "selected_weights": selected,
        "val_loss": val_loss,
        **{
            metric: {
                name: {split: {t: m[metric] for t, m in of.items()} for split, of in by_split.items()}
                for name, by_split in errors.items()
            }
            for metric in METRICS
        },
        "mean_predictor_mae": baseline,
        "units": {s.name: s.unit for s in statistics},
    }


def summary_text(summary: dict[str, Any]) -> str:
    """The table at the end of a run."""
    rows = []
    selected = summary["selected_weights"]
    for target, unit in summary["units"].items():
        for name, errors in summary["mae"].items():
            label = f"{target} ({unit}), {name} weights" + (" *" if name == selected else "")
            mae = [errors.get(split, {}).get(target) for split in SPLITS]
            rows.append([label, *mae, *(summary[m][name]["test"][target] for m in ("rmse", "r2"))])
        baseline = summary["mean_predictor_mae"]
        rows.append([f"{target} ({unit}), mean predictor", *(baseline[s][target] for s in SPLITS), None, None])
    text = table(["MAE", *SPLITS, "test RMSE", "test R2"], rows)
    skipped = summary["skipped_steps"]
    return (
        f"{text}\n* selected: smallest validation loss\n"
        f"{summary['epochs']} epochs in {duration(summary['seconds'])}, {summary['crystals_per_s']:.0f} crystals/s, "
        f"{summary['parameters']:,} trainable parameters"
        + (f"; {skipped} steps that were not finite were skipped" if skipped else "")
    )
