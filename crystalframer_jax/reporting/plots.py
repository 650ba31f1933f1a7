"""Figures of a run for a paper: learning curve, parity, ROC curves, calibration. `write` makes one a PNG.

Sizes are those of a column of a journal, so that figures are included without scaling: letters of 8 and 7 points,
300 dots per inch, and colours that colour-blind readers can tell apart (Okabe and Ito).
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from crystalframer_jax.files import replacing
from crystalframer_jax.reporting.calibration import (
    COVERAGE_LEVELS,
    comparable,
    coverage,
    miscalibration_area,
    reliability,
    rms,
)
from crystalframer_jax.reporting.metrics import class_metrics, errors, roc_curve
from crystalframer_jax.text import with_unit

COLUMN = 3.4  # inches: width of one column
DIAGONAL: Any = {"color": "black", "linewidth": 0.7, "dashes": (4, 2), "zorder": 1}
BLUE, VERMILION, GREEN, GRAY = "#0072B2", "#D55E00", "#009E73", "#7F7F7F"
STYLE: Any = {
    "figure.dpi": 300,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same letters everywhere
    "font.size": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "text.parse_math": False,  # names of targets are shown as they are
}
DARK: Any = {
    "figure.facecolor": "#1b1e23",
    "axes.facecolor": "#1b1e23",
    "savefig.facecolor": "#1b1e23",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#e6e6e6"),
}

SCATTER_POINTS = 1500  # more crystals than this are shown by their density
MAX_BINS, POINTS_PER_BIN = 10, 20  # of a reliability diagram


def style(dark: bool = False) -> Any:
    """Matplotlib's own defaults and STYLE, DARK if wanted, whatever the user's settings; these come back afterwards."""
    return matplotlib.style.context(STYLE | (DARK if dark else {}), after_reset=True)


@style()
def learning_curve(epochs: Sequence[dict[str, Any]], swa_first_epoch: int | None = None) -> Figure:
    """Draws losses and learning rate against epochs, as lines of metrics.jsonl hold them.

    Epochs count from 0 in the data and from 1 in the figure. `swa_first_epoch` is the first (from 0) whose weights
    are averaged. Raises ValueError if there are no epochs.
    """
    if not epochs:
        raise ValueError("there are no epochs to plot")
    number = np.array([line["epoch"] + 1 for line in epochs])
    loss, val_loss, lr = (np.array([line[key] for line in epochs]) for key in ("loss", "val_loss", "lr"))
    best = int(np.argmin(val_loss))

    show_lr = np.ptp(lr) > 1e-6 * np.max(np.abs(lr))
    figure = Figure(figsize=(COLUMN, 3.2 if show_lr else 2.5), layout="constrained")
    heights = (3, 1) if show_lr else (1,)
    panels = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)
    top, bottom = panels[0, 0], panels[-1, 0]

    line: dict[str, Any] = {"linewidth": 1.2} if len(number) <= 200 else {"linewidth": 0.7}
    if len(number) <= 30:
        line |= {"marker": "o", "markersize": 2.5}
    top.plot(number, loss, color=BLUE, label="training", **line)
    top.plot(number, val_loss, color=VERMILION, label="validation", **line)
    label = f"best (epoch {number[best]:,})"
    top.plot(number[best], val_loss[best], "D", ms=6.5, mfc="none", mec="black", mew=0.9, ls="none", label=label)
    top.margins(y=0.1)
    smallest = min(loss.min(), val_loss.min())
    if smallest > 0 and max(loss.max(), val_loss.max()) > 3 * smallest:
        _log_axis(top)
    top.set_ylabel("log loss" if "val_roc_auc" in epochs[0] else "loss (standardized)")

    if show_lr:
        power = math.floor(math.log10(np.max(np.abs(lr))))
        bottom.plot(number, lr / 10.0**power, color=GRAY, **line)
        superscript = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        bottom.set_ylabel(f"learning\nrate / 10{superscript}")
        bottom.set_ylim(0, 1.12 * lr.max() / 10.0**power)
        bottom.yaxis.set_major_locator(MaxNLocator(3))
        figure.align_ylabels([top, bottom])
    if swa_first_epoch is not None and swa_first_epoch < number[-1]:
        for axes, text in {bottom: None, top: "weights averaged"}.items():
            axes.axvspan(swa_first_epoch + 0.5, number[-1] + 0.5, color=GREEN, alpha=0.25, linewidth=0, label=text)
    bottom.set_xlabel("epoch")
    bottom.set_xlim(0.5 if len(number) <= 30 else 0, number[-1] + 0.5)
    bottom.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    bottom.xaxis.set_major_formatter("{x:,.0f}")
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper center", ncols=2, handlelength=1.5)
    return figure


@style()
def validation_curves(runs: Mapping[str, Sequence[dict[str, Any]]], target: str, unit: str) -> Figure:
    """Draws the validation errors of several runs, by name, against their epochs; ValueError if there are none."""
    errors_of = {
        name: [line["val_mae"][target] for line in epochs if target in line["val_mae"]] for name, epochs in runs.items()
    }
    errors_of = {name: found for name, found in errors_of.items() if found}
    if not errors_of:
        raise ValueError("there are no epochs to plot")
    figure = Figure(figsize=(COLUMN, 2.5), layout="constrained")
    axes = figure.subplots()
    colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(errors_of)))
    for color, (name, error) in zip(colors, errors_of.items(), strict=True):
        marker = "o" if len(error) == 1 else ""
        axes.plot(range(1, len(error) + 1), error, marker=marker, color=color, linewidth=1.2, label=name)
    found = np.concatenate([*errors_of.values()])
    if found.min() > 0 and found.max() > 3 * found.min():
        _log_axis(axes)
    axes.set(xlabel="epoch", ylabel=with_unit(f"validation MAE, {target}", unit))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    figure.legend(loc="outside upper center", ncols=2, handlelength=1.5)
    return figure


@style()
def parity(
    labels: np.ndarray, predictions: np.ndarray, names: Sequence[str], units: Sequence[str], split: str
) -> Figure:
    """Draws predictions against labels, both [C, T], one panel for each target; unknown labels (NaN) are left out.

    The errors in a panel are over all crystals with a label, also those beyond its axes, which are marked at the edge.
    Raises ValueError if the shapes do not agree.
    """
    labels, predictions = np.asarray(labels, float), np.asarray(predictions, float)
    if labels.ndim != 2 or labels.shape != predictions.shape or not labels.shape[1] == len(names) == len(units) > 0:
        raise ValueError(
            f"labels {labels.shape} and predictions {predictions.shape} must be [crystals, targets] "
            f"of {len(names)} names and {len(units)} units"
        )
    columns = min(len(names), 2)
    dense = max(np.sum(np.isfinite(labels), axis=0)) > SCATTER_POINTS  # then the panels share their width with a scale
    figure, panels = _square_panels(len(names), columns, right=0.62 if dense else 0.14, top=0.64)
    for i, axes in enumerate(panels):
        text = _parity_panel(axes, labels[:, i], predictions[:, i], units[i])
        axes.set_title("\n".join([f"{names[i]}, {split}", *text]), loc="left", fontsize=7, linespacing=1.35)
    return figure


@style()
def roc(labels: np.ndarray, probabilities: np.ndarray, names: Sequence[str], split: str) -> Figure:
    """Draws ROC curves of probabilities of class 1 for labels 0 and 1, both [C, T], one panel for each target.

    Unknown labels (NaN) are left out, and so are probabilities that are not finite. Marked is the threshold 0.5.
    """
    figure, panels = _square_panels(len(names), min(len(names), 2), right=0.14, top=0.64)
    for i, axes in enumerate(panels):
        valid = np.isfinite(labels[:, i]) & np.isfinite(probabilities[:, i])
        is_one, values = labels[valid, i] == 1, probabilities[valid, i]
        caption = [f"{is_one.sum():,} of class 1, {(~is_one).sum():,} of class 0"]
        axes.plot([0, 1], [0, 1], **DIAGONAL)
        if 0 < is_one.sum() < len(is_one):
            found = class_metrics(values, is_one)
            area, accuracy = _number(found["roc_auc"]), _number(found["balanced_accuracy"])
            caption = [f"ROC-AUC {area}, balanced accuracy {accuracy}", *caption]
            axes.plot(*roc_curve(values, is_one), color=BLUE, linewidth=1.2)
            at_half = [np.mean(values[chosen] >= 0.5) for chosen in (~is_one, is_one)]
            axes.plot(*at_half, "o", ms=4, color=VERMILION, label="threshold 0.5", clip_on=False, zorder=3)
            axes.legend(loc="lower right", handletextpad=0.2)
        axes.set_title("\n".join([f"{names[i]}, {split}", *caption]), loc="left", fontsize=7, linespacing=1.35)
        axes.set(xlabel="share of class 0 called 1", ylabel="share of class 1 called 1", xlim=(-0.02, 1.02))
        axes.set(ylim=(-0.02, 1.02), xticks=np.linspace(0, 1, 6), yticks=np.linspace(0, 1, 6))
        axes.spines[["top", "right"]].set_visible(True)
    return figure


def _square_panels(count: int, columns: int, right: float, top: float) -> tuple[Figure, list[Axes]]:
    """Makes rows of square panels, each with the width of a column; `right` and `top` are margins in inches."""
    left, bottom = 0.62, 0.42
    side, rows = COLUMN - left - right, math.ceil(count / columns)
    width, height = COLUMN * columns, (bottom + side + top) * rows
    figure = Figure(figsize=(width, height))
    panels = []
    for i in range(count):
        row, column = divmod(i, columns)
        x, y = column * COLUMN + left, height - (row + 1) * height / rows + bottom
        panels.append(figure.add_axes((x / width, y / height, side / width, side / height)))
    return figure, panels


def _parity_panel(axes: Axes, labels: np.ndarray, predictions: np.ndarray, unit: str) -> list[str]:
    """Draws one target: points or, for many crystals, their density, and the diagonal; returns its caption in lines."""
    known = np.isfinite(labels)
    valid = known & np.isfinite(predictions)
    axes.set_xlabel(with_unit("label", unit))
    axes.set_ylabel(with_unit("prediction", unit))
    axes.spines[["top", "right"]].set_visible(True)
    if not valid.any():
        axes.set(xticks=[], yticks=[])
        return ["no crystals"]
    labels, predictions = labels[valid], predictions[valid]
    limits = axis_range(labels, predictions)
    inside = (np.minimum(labels, predictions) >= limits[0]) & (np.maximum(labels, predictions) <= limits[1])
    axes.plot(limits, limits, **DIAGONAL)
    if inside.sum() > SCATTER_POINTS:
        _density(axes, labels[inside], predictions[inside], limits)
    else:
        size = 10 if inside.sum() <= 200 else 5
        axes.scatter(labels[inside], predictions[inside], s=size, color=BLUE, alpha=0.5, linewidths=0, zorder=2)
    if not inside.all():  # at the edge where they leave the panel
        x, y = np.clip([labels[~inside], predictions[~inside]], *limits)
        axes.scatter(x, y, s=16, marker="x", color=VERMILION, linewidths=1, clip_on=False, zorder=3)
    ticks = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3).tick_values(*limits)
    large = 1000 <= max(map(abs, limits)) < 1e6
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks)
        axis.set_major_formatter("{x:,.0f}" if large else ScalarFormatter(useOffset=False))
    axes.set(xlim=limits, ylim=limits)

    error = errors(predictions, labels)
    mae, rmse, r2 = error["mae"], error["rmse"], error["r2"]
    caption = [
        f"MAE {_number(mae)}, RMSE {_number(rmse)}, R² {'undefined' if r2 is None else _number(r2, 4)}",
        f"{len(labels):,} crystal{'s' if len(labels) != 1 else ''}",
    ]
    if not inside.all():
        caption[-1] += f", {np.sum(~inside):,} beyond the axes (×)"
    if valid.sum() < known.sum():
        caption.append(f"{known.sum() - valid.sum():,} without finite prediction")
    return caption


def axis_range(labels: np.ndarray, predictions: np.ndarray) -> tuple[float, float]:
    """Returns the limits of both axes of a parity plot: everything, unless some outliers would squeeze the rest.

    Outliers are cut off where everything is over four times as wide as all but 1% (at least two) of the values at each
    end; the axes then reach half of that narrower width beyond it.
    """
    values = np.sort(np.concatenate([labels, predictions]))
    low, high = values[0], values[-1]
    ends = max(2, len(values) // 100)
    if len(values) > 4 * ends:
        core_low, core_high = values[ends], values[-1 - ends]
        width = core_high - core_low
        if 0 < 4 * width < high - low:
            low, high = max(low, core_low - width / 2), min(high, core_high + width / 2)
    margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
    return float(low - margin), float(high + margin)


def _density(axes: Axes, labels: np.ndarray, predictions: np.ndarray, limits: tuple[float, float]) -> None:
    bins = axes.hexbin(
        labels, predictions, gridsize=80, extent=(*limits, *limits), mincnt=1, cmap="viridis", linewidths=0.1, zorder=2
    )
    counts = np.asarray(bins.get_array())
    bins.set_norm(LogNorm(1, max(10, counts.max())))
    bar = axes.figure.colorbar(bins, cax=axes.inset_axes((1.03, 0, 0.045, 1)))
    bar.set_label("crystals", size=7, labelpad=2)
    bar.ax.yaxis.set_major_formatter("{x:,.0f}")
    bar.ax.yaxis.set_minor_formatter(NullFormatter())


@style()
def calibration(
    labels: np.ndarray, mean: np.ndarray, std: np.ndarray, name: str, unit: str
) -> tuple[Figure, dict[str, float]]:
    """Draws how well predicted deviations tell errors, for labels, predictions and deviations [C] of one target.

    Left: fraction of labels inside the central interval of the predicted Gaussian against its probability. Right: error
    against deviation in bins of equally many crystals. Also returns the area between the left curve and the diagonal
    (`miscalibration_area`, 0 to 0.5), `rmse`, `rms_std` and the number of `crystals`. Unknown labels (NaN) are left
    out; ValueError if none is known or a deviation is negative or not finite.
    """
    labels, mean, std = comparable(labels, mean, std)
    area = miscalibration_area(labels, mean, std)
    figure, (left, right) = _square_panels(2, 2, right=0.14, top=0.46)
    figure.suptitle(f"{name}, {len(labels):,} crystal{'s' if len(labels) > 1 else ''}", fontsize=8, y=0.985)
    observed = coverage(labels, mean, std)
    left.fill_between(COVERAGE_LEVELS, COVERAGE_LEVELS, observed, color=BLUE, alpha=0.2, linewidth=0)
    left.plot([0, 1], [0, 1], **DIAGONAL)
    left.plot(COVERAGE_LEVELS, observed, color=BLUE, linewidth=1.2)
    left.set(xlim=(0, 1), ylim=(0, 1), xlabel="probability of the interval", ylabel="share of labels inside")
    left.set_title(f"miscalibration area {_number(area)}")
    corner: dict[str, Any] = {"fontsize": 7, "color": GRAY, "transform": left.transAxes}
    if observed[COVERAGE_LEVELS <= 0.5].max() < 0.9:  # else the curve runs through these words
        left.text(0.04, 0.96, "deviations too large", ha="left", va="top", **corner)
    if observed[COVERAGE_LEVELS >= 0.5].min() > 0.1:
        left.text(0.97, 0.03, "deviations too small", ha="right", va="bottom", **corner)

    num_bins = max(1, min(MAX_BINS, len(labels) // POINTS_PER_BIN))
    rms_std, rmse, standard_error = reliability(labels, mean, std, num_bins)
    right.set_autoscale_on(False)
    right.errorbar(
        rms_std, rmse, standard_error, fmt="o", ms=3.5, color=VERMILION, elinewidth=0.8, capsize=2, capthick=0.8
    )
    ends = np.concatenate([rms_std, rmse - standard_error, rmse + standard_error])
    points = np.concatenate([rms_std, rmse])
    if points.min() > 0 and points.max() > 10 * points.min():
        limits = (max(ends[ends > 0].min(), points.min() / 3) / 1.2, ends.max() * 1.2)
        _log_axis(right, "both")
    else:
        upper = 1.1 * ends.max() or 1.0
        limits = (-0.03 * upper, upper)  # so that points of deviation 0 show
        for axis in (right.xaxis, right.yaxis):
            axis.set_major_locator(MaxNLocator(5))
    right.plot(limits, limits, **DIAGONAL)
    right.set(
        xlim=limits, ylim=limits, xlabel=with_unit("predicted deviation, rms", unit), ylabel=with_unit("RMSE", unit)
    )
    right.set_title(f"{num_bins} bins of equal counts" if num_bins > 1 else "all crystals in one bin")
    numbers = {"miscalibration_area": area, "rmse": rms(mean - labels), "rms_std": rms(std), "crystals": len(labels)}
    return figure, numbers


def _log_axis(axes: Axes, which: str = "y") -> None:
    """Makes axes logarithmic with plain numbers at ticks, also within one decade."""
    for axis in (axes.xaxis, axes.yaxis) if which == "both" else (axes.yaxis,):
        axes.set(**{f"{axis.axis_name}scale": "log"})
        low, high = axis.get_data_interval()
        if high < 10 * low and which == "y":
            subs: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 6.0)
        else:  # numbers side by side need more room than those above each other
            subs = (1.0, 2.0, 5.0) if high < (30 if which == "both" else 1000) * low else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs))
        axis.set_major_formatter("{x:,.10g}")
        axis.set_minor_formatter(NullFormatter())


def _number(value: float, digits: int = 3) -> str:
    """Writes three significant digits without an exponent between 0.0001 and a million, as 0.0263 or 1,240."""
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}".replace("-", "−")
    decimals = digits - 1 - (math.floor(math.log10(abs(value))) if value != 0 else digits - 1)
    return f"{value:,.{max(0, decimals)}f}".replace("-", "−")


@style()
def write(figure: Figure, file: Path) -> None:
    """Writes a figure in the format that the file ends in; a reader sees the old one or the new."""
    with replacing(file) as temporary:
        figure.savefig(temporary, format=file.suffix[1:].lower() or "png")
