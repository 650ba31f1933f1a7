"""Figures: the numbers they state against numpy and analytical results, what the axes show, and the files."""

import os
import warnings
from unittest import mock

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread
from scipy.integrate import quad
from scipy.stats import norm

from crystalframer_jax.reporting import plots
from crystalframer_jax.reporting.calibration import COVERAGE_LEVELS, coverage, miscalibration_area, reliability
from crystalframer_jax.reporting.element_figures import periodic_table
from crystalframer_jax.reporting.metrics import errors
from crystalframer_jax.reporting.plots import (
    SCATTER_POINTS,
    axis_range,
    calibration,
    learning_curve,
    parity,
    style,
    validation_curves,
    write,
)


@pytest.fixture(autouse=True)
def _no_warnings_and_the_style_of_the_figures():
    """Every warning is an error: an empty axis, a division by zero, a layout that does not fit."""
    with warnings.catch_warnings(), style():
        warnings.simplefilter("error")
        yield


def epochs_of(count, spread=1.0, const_lr=False):
    """Losses that fall from 1 + spread to 1, best in the middle of the run, as lines of metrics.jsonl."""
    t = np.arange(count)
    loss = 1 + spread * np.exp(-5 * t / count)
    val_loss = 1.1 + spread * np.exp(-5 * t / count)
    val_loss[count // 2] = 1.01
    lr = np.full(count, 1e-3) if const_lr else 5e-4 / np.sqrt(1 + t)
    return [
        {"epoch": i, "step": 10 * i, "loss": loss[i], "val_loss": val_loss[i], "val_mae": {"e": 1.0}, "lr": lr[i]}
        for i in range(count)
    ]


def draw(figure):
    """Lay the figure out, so that ticks and positions are those of the file."""
    figure.draw_without_rendering()
    return figure


def overlaps(figure):
    """Pairs of texts of a figure that cover each other, other than by touching."""
    draw(figure)
    texts = [t for axes in figure.axes for t in [*axes.get_xticklabels(), *axes.get_yticklabels()] if inside(axes, t)]
    texts += [t for axes in figure.axes for t in [axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]]
    texts += [t for axes in figure.axes for t in axes.texts]
    texts += [t for legend in figure.legends for t in legend.get_texts()]
    boxes = [(t.get_text(), t.get_window_extent().padded(-1)) for t in texts if t.get_text() and t.get_visible()]
    return [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[:i] if box.overlaps(other)]


def inside(axes, label):
    """Whether a tick label is drawn: matplotlib also keeps some beyond the limits."""
    x, y = label.get_position()
    values, limits = (x, axes.get_xlim()) if label in axes.get_xticklabels() else (y, axes.get_ylim())
    return min(limits) <= values <= max(limits)


def within(figure):
    """Texts that leave the figure."""
    draw(figure)
    width, height = figure.bbox.size
    texts = [t for axes in figure.axes for t in [axes.xaxis.label, axes.yaxis.label, axes.title, axes._left_title]]
    texts += [t for legend in figure.legends for t in legend.get_texts()]
    boxes = {t.get_text(): t.get_window_extent() for t in texts if t.get_text()}
    return [
        text for text, box in boxes.items() if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]


# ------------------------------------------------------------------------------------------------ learning curve


@pytest.mark.parametrize("count", [1, 2, 12, 50, 2000])
def test_learning_curve_shows_the_losses_and_the_best_epoch(count):
    epochs = epochs_of(count)
    figure = learning_curve(epochs, None)
    top = figure.axes[0]
    lines = {line.get_label(): line for line in top.lines}
    best = min(epochs, key=lambda line: line["val_loss"])
    np.testing.assert_array_equal(lines["training"].get_xdata(), np.arange(count) + 1)
    np.testing.assert_array_equal(lines["training"].get_ydata(), [line["loss"] for line in epochs])
    np.testing.assert_array_equal(lines["validation"].get_ydata(), [line["val_loss"] for line in epochs])
    mark = lines[f"best (epoch {best['epoch'] + 1:,})"]
    assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (best["epoch"] + 1, best["val_loss"])
    low, high = figure.axes[-1].get_xlim()
    assert low < 1 and high > count
    assert overlaps(figure) == [] and within(figure) == []


@pytest.mark.parametrize(("spread", "scale"), [(1.0, "linear"), (1.5, "linear"), (3.0, "log"), (99.0, "log")])
def test_losses_that_span_more_than_a_factor_of_three_are_shown_on_a_logarithmic_axis(spread, scale):
    figure = learning_curve(epochs_of(100, spread), None)
    assert figure.axes[0].get_yscale() == scale
    draw(figure)
    limits = figure.axes[0].get_ylim()
    ticks = [tick for tick in figure.axes[0].get_yticks() if limits[0] <= tick <= limits[1]]
    assert len(ticks) >= 3


def test_a_loss_of_zero_keeps_the_axis_linear():
    epochs = epochs_of(12, 9.0)
    epochs[-1]["loss"] = 0.0
    assert learning_curve(epochs, None).axes[0].get_yscale() == "linear"


def test_the_learning_rate_has_a_panel_where_it_changes():
    epochs = epochs_of(12)
    _, bottom = learning_curve(epochs, None).axes
    assert bottom.get_ylabel().endswith("10⁻⁴")
    np.testing.assert_allclose(bottom.lines[0].get_ydata(), [line["lr"] / 1e-4 for line in epochs])
    assert len(learning_curve(epochs_of(12, const_lr=True), None).axes) == 1


@pytest.mark.parametrize(("first", "shaded"), [(None, None), (9, (9.5, 12.5)), (11, (11.5, 12.5)), (12, None)])
def test_epochs_whose_weights_are_averaged_are_shaded(first, shaded):
    for axes in learning_curve(epochs_of(12), first).axes:
        found = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
        assert found == ([] if shaded is None else [shaded])
    labels = [text.get_text() for text in learning_curve(epochs_of(12), first).legends[0].get_texts()]
    assert ("weights averaged" in labels) == (shaded is not None)


def test_epochs_are_whole_numbers_with_thousands_separators():
    figure = draw(learning_curve(epochs_of(2000), 1950))
    assert "2,000" in [label.get_text() for label in figure.axes[-1].get_xticklabels()]
    assert "best (epoch 1,001)" in [text.get_text() for text in figure.legends[0].get_texts()]
    few = draw(learning_curve(epochs_of(3), None)).axes[-1]
    assert {label.get_text() for label in few.get_xticklabels()} >= {"1", "2", "3"}
    assert not any("." in label.get_text() for label in few.get_xticklabels())


def test_validation_errors_of_several_runs_are_compared():
    runs = {"one": epochs_of(12), "two": epochs_of(3), "not begun": []}
    for number, line in enumerate(runs["one"]):
        line["val_mae"] = {"e": 10.0 / (1 + number)}
    figure = validation_curves(runs, "e", "eV")
    one, two = figure.axes[0].get_lines()
    assert (one.get_label(), two.get_label()) == ("one", "two")
    np.testing.assert_array_equal(one.get_xydata()[[0, -1]], [[1, 10], [12, 10 / 12]])
    assert figure.axes[0].get_yscale() == "log" and overlaps(figure) == [] and within(figure) == []
    assert "validation MAE, e (eV)" in figure.axes[0].get_ylabel()
    with pytest.raises(ValueError, match="no epochs"):
        validation_curves(runs, "gap", "eV")


def test_the_periodic_table_shows_the_values_of_its_elements():
    figure = periodic_table({1: 0.02, 92: 0.5, 98: 0.1}, "MAE (eV)", "x")
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert len([text for text in texts if text.isalpha()]) == 98 and {"0.02", "0.5", "0.1"} < set(texts)
    places = {}
    for element, box in zip([t for t in texts if t.isalpha()], figure.axes[0].patches, strict=True):
        places[element] = box.get_xy()
        assert (box.get_facecolor()[3] > 0) == (element in ("H", "U", "Cf"))
    assert len(set(places.values())) == 98 and places["H"] == (1, 1) and places["He"] == (18, 1)
    assert overlaps(figure) == [] and within(figure) == []
    with pytest.raises(ValueError, match="no element"):
        periodic_table({}, "MAE")


def test_no_epochs_are_refused():
    with pytest.raises(ValueError, match="no epochs"):
        learning_curve([], None)


# ------------------------------------------------------------------------------------------------ parity


def sample(count, targets=1, noise=0.1, seed=0):
    generator = np.random.default_rng(seed)
    labels = generator.normal(size=(count, targets))
    return labels, labels + noise * generator.normal(size=(count, targets))


def caption(figure, panel=0):
    return figure.axes[panel].get_title(loc="left")


def test_errors_are_those_of_numpy():
    labels, predictions = (values[:, 0] for values in sample(300))
    found = errors(predictions, labels)
    assert found["mae"] == pytest.approx(np.abs(labels - predictions).mean(), rel=1e-12)
    assert found["rmse"] == pytest.approx(np.linalg.norm(labels - predictions) / np.sqrt(300), rel=1e-12)
    assert found["r2"] == pytest.approx(1 - np.var(labels - predictions) / np.var(labels), abs=2e-3)
    residual = labels - predictions
    assert found["r2"] == pytest.approx(1 - residual @ residual / (300 * np.var(labels)), rel=1e-12)
    assert errors(np.full(300, labels.mean()), labels)["r2"] == pytest.approx(0, abs=1e-12)
    assert errors(predictions, np.full(300, 0.1))["r2"] is None


@pytest.mark.parametrize("count", [400, 6000])
def test_the_caption_states_numpys_errors_over_the_known_labels(count):
    labels, predictions = sample(count, targets=2)
    labels[: count // 2, 1] = np.nan
    figure = parity(labels, predictions, ["e_form", "gap"], ["eV/atom", "eV"], "test")
    for i, name in enumerate(["e_form", "gap"]):
        difference = (labels - predictions)[:, i]
        mae, rmse = np.nanmean(np.abs(difference)), np.sqrt(np.nanmean(difference**2))
        r2 = 1 - np.nanmean(difference**2) / np.nanvar(labels[:, i])
        known = count if i == 0 else count - count // 2
        assert caption(figure, i).split("\n") == [
            f"{name}, test",
            f"MAE {mae:.4f}, RMSE {rmse:.{4 if rmse < 0.1 else 3}f}, R² {r2:.4f}",
            f"{known:,} crystals",
        ]
    assert overlaps(figure) == [] and within(figure) == []


@pytest.mark.parametrize(
    ("scale", "text"),
    [
        (1e-6, "MAE 1.00e−06"),
        (0.00123456, "MAE 0.00123,"),
        (0.0999999, "MAE 0.1000,"),
        (0.5, "MAE 0.500,"),
        (12.345, "MAE 12.3,"),
        (12345.6, "MAE 12,346,"),
        (0.0, "MAE 0,"),
    ],
)
def test_numbers_have_three_significant_digits(scale, text):
    labels = np.linspace(0, 1, 11)[:, None]
    assert text in caption(parity(labels, labels + scale, ["x"], ["eV"], "val"))


def test_panels_are_square_with_equal_axes_and_a_diagonal():
    labels, predictions = sample(500, targets=3)
    predictions[:, 1] += 5
    figure = draw(parity(labels, predictions, ["a", "b", "c"], ["eV", "eV/atom", "log10 GPa"], "test"))
    panels = [axes for axes in figure.axes if axes.axison]
    assert len(panels) == 3
    for axes, unit in zip(panels, ["eV", "eV/atom", "log10 GPa"], strict=True):
        assert axes.get_xlim() == axes.get_ylim()
        box = axes.get_window_extent()
        assert box.width == pytest.approx(box.height, abs=0.5)
        np.testing.assert_array_equal(axes.lines[0].get_xdata(), axes.lines[0].get_ydata())
        assert (axes.get_xlabel(), axes.get_ylabel()) == (f"label ({unit})", f"prediction ({unit})")
        ticks = [
            [t for t in axis.get_majorticklocs() if axes.get_xlim()[0] <= t <= axes.get_xlim()[1]]
            for axis in (axes.xaxis, axes.yaxis)
        ]
        assert ticks[0] == ticks[1] and len(ticks[0]) >= 3


def test_few_crystals_are_points_and_many_are_counted():
    labels, predictions = sample(SCATTER_POINTS)
    (points,) = parity(labels, predictions, ["a"], ["eV"], "test").axes[0].collections
    np.testing.assert_array_equal(points.get_offsets(), np.concatenate([labels, predictions], axis=1))
    labels, predictions = sample(20000)
    figure = parity(labels, predictions, ["a"], ["eV"], "test")
    (bins,) = figure.axes[0].collections
    inside_axes = np.abs(np.concatenate([labels, predictions], 1)).max(1) <= figure.axes[0].get_xlim()[1]
    assert bins.get_array().sum() == pytest.approx(inside_axes.sum(), abs=20)
    assert bins.norm.vmin == 1 and bins.norm.vmax == bins.get_array().max()


@pytest.mark.parametrize("count", [30, 400, 6000])
@pytest.mark.parametrize("where", ["label", "prediction", "both"])
def test_an_outlier_does_not_squeeze_the_rest_and_is_told(count, where):
    labels, predictions = sample(count)
    if where in ("label", "both"):
        labels[7] = 500.0
    if where in ("prediction", "both"):
        predictions[7] = 500.0
    figure = parity(labels, predictions, ["a"], ["eV"], "test")
    low, high = figure.axes[0].get_xlim()
    assert -10 < low < -1 and 1 < high < 10
    assert caption(figure).endswith(f"{count:,} crystals, 1 beyond the axes (×)")
    cross = figure.axes[0].collections[-1].get_offsets()
    assert len(cross) == 1 and cross.max() == high, "marked at the edge"
    mae = np.abs(labels - predictions).mean()
    assert f"MAE {mae:.3g}" in caption(figure).replace("0, RMSE", ", RMSE") or f"MAE {mae:.4f}" in caption(figure)


def test_axes_hold_everything_where_nothing_sticks_out():
    labels, predictions = (values[:, 0] for values in sample(400))
    low, high = axis_range(labels, predictions)
    assert low < min(labels.min(), predictions.min()) and high > max(labels.max(), predictions.max())
    assert high - low < 1.2 * (max(labels.max(), predictions.max()) - min(labels.min(), predictions.min()))


@pytest.mark.parametrize(
    ("labels", "predictions", "end"),
    [
        ([[1.0]], [[1.2]], "R² undefined\n1 crystal"),
        ([[0.0]], [[0.0]], "R² undefined\n1 crystal"),
        (np.ones((40, 1)), np.ones((40, 1)), "R² undefined\n40 crystals"),
        (np.ones((40, 1)), np.linspace(0, 1, 40)[:, None], "R² undefined\n40 crystals"),
        ([[np.nan], [1.0], [2.0]], [[0.0], [1.1], [2.1]], "\n2 crystals"),
        ([[np.nan]], [[1.0]], "x, test\nno crystals"),
        (np.zeros((0, 1)), np.zeros((0, 1)), "x, test\nno crystals"),
        ([[1.0], [2.0], [3.0]], [[1.1], [np.nan], [np.inf]], "1 crystal\n2 without finite prediction"),
        (1e4 * np.arange(5.0)[:, None], 1e4 * np.arange(5.0)[:, None], "R² 1.000\n5 crystals"),
    ],
)
def test_edge_cases_are_drawn(labels, predictions, end, tmp_path):
    figure = parity(np.array(labels), np.array(predictions), ["x"], ["eV"], "test")
    assert caption(figure).endswith(end)
    low, high = figure.axes[0].get_xlim()
    assert np.isfinite([low, high]).all() and low < high
    write(figure, tmp_path / "parity.png")


def test_values_of_thousands_have_separators():
    labels = 1e4 * np.arange(5.0)[:, None]
    figure = draw(parity(labels, labels, ["x"], ["meV"], "test"))
    assert "20,000" in [label.get_text() for label in figure.axes[0].get_xticklabels()]


def test_names_are_shown_as_they_are():
    labels, predictions = sample(10)
    figure = draw(parity(labels, predictions, ["$E_{form}$ 50% a_b"], ["eV"], "val"))
    assert caption(figure).startswith("$E_{form}$ 50% a_b, val")


@pytest.mark.parametrize(
    ("shape", "names", "units"), [((5,), ["a"], ["eV"]), ((5, 2), ["a"], ["eV"]), ((5, 1), ["a"], []), ((5, 0), [], [])]
)
def test_shapes_that_do_not_agree_are_refused(shape, names, units):
    with pytest.raises(ValueError, match="labels"):
        parity(np.zeros(shape), np.zeros(shape), names, units, "test")
    with pytest.raises(ValueError, match="labels"):
        parity(np.zeros((5, 1)), np.zeros((6, 1)), ["a"], ["eV"], "test")


# ------------------------------------------------------------------------------------------------ calibration


def gaussian(count, factor=1.0, seed=1):
    """Labels whose errors are `factor` times as large as the predicted deviations say."""
    generator = np.random.default_rng(seed)
    mean, std = generator.normal(size=count), generator.uniform(0.1, 2.0, count)
    return mean + factor * std * generator.normal(size=count), mean, std


def test_calibrated_deviations_have_no_area():
    labels, mean, std = gaussian(200_000)
    np.testing.assert_allclose(coverage(labels, mean, std), COVERAGE_LEVELS, atol=0.005)
    assert miscalibration_area(labels, mean, std) < 0.003


@pytest.mark.parametrize("factor", [0.5, 2.0, 5.0])
def test_deviations_wrong_by_a_factor_follow_the_analytical_curve(factor):
    """An interval of ± w deviations holds a share 2 Φ(w / factor) - 1 of the labels."""
    labels, mean, std = gaussian(200_000, factor)
    with np.errstate(invalid="ignore"):
        curve = 2 * norm.cdf(norm.ppf((1 + COVERAGE_LEVELS) / 2) / factor) - 1
    np.testing.assert_allclose(coverage(labels, mean, std), curve, atol=0.005)
    area = abs(quad(lambda p: 2 * norm.cdf(norm.ppf((1 + p) / 2) / factor) - 1 - p, 0, 1)[0])
    assert miscalibration_area(labels, mean, std) == pytest.approx(area, abs=0.004)


def test_coverage_counts_labels_in_intervals():
    """By hand: errors of 0, 1, 2 and 3 deviations; 1 deviation is the central 68.3%."""
    labels, mean, std = np.array([0.0, 1.0, -4.0, 9.0]), np.zeros(4), np.array([1.0, 1.0, 2.0, 3.0])
    found = coverage(labels, mean, std, np.array([0.0, 0.68, 0.69, 0.96, 0.99, 0.998, 1.0]))
    np.testing.assert_array_equal(found, [0.25, 0.25, 0.5, 0.75, 0.75, 1.0, 1.0])


def test_a_deviation_of_zero_covers_an_exact_prediction_only():
    labels, mean, std = np.array([1.0, 2.0]), np.array([1.0, 2.5]), np.zeros(2)
    np.testing.assert_array_equal(coverage(labels, mean, std, np.array([0.0, 0.5, 0.999, 1.0])), [0.5, 0.5, 0.5, 1.0])
    assert miscalibration_area(labels[1:], mean[1:], std[1:]) == pytest.approx(0.495), "0.5 but for the last level"


def test_reliability_of_calibrated_deviations():
    """Bins of equal counts in order of the deviations, whose RMSE agrees within its error with them."""
    labels, mean, std = gaussian(5003)
    rms_std, rmse, standard_error = reliability(labels, mean, std, 10)
    order = np.argsort(std)
    np.testing.assert_allclose(rms_std[0], np.sqrt(np.mean(std[order[:501]] ** 2)), rtol=1e-12)
    first = (labels - mean)[order[:501]]
    np.testing.assert_allclose(rmse[0], np.sqrt(np.mean(first**2)), rtol=1e-12)
    assert (np.diff(rms_std) > 0).all()
    assert np.mean(np.abs(rmse - rms_std) / standard_error) < 2


def test_the_standard_error_of_the_rmse_is_its_spread_over_repetitions():
    """The RMSE of n Gaussian errors of deviation s scatters by s / sqrt(2 n)."""
    generator = np.random.default_rng(2)
    errors_of_runs = 0.3 * generator.normal(size=(400, 500))
    rmse, standard_error = np.array(
        [[values[0] for values in reliability(run, np.zeros(500), np.ones(500), 1)[1:]] for run in errors_of_runs]
    ).T
    assert np.std(rmse) == pytest.approx(0.3 / np.sqrt(1000), rel=0.1)
    assert np.mean(standard_error) == pytest.approx(0.3 / np.sqrt(1000), rel=0.02)


def test_calibration_returns_its_numbers_and_shows_them():
    labels, mean, std = gaussian(3000, 2.0)
    labels[:100] = np.nan
    figure, found = calibration(labels, mean, std, "e_form", "eV/atom")
    known = ~np.isnan(labels)
    assert found["crystals"] == 2900
    assert found["rmse"] == pytest.approx(np.sqrt(np.nanmean((labels - mean) ** 2)), rel=1e-12)
    assert found["rms_std"] == pytest.approx(np.sqrt(np.mean(std[known] ** 2)), rel=1e-12)
    assert figure._suptitle.get_text() == "e_form, 2,900 crystals"
    left, right = figure.axes
    assert left.get_title() == f"miscalibration area {found['miscalibration_area']:.3f}"
    np.testing.assert_array_equal(left.lines[1].get_ydata(), coverage(labels[known], mean[known], std[known]))
    assert right.get_title() == "10 bins of equal counts" and right.get_xlim() == right.get_ylim()
    assert overlaps(figure) == [] and within(figure) == []


@pytest.mark.parametrize("spread", [1.5, 30.0])
@pytest.mark.parametrize("count", [30, 5000])
def test_deviations_of_every_size_stay_inside_the_axes(count, spread):
    generator = np.random.default_rng(3)
    std = 0.01 * spread ** generator.uniform(-1, 1, count)
    figure = draw(calibration(std * generator.normal(size=count), np.zeros(count), std, "gap", "eV")[0])
    right = figure.axes[1]
    (low, high), points = right.get_xlim(), np.array(right.lines[0].get_xydata())
    assert low < points.min() and points.max() < high
    assert right.get_xscale() == right.get_yscale() == ("log" if spread > 10 and count > 30 else "linear")
    assert overlaps(figure) == [] and within(figure) == []


@pytest.mark.parametrize("count", [1, 2, 15, 50])
@pytest.mark.parametrize("std", [0.0, 1e-12, 0.1])
@pytest.mark.parametrize("error", [0.0, 0.1])
def test_few_crystals_and_deviations_of_zero_are_drawn(count, std, error, tmp_path):
    labels = np.linspace(-1, 1, count)
    figure, found = calibration(labels, labels + error, np.full(count, std), "x", "eV")
    write(figure, tmp_path / "calibration.png")
    assert all(np.isfinite(value) for value in found.values())


@pytest.mark.parametrize(
    ("labels", "mean", "std", "message"),
    [
        ([np.nan, np.nan], [1.0, 1.0], [1.0, 1.0], "no label is known"),
        ([1.0, 2.0], [1.0, 1.0], [1.0, -1.0], "not negative"),
        ([1.0, 2.0], [1.0, 1.0], [1.0, np.nan], "finite"),
        ([1.0, 2.0], [1.0, np.inf], [1.0, 1.0], "finite"),
        ([1.0, 2.0], [1.0, 1.0], [1.0], "equally many"),
    ],
)
def test_deviations_that_mean_nothing_are_refused(labels, mean, std, message):
    with pytest.raises(ValueError, match=message):
        calibration(np.array(labels), np.array(mean), np.array(std), "x", "eV")


# ------------------------------------------------------------------------------------------------ files


def figures():
    labels, predictions = sample(50, targets=2)
    deviations = gaussian(60)
    return {
        "learning_curve": (lambda: learning_curve(epochs_of(12), 9), (1020, 960)),
        "constant_rate": (lambda: learning_curve(epochs_of(12, const_lr=True)), (1020, 750)),
        "parity": (lambda: parity(labels, predictions, ["a", "b"], ["eV", "eV"], "test"), (2040, 1110)),
        "calibration": (lambda: calibration(*deviations, "a", "eV")[0], (2040, 1056)),
    }


@pytest.mark.parametrize("name", figures())
def test_files_are_pngs_of_300_dots_per_inch_at_the_width_of_columns(name, tmp_path):
    drawn, (width, height) = figures()[name]
    file = tmp_path / "figure.png"
    file.write_bytes(b"old")
    write(drawn(), file)
    content = file.read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    position = content.index(b"pHYs") + 4
    assert int.from_bytes(content[position : position + 4], "big") == round(300 / 0.0254), "dots per meter"
    image = imread(file)
    assert image.shape[:2] == (height, width)
    assert [path.name for path in tmp_path.iterdir()] == ["figure.png"], "no temporary file is left"
    frame = np.concatenate([image[0], image[-1], image[:, 0], image[:, -1]])
    assert (frame == 1).all(), "nothing is cut off at the border"


def test_a_figure_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "figure.png"
    file.write_bytes(b"old")
    with mock.patch.object(os, "replace", side_effect=OSError("full")), pytest.raises(OSError, match="full"):
        write(learning_curve(epochs_of(3)), file)
    assert file.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_settings_of_the_process_are_not_changed(tmp_path):
    before, backend = dict(matplotlib.rcParams), matplotlib.rcParams._get_backend_or_none()
    write(learning_curve(epochs_of(3)), tmp_path / "figure.png")
    assert dict(matplotlib.rcParams) == before and matplotlib.rcParams._get_backend_or_none() == backend


def test_settings_of_the_user_do_not_reach_the_figures(tmp_path):
    write(learning_curve(epochs_of(3)), tmp_path / "plain.png")
    with matplotlib.rc_context(
        {"font.size": 20, "axes.grid": True, "legend.frameon": True, "savefig.bbox": "tight", "axes.facecolor": "gray"}
    ):
        write(learning_curve(epochs_of(3)), tmp_path / "other.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_pyplot_is_not_used():
    assert not hasattr(plots, "plt") and "pyplot" not in plots.__doc__
