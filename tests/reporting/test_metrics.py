"""Metrics of classes against brute force."""

import matplotlib.image
import numpy as np
import pytest

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.data.store import Dataset
from crystalframer_jax.reporting import plots
from crystalframer_jax.reporting.metrics import class_metrics, mean_predictor_errors, roc_curve, target_metrics
from crystalframer_jax.reporting.suspects import suspect_labels

METAL = TargetStatistics("metal", "", 0.0, 1.0, "logit")
NOTHING = {"log_loss": None, "roc_auc": None, "balanced_accuracy": None, "positives": None}


def brute_force(p, y):
    """Pair by pair, crystal by crystal."""
    pairs = [(a > b) + 0.5 * (a == b) for a in p[y == 1] for b in p[y == 0]]
    right = {c: [(a >= 0.5) == bool(c) for a, ya in zip(p, y, strict=True) if ya == c] for c in (0, 1)}
    log_loss = -np.mean([np.log(a if ya else 1 - a) for a, ya in zip(p, y, strict=True)])
    accuracy = (np.mean(right[0]) + np.mean(right[1])) / 2
    return {"log_loss": log_loss, "roc_auc": np.mean(pairs), "balanced_accuracy": accuracy, "positives": np.mean(y)}


@pytest.mark.parametrize("steps", [1000, 5, 1])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_against_brute_force(seed, steps):
    """Also with many equal probabilities, and with all of them equal."""
    rng = np.random.default_rng(seed)
    y = (rng.random(41) < 0.3).astype(float)
    y[:2] = 0, 1
    p = (np.floor(rng.random(41) * steps) + 0.5) / steps
    assert class_metrics(p, y) == pytest.approx(brute_force(p, y), rel=1e-12)
    unknown = np.append(y, [np.nan, np.nan])
    assert class_metrics(np.append(p, [0.9, np.nan]), unknown) == pytest.approx(brute_force(p, y), rel=1e-12)


def test_one_class_none_and_what_is_not_finite():
    assert class_metrics(np.array([0.5]), np.array([np.nan])) == NOTHING
    found = class_metrics(np.array([0.25, 0.5]), np.array([0.0, 0.0]))
    assert found == {"log_loss": pytest.approx(-np.log(0.75 * 0.5) / 2), "roc_auc": None, "balanced_accuracy": None,
                     "positives": 0.0}  # fmt: skip
    found = class_metrics(np.array([0.25, np.nan]), np.array([0.0, 1.0]))
    assert all(np.isnan(found[key]) for key in ("log_loss", "roc_auc", "balanced_accuracy"))
    assert np.isfinite(class_metrics(np.array([1.0, 0.5]), np.array([0.0, 1.0]))["log_loss"])


def test_the_curve_goes_through_all_thresholds():
    false_rate, true_rate = roc_curve(np.array([0.9, 0.6, 0.6, 0.2]), np.array([True, True, False, False]))
    np.testing.assert_array_equal(false_rate, [0, 0, 0.5, 1])
    np.testing.assert_array_equal(true_rate, [0, 0.5, 1, 1])


def test_several_targets_and_the_mean_predictor():
    labels, train = np.array([[1.0, np.nan], [0.0, 1.0]]), np.array([[1.0, 1.0], [1.0, 0.0], [0.0, np.nan]])
    found = target_metrics(
        np.array([[0.8, 0.1], [0.3, 0.4]]), labels, (METAL, TargetStatistics("b", "", 0, 1, "logit"))
    )
    assert found["metal"]["log_loss"] == pytest.approx(-(np.log(0.8) + np.log(0.7)) / 2)
    assert found["b"]["log_loss"] == pytest.approx(-np.log(0.4)) and found["b"]["roc_auc"] is None
    assert mean_predictor_errors(labels[:, :1], (METAL,), train[:, :1]) == {
        "metal": pytest.approx(-(np.log(2 / 3) + np.log(1 / 3)) / 2)
    }


def test_a_figure_of_curves(tmp_path):
    """Of two targets, one with both classes, the other with one."""
    labels = np.array([[0.0, 1], [1, 1], [1, np.nan], [0, 1]])
    figure = plots.roc(labels, np.array([[0.2, 0.5], [0.7, 0.5], [0.4, 0.5], [0.6, np.nan]]), ["a", "b"], "test")
    left, right = figure.axes
    np.testing.assert_array_equal(left.lines[1].get_xydata(), [[0, 0], [0, 0.5], [0.5, 0.5], [0.5, 1], [1, 1]])
    np.testing.assert_array_equal(left.lines[2].get_xydata(), [[0.5, 0.5]])
    assert "ROC-AUC 0.750, balanced accuracy 0.500" in left.get_title(loc="left") and len(right.lines) == 1
    assert "2 of class 1, 0 of class 0" in right.get_title(loc="left")
    plots.write(figure, tmp_path / "roc.png")
    assert matplotlib.image.imread(tmp_path / "roc.png").shape[0] > 500


def test_suspect_classes_are_on_the_other_side(monkeypatch):
    """A class that all models find more probable than not is not suspect, however sure they are of the others."""
    labels = np.array([[1.0]] + [[1.0]] + [[0.0]] * 8)
    of_model = np.array([[0.05]] + [[0.8]] + [[0.01]] * 8)
    table = type("Table", (), {"ids": np.array(list("abcdefghij"))})
    dataset = Dataset("x", table, (), labels, {"test": np.arange(10)}, np.array([], int), "")
    monkeypatch.setattr("crystalframer_jax.reporting.suspects.amounts_of", lambda table, rows: np.eye(98)[[10]])
    found = suspect_labels(dataset, {"test": np.stack([of_model, of_model + 0.001])}, (METAL,))
    assert [line[1] for line in found] == ["a"]
