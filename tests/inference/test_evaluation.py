"""Errors of predictions, files of predictions, and how many draws of frames there are."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest
from tiny import tiny_config

from crystalframer_jax.batching.targets import TargetStatistics
from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.files import write_csv, write_json
from crystalframer_jax.inference.evaluation import frame_draws
from crystalframer_jax.reporting.metrics import main_metrics, mean_predictor_errors, target_metrics
from crystalframer_jax.reporting.predictions import write_predictions

A, B = TargetStatistics("a", "eV", 1.0, 1.0), TargetStatistics("b", "eV", 2.0, 1.0)


def test_main_metrics_of_known_labels():
    predictions = np.array([[1.0, 2.0], [3.0, 5.0]])
    labels = np.array([[0.0, np.nan], [-1.0, 1.0]])
    assert main_metrics(predictions, labels, (A, B)) == {"a": 2.5, "b": 4.0}
    with pytest.raises(ValueError, match="shape"):
        main_metrics(predictions, labels[:, :1], (A, B))


def test_a_prediction_that_is_not_a_number_is_not_left_out_of_the_error():
    errors = main_metrics(np.array([[1.0], [np.nan]]), np.array([[0.0], [0.0]]), (A,))
    assert not np.isfinite(errors["a"])


def test_a_target_without_known_labels_has_no_error(tmp_path):
    """And a summary with it can be written."""
    labels = np.array([[1.0, np.nan]])
    errors = main_metrics(np.zeros((1, 2)), labels, (A, B))
    assert errors["a"] == 1.0 and math.isnan(errors["b"])
    write_json(tmp_path / "summary.json", {"mae": errors, "all": [math.inf, (math.nan, 2)]})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "mae": {"a": 1.0, "b": None},
        "all": [None, [None, 2]],
    }


def test_metrics_of_known_labels():
    """Errors 1, -2, 3 about labels 0, 1, 5 of mean 2; and two targets without a spread of labels."""
    predictions = np.array([[1.0, 4.0], [-1.0, 5.0], [8.0, 7.0], [100.0, 6.0]], np.float32)
    labels = np.array([[0.0, 5.0], [1.0, 5.0], [5.0, np.nan], [np.nan, np.inf]])
    found = target_metrics(predictions, labels, (A, B))
    assert found["a"] == pytest.approx({"mae": 2.0, "rmse": math.sqrt(14 / 3), "r2": 1 - 14 / 14})
    assert found["b"] == {"mae": 0.5, "rmse": math.sqrt(0.5), "r2": None}
    alone = target_metrics(predictions[:1], labels[:1], (A, B))
    assert alone["a"] == {"mae": 1.0, "rmse": 1.0, "r2": None}
    assert target_metrics(predictions[3:], labels[3:], (A, B))["a"] == {"mae": None, "rmse": None, "r2": None}
    with pytest.raises(ValueError, match="shape"):
        target_metrics(predictions, labels[:, :1], (A, B))


def test_metrics_are_summed_in_float64():
    """Labels that float32 cannot tell apart."""
    labels = 1e6 + np.array([[0.0], [1e-3], [2e-3]])
    found = target_metrics(labels + 1e-4, labels, (A,))["a"]
    assert found == pytest.approx({"mae": 1e-4, "rmse": 1e-4, "r2": 1 - 3e-8 / 2e-6}, rel=1e-3)


def test_metrics_of_a_prediction_that_is_not_a_number():
    found = target_metrics(np.array([[1.0], [np.nan]]), np.array([[0.0], [1.0]]), (A,))["a"]
    assert not any(np.isfinite(value) for value in found.values())


def test_the_mean_predictor_predicts_the_mean_of_the_training_labels():
    labels = np.array([[0.0, 5.0], [4.0, np.nan]])
    assert mean_predictor_errors(labels, (A, B), np.array([[2.0, 2.0]])) == {"a": 2.0, "b": 3.0}
    train = np.array([[4.0, 1.0], [2.0, np.nan]])
    assert mean_predictor_errors(labels, (A, B), train) == {"a": 2.0, "b": 4.0}


@pytest.mark.parametrize("with_spread", [False, True])
def test_a_table_of_predictions_comes_back_from_its_file(tmp_path, with_spread):
    rng = np.random.default_rng(3)
    ids = np.array(["mp-1", 'with "quotes", and comma', "mp-3"])
    labels, predictions, spread = rng.normal(size=(3, 3, 2))
    labels[1, 0] = np.nan
    file = tmp_path / "new" / "predictions.csv"
    for count, names in (
        (1, ["target", "prediction", "spread"]),
        (2, ["target_a", "prediction_a", "target_b", "prediction_b", "spread_a", "spread_b"]),
    ):
        arrays = [x[:, :count] for x in (labels, predictions)]
        write_predictions(file, ids, *arrays, (A, B)[:count], spread[:, :count] if with_spread else None)
        with file.open(newline="") as stream:
            header, *rows = csv.reader(stream)
        assert header == ["id", *(names if with_spread else names[: 2 * count])]
        assert [row[0] for row in rows] == ids.tolist() and rows[1][1] == ""
        columns = [x[:, t] for t in range(count) for x in (labels, predictions)]
        columns += [spread[:, t] for t in range(count)] if with_spread else []
        for place, column in enumerate(columns, 1):
            read = [float(row[place] or "nan") for row in rows]
            np.testing.assert_array_equal(read, column)  # every digit
    assert [path.name for path in file.parent.iterdir()] == ["predictions.csv"]


def test_a_file_that_fails_half_way_leaves_the_old_one(tmp_path):
    file = tmp_path / "table.csv"
    write_csv(file, ["a"], [[1]])

    def failing():
        yield [2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_csv(file, ["a"], failing())
    assert file.read_text() == "a\n1\n" and list(tmp_path.iterdir()) == [file]


def test_draws_of_frames(tmp_path):
    config = validate(tiny_config(tmp_path, num_frame_samples=5))
    assert (frame_draws(config), frame_draws(config, 3)) == (5, 3)
    for samples in (0, -1):
        with pytest.raises(ConfigError, match=f"num_frame_samples={samples}"):
            frame_draws(config, samples)
    config = dataclasses.replace(config, value_pe_angle_real=0, frame_method="no")
    assert (frame_draws(config), frame_draws(config, 3)) == (1, 1)
