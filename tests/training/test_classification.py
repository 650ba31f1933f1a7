"""Targets that are classes: a training from labels to evaluation, and what classes are not good for."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from small_sets import raw_records
from tiny import NO_FRAMES, StopAt, assert_same_run, open_tiny, tiny_config, tiny_runs

from crystalframer_jax.batching.targets import to_label_units, to_outputs
from crystalframer_jax.cli.evaluate import evaluate_main
from crystalframer_jax.cli.predict import predict_main
from crystalframer_jax.config import ConfigError, validate
from crystalframer_jax.data.custom.fields import CustomData
from crystalframer_jax.data.custom.source import custom_source
from crystalframer_jax.data.prepare import prepare
from crystalframer_jax.inference.ensemble import Ensemble
from crystalframer_jax.inference.predictor import Predictor
from crystalframer_jax.official.conversion import export_checkpoint
from crystalframer_jax.parallel.interruption import TrainingInterrupted
from crystalframer_jax.reporting.metrics import class_metrics
from crystalframer_jax.training.logging import read_metrics
from crystalframer_jax.training.loss import loss_per_crystal
from crystalframer_jax.training.start import train
from crystalframer_jax.training.targets import statistics_of

NACL = "examples/NaCl.cif"
COUNT = 60


def write_records(file, of=lambda number, e_form: {}):
    """Crystals as JSON lines: of class True if their formation energy is low, every tenth unknown."""
    lines = []
    for number, record in enumerate(raw_records(COUNT)):
        e_form = record.pop("formation_energy_per_atom")
        labels = {"stable": "yes" if e_form < -1.2 else "no", "low": bool(e_form < -1.5), "e_form": e_form}
        if number % 10 == 3:
            labels["low"] = None
        lines.append(json.dumps(record | labels | of(number, e_form)))
    file.write_text("\n".join(lines))


def prepared(folder, targets=("stable", "low"), of=lambda number, e_form: {}):
    """The folder of prepared data with the set "mine"."""
    write_records(folder / "mine.jsonl", of)
    prepare(folder / "data" / "mine", custom_source(folder / "mine.jsonl", CustomData(targets=targets)), None)
    return folder / "data"


def config_of(data_dir, **changes):
    usual = {"target_set": "mine", "targets": "stable,low", "task": "classification"}
    return tiny_config(data_dir, **NO_FRAMES | usual | changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    with tiny_runs():
        prepared(folder)
        yield folder


@pytest.fixture(scope="module")
def finished(folder):
    return folder / "run", train(config_of(folder / "data"), folder / "run")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_logistic_loss_and_its_gradient(dtype):
    """log(1 + exp(-x)) of class 1, log(1 + exp(x)) of class 0; the gradient is sigmoid(x) - class, 0 of unknown."""
    with jax.enable_x64(dtype == np.float64):
        x = jnp.array([[0.5, -2.0], [30.0, -200.0], [200.0, 1.0]], dtype)
        y, known = jnp.array([[1, 0], [0, 1], [1, np.nan]], dtype), jnp.array([[1, 1], [1, 1], [1, 0]], bool)
        loss = loss_per_crystal("logistic", x, y, known)
        gradient = jax.grad(lambda x: loss_per_crystal("logistic", x, y, known).sum())(x)
    expected = [np.log1p(np.exp(-0.5)) + np.log1p(np.exp(-2)), 30 + np.exp(-30) + 200, 0]
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-12)
    slopes = [[1 / (1 + np.exp(-0.5)) - 1, 1 / (1 + np.exp(2))], [1, -1], [0, 0]]
    np.testing.assert_allclose(gradient, slopes, rtol=1e-6, atol=1e-12)
    assert loss.dtype == dtype


def test_labels_and_their_statistics(folder):
    config = validate(config_of(folder / "data"))
    dataset = open_tiny(config)
    e_form = {record["id"]: record["formation_energy_per_atom"] for record in raw_records(COUNT)}
    stable, low = dataset.labels.T
    np.testing.assert_array_equal(stable, [float(e_form[id] < -1.2) for id in dataset.table.ids])
    assert np.isnan(low).sum() == COUNT // 10 and set(low[np.isfinite(low)]) == {0, 1}
    for s in statistics_of(config, dataset, dataset.splits["train"]):
        assert (s.unit, s.mean, s.std, s.transform, s.references) == ("", 0, 1, "logit", ())


def test_a_run_resumes_to_the_bit(folder, finished, tmp_path):
    config = config_of(folder / "data")
    with pytest.raises(TrainingInterrupted):
        train(config, tmp_path / "run", interruption=StopAt(6))
    train(config, tmp_path / "run")
    assert_same_run(config, tmp_path / "run", finished[0])


def test_what_a_run_leaves(folder, finished, capsys):
    workdir, summary = finished
    predictor, dataset = Predictor.load(workdir), open_tiny(config_of(folder / "data"))
    rows = dataset.splits["test"]
    probabilities = predictor.predict_dataset(dataset, rows).value
    assert ((probabilities > 0) & (probabilities < 1)).all()
    for t, name in enumerate(("stable", "low")):
        found = class_metrics(probabilities[:, t], dataset.labels[rows, t])
        assert {key: summary["test"][name][key] for key in found} == pytest.approx(found, rel=1e-5)
    assert (
        summary["mean_predictor_log_loss"]["train"]["stable"] < np.log(2) + 1e-9 and summary["task"] == "classification"
    )
    lines = read_metrics(workdir)
    assert all(line["val_roc_auc"].keys() == {"stable", "low"} and "val_mae" not in line for line in lines)
    names = {path.name for path in workdir.iterdir()}
    assert "roc_test.png" in names and "parity_test.png" not in names
    table = list(csv.reader((workdir / "predictions_test.csv").open()))
    assert table[0] == ["id", "target_stable", "probability_stable", "target_low", "probability_low"]
    assert len(table) == 1 + len(rows) and {line[1] for line in table[1:]} <= {"0.0", "1.0"}
    capsys.readouterr()
    assert evaluate_main([str(workdir), f"--plot={workdir.parent / 'roc.png'}"]) == 0
    told = capsys.readouterr().out
    assert "ROC-AUC  balanced accuracy" in told and f"{found['log_loss']:.4f}" in told
    assert predict_main([str(workdir), NACL]) == 0
    assert "stable probability  low probability" in capsys.readouterr().out


def test_the_validation_loss_is_the_logistic_loss_of_the_labels(folder, finished):
    """Of the probabilities, summed over the targets, mean over the crystals."""
    predictor, dataset = Predictor.load(finished[0], "last"), open_tiny(config_of(folder / "data"))
    rows = dataset.splits["val"]
    p, y = predictor.predict_dataset(dataset, rows).value, dataset.labels[rows]
    losses = -np.where(np.isnan(y), 0, y * np.log(p) + (1 - y) * np.log(1 - p))
    assert finished[1]["val_loss"]["last"] == pytest.approx(np.nansum(losses, axis=1).mean(), rel=1e-5)


def test_an_ensemble_combines_probabilities(folder, finished, capsys):
    workdir = folder / "ensemble"
    config = config_of(folder / "data", targets="stable", n_epochs=1, swa_epochs=0, ensemble_size=2)
    config.ensemble_combine = "mean"
    summary = train(config, workdir)
    ensemble, dataset = Ensemble.load(workdir), open_tiny(config)
    rows = dataset.splits["test"]
    samples = ensemble.predict_members(dataset, rows)
    value, spread = ensemble.predict_dataset(dataset, rows)
    np.testing.assert_allclose(value, samples.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(spread, samples.std(axis=0, ddof=1), rtol=1e-9)
    of_all = class_metrics(value[:, 0], dataset.labels[rows, 0])
    assert {key: summary["test"]["stable"][key] for key in of_all} == pytest.approx(of_all)
    told = capsys.readouterr().out
    assert "val ROC-AUC stable" in told and "log loss" in told
    names = {path.name for path in workdir.iterdir()}
    assert {"roc_test.png", "suspect_labels.csv"} <= names and "calibration_test.png" not in names
    assert evaluate_main([str(workdir), f"--plot={folder / 'both.png'}", f"--suspects={folder / 'suspects.csv'}"]) == 0
    assert (folder / "both.png").exists()
    with pytest.raises(ConfigError, match=r"predicts stable probability, member 1 .* stable probability, low prob"):
        Ensemble([ensemble.members[0], Predictor.load(finished[0])])


def test_fine_tuning_from_a_model_of_numbers(folder, tmp_path):
    """The layers are those of the old run; its output for a target of that name is not taken for a logit."""
    data_dir, changes = prepared(tmp_path, ("low",), lambda number, e_form: {"low": e_form}), {"targets": "low"}
    changes |= {"n_epochs": 1, "swa_epochs": 0}
    train(tiny_config(data_dir, target_set="mine", **NO_FRAMES | changes), tmp_path / "old")
    start = {"lr": 1e-12, "pretrained_model": str(tmp_path / "old")}
    train(config_of(folder / "data", **changes, **start), tmp_path / "new")
    old, new = Predictor.load(tmp_path / "old", "last"), Predictor.load(tmp_path / "new", "last")
    arrays, tuned = (flatten_dict(predictor.variables["params"]) for predictor in (old, new))
    for path in arrays.keys() - {("output", "kernel"), ("output", "bias")}:
        np.testing.assert_allclose(tuned[path], arrays[path], rtol=0, atol=1e-6, err_msg=str(path))
    assert not np.allclose(old.variables["params"]["output"]["kernel"], new.variables["params"]["output"]["kernel"])
    assert 0 < new.predict(NACL)[0, 0] < 1


# What is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"element_references": True}, "element_references=True is for targets that are numbers.*=False"),
        ({"target_transform": "log10"}, "target_transform='log10' is for targets that are numbers.*='none'"),
        ({"loss_func": "MSE"}, "loss_func='MSE' is for targets that are numbers.*='L1'"),
        ({"normalize_targets": "bias"}, "normalize_targets='bias' is for targets that are numbers"),
        ({"task": "classify"}, "task='classify' is not available; allowed: 'regression', 'classification'"),
    ],
)
def test_settings_of_numbers(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(config_of(tmp_path, **changes))


@pytest.mark.parametrize("wrong", [0.5, 2])
def test_labels_that_are_no_classes(tmp_path, wrong):
    data_dir = prepared(tmp_path, ("e",), lambda number, e_form: {"e": wrong if number == 17 else number % 2})
    id = raw_records(18)[17]["id"]
    message = f"1 of 60 labels of e are neither 0 nor 1 .*, the first is {wrong} of {id}; correct"
    with pytest.raises(ConfigError, match=message):
        train(config_of(data_dir, targets="e"), tmp_path / "run")


def test_one_class_alone(tmp_path):
    data_dir = prepared(tmp_path, ("e",), lambda number, e_form: {"e": True})
    with pytest.raises(ConfigError, match="'e': 48 training labels that do not vary, all are 1"):
        train(config_of(data_dir, targets="e"), tmp_path / "run")


def test_the_official_format_has_no_classes(finished, tmp_path):
    with pytest.raises(ConfigError, match="task='classification' has no official counterpart"):
        export_checkpoint(finished[0], tmp_path / "model.ckpt")


def test_probabilities_and_logits(folder, finished):
    """The sigmoid, and the way back, also of probabilities that are 0 and 1 in float64."""
    statistics = Predictor.load(finished[0]).targets
    logits = np.array([[-40.0, -3.0], [0.0, 40.0]])
    found = to_label_units(logits, statistics)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), rtol=1e-12)
    np.testing.assert_allclose(to_outputs(found, statistics), np.clip(logits, -36.05, 36.05), rtol=1e-3)
    both = tuple(dataclasses.replace(s, transform=kind) for s, kind in zip(statistics, ("logit", "none"), strict=True))
    np.testing.assert_array_equal(to_label_units(logits, both)[:, 1], logits[:, 1])
