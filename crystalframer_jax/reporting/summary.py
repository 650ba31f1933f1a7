"""Words and figures of a training: its model in a line, its history of scores, the tables at its end."""

from typing import Any

import numpy as np

from crystalframer_jax.config import TrainConfig
from crystalframer_jax.data.splits import SPLITS
from crystalframer_jax.reporting.metrics import METRICS
from crystalframer_jax.reporting.suspects import suspects_text
from crystalframer_jax.text import duration, table, with_unit

WINDOW, BEST = 50, 10  # of the score history: epochs in a running mean, epochs in the mean of the best


def describe(config: TrainConfig) -> str:
    """Describes the model of a configuration in a line."""
    frames = f"{config.frame_method} frames" if config.value_pe_angle_real else "no frames (Crystalformer)"
    cutoff = config.cutoff
    reach = (
        f"within {cutoff:.2f} Å" if isinstance(cutoff, float) else f"in a box of {2 * cutoff.lattice_range + 1}^3 cells"
    )
    start = f", starting from {config.pretrained_model}" if config.pretrained_model else ""
    return (
        f"{config.num_layers} blocks of {config.head_num} heads, {frames}, domain {config.domain}, neighbors {reach}, "
        f"{config.precision}{start}"
    )


def score_history(val_losses: list[float]) -> dict[str, float]:
    """Returns figures of the validation losses of all epochs (none: none), those that the official code logs (hp/...).

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


def summary_text(summary: dict[str, Any]) -> str:
    """Writes the table at the end of the training of a model: the errors of its weights on all splits."""
    rows = []
    selected = summary["selected_weights"]
    main, *others = titles = METRICS[summary.get("task", "regression")].titles
    for target, unit in summary["units"].items():
        for name, errors in summary[main].items():
            label = f"{with_unit(target, unit)}, {name} weights" + (" *" if name == selected else "")
            of_splits = [errors.get(split, {}).get(target) for split in SPLITS]
            rows.append([label, *of_splits, *(summary[m][name]["test"][target] for m in others)])
        baseline, empty = summary[f"mean_predictor_{main}"], [None] * len(others)
        rows.append([f"{with_unit(target, unit)}, mean predictor", *(baseline[s][target] for s in SPLITS), *empty])
    text = table([titles[main], *SPLITS, *(f"test {titles[m]}" for m in others)], rows)
    skipped = summary["skipped_steps"]
    return (
        f"{text}\n* selected by validation loss\n"
        f"{summary['epochs']} epochs in {duration(summary['seconds'])}, {summary['crystals_per_s']:.0f} crystals/s, "
        f"{summary['parameters']:,} trainable parameters"
        + (f"; {skipped} steps that were not finite were skipped" if skipped else "")
    )


def ensemble_text(summary: dict[str, Any]) -> str:
    """Writes the table at the end of the training of an ensemble: test errors of members and of all together."""
    rows: list[list[Any]] = []
    main, *_ = titles = METRICS[summary.get("task", "regression")].titles
    for target, unit in summary["units"].items():
        label, empty, found = with_unit(target, unit), [None] * len(titles), summary["test"][target]
        errors = [member["test"][target] for member in summary["members"]]
        for member, error in zip(summary["members"], errors, strict=True):
            rows.append([f"{label}, {member['run']} ({member['weights']} weights)", error, *empty])
        rows.append([f"{label}, mean of these errors", float(np.mean(errors)), *empty])
        rows.append([f"{label}, ensemble", *(found[key] for key in (*titles, "mean_std"))])
        rows.append([f"{label}, mean predictor", found[f"mean_predictor_{main}"], *empty])
    return table(["test", *titles.values(), "mean std"], rows) + "\n" + suspects_text(summary["suspect_labels"])
